"""Who leaves, who goes on: forward hooks at the exits that cut the batch in flight.

The hooks stay on the backbone for good and do nothing until a Router runs it, so the backbone used on its own is
the plain timm model. What belongs to one run is kept per thread: several threads may use one model. Where hooks cannot
cut (`ExitPoint.cut` says so), the backbone runs as the stages that its exported graph was split into.
"""
from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from .backbone import ExitPoint, cut, tap_of

if TYPE_CHECKING:
    from .stages import StagedBackbone

__all__ = ['CascadeOutput', 'Router', 'RoutingError', 'confidence']


class RoutingError(RuntimeError):
    """The backbone did not do with a cut batch what it must; nothing was answered."""


class CascadeOutput(NamedTuple):
    """What a cascade answers for a batch, in input order.

    Attributes:
        logits: (N, C)
        exit: (N,) int64, the exit that answered, M for the backbone's own classifier.
        confidence: (N,) float32, max softmax of `logits`.
    """
    logits: Tensor
    exit: Tensor
    confidence: Tensor


def confidence(logits: Tensor) -> Tensor:
    """Max softmax (N,) of logits (N, C), in float32 whatever the logits' dtype."""
    return logits.float().softmax(-1).amax(-1)


class _EverybodyLeft(Exception):
    """Ends the backbone's forward when no sample is left; an empty batch would crash many models."""


class _Run:
    """One pass of a batch through the backbone; `at` is called at every exit and may replace the output."""

    def __init__(self, router: Router, at: Callable[[int, Any], Any]) -> None:
        self.router = router
        self.at = at


_thread = threading.local()


class _ExitHook:
    def __init__(self, router: Router, index: int) -> None:
        self.router = router
        self.index = index

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        run = getattr(_thread, 'run', None)
        return run.at(self.index, output) if run is not None and run.router is self.router else None


MAX_EXPORTS = 4  # kinds of images (size, dtype, device) a Router keeps the exported backbone for
_export_lock = threading.Lock()


class Router:
    """Hooks on the backbone's exit modules, and the ways to run it with them.

    Args:
        backbone: The network.
        points: The exits, in the order the network runs them.
    """

    def __init__(self, backbone: nn.Module, points: Sequence[ExitPoint]) -> None:
        self.points = tuple(points)
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
        """Drops what was exported: the backbone's structure has changed."""
        self._exported.clear()

    def _run(
            self, backbone: Callable[[Tensor], Tensor], images: Tensor, at: Callable[[int, Any], Any]) -> Tensor:
        outer = getattr(_thread, 'run', None)
        _thread.run = _Run(self, at)
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

        def at(index: int, output: Any) -> None:
            read[index] = readers[index](tap_of(output, self.points[index]))

        logits = self._run(backbone, images, at)
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
    ) -> CascadeOutput:
        """Runs the cascade: a sample leaves at the first exit whose confidence is at least its threshold.

        Args:
            backbone: The network that carries the hooks.
            images: (N, ...), N >= 1.
            heads: One a exit; not run where the threshold is infinite.
            thresholds: M numbers. A confidence that is not a number never passes.
        """
        alive = torch.arange(len(images), device=images.device)
        answers: list[tuple[Tensor, Tensor, Tensor, int]] = []  # who, logits, confidence, exit

        def leave(index: int, tap: Tensor) -> Tensor | None:
            nonlocal alive
            if math.isinf(thresholds[index]):
                return None
            if len(tap) != len(alive):
                raise RoutingError(f'{len(alive)} samples came to exit {index}, but its tap has {len(tap)} rows.')
            logits = heads[index](tap)
            sure = confidence(logits)
            leaves = sure >= thresholds[index]
            gone = leaves.nonzero().squeeze(1)  # the one synchronisation of this exit
            if not len(gone):
                return None
            answers.append((alive[gone], logits[gone], sure[gone], index))
            if len(gone) == len(alive):
                raise _EverybodyLeft
            # the sizes are known by now, so sorting finds those who stay without asking the device again
            keep = leaves.to(torch.uint8).argsort(stable=True)[:len(alive) - len(gone)]
            alive = alive[keep]
            return keep

        def at(index: int, output: Any) -> Any:
            keep = leave(index, tap_of(output, self.points[index]))
            return None if keep is None else cut(output, keep, self.points[index])

        somebody_may_leave = not all(math.isinf(t) for t in thresholds)
        try:
            if somebody_may_leave and any(p.cut == 'export' for p in self.points):
                logits = self._run_exported(backbone, images, leave)
            else:
                logits = self._run(backbone, images, at)
            if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(alive):
                found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise RoutingError(f'{len(alive)} samples went to the end, but the backbone returned {found}.')
            answers.append((alive, logits, confidence(logits), len(self.points)))
        except _EverybodyLeft:
            pass
        return _in_input_order(answers)

    def _run_exported(
            self, backbone: nn.Module, images: Tensor, leave: Callable[[int, Tensor], Tensor | None]) -> Tensor:
        channels_last = not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        kind = images.device.type
        weight = next(backbone.parameters())
        key = (images.shape[1:], images.dtype, images.device, images.stride()[1:], weight.dtype,
               torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind))
        with _export_lock:
            staged = self._exported.pop(key, None) or self._export(backbone, images)
            self._exported[key] = staged
            while len(self._exported) > MAX_EXPORTS:
                self._exported.pop(next(iter(self._exported)))
        return staged.run(backbone, images, leave)

    def _export(self, backbone: nn.Module, images: Tensor) -> StagedBackbone:
        from .stages import StagedBackbone, mark  # torch.export is a costly import, and few backbones need it

        def at(index: int, output: Any) -> Any:
            tap = tap_of(output, self.points[index])
            return tree_map(lambda t: mark(t, index) if t is tap else t, output)

        try:
            return StagedBackbone(backbone, lambda x: self._run(backbone, x, at), images, len(self.points))
        except Exception as e:  # torch.export raises whatever the network's code makes it raise
            raise RoutingError(
                f'{type(backbone).__name__} has to be exported to cut its batch at '
                f'{[p.module for p in self.points]}, and torch.export failed: {str(e).splitlines()[0]}') from e


def _in_input_order(answers: list[tuple[Tensor, Tensor, Tensor, int]]) -> CascadeOutput:
    who = torch.cat([a[0] for a in answers])
    order = torch.empty_like(who)
    order[who] = torch.arange(len(who), device=who.device)
    exits = torch.cat([torch.full_like(w, index) for w, _, _, index in answers])
    return CascadeOutput(
        torch.cat([a[1] for a in answers])[order], exits[order], torch.cat([a[2] for a in answers])[order])
