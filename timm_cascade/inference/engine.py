"""The contract between the ways to run a backbone and what happens at its exits.

A `Runner` (forward hooks, the exported graph, or compiled stages) calls `OnExit` at every exit. What decides which
samples exit (a routed batch, a stream, a profile) implements `OnExit`; neither side depends on the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..backbone import select_rows
from ..errors import RoutingError

__all__ = ['Answer', 'Boundary', 'OnExit', 'Runner', 'StopForward', 'is_recorded', 'refuse_recording']

Answer = tuple[Tensor, Tensor]  # a head's logits (N, C) and their confidence (N,)


class StopForward(Exception):
    """Raised at an exit when no sample remains: ends the forward, as an empty batch would crash many models."""


class Boundary(NamedTuple):
    """All that passes from an exit to the rest of the backbone, for the remaining samples.

    Attributes:
        features: The tensor that the exit's head reads.
        tensors: Every tensor that passes, often only the features.
        rows: Rows of each tensor that belong to one sample; 0 where all samples share it.
        answer: What the exit's head says, where the runner has computed it already.
    """

    features: Tensor
    tensors: list[Tensor]
    rows: Sequence[int]
    answer: Answer | None = None

    def select(self, keep: Tensor) -> list[Tensor]:
        """The tensors of the samples `keep` (indices) alone."""
        return [select_rows(t, keep, r) for t, r in zip(self.tensors, self.rows, strict=True)]


OnExit = Callable[[int, Boundary], 'list[Tensor] | None']
"""Called as on_exit(exit, boundary) at every exit, in order. The tensors it returns replace those at the boundary; None
leaves them as they are; what it raises ends the forward."""


class Runner(Protocol):
    """Runs the backbone: images (N, C, H, W) to the logits of the samples that reach the end.

    With `start` = k > 0 the forward begins after exit k-1 with `tensors`, as they passed that boundary before;
    `images` is then any single image of the same kind. `wanted` says of an exit, when its stage is about to run,
    whether its head will be asked: a runner whose stages include the heads then gives the boundary an answer, and no
    runner calls `on_exit` where it will not.
    """

    def __call__(
        self,
        images: Tensor,
        on_exit: OnExit,
        start: int = 0,
        tensors: list[Tensor] | None = None,
        wanted: Callable[[int], bool] | None = None,
    ) -> Tensor: ...


def is_recorded(images: object) -> bool:
    """Whether torch.jit.trace, torch.export, torch.fx or an ONNX exporter is recording this call."""
    exporting = getattr(torch.compiler, 'is_exporting', None) or torch.compiler.is_compiling  # torch before 2.7
    return torch.jit.is_tracing() or exporting() or isinstance(images, torch.fx.Proxy)


def refuse_recording() -> None:
    """
    Raises:
        RoutingError: Always; it says what to do instead.
    """
    raise RoutingError(
        'this cascade has open exits, and the way its samples take depends on their confidence: a trace or an exported '
        'graph would fix the way of the example images and answer others wrongly. Use timm_cascade.export(model, '
        'folder), which keeps the early exits; or record the full network, with model.thresholds = None.'
    )
