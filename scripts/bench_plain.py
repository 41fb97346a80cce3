"""Cascades with forced exit shares beside the plain timm backbone, and beside the ideal from stage times."""
from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timing import Runs, ideal_seconds, in_turns, occurring, spread, stage_seconds, survivors
from torch import Tensor

import timm_cascade  # noqa: F401  registers the cascades
from timm_cascade.model import CascadeModel
from timm_cascade.routing import confidence

_logger = logging.getLogger('benchmark')
NETWORKS = ('resnet18', 'resnet50', 'mobilenetv3_large_100', 'convnext_tiny', 'vit_small_patch16_224')
SHARES = (0., 0.2, 0.4, 0.6)
IMAGES = {1: 20, 8: 24}  # of other batch sizes, one batch
MEMORY = {'eager': torch.contiguous_format, 'channels-last': torch.channels_last, 'compiled': torch.channels_last}


def pictures(n: int, size: tuple[int, int, int], seed: int = 0) -> Tensor:
    """(n, C, H, W) coarse random pictures: unlike noise, no two of them look the same to a network."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, size[0], 8, 8, generator=generator) * torch.rand(n, 1, 1, 1, generator=generator) * 2
    return F.interpolate(coarse, size[1:], mode='bilinear')


@torch.no_grad()
def build(name: str, images: Tensor, exits: int = 3, **kwargs: Any) -> CascadeModel:
    """A cascade with random weights whose heads tell the images apart: their norms have seen them."""
    torch.manual_seed(0)
    model = timm.create_model(f'cascade_{name}', exits=exits, **kwargs).eval()
    pooled, _ = model.forward_pooled(images)
    for head, features in zip(model.heads, pooled, strict=True):
        head.norm.running_mean.copy_(features.mean(0))
        head.norm.running_var.copy_(features.var(0))
        head.fc.weight.mul_(20)  # confidences far enough apart for a threshold between any two
    return model


def forced(sure: np.ndarray, share: float) -> list[float]:
    """Thresholds at which `share` of those present leave at each exit.

    Args:
        sure: (n, M) confidences of every image at every exit.
    """
    present, thresholds = np.arange(len(sure)), []
    for column in sure.T:
        order = np.sort(column[present])[::-1]
        leaving = round(share * len(present))
        above = order[leaving - 1] if leaving else 1.
        below = order[leaving] if leaving < len(order) else 0.
        thresholds.append(float(above + below) / 2)
        present = present[column[present] < thresholds[-1]]
    return thresholds


@torch.inference_mode()
def observe(model: CascadeModel, batches: list[Tensor]) -> np.ndarray:
    """(n, M) confidences of all images at all exits."""
    sure = [torch.stack([confidence(x) for x in model.forward_exits(b)[:-1]], 1) for b in batches]
    return torch.cat(sure).cpu().numpy()


def each(call: Callable[[Tensor], Any], batches: list[Tensor]) -> None:
    for batch in batches:
        call(batch)


class Case:
    """One network at one batch size: its contestants, and what they must be compared with."""

    def __init__(self, model: CascadeModel, images: Tensor, batch: int, modes: list[str]) -> None:
        self.models: dict[str, CascadeModel] = {}
        self.batches: dict[str, list[Tensor]] = {}
        self.sizes: dict[tuple[str, float], list[list[int]]] = {}
        self.contestants: dict[str, Callable[[], Any]] = {}
        for mode in modes:
            self.models[mode] = copy.deepcopy(model).to(memory_format=MEMORY[mode])
            self.batches[mode] = [b.contiguous(memory_format=MEMORY[mode]) for b in images.split(batch)]
            backbone = self.models[mode].backbone
            if mode == 'compiled':
                backbone = torch.compile(copy.deepcopy(model.backbone).to(memory_format=MEMORY[mode]))
            self.contestants[f'plain {mode}'] = partial(each, backbone, self.batches[mode])

    def add_cascade(self, mode: str) -> None:
        model, batches = self.models[mode], self.batches[mode]
        sure = observe(model, batches)
        if mode == 'compiled':
            model.compile()
        for share in SHARES:
            model.thresholds = thresholds = forced(sure, share)
            with torch.inference_mode():
                outputs = [model.predict(b) for b in batches]
            self.sizes[mode, share] = [survivors(o.exit, len(model.exits) + 1) for o in outputs]
            self.contestants[f'cascade {mode} {share}'] = partial(self._cascade, model, thresholds, batches)
        images = torch.cat(batches)
        for last, n in occurring([s for (m, _), sizes in self.sizes.items() if m == mode for s in sizes]):
            self.contestants[f'stages {mode} {n}'] = partial(self._stages, model, images[:n], last, len(batches))

    @staticmethod
    def _cascade(model: CascadeModel, thresholds: list[float], batches: list[Tensor]) -> None:
        model.thresholds = thresholds
        each(model.predict, batches)

    @staticmethod
    def _stages(model: CascadeModel, images: Tensor, last: int, times: int) -> np.ndarray:
        return np.mean([stage_seconds(model, images, last) for _ in range(times)], axis=0)

    def stages(self, runs: Runs, mode: str) -> dict[int, np.ndarray]:
        prefix = f'stages {mode} '
        return {int(k.removeprefix(prefix)): np.stack(v) for k, v in runs.returned.items() if k.startswith(prefix)}


@torch.inference_mode()
def faster_eager(case: Case) -> str:
    """The memory format that the plain backbone runs faster in."""
    names = [m for m in ('eager', 'channels-last') if m in case.models]
    runs = in_turns({m: case.contestants[f'plain {m}'] for m in names}, 0, least=2)
    return min(names, key=lambda m: runs.seconds[m].min())


def measure(name: str, batch: int, seconds: float, least: int, modes: list[str], device: str,
            size: int | None) -> list[dict[str, Any]]:
    n = IMAGES.get(batch, batch)
    # timm knows what size the network takes; a smaller one is for the tests
    side = size or timm.get_pretrained_cfg(name).input_size[-1]
    images = pictures(n, (3, side, side)).to(device)
    case = Case(build(name, images, **(dict(pretrained_cfg_overlay=dict(input_size=(3, side, side))) if size else {}))
                .to(device), images, batch, modes)
    cascades = [faster_eager(case), *(m for m in modes if m == 'compiled')]
    for mode in cascades:
        case.add_cascade(mode)
    runs = in_turns(case.contestants, seconds, least)
    best = min(modes, key=lambda m: np.median(runs.seconds[f'plain {m}']))
    rows = []
    for mode in cascades:
        for share in SHARES:
            sizes, key = case.sizes[mode, share], f'cascade {mode} {share}'
            ideal = ideal_seconds(sizes, case.stages(runs, mode))
            present = np.sum(sizes, axis=0)
            rows.append(dict(
                network=name, batch=batch, mode=mode, share=share, left=(1 - present[1:] / present[:-1]).tolist(),
                to_ideal=runs.ratio(key, ideal), to_plain=runs.ratio(key, f'plain {mode}'),
                to_best=runs.ratio(key, f'plain {best}'), best=best,
                ideal_to_plain=spread(ideal / runs.seconds[f'plain {mode}']),
                plain_ms=1000 * float(np.median(runs.seconds[f'plain {mode}'])) / n))
            _logger.info('%s, batch %d, %s, %.0f %%: %.3f of the ideal, %.3f of the plain network (%s: %.3f)', name,
                         batch, mode, 100 * share, rows[-1]['to_ideal']['median'], rows[-1]['to_plain']['median'], best,
                         rows[-1]['to_best']['median'])
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--networks', nargs='+', default=list(NETWORKS))
    parser.add_argument('--batch', type=int, nargs='+', default=[1, 8, 64])
    parser.add_argument('--modes', nargs='+', default=list(MEMORY), choices=list(MEMORY))
    parser.add_argument('--size', type=int, help='side of the images, if not the network\'s own')


def run(args: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for name in args.networks:
        for batch in args.batch:
            rows += measure(name, batch, args.seconds, args.repetitions, args.modes, args.device, args.size)
            torch.compiler.reset()
    return dict(rows=rows)


def markdown(section: dict[str, Any]) -> list[str]:
    from bench_page import cell, verdict

    text = [
        'Random weights, three exits, coarse random pictures of the network\'s own size; thresholds put between the '
        'confidences that were observed, so that the stated share of the images present leaves at each exit (at batch '
        '1 and 8: of 20 and 24 images; the ideal counts what really left). Ideal: the measured times of the plain '
        'network\'s stages and heads, each at the batch sizes that came to it. Eager is the faster of the two memory '
        'formats; best is the plain network in its fastest mode of all. Targets: at most 1.05 of the ideal at batch '
        '64, 1.10 at batch 1; below 1.00 of the plain network from 20 % up.', '',
        '| network | batch | mode | leave | of the ideal | of plain, same mode | of plain, best mode '
        '| ideal of plain |',
        '| --- | --- | --- | --- | --- | --- | --- | --- |']
    for r in section['rows']:
        limit = 1.05 if r['batch'] >= 64 else 1.10 if r['batch'] == 1 else None
        text.append(
            f'| {r["network"]} | {r["batch"]} | {r["mode"]} | {r["share"]:.0%} | '
            f'{verdict(r["to_ideal"], limit)} | {cell(r["to_plain"])} | '
            f'{verdict(r["to_best"], 1. if r["share"] else None)} ({r["best"]}) | {cell(r["ideal_to_plain"])} |')
    return text
