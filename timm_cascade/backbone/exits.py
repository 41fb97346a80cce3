"""Where exits may sit in a timm model, what their taps look like and what the network costs up to them.

Everything is read off forward passes on the meta device: nothing is computed, no weight is touched or copied.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.models._input import get_model_input_config
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

__all__ = ['ExitError', 'ExitPoint', 'backbone_macs', 'candidates', 'cut', 'resolve_exits', 'tap_of']

PROBE_BATCH = 4  # images in a meta pass; a cut keeps PROBE_KEEP of them
PROBE_KEEP = 2


class ExitError(ValueError):
    """Exits that this backbone cannot have; the message lists those that it can."""


@dataclass(frozen=True)
class ExitPoint:
    """A place in the backbone where samples may leave.

    Attributes:
        module: Name of the backbone module whose output is the tap.
        layout: Order of the tap's dimensions: NCHW, NHWC or NLC.
        channels: Size of its channel dimension.
        size: Height and width of its grid.
        prefix_tokens: Tokens before the grid's (class token, registers), NLC only.
        macs: Multiply-accumulates of the backbone for one image up to and with this module, no heads.
        total: The same for the whole backbone.
    """
    module: str
    layout: str
    channels: int
    size: tuple[int, int]
    prefix_tokens: int
    macs: int
    total: int

    @property
    def fraction(self) -> float:
        """Share of the backbone's cost that is spent up to here."""
        return self.macs / self.total if self.total else 0.

    def __str__(self) -> str:
        return f'{self.module} ({self.fraction:.0%})'


def tap_of(output: Any) -> Tensor:
    """The tensor that a head reads from a module's output: the output, or the first tensor in it."""
    return output if isinstance(output, Tensor) else next(t for t in tree_leaves(output) if isinstance(t, Tensor))


def cut(output: Any, keep: Tensor) -> Any:
    """Rows `keep` (indices) of every tensor in a module's output."""
    return tree_map(lambda t: t[keep] if isinstance(t, Tensor) else t, output)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _meta_pass(model: nn.Module, input_size: tuple[int, ...], hooks: dict[str, Callable]) -> tuple[Any, int]:
    """Runs `model` on PROBE_BATCH meta images with forward hooks; its output and its MACs for one image.

    A hook is called as hook(macs of one image so far, output); what it returns, if not None, replaces the output.
    """
    def meta(tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.empty_like(t, device='meta') for name, t in tensors}

    counter = FlopCounterMode(display=False)

    def macs() -> int:
        return counter.get_total_flops() // 2 // PROBE_BATCH

    def registered(hook: Callable) -> Callable:
        return lambda module, args, output: hook(macs(), output)

    handles = [model.get_submodule(name).register_forward_hook(registered(h)) for name, h in hooks.items()]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    images = torch.empty(PROBE_BATCH, *input_size, device='meta', dtype=dtype)
    try:
        with _eval_mode(model), torch.no_grad(), counter:
            state = {**meta(model.named_parameters()), **meta(model.named_buffers())}
            output = torch.func.functional_call(model, state, (images,))
        return output, macs()
    finally:
        for handle in handles:
            handle.remove()


def _input_size(backbone: nn.Module) -> tuple[int, ...]:
    return tuple(get_model_input_config(backbone)['input_size'])


def backbone_macs(model: nn.Module, input_size: tuple[int, ...]) -> int:
    """MACs of one forward pass for one image (or one tap) of `input_size`; norms and activations count 0."""
    return _meta_pass(model, input_size, {})[1]


def _block_names(backbone: nn.Module) -> list[str]:
    """feature_info modules and the elements of block lists, in the order the model holds them."""
    names = {info['module'] for info in getattr(backbone, 'feature_info', None) or [] if info.get('module')}
    modules = dict(backbone.named_modules())
    for name, module in modules.items():
        if isinstance(module, (nn.Sequential, nn.ModuleList)):
            # a list of layers without children of their own is the inside of a block, not a list of blocks
            names.update(f'{name}.{child}'.lstrip('.') for child, m in module.named_children()
                         if next(m.children(), None) is not None)
    return [name for name in modules if name in names]


def candidates(backbone: nn.Module) -> list[ExitPoint]:
    """Every place where the backbone could have an exit, cheapest first; whether it can be cut is probed later."""
    seen: dict[str, list[tuple[int, Tensor]]] = {}

    def record(name: str) -> Callable:
        def hook(macs: int, output: Any) -> None:
            if any(isinstance(t, Tensor) for t in tree_leaves(output)):
                seen.setdefault(name, []).append((macs, tap_of(output)))
        return hook

    _, total = _meta_pass(backbone, _input_size(backbone), {name: record(name) for name in _block_names(backbone)})
    points: dict[tuple, ExitPoint] = {}
    for name, calls in seen.items():
        if len(calls) != 1 or calls[0][1].shape[:1] != (PROBE_BATCH,) or not 0 < calls[0][0] < total:
            continue
        macs, tap = calls[0]
        layout = _layout(backbone, tuple(tap.shape))
        if layout is not None:
            # the last block of a stage and the stage end at the same place: keep the shorter name
            key = (macs, tuple(tap.shape))
            if key not in points or len(name) < len(points[key].module):
                points[key] = ExitPoint(name, **layout, macs=macs, total=total)
    return sorted(points.values(), key=lambda p: p.macs)


def _layout(backbone: nn.Module, shape: tuple[int, ...]) -> dict[str, Any] | None:
    if len(shape) == 4:
        _, a, b, c = shape
        square_first, square_last = a == b, b == c
        nhwc = square_first if square_first != square_last else getattr(backbone, 'output_fmt', 'NCHW') == 'NHWC'
        if nhwc:
            return dict(layout='NHWC', channels=c, size=(a, b), prefix_tokens=0)
        return dict(layout='NCHW', channels=a, size=(b, c), prefix_tokens=0)
    if len(shape) == 3:
        _, tokens, channels = shape
        prefix = getattr(backbone, 'num_prefix_tokens', 0)
        side = math.isqrt(max(tokens - prefix, 0))
        size = (side, side) if side and side * side == tokens - prefix else (1, tokens - prefix)
        return dict(layout='NLC', channels=channels, size=size, prefix_tokens=prefix)
    return None


def _can_cut(backbone: nn.Module, point: ExitPoint) -> bool:
    """Whether the backbone, its batch cut at this module, ends with as many rows as were kept."""
    keep = torch.empty(PROBE_KEEP, dtype=torch.long, device='meta')
    try:
        output, _ = _meta_pass(backbone, _input_size(backbone), {point.module: lambda macs, out: cut(out, keep)})
    except Exception:  # whatever a model raises when its batch shrinks on the way, it cannot be cut here
        return False
    return isinstance(output, Tensor) and output.shape[0] == PROBE_KEEP


def resolve_exits(backbone: nn.Module, exits: int | Sequence[float] | Sequence[str]) -> list[ExitPoint]:
    """The exit points that `exits` asks for, in order of cost.

    Args:
        backbone: A timm classifier.
        exits: How many (spread evenly over the cost), their cost fractions (each in 0..1), or module names.

    Raises:
        ExitError: No such module, a fraction outside 0..1, or a place where the backbone cannot be cut.
    """
    points = candidates(backbone)
    listing = ', '.join(map(str, points))
    if isinstance(exits, str):
        exits = [exits]
    if not isinstance(exits, int) and any(isinstance(e, str) for e in exits):
        by_name = {p.module: p for p in points}
        unknown = [e for e in exits if e not in by_name]
        if unknown:
            raise ExitError(f'no exit can sit at {unknown}; choose from (module, share of the cost): {listing}')
        if len(set(exits)) < len(exits):
            raise ExitError(f'exits {list(exits)} names a module twice; name each once.')
        chosen = sorted((by_name[str(e)] for e in exits), key=lambda p: p.macs)
        wrong = [p.module for p in chosen if not _can_cut(backbone, p)]
        if wrong:
            raise ExitError(f'the batch cannot be cut at {wrong} (inside a residual branch, for instance); '
                            f'choose others from: {listing}')
        return chosen
    if isinstance(exits, int):
        if exits < 1:
            raise ExitError(f'exits={exits}: a cascade has at least one exit.')
        exits = [(i + 1) / (exits + 1) for i in range(exits)]
    if not len(exits) or any(not 0 < float(f) < 1 for f in exits):
        raise ExitError(f'exits={list(exits)}: cost fractions lie strictly between 0 and 1.')
    picked: set[ExitPoint] = set()
    for fraction in sorted(float(f) for f in exits):
        nearest = sorted(points, key=lambda p: abs(p.fraction - fraction))
        point = next((p for p in nearest if p not in picked and _can_cut(backbone, p)), None)
        if point is None:
            raise ExitError(f'{len(exits)} exits asked for, {len(picked)} found; places seen: {listing}')
        picked.add(point)
    return sorted(picked, key=lambda p: p.macs)
