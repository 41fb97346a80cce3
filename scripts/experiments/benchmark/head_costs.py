"""What open exits cost where no sample leaves: heads and decisions, beside the plain network."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor

import timm_cascade
from scripts.experiments.benchmark.page import cell, unite, verdict
from scripts.experiments.benchmark.peer import RELEASE
from scripts.experiments.benchmark.plain import bare, each, pictures
from scripts.experiments.benchmark.timing import in_turns
from timm_cascade.model import CascadeModel

_logger = logging.getLogger('benchmark')
NEVER = 2.0  # a threshold that no confidence reaches
NETWORKS = ['resnet18', 'resnet50', 'mobilenetv3_large_100', 'vit_small_patch16_224']
IMAGES = 50  # single images of one repetition


def set_and_run(model: CascadeModel, thresholds: list[float] | None, batches: list[Tensor]) -> None:
    model.thresholds = thresholds
    each(model.predict, batches)


def release(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The release with all exits open and none leaving, and with all closed, over the plain network, batch 1."""
    models = {mode: timm.create_model(f'local-dir:{RELEASE}', pretrained=True).eval() for mode in args.modes}
    for model in models.values():
        model.to(args.device, memory_format=torch.channels_last)
    batches = list(pictures(args.images, (1, 28, 28)).to(args.device).split(1))
    contestants: dict[str, Callable[[], Any]] = {'plain eager': partial(each, bare(models['eager']), batches)}
    if 'compiled' in models:
        contestants['plain compiled'] = partial(each, torch.compile(bare(models['compiled'])), batches)
    for mode, model in models.items():
        settings = dict(open=[NEVER] * len(model.exits), closed=None)
        model.thresholds = settings['open']
        model.compile(mode == 'compiled', batch_sizes=(1,))
        for state, thresholds in settings.items():
            contestants[f'{mode} {state}'] = partial(set_and_run, model, thresholds, batches)
    runs = in_turns(contestants, args.seconds, args.repetitions)
    rows = []
    for mode in models:
        for state in ('open', 'closed'):
            row = dict(mode=mode, state=state, to_eager=runs.ratio(f'{mode} {state}', 'plain eager'))
            if 'compiled' in models:
                row['to_compiled'] = runs.ratio(f'{mode} {state}', 'plain compiled')
            rows.append(row)
            _logger.info('%s, exits %s: %.2f of plain', mode, state, row['to_eager']['median'])
    return rows


def shares(name: str, batch: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time of the heads with their decisions over that of the backbone, by `timm_cascade.profile`."""
    torch.manual_seed(0)
    model = timm.create_model(f'cascade_{name}', exits=args.exits).eval()
    model.to(args.device, memory_format=torch.channels_last)
    images = pictures(batch, tuple(model.pretrained_cfg['input_size'])).to(args.device)
    rows = []
    for mode in args.modes:
        model.compile(mode == 'compiled', batch_sizes=(batch,))
        p = timm_cascade.profile(model, images=images, repeats=max(args.repetitions, args.repeats))
        heads = [h / p.backbone_seconds for h in p.head_seconds]
        rows.append(dict(network=name, batch=batch, mode=mode, exits=len(heads), share=sum(heads), heads=heads))
        _logger.info('%s, batch %d, %s: heads take %.1f %% of the network', name, batch, mode, 100 * sum(heads))
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--networks', nargs='*', default=NETWORKS)
    parser.add_argument('--batch', type=int, nargs='+', default=[1, 8])
    parser.add_argument('--modes', nargs='+', default=['eager', 'compiled'], choices=['eager', 'compiled'])
    parser.add_argument('--exits', type=int, default=5)
    parser.add_argument('--repeats', type=int, default=9, help='measurements of a profile')
    parser.add_argument('--images', type=int, default=IMAGES, help='single images of one repetition')


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    yield dict(release=release(args), shares=[])
    for name in args.networks:
        for batch in args.batch:
            yield dict(shares=shares(name, batch, args))


merge = partial(unite, release=('mode', 'state'), shares=('network', 'batch', 'mode'))


def markdown(section: dict[str, Any]) -> list[str]:
    text = [
        'Nothing leaves here: this is what exits cost. **The Fashion-MNIST release**, eight exits, single images, '
        'channels-last, over the plain network. Target: 1.15 of the eager plain network, compiled with all exits open.',
        '',
        '| mode | exits | of plain, eager | of plain, compiled |',
        '| --- | --- | --- | --- |',
    ]
    for r in section['release']:
        limit = 1.15 if (r['mode'], r['state']) == ('compiled', 'open') else None
        beside = cell(r['to_compiled']) if 'to_compiled' in r else ''
        text.append(f'| {r["mode"]} | all {r["state"]} | {verdict(r["to_eager"], limit)} | {beside} |')
    if not section['shares']:
        return text
    text += [
        '',
        "**Heads with their decisions**, share of the network's time, five exits, the network's own size of images, "
        'default heads, medians of `timm_cascade.profile`. Target: 3 %.',
        '',
        '| network | batch | mode | all heads | each |',
        '| --- | --- | --- | --- | --- |',
    ]
    for r in section['shares']:
        missed = ' **missed** (<= 3 %)' if r['share'] > 0.03 else ''
        heads = ', '.join(f'{100 * h:.2f}' for h in r['heads'])
        text.append(f'| {r["network"]} | {r["batch"]} | {r["mode"]} | {100 * r["share"]:.1f} %{missed} | {heads} |')
    return text
