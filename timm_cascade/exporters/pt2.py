"""Stages as torch.export programs, for AOTInductor and ExecuTorch."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import ExportError
from .onnx_stages import dynamic_batch, examples
from .stage_module import StageModule

__all__ = ['write_program']


def write_program(stage: StageModule, path: Path, batch_size: int | None) -> None:
    """Writes one stage, to be read with `torch.export.load`; its outputs are its tensors, logits and confidence.

    Raises:
        ExportError: torch.export cannot trace the stage.
    """
    try:
        with torch.no_grad():
            program = torch.export.export(
                stage,
                examples(stage, batch_size),
                dynamic_shapes=None if batch_size else (dynamic_batch(stage),),
                strict=False,
            )
    except Exception as e:  # torch.export raises whatever the network's code makes it raise
        reason = ' '.join(str(e).split())[:400]
        raise ExportError(f'stage {stage.index} cannot be exported: {type(e).__name__}: {reason}') from e
    for node in program.graph.nodes:
        node.meta.pop('stack_trace', None)  # paths of this machine
    torch.export.save(program, path)
