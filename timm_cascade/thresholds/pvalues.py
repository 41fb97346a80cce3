"""Statistics of the paired loss: full network right minus cascade right, in {-1, 0, 1} for every sample.

Only the two flip counts matter: `harmful` (full right, cascade wrong; rate p10) and `helpful` (full wrong, cascade
right; rate p01). The loss is p10 - p01.

scipy is imported where it is used: it would double what importing the package costs.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

__all__ = ['drop_interval', 'noninferiority_pvalue', 'score']

_GRID = 33  # nuisance values tried at first; the function is smooth on the scale of their spacing


def score(harmful: NDArray, helpful: NDArray, n: int, margin: float) -> NDArray[np.float64]:
    """Tango's score statistic of p10 - p01 = margin: below zero where the loss looks smaller than the margin.

    Args:
        harmful, helpful: Counts, broadcast against each other.
        n: Samples.
        margin: In (-1, 1).
    """
    x10, x01 = np.asarray(harmful, dtype=np.float64), np.asarray(helpful, dtype=np.float64)
    # p01 at its maximum likelihood under the constraint p10 = p01 + margin: a root of 2n q^2 - b q - c.
    b = (x10 + x01) * (1 + margin) - 2 * margin * (x01 + n)
    c = x01 * margin * (1 - margin)
    q = (b + np.sqrt(np.maximum(b * b + 8 * n * c, 0.0))) / (4 * n)
    variance = n * np.maximum(2 * np.maximum(q, max(0.0, -margin)) + margin - margin * margin, 0.0)
    difference = x10 - x01 - n * margin
    with np.errstate(divide='ignore', invalid='ignore'):
        return np.where(difference == 0, 0.0, difference / np.sqrt(variance))


def noninferiority_pvalue(harmful: int, helpful: int, n: int, margin: float, gamma: float = 1e-3) -> float:
    """Exact p-value of H0: p10 - p01 >= margin, valid for every n.

    Orders the outcomes by the score statistic and takes the largest probability of an outcome at least as extreme,
    over a 1 - gamma Clopper-Pearson interval for the nuisance p01, plus gamma (Berger & Boos, JASA 1994). Given p01
    the probability falls as p10 grows, so that the border p10 = p01 + margin is the worst of H0.

    Args:
        harmful, helpful: Flip counts among n samples.
        n: Samples tested.
        margin: The loss that must be excluded, in [0, 1).
        gamma: Probability given to the nuisance's interval; small against the p-values of interest.

    Returns:
        A p-value; 1 where the observed loss is no smaller than the margin.
    """
    from scipy import special

    if n < 1 or harmful - helpful >= n * margin:
        return 1.0
    observed = float(score(np.array(harmful), np.array(helpful), n, margin))
    low = float(special.betaincinv(helpful, n - helpful + 1, gamma / 2)) if helpful else 0.0
    high = float(special.betaincinv(helpful + 1, n - helpful, 1 - gamma / 2)) if helpful < n else 1.0
    high = min(high, (1 - margin) / 2)
    if low >= high:  # no p01 in the interval is compatible with H0
        return min(1.0, gamma)
    # Standard deviations change as sqrt(q): spread the grid evenly there.
    q = np.linspace(math.sqrt(low), math.sqrt(high), _GRID) ** 2
    region = _Region(observed, n, margin, q)
    p = region.probability(q)
    # Between grid points a smooth function exceeds them by at most an eighth of its second difference.
    slack = float(np.abs(np.diff(p, 2)).max()) / 8
    return min(1.0, float(p.max()) + slack + gamma)


class _Region:
    """Outcomes with a score of at most `observed`: x10 <= bound(x01) for every x01 that matters."""

    def __init__(self, observed: float, n: int, margin: float, q: NDArray[np.float64]):
        from scipy import special

        self.n, self.margin = n, margin
        tail = 1e-9
        first = int(np.nan_to_num(special.bdtrik(tail, n, q[0]), nan=0))
        last = math.ceil(np.nan_to_num(special.bdtrik(1 - tail, n, q[-1]), nan=n))
        self.missed = 2 * tail  # probability of an x01 outside, counted as extreme
        self.x01 = np.arange(max(first, 0), min(last, n) + 1)
        # The score grows with x10: bisect for the largest x10 that is as extreme, for all x01 at once.
        low = np.full(len(self.x01), -1)
        high = n - self.x01 + 1
        limit = observed + 1e-9 * max(1.0, abs(observed))
        while (high - low > 1).any():
            middle = (low + high) // 2
            extreme = score(np.maximum(middle, 0), self.x01, n, margin) <= limit
            extreme |= middle < 0
            low, high = np.where(extreme, middle, low), np.where(extreme, high, middle)
        self.bound = low

    def probability(self, q: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of the region at p01 = q, p10 = q + margin."""
        from scipy import special

        keep = self.bound >= 0
        x01, bound = self.x01[keep], self.bound[keep]
        given = np.clip((q + self.margin) / np.maximum(1 - q, 1e-300), 0.0, 1.0)[:, None]
        ways = special.gammaln(self.n + 1) - special.gammaln(x01 + 1) - special.gammaln(self.n - x01 + 1)
        mass = np.exp(ways + special.xlogy(x01, q[:, None]) + special.xlog1py(self.n - x01, -q[:, None]))
        return (mass * special.bdtr(bound, self.n - x01, given)).sum(axis=1) + self.missed


def drop_interval(harmful: int, helpful: int, n: int, level: float = 0.9) -> tuple[float, float]:
    """Two-sided score interval for p10 - p01 (Tango, Statistics in Medicine 1998).

    Args:
        harmful, helpful: Flip counts among n samples.
        n: Samples, at least 1.
        level: Of the interval.

    Returns:
        (low, high), fractions.
    """
    from scipy import optimize

    z = NormalDist().inv_cdf((1 + level) / 2)
    estimate = (harmful - helpful) / n

    def end(sign: int) -> float:
        def gap(margin: float) -> float:
            # margin < 0 is the same question with the roles of the flips exchanged
            if margin >= 0:
                return float(score(np.array(harmful), np.array(helpful), n, margin)) + sign * z
            return -float(score(np.array(helpful), np.array(harmful), n, -margin)) + sign * z

        edge = sign * (1 - 1e-9)
        if gap(edge) * sign > 0 or (edge - estimate) * sign <= 0:
            return float(sign)
        return float(optimize.brentq(gap, estimate, edge))

    return end(-1), end(1)
