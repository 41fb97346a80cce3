"""Where exits may sit in a timm model, what their features look like and what the network costs up to them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import ExitError
from ..utils.timm_models import input_size_of
from .layouts import find_layout
from .probe import PROBE_BATCH, check_classifier, meta_pass
from .rows import select_rows

__all__ = ['ExitPoint', 'candidates', 'cut', 'features_of', 'input_point', 'pre_logits_of', 'resolve_exits']

# an exit that hooks can cut is preferred to one that needs the exported graph, unless its share of the cost is
# farther from the requested one by this much
EXPORT_PENALTY = 0.1
DEFAULT_EXITS = 5  # where nothing is asked for, or fewer where the backbone has fewer places
# where an exit can pay: not before a stem has done its work, nor when hardly anything is left to save; and not close
# behind another. Shares of the cost.
FIRST, LAST, APART = 0.05, 0.95, 0.04
# exits stand closer together where the network is cheap, since what leaves there saves the most: shares of an even
# spread are raised to this power. The ablation has a row for an even spread.
EARLIER = 1.3


@dataclass(frozen=True)
class ExitPoint:
    """A place in the backbone where samples may exit.

    Attributes:
        module: Name of the backbone module whose output the exit reads.
        layout: Order of the features' dimensions: NCHW, NHWC or NLC.
        channels: Size of its channel dimension.
        size: Height and width of its grid.
        prefix_tokens: Tokens in front of the grid's (class token, registers), NLC only.
        macs: Multiply-accumulates of the backbone for one image up to and including this module, without heads.
        total: The same for the whole backbone.
        cut: How the batch shrinks here: `hook` (inside the module's output), `export` (the backbone is exported and
            split here, because its own code keeps the full batch in other places), or `input` (the features are the
            images, before the backbone runs; `module` is then the name of a front).
        item: Index of the features among the tensors that the module returns.
        rows: Rows of each returned tensor that belong to one sample; 0 for a tensor that all samples share.
    """

    module: str
    layout: str
    channels: int
    size: tuple[int, int]
    prefix_tokens: int
    macs: int
    total: int
    cut: str = 'hook'
    item: int = 0
    rows: tuple[int, ...] = (1,)

    @property
    def fraction(self) -> float:
        """Share of the backbone's cost that is spent up to here."""
        return self.macs / self.total if self.total else 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample's features."""
        (h, w), c = self.size, self.channels
        return {'NCHW': (c, h, w), 'NHWC': (h, w, c), 'NLC': (self.prefix_tokens + h * w, c)}[self.layout]

    def __str__(self) -> str:
        return f'{self.module} ({self.fraction:.0%})'


def _tensors(output: Any) -> list[Tensor]:
    return [t for t in tree_leaves(output) if isinstance(t, Tensor)]


def features_of(output: Any, point: ExitPoint) -> Tensor:
    """The tensor that a head reads from a module's output."""
    return output if isinstance(output, Tensor) else _tensors(output)[point.item]


def cut(output: Any, keep: Tensor, point: ExitPoint) -> Any:
    """A module's output for the samples `keep` (indices) alone; tensors that all samples share stay as they are."""
    rows = iter(point.rows)
    return tree_map(lambda t: select_rows(t, keep, next(rows)) if isinstance(t, Tensor) else t, output)


def input_point(backbone: nn.Module, name: str, total: int | None = None) -> ExitPoint:
    """The place in front of the backbone, where the features are the images and nothing of it has run.

    Args:
        backbone: A timm classifier.
        name: What tables and messages call it.
        total: MACs of the backbone, where they are known.

    Raises:
        BackboneError: The model does not classify.
    """
    channels, height, width = input_size_of(backbone)
    if total is None:
        output, total = meta_pass(backbone, (channels, height, width), {})
        check_classifier(backbone, output)
    return ExitPoint(name, 'NCHW', channels, (height, width), 0, macs=0, total=total, cut='input')


def pre_logits_of(backbone: Any, images: Tensor) -> Tensor:
    """(N, head_hidden_size), what the backbone's classifier reads."""
    return backbone.forward_head(backbone.forward_features(images), pre_logits=True)


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.Sequential, nn.ModuleList))


def _block_names(backbone: nn.Module) -> list[str]:
    """feature_info modules, the elements of block lists and numbered children, in the order the model holds them."""
    modules = dict(backbone.named_modules())
    features = {info.get('module') for info in getattr(backbone, 'feature_info', None) or []}
    names = {name for name in features if name in modules}
    for name, module in modules.items():
        if _is_list(module):
            # a list of layers without children of their own is the inside of a block, not a list of blocks
            names.update(
                f'{name}.{child}'.lstrip('.')
                for child, m in module.named_children()
                if _has_children(m) and re.search(r'\d', child)
            )
    # block1, block2, ...; cell_0, cell_1, ...; Mixed_5b, Mixed_5c, ...
    series: dict[str, list[str]] = {}
    for child, m in backbone.named_children():
        stem = re.sub(r'\d+[a-z]?$', '', child)
        if stem != child and _has_children(m):
            series.setdefault(stem, []).append(child)
    names.update(child for children in series.values() if len(children) > 1 for child in children)
    # stems and single layers are poor places: used only in networks that have nothing else (VGG)
    blocks = {
        n
        for n in names
        if _has_children(modules[n]) and not re.match(r'stem|patch_embed|(conv|bn|norm|act)_?1|pos_', n)
    }
    names = blocks if len(blocks) > 3 else names
    return [name for name in modules if name in names and name]


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def candidates(backbone: nn.Module) -> list[ExitPoint]:
    """Every place where the backbone could have an exit, cheapest first; whether it can be cut is probed later.

    Raises:
        BackboneError: The model does not return logits.
    """
    return _distinct(_places(backbone))


def _distinct(places: Sequence[ExitPoint]) -> list[ExitPoint]:
    # the last block of a stage and the stage itself end at the same place: the shorter name is kept
    points: dict[tuple, ExitPoint] = {}
    for p in places:
        key = (p.macs, p.shape)
        if key not in points or len(p.module) < len(points[key].module):
            points[key] = p
    return sorted(points.values(), key=lambda p: p.macs)


def _places(backbone: nn.Module) -> list[ExitPoint]:
    seen: dict[str, list[tuple[int, list[torch.Size]]]] = {}

    def record(name: str) -> Callable:
        def hook(macs: int, output: Any) -> None:
            seen.setdefault(name, []).append((macs, [t.shape for t in _tensors(output)]))

        return hook

    input_size = input_size_of(backbone)
    output, total = meta_pass(backbone, input_size, {name: record(name) for name in _block_names(backbone)})
    check_classifier(backbone, output)
    places = []
    for name, calls in seen.items():
        macs, shapes = calls[0]
        if len(calls) != 1 or not 0 < macs < total:
            continue
        rows = tuple(s[0] // PROBE_BATCH if s and s[0] % PROBE_BATCH == 0 else 0 for s in shapes)
        layouts = {
            i: layout
            for i, (s, r) in enumerate(zip(shapes, rows, strict=True))
            if r == 1
            if (layout := find_layout(backbone, tuple(s[1:]), input_size)) is not None
        }
        if not layouts:
            continue
        item = max(
            layouts, key=lambda i: (layouts[i]['channels'], i)
        )  # of several scales the one with the most channels
        places.append(ExitPoint(name, **layouts[item], macs=macs, total=total, item=item, rows=rows))
    return places


def _can_shrink(backbone: nn.Module, points: Sequence[ExitPoint], exiting: int) -> bool:
    """Whether the backbone returns the remaining samples when `exiting` of them exit at each of these points."""
    reached = [PROBE_BATCH]

    def drop(point: ExitPoint) -> Callable:
        def hook(macs: int, output: Any) -> Any:
            if len(features_of(output, point)) != reached[-1]:
                raise ValueError('the features do not have one row per sample')
            reached.append(reached[-1] - exiting)
            return cut(output, torch.empty(reached[-1], dtype=torch.long, device='meta'), point)

        return hook

    try:
        output, _ = meta_pass(backbone, input_size_of(backbone), {p.module: drop(p) for p in points}, count=False)
    except Exception:  # a model may raise anything when its batch shrinks; then it cannot be cut here
        return False
    return isinstance(output, Tensor) and len(output) == reached[-1] == PROBE_BATCH - exiting * len(points)


def _in_sequence(backbone: nn.Module, points: Sequence[ExitPoint]) -> bool:
    step = PROBE_BATCH - 2  # with more exits than images, they are tried in groups
    return all(_can_shrink(backbone, points[i : i + step], 1) for i in range(0, len(points), step))


def _kind(name: str) -> str:
    """stage4.0.branches.1.2 is of the kind stage4.#.branches.#.#; blocks.3 of the kind blocks.#"""
    match = re.match(r'[^.\d]*(\.[^.\d]+)*\.?\d+\.', name)
    start = match.end() if match else 0
    return name[:start] + re.sub(r'\d+', '#', name[start:])


class _Cuts:
    """How the batch can be cut at each place of a backbone; each place is tried once, when it is asked for."""

    def __init__(self, backbone: nn.Module, points: Sequence[ExitPoint]) -> None:
        self.backbone = backbone
        self.points = points
        self.known: dict[str, str | None] = {}
        self.failed: Counter[str] = Counter()

    def at(self, point: ExitPoint) -> str | None:
        """`hook`, `export`, or None: inside a block, where something else of it is still to be added."""
        name = point.module
        if name not in self.known:
            inside = any(
                name.startswith(f'{p.module}.') and not _is_list(self.backbone.get_submodule(p.module))
                for p in self.points
            )
            # once two places of a kind could not be cut, such as the branches of a block, the others are not tried
            kind = re.sub(r'\d+', '#', name) if inside else _kind(name)
            if self.failed[kind] < 2 and _can_shrink(self.backbone, [point], 7):
                self.known[name] = 'hook'
            else:
                self.failed[kind] += 1
                self.known[name] = None if inside else 'export'
        return self.known[name]

    def listing(self) -> str:
        return ', '.join(str(p) for p in self.points if self.at(p))


def resolve_exits(backbone: nn.Module, exits: int | Sequence[float] | Sequence[str] | None = None) -> list[ExitPoint]:
    """The exit points described by `exits`, in order of cost.

    Args:
        backbone: A timm classifier.
        exits: Their number (spread over the cost, closer together in its first half), their cost fractions (each in
            0..1), or module names. None for five, or fewer where the backbone has fewer places between 5 and 95 % of
            its cost, 4 % apart.

    Example:
        >>> [str(point) for point in resolve_exits(timm.create_model('resnet18'))]
        ['layer1.0 (19%)', 'layer1 (32%)', 'layer2.0 (42%)', 'layer2 (55%)', 'layer3 (77%)']

    Raises:
        BackboneError: The model does not classify.
        ExitError: No such module, a fraction outside 0..1, or a place where the backbone cannot be cut.
    """
    places = _places(backbone)
    points = _distinct(places)
    cuts = _Cuts(backbone, points)
    if exits is None:
        return _by_default(points, cuts)
    if isinstance(exits, str):
        exits = [exits]
    if not isinstance(exits, int) and any(isinstance(e, str) for e in exits):
        return _by_name([str(e) for e in exits], places, cuts)
    if isinstance(exits, int):
        if exits < 1:
            raise ExitError(f'exits={exits}: expected at least one exit.')
        paying = _paying(points)
        return _by_fraction(_spread(exits), paying if len(paying) >= exits else points, cuts)
    fractions = sorted(float(f) for f in exits)
    if not fractions or any(not 0 < f < 1 for f in fractions):
        raise ExitError(f'exits={fractions}: cost fractions lie strictly between 0 and 1.')
    return _by_fraction(fractions, points, cuts)


def _spread(count: int) -> list[float]:
    return [((i + 1) / (count + 1)) ** EARLIER for i in range(count)]


def _paying(points: Sequence[ExitPoint]) -> list[ExitPoint]:
    return [p for p in points if FIRST <= p.fraction <= LAST]


def _by_default(points: Sequence[ExitPoint], cuts: _Cuts) -> list[ExitPoint]:
    """Up to DEFAULT_EXITS where they can pay; at least one, wherever it can be."""
    places = _paying(points)
    picked: list[ExitPoint] = []
    for fraction in _spread(DEFAULT_EXITS):
        apart = [p for p in places if all(abs(p.fraction - other.fraction) >= APART for other in picked)]
        picked.extend(sorted(apart, key=lambda p: abs(p.fraction - fraction))[:1])
    for count in range(len(picked), 0, -1):
        chosen = [p.fraction for p in picked] if count == len(picked) else _spread(count)
        try:
            return _by_fraction(sorted(chosen), places, cuts)
        except ExitError:  # some of the places are inside residual branches
            continue
    return _by_fraction(_spread(1), points, cuts)


def _by_name(names: list[str], points: Sequence[ExitPoint], cuts: _Cuts) -> list[ExitPoint]:
    by_name = {p.module: p for p in points}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise ExitError(f'no exit can sit at {unknown}. Choose from (module, share of the cost): {cuts.listing()}')
    if len(set(names)) < len(names):
        raise ExitError(f'exits {names} name a module twice; name each once.')
    chosen = sorted((by_name[name] for name in names), key=lambda p: p.macs)
    if _in_sequence(cuts.backbone, chosen):
        return chosen
    wrong = [p.module for p in chosen if cuts.at(p) is None]
    if wrong:
        raise ExitError(
            f'the batch cannot be cut at {wrong}, inside a residual branch; choose others from (module, '
            f'share of the cost): {cuts.listing()}'
        )
    return _one_way(chosen, cuts)


def _by_fraction(fractions: list[float], points: Sequence[ExitPoint], cuts: _Cuts) -> list[ExitPoint]:
    # hooks can nearly always cut at the nearest places; one pass confirms it
    picked: list[ExitPoint] = []
    for fraction in fractions:
        picked.extend(sorted((p for p in points if p not in picked), key=lambda p: abs(p.fraction - fraction))[:1])
    picked.sort(key=lambda p: p.macs)
    if len(picked) == len(fractions) and _in_sequence(cuts.backbone, picked):
        return picked
    picked = []
    for fraction in fractions:

        def distance(p: ExitPoint, fraction: float = fraction) -> float:
            return abs(p.fraction - fraction)

        best: ExitPoint | None = None
        for p in sorted((p for p in points if p not in picked), key=distance):
            if best is not None and distance(p) > distance(best) + EXPORT_PENALTY:
                break
            way = cuts.at(p)
            if way == 'hook' or (way and best is None):
                best = p
            if way == 'hook':
                break
        if best is None:
            raise ExitError(
                f'{len(fractions)} exits were requested, {len(picked)} found. The backbone can have exits at: '
                f'{cuts.listing()}'
            )
        picked.append(best)
    return _one_way(sorted(picked, key=lambda p: p.macs), cuts)


def _one_way(points: list[ExitPoint], cuts: _Cuts) -> list[ExitPoint]:
    """All exits are cut in one way: where one needs the exported graph, all use it."""
    if all(cuts.at(p) == 'hook' for p in points) and _in_sequence(cuts.backbone, points):
        return points
    return [replace(p, cut='export') for p in points]
