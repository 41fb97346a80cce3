"""Stage files in 8-bit integers, by onnxruntime's static quantisation; tensors between stages stay float32."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data import ImageData
from .recalibrate import every_stage, image_batches, stage_sessions

if TYPE_CHECKING:
    from .runner import Cascade

__all__ = ['quantise_stages']

IMAGES = 256  # that ranges of activations are measured on
BATCH = 8
OPERATORS = ['Conv', 'MatMul', 'Gemm', 'Add', 'Relu', 'Clip', 'MaxPool', 'AveragePool']


def quantise_stages(folder: Path, data: ImageData) -> None:
    """Replaces the stage files of a folder by quantised ones, whose ranges are measured on up to 256 images.

    Args:
        folder: A complete float32 export, not used by others yet.
        data: Images like those to come; training images will do, labels are not used.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    from .runner import Cascade

    class Reader(CalibrationDataReader):
        """Inputs of one stage, batch by batch."""

        def __init__(self, inputs: list[dict[str, Any]]) -> None:
            self.inputs = iter(inputs)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.inputs, None)

    cascade = Cascade(folder)
    seen = _inputs(cascade, data)
    for stage, inputs in zip(cascade.stages, seen, strict=True):
        path = folder / stage['file']
        target = path.with_suffix('.int8')
        level = logging.root.level
        logging.root.setLevel(logging.ERROR)  # onnxruntime advises on the root logger
        try:
            quantize_static(
                str(path),
                str(target),
                Reader(inputs),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=OPERATORS,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                extra_options=dict(WeightSymmetric=True),
            )
        finally:
            logging.root.setLevel(level)
        target.replace(path)


def _inputs(cascade: Cascade, data: ImageData) -> list[list[dict[str, Any]]]:
    """For each stage, what it reads."""
    size = cascade.manifest['batch_size'] or BATCH
    some = data.select(np.random.default_rng(0).permutation(len(data))[:IMAGES])
    seen: list[list[dict[str, Any]]] = [[] for _ in cascade.stages]
    sessions = stage_sessions(cascade)
    for images, _ in image_batches(cascade, some, size):
        for k, (inputs, _, _) in enumerate(every_stage(cascade, sessions, images)):
            seen[k].append(dict(inputs))
    return seen
