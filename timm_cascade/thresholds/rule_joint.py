"""Thresholds for all exits together, on target on average: `joint`, and the cost dial on the same path."""

from __future__ import annotations

import math

import numpy as np

from ..errors import ThresholdError
from .path import Along, Choice, follow, nested_path
from .samples import FloatArray, Samples, check_max_drop

__all__ = ['cross_fit', 'joint', 'joint_choice', 'within_budget']

_AIM, _SLACK = 0.8, 0.5  # the rule means to lose max_drop - 0.5 standard errors on average, or 0.8 max_drop if more
Fit = tuple[FloatArray, Along, Along]
_PRIOR = 4.0  # flips added to those seen, as few flips say little about their rate


def joint(samples: Samples, max_drop: float, seed: int = 0) -> FloatArray:
    """Thresholds for all exits together that lose about max_drop on unseen data, on average over calibration sets.

    Each fold is measured along the nested greedy path of the other folds, points of equal cost being put together;
    the cost is then lowered as far as this cross-fitted loss allows. That loss is an estimate with a standard error s,
    and what is delivered hardly falls below nothing: the rule aims at x such that E max(0, N(x, s^2)) is
    max_drop - s/2, but no less than 0.8 max_drop. In simulations (3 to 8 exits, n = 1,000 to 10,000, drops
    of 0.25 to 2 %) 0.8 to 1.05 of max_drop was delivered on average.

    Example:
        >>> joint(Samples(confidence, correct, stage_cost), max_drop=0.01)

    Args:
        samples: Calibration samples.
        max_drop: Accuracy that may be given up, a fraction.
        seed: Seed of the folds.

    Returns:
        (M,) float64, observed confidences; inf for exits that do not pay.

    Raises:
        ThresholdError: A max_drop out of range.
    """
    return joint_choice(samples, max_drop, seed).thresholds


def joint_choice(samples: Samples, max_drop: float, seed: int = 0, fit: Fit | None = None) -> Choice:
    """As `joint`, with the cross-fitted outcome: every sample under thresholds that the others chose.

    `fit` is what `cross_fit` gives for these samples, where it is known already.
    """
    from scipy import optimize  # here, as in pvalues.py: importing it costs more than the package

    max_drop = check_max_drop(max_drop)
    path, whole, fitted = fit or cross_fit(samples, seed)
    # The true loss hardly ever falls along the path: let neighbours steady the estimate.
    step = np.abs(np.diff(whole.cost, prepend=whole.cost[0])) / whole.cost[0] + 1e-6
    loss = optimize.isotonic_regression((fitted.harmful - fitted.helpful) / fitted.n, weights=step).x
    error = np.sqrt(fitted.harmful + fitted.helpful + _PRIOR) / fitted.n
    passes = loss <= _aim(np.maximum(_AIM * max_drop, max_drop - _SLACK * error), error)
    passes[0] = True
    chosen = int(np.flatnonzero(passes)[-1])
    return Choice(path[chosen], fitted.outcome(chosen))


def within_budget(samples: Samples, budget: float, fit: Fit | None = None) -> Choice:
    """The most accurate thresholds of the path whose expected cost is at most `budget`, with a cross-fitted outcome.

    Of equally accurate ones the cheapest; so a larger budget never lowers the accuracy that is expected.

    Raises:
        ThresholdError: No thresholds of the path cost so little; the message says how little they cost.
    """
    if math.isnan(budget) or budget <= 0:
        raise ThresholdError(f'budget is {budget!r}; expected a cost above 0, in the unit of stage_cost.')
    path, whole, fitted = fit or cross_fit(samples, 0)
    most = budget * (1 + 1e-12)
    cheap = np.flatnonzero(np.maximum(whole.cost, fitted.cost) <= most)
    if not len(cheap):
        cheap = np.flatnonzero(whole.cost <= most)
    if not len(cheap):
        raise ThresholdError(
            f'a budget of {budget:g} cannot be kept: the cheapest thresholds cost {whole.cost.min():g} per sample. '
            f'Allow more, or add an earlier exit.'
        )
    loss = (fitted.harmful - fitted.helpful)[cheap]
    chosen = int(cheap[np.flatnonzero(loss == loss.min())[-1]])
    return Choice(path[chosen], fitted.outcome(chosen))


def cross_fit(samples: Samples, seed: int) -> Fit:
    """The nested path (K, M) of all samples, measured on them, and measured fold by fold on paths of the others."""
    n, path = samples.n, nested_path(samples)
    if n == 1:
        path = path[:1]
        return path, follow(path, samples), follow(path, samples)
    whole = follow(path, samples)
    saved = np.maximum.accumulate(-whole.cost)
    parts = []
    for fold in np.array_split(np.random.default_rng(seed).permutation(n), min(n, 5 if n <= 20_000 else 3)):
        rest = np.ones(n, dtype=np.bool_)
        rest[fold] = False
        others = samples.take(rest)
        steps = nested_path(others)
        # Paths differ in length and order; what their points have in common is how much they save.
        known = np.maximum.accumulate(-follow(steps, others).cost)
        same = np.maximum(np.searchsorted(known, saved, side='right') - 1, 0)
        parts.append(follow(steps[same], samples.take(fold)))
    fitted = Along(
        harmful=np.sum([p.harmful for p in parts], axis=0),
        helpful=np.sum([p.helpful for p in parts], axis=0),
        exits=np.sum([p.exits for p in parts], axis=0),
        cost=np.sum([p.cost * p.n for p in parts], axis=0) / n,
        n=n,
        full=whole.full,
    )
    return path, whole, fitted


def _aim(mean: FloatArray, error: FloatArray) -> FloatArray:
    """x such that a normal of mean x and this standard error, cut off below 0, has the mean asked for."""
    from scipy import special

    u = np.linspace(-8, 8, 4001)
    cut = np.exp(-u * u / 2) / math.sqrt(2 * math.pi) + u * special.ndtr(u)
    ratio = mean / error
    return np.asarray(error * np.where(ratio > 8, ratio, np.interp(ratio, cut, u)))
