"""How often the dial delivers what was asked: many calibration samples of a population that is known in full.

    python scripts/experiments/coverage hub/releases/cascade_cifar_resnet20.fashion_mnist --recipe \\
        hub/recipes/cascade_cifar_resnet20.fashion_mnist.yaml --n 1000 5000 10000

All held-out images of the release (calibration and test together) are the population. Each draw is a calibration
sample of n images from it, with replacement; the dial is set on the draw, and the loss it delivers is read off the
whole population, so that there is no test noise: over the limit is over the limit. Writes
docs/pages/evidence/coverage.NAME.md and docs/results/coverage.NAME.json and .png. Draws that are done are kept in
runs/coverage.NAME.jsonl and not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import yaml
from tqdm.auto import tqdm

import timm_cascade
from scripts import ROOT, evidence
from scripts.releases.release import DATA
from timm_cascade.measure.calibrate import record
from timm_cascade.thresholds import Calibration, outcome
from timm_cascade.utils.files import replacing, write_text

matplotlib.use('Agg')
import matplotlib.pyplot as plt

RULES = ('per_exit', 'joint', 'certified')
MAX_DROPS = (0.0025, 0.005, 0.01, 0.02)
SEED = 20190917


def population(release: Path, recipe: dict[str, Any], cache: Path) -> Calibration:
    """Every held-out image of the release, as one calibration; kept in `cache` while the heads are the same."""
    model = timm_cascade.load(release)
    assert model.calibration is not None
    if cache.exists():
        kept = Calibration.load(cache)
        if kept.heads_hash == model.heads_hash():
            return kept
    load = DATA[recipe['data']['name']]
    parts = [record(model, load(recipe['data'][split])) for split in ('calibration', 'test')]
    whole = dataclasses.replace(model.calibration, **{k: np.concatenate([p[k] for p in parts]) for k in parts[0]})
    whole.save(cache)
    return whole


def sample(whole: Calibration, n: int, draw: int) -> Calibration:
    chosen = np.random.default_rng([SEED, n, draw]).integers(0, whole.n, n)
    return dataclasses.replace(
        whole, confidence=whole.confidence[chosen], correct=whole.correct[chosen], agreement=whole.agreement[chosen]
    )


_whole: Calibration


def _start(cache: Path) -> None:
    global _whole
    _whole = Calibration.load(cache)


def one_draw(job: tuple[int, int]) -> list[dict[str, Any]]:
    """Sets the dial in every way on one sample; what each setting costs and loses on the population."""
    n, draw = job
    drawn = sample(_whole, n, draw)
    lines = []
    for rule in RULES:
        for max_drop in MAX_DROPS:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')  # "too few samples" is a result here
                point = drawn.point(max_drop, rule=rule, seed=draw)
            truth = outcome(_whole.confidence, _whole.correct, _whole.stage_cost, point.thresholds, _whole.head_cost)
            lines.append(
                dict(
                    n=n,
                    draw=draw,
                    rule=rule,
                    max_drop=max_drop,
                    delivered=truth.drop,
                    saved=1 - truth.cost / _whole.backbone_cost,
                )
            )
    return lines


def summary(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for n in sorted({x['n'] for x in lines}):
        for rule in RULES:
            for max_drop in MAX_DROPS:
                these = [x for x in lines if (x['n'], x['rule'], x['max_drop']) == (n, rule, max_drop)]
                delivered = np.array([x['delivered'] for x in these])
                rows.append(
                    dict(
                        n=n,
                        rule=rule,
                        max_drop=max_drop,
                        draws=len(these),
                        median=float(np.median(delivered)),
                        mean=float(delivered.mean()),
                        p90=float(np.quantile(delivered, 0.9)),
                        over=float((delivered > max_drop + 1e-12).mean()),
                        saved=float(np.mean([x['saved'] for x in these])),
                    )
                )
    return rows


def markdown(rows: list[dict[str, Any]], whole: Calibration, release: Path, command: str) -> str:
    full = whole.correct[:, -1].mean()
    text = [
        f'# Coverage of the dial: {release.name}',
        '',
        f'Population: all {whole.n:,} held-out images (backbone {full:.2%} correct). {rows[0]["draws"]} calibration '
        f'samples of each size n, drawn with replacement; losses are read off the whole population. Losses in points '
        f'of accuracy; over: share of the samples whose delivered loss exceeds what was asked; saved: mean share of '
        f"the backbone's MACs, heads counted.",
        '',
        f'![delivered against asked](../../results/coverage.{release.name}.png)',
        '',
        f'    {command}',
        '',
        '| n | rule | asked | delivered, mean | median | 90th percentile | over | MACs saved |',
        '| --- | --- | --- | --- | --- | --- | --- | --- |',
    ]
    for r in rows:
        losses = ' | '.join(f'{100 * r[key]:.2f}' for key in ('max_drop', 'mean', 'median', 'p90'))
        text.append(f'| {r["n"]:,} | {r["rule"]} | {losses} | {r["over"]:.1%} | {r["saved"]:.1%} |')
    return '\n'.join([*text, ''])


def plot(lines: list[dict[str, Any]], path: Path, title: str) -> None:
    """Delivered against asked: a box a rule and max_drop, one panel a sample size."""
    from scripts.releases.pictures import COLOURS, LABELS

    sizes = sorted({x['n'] for x in lines})
    figure, panels = plt.subplots(1, len(sizes), figsize=(4 * len(sizes), 4), dpi=130, sharey=True, squeeze=False)
    for axes, n in zip(panels[0], sizes, strict=True):
        for k, rule in enumerate(RULES):
            boxes = [
                [100 * x['delivered'] for x in lines if (x['n'], x['rule'], x['max_drop']) == (n, rule, d)]
                for d in MAX_DROPS
            ]
            drawn = axes.boxplot(
                boxes,
                positions=np.arange(len(MAX_DROPS)) + 0.25 * (k - 1),
                widths=0.2,
                patch_artist=True,
                showfliers=False,
                whis=(5, 95),
                medianprops=dict(color='black'),
            )
            for box in drawn['boxes']:
                box.set(facecolor=COLOURS[rule], alpha=0.8)
            axes.plot([], [], 's', color=COLOURS[rule], label=LABELS[rule])
        for i, d in enumerate(MAX_DROPS):
            axes.hlines(100 * d, i - 0.4, i + 0.4, color='crimson', lw=1.5, label='asked' if i == 0 else None)
        axes.set_xticks(range(len(MAX_DROPS)), [f'{100 * d:g}' for d in MAX_DROPS])
        axes.set(xlabel='max_drop asked, points', title=f'n = {n:,}')
        axes.grid(alpha=0.25, axis='y')
    panels[0][0].set_ylabel('loss delivered on the population, points')
    panels[0][0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, format='png')
    plt.close(figure)


def _relative(path: Path) -> Path:
    path = path.resolve()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('release', type=Path)
    parser.add_argument('--recipe', type=Path, required=True)
    parser.add_argument('--n', type=int, nargs='+', default=[1000, 5000, 10000])
    parser.add_argument('--draws', type=int, default=200)
    parser.add_argument('--processes', type=int, default=2)
    parser.add_argument('--out', type=Path, default=ROOT / 'docs')
    args = parser.parse_args()
    recipe = yaml.safe_load(args.recipe.read_text(encoding='utf-8'))
    work = ROOT / 'runs'
    cache, log = work / f'coverage.{args.release.name}.safetensors', work / f'coverage.{args.release.name}.jsonl'
    whole = population(args.release, recipe, cache)

    # a line that was cut off by a kill is not a result
    kept = [json.loads(x) for x in log.read_text().splitlines() if x.endswith('}')] if log.exists() else []
    kept = [x for x in kept if x['heads'] == whole.heads_hash and x['version'] == timm_cascade.__version__]
    done = {(x['n'], x['draw']) for x in kept}
    jobs = [(n, d) for d in range(args.draws) for n in args.n if (n, d) not in done]
    with multiprocessing.Pool(args.processes, _start, (cache,)) as pool, open(log, 'a', encoding='utf-8') as f:
        for lines in tqdm(pool.imap_unordered(one_draw, jobs), total=len(jobs), desc='draws', disable=None):
            f.write(
                json.dumps(
                    dict(
                        heads=whole.heads_hash,
                        version=timm_cascade.__version__,
                        n=lines[0]['n'],
                        draw=lines[0]['draw'],
                        lines=lines,
                    )
                )
                + '\n'
            )
            f.flush()
            kept.append(dict(n=lines[0]['n'], draw=lines[0]['draw'], lines=lines))
    lines = [x for k in kept if k['n'] in args.n and k['draw'] < args.draws for x in k['lines']]
    rows = summary(lines)
    command = (
        f'python scripts/experiments/coverage {_relative(args.release)} --recipe {_relative(args.recipe)} '
        f'--n {" ".join(map(str, args.n))} --draws {args.draws}'
    )
    name = f'coverage.{args.release.name}'
    results, pages = evidence(args.out)
    plot(lines, results / f'{name}.png', args.release.name)
    write_text(results / f'{name}.json', json.dumps(dict(command=command, population=whole.n, rows=rows), indent=1))
    text = markdown(rows, whole, args.release, command)
    write_text(pages / f'{name}.md', text)
    print(text)
