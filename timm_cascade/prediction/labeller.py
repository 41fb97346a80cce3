"""What `predict` needs of a cascade, whatever runs it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor

from ..inference.stream import StreamOutput

__all__ = ['Labeller']


class Labeller(Protocol):
    """A cascade that labels images: a `CascadeModel`, or an `ExportedCascade`, which has no parameters."""

    num_classes: Any
    label_names: Any
    pretrained_cfg: Any
    training: bool

    @property
    def exits(self) -> Sequence[Any]: ...

    @property
    def thresholds(self) -> Tensor: ...

    def stream(self, batches: Iterable[Any], *, batch_size: int | None = None) -> Iterator[StreamOutput]: ...

    def heads_hash(self) -> str: ...

    def stage_macs(self) -> Any: ...

    def head_macs(self) -> Any: ...

    def parameters(self) -> Iterator[Any]: ...

    def eval(self) -> Any: ...

    def train(self, mode: bool = True) -> Any: ...

    def to(self, device: Any) -> Any: ...
