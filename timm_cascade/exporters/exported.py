"""An exported folder as a cascade that labels images: what `timm_cascade.predict` takes instead of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ExportError
from ..inference.stream import StreamOutput
from .manifest import read_manifest
from .stage_files import require

__all__ = ['ExportedCascade']


class ExportedExit(NamedTuple):
    """Where an exit stands, and the MACs of the plain backbone."""

    module: str
    total: float


class ExportedCascade(nn.Module):
    """The stage files of a folder, run by onnxruntime; it has no parameters.

    Args:
        folder: What `timm_cascade.export` wrote with the format `onnx`. Its active thresholds are used, which belong
            to the precision of its files.
        threads: Threads of onnxruntime; 0 for all.

    Raises:
        ExportError: The folder is not an export as ONNX, or onnxruntime is not installed.
        ValueError: Damaged or swapped stage files.

    Example:
        >>> cascade = ExportedCascade('exported')
        >>> cascade.set_max_drop(0.01)
        >>> timm_cascade.predict(cascade, 'photos/', 'predictions/')
    """

    def __init__(self, folder: str | Path, threads: int = 0) -> None:
        super().__init__()
        self.folder, self.threads, self.manifest = str(folder), threads, read_manifest(folder)
        if self.manifest.kind != 'onnx':
            raise ExportError(f'{folder} holds {self.manifest.kind} files, which nothing here runs; export as onnx.')
        require('onnxruntime')
        from .runner import Cascade

        self.runner = Cascade(folder, threads)
        self.num_classes, self.label_names = self.manifest.num_classes, self.manifest.label_names
        self.pretrained_cfg = dict(architecture=self.manifest.architecture, **self.manifest.preprocessing.model_dump())
        self.exits = [ExportedExit(name, self.manifest.backbone_macs) for name in self.manifest.exits]
        self.precision = f'{self.manifest.precision} in onnxruntime'

    def __reduce__(self) -> Any:
        return _open, (self.folder, self.threads, self.runner.thresholds)

    @property
    def thresholds(self) -> Tensor:
        """(M,) active thresholds; inf closes an exit."""
        return torch.from_numpy(self.runner.thresholds.copy())

    def set_max_drop(self, max_drop: float, rule: str = 'certified', level: float = 0.9) -> None:
        """Sets the thresholds of the folder's table.

        Raises:
            ValueError: No such point, or a table that was measured in another precision.
        """
        self.runner.set_max_drop(max_drop, rule, level)

    def stream(self, batches: Iterable[Tensor], *, batch_size: int | None = None) -> Iterator[StreamOutput]:
        """Predicts batches (N, C, H, W) float32, each by itself; `batch_size` is what they have."""
        start = 0
        for batch in batches:
            logits, exits, confidence = map(torch.from_numpy, self.runner.predict(batch.numpy()))
            yield StreamOutput(torch.arange(start, start + len(batch)), logits, exits, confidence)
            start += len(batch)

    def heads_hash(self) -> str:
        """Of the heads that were exported."""
        return self.manifest.heads_hash

    def stage_macs(self) -> np.ndarray:
        """(M+1,) MACs of each stage, its head included."""
        return np.array([stage.macs for stage in self.manifest.stages])

    def head_macs(self) -> np.ndarray:
        """(M,) MACs of each head."""
        return np.array([stage.head_macs for stage in self.manifest.stages[:-1]])


def _open(folder: str, threads: int, thresholds: np.ndarray) -> ExportedCascade:
    cascade = ExportedCascade(folder, threads)
    cascade.runner.set_thresholds(thresholds)
    return cascade
