"""What makes exit heads good? The paper's recipe, then each switch alone on top of ours, on frozen networks.

    python scripts/datasets/emoji.py --out runs/emoji && python scripts/experiments/ablation

Pairs of backbone and data stand in pairs.yaml; backbones and pooled features are made once (features.py; those with
ImageNet weights are what scripts/releases/release.py has fine-tuned), rows train
from them (heads.py). Writes docs/pages/evidence/ablation.md and docs/results/ablation.json; pairs that are
in them and not asked for (--pairs) stay. Runs that are done are kept in runs/ablation/results.jsonl and not repeated.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from scipy import optimize
from torch import Tensor, nn

from scripts import ROOT, evidence
from scripts.experiments.ablation.features import PAIRS, Features, default_exits, load_features
from scripts.experiments.ablation.heads import FORMER, NARROW, Heads, Row, fit, fit_weights
from scripts.experiments.ablation.page import BASE, DROPS, METRICS, NEW, OLD, PAPER, THREE, markdown, seeds_of, summary
from timm_cascade.heads import MAX_SHARE, create_heads, head_configs
from timm_cascade.inference.batch import confidence
from timm_cascade.thresholds import Samples as Calibrated
from timm_cascade.thresholds.path import follow, nested_path
from timm_cascade.utils.files import write_text

_logger = logging.getLogger('ablation')
Samples = tuple[np.ndarray, np.ndarray]  # confidence and correct, both (n, M+1)
ROWS = (
    Row(PAPER, exits='paper', head='paper', recipe='paper'),
    Row('the same exits and heads, our training', exits='paper', head='paper'),
    Row('the same exits, our heads and training', exits='paper'),
    Row(THREE, exits=3),
    Row('four exits', exits=4),
    Row('five exits', exits=5),
    Row(BASE),
    Row('heads of full width, whatever they cost', head=(dict(grid=4, hidden=64, norm=True),)),
    Row('heads that pool to 2x2', head=(dict(grid=2, hidden=64, norm=True),)),
    Row('linear heads', head='linear'),
    Row('distillation at temperature 4, half of the loss', distil=0.5, temperature=4.0),
    Row('distillation at temperature 4 alone, no labels', distil=1.0, temperature=4.0),
    Row("previous exit's logits carried", carry=True),
    Row('answers averaged along the cascade', combine='mean'),
    Row('answers weighted along the cascade', combine='learned'),
    Row('three more views of each image', views=3),
    Row('samples weighted by the chance to get there', weigh=True),
)
# of pairs whose backbones had ImageNet weights: the library's default, and one change at a time
WIDE: Mapping[str, Any] = dict(grid=None, mean=True, tokens=True)
DEFAULT_ROWS = (
    Row(PAPER, exits='paper', head='paper', recipe='paper'),
    Row(OLD, exits=3, head=FORMER),
    Row(NEW, exits='default'),
    Row("version 0.1's exits, the default's heads", exits=3),
    Row('five exits, evenly spread', exits=5),
    Row("the default's exits, version 0.1's heads", exits='default', head=FORMER),
    Row('heads within 1 % of the MACs, however narrow', exits='default', head=NARROW),
    Row('without the mean beside the grid', exits='default', head=(dict(grid=None, hidden=None),)),
    Row('linear heads', exits='default', head='linear'),
    Row('an exit at every place'),
    Row('256 hidden units', exits='default', head=({**WIDE, 'hidden': 256},)),
)


def rows_of(name: str) -> tuple[Row, ...]:
    """The rows of a pair."""
    return DEFAULT_ROWS if PAIRS[name].get('finetuned') else ROWS


def exits_of(row: Row, name: str, features: Features) -> list[str]:
    """Modules of the exits that a row has in this pair."""
    every, stages = PAIRS[name]['exits'], PAIRS[name]['stages']
    if row.exits == 'all':
        return every
    if row.exits == 'default':
        return features.defaults
    offered, count = (stages, 2) if row.exits == 'paper' else (every, row.exits)
    picked: list[str] = []
    for i in range(count):  # evenly, as version 0.1 did
        target = features.total * (i + 1) / (count + 1)
        picked.append(min((e for e in offered if e not in picked), key=lambda e: abs(features.macs[e] - target)))
    return sorted(picked, key=every.index)


def configs_of(row: Row, exits: list[str], features: Features) -> list[dict[str, Any]]:
    """The heads of a row, as a CascadeModel would make them."""
    points = [SimpleNamespace(**features.shapes[e], total=features.total) for e in exits]
    classes = features.logits['test'].shape[1]
    named = {FORMER: former_configs, NARROW: narrow_configs}
    if isinstance(row.head, str) and row.head in named:
        return named[row.head](points, classes)
    return head_configs(row.head, points, classes)


def former_configs(points: Sequence[Any], num_classes: int) -> list[dict[str, Any]]:
    """The default heads of version 0.1."""
    hidden, cells = 64, [p.channels * min(4, p.size[0]) * min(4, p.size[1]) for p in points]
    while hidden > 1 and hidden * sum(c + num_classes for c in cells) > MAX_SHARE * points[0].total:
        hidden //= 2
    return head_configs(dict(grid=4, hidden=hidden, norm=True), points, num_classes)


def narrow_configs(points: Sequence[Any], num_classes: int) -> list[dict[str, Any]]:
    """The default heads, with fewer hidden units where all of them cost more than MAX_SHARE of the backbone's MACs."""
    configs = head_configs('enhanced', points, num_classes)
    heads = create_heads(points, num_classes, [dict(c, hidden=1) for c in configs])
    unit = sum(m.in_features * m.out_features for m in heads.modules() if isinstance(m, nn.Linear))
    width = min(configs[0]['hidden'], int(MAX_SHARE * points[0].total / unit))
    return [dict(c, hidden=max(1, width - width % 8 if width > 8 else width)) for c in configs]


def runs_of(rows: Sequence[Row], name: str, features: Features, seed: int) -> Iterable[dict[str, Any]]:
    """Trains the heads that these rows share, and measures every row."""
    exits, began = exits_of(rows[0], name, features), time.perf_counter()
    configs = configs_of(rows[0], exits, features)
    classes = features.logits['test'].shape[1]

    def pooled(*splits: str, few: slice = slice(None)) -> list[Tensor]:
        return [
            torch.from_numpy(np.concatenate([features.of(s, e, c, few) for s in splits]))
            for e, c in zip(exits, configs, strict=True)
        ]

    # two exits are cheap: the paper's recipe always gets all images
    few = slice(None if rows[0].exits == 'paper' else PAIRS[name].get('images'))
    views = ['train', *(f'view{i}' for i in range(rows[0].views))]
    train = pooled(*views, few=few)
    labels, teacher = (torch.cat([of[s][few] for s in views]) for of in (features.labels, features.logits))
    torch.manual_seed(seed)
    heads = Heads([features.shapes[e] for e in exits], configs, classes, rows[0])
    fit(heads, rows[0], train, labels, teacher, seed)
    seconds = time.perf_counter() - began
    with torch.no_grad():
        own = {s: _in_parts(heads, pooled(s)) for s in ('calibration', 'test')}
        if any(r.combine == 'learned' for r in rows):
            own['train'] = _in_parts(heads, train)
    for row in rows:
        heads.combine = row.combine
        if row.combine == 'learned':
            fit_weights(heads, own['train'], labels)
        with torch.no_grad():
            held = [
                _record([*heads.answers(own[s]), features.logits[s]], features.labels[s])
                for s in ('calibration', 'test')
            ]
        stage = np.diff([0, *(features.macs[e] for e in exits), features.total]) + np.array([*heads.macs(), 0.0])
        head = np.array(heads.macs(), float)
        measured = [measure(a, b, stage, head, features.total, classes) for a, b in halvings(*held)]
        yield dict(
            pair=name,
            key=row.key,
            row=row.name,
            seed=seed,
            exits=exits,
            seconds=round(seconds, 1),
            heads_share=sum(heads.macs()) / features.total,
            exit_accuracy=np.concatenate([h[1] for h in held]).mean(0).round(4).tolist(),
            **{k: float(np.mean([m[k] for m in measured])) for k in METRICS},
        )


def _in_parts(heads: Heads, features: list[Tensor]) -> list[Tensor]:
    parts = [heads([t.float() for t in part]) for part in zip(*(t.split(4096) for t in features), strict=True)]
    return [torch.cat(p) for p in zip(*parts, strict=True)]


def halvings(calibration: Samples, test: Samples) -> Iterable[tuple[Samples, Samples]]:
    """Samples to choose on and to measure on: the two given, each way round; then halves of both, if they are few."""
    sizes = len(calibration[0]), len(test[0])
    c, r = (np.concatenate(both) for both in zip(calibration, test, strict=True))
    order, random = np.arange(len(c)), np.random.default_rng(0)
    for _ in range(max(1, 15_000 // len(c))):
        a, b = order[: sizes[0]], order[sizes[0] :]
        yield (c[a], r[a]), (c[b], r[b])
        yield (c[b], r[b]), (c[a], r[a])
        order = random.permutation(len(c))


def _record(logits: list[Tensor], labels: Tensor) -> Samples:
    """Confidence and correct, both (n, M+1)."""
    right = torch.stack([x.argmax(1) == labels for x in logits], 1)
    return torch.stack([confidence(x) for x in logits], 1).numpy(), right.numpy()


def measure(
    chosen_on: Samples, measured_on: Samples, stage_cost: np.ndarray, head_cost: np.ndarray, total: float, classes: int
) -> dict[str, float]:
    """The path of the joint rule's settings, made on some samples and realised on others.

    Args:
        chosen_on, measured_on: Confidence and correct, both (n, M+1).
        stage_cost, head_cost: (M+1,) and (M,), MACs.
        total: MACs of the plain backbone.

    Returns:
        Share of the MACs saved at each of DROPS, and the area under accuracy against MACs.
    """
    path = nested_path(Calibrated(*chosen_on, stage_cost, head_cost))
    along = follow(path, Calibrated(*measured_on, stage_cost, head_cost))
    share = along.cost / total
    step = np.abs(np.diff(share, prepend=share[0])) + 1e-6
    loss = optimize.isotonic_regression((along.harmful - along.helpful) / along.n, weights=step).x
    saved = {f'saved_{drop:g}': 1 - float(share[loss <= drop].min(initial=1)) for drop in DROPS}
    accuracy = along.full / along.n - loss
    order = np.argsort(share, kind='stable')
    x, y = np.append(0, share[order]), np.append(1 / classes, accuracy[order])
    return dict(**saved, area=float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum() + max(0, 1 - x[-1]) * y[-1]))


def _is_base(row: Row, name: str, features: Features) -> bool:
    """Whether a row of another name is the base row in this pair."""
    base = next(r for r in rows_of(name) if r.name in (BASE, NEW))
    exits = exits_of(base, name, features)
    return (
        row != base
        and replace(row, name=base.name, head=base.head, exits=base.exits) == base
        and (exits_of(row, name, features) == exits)
        and (configs_of(row, exits, features) == configs_of(base, exits, features))
    )


def results(names: Iterable[str], log: Path) -> list[dict[str, Any]]:
    """Every run, those that `log` has included."""
    lines = log.read_text(encoding='utf-8').splitlines() if log.exists() else []
    kept = [json.loads(x) for x in lines if x.endswith('}')]  # a line cut off by a kill is not a result
    for name in names:  # what was measured with the default exits of another version is measured again
        by_default = [r.key for r in rows_of(name) if r.exits == 'default']
        exits = default_exits(PAIRS[name]) if by_default else []
        kept = [x for x in kept if x['pair'] != name or x['key'] not in by_default or x['exits'] == exits]
    done = {(x['pair'], x['key'], x['seed']) for x in kept}
    log.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        offered, seeds = [r for r in rows_of(name) if r.views <= PAIRS[name].get('views', 0)], seeds_of(name)
        if all((name, r.key, s) in done for r in offered for s in seeds):
            continue
        features = load_features(name)
        todo = [
            (r, s) for r in offered for s in seeds if (name, r.key, s) not in done and not _is_base(r, name, features)
        ]
        trained = [r.trained_as for r in offered]

        def shared(run: tuple[Row, int], trained: list[str] = trained) -> tuple[int, int]:
            return run[1], trained.index(run[0].trained_as)

        for (seed, _), alike in groupby(sorted(todo, key=shared), key=shared):
            for line in runs_of([r for r, _ in alike], name, features, seed):
                _logger.info('%s', line)
                with open(log, 'a', encoding='utf-8') as f:
                    f.write(json.dumps(line) + '\n')
                kept.append(line)
    return kept


def merged(file: Path, table: list[dict[str, Any]], names: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """The table with those pairs of `file` that it does not have, and all their names, as pairs.yaml has them."""
    old = json.loads(file.read_text(encoding='utf-8'))['rows'] if file.exists() else []
    table = [*(x for x in old if x['pair'] not in names), *table]
    found = {x['pair'] for x in table}
    return sorted(table, key=lambda x: list(PAIRS).index(x['pair'])), [name for name in PAIRS if name in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--pairs', nargs='+', default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument('--only-features', action='store_true', help='train the backbones and store the features only')
    parser.add_argument('--out', type=Path, default=ROOT / 'docs')
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format='%(asctime)s %(message)s')
    if args.only_features:
        for name in args.pairs:
            _logger.info('%s', name)
            load_features(name)
        return
    runs = results(args.pairs, ROOT / 'runs' / 'ablation' / 'results.jsonl')
    results_folder, pages = evidence(args.out)
    measured = [x for name in args.pairs for x in summary(runs, name, rows_of(name))]
    table, names = merged(results_folder / 'ablation.json', measured, args.pairs)
    command = 'python scripts/datasets/emoji.py --out runs/emoji && python scripts/experiments/ablation'
    command += '' if names == list(PAIRS) else f' --pairs {" ".join(names)}'
    write_text(results_folder / 'ablation.json', json.dumps(dict(command=command, rows=table), indent=1))
    write_text(pages / 'ablation.md', markdown(table, names, rows_of, command))
