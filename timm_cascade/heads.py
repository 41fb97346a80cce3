"""Exit heads: small classifiers of the features at an exit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ['MAX_SHARE', 'PRESETS', 'ExitHead', 'create_heads', 'head_configs', 'within_share']

# grid: side of the grid that features are pooled to; hidden: width of the hidden layer or 0; norm: BatchNorm first
PRESETS: dict[str, list[dict[str, Any]]] = {
    'linear': [dict(grid=1, hidden=0, norm=True)],
    'enhanced': [dict(grid=4, hidden=64, norm=True)],
    # Berestizshevsky & Even 2019, section 5: 4x4 at the first exit, 2x2 at the second, FC 64, FC C
    'paper': [dict(grid=4, hidden=64, norm=False), dict(grid=2, hidden=64, norm=False)],
}

MAX_SHARE = 0.01  # of the backbone's MACs, for all heads of the default preset together

HeadSpec = str | Mapping[str, Any] | Sequence[Mapping[str, Any]]


class ExitHead(nn.Module):
    """Pools features to a small grid, standardises them, and classifies them with one or two linear layers.

    `pool` has no parameters: with a frozen backbone its output can be computed once and stored.

    Args:
        channels: Channels of the features.
        size: Height and width of the features' grid.
        num_classes: Number of classes; with 0 the head has no classifier, and its exit stays closed.
        layout: NCHW, NHWC or NLC.
        prefix_tokens: Tokens in front of the grid's in NLC.
        grid: Side of the pooled grid, at most that of the features.
        hidden: Width of the hidden layer, 0 for a linear head.
        norm: Standardise the pooled features (BatchNorm1d) first.
    """

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        num_classes: int,
        layout: str = 'NCHW',
        prefix_tokens: int = 0,
        grid: int = 4,
        hidden: int = 64,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.size = size
        self.prefix_tokens = prefix_tokens
        self.grid = (min(grid, size[0]), min(grid, size[1]))
        self.in_features = channels * self.grid[0] * self.grid[1]
        self.norm = nn.BatchNorm1d(self.in_features) if norm else nn.Identity()
        self.hidden = nn.Sequential(nn.Linear(self.in_features, hidden), nn.ReLU()) if hidden else nn.Identity()
        self.fc = nn.Linear(hidden or self.in_features, num_classes) if num_classes else nn.Identity()

    def pool(self, features: Tensor) -> Tensor:
        """Features (N, ...) in this head's layout to (N, in_features)."""
        if self.layout == 'NHWC':
            features = features.permute(0, 3, 1, 2)
        elif self.layout == 'NLC':
            features = features[:, self.prefix_tokens :].transpose(1, 2)
            features = features.unflatten(2, (self._rows(features.shape[2]), -1))
        return F.adaptive_avg_pool2d(features, self.grid).flatten(1)

    def _rows(self, tokens: int) -> int:
        """Rows of the grid that the tokens form, for images of any size with the aspect ratio of `size`."""
        h, w = self.size
        return h if h == 1 or tokens == h * w else round(math.sqrt(tokens * h / w))

    def classify(self, pooled: Tensor) -> Tensor:
        """(N, in_features) to logits (N, num_classes)."""
        return self.fc(self.hidden(self.norm(pooled)))

    def forward(self, features: Tensor) -> Tensor:
        return self.classify(self.pool(features))


def head_configs(head: HeadSpec, count: int) -> list[dict[str, Any]]:
    """A dict of ExitHead's grid, hidden and norm for each of `count` exits.

    Args:
        head: Name of a preset, one dict for all exits, or a sequence of dicts, of which the last serves the remaining
            exits.

    Raises:
        ValueError: An unknown preset or key.
    """
    if isinstance(head, str):
        if head not in PRESETS:
            raise ValueError(f'head is {head!r}; expected one of {sorted(PRESETS)} or a dict of grid, hidden and norm.')
        configs: Sequence[Mapping[str, Any]] = PRESETS[head]
    else:
        configs = [head] if isinstance(head, Mapping) else head
    for config in configs:
        unknown = set(config) - {'grid', 'hidden', 'norm'}
        if unknown:
            raise ValueError(f'head has the keys {sorted(unknown)}; expected grid, hidden and norm.')
        if int(config.get('grid', 4)) < 1 or int(config.get('hidden', 64)) < 0:
            raise ValueError(f'head={dict(config)}: expected a grid of at least 1 and hidden of at least 0.')
    if isinstance(head, str):
        configs = configs[:count]
    if not 1 <= len(configs) <= count:
        raise ValueError(f'{len(configs)} head descriptions for {count} exits; expected one for all, or one per exit.')
    return [{**PRESETS['enhanced'][0], **configs[min(i, len(configs) - 1)]} for i in range(count)]


def within_share(configs: list[dict[str, Any]], points: Sequence[Any], num_classes: int) -> list[dict[str, Any]]:
    """Halves the hidden layers until all heads together cost at most MAX_SHARE of the backbone."""

    def macs(c: Mapping[str, Any], point: Any) -> int:
        grid = min(c['grid'], point.size[0]) * min(c['grid'], point.size[1])
        return c['hidden'] * (point.channels * grid + num_classes)

    while (
        configs
        and min(c['hidden'] for c in configs) > 1
        and (sum(map(macs, configs, points)) > MAX_SHARE * points[0].total)
    ):
        configs = [dict(c, hidden=c['hidden'] // 2) for c in configs]
    return configs


def create_heads(points: Sequence[Any], num_classes: int, configs: Sequence[Mapping[str, Any]]) -> nn.ModuleList:
    """A head for each exit point (its channels, size, layout and prefix_tokens)."""
    return nn.ModuleList(
        ExitHead(p.channels, p.size, num_classes, p.layout, p.prefix_tokens, **c)
        for p, c in zip(points, configs, strict=True)
    )
