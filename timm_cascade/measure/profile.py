"""What each part of a cascade costs by the clock."""

from __future__ import annotations

import numpy as np
import timm
import torch
from torch import Tensor

from ..backbone import input_size_of
from ..inference.batch import ActiveBatch
from ..inference.engine import Boundary, Runner
from ..inference.request import unwrap
from ..model import CascadeModel
from ..thresholds import Profile
from ..utils.clock import clock, device_name
from ..version import __version__

__all__ = ['profile']

NEVER = 2.0  # a threshold that no confidence reaches: exits decide, and no sample exits early


@torch.no_grad()
def profile(model: CascadeModel, *, batch_size: int = 64, repeats: int = 20, images: Tensor | None = None) -> Profile:
    """Measures stages, heads and cuts where the model is, in its dtype, compiled if it is.

    The plain backbone takes turns with the stages, and the figures are medians. The result is also kept in
    `model.profiles`, where `model.set_max_drop(x, cost='time')` finds it, in place of one of the same kind.

    Args:
        batch_size: Images in a batch.
        repeats: Measurements.
        images: (N, C, H, W) to measure with; by default `batch_size` random ones of the size the model was made for.

    Raises:
        ValueError: Numbers out of range, or images that are not the backbone's.
    """
    if batch_size < 1 or repeats < 1:
        raise ValueError(f'batch_size={batch_size} and repeats={repeats}: expected at least 1 of each.')
    model = unwrap(model, CascadeModel)
    if images is None:
        images = torch.randn(batch_size, *input_size_of(model.backbone))
    images = model.as_images(images)
    training = model.training
    model.eval()
    try:
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
    finally:
        model.train(training)
    medians = np.median(np.array(parts), axis=0) / len(images)
    count = len(model.exits)
    result = Profile(
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
    model.profiles = [p for p in model.profiles if _kind(p) != _kind(result)] + [result]
    return result


def _pass(index: int, boundary: Boundary) -> None:
    return None


def _kind(p: Profile) -> tuple[str, str, int, bool]:
    return p.device, p.dtype, p.batch_size, p.compiled


def _parts(model: CascadeModel, runner: Runner, images: Tensor) -> list[float]:
    """Seconds of the M+1 stages, the M heads and the M cuts, one after the other."""
    stages, heads, cuts = _walk(model, runner, images, asked=True)
    if model.compiled:  # a stage includes its head, which costs what the stage takes longer with it
        alone, _, _ = _walk(model, runner, images, asked=False)
        heads = [h + max(0.0, a - b) for h, a, b in zip(heads, stages, alone, strict=False)]
        stages = alone
    return [*stages, *heads, *cuts]


def _walk(
    model: CascadeModel, runner: Runner, images: Tensor, asked: bool
) -> tuple[list[float], list[float], list[float]]:
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
    runner(images, on_exit, wanted=lambda index: asked)
    stages[count] = clock(device) - began
    return stages, heads, cuts
