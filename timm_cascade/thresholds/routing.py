"""Who leaves where, given confidences and thresholds, and what that costs and loses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ThresholdError
from .checks import FloatArray, IntArray, check_costs, check_samples, check_thresholds

__all__ = ['Outcome', 'exit_costs', 'outcome', 'route']


@dataclass(frozen=True)
class Outcome:
    """What a threshold vector does to a set of samples.

    Attributes:
        accuracy: Of the cascade, a fraction.
        full_accuracy: Of the final exit on the same samples.
        drop: full_accuracy - accuracy.
        cost: Expected cost of a sample, in the unit of `stage_cost`.
        exit_shares: (M+1,) fraction of samples answered by each exit.
        harmful: Samples that the final exit has right and the cascade wrong.
        helpful: Samples that the cascade has right and the final exit wrong.
        n: Number of samples.
    """

    accuracy: float
    full_accuracy: float
    drop: float
    cost: float
    exit_shares: tuple[float, ...]
    harmful: int
    helpful: int
    n: int


def route(confidence: ArrayLike, thresholds: ArrayLike) -> IntArray:
    """The exit that answers each sample: the first m < M with confidence[i, m] >= thresholds[m], else M.

    A NaN confidence never leaves. A threshold of inf closes its exit.

    Args:
        confidence: (n, M+1); the final exit's column is not used.
        thresholds: (M,).

    Returns:
        (n,) integers in 0..M.

    Raises:
        ThresholdError: Shapes that do not fit, or a NaN threshold.
    """
    c = np.asarray(confidence)
    if c.ndim != 2 or c.shape[1] < 2:
        raise ThresholdError(f'confidence has shape {c.shape}; expected (n, M+1) with M >= 1.')
    t = check_thresholds(thresholds, c.shape[1] - 1)
    leaves = np.ones(c.shape, dtype=np.bool_)
    np.greater_equal(c[:, :-1], t, out=leaves[:, :-1])
    leaves[:, :-1] &= t < np.inf
    return leaves.argmax(axis=1)


def exit_costs(stage_cost: FloatArray, head_cost: FloatArray, closed: NDArray[np.bool_]) -> FloatArray:
    """(M+1,) cost of a sample that leaves at each exit; the heads of closed exits are not run."""
    paid = stage_cost.copy()
    paid[:-1] -= np.where(closed, head_cost, 0.0)
    return np.cumsum(paid)


def outcome(
    confidence: ArrayLike,
    correct: ArrayLike,
    stage_cost: ArrayLike,
    thresholds: ArrayLike,
    head_cost: ArrayLike | None = None,
) -> Outcome:
    """Accuracy, cost and exit shares of a threshold vector on these samples.

    Args:
        confidence: (n, M+1).
        correct: (n, M+1), whether each exit is right.
        stage_cost: (M+1,) cost of each stage, its head included.
        thresholds: (M,).
        head_cost: (M,) the part of stage_cost that is the head's, saved when the exit is closed; default none.

    Raises:
        ThresholdError: Shapes or values that do not fit.
    """
    c, r = check_samples(confidence, correct)
    exits = c.shape[1] - 1
    stage, head = check_costs(stage_cost, head_cost, exits)
    t = check_thresholds(thresholds, exits)
    left = route(c, t)
    return tally(left, r, exit_costs(stage, head, np.isinf(t) & (t > 0)))


def tally(left: IntArray, correct: NDArray[np.bool_], costs: FloatArray) -> Outcome:
    """The outcome of samples that left at exits `left` (n,), each exit costing `costs` (M+1,)."""
    n, columns = correct.shape
    right, full = correct[np.arange(n), left], correct[:, -1]
    shares = np.bincount(left, minlength=columns) / n
    hits, full_hits = int(right.sum()), int(full.sum())
    return Outcome(
        accuracy=hits / n,
        full_accuracy=full_hits / n,
        drop=(full_hits - hits) / n,
        cost=float(shares @ costs),
        exit_shares=tuple(shares.tolist()),
        harmful=int((full & ~right).sum()),
        helpful=int((right & ~full).sum()),
        n=n,
    )
