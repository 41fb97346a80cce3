"""Seconds that each part of a cascade takes on this machine."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor

from ..backbone import evaluating, input_size_of
from ..utils.clock import clock, device_name
from ..version import __version__
from .batch import ActiveBatch
from .engine import Boundary, Runner

__all__ = ['measure', 'measure_soon']

NEVER = 2.0  # a threshold that no confidence reaches: exits decide, and no sample exits early
SOON = 6.0  # seconds that a measurement takes that was not asked for, about
BATCHES = (64, 16, 4, 1)  # sizes for such a measurement
PASSES = 12  # forwards that it takes


@torch.no_grad()
def measure(model: Any, images: Tensor, repeats: int) -> dict[str, Any]:
    """The fields of a `thresholds.Profile`, as medians.

    The plain backbone takes turns with the stages. The model is measured where it is, in its dtype, compiled if it is.
    """
    with evaluating(model):
        stages, plain = model.runner(images, early_exit=True), model.runner(images, early_exit=False)
        parts, whole = [], []
        for i in range(-2, repeats):  # the first two warm both up
            order = (True, False) if i % 2 else (False, True)
            for in_parts in order:
                if in_parts:
                    seconds = _parts(model, stages, images)
                else:
                    began = clock(images.device)
                    plain(images, _pass)
                    total = clock(images.device) - began
            if i >= 0:
                parts.append(seconds)
                whole.append(total)
    medians = np.median(np.array(parts), axis=0) / len(images)
    count = len(model.exits)
    return dict(
        device=device_name(images.device),
        dtype=str(images.dtype).removeprefix('torch.'),
        batch_size=len(images),
        compiled=model.compiled,
        exits=tuple(p.module for p in model.exits),
        stage_seconds=tuple(medians[: count + 1].tolist()),
        head_seconds=tuple(medians[count + 1 : 2 * count + 1].tolist()),
        cut_seconds=tuple(medians[2 * count + 1 :].tolist()),
        backbone_seconds=float(np.median(whole)) / len(images),
        repeats=repeats,
        versions=dict(timm_cascade=__version__, timm=timm.__version__, torch=str(torch.__version__)),
    )


@torch.no_grad()
def measure_soon(model: Any) -> dict[str, Any]:
    """`measure` with random images, in batches and as often as takes some seconds."""
    size = input_size_of(model.backbone)
    one = model.as_images(torch.randn(1, *size))
    model.backbone(one)
    began = time.perf_counter()
    model.backbone(one)
    single = clock(one.device) - began
    batch = next((n for n in BATCHES if PASSES * n * single < SOON), 1)
    repeats = int(min(10, max(2, SOON / (2 * batch * single) - 2)))
    return measure(model, model.as_images(torch.randn(batch, *size)), repeats)


def _pass(index: int, boundary: Boundary) -> None:
    return None


def _parts(model: Any, runner: Runner, images: Tensor) -> list[float]:
    """Seconds of the M+1 stages, the M heads and the M cuts, one after the other."""
    stages, heads, cuts = _walk(model, runner, images, asked=True)
    if model.compiled:  # a stage includes its head, which costs what the stage takes longer with it
        alone, _, _ = _walk(model, runner, images, asked=False)
        heads = [h + max(0.0, a - b) for h, a, b in zip(heads, stages, alone, strict=False)]
        stages = alone
    return [*stages, *heads, *cuts]


def _walk(model: Any, runner: Runner, images: Tensor, asked: bool) -> tuple[list[float], list[float], list[float]]:
    """Seconds of the stages, of what is decided behind them, and of the cuts."""
    device, count = images.device, len(model.exits)
    began = 0.0
    stages, heads, cuts = [0.0] * (count + 1), [0.0] * count, [0.0] * count
    batch = ActiveBatch(torch.arange(len(images), device=device), list(model.heads), [NEVER] * count)
    keep = torch.arange(min(1, len(images) - 1), len(images), device=device)  # all but one, or the only one

    def on_exit(index: int, boundary: Boundary) -> None:
        nonlocal began
        reached = clock(device)
        batch.exit_confident(index, boundary.features, boundary.answer)
        decided = clock(device)
        boundary.select(keep)
        stages[index], heads[index], began = reached - began, decided - reached, clock(device)
        cuts[index] = began - decided

    began = clock(device)
    runner(images, on_exit, wanted=(lambda index: True) if asked else None)
    stages[count] = clock(device) - began
    return stages, heads, cuts
