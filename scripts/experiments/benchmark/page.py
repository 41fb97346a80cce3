"""The benchmark's page, .json and .png from the sections that were measured so far."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scripts import evidence
from timm_cascade.utils.files import replacing, write_text


def cell(s: dict[str, float], digits: int = 2) -> str:
    """`median (low to high)`, the quartiles in brackets."""
    return f'{s["median"]:.{digits}f} ({s["low"]:.{digits}f} to {s["high"]:.{digits}f})'


def verdict(s: dict[str, float], limit: float | None, at_least: bool = False, digits: int = 2) -> str:
    """A cell that says whether its median meets the target."""
    if limit is None:
        return cell(s, digits)
    missed = s['median'] < limit if at_least else s['median'] > limit
    return cell(s, digits) + (f' **missed** ({">=" if at_least else "<="} {limit:.{digits}f})' if missed else '')


def unite(old: dict[str, Any], new: dict[str, Any], **keys: Sequence[str]) -> dict[str, Any]:
    """The new section with those rows of the old one that it has not measured again.

    Args:
        old, new: Sections. What only the old one has stays.
        keys: For each list of rows, the fields in which no two of its rows agree.
    """
    united = {**old, **new}
    for name, fields in keys.items():
        rows = new.get(name, [])
        done = {tuple(r[f] for f in fields) for r in rows}
        united[name] = [r for r in old.get(name, []) if tuple(r[f] for f in fields) not in done] + rows
    return united


def _described(m: dict[str, Any]) -> str:
    return f'{m["device"]}, torch {m["torch"]}, timm {m["timm"]}'


def elsewhere(section: dict[str, Any]) -> list[str]:
    """Sentences about rows that were measured on another machine, or with other versions, than the newest ones."""
    rows = [r for value in section.values() if isinstance(value, list) for r in value if isinstance(r, dict)]
    found: dict[str, list[str]] = {}
    for r in rows:
        if r.get('machine', section['machine']) != section['machine']:
            names = [str(r[k]) for k in ('data', 'network', 'what', 'mode') if k in r]
            found.setdefault(_described(r['machine']), []).append(' '.join([*names, f'batch {r["batch"]}']))
    return [f'On {m}: {"; ".join(dict.fromkeys(names))}.' for m, names in found.items()]


def write(docs: Path, sections: dict[str, Any], render: Callable[[str, dict[str, Any]], list[str]]) -> None:
    """Writes page, figures and picture into a docs folder; `render` makes a section's Markdown."""
    results, pages = evidence(docs)
    write_text(results / 'benchmark.json', json.dumps(sections, indent=1) + '\n')
    plot(sections, results / 'benchmark.png')
    text = [
        '# Benchmark',
        '',
        'Everything is a ratio of times measured in turns within one run: median of the '
        'repetitions, quartiles in brackets. **missed** marks a target that was not met.',
        '',
        '![time against the ideal, and beside the peers](../../results/benchmark.png)',
    ]
    for name, section in sections.items():
        text += [
            '',
            f'## {name}',
            '',
            f'    {section["command"]}',
            '',
            ' '.join(
                [
                    _described(section['machine'])
                    + (', **quick run: few repetitions, not a result**' if section['quick'] else '')
                    + '.',
                    *elsewhere(section),
                ]
            ),
            '',
            *render(name, section),
        ]
    write_text(pages / 'benchmark.md', '\n'.join([*text, '']))


def plot(sections: dict[str, Any], path: Path) -> None:
    """Left: time of the cascade over plain, against the ideal's. Right: how much faster than each peer."""
    import matplotlib  # here, as a borrowed machine may not have it

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    bars = [
        (f'earlyon, {"random" if "resnet18" in r["what"] else "real"} images, batch {r["batch"]}', r['throughput'])
        for r in sections.get('earlyon', {}).get('rows', [])
    ]
    static = sections.get('static', {})
    bars += [
        (f'every exit, max_drop {r["max_drop"]:.2%}, batch {r["batch"]}', r['faster'])
        for r in static.get('everything', [])
        if r['max_drop'] == 0.005
    ]
    bars += [
        (f'{r["network"]}, {r["data"]}, {r["mode"]}, batch {r["batch"]}', r['faster'])
        for r in static.get('static', [])
        if r['cascade']
    ]
    bars += [
        (f'{r["network"]}, {r["data"]}, {r["mode"]}, stream', r['stream'])
        for r in static.get('static', [])
        if 'stream' in r
    ]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, max(4.5, 1 + 0.2 * len(bars))), dpi=130)
    rows = sections.get('plain', {}).get('rows', [])
    marks = dict(zip(dict.fromkeys(r['network'] for r in rows), 'os^Dv', strict=False))
    for batch, colour in ((1, '#b8860b'), (8, '#4878a8'), (64, '#2e7d32')):
        for network, mark in marks.items():
            these = [r for r in rows if (r['batch'], r['network']) == (batch, network)]
            left.plot(
                [r['ideal_to_plain']['median'] for r in these],
                [r['to_plain']['median'] for r in these],
                mark,
                color=colour,
                ms=5,
                alpha=0.8,
            )
        left.plot([], [], 'o', color=colour, label=f'batch {batch}')
    for network, mark in marks.items():
        left.plot([], [], mark, color='0.4', label=network)
    left.plot([0.3, 1.1], [0.3, 1.1], color='0.6', lw=1, label='the ideal')
    left.axhline(1, color='crimson', lw=1, ls='--')
    left.set(
        xlabel='ideal, time of the plain network',
        ylabel='cascade, time of the plain network',
        title='forced exit shares',
    )
    left.grid(alpha=0.25)
    left.legend(fontsize=7)
    for y, (_, s) in enumerate(bars):
        right.barh(y, s['median'], color='#4878a8')
        right.plot([s['low'], s['high']], [y, y], color='black', lw=1)
    right.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=7)
    right.invert_yaxis()
    right.axvline(1, color='crimson', lw=1, ls='--')
    right.set(xlabel='cascade faster by', title='beside the alternatives, at equal accuracy')
    right.grid(alpha=0.25, axis='x')
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, format='png')
    plt.close(figure)
