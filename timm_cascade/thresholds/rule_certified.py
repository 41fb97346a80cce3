"""Thresholds with a promise: the accuracy lost on unseen data exceeds max_drop with probability 1 - level at most."""

from __future__ import annotations

import math
import warnings
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from .checks import FloatArray, check_costs, check_level, check_max_drop, check_samples
from .choice import Choice
from .path import GRID, Along, follow, nested_path
from .problem import Problem
from .pvalues import noninferiority_pvalue, score

__all__ = ['certified', 'certify']

_TESTS = 60
_SURE = -4.0  # a predicted score at which the first test is all but sure to pass


def certified(
    confidence: ArrayLike,
    correct: ArrayLike,
    stage_cost: ArrayLike,
    max_drop: float,
    level: float = 0.9,
    seed: int = 0,
    head_cost: ArrayLike | None = None,
) -> FloatArray:
    """Thresholds that keep their word: P(full accuracy - cascade accuracy > max_drop) <= 1 - level.

    The probability is over the draw of these samples, the accuracies are those on unseen data from the same source.
    It holds for each max_drop taken by itself, for any n and any heads; it says nothing under a shift, nor about the
    best of several results.

    One random half proposes a nested path of threshold vectors, greedily by loss per cost saved; the other tests it in
    order by an exact non-inferiority test on the paired flips, from the first point that the proposing half predicts
    to be safe, and stops at the first failure (fixed-sequence Learn then Test). In simulations with 3 to 8 exits this
    saved more than the nested per_exit path in most settings, most of all for small drops and few samples; where exits
    help about as often as they harm, the per_exit path sometimes saved one or two points of cost more.

    Args:
        confidence: (n, M+1).
        correct: (n, M+1), whether each exit is right.
        stage_cost: (M+1,) cost of each stage, its head included.
        max_drop: Accuracy that may be given up, a fraction. With 0 only exits that better the network can pass.
        level: Of the promise.
        seed: Of the split into halves.
        head_cost: (M,) the part of stage_cost that is the head's, saved when its exit is closed; default none.

    Returns:
        (M,) float64; all inf, with a warning, where the samples are too few to promise anything.

    Raises:
        ThresholdError: Shapes or numbers that do not fit.
    """
    return certify(confidence, correct, stage_cost, max_drop, level, seed, head_cost).thresholds


def certify(
    confidence: ArrayLike,
    correct: ArrayLike,
    stage_cost: ArrayLike,
    max_drop: float,
    level: float = 0.9,
    seed: int = 0,
    head_cost: ArrayLike | None = None,
) -> Choice:
    """As `certified`, with the outcome measured on the testing half."""
    c, r = check_samples(confidence, correct)
    stage, head = check_costs(stage_cost, head_cost, c.shape[1] - 1)
    max_drop, level = check_max_drop(max_drop), check_level(level)
    order = np.random.default_rng(seed).permutation(len(c))
    propose, test = order[: len(c) // 2], order[len(c) // 2 :]
    nobody = np.full((1, c.shape[1] - 1), np.inf)
    path, predicted = nobody, None
    if len(propose):
        path = nested_path(Problem(c[propose], r[propose], stage, head, GRID))
        predicted = follow(path, c[propose], r[propose], stage, head)
    measured = follow(path, c[test], r[test], stage, head)
    passed = 0
    if predicted is not None and len(path) > 1 and max_drop < 1:
        alpha = 1 - level
        for k in _sequence(predicted, len(test), max_drop, alpha):
            if not _passes(int(measured.harmful[k]), int(measured.helpful[k]), len(test), max_drop, alpha):
                break
            passed = k
    elif max_drop == 1:
        passed = len(path) - 1
    if not passed:
        _warn(predicted, len(c), max_drop, level)
    return Choice(path[passed], measured.outcome(passed))


def _sequence(predicted: Along, n: int, max_drop: float, alpha: float) -> list[int]:
    """Which points to test, in which order; known before the testing half is looked at."""
    z = score(predicted.harmful, predicted.helpful, predicted.n, max_drop) * math.sqrt(n / predicted.n)
    z[0] = 0.0 if max_drop == 0 else z[0]
    # The first points may be untestable (no flips, few samples) while later ones, which help, are not.
    start = max(1, int(np.argmax(z <= max(float(z[1:].min()), _SURE))))
    hopeless = NormalDist().inv_cdf(alpha) + 4
    # Neighbours differ by a tenth of a standard error or by a sixtieth of the cost, whichever comes first.
    spacing = max(hopeless - float(z[start]), 1.0) / _TESTS
    distance = np.maximum.accumulate(z - z[start]) / spacing + (predicted.cost[start] - predicted.cost) / (
        predicted.cost[0] / _TESTS
    )
    order = [start]
    for k in range(start + 1, len(z)):
        if z[k] > hopeless:
            break
        if distance[k] >= distance[order[-1]] + 1:
            order.append(k)
    return order


def _passes(harmful: int, helpful: int, n: int, max_drop: float, alpha: float) -> bool:
    z = float(score(np.array(harmful), np.array(helpful), n, max_drop))
    # Declining to reject is always valid: spare the exact test where it cannot succeed.
    if z > NormalDist().inv_cdf(alpha) + 1:
        return False
    return noninferiority_pvalue(harmful, helpful, n, max_drop, gamma=alpha / 100) <= alpha


def _warn(predicted: Along | None, n: int, max_drop: float, level: float) -> None:
    asked = f'max_drop {100 * max_drop:g} % at level {level:g}'
    if predicted is not None and len(predicted.cost) == 1:
        advice = 'no exit saves anything at these costs'
    elif max_drop == 0:
        advice = 'with 0 only exits that better the network can pass, so allow some loss'
    else:
        needed = _needed(predicted, max_drop, level)
        advice = (
            f'about {max(needed, _round_up(1.5 * n)):,} would do, as far as these show'
            if math.isfinite(needed)
            else 'as far as these show, no number of samples would do'
        )
    warnings.warn(f'{n:,} samples certify no saving for {asked}: nobody leaves; {advice}.', UserWarning, stacklevel=4)


def _needed(predicted: Along | None, max_drop: float, level: float) -> float:
    """How many calibration samples a point of the path that saves at least 1 % would need, roughly; maybe inf."""
    # Without any flip the test passes at (1 - max_drop)^n <= 1 - level.
    least = math.log(1 - level) / math.log1p(-max_drop) if 0 < max_drop < 1 else math.inf
    if predicted is None:
        return _round_up(2 * least)
    n = predicted.n
    drop = (predicted.harmful - predicted.helpful) / n
    flips = (predicted.harmful + predicted.helpful) / n
    usable = (predicted.cost <= 0.99 * predicted.cost[0]) & (drop < max_drop)
    if not usable.any():
        return math.inf
    z = NormalDist().inv_cdf(level)
    # The test half must see the gap between what is expected and what is asked z standard errors wide.
    flips, drop = flips[usable], drop[usable]
    best = float((z * z * np.maximum(flips, max_drop) / (max_drop - drop) ** 2).min())
    return _round_up(2 * max(best, least if drop.min() >= 0 else 0.0))


def _round_up(value: float) -> float:
    if not math.isfinite(value):
        return math.inf
    unit = 10 ** max(0, len(str(int(value))) - 2)
    return math.ceil(value / unit) * unit
