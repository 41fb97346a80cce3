"""Exit heads: small classifiers of the features at an exit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .utils.snapshot import Snapshot, places_of

__all__ = ['MAX_SHARE', 'PRESETS', 'ExitHead', 'columns_of', 'create_heads', 'head_configs', 'scale_and_shift']

# what a description leaves out
DEFAULTS: dict[str, Any] = dict(grid=4, hidden=64, norm=True, mean=False, tokens=False, hidden_norm=False)
# None: as the number of classes, the features and the backbone's cost allow
PRESETS: dict[str, list[dict[str, Any]]] = {
    'linear': [dict(grid=1, hidden=0)],
    'enhanced': [dict(grid=None, hidden=None, mean=True, tokens=True)],
    # Berestizshevsky & Even 2019, section 5: 4x4 at the first exit, 2x2 at the second, FC 64, FC C; see _paper
    'paper': [dict(grid=4, hidden=64, norm=False), dict(grid=2, hidden=64, norm=False)],
}

MAX_SHARE = 0.01  # of the backbone's MACs, for all heads of the default preset together
NARROWEST, WIDEST = 64, 512  # hidden units of the default preset
NARROW_SHARE = 0.03  # of the MACs, what NARROWEST units may cost: fewer lose more than they save (evidence/ablation.md)
# features of the default preset's pooled grid: weights for more take longer to read than the stage to run (batch 1)
MAX_POOLED = 4096
GRIDS = 4, 2, 1
PAPER_FEATURES, PAPER_HIDDEN = 2048, 1024  # of the paper's heads for ImageNet
LEAST = dict(grid=1, hidden=0)

NORMS = (nn.BatchNorm1d, nn.SyncBatchNorm)
Grid = int | tuple[int, int]
HeadSpec = str | Mapping[str, Any] | Sequence[Mapping[str, Any]]
Layers = Sequence[tuple[Tensor, Tensor | None]]  # weight and bias of linear layers


class ExitHead(nn.Module):
    """Pools features to a few columns per channel, standardises these, and classifies with one or two linear layers.

    `pool` has no parameters: with a frozen backbone its output can be computed once and stored. In evaluation mode the
    norm is part of the first linear layer's weights, computed again when one of the tensors has changed, and where the
    cells of the grid are not of one size, pooling is a product with a matrix.

    Args:
        channels: Channels of the features.
        size: Height and width of the features' grid.
        num_classes: Number of classes; with 0 the head has no classifier, and its exit stays closed.
        layout: NCHW, NHWC or NLC.
        prefix_tokens: Tokens in front of the grid's in NLC.
        grid: Side of the pooled grid, or its rows and columns; at most those of the features.
        hidden: Width of the hidden layer, 0 for a linear head.
        norm: Standardise the pooled features (BatchNorm1d) first.
        mean: Read the mean over the whole grid beside the pooled grid.
        tokens: Read the prefix tokens (class token, registers) beside the pooled grid.
        hidden_norm: Standardise the hidden layer (BatchNorm1d) before its ReLU; it trains with the statistics of each
            batch, as is usual.

    Attributes:
        columns: What is read of each channel: the cells of the pooled grid row by row, the mean, the prefix tokens.
        in_features: Size of what `pool` returns, channels * columns: all columns of the first channel come first.
    """

    _watched: _Watched | None = None

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        num_classes: int,
        layout: str = 'NCHW',
        prefix_tokens: int = 0,
        grid: Grid = 4,
        hidden: int = 64,
        norm: bool = True,
        mean: bool = False,
        tokens: bool = False,
        hidden_norm: bool = False,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.size = size
        self.prefix_tokens = prefix_tokens
        self.grid, self.mean, self.tokens = _columns(size, prefix_tokens, grid, mean, tokens)
        self.columns = self.grid[0] * self.grid[1] + self.mean + self.tokens
        self.in_features = channels * self.columns
        self.norm = nn.BatchNorm1d(self.in_features) if norm else nn.Identity()
        between = [nn.BatchNorm1d(hidden)] if hidden and hidden_norm else []
        first = [nn.Linear(self.in_features, hidden), *between, nn.ReLU()] if hidden else []
        self.hidden = nn.Sequential(*first) if first else nn.Identity()
        self.fc = nn.Linear(hidden or self.in_features, num_classes) if num_classes else nn.Identity()

    def pool(self, features: Tensor) -> Tensor:
        """Features (N, ...) in this head's layout to (N, in_features)."""
        grid, tokens = self._split(features)
        beside = [grid.mean((2, 3))[:, None]] if self.mean else []
        beside = [part.transpose(1, 2) for part in (*beside, *tokens)]
        pooled = F.adaptive_avg_pool2d(grid, self.grid)
        return (torch.cat([pooled.flatten(2), *beside], 2) if beside else pooled).flatten(1)

    def answer(self, features: Tensor, form: Folded) -> Tensor:
        """Logits (N, num_classes) of features (N, ...), by what `inference_layers` returned.

        Where all cells of the pooled grid are of one size, the mean is that of the cells, and need not be computed.
        """
        nchw, even = self.layout == 'NCHW', self.is_even(self.size)
        positions = features.shape[2:] if nchw else features.shape[1:-1]
        if form.pooling is not None and positions == form.positions:
            pooled = form.pooling @ (features.flatten(2).transpose(1, 2) if nchw else features.flatten(1, -2))
        else:
            grid, tokens = self._split(features)
            even = self.is_even(grid.shape[2:])
            beside = tokens if even or not self.mean else [grid.mean((2, 3))[:, None], *tokens]
            # in channels-last features, and in tokens, this is how the cells lie in memory
            pooled = F.adaptive_avg_pool2d(grid, self.grid).flatten(2).transpose(1, 2)
            pooled = torch.cat([pooled, *beside], 1) if beside else pooled
        return _classify_with(form.without_mean if even else form.whole, pooled.flatten(1))

    def _split(self, features: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The grid (N, C, H, W), and the prefix tokens (N, tokens, C) if they are read."""
        if self.layout == 'NCHW':
            return features, []
        if self.layout == 'NHWC':
            return features.permute(0, 3, 1, 2), []
        grid = features[:, self.prefix_tokens :]
        grid = grid.unflatten(1, (self._rows(grid.shape[1]), -1)).permute(0, 3, 1, 2)
        return grid, [features[:, : self.prefix_tokens]] if self.tokens else []

    def is_even(self, size: Sequence[int]) -> bool:
        """Whether all cells of the pooled grid are of one size."""
        return size[0] % self.grid[0] == size[1] % self.grid[1] == 0

    def _rows(self, tokens: int) -> int:
        """Rows of the grid that the tokens form, for images of any size with the aspect ratio of `size`."""
        h, w = self.size
        return h if h == 1 or tokens == h * w else round(math.sqrt(tokens * h / w))

    def classify(self, pooled: Tensor) -> Tensor:
        """(N, in_features) to logits (N, num_classes)."""
        return self.fc(self.hidden(self.norm(pooled)))

    def inference_layers(self, inputs: Tensor | None = None) -> Folded | None:
        """What `answer` needs: the norm is in the first layer. None where the layers themselves must run.

        They must in training, in half precision (whose rounding the norm keeps small), and where a layer was replaced.
        """
        if self.training or torch.compiler.is_compiling() or (inputs is not None and inputs.is_meta):
            return None  # meta tensors are lent, to count MACs
        watched = self._watched
        if watched is not None and watched.snapshot.changed():
            watched = None
        if torch.is_grad_enabled() and (
            any(p.requires_grad for p in self.parameters()) if watched is None else watched.trainable
        ):
            self._watched = None  # a step may come next, and that of a fused optimizer leaves no trace in the tensors
            return None
        if watched is None:
            watched = self._watched = _watch(self)
        return watched.folded

    def train(self, mode: bool = True) -> ExitHead:
        self._watched = None  # an optimizer may have written in ways that leave no trace
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ExitHead:
        self._watched = None  # a new device or dtype leaves no trace in the parameters
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != '_watched'}

    def forward(self, features: Tensor) -> Tensor:
        form = self.inference_layers(features)
        return self.classify(self.pool(features)) if form is None else self.answer(features, form)


def _classify_with(layers: Layers, pooled: Tensor) -> Tensor:
    """Logits (N, num_classes) of pooled features, by the layers of a form for inference."""
    answer = F.linear(pooled, *layers[0])
    return answer if len(layers) == 1 else F.linear(answer.relu_(), *layers[1])


def _columns(
    size: Sequence[int], prefix_tokens: int, grid: Grid, mean: bool, tokens: bool
) -> tuple[tuple[int, int], bool, int]:
    """The pooled grid, whether the mean stands beside it, and how many prefix tokens do."""
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    pooled = (min(rows, size[0]), min(columns, size[1]))
    return pooled, mean and pooled != (1, 1), prefix_tokens * tokens


class Folded(NamedTuple):
    """A head for inference. The layers read columns before channels, unlike the head's own.

    Attributes:
        whole: The layers for all columns.
        without_mean: The layers for all columns but the mean.
        pooling: What features of the head's own size are multiplied with, by position; None where pooling is faster.
        positions: The shape of these features, but for samples and channels.
    """

    whole: Layers
    without_mean: Layers
    pooling: Tensor | None
    positions: tuple[int, ...]


class _Watched(NamedTuple):
    """A head's layers for inference, and when they were computed."""

    folded: Folded | None
    snapshot: Snapshot

    @property
    def trainable(self) -> bool:
        return any(t.requires_grad for t in self.snapshot.tensors)


def _watch(head: ExitHead) -> _Watched:
    tensors = [*head.parameters(), *head.buffers()]
    if any(t.is_inference() for t in tensors):  # these have no version: a change would not be noticed
        return _Watched(None, Snapshot([], places_of(head)))
    return _Watched(_fold(head), Snapshot(tensors, places_of(head)))


def scale_and_shift(norm: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What a batch norm in evaluation mode multiplies its input with, and what it adds then; both (C,)."""
    scale = (norm.running_var.to(dtype) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().to(dtype)
    shift = -norm.running_mean.to(dtype) * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().to(dtype)


@torch.inference_mode(False)
@torch.no_grad()
def _fold(head: ExitHead) -> Folded | None:
    norm: Any = head.norm
    hidden, fc = head.hidden, head.fc
    parts: list[Any] = [*hidden, fc] if isinstance(hidden, nn.Sequential) else [fc]
    between: Any = next((m for m in parts[1:2] if type(m) in NORMS), None)
    linear = [m for m in parts if m is not between]
    kinds, norms = [type(m) for m in linear], [m for m in (norm, between) if type(m) in NORMS]
    known = kinds in ([nn.Linear], [nn.Linear, nn.ReLU, nn.Linear]) and type(norm) in (nn.Identity, *NORMS)
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in (norm, hidden, *parts))
    single = all(p.dtype in (torch.float32, torch.float64) for p in head.parameters())
    if not known or hooked or not single or any(m.running_var is None for m in norms):
        return None
    layers: list[tuple[Tensor, Tensor | None]] = [(m.weight.detach(), m.bias) for m in linear[::2]]
    weight, bias = layers[0]
    if norm in norms:
        scale, shift = scale_and_shift(norm, weight.dtype)
        weight, bias = weight * scale, weight @ shift + (0.0 if bias is None else bias)
    if between is not None:
        scale, shift = scale_and_shift(between, weight.dtype)
        weight, bias = weight * scale[:, None], shift if bias is None else bias * scale + shift
    layers[0] = weight.unflatten(1, (-1, head.columns)).transpose(1, 2).flatten(1), bias
    (last, bias), even = layers[-1], head.is_even(head.size)
    if len(layers) == 2 and last.shape[0] > last.shape[1]:  # a processor multiplies one row faster by these columns
        layers[-1] = last.T.contiguous().T, bias
    pooling, tokens = None, (head.prefix_tokens + math.prod(head.size),)
    if not even or head.layout == 'NLC':
        pooling = columns_of(head, head.size, head.mean and not even).to(last)
    without_mean = _without_mean(head, layers) if head.mean else layers
    return Folded(layers, without_mean, pooling, tokens if head.layout == 'NLC' else tuple(head.size))


def _without_mean(head: ExitHead, layers: Layers) -> Layers:
    (weight, bias), *others = layers
    cells = head.grid[0] * head.grid[1]
    columns = weight.unflatten(1, (head.columns, -1))
    mean = columns[:, cells : cells + 1] / cells
    return [(torch.cat([columns[:, :cells] + mean, columns[:, cells + 1 :]], 1).flatten(1), bias), *others]


def columns_of(head: ExitHead, size: Sequence[int], mean: bool) -> Tensor:
    """(columns, prefix tokens and pixels) float64: what pooling multiplies features of this size with."""
    pooling = _averages(size, head.grid)
    if mean:
        pooling = torch.cat([pooling, _averages(size, (1, 1))])
    pooling = F.pad(pooling, (head.prefix_tokens, 0))
    return torch.cat([pooling, torch.eye(head.tokens, pooling.shape[1], dtype=pooling.dtype)])


def _averages(size: Sequence[int], grid: tuple[int, int]) -> Tensor:
    """(cells, pixels): what adaptive average pooling from `size` to `grid` multiplies an image's pixels with."""
    rows, columns = (
        F.adaptive_avg_pool1d(torch.eye(pixels, dtype=torch.float64), cells).T
        for pixels, cells in zip(size, grid, strict=True)
    )
    return torch.kron(rows, columns)


def head_configs(head: HeadSpec, points: Sequence[Any], num_classes: int) -> list[dict[str, Any]]:
    """A dict of ExitHead's grid, hidden, norm, mean, tokens and hidden_norm for each exit.

    Args:
        head: Name of a preset, one dict for all exits, or a sequence of dicts, of which the last serves the remaining
            exits. What a dict leaves out is as in DEFAULTS. hidden=None is as wide as the number of classes and
            MAX_SHARE of the backbone's MACs for all heads together allow, but NARROWEST where these cost at most
            NARROW_SHARE; grid=None is 4, or less where the pooled grid would have more than MAX_POOLED features.
            'paper' are the heads of Berestizshevsky & Even 2019 (arXiv 1805.10982): those for ImageNet (2,048 pooled
            features, BN, FC 1,024, BN, ReLU, FC) where all of them together cost at most MAX_SHARE of the backbone's
            MACs, or else those for CIFAR (FC 64, FC).
        points: The exits: their channels, size, prefix_tokens and total.
        num_classes: Number of classes.

    Raises:
        ValueError: An unknown preset or key, or a number out of range.

    Example:
        >>> head_configs(dict(grid=2), resolve_exits(backbone, 1), 10)
        [{'grid': 2, 'hidden': 64, 'norm': True, 'mean': False, 'tokens': False, 'hidden_norm': False}]
    """
    count = len(points)
    if isinstance(head, str):
        if head not in PRESETS:
            raise ValueError(f'head is {head!r}; expected one of {sorted(PRESETS)} or a dict of {", ".join(DEFAULTS)}.')
        configs: Sequence[Mapping[str, Any]] = (_paper(points, num_classes) if head == 'paper' else PRESETS[head])[
            :count
        ]
    else:
        configs = [head] if isinstance(head, Mapping) else head
    for config in configs:
        unknown = set(config) - set(DEFAULTS)
        if unknown:
            raise ValueError(f'head has the keys {sorted(unknown)}; expected {", ".join(DEFAULTS)}.')
        if any(config.get(key) is not None and _smallest(config[key]) < low for key, low in LEAST.items()):
            raise ValueError(
                f'head={dict(config)}: expected a grid of at least 1 (one number, or rows and columns) and hidden of '
                f'at least 0.'
            )
    if not 1 <= len(configs) <= count:
        raise ValueError(f'{len(configs)} head descriptions for {count} exits; expected one for all, or one per exit.')
    filled = [{**DEFAULTS, **configs[min(i, len(configs) - 1)]} for i in range(count)]
    for config, point in zip(filled, points, strict=True):
        if config['grid'] is None:
            fits = (g for g in GRIDS if point.channels * min(g, point.size[0]) * min(g, point.size[1]) <= MAX_POOLED)
            config['grid'] = next(fits, GRIDS[-1])
        elif not isinstance(config['grid'], int):
            config['grid'] = tuple(config['grid'])
    return _with_widths(filled, points, num_classes)


def _smallest(value: Any) -> int:
    """The smallest of a head's numbers; -1 for a grid that has not two sides."""
    if isinstance(value, (list, tuple)):
        return min(value) if len(value) == 2 else -1
    return int(value)


def _paper(points: Sequence[Any], num_classes: int) -> list[dict[str, Any]]:
    """The paper's heads for ImageNet where the backbone is so large that they cost next to nothing, or those for CIFAR.

    In front of the pooling the paper names BN and ReLU too; its code has them only where the network's blocks begin
    with them (github.com/AnonymousConferenceCode/Cascaded_Inference). Here the BN stands behind the pooling, through
    which it passes unchanged, so that pooled features can be stored; there is no ReLU but the network's own.
    """
    cost, large = 0, []
    for p in points:
        cells = max(1, PAPER_FEATURES // p.channels).bit_length() - 1  # 512 channels to 2x2, 1,024 to 1x2
        grid = (1 << cells // 2, 1 << cells - cells // 2)
        large.append(dict(grid=grid, hidden=PAPER_HIDDEN, norm=True, hidden_norm=True))
        (rows, columns), *_ = _columns(p.size, 0, grid, False, False)
        cost += (p.channels * rows * columns + num_classes) * PAPER_HIDDEN
    return large if cost <= MAX_SHARE * points[0].total else PRESETS['paper']


def _with_widths(configs: list[dict[str, Any]], points: Sequence[Any], num_classes: int) -> list[dict[str, Any]]:
    """Fills in the hidden layers whose width is not given: all are as wide as each other.

    As many units as there are classes lose nothing before the last layer, within NARROWEST and WIDEST. All heads
    together cost at most MAX_SHARE of the backbone; NARROWEST units may cost NARROW_SHARE.
    """
    open_ = [i for i, c in enumerate(configs) if c['hidden'] is None]
    if not open_:
        return configs
    cost = 0  # of one hidden unit in each of these heads
    for i in open_:
        c, p = configs[i], points[i]
        grid, mean, tokens = _columns(p.size, p.prefix_tokens, c['grid'], c['mean'], c['tokens'])
        cost += p.channels * (grid[0] * grid[1] + mean + tokens) + num_classes
    affordable, bare = (int(share * points[0].total / cost) for share in (MAX_SHARE, NARROW_SHARE))
    width = max(min(WIDEST, max(NARROWEST, num_classes), affordable), min(NARROWEST, bare))
    width = max(1, width - width % 8 if width > 8 else width)  # whole vectors of a processor
    return [dict(c, hidden=width) if i in open_ else c for i, c in enumerate(configs)]


def create_heads(points: Sequence[Any], num_classes: int, configs: Sequence[Mapping[str, Any]]) -> nn.ModuleList:
    """A head for each exit point (its channels, size, layout and prefix_tokens)."""
    return nn.ModuleList(
        ExitHead(p.channels, p.size, num_classes, p.layout, p.prefix_tokens, **c)
        for p, c in zip(points, configs, strict=True)
    )
