"""Ways to run the backbone so that at every exit somebody may leave.

By default forward hooks cut the batch in flight. They stay on the backbone for good and do nothing until a Router runs
it, so the backbone used on its own is the plain timm model. What belongs to one run is kept per thread: several threads
may use one model. Where hooks cannot cut (`ExitPoint.cut` says so), and once the model is compiled, the backbone runs
as the stages that its exported graph was split into. Both ways are an `Engine`, and call the same thing at every exit.
"""
from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

from .backbone import ExitPoint, select_rows
from .flight import CascadeOutput, Flight, RoutingError, confidence

if TYPE_CHECKING:
    from .compiled import CompileOptions
    from .stages import StagedBackbone

__all__ = ['At', 'CascadeOutput', 'Crossing', 'Engine', 'Interrupted', 'Router', 'RoutingError', 'confidence']


class Interrupted(Exception):
    """Raised at an exit, ends the run: nobody goes on, and an empty batch would crash many models."""


class Crossing(NamedTuple):
    """All that goes from an exit to the rest of the backbone, for the samples in flight.

    Attributes:
        tap: What the exit's head reads.
        tensors: What crosses, often the tap alone.
        rows: Rows of each of them that belong to one sample; 0 where all samples share it.
    """
    tap: Tensor
    tensors: list[Tensor]
    rows: Sequence[int]

    def select(self, keep: Tensor) -> list[Tensor]:
        """What crosses for samples `keep` (indices)."""
        return [select_rows(t, keep, r) for t, r in zip(self.tensors, self.rows, strict=True)]


At = Callable[[int, Crossing], 'list[Tensor] | None']


class Engine(Protocol):
    """A way to run the backbone: images (N, C, H, W) to the logits of those who come to the end.

    `at(exit, crossing)` is called at every exit, in order; the tensors it returns go on in place of those that came,
    None leaves them as they are, and what it raises ends the run. With `start` = k > 0 the run begins behind exit k-1
    with `tensors`, as they crossed it before; `images` is then any one image.
    """

    def __call__(self, images: Tensor, at: At, start: int = 0, tensors: list[Tensor] | None = None) -> Tensor: ...


_thread = threading.local()


class _Run(NamedTuple):
    """One pass through the backbone with hooks at work."""
    router: Router
    at: At
    start: int
    tensors: list[Tensor] | None


class _ExitHook:
    def __init__(self, router: Router, index: int) -> None:
        self.router = router
        self.index = index

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        run = getattr(_thread, 'run', None)
        if run is None or run.router is not self.router or self.index < run.start - 1:
            return None
        # a walk through a lone tensor is a cost that single images feel
        leaves, spec = ([output], None) if isinstance(output, Tensor) else tree_flatten(output)
        places = [0] if spec is None else [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        if self.index == run.start - 1:
            tensors = run.tensors
        else:
            point, found = self.router.points[self.index], [leaves[i] for i in places]
            tensors = run.at(self.index, Crossing(found[point.item], found, point.rows))
        if tensors is None:
            return None
        for i, tensor in zip(places, tensors, strict=True):
            leaves[i] = tensor
        return leaves[0] if spec is None else tree_unflatten(leaves, spec)


MAX_EXPORTS = 4  # kinds of images (size, dtype, device) a Router keeps the exported backbone for
_export_lock = threading.Lock()


class Router:
    """Hooks on the backbone's exit modules, and the ways to run it.

    Args:
        backbone: The network.
        points: The exits, in the order the network runs them.

    Attributes:
        cuts: Whether hooks can cut the batch at every exit.
        options: How the exported stages are compiled; None for not at all.
    """

    def __init__(self, backbone: nn.Module, points: Sequence[ExitPoint]) -> None:
        self.points = tuple(points)
        self.cuts = not any(p.cut == 'export' for p in points)
        self.options: CompileOptions | None = None
        self.handles: list[RemovableHandle] = [
            backbone.get_submodule(p.module).register_forward_hook(_ExitHook(self, i)) for i, p in enumerate(points)]
        self._exported: dict[tuple, StagedBackbone] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_exported': {}}  # a copy exports its own backbone when it has to

    def detach(self) -> None:
        """Takes the hooks off the backbone again."""
        for handle in self.handles:
            handle.remove()

    def forget(self) -> None:
        """Drops what was exported: the backbone's structure, or what was compiled into it, has changed."""
        self._exported.clear()

    def engine(self, backbone: nn.Module, images: Tensor, anybody_leaves: bool = True) -> Engine:
        """How to run images of this kind."""
        compiled = self.options is not None and not backbone.training and not _needs_grad(backbone, images)
        if compiled or (anybody_leaves and not self.cuts):
            try:
                return partial(self._staged(backbone, images, compiled).run, backbone)
            except RoutingError as e:
                if not compiled:
                    raise
                self.give_up(str(e))
                return self.engine(backbone, images, anybody_leaves)
        return partial(self._hooked, backbone)

    def give_up(self, reason: str) -> None:
        """Goes back to what runs without a compiler, and says why."""
        self.options = None
        self.forget()
        warnings.warn(f'the cascade runs eagerly, without compiled stages: {reason}', stacklevel=4)

    def _hooked(
            self,
            backbone: Callable[[Tensor], Tensor],
            images: Tensor,
            at: At,
            start: int = 0,
            tensors: list[Tensor] | None = None,
    ) -> Tensor:
        outer = getattr(_thread, 'run', None)
        _thread.run = _Run(self, at, start, tensors)
        try:
            return backbone(images)
        finally:
            _thread.run = outer

    def collect(
            self,
            backbone: Callable[[Tensor], Tensor],
            images: Tensor,
            readers: Sequence[Callable[[Tensor], Tensor]],
    ) -> tuple[list[Tensor], Tensor]:
        """What each reader makes of its exit's tap, and the logits (or whatever `backbone` returns); nobody leaves."""
        read: list[Tensor | None] = [None] * len(self.points)

        def at(index: int, crossing: Crossing) -> None:
            read[index] = readers[index](crossing.tap)

        logits = self._hooked(backbone, images, at)
        missed = [i for i, r in enumerate(read) if r is None]
        if missed:
            raise RoutingError(f'the backbone did not run its exits {missed}; was it changed after it was wrapped?')
        return [r for r in read if r is not None], logits

    def route(
            self,
            backbone: nn.Module,
            images: Tensor,
            heads: Sequence[Callable[[Tensor], Tensor]],
            thresholds: Sequence[float],
            min_leave: float = 0.,
    ) -> CascadeOutput:
        """Runs the cascade: a sample leaves at the first exit whose confidence is at least its threshold.

        Args:
            backbone: The network that carries the hooks.
            images: (N, ...), N >= 1.
            heads: One an exit; not run where the threshold is infinite.
            thresholds: M numbers. A confidence that is not a number never passes.
            min_leave: See Flight.
        """
        flight = Flight(torch.arange(images.shape[0], device=images.device), heads, thresholds, min_leave)

        def at(index: int, crossing: Crossing) -> list[Tensor] | None:
            keep = flight.at_exit(index, crossing.tap)
            if keep is None:
                return None
            if not keep.numel():
                raise Interrupted
            return crossing.select(keep)

        engine = self.engine(backbone, images, not all(math.isinf(t) for t in thresholds))
        try:
            flight.at_end(engine(images, at))
        except Interrupted:
            pass
        return flight.output()

    def _staged(self, backbone: nn.Module, images: Tensor, compiled: bool) -> StagedBackbone:
        kind = images.device.type
        weight = next(backbone.parameters())
        forced = compiled and self.options is not None and self.options.channels_last
        layout = torch.channels_last if forced else _layout(images)
        key = (images.shape[1:], images.dtype, images.device, layout, weight.dtype, compiled,
               torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind))
        with _export_lock:
            staged = self._exported.pop(key, None)
            if staged is None or staged.stale(backbone):
                staged = self._export(backbone, images.contiguous(memory_format=layout), compiled)
            self._exported[key] = staged
            while len(self._exported) > MAX_EXPORTS:
                self._exported.pop(next(iter(self._exported)))
        return staged

    def _export(self, backbone: nn.Module, images: Tensor, compiled: bool) -> StagedBackbone:
        from .stages import StagedBackbone, mark  # torch.export is a costly import, and few backbones need it

        def at(index: int, crossing: Crossing) -> list[Tensor]:
            return [mark(t, index) if t is crossing.tap else t for t in crossing.tensors]

        def run(x: Tensor) -> Tensor:
            return self._hooked(backbone, x, at)

        what = 'exported to cut its batch at' if not compiled else 'exported and compiled between'
        try:
            with torch.inference_mode(False):
                if not compiled:
                    return StagedBackbone(backbone, run, images, len(self.points))
                from .compiled import CompiledBackbone

                assert self.options is not None
                return CompiledBackbone(backbone, run, images, len(self.points), self.options)
        except Exception as e:  # torch.export raises whatever the network's code makes it raise
            raise RoutingError(
                f'{type(backbone).__name__} has to be {what} {[p.module for p in self.points]}, and that failed: '
                f'{type(e).__name__}: {" ".join(str(e).split())[:300]}') from e


def _layout(images: Tensor) -> torch.memory_format:
    channels_last = not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _needs_grad(backbone: nn.Module, images: Tensor) -> bool:
    return torch.is_grad_enabled() and (images.requires_grad or any(p.requires_grad for p in backbone.parameters()))
