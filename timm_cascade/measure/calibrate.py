"""One full pass over held-out images: how sure and how right every exit is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import timm
import torch
from torch.utils.data import Dataset

from ..data import UNLABELLED, create_loader
from ..inference.batch import confidence
from ..model import CascadeModel
from ..thresholds import Calibration
from ..utils.distributed import create_accelerator
from ..utils.progress import progress
from ..version import __version__

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ['calibrate', 'record']


@torch.no_grad()
def record(
    model: CascadeModel, data: Dataset, batch_size: int = 256, workers: int = 0, accelerator: Accelerator | None = None
) -> dict[str, np.ndarray]:
    """Confidence (n, M+1) float32, correct and agreement (n, M+1) bool of every exit, in the data's order.

    Without labels there is no `correct`.
    """
    accelerator = accelerator or create_accelerator()
    training = model.training
    model.to(accelerator.device).eval()
    parts: list[tuple[torch.Tensor, ...]] = []
    try:
        share = max(1, batch_size // accelerator.num_processes)
        loader = accelerator.prepare_data_loader(create_loader(model, data, share, workers))
        for images, target in progress(loader, 'every exit', accelerator.is_main_process):
            with accelerator.autocast():
                logits = model.forward_exits(images)
            sure = torch.stack([confidence(x) for x in logits], 1)
            answer = torch.stack([x.argmax(1) for x in logits], 1)
            parts.append(accelerator.gather_for_metrics((sure, answer, target)))
    finally:
        model.train(training)
    confidences, answers, labels = (torch.cat(p).cpu().numpy() for p in zip(*parts, strict=True))
    agreement = answers == answers[:, -1:]
    if (labels == UNLABELLED).all():
        return dict(confidence=confidences, agreement=agreement)
    if labels.min() < 0 or labels.max() >= model.num_classes:
        raise ValueError(
            f'labels go from {labels.min()} to {labels.max()}, the model has the classes '
            f'0..{model.num_classes - 1}; these images belong to other classes.'
        )
    return dict(confidence=confidences, correct=answers == labels[:, None], agreement=agreement)


def calibrate(
    model: CascadeModel,
    held_out: Dataset,
    *,
    batch_size: int = 256,
    workers: int = 0,
    accelerator: Accelerator | None = None,
) -> Calibration:
    """Measures every exit on images that neither backbone nor heads were trained on.

    The result is returned, and kept as `model.calibration`; a table of operating points goes to `model.table`.
    The active thresholds stay as they are: turn the dial with `model.set_max_drop`.

    Args:
        held_out: An ImageData, or any data set of (normalised tensor, label). Without labels (all of them -1) the
            dial counts agreement with the full network instead of correctness.
        batch_size: Over all processes together.
    """
    arrays = record(model, held_out, batch_size, workers, accelerator)
    labelled = 'correct' in arrays
    arrays.setdefault('correct', arrays['agreement'])  # without labels the full network is taken to be right
    provenance: dict[str, Any] = dict(
        data=getattr(held_out, 'name', type(held_out).__name__),
        split=getattr(held_out, 'split', ''),
        labelled=labelled,
        **model.provenance(),
        versions=dict(timm_cascade=__version__, timm=timm.__version__, torch=torch.__version__),
    )
    calibration = Calibration(
        **arrays,
        stage_cost=model.stage_macs(),
        head_cost=model.head_macs(),
        backbone_cost=float(model.exits[-1].total),
        exits=tuple(p.module for p in model.exits),
        num_classes=model.num_classes,
        heads_hash=model.heads_hash(),
        provenance=provenance,
    )
    model.calibration = calibration
    model.table = calibration.table(reference='labels' if labelled else 'backbone')
    return calibration
