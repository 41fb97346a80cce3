"""The whole curve of accuracy against cost on a set of images, and its picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..errors import NotCalibratedError, ThresholdError
from ..model import CascadeModel
from ..thresholds import Samples, outcome
from ..utils.files import plain, replacing
from .calibrate import record

__all__ = ['CurvePoint', 'curve', 'curve_of', 'plot_curve']

STEP = 0.025  # share of the backbone's MACs between two requests


@dataclass(frozen=True)
class CurvePoint:
    """One setting of the dial, measured.

    Attributes:
        macs_share: Average multiply-accumulates per image, heads included, as a share of the backbone's.
        accuracy: Top-1 of the cascade, a fraction.
        change: Accuracy minus that of the full network on the same images.
        exit_shares: (M+1,) share of the images that each exit answered.
        thresholds: (M,) confidence per exit; None closes it.
    """

    macs_share: float
    accuracy: float
    change: float
    exit_shares: tuple[float, ...]
    thresholds: tuple[float | None, ...]


def curve(model: CascadeModel, data: Dataset, *, batch_size: int = 256, workers: int = 0) -> list[CurvePoint]:
    """Accuracy and cost of the thresholds that the calibration chooses for every budget, measured on `data`.

    Args:
        model: A calibrated cascade.
        data: Labelled images that were used neither for training nor for calibration.
        batch_size: Images per batch.
        workers: Processes that decode images.

    Returns:
        Points from the cheapest to the full network; all exits of each image are computed once.

    Raises:
        NotCalibratedError: There is no calibration to choose thresholds from.

    Example:
        >>> best = max(curve(model, test), key=lambda point: point.accuracy)
    """
    return curve_of(model, record(model, data, batch_size, workers))


def curve_of(model: CascadeModel, seen: dict[str, np.ndarray]) -> list[CurvePoint]:
    """The curve on what `calibrate.record` measured; see `curve`."""
    calibration = model.calibration
    if calibration is None:
        raise NotCalibratedError(
            'the curve needs a calibration to choose thresholds from. Run timm_cascade.calibrate(model, held_out) or '
            '`timm-cascade calibrate FOLDER --data DATA` first.'
        )
    if 'correct' not in seen:
        raise ValueError('the images have no labels, so there is no accuracy to draw. Give labelled images.')
    closed = (float('inf'),) * len(model.exits)
    chosen = {closed: None}
    for fraction in np.arange(STEP, 1.0, STEP):
        try:
            chosen[tuple(map(float, calibration.at_cost(float(fraction)).thresholds))] = None
        except ThresholdError:  # no thresholds are that cheap
            continue
    samples = Samples(seen['confidence'], seen['correct'], model.stage_macs(), model.head_macs())
    points = []
    for thresholds in chosen:
        found = outcome(samples, thresholds)
        points.append(
            CurvePoint(
                macs_share=found.cost / model.exits[-1].total,
                accuracy=found.accuracy,
                change=-found.drop,
                exit_shares=found.exit_shares,
                thresholds=tuple(plain(thresholds)),
            )
        )
    return sorted(points, key=lambda point: (point.macs_share, point.accuracy))


def plot_curve(points: list[CurvePoint], path: str | Path) -> None:
    """Draws the curve into a picture; needs matplotlib (`pip install timm-cascade[demo]`).

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    path = Path(path)
    figure = Figure(figsize=(6, 4), layout='constrained')
    axes: Any = figure.subplots()
    axes.plot([100 * p.macs_share for p in points], [100 * p.accuracy for p in points], marker='o', markersize=3)
    full = min(points, key=lambda p: abs(p.exit_shares[-1] - 1))
    axes.axhline(100 * full.accuracy, linestyle=':', color='grey')
    axes.text(0.99, 100 * full.accuracy, 'full network', ha='right', va='bottom', transform=axes.get_yaxis_transform())
    axes.set(xlabel="share of the backbone's MACs (%)", ylabel='accuracy (%)')
    axes.grid(alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip('.') or 'png', dpi=150)
