"""The cascade beside its alternatives: all exits computed, or a smaller network in its place."""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import timm
import torch
import yaml
from torch import Tensor, nn

import timm_cascade
from scripts.experiments.benchmark import static_networks
from scripts.experiments.benchmark.page import cell, unite, verdict
from scripts.experiments.benchmark.plain import all_of, bare, each
from scripts.experiments.benchmark.timing import in_turns
from scripts.experiments.equal_accuracy import cheapest, compare
from scripts.releases.backbones import decode
from scripts.releases.release import DATA, loader
from timm_cascade.backbone import backbone_macs
from timm_cascade.inference.batch import CascadeOutput, confidence
from timm_cascade.measure.calibrate import record
from timm_cascade.model import CascadeModel
from timm_cascade.thresholds import Samples
from timm_cascade.thresholds.timing import in_time

_logger = logging.getLogger('benchmark')
RECIPES = {
    label: static_networks.RECIPES / f'cascade_{name}.yaml'
    for label, name in {
        'fashion_mnist': 'cifar_resnet20.fashion_mnist',
        'emoji': 'cifar_resnet20.emoji',
        'lite0.emoji64': 'tf_efficientnet_lite0.emoji64',
        'lite2.emoji64': 'tf_efficientnet_lite2.emoji64',
        'lite0.elpv': 'tf_efficientnet_lite0.elpv',
    }.items()
}
NETWORKS = [*static_networks.SMALLER, static_networks.LITE]
BATCHES = {1: 256, 64: 2048}  # how many test images a repetition runs


def load_release(name: str, device: str) -> CascadeModel | None:
    for folder in static_networks.RELEASES:
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


def everything(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for every max_drop and batch size."""
    recipe = yaml.safe_load(RECIPES['fashion_mnist'].read_text(encoding='utf-8'))
    model = load_release(recipe['name'], args.device)
    assert model is not None
    images = decode(model, DATA['fashion_mnist']('test'))[0].to(args.device)
    for max_drop, batch in itertools.product(args.max_drops, args.batch):
        model.set_max_drop(max_drop)
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
        row = dict(
            max_drop=max_drop,
            batch=batch,
            same=float(np.mean(same)),
            faster=runs.ratio('everything', 'cascade'),
            to_plain=runs.ratio('everything', 'plain'),
        )
        _logger.info(
            'everything at max_drop %.4f, batch %d: cascade %.2f times as fast',
            max_drop,
            batch,
            row['faster']['median'],
        )
        yield row


@torch.inference_mode()
def correctness(model: nn.Module, images: Tensor, labels: Tensor) -> np.ndarray:
    """(n,) whether each image is right."""
    return torch.cat(
        [model(b).argmax(1).cpu() == y for b, y in zip(images.split(1000), labels.split(1000), strict=True)]
    ).numpy()


@dataclass
class Rival:
    """A static network of one data set, with its rows' common part.

    Attributes:
        forms: How it runs, by mode.
        aim: Accuracy on the calibration images, to which the cascade is set.
        right: (n,) whether it answers each test image correctly.
        row: What all its rows say of it.
    """

    forms: dict[str, Callable[[Tensor], Any]]
    aim: float
    right: np.ndarray
    row: dict[str, Any]


def rival(
    name: str, network: str, recipe: dict[str, Any], splits: list[tuple[Tensor, Tensor]], epochs: int
) -> Rival | None:
    """One of static_networks.NETWORKS; None where it is not trained. `splits`: calibration and test images."""
    try:
        small, done = static_networks.load(recipe, network, epochs)
    except FileNotFoundError as e:
        _logger.warning('%s', e)
        return None
    images = splits[0][0]
    small.to(images.device, memory_format=torch.channels_last)
    aim, right = (correctness(small, *split) for split in splits)
    row = dict(
        data=name,
        network=network,
        epochs=done,
        of_epochs=recipe['backbone'].get('epochs', done),
        n=len(right),
        accuracy=float(right.mean()),
        aim=float(aim.mean()),
        macs=backbone_macs(small, tuple(images.shape[1:])),
    )
    # it gets full batches only, so each size is compiled by itself
    return Rival(dict(eager=small, compiled=torch.compile(small, dynamic=False)), row['aim'], right, row)


def static(name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for every trained static network of one data set, in every mode and at every batch size."""
    recipe = yaml.safe_load(RECIPES[name].read_text(encoding='utf-8'))
    model = load_release(recipe['name'], args.device)
    if model is None:
        _logger.warning(
            '%s is not there; build it with python scripts/releases/release.py hub/recipes/%s.yaml --out runs/releases',
            recipe['name'],
            recipe['name'],
        )
        return
    load = loader(recipe)
    test = load(recipe['data']['test'])
    splits = [
        (images.to(args.device, memory_format=torch.channels_last), labels)
        for images, labels in (decode(model, d) for d in (load(recipe['data']['calibration']), test))
    ]
    networks = [n for n in static_networks.names_for(recipe) if n in args.networks]
    rivals = [r for n in networks if (r := rival(name, n, recipe, splits, args.epochs)) is not None]
    if not rivals:
        return
    seen = record(model, test)
    judge = Samples(seen['confidence'], seen['correct'], model.stage_macs(), model.head_macs())
    assert model.calibration is not None
    for mode in args.modes:
        model.compile(mode == 'compiled', batch_sizes=args.batch)
        for batch in args.batch:
            batches = batches_of(splits[1][0], batch)
            profile = timm_cascade.profile(model, images=batches[0])
            samples = in_time(model.calibration, profile).samples()
            for r in rivals:
                row = dict(r.row, mode=mode, batch=batch, backbone=float(judge.correct[:, -1].mean()), cascade=None)
                setting = cheapest(samples, r.aim)
                if setting is not None:
                    truth = compare(judge, setting.thresholds, r.right)
                    row['cascade'] = dict(
                        accuracy=truth.accuracy,
                        expected=setting.accuracy,
                        difference=truth.difference,
                        half=truth.half,
                        macs=truth.cost,
                        exit_shares=truth.exit_shares,
                    )
                    model.thresholds = setting.thresholds.tolist()
                    row |= times(model, r.forms[mode], batches, args)
                    _logger.info(
                        '%s %s (%.2f %%), %s, batch %d: cascade %.2f times as fast',
                        name,
                        row['network'],
                        100 * row['accuracy'],
                        mode,
                        batch,
                        row['faster']['median'],
                    )
                yield row
    torch.compiler.reset()  # it compiles only so many networks of one class


def times(
    model: CascadeModel, network: Callable[[Tensor], Any], batches: list[Tensor], args: argparse.Namespace
) -> dict[str, Any]:
    """How many times as fast as the network the cascade is, and its stream where batches have several images."""
    contestants: dict[str, Callable[[], Any]] = dict(
        cascade=partial(each, model.predict, batches), static=partial(each, network, batches)
    )
    if len(batches[0]) > 1:
        contestants['stream'] = lambda: all_of(model.stream(batches))
    runs = in_turns(contestants, args.seconds, args.repetitions)
    faster = {'cascade': 'faster', 'stream': 'stream'}
    return {key: runs.ratio('static', way) for way, key in faster.items() if way in contestants}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--data', nargs='*', default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument('--networks', nargs='*', default=NETWORKS, choices=NETWORKS)
    parser.add_argument('--modes', nargs='+', default=['eager', 'compiled'], choices=['eager', 'compiled'])
    parser.add_argument('--batch', type=int, nargs='+', default=list(BATCHES), choices=list(BATCHES))
    parser.add_argument('--max-drops', type=float, nargs='*', default=[0.0025, 0.005, 0.01], help='with every exit')
    parser.add_argument('--epochs', type=int, default=10, help="of static networks that lack the recipe's epochs")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if args.max_drops:
        yield from (dict(everything=[row], static=[]) for row in everything(args))
    for name in args.data:
        yield from (dict(everything=[], static=[row]) for row in static(name, args))


merge = partial(unite, everything=('max_drop', 'batch'), static=('data', 'network', 'mode', 'batch'))


def markdown(section: dict[str, Any]) -> list[str]:
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
        '**Smaller static networks**, the same family and data: for ResNet-20 with the same recipe '
        '(`python scripts/experiments/benchmark static-networks RECIPE`), for EfficientNet-Lites EfficientNet-Lite0, '
        'fine-tuned. The cascade has '
        'the setting that is expected to take the least time, as profiled here, among those whose accuracy on the '
        "calibration images, cross-fitted, is no less than the static network's there; accuracies and MACs are those "
        'on the test images, which chose nothing, with the difference of the accuracies in points and its 95 % '
        'interval. Both eager, channels-last, or both compiled; `stream` gets the same batches. '
        'Target: 1.5 times as fast.',
        '',
        '| data | static network | epochs | accuracy | MACs | mode | batch | cascade: accuracy | difference | MACs '
        '| cascade faster by | stream faster by |',
        '| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |',
    ]
    for r in sorted(section['static'], key=lambda r: (list(RECIPES).index(r['data']), NETWORKS.index(r['network']))):
        start = (
            f'| {r["data"]} | {r["network"]} | {r["epochs"]} of {r["of_epochs"]} | {r["accuracy"]:.2%} | '
            f'{r["macs"] / 1e6:.1f} M | {r["mode"]} | {r["batch"]} |'
        )
        if r['cascade'] is None:
            text.append(f'{start} backbone {r["backbone"]:.2%} | | | no setting is as accurate | |')
        else:
            stream = verdict(r['stream'], 1.5, at_least=True) if 'stream' in r else ''
            c = r['cascade']
            text.append(
                f'{start} {c["accuracy"]:.2%} | {100 * c["difference"]:+.2f} ± {100 * c["half"]:.2f} | '
                f'{c["macs"] / 1e6:.1f} M | {verdict(r["faster"], 1.5, at_least=True)} | '
                f'{stream} |'
            )
    short = [r for r in section['static'] if r['epochs'] < r['of_epochs']]
    if short:
        text += [
            '',
            'Static networks with fewer epochs than their recipe has are at a disadvantage against a cascade '
            'whose backbone had them all; ResNet-20 among them says how large it is. A target that such a '
            'row meets proves nothing.',
        ]
    return text
