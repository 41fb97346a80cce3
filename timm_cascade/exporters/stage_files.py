"""Stages as files: ONNX by torch's own exporter, or torch.export programs for AOTInductor and ExecuTorch."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import ExportError
from .stage_module import StageModule

__all__ = ['MAX_BYTES', 'common_opsets', 'require', 'write_program', 'write_stage']

DEFAULT_OPSET = 18
MAX_BYTES = 2_000_000_000  # a protobuf message ends at 2 GiB


def require(*packages: str) -> None:
    """Makes sure that optional packages are installed.

    Raises:
        ExportError: The message says which extra brings them.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f'{" and ".join(missing)} {"is" if len(missing) == 1 else "are"} not installed; '
            f'run pip install "timm-cascade[onnx]".'
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the exporter's progress and its warnings about operators of libraries that are not installed."""
    loggers = [logging.getLogger(name) for name in ('torch.onnx', 'onnxscript', 'onnx_ir')]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def dynamic_batch(stage: StageModule) -> tuple[dict[int, Any] | None, ...]:
    """Dynamic shapes of a stage's inputs: any number of samples."""
    batch = torch.export.Dim('batch', min=1)
    return tuple(({0: rows * batch if rows > 1 else batch} if rows else None) for rows in stage.input_rows)


def examples(stage: StageModule, batch_size: int | None) -> tuple[torch.Tensor, ...]:
    """Example inputs of two samples, or of the fixed number of samples."""
    if batch_size is None:
        return stage.examples
    return tuple(
        t[:rows].repeat(batch_size, *[1] * (t.ndim - 1)) if rows else t
        for t, rows in zip(stage.examples, stage.input_rows, strict=True)
    )


def write_stage(stage: StageModule, path: Path, opset: int | None, batch_size: int | None) -> int:
    """Writes one stage; its outputs are its tensors, then `logits` and `confidence`.

    Args:
        stage: The stage.
        path: The file.
        opset: Version of the ONNX operators; None for DEFAULT_OPSET.
        batch_size: Fixed number of samples; None for any.

    Returns:
        The opset of the file.

    Raises:
        ExportError: An operator that ONNX does not have, or an opset that the exporter cannot write.
    """
    if tuple(map(int, torch.__version__.split('.')[:2])) < (2, 7):
        raise ExportError(
            f'torch {torch.__version__} does not write ONNX with the onnxscript of today; export with a newer torch.'
        )
    if opset is not None and not 7 <= opset <= 100:
        raise ExportError(f'opset is {opset}; expected a version of the ONNX operators, such as {DEFAULT_OPSET}.')
    wanted = opset or DEFAULT_OPSET
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                stage,
                examples(stage, batch_size),
                dynamo=True,
                dynamic_shapes=None if batch_size else (dynamic_batch(stage),),
                input_names=stage.inputs,
                output_names=[*stage.outputs, 'logits', 'confidence'],
                opset_version=wanted,
                verbose=False,
                external_data=False,
            )
    except Exception as e:  # the exporter raises whatever the network's operators make it raise
        reason = ' '.join(str(e.__cause__ or e).split())[:400]
        raise ExportError(f'stage {stage.index} cannot be written as ONNX: {type(e).__name__}: {reason}') from e
    assert program is not None
    model = program.model
    found = model.opset_imports.get('', None)
    if found != wanted:
        raise ExportError(f'the exporter wrote opset {found} and cannot convert it to {wanted}; leave opset out.')
    _keep_constants(model.graph)
    # names of scopes and stack traces with paths of this machine, which take more room than small networks
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.metadata_props.clear()
    size = sum(t.const_value.nbytes for t in model.graph.initializers.values() if t.const_value is not None)
    if size > MAX_BYTES:
        raise ExportError(
            f'stage {stage.index} has {size} bytes of weights, an ONNX file at most {MAX_BYTES}; use more exits.'
        )
    program.save(str(path), external_data=False)
    return found


def common_opsets(models: Iterable[Any]) -> list[Any]:
    """What a graph imports that holds the nodes of all these models: of each domain the latest version."""
    import onnx

    imported = sorted((entry.domain, entry.version) for model in models for entry in model.opset_import)
    return [onnx.helper.make_opsetid(*item) for item in dict(imported).items()]


def _keep_constants(graph: Any) -> None:
    """Adds constants that the exporter's optimiser made and left out of the graph."""
    for node in graph.all_nodes():
        for value in node.inputs:
            if value is None or value.const_value is None or value.producer() is not None:
                continue
            if graph.initializers.get(value.name) is not value:
                if value.name in graph.initializers:
                    value.name = f'{value.name}_of_{node.name}'
                graph.register_initializer(value)


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
