"""How often the dial delivers what was asked: many calibration samples of a population that is known in full.

    python scripts/experiments/coverage hub/releases/cascade_cifar_resnet20.fashion_mnist --recipe \\
        hub/recipes/cascade_cifar_resnet20.fashion_mnist.yaml --n 1000 5000 10000

All held-out images of the release (calibration and test together) are the population. Each draw is a calibration
sample of n images from it, with replacement; the dial is set on the draw, and the loss it delivers is read off the
whole population, so that there is no test noise: over the limit is over the limit. The path of thresholds comes from
the training images of the heads, as `train_heads` has stored it with them. Three forms of `certified` are measured:

    certified            the whole dial at once, the path from the training images (what a user gets)
    certified, split     the whole dial at once, the path proposed by a quarter of the sample
    certified, setting   each setting by itself, the path from the training images

For the first two a draw counts as over as soon as any setting of a grid from 0.05 to 20 points is. With --synthetic the
same is measured on populations that are made to be difficult (tests/populations.py).

Writes docs/pages/evidence/coverage.NAME.md and docs/results/coverage.NAME.json and .png. Draws that are done are kept
in runs/coverage.NAME.jsonl and not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import yaml
from tqdm.auto import tqdm

import timm_cascade
from scripts import ROOT, evidence
from scripts.releases.release import DATA
from tests import populations
from timm_cascade.measure.calibrate import record
from timm_cascade.thresholds import Calibration, Samples, outcome, training_path
from timm_cascade.utils.files import replacing, write_text

matplotlib.use('Agg')
import matplotlib.pyplot as plt

RULES = ('per_exit', 'joint', 'certified', 'certified, split', 'certified, setting')
MAX_DROPS = (0.0025, 0.005, 0.01, 0.02)
SHOWN = RULES[:3]  # in the picture
GRID = (0.0, *np.geomspace(0.0005, 0.2, 60).tolist())  # settings of which none may be over
SEED = 20190917
TRAINING_IMAGES = 20_000  # that propose the path of a release without one


def population(release: Path, recipe: dict[str, Any], cache: Path) -> Calibration:
    """Every held-out image of the release, as one calibration; kept in `cache` while the heads are the same."""
    model = timm_cascade.load(release)
    assert model.calibration is not None
    if cache.exists():
        kept = Calibration.load(cache)
        if kept.heads_hash == model.heads_hash() and kept.path is not None:
            return kept
    load, costs = DATA[recipe['data']['name']], (model.calibration.stage_cost, model.calibration.head_cost)
    test, path = record(model, load(recipe['data']['test'])), model.dial.path
    if path is None:  # heads that were trained before paths were stored with them
        seen = record(model, load(f'train[:{TRAINING_IMAGES}]'))
        path = training_path(Samples(seen['confidence'], seen['agreement'], *costs))
    parts = {
        k: np.concatenate([getattr(model.calibration, k), test[k]]) for k in ('confidence', 'correct', 'agreement')
    }
    whole = dataclasses.replace(model.calibration, **parts, path=path)
    whole.save(cache)
    return whole


def synthetic(name: str) -> Calibration:
    """One of the populations that the tests are made of; half of it proposes the path and is then left out."""
    c, r = SYNTHETIC[name]()
    exits = c.shape[1] - 1
    agreement = r == r[:, -1:]  # the most that two wrong answers can agree
    half = len(c) // 2
    return Calibration(
        confidence=c[half:],
        correct=r[half:],
        agreement=agreement[half:],
        stage_cost=np.ones(exits + 1),
        head_cost=np.zeros(exits),
        backbone_cost=exits + 1.0,
        exits=tuple(f'exit{m}' for m in range(exits)),
        num_classes=10,
        heads_hash=f'synthetic {name}',
        path=training_path(Samples(c[:half], agreement[:half])),
    )


def _flips(n: int, exits: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Exits err independently of the network: many harmful and many helpful flips."""
    rng = np.random.default_rng(5)
    easiness = rng.normal(size=(n, 1))
    skill = easiness + 0.5 * rng.normal(size=(n, exits + 1)) * np.linspace(0.9, 0.5, exits + 1)
    limits = [np.quantile(skill[:, m], 1 - accuracy) for m, accuracy in enumerate(np.linspace(0.65, 0.75, exits + 1))]
    logit = 1.5 * easiness + 0.7 * rng.normal(size=(n, exits + 1)) + 0.5
    return (1 / (1 + np.exp(-logit))).astype(np.float32), skill > np.array(limits)


def _shuffled(population: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    order = np.random.default_rng(0).permutation(len(population[0]))
    return population[0][order], population[1][order]


SYNTHETIC: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
    'realistic': lambda: populations.realistic(40_000, 3),
    'eight exits': lambda: populations.realistic(40_000, 8, first=0.7, last=0.93),
    'ties': lambda: populations.tied(40_000, 3),
    'rare harm': lambda: _shuffled(populations.rare_harm(40_000, 0.006)),
    'useless exits': lambda: populations.useless(40_000, 2),
    'overconfident': lambda: populations.overconfident(40_000, 2),
    'better exits': lambda: populations.realistic(40_000, 3, first=0.85, last=0.8),
    'many flips': lambda: _flips(60_000),
}


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
    known: dict[tuple[float, ...], Any] = {}

    def truth(thresholds: Sequence[float]) -> Any:
        key = tuple(thresholds)
        if key not in known:
            known[key] = outcome(_whole.samples(), thresholds)
        return known[key]

    lines = []
    for rule in RULES:
        name, _, form = rule.partition(', ')
        source = dataclasses.replace(drawn, path=None) if form == 'split' else drawn
        scope = 'setting' if form == 'setting' else 'dial'
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # "too few samples" is a result here
            points = {d: source.point(d, name, seed=draw, scope=scope) for d in MAX_DROPS}
        any_over = None
        if name == 'certified' and scope == 'dial':
            certificate = source.certificate(seed=draw)
            any_over = any(truth(certificate.choice(d).thresholds.tolist()).drop > d + 1e-12 for d in GRID)
        for max_drop, point in points.items():
            got = truth(point.thresholds)
            saved = 1 - got.cost / _whole.backbone_cost
            line = dict(n=n, draw=draw, rule=rule, max_drop=max_drop, delivered=got.drop, saved=saved)
            lines.append(line | dict(any_over=any_over))
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
                        any_over=None
                        if these[0]['any_over'] is None
                        else float(np.mean([x['any_over'] for x in these])),
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
        f'of accuracy; over: share of the samples whose delivered loss exceeds what was asked; any: share of the '
        f'samples in which any of {len(GRID)} settings from 0 to 20 points does; saved: mean share of '
        f"the backbone's MACs, heads counted.",
        '',
        '`certified`: the guarantee for the whole dial, the path of thresholds from the training images. `split`: a '
        'quarter of the sample proposes the path. `setting`: the guarantee for one setting.',
        '',
        f'![delivered against asked](../../results/coverage.{release.name}.png)',
        '',
        f'    {command}',
        '',
        '| n | rule | asked | delivered, mean | median | 90th percentile | over | any | MACs saved |',
        '| --- | --- | --- | --- | --- | --- | --- | --- | --- |',
    ]
    for r in rows:
        losses = ' | '.join(f'{100 * r[key]:.2f}' for key in ('max_drop', 'mean', 'median', 'p90'))
        any_over = '' if r['any_over'] is None else f'{r["any_over"]:.1%}'
        text.append(f'| {r["n"]:,} | {r["rule"]} | {losses} | {r["over"]:.1%} | {any_over} | {r["saved"]:.1%} |')
    return '\n'.join([*text, ''])


def plot(lines: list[dict[str, Any]], path: Path, title: str) -> None:
    """Delivered against asked: a box a rule and max_drop, one panel a sample size."""
    from scripts.releases.pictures import COLOURS, LABELS

    sizes = sorted({x['n'] for x in lines})
    figure, panels = plt.subplots(1, len(sizes), figsize=(4 * len(sizes), 4), dpi=130, sharey=True, squeeze=False)
    for axes, n in zip(panels[0], sizes, strict=True):
        for k, rule in enumerate(SHOWN):
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


def measure(whole: Calibration, cache: Path, log: Path, sizes: Sequence[int], draws: int, processes: int) -> list[Any]:
    """The lines of all draws, those that `log` has included."""
    # a line that was cut off by a kill is not a result
    kept = (
        [json.loads(x) for x in log.read_text(encoding='utf-8').splitlines() if x.endswith('}')] if log.exists() else []
    )
    kept = [x for x in kept if x['heads'] == whole.heads_hash and x['version'] == timm_cascade.__version__]
    done = {(x['n'], x['draw']) for x in kept}
    jobs = [(n, d) for d in range(draws) for n in sizes if (n, d) not in done]
    with multiprocessing.Pool(processes, _start, (cache,)) as pool, open(log, 'a', encoding='utf-8') as f:
        for lines in tqdm(pool.imap_unordered(one_draw, jobs), total=len(jobs), desc='draws', disable=None):
            found = dict(n=lines[0]['n'], draw=lines[0]['draw'], lines=lines)
            f.write(json.dumps(dict(heads=whole.heads_hash, version=timm_cascade.__version__, **found)) + '\n')
            f.flush()
            kept.append(found)
    return [x for k in kept if k['n'] in sizes and k['draw'] < draws for x in k['lines']]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('release', type=Path, nargs='?')
    parser.add_argument('--recipe', type=Path)
    parser.add_argument('--synthetic', action='store_true', help='difficult populations instead of a release')
    parser.add_argument('--n', type=int, nargs='+', default=[1000, 5000, 10000])
    parser.add_argument('--draws', type=int, default=200)
    parser.add_argument('--processes', type=int, default=2)
    parser.add_argument('--out', type=Path, default=ROOT / 'docs')
    args = parser.parse_args()
    if not args.synthetic and (args.release is None or args.recipe is None):
        parser.error('give a release and its --recipe, or --synthetic')
    work = ROOT / 'runs'
    work.mkdir(exist_ok=True)
    results, pages = evidence(args.out)
    sizes = f'--n {" ".join(map(str, args.n))} --draws {args.draws}'
    if args.synthetic:
        command, rows = f'python scripts/experiments/coverage --synthetic {sizes}', []
        for name in SYNTHETIC:
            whole = synthetic(name)
            slug = f'coverage.synthetic.{name.replace(" ", "_")}'
            cache = work / f'{slug}.safetensors'
            whole.save(cache)
            lines = measure(whole, cache, work / f'{slug}.jsonl', args.n, args.draws, args.processes)
            rows += [dict(population=name, **row) for row in summary(lines)]
        content = dict(command=command, rows=rows)
        write_text(results / 'coverage.synthetic.json', json.dumps(content, indent=1))
        text = markdown_synthetic(rows, command)
        write_text(pages / 'coverage.synthetic.md', text)
        print(text)
        return
    recipe = yaml.safe_load(args.recipe.read_text(encoding='utf-8'))
    name = f'coverage.{args.release.name}'
    cache = work / f'{name}.safetensors'
    whole = population(args.release, recipe, cache)
    lines = measure(whole, cache, work / f'{name}.jsonl', args.n, args.draws, args.processes)
    rows = summary(lines)
    command = f'python scripts/experiments/coverage {_relative(args.release)} --recipe {_relative(args.recipe)} {sizes}'
    plot(lines, results / f'{name}.png', args.release.name)
    write_text(results / f'{name}.json', json.dumps(dict(command=command, population=whole.n, rows=rows), indent=1))
    text = markdown(rows, whole, args.release, command)
    write_text(pages / f'{name}.md', text)
    print(text)


def markdown_synthetic(rows: list[dict[str, Any]], command: str) -> str:
    """Share of the draws in which any setting is over, and what is saved, by population and size."""
    text = [
        '# Coverage of the dial: difficult populations',
        '',
        f'{rows[0]["draws"]} calibration samples of each size n, drawn with replacement from populations of 20,000 to '
        f'30,000 samples that are known in full (tests/populations.py). Any: share of the samples in which any of '
        f'{len(GRID)} settings from 0 to 20 points loses more than it says, which must be at most 10 %.',
        '',
        f'    {command}',
        '',
        '| population | n | rule | any | saved at 0.25 / 0.5 / 1 / 2 points |',
        '| --- | --- | --- | --- | --- |',
    ]
    for r in rows:
        if r['any_over'] is not None and r['max_drop'] == MAX_DROPS[0]:
            same = [x for x in rows if all(x[k] == r[k] for k in ('population', 'n', 'rule'))]
            saved = ' / '.join(f'{100 * x["saved"]:.1f}' for x in same)
            text.append(f'| {r["population"]} | {r["n"]:,} | {r["rule"]} | {r["any_over"]:.1%} | {saved} % |')
    return '\n'.join([*text, ''])
