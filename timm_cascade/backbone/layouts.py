"""The meaning of each dimension of an exit's features."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

__all__ = ['find_layout']

MAX_PREFIX = 16  # class and register tokens before the grid's
# models whose tokens are not in the order of the picture: Hiera's are sorted by mask unit
UNORDERED = ('Hiera',)


def find_layout(backbone: nn.Module, shape: tuple[int, ...], input_size: tuple[int, ...]) -> dict[str, Any] | None:
    """Layout, channels, size and prefix_tokens of one sample's features; None if they do not form a picture.

    A grid has the picture's aspect ratio, which tells it from the channels. Where several layouts fit, the model's own
    `output_fmt` and `num_prefix_tokens` decide.

    Args:
        backbone: The model.
        shape: Shape of the features without the batch dimension.
        input_size: (C, H, W) of the images.
    """
    _, height, width = input_size
    if len(shape) == 3:
        a, b, c = shape
        fits = {fmt: _same_aspect(*grid, height, width) for fmt, grid in (('NCHW', (b, c)), ('NHWC', (a, b)))}
        if fits['NHWC'] and (not fits['NCHW'] or getattr(backbone, 'output_fmt', 'NCHW') == 'NHWC'):
            return dict(layout='NHWC', channels=c, size=(a, b), prefix_tokens=0)
        if fits['NCHW']:
            return dict(layout='NCHW', channels=a, size=(b, c), prefix_tokens=0)
    elif len(shape) == 2:
        tokens, channels = shape
        own = getattr(backbone, 'num_prefix_tokens', 0) or 0
        if type(backbone).__name__ in UNORDERED:
            return dict(layout='NLC', channels=channels, size=(1, tokens - own), prefix_tokens=own)
        for prefix in dict.fromkeys((own, *range(MAX_PREFIX + 1))):
            size = _grid(tokens - prefix, height, width)
            if size is not None:
                return dict(layout='NLC', channels=channels, size=size, prefix_tokens=prefix)
        return dict(layout='NLC', channels=channels, size=(1, tokens - own), prefix_tokens=own)
    return None


def _same_aspect(h: int, w: int, height: int, width: int) -> bool:
    if h > height or w > width:
        return False
    return h == w if height == width else abs(w * height - h * width) <= max(height, width)


def _grid(tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """The grid of the picture's aspect that has this many tokens."""
    if tokens < 1:
        return None
    h = round(math.sqrt(tokens * height / width))
    for rows in (h, h - 1, h + 1):
        if rows > 0 and tokens % rows == 0 and _same_aspect(rows, tokens // rows, height, width):
            return rows, tokens // rows
    return None
