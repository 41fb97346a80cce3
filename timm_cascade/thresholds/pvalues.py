"""Statistics of the paired loss: full network correct minus cascade correct, in {-1, 0, 1} for every sample.

Only the two flip counts matter: `harmful` (full network right, cascade wrong; rate p10) and `helpful` (full network
wrong, cascade right; rate p01). The loss is p10 - p01.

scipy is imported where it is used: it would double what importing the package costs.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

__all__ = ['drop_interval', 'noninferiority_pvalue', 'score']

_GRID = 33  # nuisance values tried at first
_CELLS = 4000  # cells of the nuisance's interval at most, before the bound is taken as it is
_TOLERANCE = 0.02  # relative accuracy of a p-value, where no decision asks for more or less


def score(harmful: NDArray, helpful: NDArray, n: int, margin: float) -> NDArray[np.float64]:
    """Tango's score statistic of p10 - p01 = margin: below zero where the loss looks smaller than the margin.

    Args:
        harmful, helpful: Counts, broadcast against each other.
        n: Samples.
        margin: Number in (-1, 1).
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


def noninferiority_pvalue(
    harmful: int, helpful: int, n: int, margin: float, gamma: float = 1e-3, alpha: float | None = None
) -> float:
    """Exact p-value of H0: p10 - p01 >= margin, valid for every n.

    Orders the outcomes by the score statistic and bounds the largest probability of an outcome at least as extreme,
    over a 1 - gamma Clopper-Pearson interval for the nuisance p01, plus gamma (Berger & Boos, JASA 1994). Given p01
    the probability falls as p10 grows, so that the border p10 = p01 + margin is the worst of H0.

    The supremum is bounded, not sampled: outcomes stay extreme when helpful flips are added, so that the probability
    rises with p01 at fixed p10. On a cell [a, b] of p01 it is at most the one at p01 = b, p10 = a + margin; cells
    where that bound is too coarse are split.

    Args:
        harmful, helpful: Flip counts among n samples.
        n: Samples tested.
        margin: The loss that must be excluded, in [0, 1).
        gamma: Probability given to the nuisance's interval; small against the p-values of interest.
        alpha: If given, the bound is only made as fine as it takes to compare with alpha.

    Returns:
        A p-value, at most 2 % too large (with `alpha`, one on the same side of alpha); 1 where the observed loss is
        not smaller than the margin.
    """
    from scipy import special

    if n < 1 or harmful - helpful >= n * margin:
        return 1.0
    low = float(special.betaincinv(helpful, n - helpful + 1, gamma / 2)) if helpful else 0.0
    high = float(special.betaincinv(helpful + 1, n - helpful, 1 - gamma / 2)) if helpful < n else 1.0
    high = min(high, (1 - margin) / 2)
    if low >= high:  # no p01 in the interval is compatible with H0
        return min(1.0, gamma)
    # Standard deviations change as sqrt(q): spread the grid evenly there.
    edges = np.linspace(math.sqrt(low), math.sqrt(high), _GRID) ** 2
    edges[0], edges[-1] = low, high
    region = _Region(float(score(np.array(harmful), np.array(helpful), n, margin)), n, margin, low, high)
    reached = float(region.probability(edges, edges).max())  # the supremum is at least this
    begin, end = edges[:-1], edges[1:]
    bound, settled = region.probability(begin, end), reached
    while True:
        largest = max(settled, float(bound.max(initial=0.0)))
        if alpha is not None and (largest + gamma <= alpha or reached + gamma > alpha):
            break
        coarse = bound > reached * (1 + _TOLERANCE)
        settled = max(settled, float(bound[~coarse].max(initial=0.0)))
        if not coarse.any() or coarse.sum() > _CELLS:
            break
        parts = np.linspace(begin[coarse], end[coarse], 5)
        begin, end = parts[:-1].ravel(), parts[1:].ravel()
        bound = region.probability(begin, end)
        reached = max(reached, float(region.probability(end, end).max()))
    return min(1.0, largest + gamma)


class _Region:
    """Outcomes with a score of at most `observed`: x10 <= bound(x01) for every x01 that matters, bound rising.

    Args:
        observed: The score.
        n, margin: As for the test.
        low, high: Range of p01 that will be asked for.
    """

    def __init__(self, observed: float, n: int, margin: float, low: float, high: float):
        from scipy import special

        self.n, self.margin = n, margin
        tail = 1e-9
        # of a rate of zero some releases of scipy (1.12) call the largest count a quantile
        first = int(np.nan_to_num(special.bdtrik(tail, n, low), nan=0)) if low > 0 else 0
        last = math.ceil(np.nan_to_num(special.bdtrik(1 - tail, n, high), nan=n))
        self.missed = 2 * tail  # probability of an x01 outside, counted as extreme
        x01 = np.arange(max(first, 0), min(last, n) + 1)
        # The score grows with x10: bisect for the largest x10 that is as extreme, for all x01 at once.
        below = np.full(len(x01), -1)
        above = n - x01 + 1
        limit = observed + 1e-9 * max(1.0, abs(observed))
        while (above - below > 1).any():
            middle = (below + above) // 2
            extreme = score(np.maximum(middle, 0), x01, n, margin) <= limit
            extreme |= middle < 0
            below, above = np.where(extreme, middle, below), np.where(extreme, above, middle)
        bound = np.minimum(np.maximum.accumulate(below), n - x01)  # rounding must not make it fall
        self.x01, self.bound = x01[bound >= 0], bound[bound >= 0]
        self.ways = special.gammaln(n + 1) - special.gammaln(self.x01 + 1) - special.gammaln(n - self.x01 + 1)

    def probability(self, begin: NDArray[np.float64], end: NDArray[np.float64]) -> NDArray[np.float64]:
        """Probability of the region at p01 = end, p10 = begin + margin, for each pair."""
        from scipy import special

        given = np.clip((begin + self.margin) / np.maximum(1 - end, 1e-300), 0.0, 1.0)[:, None]
        q, rest = end[:, None], self.n - self.x01
        mass = np.exp(self.ways + special.xlogy(self.x01, q) + special.xlog1py(rest, -q))
        return (mass * special.bdtr(self.bound, rest, given)).sum(axis=1) + self.missed


@lru_cache(maxsize=1 << 12)  # settings that choose the same row of a path ask for the same
def drop_interval(harmful: int, helpful: int, n: int, level: float = 0.9) -> tuple[float, float]:
    """Two-sided score interval for p10 - p01 (Tango, Statistics in Medicine 1998).

    Args:
        harmful, helpful: Flip counts among n samples.
        n: Samples, at least 1.
        level: Probability with which the interval covers.

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
