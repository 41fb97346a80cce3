"""Prints the result of a command: as lines and tables to read, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ['show']

MANY = 12  # values of a list that are printed at most


def show(result: Mapping[str, Any], as_json: bool) -> None:
    """Prints the result of a command to stdout."""
    if as_json:
        print(json.dumps(result))
        return
    for line in _lines(result):
        print(line)


def _lines(result: Mapping[str, Any], indent: str = '') -> list[str]:
    lines = []
    width = max((len(_name(key)) for key in result), default=0)
    for key, value in result.items():
        rows = isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping)
        if isinstance(value, Mapping) and value:
            lines += [f'{indent}{_name(key)}', *_lines(value, indent + '  ')]
        elif rows:
            lines += [f'{indent}{_name(key)}', *_table(value, indent + '  ')]
        else:
            lines.append(f'{indent}{_name(key):{width}}  {_text(value)}')
    return lines


def _table(rows: Sequence[Mapping[str, Any]], indent: str) -> list[str]:
    """Aligned columns under their names."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_name(name) for name in names], *([_text(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return [indent + '  '.join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip() for line in cells]


def _name(key: str) -> str:
    return str(key).replace('_', ' ')


def _text(value: Any) -> str:
    if value is None:
        return '-'
    if isinstance(value, bool):
        return 'yes' if value else 'no'
    if isinstance(value, float):
        value += 0.0  # no minus before a zero
        return f'{value:.4f}' if 1e-3 <= abs(value) < 1e3 or not value else f'{value:.4g}'
    if isinstance(value, int):
        return f'{value:,}'
    if isinstance(value, (list, tuple)):
        shown = ', '.join(_text(v) for v in value[:MANY])
        return f'{shown}, ... ({len(value)} in all)' if len(value) > MANY else shown or 'none'
    return str(value)
