"""The Fashion-MNIST release on test images, from the files to the answers."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor

import timm_cascade  # noqa: F401  registers the cascades
from scripts.datasets import fashion_mnist
from scripts.experiments.benchmark.page import cell, unite
from scripts.experiments.benchmark.peer import RELEASE, first
from scripts.experiments.benchmark.plain import all_of, bare, each
from scripts.experiments.benchmark.timing import in_turns, spread
from scripts.releases.backbones import decode
from timm_cascade.data import create_loader
from timm_cascade.model import CascadeModel

_logger = logging.getLogger('benchmark')
MAX_DROPS = (0.0025, 0.005, 0.01, 0.02)


def answers(call: Callable[[Tensor], Tensor], loader: Iterable[Any], device: str) -> Tensor:
    """(n,) predicted classes, images read, decoded and normalised on the way."""
    return torch.cat([call(images.to(device)).argmax(1) for images, _ in loader]).cpu()


def streamed(model: CascadeModel, loader: Iterable[Any]) -> Tensor:
    return torch.cat([output.logits.argmax(1) for output in model.stream(loader)]).cpu()


def loading(least: int) -> dict[str, Any]:
    """Seconds to load the release, and its plain backbone from a checkpoint of its own."""
    times: dict[str, list[float]] = dict(cascade=[], plain=[])
    model = timm.create_model(f'local-dir:{RELEASE}', pretrained=True)
    state = model.backbone.state_dict()

    def plain() -> None:
        timm.create_model('cifar_resnet20', in_chans=1, num_classes=10).load_state_dict(state)

    for _ in range(least):
        for name, call in (
            ('cascade', partial(timm.create_model, f'local-dir:{RELEASE}', pretrained=True)),
            ('plain', plain),
        ):
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
    return {name: spread(values) for name, values in times.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--images', type=int, default=2000, help='test images a repetition runs')
    parser.add_argument('--batch', type=int, nargs='+', default=[1, 64])


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    model = timm.create_model(f'local-dir:{RELEASE}', pretrained=True).eval()
    model.to(args.device, memory_format=torch.channels_last)
    plain = bare(model)
    test = fashion_mnist.load_test()
    yield dict(rows=[], loading=loading(args.repetitions))
    for batch in args.batch:
        data = first(test, args.images if batch > 1 else args.images // 10)
        loader = create_loader(model, data, batch)
        batches = list(decode(model, data)[0].to(args.device, memory_format=torch.channels_last).split(batch))
        for max_drop in MAX_DROPS:
            model.set_max_drop(max_drop)
            contestants: dict[str, Callable[[], Any]] = {
                'plain': partial(answers, plain, loader, args.device),
                'cascade': partial(answers, model, loader, args.device),
                'plain, loaded': partial(each, plain, batches),
                'cascade, loaded': partial(each, model, batches),
            }
            if batch > 1:
                contestants['stream'] = partial(streamed, model, loader)
                contestants['stream, loaded'] = lambda batches=batches: all_of(model.stream(batches))
            runs = in_turns(contestants, args.seconds, args.repetitions)
            row = dict(
                max_drop=max_drop,
                batch=batch,
                images=len(data),
                plain_per_second=len(data) / float(spread(runs.seconds['plain'])['median']),
                whole=runs.ratio('cascade', 'plain'),
                model=runs.ratio('cascade, loaded', 'plain, loaded'),
                accuracy={
                    name: float((runs.returned[name][0].numpy() == data.labels).mean())
                    for name in ('plain', 'cascade', 'stream')
                    if name in contestants
                },
            )
            if batch > 1:
                row |= dict(
                    stream=runs.ratio('stream', 'plain'), stream_model=runs.ratio('stream, loaded', 'plain, loaded')
                )
            _logger.info(
                'max_drop %.4f, batch %d: %.2f of the time of plain, %.2f with loading',
                max_drop,
                batch,
                row['model']['median'],
                row['whole']['median'],
            )
            yield dict(rows=[row])


merge = partial(unite, rows=('batch', 'max_drop'))


def markdown(section: dict[str, Any]) -> list[str]:
    load = section['loading']
    text = [
        'Test images of Fashion-MNIST through `timm_cascade.data.create_loader` in this process (IDX files in memory, '
        "timm's evaluation transform), time of the cascade over the plain backbone's; certified thresholds, "
        'channels-last. Model only: images decoded before.',
        '',
        '| max_drop | batch | images | accuracy, plain | cascade | with loading | model only | stream, with loading '
        '| stream, model only | plain, images/s |',
        '| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |',
    ]
    for r in sorted(section['rows'], key=lambda r: (r['batch'], r['max_drop'])):
        stream = [cell(r[k]) if k in r else '' for k in ('stream', 'stream_model')]
        text.append(
            f'| {r["max_drop"]:.2%} | {r["batch"]} | {r["images"]:,} | {r["accuracy"]["plain"]:.2%} | '
            f'{r["accuracy"]["cascade"]:.2%} | {cell(r["whole"])} | {cell(r["model"])} | {stream[0]} | {stream[1]} | '
            f'{r["plain_per_second"]:,.0f} |'
        )
    return [
        *text,
        '',
        f'Loading the release takes {1000 * load["cascade"]["median"]:.0f} ms, every check included; '
        f'building the plain backbone from a state in memory {1000 * load["plain"]["median"]:.0f} ms.',
    ]
