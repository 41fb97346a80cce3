"""The cells of the GPU's page: each measures one network in one precision at one batch size."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor

from scripts import ROOT
from scripts.experiments.benchmark.plain import (
    SHARES,
    all_of,
    bare,
    build,
    each,
    forced,
    mean_stages,
    observe,
    pictures,
    set_and_run,
    split_survivors,
    stages_of,
)
from scripts.experiments.benchmark.timing import ideal_seconds, in_turns, occurring, spread
from timm_cascade.model import CascadeModel

RELEASE = ROOT / 'hub' / 'releases' / 'cascade_cifar_resnet20.fashion_mnist'
MODES = {'compiled': None, 'graphs': 'reduce-overhead', 'static': 'reduce-overhead', 'max-autotune': 'max-autotune'}
SINGLES = 10  # images of a measurement at batch 1
WARM = 3  # calls until a CUDA graph is replayed: the first compiles, the second records
STREAM = 8  # batches of a stream
COMMON = 0.4  # share that exits at each exit, where only one is measured


class Subject:
    """One network in one precision on the device, plain and as a cascade, in every mode that is asked for.

    Modes: `eager`, `channels-last`; compiled, in channels-last memory: `compiled` (torch.compile's own mode), `graphs`
    (CUDA graphs), `static` (the same, every batch size compiled by itself), `max-autotune`.

    Args:
        name: A timm network, which gets random weights and three exits, or `release`.
        dtype: Type of weights and images, such as `bfloat16`.
        device: Where it runs.
        backend: Backend of torch.compile.
    """

    def __init__(self, name: str, dtype: str, device: str, backend: str = 'inductor') -> None:
        self.dtype, self.device, self.backend = getattr(torch, dtype), torch.device(device), backend
        if name == 'release':
            model = timm.create_model(f'local-dir:{RELEASE}', pretrained=True).eval()
        else:
            model = build(name, pictures(16, timm.get_pretrained_cfg(name).input_size))
        self.size = tuple(model.pretrained_cfg['input_size'])
        self.model: CascadeModel = model.to(self.device, self.dtype)
        self.model.thresholds = None
        self._cascades: dict[str, CascadeModel] = {}
        self._plain: dict[str, Callable[[Tensor], Any]] = {}

    def images(self, n: int, mode: str = 'eager') -> Tensor:
        """(n, C, H, W) pictures, always the same."""
        return pictures(n, self.size, device=self.device).to(self.dtype).contiguous(memory_format=layout(mode))

    def cascade(self, mode: str, batch: int) -> CascadeModel:
        """The cascade in this mode, with open exits; compiled for `batch` if it was not compiled before."""
        if mode not in self._cascades:
            model = self._copy(mode)
            if mode in MODES:
                model.thresholds = forced(observe(model, [self.images(16, mode)]), COMMON)
                compile_cascade(model, mode, batch, self.backend)
            self._cascades[mode] = model
        return self._cascades[mode]

    def plain(self, mode: str) -> Callable[[Tensor], Any]:
        """The backbone in this mode; compiled at its first call, and again for every batch size."""
        if mode not in self._plain:
            network: Any = bare(self._copy(mode))
            if mode in MODES:
                network = torch.compile(network, mode=MODES[mode], dynamic=False, backend=self.backend)
            self._plain[mode] = network
        return self._plain[mode]

    @torch.inference_mode(False)  # weights of inference mode would have no versions
    def _copy(self, mode: str) -> CascadeModel:
        return copy.deepcopy(self.model).to(memory_format=layout(mode))

    def faster_layout(self, batch: int) -> str:
        """`eager` or `channels-last`, in which the plain network is faster."""
        calls = {m: partial(self.plain(m), self.images(batch, m)) for m in ('eager', 'channels-last')}
        runs = in_turns(calls, 0.1, least=3)
        return min(calls, key=lambda m: float(np.median(runs.seconds[m])))


def layout(mode: str) -> torch.memory_format:
    return torch.contiguous_format if mode == 'eager' else torch.channels_last


def compile_cascade(model: CascadeModel, mode: str, batch: int, backend: str) -> None:
    """Compiles the stages; raises where that failed, as a benchmark must not measure the eager fallback."""
    options: dict[str, Any] = dict(mode=MODES[mode], channels_last=True, backend=backend)
    if mode == 'static':
        model._router.compile(True, backend, MODES[mode], True)
        model._router.options = replace(model._router.options, static=True)
    else:
        model.compile(batch_sizes=(batch,), **options)
    if not model.compiled:
        raise RuntimeError('the cascade could not be compiled')


def still_compiled(model: CascadeModel) -> bool:
    """Whether no stage has fallen back to running eagerly."""
    stages = [s.module for staged in model._router._exported.values() for s in staged.stages]
    return model.compiled and bool(stages) and not any(stage.failed for stage in stages)


def prepare(subject: Subject, way: str, mode: str, batch: int) -> float:
    """Seconds until the plain network or the cascade (`way`) has answered its first batch in this mode.

    What the compiler made stays in its cache on disk, from which `compare` takes it.
    """
    images = subject.images(batch, mode)
    with torch.inference_mode():
        subject.plain('channels-last')(images)  # what torch sets up once is not the compiler's time
        began = time.perf_counter()
        if way == 'plain':
            subject.plain(mode)(images)
        else:
            model = subject.cascade(mode, batch)
            model.predict(images)
            if batch > 1:
                model.thresholds = None
                model.predict(images)
    return time.perf_counter() - began


@torch.inference_mode()
def compare(subject: Subject, batch: int, modes: list[str], seconds: float, least: int) -> dict[str, Any]:
    """The cascade eager and in `modes`, at every share and with its exits closed, beside the plain network."""
    n = batch if batch > 1 else SINGLES
    faster, count = subject.faster_layout(batch), len(subject.model.exits) + 1
    contestants: dict[str, Callable[[], Any]] = {
        f'plain {m}': partial(each, subject.plain(m), list(subject.images(n, m).split(batch)))
        for m in ('eager', 'channels-last', *(m for m in modes if m != 'static'))
    }
    came: dict[tuple[str, float], list[list[int]]] = {}
    for mode in (faster, *(m for m in modes if m != 'compiled')):
        model, images = subject.cascade(mode, batch), subject.images(n, mode)
        batches = list(images.split(batch))
        confidences = observe(model, batches)
        for share in SHARES:
            thresholds = forced(confidences, share)
            call = partial(set_and_run, model, thresholds, batches)
            exits = [call() for _ in range(WARM)][-1]  # rounding may have moved some from what was planned
            came[mode, share] = split_survivors(exits.cpu(), batch, count)
            contestants[f'cascade {mode} {share}'] = call
        if batch > 1 or mode not in MODES:  # one more form to compile
            contestants[f'closed {mode}'] = partial(set_and_run, model, [math.inf] * (count - 1), batches)
        for last, size in occurring([s for share in SHARES for s in came[mode, share]]):
            whole = images[:size].contiguous(memory_format=layout(mode))
            contestants[f'stages {mode} {size}'] = partial(mean_stages, model, whole, last, len(batches))
    runs = in_turns(contestants, seconds, least, warm=WARM)
    plains = {
        k.removeprefix('plain '): 1000 * float(np.median(v)) / n for k, v in runs.seconds.items() if k[:2] == 'pl'
    }
    best = min(plains, key=plains.__getitem__)
    rows = []
    for (mode, share), sizes in came.items():
        key, ideal = f'cascade {mode} {share}', ideal_seconds(sizes, stages_of(runs, mode))
        other = sum(split_survivors(e.cpu(), batch, count) != sizes for e in runs.returned[key])
        rows.append(
            dict(
                mode=mode,
                share=share,
                came=np.sum(sizes, axis=0).tolist(),
                unstable=other,  # repetitions in which rounding sent another number of images on
                to_best=runs.ratio(key, f'plain {best}'),
                to_ideal=runs.ratio(key, ideal),
                ideal_to_best=spread(ideal / runs.seconds[f'plain {best}']),
            )
        )
    closed = {
        mode: runs.ratio(f'closed {mode}', f'plain {"graphs" if mode == "static" else mode}')
        for mode in dict.fromkeys(mode for mode, _ in came)
        if f'closed {mode}' in contestants
    }
    still = {m: still_compiled(subject.cascade(m, batch)) for m in modes if m != 'compiled'}
    return dict(plain_ms=plains, best=best, rows=rows, closed=closed, still_compiled=still)


@torch.inference_mode()
def regroup(subject: Subject, batch: int, modes: list[str], seconds: float, least: int) -> dict[str, Any]:
    """`stream`, which merges the remaining images of several batches, beside `predict` of each batch and plain."""
    rows = []
    for mode in (subject.faster_layout(batch), *modes):
        model, images = subject.cascade(mode, batch), subject.images(STREAM * batch, mode)
        batches = list(images.split(batch))
        confidences = observe(model, batches)
        for share in SHARES[1:]:
            model.thresholds = forced(confidences, share)
            contestants = dict(
                plain=partial(each, subject.plain(mode), batches),
                predict=partial(each, model.predict, batches),
                stream=lambda model=model, batches=batches: all_of(model.stream(batches)),
            )
            runs = in_turns(contestants, seconds / 3, least, warm=WARM)
            row: dict[str, Any] = dict(
                mode=mode,
                share=share,
                gain=runs.ratio('predict', 'stream'),
                stream_to_plain=runs.ratio('stream', 'plain'),
                predict_to_plain=runs.ratio('predict', 'plain'),
            )
            if subject.device.type == 'cuda' and share == COMMON:
                row['peak'] = {name: peak(call, subject.device) for name, call in contestants.items()}
            rows.append(row)
    return dict(rows=rows)


def peak(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a call needs at most, above what is allocated before it."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
