"""Cascades with forced exit shares beside the plain timm backbone, and beside the ideal from stage times."""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import timm_cascade  # noqa: F401  registers the cascades
from scripts.experiments.benchmark.page import cell, unite, verdict
from scripts.experiments.benchmark.timing import (
    Runs,
    ideal_seconds,
    in_turns,
    occurring,
    spread,
    stage_seconds,
    survivors,
)
from timm_cascade.inference.batch import confidence
from timm_cascade.model import CascadeModel
from timm_cascade.thresholds import route

_logger = logging.getLogger('benchmark')
NETWORKS = ('resnet18', 'resnet50', 'mobilenetv3_large_100', 'convnext_tiny', 'vit_small_patch16_224')
SHARES = (0.0, 0.2, 0.4, 0.6)
IMAGES = {1: 10}  # of other batch sizes, one batch
MEMORY = {'eager': torch.contiguous_format, 'channels-last': torch.channels_last, 'compiled': torch.channels_last}


def pictures(n: int, size: tuple[int, int, int], seed: int = 0, device: str | torch.device = 'cpu') -> Tensor:
    """(n, C, H, W) coarse random pictures: unlike noise, no two of them look the same to a network."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, size[0], 8, 8, generator=generator) * torch.rand(n, 1, 1, 1, generator=generator) * 2
    return F.interpolate(coarse.to(device), size[1:], mode='bilinear')


@torch.no_grad()
def build(name: str, images: Tensor, exits: int = 3, **kwargs: Any) -> CascadeModel:
    """A cascade with random weights and evenly spread exits; its heads tell the images apart: their norms saw them."""
    torch.manual_seed(0)
    places = [(i + 1) / (exits + 1) for i in range(exits)]
    model = timm.create_model(f'cascade_{name}', exits=places, **kwargs).eval()
    pooled, _ = model.forward_pooled(images)
    for head, features in zip(model.heads, pooled, strict=True):
        head.norm.running_mean.copy_(features.mean(0))
        head.norm.running_var.copy_(features.var(0))
        head.fc.weight.mul_(20)  # confidences far enough apart for a threshold between any two
    return model


def forced(confidences: np.ndarray, share: float) -> list[float]:
    """Thresholds at which `share` of the remaining images exit at each exit.

    Args:
        confidences: (n, M) confidences of every image at every exit.
    """
    present, thresholds = np.arange(len(confidences)), []
    for column in confidences.T:
        order = np.sort(column[present])[::-1]
        exiting = round(share * len(present))
        above = order[exiting - 1] if exiting else 1.0
        below = order[exiting] if exiting < len(order) else 0.0
        thresholds.append(float(above + below) / 2)
        present = present[column[present] < thresholds[-1]]
    return thresholds


@torch.inference_mode()
def observe(model: CascadeModel, batches: list[Tensor]) -> np.ndarray:
    """(n, M) confidences of all images at all exits."""
    confidences = [torch.stack([confidence(x) for x in model.forward_exits(b)[:-1]], 1) for b in batches]
    return torch.cat(confidences).cpu().numpy()


def each(call: Callable[[Tensor], Any], batches: list[Tensor]) -> None:
    for batch in batches:
        call(batch)


def all_of(outputs: Iterable[Any]) -> None:
    for _ in outputs:
        pass


def bare(model: CascadeModel) -> nn.Module:
    """The backbone without the cascade's hooks, on the same tensors: where a copy's weights happen to lie in memory
    is worth up to 5 % of a batch of one."""
    shared = {id(t): t for t in (*model.backbone.parameters(), *model.backbone.buffers())}
    backbone = copy.deepcopy(model.backbone, shared)
    for module in backbone.modules():
        module._forward_hooks.clear()
    return backbone


class Network:
    """A network in every mode, plain and as a cascade."""

    def __init__(self, model: CascadeModel, modes: list[str]) -> None:
        self.cascades: dict[str, CascadeModel] = {}
        self.plain: dict[str, Callable[[Tensor], Any]] = {}
        for mode in modes:
            copied = copy.deepcopy(model).to(memory_format=MEMORY[mode])
            self.cascades[mode], self.plain[mode] = copied, bare(copied)
            if mode == 'compiled':
                self.plain[mode] = torch.compile(self.plain[mode])

    def eager(self, images: Tensor) -> str:
        """The memory format in which the plain network is faster."""
        names = [m for m in ('eager', 'channels-last') if m in self.plain]
        runs = in_turns({m: partial(each, self.plain[m], to_memory(m, [images])) for m in names}, 1, least=2)
        return min(names, key=lambda m: runs.seconds[m].min())


def to_memory(mode: str, batches: list[Tensor]) -> list[Tensor]:
    return [b.contiguous(memory_format=MEMORY[mode]) for b in batches]


def set_and_run(model: CascadeModel, thresholds: list[float], batches: list[Tensor]) -> Tensor:
    """The exits that answered."""
    model.thresholds = thresholds
    return torch.cat([model.predict(b).exit for b in batches])


def split_survivors(exits: Tensor, batch: int, count: int) -> list[list[int]]:
    """For each batch, the samples that come to each of `count` stages."""
    return [survivors(e, count) for e in exits.split(batch)]


def mean_stages(model: CascadeModel, images: Tensor, last: int, times: int) -> np.ndarray:
    return np.mean([stage_seconds(model, images, last) for _ in range(times)], axis=0)


def measure(network: Network, images: Tensor, batch: int, seconds: float, least: int) -> list[dict[str, Any]]:
    """Rows for one batch size: every eager and compiled cascade at every share."""
    plain_batches = list(images.split(batch))
    modes, count = list(network.plain), len(next(iter(network.cascades.values())).exits) + 1
    contestants: dict[str, Callable[[], Any]] = {
        f'plain {m}': partial(each, network.plain[m], to_memory(m, plain_batches)) for m in modes
    }
    cascades = [network.eager(images[:8]), *(m for m in modes if m == 'compiled')]
    came: dict[tuple[str, float], list[list[int]]] = {}
    for mode in cascades:
        model, batches = network.cascades[mode], to_memory(mode, plain_batches)
        confidences = observe(model, batches)
        for share in SHARES:
            thresholds = forced(confidences, share)
            planned = route(np.column_stack([confidences, np.ones(len(confidences))]), np.array(thresholds))
            came[mode, share] = split_survivors(torch.from_numpy(planned), batch, count)
            contestants[f'cascade {mode} {share}'] = partial(set_and_run, model, thresholds, batches)
        whole = torch.cat(batches).contiguous(memory_format=MEMORY[mode])
        for last, n in occurring([sizes for share in SHARES for sizes in came[mode, share]]):
            contestants[f'stages {mode} {n}'] = partial(mean_stages, model, whole[:n], last, len(batches))
    # a batch of 64 runs for seconds: what its first run sets up is little of that, and a median leaves it out
    runs = in_turns(contestants, seconds, least, warm=int(batch < 64))
    best = min(modes, key=lambda m: np.median(runs.seconds[f'plain {m}']))
    rows = []
    for (mode, share), sizes in came.items():
        key, plain = f'cascade {mode} {share}', f'plain {mode}'
        if sizes != (found := split_survivors(runs.returned[key][0].cpu(), batch, count)):
            raise RuntimeError(f'{mode}, {share:.0%}: {sizes} were to come to the stages, and {found} did.')
        ideal = ideal_seconds(sizes, stages_of(runs, mode))
        rows.append(
            dict(
                batch=batch,
                mode=mode,
                share=share,
                came=np.sum(sizes, axis=0).tolist(),
                best=best,
                to_ideal=runs.ratio(key, ideal),
                to_plain=runs.ratio(key, plain),
                to_best=runs.ratio(key, f'plain {best}'),
                ideal_to_plain=spread(ideal / runs.seconds[plain]),
                plain_ms=1000 * float(np.median(runs.seconds[plain])) / len(images),
            )
        )
    return rows


def stages_of(runs: Runs, mode: str) -> dict[int, np.ndarray]:
    """By batch size, (repetitions, stages) seconds."""
    prefix = f'stages {mode} '
    return {int(k.removeprefix(prefix)): np.stack(v) for k, v in runs.returned.items() if k.startswith(prefix)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--networks', nargs='+', default=list(NETWORKS))
    parser.add_argument('--batch', type=int, nargs='+', default=[1, 8, 64])
    parser.add_argument('--modes', nargs='+', default=list(MEMORY), choices=list(MEMORY))
    parser.add_argument('--size', type=int, help="side of the images, if not the network's own")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name in args.networks:
        # timm knows what size the network takes; a smaller one is for the tests
        side = args.size or timm.get_pretrained_cfg(name).input_size[-1]
        images = pictures(max(16, *(IMAGES.get(b, b) for b in args.batch)), (3, side, side)).to(args.device)
        model = build(name, images[:16], pretrained_cfg_overlay=dict(input_size=(3, side, side)))
        network = Network(model.to(args.device), args.modes)
        if 'compiled' in network.cascades:
            network.cascades['compiled'].compile()
            with torch.inference_mode():  # two sizes make torch.compile look for a form for all of them
                for call in (network.plain['compiled'], network.cascades['compiled'].predict):
                    each(call, to_memory('compiled', [images[:2], images[:3]]))
        for batch in args.batch:
            rows = measure(network, images[: IMAGES.get(batch, batch)], batch, args.seconds, args.repetitions)
            for r in rows:
                _logger.info(
                    '%s, batch %d, %s, %.0f %%: %.3f of the ideal, %.3f of the plain network (%s: %.3f)',
                    name,
                    batch,
                    r['mode'],
                    100 * r['share'],
                    r['to_ideal']['median'],
                    r['to_plain']['median'],
                    r['best'],
                    r['to_best']['median'],
                )
            yield dict(rows=[dict(network=name, **row) for row in rows])
        torch.compiler.reset()


merge = partial(unite, rows=('network', 'batch'))


def markdown(section: dict[str, Any]) -> list[str]:
    text = [
        "Random weights, three exits, coarse random pictures of the network's own size; thresholds put between the "
        'confidences that were observed, so that the stated share of the remaining images exits at each exit (at batch '
        '1: of ten images; the ideal counts what really exited). Ideal: the measured times of the plain '
        "network's stages (compiled: of the compiled stages) and heads, each at the batch sizes that came to it. "
        'Eager is the faster of the two memory formats; best is the plain network in its fastest mode of all. '
        'Targets: at most 1.05 of the ideal at batch 64, 1.10 at batch 1; below 1.00 of the plain network from 20 % '
        'up.',
        '',
        '| network | batch | mode | exit | of the ideal | of plain, same mode | of plain, best mode | ideal of plain |',
        '| --- | --- | --- | --- | --- | --- | --- | --- |',
    ]
    order = [*NETWORKS, *(r['network'] for r in section['rows'])]
    for r in sorted(section['rows'], key=lambda r: (order.index(r['network']), r['batch'])):
        limit = 1.05 if r['batch'] >= 64 else 1.10 if r['batch'] == 1 else None
        text.append(
            f'| {r["network"]} | {r["batch"]} | {r["mode"]} | {r["share"]:.0%} | '
            f'{verdict(r["to_ideal"], limit)} | {cell(r["to_plain"])} | '
            f'{verdict(r["to_best"], 1.0 if r["share"] else None)} ({r["best"]}) | {cell(r["ideal_to_plain"])} |'
        )
    return text
