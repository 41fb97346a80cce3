"""The cheapest setting of a cascade that is as accurate as another network, and how both do on other images."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from timm_cascade.thresholds import Samples, outcome, route
from timm_cascade.thresholds.rule_joint import cross_fit
from timm_cascade.thresholds.samples import FloatArray


class Setting(NamedTuple):
    """Thresholds (M,), with the accuracy and the cost (in the samples' unit) that the calibration images promise."""

    thresholds: FloatArray
    accuracy: float
    cost: float


def cheapest(samples: Samples, accuracy: float) -> Setting | None:
    """The thresholds that are expected to cost the least among those at least this accurate; None if none with exits.

    Accuracy and cost are cross-fitted: each image is judged by thresholds that the others chose. Judged by thresholds
    that it helped to choose, a setting looks better than it is on other images, the more so the fewer chose it.

    Args:
        samples: Calibration images, with the cost of each stage in any unit.
        accuracy: Fraction of correct answers to reach.
    """
    path, _, fitted = cross_fit(samples, 0)
    expected = (fitted.full - fitted.harmful + fitted.helpful) / fitted.n
    enough = np.flatnonzero(expected >= accuracy)
    if not len(enough):
        return None
    row = int(enough[fitted.cost[enough].argmin()])
    if not np.isfinite(path[row]).any():
        return None
    return Setting(path[row], float(expected[row]), float(fitted.cost[row]))


class Comparison(NamedTuple):
    """A cascade beside another network on the same images.

    Attributes:
        accuracy: The cascade's.
        difference: The cascade's accuracy less the other network's.
        half: Half the 95 % interval of the difference.
        cost: What an image costs the cascade on average, in the samples' unit.
        exit_shares: Fraction of the images that each exit answers.
    """

    accuracy: float
    difference: float
    half: float
    cost: float
    exit_shares: tuple[float, ...]


def compare(samples: Samples, thresholds: ArrayLike, correct: ArrayLike) -> Comparison:
    """What thresholds do to images, beside a network whose answers there are `correct` (n,)."""
    truth, exits = outcome(samples, thresholds), route(samples.confidence, thresholds)
    paired = samples.correct[np.arange(samples.n), exits].astype(float) - np.asarray(correct)
    half = float(1.96 * paired.std() / np.sqrt(samples.n))
    return Comparison(truth.accuracy, float(paired.mean()), half, truth.cost, truth.exit_shares)
