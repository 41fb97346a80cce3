"""What the ablation writes: means over the seeds, which switch pays, the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
WHICH = f"""Each switch alone on top of the base row: gain in MACs saved, in points, averaged over the three losses;
mean ± standard error of the difference to the base, seed by seed. Bold: it pays, by more than two standard errors and
more than {100 * PAYS:g} points. These errors are of the heads' seeds: other test images would move all rows together,
and the differences by some more than they say."""


def summary(runs: list[dict[str, Any]], names: Iterable[str], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds; the gain over the base row, seed by seed."""
    found = {(x['pair'], x['key'], x['seed']): x for x in runs}
    base = next(r for r in rows if r.name == BASE)
    table = []
    for name in names:
        for row in rows:
            mine = [found[name, row.key, s] for s in SEEDS if (name, row.key, s) in found]
            if len(mine) < 2:  # not finished
                continue
            line: dict[str, Any] = dict(
                pair=name,
                row=row.name,
                seeds=len(mine),
                heads_share=mine[0]['heads_share'],
                exit_accuracy=np.mean([x['exit_accuracy'] for x in mine], axis=0).tolist(),
            )
            for key in METRICS:
                values = [x[key] for x in mine]
                line[key] = dict(mean=float(np.mean(values)), sd=float(np.std(values, ddof=1)))
            gains = [
                np.mean([x[k] - found[name, base.key, x['seed']][k] for k in METRICS[:-1]])
                for x in mine
                if (name, base.key, x['seed']) in found
            ]
            line['gain'] = dict(mean=float(np.mean(gains)), error=float(np.std(gains, ddof=1) / len(gains) ** 0.5))
            line['pays'] = bool(line['gain']['mean'] > max(PAYS, 2 * line['gain']['error']))
            table.append(line)
    return table


def about(name: str) -> str:
    """How the pair's backbone was made, and what its heads train on."""
    pair, recipe = PAIRS[name], recipe_of(PAIRS[name])
    size = recipe['model']['create']['pretrained_cfg_overlay']['input_size']
    made = 'as released' if 'release' in pair else f'trained for {recipe["backbone"]["epochs"]} epochs'
    few = pair.get('images')
    heads = f"its first {few:,} images; rows with the paper's exits on all" if few else 'all of it'
    return (
        f'Backbone: {recipe["model"]["base"]} for {size[1]}x{size[2]} pixels, {made} on '
        f'`{recipe["data"]["train"]}`. Heads train on {heads}.'
    )


def markdown(table: list[dict[str, Any]], names: Sequence[str], rows: Sequence[Row], command: str) -> str:
    of = {(x['pair'], x['row']): x for x in table}

    def cell(x: dict[str, float]) -> str:
        return f'{100 * x["mean"]:.1f} ± {100 * x["sd"]:.1f}'

    text = [
        INTRODUCTION.format(command=command, seeds=len(SEEDS)),
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
            compared.append(f'{cell(x)} | {more:+.1f}, {"met" if more >= 10 else "missed"}')
        text.append(f'| {name} | {of[name, BASE]["exit_accuracy"][-1]:.1%} | {cell(paper)} | {" | ".join(compared)} |')
    left = [name for name in PAIRS if name not in names]
    text += ['', f'Not run: {", ".join(left)}.'] if left else []
    text += [
        '',
        '## Which switch pays',
        '',
        WHICH,
        '',
        f'| row | {" | ".join(names)} | pays on |',
        f'| --- | {"--- | " * len(names)}--- |',
    ]
    for row in rows:
        cells = [of.get((name, row.name)) for name in names]
        shown = ['' if c is None else f'{100 * c["gain"]["mean"]:+.1f} ± {100 * c["gain"]["error"]:.1f}' for c in cells]
        shown = [f'**{x}**' if c and c['pays'] else x for x, c in zip(shown, cells, strict=True)]
        if row.name != BASE:
            text.append(
                f'| {row.name} | {" | ".join(shown)} | {sum(bool(c and c["pays"]) for c in cells)} of '
                f'{sum(c is not None for c in cells)} |'
            )
    for name in names:
        text += [
            '',
            f'## {name}',
            '',
            about(name),
            '',
            '| row | saved at 0.25 | at 0.5 | at 1 | area | heads |',
            '| --- | --- | --- | --- | --- | --- |',
        ]
        for x in (of[name, r.name] for r in rows if (name, r.name) in of):
            text.append(f'| {x["row"]} | {" | ".join(cell(x[k]) for k in METRICS)} | {x["heads_share"]:.2%} |')
        accuracy = of[name, BASE]['exit_accuracy']
        text += [
            '',
            f'Exits of the base row, correct on the held-out images: '
            f'{", ".join(f"{e} {a:.1%}" for e, a in zip(PAIRS[name]["exits"], accuracy, strict=False))}; '
            f'backbone {accuracy[-1]:.1%}.',
        ]
    return '\n'.join([*text, ''])
