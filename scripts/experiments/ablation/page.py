"""What the ablation writes: means over the seeds, which switch pays, the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from scripts.experiments.ablation.features import PAIRS, recipe_of
from scripts.experiments.ablation.heads import Row

DROPS = (0.0025, 0.005, 0.01)
METRICS = (*(f'saved_{drop:g}' for drop in DROPS), 'area')
SEEDS = (0, 1, 2)
PAYS = 0.005  # of the MACs: less is not worth a switch
PAPER = "the paper's recipe: two exits, its heads, SGD"
BASE = '**base**: all exits, enhanced heads'
THREE = 'three exits'
OLD = "version 0.1's default: three exits, a 4x4 grid, up to 64 hidden units"
NEW = '**default**: five exits, the mean beside the grid, width by classes and cost'
MORE, LESS = 0.05, 0.01  # of the MACs: expected of the default on a thousand classes, and allowed to be lost elsewhere
HEADS = 3  # a result without it was measured with the default heads of version 0.1, see FORMER_HEADS
OURS = BASE  # plus every switch that pays on two pairs or more and is worth its cost: none yet
INTRODUCTION = """# What makes exit heads good

    {command}

Frozen backbones, trained here; heads trained {seeds} times with different seeds, 20 epochs. Mean ± standard deviation
over the seeds; the backbone is the same for all.

- **saved at x**: share of the backbone's MACs saved, heads counted, at x points of accuracy *realised* on images that
  chose nothing. The joint rule's path of threshold vectors, of which any `max_drop` picks one, is made on the
  calibration images; each of its points is then run over the test images. The loss along the path is made monotone
  (isotonic regression, each point weighted by its step in cost), and the cheapest point whose loss is at most x counts.
  The two sets of images then change places, and the two figures are averaged; where they are few (the emoji), over
  three more random halvings too.
- **area**: accuracy averaged over all budgets from nothing to the whole backbone along the same path; below its
  cheapest point part of the images are guessed.
- **heads**: MACs of all heads over those of the backbone.

The paper's recipe: two exits, where the first and the second group of its networks end; average pooling to 4x4 and 2x2,
FC 64, FC C; SGD 0.9, weight decay 1e-4, lr 0.01 at batches of 256, x0.1 after 10 epochs. Its thresholds are the joint
rule's here, as for every row. The base is what `train_heads` does by default, with exits at every block but the last;
three exits, spread over the network, were the library's default in version 0.1 and have a row of their own.
"""
FORMER_HEADS = """
{pairs} were measured with the heads of version 0.1 (a 4x4 grid alone, at most 64 hidden units) as the default heads.
Five exits, wider heads, the mean and the tokens have become the default since; these pairs have not been run again.
"""
WHICH = f"""Each switch alone on top of the base row: gain in MACs saved, in points, averaged over the three losses;
mean ± standard error of the difference to the base, seed by seed. Bold: it pays, by more than two standard errors and
more than {100 * PAYS:g} points. These errors are of the heads' seeds: other test images would move all rows together,
and the differences by some more than they say."""
DEFAULTS = f"""MACs saved at 0.5 points of realised loss, mean ± standard deviation over the seeds. The default is what
a new cascade has; rows below the third change one thing of it. An empty cell: not run, or the default's own heads.
Expected over version 0.1: {100 * MORE:g} points more on a thousand classes, at most {100 * LESS:g} less elsewhere."""


def seeds_of(name: str) -> tuple[int, ...]:
    """The seeds of a pair."""
    return SEEDS[: PAIRS[name].get('seeds')]


def summary(runs: list[dict[str, Any]], name: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Of one pair: mean and standard deviation over the seeds; the gain over the base row, seed by seed."""
    found = {(x['key'], x['seed']): x for x in runs if x['pair'] == name}
    base, seeds = next(r for r in rows if r.name in (BASE, NEW)), seeds_of(name)
    table = []
    for row in rows:
        mine = [found[row.key, s] for s in seeds if (row.key, s) in found]
        if len(mine) < min(2, len(seeds)):  # not finished
            continue
        line: dict[str, Any] = dict(
            pair=name,
            row=row.name,
            heads=HEADS,
            seeds=len(mine),
            heads_share=mine[0]['heads_share'],
            exits=mine[0]['exits'],
            exit_accuracy=np.mean([x['exit_accuracy'] for x in mine], axis=0).tolist(),
        )
        for key in METRICS:
            values = [x[key] for x in mine]
            line[key] = dict(mean=float(np.mean(values)), sd=_deviation(values))
        gains = [
            float(np.mean([x[k] - found[base.key, x['seed']][k] for k in METRICS[:-1]]))
            for x in mine
            if (base.key, x['seed']) in found
        ]
        deviation = _deviation(gains)
        error = None if deviation is None else deviation / len(gains) ** 0.5
        line['gain'] = dict(mean=float(np.mean(gains)), error=error)
        line['pays'] = bool(error is not None and line['gain']['mean'] > max(PAYS, 2 * error))
        table.append(line)
    return table


def _deviation(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def about(name: str) -> str:
    """How the pair's backbone was made, and what its heads train on."""
    pair, recipe = PAIRS[name], recipe_of(PAIRS[name])
    size = recipe['model']['create']['pretrained_cfg_overlay']['input_size']
    few, tuned, on = pair.get('images'), recipe['backbone'].get('finetune'), recipe['data']['train']
    heads = (
        f"its first {few:,} images; rows with the paper's exits on all" if few else f'`{on}`' if tuned else 'all of it'
    )
    if tuned:
        made = f'ImageNet weights, fine-tuned for {tuned["epochs"]} epochs as `{pair["recipe"]}` says'
    else:
        made = 'as released' if 'release' in pair else f'trained for {recipe["backbone"]["epochs"]} epochs'
        made += f' on `{on}`'
    seeds = f' {len(seeds_of(name))} seed.' if len(seeds_of(name)) == 1 else ''
    return f'Backbone: {recipe["model"]["base"]} for {size[1]}x{size[2]} pixels, {made}. Heads train on {heads}.{seeds}'


Table = Mapping[tuple[str, str], Mapping[str, Any]]


def _cell(x: Mapping[str, Any]) -> str:
    return f'{100 * x["mean"]:.1f}' + ('' if x['sd'] is None else f' ± {100 * x["sd"]:.1f}')


def _gain(x: Mapping[str, Any] | None) -> str:
    if x is None:
        return ''
    gain, error = 100 * x['gain']['mean'], x['gain']['error']
    shown = f'{gain:+.1f}' + ('' if error is None else f' ± {100 * error:.1f}')
    return f'**{shown}**' if x['pays'] else shown


def _against_paper(of: Table, names: Sequence[str]) -> list[str]:
    text = [
        "## Ours against the paper's recipe",
        '',
        "MACs saved at 0.5 points. Expected were 10 points more than by the paper's recipe.",
        '',
        "| backbone, data | backbone | the paper's recipe | ours, three exits | more | ours (base row) | more |",
        '| --- | --- | --- | --- | --- | --- | --- |',
    ]
    for name in names:
        paper, *ours = (of[name, row]['saved_0.005'] for row in (PAPER, THREE, OURS))
        compared = []
        for x in ours:
            more = 100 * (x['mean'] - paper['mean'])
            compared.append(f'{_cell(x)} | {more:+.1f}, {"met" if more >= 10 else "missed"}')
        text.append(f'| {name} | {of[name, BASE]["exit_accuracy"][-1]:.1%} | {_cell(paper)} | {" | ".join(compared)} |')
    return text


def _switches(of: Table, names: Sequence[str], rows: Sequence[Row]) -> list[str]:
    text = ['', '## Which switch pays', '', WHICH, '']
    text += [f'| row | {" | ".join(names)} | pays on |', f'| --- | {"--- | " * len(names)}--- |']
    for row in rows:
        cells = [of.get((name, row.name)) for name in names]
        if row.name != BASE:
            text.append(
                f'| {row.name} | {" | ".join(map(_gain, cells))} | {sum(bool(c and c["pays"]) for c in cells)} of '
                f'{sum(c is not None for c in cells)} |'
            )
    return text


def _defaults(of: Table, names: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """What the library does by default on networks with ImageNet weights, beside one change at a time."""
    text = ['', '## Networks with ImageNet weights: the default, and one change at a time', '', DEFAULTS, '']
    text += [f'| row | {" | ".join(names)} |', f'| --- |{" --- |" * len(names)}']
    for row in rows:
        cells = [of.get((name, row.name)) for name in names]
        shown = ['' if c is None else _cell(c['saved_0.005']) for c in cells]
        text.append(f'| {row.name} | {" | ".join(shown)} |')
    text += ['', '| the default against | ' + ' | '.join(names) + ' |', f'| --- |{" --- |" * len(names)}']
    for other in (OLD, PAPER):
        more = [of[name, NEW]['saved_0.005']['mean'] - of[name, other]['saved_0.005']['mean'] for name in names]
        text.append(f'| {other} | {" | ".join(f"{100 * x:+.1f}" for x in more)} |')
        if other == OLD:
            classes = [recipe_of(PAIRS[name])['model']['create']['num_classes'] for name in names]
            least = [MORE if many >= 1000 else -LESS for many in classes]
            verdicts = ['met' if x >= y else 'missed' for x, y in zip(more, least, strict=True)]
            text.append(f'| expected | {" | ".join(verdicts)} |')
    return text


def _pair(of: Table, name: str, rows: Sequence[Row]) -> list[str]:
    base = of[name, BASE if (name, BASE) in of else NEW]
    text = ['', f'## {name}', '', about(name), '']
    text += ['| row | saved at 0.25 | at 0.5 | at 1 | area | heads |', '| --- | --- | --- | --- | --- | --- |']
    for x in (of[name, r.name] for r in rows if (name, r.name) in of):
        text.append(f'| {x["row"]} | {" | ".join(_cell(x[k]) for k in METRICS)} | {x["heads_share"]:.2%} |')
    exits, accuracy = base.get('exits', PAIRS[name]['exits']), base['exit_accuracy']
    shown = ', '.join(f'{e} {a:.1%}' for e, a in zip(exits, accuracy, strict=False))
    which = 'base' if base['row'] == BASE else 'default'
    return [
        *text,
        '',
        f'Exits of the {which} row, correct on the held-out images: {shown}; backbone {accuracy[-1]:.1%}.',
    ]


def markdown(
    table: list[dict[str, Any]], names: Sequence[str], rows_of: Callable[[str], Sequence[Row]], command: str
) -> str:
    of: Table = {(x['pair'], x['row']): x for x in table}
    real = [name for name in names if PAIRS[name].get('finetuned')]
    small = [name for name in names if name not in real]
    former = [name for name in small if of[name, BASE].get('heads', 1) < 2]
    text = [INTRODUCTION.format(command=command, seeds=len(SEEDS))]
    text += [FORMER_HEADS.format(pairs=', '.join(former)).lstrip()] if former else []
    text += [f'Not run: {", ".join(left)}.', ''] if (left := [name for name in PAIRS if name not in names]) else []
    text += [*_against_paper(of, small), *_switches(of, small, rows_of(small[0]))] if small else []
    text += _defaults(of, real, rows_of(real[0])) if real else []
    for name in names:
        text += _pair(of, name, rows_of(name))
    return '\n'.join([*text, ''])
