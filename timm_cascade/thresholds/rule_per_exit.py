"""The paper's rule: each exit by itself (Berestizshevsky & Even, ICANN 2019, section 3.3)."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .samples import BoolArray, FloatArray, Samples, check_max_drop

__all__ = ['per_exit']


def per_exit(samples: Samples | tuple[ArrayLike, ArrayLike], max_drop: float) -> NDArray[np.float64]:
    """Thresholds by the paper's rule, as its authors' released code computes it.

    For each exit alone, over all samples, alpha_m(d) is the accuracy among samples with confidence >= d, alpha*_m its
    maximum over the observed d, and t[m] = min{d observed : alpha_m(d) >= alpha*_m - max_drop}. Compared in exact
    arithmetic, with max_drop as the decimal that was written.

    The rule takes exits as independent, and one very confident sample often lifts alpha* to 1: max_drop does not bound
    what the cascade loses.

    Example:
        >>> per_exit((confidence, correct), max_drop=0.01)

    Args:
        samples: Calibration samples, or (confidence, correct), both (n, M+1); costs and the final exit's confidence
            are not used.
        max_drop: Accuracy each exit may give up, a fraction.

    Returns:
        (M,) float64, observed confidences; inf for an exit whose confidences are all NaN.

    Raises:
        ThresholdError: Arrays or a max_drop that do not fit.
    """
    given = samples if isinstance(samples, Samples) else Samples(*samples)  # type: ignore[arg-type]
    drop = Fraction(repr(check_max_drop(max_drop)))  # the decimal that was written, not the double nearest to it
    columns = zip(given.confidence.T[:-1], given.correct.T[:-1], strict=True)
    return np.array([_threshold(c, r, drop) for c, r in columns], dtype=np.float64)


def _threshold(confidence: FloatArray, correct: BoolArray, drop: Fraction) -> float:
    seen = ~np.isnan(confidence)
    values, inverse = np.unique(confidence[seen], return_inverse=True)
    if not len(values):
        return np.inf
    # From the top down: how many samples, and how many correct ones, have confidence >= each value.
    total = np.cumsum(np.bincount(inverse, minlength=len(values))[::-1])[::-1]
    right = np.cumsum(np.bincount(inverse[correct[seen]], minlength=len(values))[::-1])[::-1]
    alpha = right / total
    best = int(alpha.argmax())
    bound = Fraction(int(right[best]), int(total[best])) - drop
    # Floats find the candidates, fractions decide.
    for index in np.flatnonzero(alpha >= float(bound) - 1e-9):
        if Fraction(int(right[index]), int(total[index])) >= bound:
            return float(values[index])
    raise AssertionError('the maximum itself passes')  # pragma: no cover
