"""Work units: the smallest piece that is predicted, written and resumed as one. One unit, one part file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PlanError
from ..utils.files import write_text
from .inputs import Source

__all__ = ['PLAN', 'Unit', 'divide', 'open_folder', 'parse_shard']

PLAN = '_predict.json'


@dataclass(frozen=True)
class Unit:
    """A range of one source's images.

    Attributes:
        number: Number of the unit, counted over all sources.
        source: Number of the source.
        start, stop: The images start..stop-1.
    """

    number: int
    source: int
    start: int
    stop: int

    def part(self, folder: Path) -> Path:
        """The file of its predictions; the name follows from the unit alone."""
        return folder / f'part-{self.number:06d}.parquet'


def divide(sources: Sequence[Source], size: int) -> list[Unit]:
    """The units of all sources, of at most `size` images each."""
    units: list[Unit] = []
    for number, source in enumerate(sources):
        for start in range(0, len(source), size):
            units.append(Unit(len(units), number, start, min(start + size, len(source))))
    return units


def parse_shard(text: str | None) -> tuple[int, int]:
    """(I, N) of `I/N`, I from 1 to N: this process predicts every N-th unit, beginning with the I-th.

    Raises:
        ValueError: Another text.
    """
    if text is None:
        return 1, 1
    match = re.fullmatch(r'(\d+)/(\d+)', text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f'shard is {text!r}; expected I/N with I from 1 to N, such as 1/8 for the first of eight.')
    return int(match[1]), int(match[2])


def open_folder(folder: Path, plan: dict[str, Any]) -> None:
    """Makes the folder, or makes sure that what is in it was begun with the same plan.

    Raises:
        PlanError: It was begun with another one; the message says what differs.
    """
    path = folder / PLAN
    text = json.dumps(plan, indent=1, sort_keys=True)
    if not path.exists():
        if folder.is_dir() and any(folder.glob('part-*.parquet')):
            raise PlanError(
                f'{folder} holds part files but no {PLAN}, so nothing says what they are of. Give another '
                f'folder, or remove them.'
            )
        folder.mkdir(parents=True, exist_ok=True)
        _create(path, text)
    try:
        known = json.loads(path.read_text(encoding='utf-8'))
        assert isinstance(known, dict)
    except (ValueError, AssertionError) as e:
        raise PlanError(f'{path} is damaged ({e}); give another folder, or remove this one.') from e
    plan = json.loads(text)
    other = sorted(k for k in plan.keys() | known.keys() if plan.get(k) != known.get(k))
    if other:
        told = '; '.join(f'{k} was {_short(known.get(k))} and is {_short(plan.get(k))}' for k in other)
        raise PlanError(f'{folder} was begun with other settings: {told}. Give another folder, or remove this one.')


def _create(path: Path, text: str) -> None:
    """Writes the file unless another process has just done so: the first of several shards wins."""
    beside = path.with_name(f'{path.name}.{os.getpid()}')
    write_text(beside, text)
    try:
        os.link(beside, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        beside.replace(path)
    beside.unlink(missing_ok=True)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f'{text[:77]}...'
