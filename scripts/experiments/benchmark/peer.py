"""The cascade beside earlyon 0.3.0 (from PyPI), same network, heads, thresholds and images.

earlyon's EarlyExitWrapper takes any backbone and any heads, so it gets the very modules that the cascade has. It routes
one image at a time (`model(x)`), or a batch that exits together, as soon as all of it is confident
(`forward_inference_batched`); its hooks do not run under torch.compile.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from scripts import ROOT
from scripts.datasets import fashion_mnist
from scripts.experiments.benchmark.page import cell, unite, verdict
from scripts.experiments.benchmark.plain import bare, build, each, forced, observe, pictures
from scripts.experiments.benchmark.timing import ideal_seconds, in_turns, occurring, spread, stage_seconds, survivors
from scripts.releases.backbones import decode
from timm_cascade.data import ImageData
from timm_cascade.model import CascadeModel

_logger = logging.getLogger('benchmark')
VERSION = '0.3.0'
RELEASE = ROOT / 'hub' / 'releases' / 'cascade_cifar_resnet20.fashion_mnist'


def wrap(model: CascadeModel, size: tuple[int, ...]) -> nn.Module:
    """The same network, heads and thresholds in earlyon's wrapper; a closed exit is one it does not enable.

    Raises:
        SystemExit: earlyon is not installed, or another version.
    """
    try:
        from earlyon import EarlyExitConfig, EarlyExitWrapper, ExitPoint, __version__
    except ImportError as e:
        raise SystemExit(f'{e}; pip install --no-deps earlyon=={VERSION} first.') from e
    if __version__ != VERSION:
        raise SystemExit(f'earlyon is {__version__}; pip install --no-deps earlyon=={VERSION} first.')
    thresholds = model.thresholds.tolist()
    points = [ExitPoint(f'e{i}', p.module, p.channels) for i, p in enumerate(model.exits)]
    config = EarlyExitConfig(
        backbone='custom',
        num_classes=model.num_classes,
        exit_points=points,
        confidence_thresholds=[0.0 if math.isinf(t) else t for t in thresholds],
        enabled_exits=[not math.isinf(t) for t in thresholds],
    )
    heads = {f'e{i}': head for i, head in enumerate(model.heads)}  # the very same: see plain.bare
    wrapper = EarlyExitWrapper(bare(model), heads, nn.Identity(), config, input_shape=(1, *size)).eval()
    _ = wrapper.flops_estimate  # it computes this at its first call; that is not what is timed
    return wrapper


def bare_loop(model: CascadeModel) -> Callable[[Tensor], Tensor]:
    """A single image through the same modules in a loop of a few lines: what no library can be faster than.

    For ResNets, whose modules follow one another.
    """
    opened = {p.module: (h, t) for p, h, t in zip(model.exits, model.heads, model.thresholds.tolist(), strict=True)}
    steps = []
    for name, module in bare(model).named_children():
        blocks = list(module) if isinstance(module, nn.Sequential) else [module]
        steps += [(b, *opened.get(f'{name}.{i}', (None, math.inf))) for i, b in enumerate(blocks)]
        if name in opened:
            steps[-1] = (blocks[-1], *opened[name])

    def run(x: Tensor) -> Tensor:
        for module, head, threshold in steps:
            x = module(x)
            if threshold != math.inf:
                logits = head(x)
                if logits.softmax(-1).amax(-1).item() >= threshold:
                    return logits
        return x

    return run


def same_answers(
    model: CascadeModel, other: nn.Module, batches: list[Tensor], loop: Callable[[Tensor], Tensor] | None = None
) -> None:
    """In both, single images exit at the same exits, with the same logits; those of `loop`, if given, are the same.

    Raises:
        AssertionError: They do not, and a comparison of their times would mean nothing.
    """
    with torch.inference_mode():
        for image in torch.cat(batches).split(1):
            ours, theirs = model.predict(image), other(image)
            assert int(ours.exit) == (theirs.exit_taken if theirs.exit_taken >= 0 else len(model.exits))
            for found in (theirs.prediction, *([loop(image)] if loop else [])):
                torch.testing.assert_close(ours.logits, found, rtol=1e-3, atol=1e-3)


def compare(what: str, model: CascadeModel, images: Tensor, batch: int, seconds: float, least: int) -> dict[str, Any]:
    """Throughput of ours over theirs, in inference mode, channels-last; and what an ideal cascade would have."""
    images = images.contiguous(memory_format=torch.channels_last)
    batches = list(images.split(batch))
    other = wrap(model, tuple(images.shape[1:])).to(memory_format=torch.channels_last)
    loop = bare_loop(model) if batch == 1 else None
    same_answers(model, other, batches[:1] if batch > 1 else batches[:50], loop)
    compiled = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    compiled.compile(batch_sizes=(batch,))
    with torch.inference_mode():
        sizes = [survivors(model.predict(b).exit, len(model.exits) + 1) for b in batches]
        theirs = [other(b).exit_taken if batch == 1 else other.forward_inference_batched(b).exit_taken for b in batches]
    contestants: dict[str, Callable[[Tensor], Any]] = dict(
        ours=model.predict,
        compiled=compiled.predict,
        theirs=other if batch == 1 else other.forward_inference_batched,
        plain=bare(model),
    )
    if loop:
        contestants['loop'] = loop
    runs = in_turns({name: partial(each, call, batches) for name, call in contestants.items()}, seconds, least)
    left = [e for e in theirs if e >= 0]
    row = dict(
        what=what,
        batch=batch,
        images=len(images),
        survivors=np.sum(sizes, axis=0).tolist(),
        theirs_left_early=len(left) / len(batches),
        throughput=runs.ratio('theirs', 'ours'),
        compiled=runs.ratio('theirs', 'compiled'),
        ours_to_plain=runs.ratio('ours', 'plain'),
        theirs_to_plain=runs.ratio('theirs', 'plain'),
    )
    if loop:
        row['loop'] = runs.ratio('theirs', 'loop')
    faster = [row[k]['median'] for k in ('throughput', 'compiled')]
    _logger.info('%s, batch %d: %.2f times the throughput of earlyon, compiled %.2f', what, batch, *faster)
    return row


@torch.inference_mode()
def ideal_share(model: CascadeModel, images: Tensor, batch: int, seconds: float, least: int) -> dict[str, float]:
    """Time of an ideal cascade over the plain network's: the stages that run, at the batch sizes that come to them."""
    batches = list(images.contiguous(memory_format=torch.channels_last).split(batch))
    sizes = [survivors(model.predict(b).exit, len(model.exits) + 1) for b in batches]
    images = torch.cat(batches)
    runs = in_turns(
        {'plain': partial(each, bare(model), batches)}
        | {str(n): partial(stage_seconds, model, images[:n], last) for last, n in occurring(sizes)},
        seconds,
        least,
    )
    stages = {int(n): np.stack(v) for n, v in runs.returned.items() if n != 'plain'}
    return spread(ideal_seconds(sizes, stages) / runs.seconds['plain'])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--share', type=float, default=0.4, help='of the remaining images that exit at each forced exit'
    )
    parser.add_argument('--size', type=int, default=224, help='side of the random pictures')
    parser.add_argument('--images', type=int, default=2048, help='real images; a quarter of them at batch 1')


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for batch, n in ((1, 20), (64, 64)):
        images = pictures(n, (3, args.size, args.size)).to(args.device)
        model = build('resnet18', images).to(args.device, memory_format=torch.channels_last)
        model.thresholds = forced(observe(model, list(images.split(batch))), args.share)
        what = f'resnet18, {args.share:.0%} exit at each of 3 exits'
        row = compare(what, model, images, batch, args.seconds, args.repetitions)
        ideal = ideal_share(model, images, batch, args.seconds / 2, args.repetitions)
        goals = dict(target=0.9 / ideal['median']) if batch > 1 else dict(target=1.05, compiled_target=1.3)
        yield dict(rows=[dict(row, ideal_to_plain=ideal, **goals)], version=VERSION)
    model = timm.create_model(f'local-dir:{RELEASE}', pretrained=True).eval()
    model.to(args.device, memory_format=torch.channels_last)
    model.set_max_drop(0.005)
    images = decode(model, first(fashion_mnist.load_test(), args.images))[0].to(args.device)
    what = 'Fashion-MNIST release, max_drop 0.5 %, test images'
    single, whole = dict(target=1.5, compiled_target=2.0), dict(target=2.5)
    for batch, n, goals in ((1, len(images) // 4, single), (64, len(images) // 64 * 64, whole)):
        row = compare(what, model, images[:n], batch, args.seconds, args.repetitions)
        yield dict(rows=[dict(row, **goals)], version=VERSION)


merge = partial(unite, rows=('what', 'batch'))


def first(data: ImageData, n: int) -> ImageData:
    """The first n images."""
    n = min(n, len(data))
    images = data.images[:n] if isinstance(data.images, np.ndarray) else [data.images[i] for i in range(n)]
    return ImageData(images, data.labels[:n], data.class_names, data.source, data.split)


def markdown(section: dict[str, Any]) -> list[str]:
    text = [
        f'earlyon {section["version"]} in its own EarlyExitWrapper, around the same network, heads and thresholds '
        '(a closed exit is not enabled there); both eager, channels-last, in inference mode; beside it ours compiled, '
        'as earlyon does not run under torch.compile. Single images exit at '
        'the same exits with the same logits in both: checked before timing. At batch 64 earlyon keeps a batch '
        'together until all of it is confident; last column: share of its batches that exited early. Target at batch '
        '64 with forced shares: 0.9 / ideal; on real images 2.5; at batch 1 1.05 and 1.5, compiled 1.3 and 2. A bare '
        'loop is the same modules, called one after the other in a few lines of Python without either library: what '
        'an eager cascade cannot be faster than.',
        '',
        "| what | batch | our throughput over earlyon's | a bare loop's | ours compiled | ours, time of plain "
        '| earlyon, time of plain | earlyon exited early |',
        '| --- | --- | --- | --- | --- | --- | --- | --- |',
    ]
    for r in sorted(section['rows'], key=lambda r: ('release' in r['what'], r['batch'])):
        text.append(
            f'| {r["what"]} | {r["batch"]} | {verdict(r["throughput"], r["target"], at_least=True)} | '
            f'{cell(r["loop"]) if "loop" in r else ""} | '
            f'{verdict(r["compiled"], r.get("compiled_target"), at_least=True) if "compiled" in r else ""} | '
            f'{cell(r["ours_to_plain"])} | {cell(r["theirs_to_plain"])} | {r["theirs_left_early"]:.0%} |'
        )
    return text
