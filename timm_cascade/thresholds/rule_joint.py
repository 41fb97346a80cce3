"""Thresholds for all exits together: least cost for an allowed loss, least loss for an allowed cost."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ThresholdError
from .checks import BoolArray, FloatArray, check_costs, check_max_drop, check_samples, losses_allowed
from .choice import Choice
from .descent import descend
from .path import GRID, Along, follow, nested_path
from .problem import Levels, Problem
from .routing import outcome

__all__ = ['at_cost', 'cost_dial', 'cross_fitted', 'joint']

_EXACT = 400  # up to so many samples every observed confidence is a candidate
_SMALL = 5_000  # up to so many samples there is time for several starts
_AIM, _SLACK = 0.8, 0.5  # the dial means to lose max_drop - 0.5 standard errors on average, or 0.8 max_drop if more
_PRIOR = 4.0  # flips added to those seen, as few flips say little about their rate


def joint(
    confidence: ArrayLike,
    correct: ArrayLike,
    stage_cost: ArrayLike,
    max_drop: float,
    head_cost: ArrayLike | None = None,
) -> FloatArray:
    """The cheapest thresholds that lose no more than max_drop on these very samples.

    A search over two exits at a time from points of the greedy path: within 0.2 % of the least cost on average over
    small instances that brute force can solve (three exits, a few hundred samples), never infeasible. On other samples
    the optimum loses more than asked; `cross_fitted` is the rule that corrects for that.

    Args:
        confidence: (n, M+1).
        correct: (n, M+1), whether each exit is right.
        stage_cost: (M+1,) cost of each stage, its head included, in any unit: MACs, seconds.
        max_drop: Accuracy that may be given up, a fraction.
        head_cost: (M,) the part of stage_cost that is the head's, saved when its exit is closed; default none.

    Returns:
        (M,) float64, observed confidences; inf for exits that do not pay.

    Raises:
        ThresholdError: Shapes or numbers that do not fit.
    """
    c, r = check_samples(confidence, correct)
    stage, head = check_costs(stage_cost, head_cost, c.shape[1] - 1)
    return _search(c, r, stage, head, allowed=losses_allowed(check_max_drop(max_drop), len(c)))


def at_cost(
    confidence: ArrayLike, correct: ArrayLike, stage_cost: ArrayLike, budget: float, head_cost: ArrayLike | None = None
) -> FloatArray:
    """The most accurate thresholds, on these samples, whose expected cost is at most `budget`.

    Args:
        confidence, correct, stage_cost, head_cost: As for `joint`.
        budget: Expected cost of a sample, in the unit of stage_cost.

    Returns:
        (M,) float64, observed confidences or inf.

    Raises:
        ThresholdError: A budget that no thresholds keep, or arrays that do not fit.
    """
    c, r = check_samples(confidence, correct)
    stage, head = check_costs(stage_cost, head_cost, c.shape[1] - 1)
    if math.isnan(budget) or budget <= 0:
        raise ThresholdError(f'budget is {budget!r}; expected a cost above 0, in the unit of stage_cost.')
    return _search(c, r, stage, head, budget=min(budget, 2 * stage.sum()) * len(c))


def _search(
    c: FloatArray,
    r: BoolArray,
    stage: FloatArray,
    head: FloatArray,
    allowed: float = math.inf,
    budget: float | None = None,
) -> FloatArray:
    """Starts from the best points of the greedy path, then searches finer and finer grids around the best found."""
    n, exits = len(c), c.shape[1] - 1
    problem = Problem(c, r, stage, head, n if n <= _EXACT else 64)

    def badness(levels: Levels) -> tuple[float, ...]:
        cost, lost = problem.measure(levels)
        if budget is None:
            return lost > allowed, cost, lost
        return cost > budget * (1 + 1e-12), lost, cost

    path = nested_path(problem, caution=0.0)
    along = follow(path, c, r, stage, head)
    lost, cost = along.harmful - along.helpful, along.cost * n
    feasible = np.flatnonzero(lost <= allowed if budget is None else cost <= budget)
    singles = [np.where(np.arange(exits) == m, 0, problem.closed) for m in range(exits)]
    starts = singles if budget is not None else []
    starts.append(problem.closed)
    if len(feasible):
        starts.append(problem.levels(path[feasible[(cost if budget is None else lost)[feasible].argmin()]]))
    if n > _SMALL:
        starts = [min(starts, key=badness)]
    elif budget is None:
        starts += [problem.levels(path[len(path) // 2]), problem.levels(path[-1])]
    found = [descend(problem, levels, allowed, budget, sweeps=10 if n <= _SMALL else 1) for levels in starts]
    best = min(found, key=badness)
    if badness(best)[0]:
        least = min(problem.measure(levels)[0] for levels in found) / n
        raise ThresholdError(
            f'a budget of {(budget or 0.0) / n:g} cannot be kept: the cheapest thresholds cost {least:g} a sample. Ask '
            f'for more, or add an earlier exit.'
        )
    if n <= _EXACT:
        return problem.thresholds(best)
    observed = [np.unique(c[~np.isnan(c[:, m]), m]) for m in range(exits)]
    thresholds = problem.thresholds(best)
    for _ in range(1 if n > _SMALL else 3):
        finer = [_around(observed[m], problem.values[m], int(best[m])) for m in range(exits)]
        problem = Problem(c, r, stage, head, finer)
        best = descend(problem, problem.levels(thresholds), allowed, budget, sweeps=10 if n <= _SMALL else 1)
        thresholds = problem.thresholds(best)
    return thresholds


def _around(observed: FloatArray, values: FloatArray, level: int) -> FloatArray:
    """A new grid: fine between the neighbours of the present level, coarse elsewhere, the level itself kept."""
    coarse = values[::4]
    if not len(values):
        return values
    low = values[max(level - 2, 0)]
    high = values[level + 2] if level + 2 < len(values) else observed[-1]
    near = observed[np.searchsorted(observed, low) : np.searchsorted(observed, high) + 1]
    fine = near[np.unique(np.linspace(0, len(near) - 1, min(len(near), 64)).astype(np.intp))]
    return np.unique(np.concatenate([coarse, fine, values[level : level + 1]]))


def cross_fitted(
    confidence: ArrayLike,
    correct: ArrayLike,
    stage_cost: ArrayLike,
    max_drop: float,
    seed: int = 0,
    head_cost: ArrayLike | None = None,
) -> Choice:
    """`joint` as a rule of the dial: on target on unseen data, on average over calibration sets.

    Each fold is measured along the nested greedy path of the other folds, points of equal cost being put together;
    the cost is then lowered as far as this cross-fitted loss allows. That loss is an estimate with a standard error s,
    and what is delivered hardly falls below nothing: the rule aims at x such that E max(0, N(x, s^2)) is
    max_drop - s/2, but no less than 0.8 max_drop. In simulations (3 to 8 exits, n = 1,000 to 10,000, drops
    of 0.25 to 2 %) 0.8 to 1.05 of max_drop was delivered on average.

    Args:
        confidence, correct, stage_cost, head_cost: As for `joint`.
        max_drop: Accuracy that may be given up, a fraction.
        seed: Of the folds.

    Returns:
        Thresholds (M,), and their outcome, cross-fitted: every sample under thresholds that the others chose.

    Raises:
        ThresholdError: Shapes or numbers that do not fit.
    """
    from scipy import optimize  # here, as in paired.py: importing it costs more than the package

    c, r = check_samples(confidence, correct)
    stage, head = check_costs(stage_cost, head_cost, c.shape[1] - 1)
    max_drop = check_max_drop(max_drop)
    path, whole, fitted = _cross_fit(c, r, stage, head, seed)
    # The true loss hardly ever falls along the path: let neighbours steady the estimate.
    step = np.abs(np.diff(whole.cost, prepend=whole.cost[0])) / whole.cost[0] + 1e-6
    loss = optimize.isotonic_regression((fitted.harmful - fitted.helpful) / fitted.n, weights=step).x
    error = np.sqrt(fitted.harmful + fitted.helpful + _PRIOR) / fitted.n
    passes = loss <= _aim(np.maximum(_AIM * max_drop, max_drop - _SLACK * error), error)
    passes[0] = True
    chosen = int(np.flatnonzero(passes)[-1])
    return Choice(path[chosen], fitted.outcome(chosen))


def cost_dial(
    confidence: ArrayLike,
    correct: ArrayLike,
    stage_cost: ArrayLike,
    budget: float,
    seed: int = 0,
    head_cost: ArrayLike | None = None,
) -> Choice:
    """`at_cost` as the dial uses it: from the same path as `cross_fitted`, with the same honest outcome.

    Where that path is nowhere cheap enough, the thresholds and the (then optimistic) outcome are those of `at_cost`.
    """
    c, r = check_samples(confidence, correct)
    stage, head = check_costs(stage_cost, head_cost, c.shape[1] - 1)
    path, whole, fitted = _cross_fit(c, r, stage, head, seed)
    cheap = np.flatnonzero(np.maximum(whole.cost, fitted.cost) <= budget)
    if not len(cheap):
        thresholds = at_cost(c, r, stage, budget, head)
        return Choice(thresholds, outcome(c, r, stage, thresholds, head))
    chosen = int(cheap[(fitted.harmful - fitted.helpful)[cheap].argmin()])
    return Choice(path[chosen], fitted.outcome(chosen))


def _cross_fit(
    c: FloatArray, r: BoolArray, stage: FloatArray, head: FloatArray, seed: int
) -> tuple[FloatArray, Along, Along]:
    """The nested path (K, M) of all samples, measured on them, and measured fold by fold on paths of the others."""
    n = len(c)
    path = nested_path(Problem(c, r, stage, head, GRID))
    whole = follow(path, c, r, stage, head)
    if n == 1:
        path = path[:1]
        whole = follow(path, c, r, stage, head)
        return path, whole, whole
    saved = np.maximum.accumulate(-whole.cost)
    parts = []
    for fold in np.array_split(np.random.default_rng(seed).permutation(n), min(n, 5 if n <= 20_000 else 3)):
        rest = np.ones(n, dtype=np.bool_)
        rest[fold] = False
        steps = nested_path(Problem(c[rest], r[rest], stage, head, GRID))
        # Paths differ in length and order; what their points have in common is how much they save.
        known = np.maximum.accumulate(-follow(steps, c[rest], r[rest], stage, head).cost)
        same = np.maximum(np.searchsorted(known, saved, side='right') - 1, 0)
        parts.append(follow(steps[same], c[fold], r[fold], stage, head))
    return (
        path,
        whole,
        Along(
            harmful=np.sum([p.harmful for p in parts], axis=0),
            helpful=np.sum([p.helpful for p in parts], axis=0),
            exits=np.sum([p.exits for p in parts], axis=0),
            cost=np.sum([p.cost * p.n for p in parts], axis=0) / n,
            n=n,
            full=whole.full,
        ),
    )


def _aim(mean: FloatArray, error: FloatArray) -> FloatArray:
    """x such that a normal of mean x and this standard error, cut off below 0, has the mean asked for."""
    from scipy import special

    u = np.linspace(-8, 8, 4001)
    cut = np.exp(-u * u / 2) / math.sqrt(2 * math.pi) + u * special.ndtr(u)
    ratio = mean / error
    return np.asarray(error * np.where(ratio > 8, ratio, np.interp(ratio, cut, u)))
