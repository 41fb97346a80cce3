"""Times of several contestants on one machine, side by side.

`torch.utils.benchmark` times one statement after the other; on a machine whose speed drifts, ratios need the
contestants in turns. So: every repetition runs each of them once, the order reversed from one to the next, and ratios
are formed within a repetition.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from timm_cascade.inference.engine import Boundary, StopForward
from timm_cascade.model import CascadeModel
from timm_cascade.utils.clock import clock, device_name


@dataclass
class Runs:
    """What `in_turns` measured: by contestant, seconds (repetitions,) and what each call returned."""

    seconds: dict[str, np.ndarray]
    returned: dict[str, list[Any]]

    def ratio(self, one: str, other: str | np.ndarray) -> dict[str, float]:
        """Time of `one` over that of `other`, as `spread` has it."""
        return spread(self.seconds[one] / (self.seconds[other] if isinstance(other, str) else other))


def spread(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.quantile(np.asarray(values, dtype=float), (0.25, 0.5, 0.75))
    return dict(median=float(median), low=float(low), high=float(high), n=len(values))


@torch.inference_mode()
def in_turns(
    contestants: dict[str, Callable[[], Any]],
    seconds: float,
    least: int = 3,
    warm: int = 1,
    now: Callable[[], float] | None = None,
) -> Runs:
    """Runs all contestants again and again, at least `least` times each, for about `seconds`.

    Before that each runs `warm` times: a CUDA graph is compiled by the first call, recorded by the second. `now` reads
    another clock than the wall's.
    """
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')  # whose work the clock waits for
    read = now or partial(clock, device)
    for call in [c for c in contestants.values() for _ in range(warm)]:
        call()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    returned: dict[str, list[Any]] = {name: [] for name in contestants}
    began, turn = time.perf_counter(), 0
    while turn < least or time.perf_counter() - began < seconds:
        names = list(contestants)
        for name in names if turn % 2 else reversed(names):
            start = read()
            value = contestants[name]()
            times[name].append(read() - start)
            returned[name].append(value)
        turn += 1
    return Runs({k: np.array(v) for k, v in times.items()}, returned)


def stage_seconds(model: CascadeModel, images: Tensor, last: int | None = None) -> np.ndarray:
    """Seconds of stages 0..last of the network, each with its head, for images (N, ...) that all go on.

    The network runs as the model runs it, compiled or not; at each exit the head runs and the clock is read. No
    confidence, no comparison, no cut: that is what the cascade adds, and what an ideal one would not need.
    """
    last = len(model.exits) if last is None else last
    device, stamps = images.device, list[float]()

    def on_exit(index: int, boundary: Boundary) -> None:
        if boundary.answer is None:  # compiled stages include the heads
            model.heads[index](boundary.features)
        stamps.append(clock(device))
        if index == last:
            raise StopForward

    runner = model.runner(images, early_exit=True)
    try:
        stamps.append(clock(device))
        runner(images, on_exit, wanted=lambda index: True)
        stamps.append(clock(device))
    except StopForward:
        pass
    return np.diff(stamps)


def survivors(exits: Tensor, count: int) -> list[int]:
    """Samples that reach each of the M+1 = `count` stages, from the exits that answered them (N,)."""
    return [int((exits >= k).sum()) for k in range(count)]


def occurring(batches: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """(last stage, batch size) pairs to run, so that every stage is timed at every batch size that reaches it."""
    last: dict[int, int] = {}
    for sizes in batches:
        for stage, n in enumerate(sizes):
            if n:
                last[n] = max(stage, last.get(n, 0))
    return [(stage, n) for n, stage in sorted(last.items())]


def ideal_seconds(batches: Sequence[Sequence[int]], stages: dict[int, np.ndarray]) -> np.ndarray:
    """(repetitions,) seconds that the batches would take if only their stages cost anything.

    Args:
        batches: For each batch, the samples that reach each stage.
        stages: For each batch size, seconds (repetitions, stages) of the stages at that size.
    """
    total = np.zeros(len(next(iter(stages.values()))))
    for sizes in batches:
        for stage, n in enumerate(sizes):
            if n:
                total = total + stages[n][:, stage]
    return total


def machine(device: str | None = None) -> dict[str, Any]:
    """What the figures were measured on."""
    import timm

    used = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    return dict(device=device_name(used), torch=torch.__version__.split('+')[0], timm=timm.__version__)
