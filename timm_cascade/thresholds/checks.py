"""Checks that every rule makes before it starts; each message says what was given, what is expected, what to do."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ThresholdError

__all__ = [
    'BoolArray',
    'FloatArray',
    'IntArray',
    'check_costs',
    'check_level',
    'check_max_drop',
    'check_samples',
    'check_thresholds',
    'exact',
    'losses_allowed',
]

FloatArray = NDArray[np.floating[Any]]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.intp]


def check_samples(confidence: ArrayLike, correct: ArrayLike) -> tuple[FloatArray, BoolArray]:
    """Returns (confidence, correct) as arrays of one shape (n, M+1), n >= 1 and M >= 1; NaN confidences are allowed."""
    c, r = np.asarray(confidence), np.asarray(correct)
    if c.dtype not in (np.float32, np.float64):
        if c.dtype.kind not in 'fiu':
            raise ThresholdError(f'confidence has dtype {c.dtype}; expected floats, the max softmax of every exit.')
        c = c.astype(np.float64)
    if c.ndim != 2 or c.shape[0] < 1 or c.shape[1] < 2:
        raise ThresholdError(
            f'confidence has shape {c.shape}; expected (n, M+1): a row per sample, a column per exit and one for the '
            f'final exit, with n >= 1 and M >= 1.'
        )
    if r.shape != c.shape:
        raise ThresholdError(
            f'correct has shape {r.shape}, confidence {c.shape}; they must agree. Pass whether each exit was right, '
            f'not the labels.'
        )
    if r.dtype != np.bool_:
        if r.dtype.kind not in 'iuf' or not np.isin(r, (0, 1)).all():
            raise ThresholdError(
                f'correct must hold only True/False or 0/1, got dtype {r.dtype}. Pass whether each exit was right, '
                f'not the labels.'
            )
        r = r.astype(np.bool_)
    if np.isinf(c).any():
        raise ThresholdError('confidence holds infinite values; expected max softmax, between 0 and 1 (or NaN).')
    return c, r


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


def check_costs(stage_cost: ArrayLike, head_cost: ArrayLike | None, exits: int) -> tuple[FloatArray, FloatArray]:
    """Returns stage_cost (M+1,) and head_cost (M,), zeros where not given, as float64."""
    stage = np.asarray(stage_cost, dtype=np.float64)
    if stage.shape != (exits + 1,):
        raise ThresholdError(
            f'stage_cost has shape {stage.shape}; expected ({exits + 1},), a stage up to each of {exits} exits and one '
            f'to the end.'
        )
    if not np.isfinite(stage).all() or (stage < 0).any() or stage.sum() <= 0:
        raise ThresholdError(f'stage_cost must be finite, not negative and not all zero, got {stage.tolist()}.')
    if head_cost is None:
        return stage, np.zeros(exits)
    head = np.asarray(head_cost, dtype=np.float64)
    if head.shape != (exits,):
        raise ThresholdError(f'head_cost has shape {head.shape}; expected ({exits},), one for each exit head.')
    # Stages may be measured separately from heads: allow for rounding, not for a head dearer than its stage.
    if not np.isfinite(head).all() or (head < 0).any() or (head > stage[:-1] * (1 + 1e-9)).any():
        raise ThresholdError(
            f'head_cost must lie between 0 and stage_cost (which includes the head), got {head.tolist()} for stages '
            f'{stage[:-1].tolist()}.'
        )
    return stage, head


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


def exact(value: float) -> Fraction:
    """The decimal the user wrote, not the double nearest to it: 0.1 is 1/10."""
    return Fraction(repr(float(value)))


def losses_allowed(max_drop: float, n: int) -> int:
    """How many of n samples may be lost on balance: the largest k with k / n <= max_drop, in exact arithmetic."""
    return math.floor(exact(max_drop) * n)
