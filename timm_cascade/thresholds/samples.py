"""Calibration samples as one validated object, and what thresholds do to them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ThresholdError

__all__ = ['BoolArray', 'FloatArray', 'IntArray', 'Outcome', 'Samples', 'outcome', 'route']

FloatArray = NDArray[np.floating[Any]]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Samples:
    """Confidence and correctness of n samples at M exits and the final one, with what the stages cost.

    Checked once, here; the rules take the object as it is.

    Example:
        >>> samples = Samples(confidence, correct, stage_cost=[2e8, 3e8, 4e8], head_cost=[1e6, 1e6])
        >>> thresholds = certified(samples, max_drop=0.01)

    Attributes:
        confidence: (n, M+1) float, max softmax of every exit; a sample with NaN does not exit early.
        correct: (n, M+1) bool, whether each exit's answer is right.
        stage_cost: (M+1,) cost of each stage, its head included, in any unit (MACs, seconds); default 1 each.
        head_cost: (M,) the part of stage_cost that is the head's, saved while its exit is closed; default 0.
        agreement: (n, M+1) bool, whether each exit's answer is the full network's; optional.

    Raises:
        ThresholdError: Shapes or values that do not fit.
    """

    confidence: FloatArray
    correct: BoolArray
    stage_cost: FloatArray = None  # type: ignore[assignment]  # an array after construction
    head_cost: FloatArray = None  # type: ignore[assignment]
    agreement: BoolArray | None = None

    def __post_init__(self) -> None:
        c = _as_confidence(self.confidence)
        exits = c.shape[1] - 1
        stage, head = _as_costs(self.stage_cost, self.head_cost, exits)
        values = dict(
            confidence=c,
            correct=_as_flags('correct', self.correct, c.shape),
            stage_cost=stage,
            head_cost=head,
            agreement=None if self.agreement is None else _as_flags('agreement', self.agreement, c.shape),
        )
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.confidence)

    @property
    def exits(self) -> int:
        """Number of exits before the final one."""
        return self.confidence.shape[1] - 1

    def take(self, rows: IntArray | BoolArray | slice) -> Samples:
        """Some of the samples, with the same costs; at least one."""
        agreement = None if self.agreement is None else self.agreement[rows]
        return Samples(self.confidence[rows], self.correct[rows], self.stage_cost, self.head_cost, agreement)


@dataclass(frozen=True)
class Outcome:
    """What a threshold vector does to a set of samples.

    Attributes:
        accuracy: Accuracy of the cascade, a fraction.
        full_accuracy: Accuracy of the final exit on the same samples.
        drop: full_accuracy - accuracy.
        cost: Expected cost per sample, in the unit of `stage_cost`.
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

    @classmethod
    def of_counts(cls, full: int, harmful: int, helpful: int, exits: IntArray, cost: float) -> Outcome:
        """From the samples that the final exit has right, the flips, and the samples (M+1,) that each exit answers."""
        n, lost = int(exits.sum()), harmful - helpful
        shares = tuple((exits / n).tolist())
        return cls((full - lost) / n, full / n, lost / n, cost, shares, harmful, helpful, n)


def route(confidence: ArrayLike, thresholds: ArrayLike) -> IntArray:
    """The exit that answers each sample: the first m < M with confidence[i, m] >= thresholds[m], else M.

    A sample with a NaN confidence goes on. A threshold of inf closes its exit.

    Example:
        >>> route([[0.9, 0.8], [0.3, 0.7]], [0.5])
        array([0, 1])

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
    exits_here = np.ones(c.shape, dtype=np.bool_)
    np.greater_equal(c[:, :-1], t, out=exits_here[:, :-1])
    exits_here[:, :-1] &= t < np.inf
    return exits_here.argmax(axis=1)


def exit_costs(stage_cost: FloatArray, head_cost: FloatArray, thresholds: ArrayLike) -> FloatArray:
    """(..., M+1) cost of a sample that exits at each exit, at thresholds (..., M); heads of closed exits do not run."""
    saved = np.where(np.isposinf(np.asarray(thresholds)), head_cost, 0.0)
    return np.cumsum(stage_cost - np.append(saved, np.zeros_like(saved[..., :1]), axis=-1), axis=-1)


def outcome(samples: Samples, thresholds: ArrayLike) -> Outcome:
    """Accuracy, cost and exit shares of a threshold vector on these samples.

    Example:
        >>> outcome(samples, thresholds).drop

    Args:
        samples: The samples.
        thresholds: (M,).

    Raises:
        ThresholdError: Thresholds that do not fit.
    """
    t = check_thresholds(thresholds, samples.exits)
    exited = route(samples.confidence, t)
    correct, full = samples.correct[np.arange(samples.n), exited], samples.correct[:, -1]
    exits = np.bincount(exited, minlength=samples.exits + 1)
    cost = float(exits @ exit_costs(samples.stage_cost, samples.head_cost, t)) / samples.n
    return Outcome.of_counts(int(full.sum()), int((full & ~correct).sum()), int((correct & ~full).sum()), exits, cost)


def _as_confidence(values: ArrayLike) -> FloatArray:
    c = np.asarray(values)
    if c.dtype not in (np.float32, np.float64):
        if c.dtype.kind not in 'fiu':
            raise ThresholdError(f'confidence has dtype {c.dtype}; expected floats, the max softmax of every exit.')
        c = c.astype(np.float64)
    if c.ndim != 2 or c.shape[0] < 1 or c.shape[1] < 2:
        raise ThresholdError(
            f'confidence has shape {c.shape}; expected (n, M+1): a row per sample, a column per exit and one for the '
            f'final exit, with n >= 1 and M >= 1.'
        )
    if np.isinf(c).any():
        raise ThresholdError('confidence holds infinite values; expected max softmax, between 0 and 1 (or NaN).')
    return c


def _as_flags(name: str, values: ArrayLike, shape: tuple[int, ...]) -> BoolArray:
    r = np.asarray(values)
    if r.shape != shape:
        raise ThresholdError(
            f'{name} has shape {r.shape}, confidence {shape}; they must agree. Pass whether each exit was right, not '
            f'the labels.'
        )
    if r.dtype != np.bool_ and (r.dtype.kind not in 'iuf' or not np.isin(r, (0, 1)).all()):
        raise ThresholdError(
            f'{name} must hold only True/False or 0/1, got dtype {r.dtype}. Pass whether each exit was right, not the '
            f'labels.'
        )
    return r.astype(np.bool_, copy=False)


def _as_costs(stage_cost: ArrayLike | None, head_cost: ArrayLike | None, exits: int) -> tuple[FloatArray, FloatArray]:
    stage = np.ones(exits + 1) if stage_cost is None else np.asarray(stage_cost, dtype=np.float64)
    if stage.shape != (exits + 1,):
        raise ThresholdError(
            f'stage_cost has shape {stage.shape}; expected ({exits + 1},), a stage up to each of {exits} exits and one '
            f'to the end.'
        )
    if not np.isfinite(stage).all() or (stage < 0).any() or stage.sum() <= 0:
        raise ThresholdError(f'stage_cost must be finite, not negative and not all zero, got {stage.tolist()}.')
    head = np.zeros(exits) if head_cost is None else np.asarray(head_cost, dtype=np.float64)
    if head.shape != (exits,):
        raise ThresholdError(f'head_cost has shape {head.shape}; expected ({exits},), one for each exit head.')
    # Stages may be measured separately from heads: allow for rounding, not for a head that costs more than its stage.
    if not np.isfinite(head).all() or (head < 0).any() or (head > stage[:-1] * (1 + 1e-9)).any():
        raise ThresholdError(
            f'head_cost must lie between 0 and stage_cost (which includes the head), got {head.tolist()} for stages '
            f'{stage[:-1].tolist()}.'
        )
    return stage, head


def check_thresholds(thresholds: ArrayLike, exits: int) -> FloatArray:
    """Returns thresholds as (M,) float64; inf closes an exit, NaN is refused."""
    t = np.asarray(thresholds, dtype=np.float64)
    if t.shape != (exits,):
        raise ThresholdError(
            f'thresholds have shape {t.shape}; expected ({exits},), one for each exit before the final one, which '
            f'needs none.'
        )
    if np.isnan(t).any():
        raise ThresholdError(f'thresholds hold NaN: {t.tolist()}; use inf to close an exit.')
    return t


def check_max_drop(max_drop: float) -> float:
    """Returns max_drop as a float in [0, 1]."""
    value = _number('max_drop', max_drop)
    if not 0 <= value <= 1:
        raise ThresholdError(
            f'max_drop is {max_drop!r}; expected a fraction between 0 and 1. One percentage point is 0.01.'
        )
    return value


def check_level(level: float) -> float:
    """Returns level as a float in [0.5, 1)."""
    value = _number('level', level)
    if not 0.5 <= value < 1:
        raise ThresholdError(f'level is {level!r}; expected a probability from 0.5 to below 1, such as 0.9.')
    return value


def _number(name: str, value: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ThresholdError(f'{name} is {value!r}; expected a number.') from None
    if math.isnan(number):
        raise ThresholdError(f'{name} is NaN; expected a number.')
    return number


def check_softmax(confidence: FloatArray) -> None:
    """Refuses numbers that are not a max softmax."""
    if ((confidence < 0) | (confidence > 1)).any():
        raise ThresholdError(
            f'confidence goes from {np.nanmin(confidence):g} to {np.nanmax(confidence):g}; expected max softmax, '
            f'between 0 and 1. Were logits passed?'
        )
