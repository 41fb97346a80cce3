"""What cascades of whole networks cost beside static networks of their accuracy, and beside the sum of their parts."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from scripts.experiments.benchmark.plain import all_of, bare, each
from scripts.experiments.benchmark.timing import in_turns, survivors
from scripts.experiments.equal_accuracy import compare
from scripts.experiments.fronts.members import Members, cheapest_front
from scripts.releases.backbones import decode
from timm_cascade.thresholds import outcome
from timm_cascade.thresholds.rule_joint import cross_fit
from timm_cascade.thresholds.samples import FloatArray

_logger = logging.getLogger('fronts')
BATCHES = {1: 64, 64: 512}  # how many test images a repetition runs
POINTS = 24  # settings per curve


def curve(members: Members) -> list[dict[str, Any]]:
    """Accuracy and MACs of settings for every budget: chosen on the calibration images, judged on the test images."""
    macs = [float(m) for m in members.macs]
    points = []
    for subset in members.subsets():
        path, _, _ = cross_fit(members.samples(subset, 'calibration', macs), 0)
        test = members.samples(subset, 'test', macs)
        for row in np.unique(np.linspace(0, len(path) - 1, POINTS).astype(int)):
            truth = outcome(test, path[row])
            points.append(dict(front=[members.labels[i] for i in subset], macs=truth.cost, accuracy=truth.accuracy))
    return points


def measure(members: Members, args: argparse.Namespace) -> dict[str, Any]:
    """Every static network beside the cascade of its accuracy."""
    first = Subset(members.test, range(min(max(BATCHES.values()), len(members.test))))
    images = decode(members.cascade(members.subsets()[0]), first)[0]
    images = images.contiguous(memory_format=torch.channels_last)
    batches: dict[int | None, list[Tensor]] = {None: []}
    cost: dict[int | None, list[float]] = {None: [float(m) for m in members.macs]}
    for size, count in BATCHES.items() if not args.untimed else ():
        batches[size] = [b for b in images[:count].split(size) if len(b) == size]
        cost[size] = _seconds(members, batches[size], args)
    rows = [
        _row(members, index, batch, batches[batch], cost[batch], args)
        for index in range(len(members.networks))
        for batch in batches
    ]
    return dict(
        networks=[
            dict(network=label, macs=m, accuracy=a)
            for label, m, a in zip(members.labels, members.macs, members.accuracy('test'), strict=True)
        ],
        n=len(members.test),
        calibrated_on=len(members.calibration),
        curve=curve(members),
        rows=rows,
    )


def _row(
    members: Members, index: int, batch: int | None, batches: list[Tensor], cost: list[float], args: argparse.Namespace
) -> dict[str, Any]:
    """One static network beside the cascade that is chosen by MACs (batch None), or by time at this batch size."""
    label = members.labels[index]
    target = members.accuracy('calibration')[index]
    found = cheapest_front(members, target, cost)
    row: dict[str, Any] = dict(network=label, batch=batch, accuracy=members.accuracy('test')[index], cascade=None)
    if found is None:
        _logger.info('%s, %s: no setting is as accurate', members.name, label)
        return row
    subset, setting = found
    test = members.samples(subset, 'test', [float(m) for m in members.macs])
    truth = compare(test, setting.thresholds, members.seen['test']['correct'][:, index])
    row['cascade'] = dict(
        front=[members.labels[i] for i in subset],
        thresholds=[None if np.isinf(t) else float(t) for t in setting.thresholds],
        accuracy=truth.accuracy,
        change=truth.difference,
        half=truth.half,
        exit_shares=list(truth.exit_shares),
        fewer_macs=members.macs[index] / truth.cost,
    )
    if batch is not None:
        row.update(_times(members, subset, setting.thresholds, index, batches, args))
        _logger.info('%s, %s, batch %d: %.2f', members.name, label, batch, row['faster']['median'])
    return row


def _seconds(members: Members, batches: list[Tensor], args: argparse.Namespace) -> list[float]:
    """Seconds for one image of each network, as the cascade runs it."""
    model = members.cascade(tuple(range(len(members.networks) - 1)))
    calls: dict[str, Callable[[], Any]] = {
        label: partial(each, network, batches)
        for label, network in zip(members.labels, [*model.fronts, bare(model)], strict=True)
    }
    runs = in_turns(calls, args.seconds / 2, args.repetitions)
    return [float(np.median(runs.seconds[label])) / sum(map(len, batches)) for label in members.labels]


def _times(
    members: Members,
    subset: tuple[int, ...],
    thresholds: FloatArray,
    index: int,
    batches: list[Tensor],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Ratios of time: the static network over the cascade, and the cascade over its parts."""
    model = members.cascade(subset)
    model.thresholds = thresholds.tolist()
    networks = [f if np.isfinite(t) else None for f, t in zip(model.fronts, thresholds, strict=True)]
    parts = [*networks, bare(model)]
    with torch.inference_mode():
        reached = [survivors(model.predict(b).exit, len(parts)) for b in batches]
    static = list(members.networks.values())[index]
    static = bare(model) if static is model.backbone else static
    contestants: dict[str, Callable[[], Any]] = {
        'static': partial(each, static, batches),
        'cascade': partial(each, model.predict, batches),
        'parts': lambda: _run_parts(parts, batches, reached),
    }
    if len(batches[0]) > 1:
        whole, size = torch.cat(batches), len(batches[0])
        totals = np.array(reached).sum(0).tolist()
        full = [(network, list(whole[:n].split(size))) for network, n in zip(parts, totals, strict=True) if n]
        contestants['stream'] = lambda: all_of(model.stream(batches))
        contestants['full parts'] = lambda: [each(net, these) for net, these in full if net is not None]
    runs = in_turns(contestants, args.seconds, args.repetitions)
    result: dict[str, Any] = dict(faster=runs.ratio('static', 'cascade'), to_parts=runs.ratio('cascade', 'parts'))
    if 'stream' in contestants:
        result.update(stream_faster=runs.ratio('static', 'stream'), stream_to_parts=runs.ratio('stream', 'full parts'))
    return result


def _run_parts(parts: list[Any], batches: list[Tensor], reached: list[list[int]]) -> None:
    """Each network on as many images of each batch as reach it."""
    for batch, counts in zip(batches, reached, strict=True):
        for network, n in zip(parts, counts, strict=True):
            if n and network is not None:
                network(batch[:n])
