"""Calibrates an exported folder through its own files: the guarantee is about what runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..data import ImageData, check_labels
from ..thresholds import Calibration
from ..utils.files import write_text
from .manifest import MANIFEST, read_manifest
from .stage_files import require

if TYPE_CHECKING:
    from .runner import Cascade

__all__ = ['calibrate_exported', 'every_stage', 'image_batches', 'stage_sessions']


def image_batches(cascade: Cascade, data: ImageData, batch_size: int) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Preprocessed images (N, C, H, W) float32 and their labels (N,), -1 where there are none."""
    for start in range(0, len(data), batch_size):
        items = [data[i] for i in range(start, min(len(data), start + batch_size))]
        # a data set with a transform of its own gives (C, H, W) as the model reads it
        images = [cascade.preprocess(x) if hasattr(x, 'convert') else np.asarray(x, np.float32) for x, _ in items]
        yield np.stack(images), np.array([label for _, label in items])


def stage_sessions(cascade: Cascade) -> list[Any]:
    """One onnxruntime session per stage, each with its head."""
    return [cascade.session([stage]) for stage in cascade.stages]


def every_stage(
    cascade: Cascade, sessions: Sequence[Any], images: NDArray[Any]
) -> Iterator[tuple[dict[str, Any], NDArray[Any], NDArray[Any]]]:
    """Each stage's inputs by name, logits (N, C) and confidence (N,); no sample exits early."""
    fixed = cascade.manifest['batch_size']
    values: dict[str, Any] = {'images': images if fixed is None else np.resize(images, (fixed, *images.shape[1:]))}
    for stage, session in zip(cascade.stages, sessions, strict=True):
        inputs = {name: values[name] for name in stage['inputs']}
        *made, logits, confidence = session.run([*stage['outputs'], 'logits', 'confidence'], inputs)
        values |= dict(zip(stage['outputs'], made, strict=True))
        yield inputs, logits[: len(images)], confidence[: len(images)]


def calibrate_exported(folder: str | Path, held_out: ImageData, *, batch_size: int = 64) -> Calibration:
    """Measures every exit of an exported cascade on held-out images, and writes the table to its cascade.json.

    Args:
        folder: What `timm_cascade.export` wrote with the format `onnx`.
        held_out: Images that neither backbone nor heads were trained on. Without labels agreement with the full
            network is counted instead of correctness.
        batch_size: Images that are run together.

    Returns:
        The calibration. The folder's active thresholds stay, unless they were chosen in another precision: then all
        exits are closed until `set_max_drop` is called.

    Raises:
        ExportError: The folder is not an exported cascade, or onnxruntime is not installed.
        ValueError: Damaged files, or labels of other classes.
    """
    manifest = read_manifest(folder)
    require('onnxruntime')
    from .runner import Cascade

    cascade = Cascade(folder)
    sessions = stage_sessions(cascade)
    step = manifest.batch_size or batch_size
    confidences, answers, labels = [], [], []
    for images, target in image_batches(cascade, held_out, step):
        outputs = [(logits.argmax(1), found) for _, logits, found in every_stage(cascade, sessions, images)]
        answers.append(np.stack([a for a, _ in outputs], 1))
        confidences.append(np.stack([c for _, c in outputs], 1))
        labels.append(target)
    answer, label = np.concatenate(answers), np.concatenate(labels)
    agreement = answer == answer[:, -1:]
    labelled = not bool((label < 0).all())
    check_labels(label, manifest.num_classes, needed=labelled)
    stages = manifest.stages
    calibration = Calibration(
        confidence=np.concatenate(confidences),
        correct=answer == label[:, None] if labelled else agreement,
        agreement=agreement,
        stage_cost=np.array([s.macs for s in stages]),
        head_cost=np.array([s.head_macs for s in stages[:-1]]),
        backbone_cost=manifest.backbone_macs,
        exits=manifest.exits,
        num_classes=manifest.num_classes,
        heads_hash=manifest.heads_hash,
        provenance=dict(
            data=held_out.name,
            split=held_out.split,
            labelled=labelled,
            dtype=manifest.precision,
            runtime=f'onnxruntime {version("onnxruntime")}',
            files=[s.sha256 for s in stages],
            versions=manifest.versions,
            **manifest.preprocessing.model_dump(include={'input_size', 'mean', 'std', 'interpolation', 'crop_pct'}),
        ),
    )
    table = calibration.table(reference='labels' if labelled else 'backbone')
    if manifest.table_precision != manifest.precision:
        manifest.thresholds = [None] * (len(stages) - 1)
    manifest.table, manifest.table_precision = json.loads(table.to_json()), manifest.precision
    write_text(Path(folder) / MANIFEST, manifest.to_json())
    return calibration
