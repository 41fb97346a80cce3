"""What each part of a cascade costs by the clock."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backbone import input_size_of
from ..inference.request import unwrap
from ..inference.stopwatch import measure
from ..model import CascadeModel
from ..thresholds import Profile

__all__ = ['profile']


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
    result = Profile(**measure(model, model.as_images(images), repeats))
    model.dial.add_profile(result)
    return result
