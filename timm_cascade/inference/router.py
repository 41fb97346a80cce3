"""Chooses how the backbone runs, and routes a batch through its exits.

By default forward hooks shrink the batch. Where hooks cannot (`ExitPoint.cut` says so), and once the model is compiled,
the backbone runs as the stages that its exported graph is split into.
"""

from __future__ import annotations

import logging
import math
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..backbone import ExitPoint
from ..errors import RoutingError
from .batch import ActiveBatch, CascadeOutput, OnAnswer, open_exits
from .engine import Boundary, Runner, StopForward
from .hooks import HookRunner
from .request import Thresholds

if TYPE_CHECKING:
    from .compiled import CompileOptions
    from .graph import StagedBackbone

__all__ = ['CompiledNetwork', 'Router']

_logger = logging.getLogger(__name__)
# images in a batch from which convolutional networks are faster compiled: docs/pages/how-to/save-time.md
COMPILE_PAYS = 32
MANY = 5000  # images in such batches, for which compiling is worth its time
MAX_EXPORTS = 4  # kinds of images (size, dtype, device) whose exported backbone is kept
_export_lock = threading.Lock()


class Router:
    """Runs one backbone, in one of several ways.

    Args:
        backbone: The network.
        points: Its exits, in the order in which the network runs them.

    Attributes:
        cuts: Whether hooks can shrink the batch at every exit.
        options: How the exported stages are compiled; None where they are not.
    """

    def __init__(self, backbone: nn.Module, points: Sequence[ExitPoint]) -> None:
        self.points = tuple(points)
        self.cuts = not any(p.cut == 'export' for p in points)
        self.options: CompileOptions | None = None
        convolutional = any(p.layout == 'NCHW' and p.cut != 'input' for p in points)
        self._until_advice = MANY if convolutional else 0  # images; 0 once it has been said
        self._hooks = HookRunner(backbone, points)
        self._exported: dict[tuple, StagedBackbone] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_exported': {}}  # a copy exports its own backbone when it needs to

    def attach(self, backbone: nn.Module) -> bool:
        """Makes sure that exits work after modules were replaced; returns whether any was."""
        try:
            changed = self._hooks.attach(backbone)
        except AttributeError as e:
            raise RoutingError(f'the backbone no longer has the modules of its exits: {e}. Wrap it again.') from e
        if changed:
            self.forget()
        return changed

    def compile(
        self, enabled: bool, backend: str, mode: str | None, channels_last: bool | None, choose: bool = True
    ) -> None:
        """See `CascadeModel.compile`."""
        from .compiled import CompileOptions  # torch.export and the compiler are costly imports

        if channels_last is None:
            inner = [p for p in self.points if p.cut != 'input'] or self.points
            channels_last = any(p.layout == 'NCHW' for p in inner)
        self.forget()
        self.options = CompileOptions(backend, mode, channels_last, choose=choose) if enabled else None

    def forget(self) -> None:
        """Drops the exported stages, because the backbone or the compile options have changed."""
        self._exported.clear()

    def runner(
        self, backbone: nn.Module, images: Tensor, heads: Sequence[Any], thresholds: Sequence[float], early_exit: bool
    ) -> Runner:
        """How to run images of this kind.

        Args:
            backbone: The network that carries the hooks.
            images: (N, C, H, W), an example.
            heads: One per exit, compiled with the stages.
            thresholds: M numbers; heads of exits that they close are compiled when they are asked.
            early_exit: Whether samples may exit early; if not, hooks work with every backbone.
        """
        compiled = self.options is not None and not backbone.training and not _needs_grad([backbone, *heads], images)
        if compiled or (early_exit and not self.cuts):
            try:
                return partial(self._staged(backbone, images, compiled, heads, thresholds).run, backbone)
            except RoutingError as e:
                if not compiled:
                    raise
                self.fall_back_to_eager(str(e))
                return self.runner(backbone, images, heads, thresholds, early_exit)
        if self._until_advice and early_exit and images.shape[0] >= COMPILE_PAYS and not backbone.training:
            self._advise(images.shape[0])
        return partial(self._hooks.run, backbone)

    def _advise(self, count: int) -> None:
        """Says once, after many images, that compiling pays."""
        self._until_advice = max(0, self._until_advice - count)
        if not self._until_advice:
            _logger.warning(
                '%d images ran eagerly in batches: a convolutional network is often faster compiled, with exits or '
                'without. Try model.compile() (--compile), and compare with timm_cascade.profile.',
                MANY,
            )

    def fall_back_to_eager(self, reason: str) -> None:
        """Stops compiling, and warns with the reason."""
        self.options = None
        self.forget()
        warnings.warn(f'the cascade runs eagerly, without compiled stages: {reason}', stacklevel=4)

    def collect(
        self, backbone: Callable[[Tensor], Tensor], images: Tensor, readers: Sequence[Callable[[Tensor], Tensor]]
    ) -> tuple[list[Tensor], Tensor]:
        """The output of each reader for its exit's features, and the output of `backbone`; no sample exits early."""
        read: list[Tensor | None] = [None] * len(self.points)
        if isinstance(backbone, nn.Module):
            self.attach(backbone)

        def on_exit(index: int, boundary: Boundary) -> None:
            read[index] = readers[index](boundary.features)

        logits = self._hooks.run(backbone, images, on_exit)
        missed = [i for i, r in enumerate(read) if r is None]
        if missed:
            raise RoutingError(f'the backbone did not run its exits {missed}; was it changed after it was wrapped?')
        return [r for r in read if r is not None], logits

    def route(
        self,
        backbone: nn.Module,
        images: Tensor,
        heads: Sequence[Callable[[Tensor], Tensor]],
        thresholds: Thresholds,
        min_leave: float = 0.0,
        on_answer: OnAnswer | None = None,
        first: list[Tensor] | None = None,
    ) -> CascadeOutput:
        """Runs the cascade: a sample exits at the first exit whose confidence is at least its threshold.

        Args:
            backbone: The network that carries the hooks.
            images: (N, ...), N >= 1.
            heads: One per exit; not run where the threshold is infinite.
            thresholds: M numbers, or (N, M) of them; infinity closes an exit.
            min_leave, on_answer: See ActiveBatch.
            first: An empty list, which takes the confidences (N,) of the first open exit.
        """
        ids = torch.arange(images.shape[0], device=images.device)
        batch = ActiveBatch(ids, heads, thresholds, min_leave, on_answer)
        batch.first = first
        reached = 0  # open exits

        def on_exit(index: int, boundary: Boundary) -> list[Tensor] | None:
            nonlocal reached
            reached += 1
            remaining = batch.exit_confident(index, boundary.features, boundary.answer)
            if remaining is None:
                return None
            if not remaining.numel():
                raise StopForward
            return boundary.select(remaining)

        opened = sum(map(math.isfinite, batch.thresholds))
        early_exit = opened > 0
        runner = self.runner(backbone, images, heads, batch.thresholds, early_exit)
        try:
            logits = runner(images, on_exit, wanted=batch.is_open)
        except StopForward:  # every sample has exited
            return batch.output()
        if reached < opened and self.attach(backbone):
            if first is not None:
                first.clear()
            # a hooked module was replaced
            return self.route(backbone, images, heads, thresholds, min_leave, on_answer, first)
        batch.finish(logits)
        return batch.output()

    def _staged(
        self,
        backbone: nn.Module,
        images: Tensor,
        compiled: bool,
        heads: Sequence[nn.Module],
        thresholds: Sequence[float],
    ) -> StagedBackbone:
        kind = images.device.type
        # compiled stages notice another dtype themselves, and finding a parameter costs single images time
        dtype = None if compiled else next(backbone.parameters()).dtype
        forced = compiled and self.options is not None and self.options.channels_last
        layout = torch.channels_last if forced else _memory_format(images)
        key = (
            images.shape[1:],
            images.dtype,
            images.device,
            layout,
            dtype,
            compiled,
            torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        )
        with _export_lock:
            staged = self._exported.pop(key, None)
            if staged is None or staged.stale(backbone, heads):
                example = images.contiguous(memory_format=layout)
                staged = (
                    self._compile(backbone, example, heads, thresholds) if compiled else self.export(backbone, example)
                )
            self._exported[key] = staged
            while len(self._exported) > MAX_EXPORTS:
                self._exported.pop(next(iter(self._exported)))
        return staged

    def export(self, backbone: nn.Module, images: Tensor) -> StagedBackbone:
        """The backbone as one graph, split at its exits into stages; a new one at every call.

        Args:
            backbone: The network that carries the hooks, in eval mode.
            images: (N, C, H, W), an example of what the stages take.

        Raises:
            RoutingError: torch.export cannot take the network.
        """
        from .graph import StagedBackbone  # torch.export is a costly import, and few backbones need it

        with self._explained(backbone, 'exported to cut its batch at'):
            return StagedBackbone(backbone, self._marking(backbone), images, len(self.points))

    def _compile(
        self, backbone: nn.Module, images: Tensor, heads: Sequence[nn.Module], thresholds: Sequence[float]
    ) -> StagedBackbone:
        from .compiled import CompiledBackbone

        assert self.options is not None
        run, wanted = self._marking(backbone), open_exits(thresholds)
        with self._explained(backbone, 'exported and compiled between'):
            return CompiledBackbone(backbone, run, images, heads, self.options, wanted)

    def _marking(self, backbone: nn.Module) -> Callable[[Tensor], Tensor]:
        """The backbone with a mark at each exit's features, which torch.export keeps."""
        from .graph import mark

        def on_exit(index: int, boundary: Boundary) -> list[Tensor]:
            return [mark(t, index) if t is boundary.features else t for t in boundary.tensors]

        return lambda images: self._hooks.run(backbone, images, on_exit)

    @contextmanager
    def _explained(self, backbone: nn.Module, what: str) -> Iterator[None]:
        try:
            with torch.inference_mode(False):
                yield
        except Exception as e:  # torch.export raises whatever the network's code makes it raise
            raise RoutingError(
                f'{type(backbone).__name__} has to be {what} {[p.module for p in self.points]}, and that failed: '
                f'{type(e).__name__}: {" ".join(str(e).split())[:300]}'
            ) from e


class CompiledNetwork:
    """A network without exits, compiled as the stages of a cascade are: images to logits.

    Args:
        network: The network; gradients and training mode run it as it is.
        options: How to compile.
    """

    def __init__(self, network: nn.Module, options: CompileOptions | None) -> None:
        self.network, self.router = network, Router(network, ())
        self.router.options = options

    def __call__(self, images: Tensor) -> Tensor:
        return self.router.runner(self.network, images, [], [], False)(images, lambda index, boundary: None)


def _memory_format(images: Tensor) -> torch.memory_format:
    channels_last = not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _needs_grad(modules: Iterable[nn.Module], images: Tensor) -> bool:
    return torch.is_grad_enabled() and (
        images.requires_grad or any(p.requires_grad for m in modules for p in m.parameters())
    )
