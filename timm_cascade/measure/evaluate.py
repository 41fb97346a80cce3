"""What a cascade does on images: accuracy, computation, exits, and time beside its own backbone."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..backbone import evaluating
from ..data import check_labels, create_loader, prepare_data
from ..inference.request import unwrap
from ..model import CascadeModel
from ..thresholds import route
from ..thresholds.samples import exit_costs
from ..utils.clock import clock
from ..utils.files import plain
from ..utils.progress import progress
from .calibrate import record

__all__ = ['EveryExit', 'Report', 'evaluate', 'every_exit_of', 'report_of']

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EveryExit:
    """All exits on all images: whether heads or thresholds are the limit.

    Attributes:
        accuracy: (M+1,) top-1 of each exit on all images.
        auroc: (M+1,) how well each exit's confidence tells its right answers from its wrong ones; 0.5 is chance,
            nan where all are right or all wrong.
        oracle_accuracy, oracle_macs_share: Figures of a policy that knows the labels: each image exits at the first
            exit that is right, or at exit 0 where none is. No thresholds can do better with these heads.
    """

    accuracy: tuple[float, ...]
    auroc: tuple[float, ...]
    oracle_accuracy: float
    oracle_macs_share: float


@dataclass(frozen=True)
class Report:
    """A cascade at its active thresholds, measured on `n` images.

    Attributes:
        accuracy, full_accuracy: Top-1 of the cascade and of its backbone, fractions.
        change: accuracy - full_accuracy.
        change_interval: 95 % interval of the change on images of this kind (normal, paired).
        macs, macs_share: Average multiply-accumulates of an image, heads counted; as a share of the backbone's.
        time_share: Median time of the cascade over the backbone's, batch by batch, alternating; nan if not timed.
        exit_shares: (M+1,) share of the images that each exit answered.
        exit_accuracy: (M+1,) accuracy among the images that each exit answered; nan where there were none.
        survivors: (M+1,) share of the images that reach each exit.
        every_exit: What each exit does on all images, and the best any policy could do; None if not asked for.
    """

    n: int
    thresholds: tuple[float, ...]
    accuracy: float
    full_accuracy: float
    change: float
    change_interval: tuple[float, float]
    macs: float
    macs_share: float
    time_share: float
    exit_shares: tuple[float, ...]
    exit_accuracy: tuple[float, ...]
    survivors: tuple[float, ...]
    every_exit: EveryExit | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it: None for a closed exit and for what was not measured."""
        return plain(asdict(self))


def _timed(call: Any, images: Tensor) -> tuple[Any, float]:
    began = clock(images.device)
    result = call(images)
    return result, clock(images.device) - began


@torch.inference_mode()
def evaluate(
    model: CascadeModel,
    data: Dataset,
    *,
    batch_size: int = 256,
    workers: int = 0,
    title: str = 'images',
    every_exit: bool = False,
) -> Report:
    """Runs cascade and backbone over the images, side by side, at the active thresholds.

    Which of the two goes first alternates from batch to batch. Loading and decoding are not timed.

    Args:
        data: Images with labels: an ImageData, or any data set of (image, label); classes are compared by name with
            those that the heads were trained on.
        title: What the progress bar says.
        every_exit: Run all exits on all images too, for `Report.every_exit`.
    """
    model = unwrap(model, CascadeModel)
    data = prepare_data(model, data)
    exits, right, full_right, ratios, weights = [], [], [], [], []
    with evaluating(model):
        for i, (images, target) in enumerate(
            progress(create_loader(model, data, batch_size, workers), title, leave=False)
        ):
            check_labels(target, model.num_classes)
            images = model.as_images(images)
            if i == 0:  # the first batch warms both up
                model.backbone(images), model.predict(images)
            calls = [model.backbone, model.predict]
            results = {call: _timed(call, images) for call in (calls if i % 2 else calls[::-1])}
            full, full_time = results[model.backbone]
            output, cascade_time = results[model.predict]
            exits.append(output.exit.cpu().numpy())
            right.append((output.logits.argmax(1).cpu() == target).numpy())
            full_right.append((full.argmax(1).cpu() == target).numpy())
            ratios.append(cascade_time / full_time)
            weights.append(len(images))
    # batches that are not full (the last one) are not a fair sample of the time
    whole = [r for r, w in zip(ratios, weights, strict=True) if w == max(weights)]
    exit_of, correct, full_correct = (np.concatenate(a) for a in (exits, right, full_right))
    report = _report(
        model,
        exit_of,
        correct,
        full_correct,
        time_share=float(np.median(whole)),
        every_exit=every_exit_of(model, record(model, data, batch_size, workers)) if every_exit else None,
    )
    if report.change_interval[0] > 0:
        _logger.warning(
            'The cascade is right on %.1f %% of these images, the backbone alone on %.1f %%: its own classifier is the '
            'weaker part. timm-cascade train --classifier train (train_heads(..., classifier=True)) trains it too.',
            100 * report.accuracy,
            100 * report.full_accuracy,
        )
    return report


def report_of(model: CascadeModel, seen: dict[str, np.ndarray]) -> Report:
    """The report at the active thresholds from what `calibrate.record` measured once, without times; see `evaluate`."""
    exits, correct = route(seen['confidence'], model.thresholds.numpy()), seen['correct']
    return _report(model, exits, correct[np.arange(len(exits)), exits], correct[:, -1])


def _report(
    model: CascadeModel,
    exit_of: np.ndarray,
    correct: np.ndarray,
    full_correct: np.ndarray,
    time_share: float = float('nan'),
    every_exit: EveryExit | None = None,
) -> Report:
    """The figures of images that exited at `exit_of`; all three arrays are (n,)."""
    paired = correct.astype(float) - full_correct
    half = float(1.96 * paired.std() / np.sqrt(len(paired)))
    macs = exit_costs(model.stage_macs(), model.head_macs(), model.thresholds)[exit_of].mean()
    count = len(model.exits) + 1
    return Report(
        n=len(correct),
        thresholds=tuple(model.thresholds.tolist()),
        accuracy=float(correct.mean()),
        full_accuracy=float(full_correct.mean()),
        change=float(paired.mean()),
        change_interval=(float(paired.mean()) - half, float(paired.mean()) + half),
        macs=float(macs),
        macs_share=float(macs / model.exits[-1].total),
        time_share=time_share,
        exit_shares=tuple(float((exit_of == m).mean()) for m in range(count)),
        exit_accuracy=tuple(
            float(correct[exit_of == m].mean()) if (exit_of == m).any() else float('nan') for m in range(count)
        ),
        survivors=tuple(float((exit_of >= m).mean()) for m in range(count)),
        every_exit=every_exit,
    )


def every_exit_of(model: CascadeModel, seen: dict[str, np.ndarray]) -> EveryExit:
    """What each exit does on all images, from what `calibrate.record` measured."""
    correct = seen['correct']
    # the first exit that is right; argmax of a row without any is 0, the cheapest way to be wrong
    macs = np.cumsum(model.stage_macs())[correct.argmax(1)].mean()
    return EveryExit(
        accuracy=tuple(correct.mean(0).tolist()),
        auroc=tuple(_auroc(c, r) for c, r in zip(seen['confidence'].T, correct.T, strict=True)),
        oracle_accuracy=float(correct.any(1).mean()),
        oracle_macs_share=float(macs / model.exits[-1].total),
    )


def _auroc(confidence: np.ndarray, correct: np.ndarray) -> float:
    from scipy.stats import mannwhitneyu  # scipy.stats takes a second to import

    if correct.all() or not correct.any():
        return float('nan')
    pairs = float(correct.sum()) * float((~correct).sum())
    return float(mannwhitneyu(confidence[correct], confidence[~correct]).statistic) / pairs
