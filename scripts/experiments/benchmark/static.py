"""The cascade beside its alternatives: all exits computed, or a smaller network in its place."""

from __future__ import annotations

import argparse
import itertools
import logging
from functools import partial
from typing import Any

import numpy as np
import timm
import torch
import yaml
from torch import Tensor, nn

import timm_cascade
from scripts import ROOT
from scripts.experiments.benchmark import static_networks
from scripts.experiments.benchmark.plain import all_of, bare, each
from scripts.experiments.benchmark.timing import in_turns
from scripts.releases.backbones import decode
from scripts.releases.release import DATA
from timm_cascade.backbone import backbone_macs
from timm_cascade.inference.batch import CascadeOutput, confidence
from timm_cascade.measure.calibrate import record
from timm_cascade.model import CascadeModel
from timm_cascade.thresholds import Samples, outcome, route

_logger = logging.getLogger('benchmark')
RECIPES = {
    name: ROOT / 'hub' / 'recipes' / f'cascade_cifar_resnet20.{name}.yaml' for name in ('fashion_mnist', 'emoji')
}
RELEASES = (ROOT / 'hub' / 'releases', ROOT / 'runs' / 'releases')
MAX_DROPS = (0.0, *np.geomspace(0.00025, 0.075, 25).tolist())
BATCHES = {1: 256, 64: 2048}  # how many test images a repetition runs


def load_release(name: str, device: str) -> CascadeModel | None:
    for folder in RELEASES:
        if (folder / name / 'config.json').exists():
            model = timm.create_model(f'local-dir:{folder / name}', pretrained=True).eval()
            return model.to(device, memory_format=torch.channels_last)
    return None


def batches_of(images: Tensor, batch: int) -> list[Tensor]:
    """As many test images as a repetition takes, in full batches, channels-last."""
    n = min(BATCHES[batch], len(images)) // batch * batch
    return list(images[:n].contiguous(memory_format=torch.channels_last).split(batch))


def choose_afterwards(model: CascadeModel, images: Tensor) -> CascadeOutput:
    """Every exit on every image, then the first that is confident enough: what most research code does."""
    logits = torch.stack(model.forward_exits(images))
    found = confidence(logits)
    passes = found[:-1] >= model.thresholds.to(found.device)[:, None]
    last = torch.ones_like(passes[:1])
    exits = torch.cat([passes, last]).to(torch.uint8).argmax(0)
    rows = torch.arange(len(images), device=images.device)
    return CascadeOutput(logits[exits, rows], exits, found[exits, rows])


def everything(args: argparse.Namespace) -> list[dict[str, Any]]:
    recipe = yaml.safe_load(RECIPES['fashion_mnist'].read_text(encoding='utf-8'))
    model = load_release(recipe['name'], args.device)
    assert model is not None
    images = decode(model, DATA['fashion_mnist']('test'))[0].to(args.device)
    rows = []
    for max_drop in (0.0025, 0.005, 0.01):
        model.set_max_drop(max_drop)
        for batch in BATCHES:
            batches = batches_of(images, batch)
            with torch.inference_mode():
                same = [bool((model.predict(b).exit == choose_afterwards(model, b).exit).all()) for b in batches]
            runs = in_turns(
                {
                    'cascade': partial(each, model.predict, batches),
                    'everything': partial(each, partial(choose_afterwards, model), batches),
                    'plain': partial(each, bare(model), batches),
                },
                args.seconds,
                args.repetitions,
            )
            rows.append(
                dict(
                    max_drop=max_drop,
                    batch=batch,
                    same=float(np.mean(same)),
                    faster=runs.ratio('everything', 'cascade'),
                    to_plain=runs.ratio('everything', 'plain'),
                )
            )
            _logger.info(
                'everything at max_drop %.4f, batch %d: cascade %.2f times as fast',
                max_drop,
                batch,
                rows[-1]['faster']['median'],
            )
    return rows


@torch.inference_mode()
def correctness(model: nn.Module, images: Tensor, labels: Tensor) -> np.ndarray:
    """(n,) whether each image is right."""
    return torch.cat(
        [model(b).argmax(1).cpu() == y for b, y in zip(images.split(1000), labels.split(1000), strict=True)]
    ).numpy()


def as_accurate(model: CascadeModel, accuracy: float) -> dict[str, Any] | None:
    """The boldest setting of the dial whose accuracy on the calibration images is at least `accuracy`; sets it.

    Among MAX_DROPS under `joint`, to save time as it was profiled last. No test image is looked at.
    """
    assert model.calibration is not None
    samples, found = model.calibration.samples(), None
    for max_drop in MAX_DROPS:
        point = model.set_max_drop(max_drop, rule='joint', cost='time')
        seen = outcome(samples, point.thresholds)
        if seen.accuracy >= accuracy:
            found = dict(max_drop=max_drop, chosen_at=seen.accuracy, thresholds=point.thresholds)
    if found:
        model.thresholds = found.pop('thresholds')
    return found


def judged(model: CascadeModel, seen: dict[str, np.ndarray], right: np.ndarray) -> dict[str, float]:
    """Cost and accuracy of the present setting on the test images, beside another network's right answers there.

    Returns:
        `accuracy`, `macs`, `difference` of the accuracies and `half` of its 95 % interval.
    """
    samples = Samples(seen['confidence'], seen['correct'], model.stage_macs(), model.head_macs())
    truth = outcome(samples, model.thresholds.numpy())
    leaves = route(seen['confidence'], model.thresholds.numpy())
    paired = seen['correct'][np.arange(len(leaves)), leaves].astype(float) - right
    half = float(1.96 * paired.std() / np.sqrt(len(paired)))
    return dict(accuracy=truth.accuracy, macs=truth.cost, difference=float(paired.mean()), half=half)


def static(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows for every trained static network of one data set, at every batch size."""
    recipe = yaml.safe_load(RECIPES[name].read_text(encoding='utf-8'))
    model = load_release(recipe['name'], args.device)
    if model is None:
        _logger.warning(
            '%s is not there; build it with python scripts/releases/release.py hub/recipes/%s.yaml --out runs/releases',
            recipe['name'],
            recipe['name'],
        )
        return []
    data = DATA[name](recipe['data']['test'])
    seen = record(model, data)
    images, labels = decode(model, data)
    held_out, held_out_labels = decode(model, DATA[name](recipe['data']['calibration']))
    held_out = held_out.to(args.device, memory_format=torch.channels_last)
    images = images.to(args.device, memory_format=torch.channels_last)
    size = tuple(images.shape[1:])
    rows = []
    for network in static_networks.NETWORKS:
        try:
            small, epochs = static_networks.load(recipe, network, args.epochs)
        except FileNotFoundError as e:
            _logger.warning('%s', e)
            continue
        small.to(args.device, memory_format=torch.channels_last)
        forms = {'eager': small, 'compiled': torch.compile(small)}
        right = correctness(small, images, labels)
        aim = float(correctness(small, held_out, held_out_labels).mean())
        row = dict(
            data=name,
            network=network,
            epochs=epochs,
            of_epochs=recipe['backbone']['epochs'],
            n=len(right),
            accuracy=float(right.mean()),
            aim=aim,
            macs=backbone_macs(small, size),
            backbone_macs=model.exits[-1].total,
            backbone=float(seen['correct'][:, -1].mean()),
        )
        for mode, batch in itertools.product(args.modes, BATCHES):
            batches = batches_of(images, batch)
            model.compile(mode == 'compiled', batch_sizes=(batch,))
            timm_cascade.profile(model, batch_size=batch, images=batches[0])
            found = as_accurate(model, aim)
            if found is None:
                rows.append(dict(row, mode=mode, batch=batch, cascade=None))
                continue
            contestants = {
                'cascade': partial(each, model.predict, batches),
                'static': partial(each, forms[mode], batches),
            }
            if batch > 1:
                contestants['stream'] = lambda batches=batches: all_of(model.stream(batches))
            runs = in_turns(contestants, args.seconds, args.repetitions)
            rows.append(
                dict(
                    row,
                    mode=mode,
                    batch=batch,
                    cascade=found | judged(model, seen, right),
                    faster=runs.ratio('static', 'cascade'),
                )
            )
            if batch > 1:
                rows[-1]['stream'] = runs.ratio('static', 'stream')
            _logger.info(
                '%s %s (%.2f %%), %s, batch %d: cascade %.2f times as fast',
                name,
                network,
                100 * row['accuracy'],
                mode,
                batch,
                rows[-1]['faster']['median'],
            )
    model.compile(False)
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--modes', nargs='+', default=['eager', 'compiled'], choices=['eager', 'compiled'])
    parser.add_argument('--epochs', type=int, default=10, help="of static networks that lack the recipe's epochs")
    parser.add_argument('--data', nargs='*', default=list(RECIPES), choices=list(RECIPES))


def run(args: argparse.Namespace) -> dict[str, Any]:
    return dict(everything=everything(args), static=[row for name in args.data for row in static(name, args)])


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """What was measured of other networks stays."""
    done = {(r['data'], r['network']) for r in new['static']}
    rows = [r for r in old['static'] if (r['data'], r['network']) not in done] + new['static']
    networks = list(static_networks.NETWORKS)
    rows.sort(key=lambda r: (list(RECIPES).index(r['data']), networks.index(r['network'])))
    return dict(new, static=rows)


def markdown(section: dict[str, Any]) -> list[str]:
    from scripts.experiments.benchmark.page import cell, verdict

    text = [
        '**Every exit computed, chosen afterwards** (what most research code does): the Fashion-MNIST release at its '
        'operating points, test images, channels-last.',
        '',
        '| max_drop | batch | cascade faster by | every exit, time of plain |',
        '| --- | --- | --- | --- |',
    ]
    text += [
        f'| {r["max_drop"]:.2%} | {r["batch"]} | {cell(r["faster"])} | {cell(r["to_plain"])} |'
        for r in section['everything']
    ]
    text += [
        '',
        '**Smaller static networks**, the same family, data and recipe '
        '(`python scripts/experiments/benchmark static-networks RECIPE`). The cascade has '
        'the most permissive setting of its dial (`joint`, to save time as profiled here) '
        "whose accuracy on the calibration images is no less than the static network's there; accuracies and MACs are "
        'those on the test images, which chose nothing, with the difference of the accuracies in points and its 95 % '
        'interval. Both eager, channels-last, or both compiled; `stream` gets the same batches. '
        'Target: 1.5 times as fast.',
        '',
        '| data | static network | epochs | accuracy | MACs | mode | batch | cascade: accuracy | difference | MACs '
        '| cascade faster by | stream faster by |',
        '| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |',
    ]
    for r in section['static']:
        start = (
            f'| {r["data"]} | {r["network"]} | {r["epochs"]} of {r["of_epochs"]} | {r["accuracy"]:.2%} | '
            f'{r["macs"] / 1e6:.1f} M | {r["mode"]} | {r["batch"]} |'
        )
        if r['cascade'] is None:
            text.append(f'{start} backbone {r["backbone"]:.2%} | | | no setting is as accurate | |')
        else:
            stream = verdict(r['stream'], 1.5, at_least=True) if 'stream' in r else ''
            c = r['cascade']
            # sections of before have no difference: their setting was chosen on the test images
            difference, half = c.get('difference', c['accuracy'] - r['accuracy']), c.get('half', r.get('half', 0.0))
            text.append(
                f'{start} {c["accuracy"]:.2%} | {100 * difference:+.2f} ± {100 * half:.2f} | '
                f'{c["macs"] / 1e6:.1f} M | {verdict(r["faster"], 1.5, at_least=True)} | '
                f'{stream} |'
            )
    if any(r['cascade'] and 'difference' not in r['cascade'] for r in section['static']):
        text += [
            '',
            'These rows are older: their settings were chosen on the test images, those whose accuracy there '
            "was no less than the static network's.",
        ]
    short = [r for r in section['static'] if r['epochs'] < r['of_epochs']]
    if short:
        text += [
            '',
            'Static networks with fewer epochs than their recipe has are at a disadvantage against a cascade '
            'whose backbone had them all; ResNet-20 among them says how large it is. A target that such a '
            'row meets proves nothing.',
        ]
    return text
