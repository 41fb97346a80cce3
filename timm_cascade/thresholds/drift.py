"""Evidence that images are no longer like those of the calibration, without labels: test martingales, always valid.

Each process starts at 1 and can be stopped at any time: where nothing has changed, the probability that it ever reaches
1 / false_alarm is at most false_alarm (Ville). See docs/pages/how-to/watch-for-drift.md.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ThresholdError
from .samples import FloatArray, IntArray

__all__ = ['BINS', 'ConfidenceShift', 'DisagreementRise', 'bins_of', 'histogram_of']

# Fixed bins on the logit of the confidence; bin 0 holds NaN.
_LOGITS = np.linspace(-6, 16, 126)
_EDGES = 1 / (1 + np.exp(-_LOGITS))
_EDGE_LIST = _EDGES.tolist()
BINS = len(_EDGES) + 2
_BETS = (-1.8, -0.9, -0.45, 0.45, 0.9, 1.8)
_RATIOS = np.array([1.25, 1.6, 2.0, 3.0, 4.0, 6.0])
_BLOCK = 100  # images between two starts
_TOTAL = 2.11  # the sum over j >= 0 of 1 / ((j + 2) log^2(j + 2)) is 2.1098
_BOUND = 1e200  # evidence far beyond any alarm must not overflow


def bins_of(confidence: ArrayLike) -> IntArray:
    """(n,) bin of each confidence, 0 for NaN."""
    c = np.asarray(confidence, dtype=np.float64)
    return np.where(np.isnan(c), 0, np.searchsorted(_EDGES, c, side='right') + 1)


def histogram_of(confidence: ArrayLike) -> IntArray:
    """(BINS,) counts of confidences (n,)."""
    return np.bincount(bins_of(confidence), minlength=BINS)


@dataclass
class _Mixture:
    """Wealth of several bets, averaged over bets and start times: a new start after every `block` outcomes.

    Single outcomes are computed without numpy, whose calls would take as long as the first stage of a small network.
    Everything is rounded in the same order, however the outcomes are split.

    Attributes:
        wealth: What each bet has won, summed over its starts with their weights.
        begun: Starts so far.
        waiting: Weight of the starts to come, whose wealth is 1.
        seen: Outcomes so far.
    """

    wealth: list[float]
    begun: int = 0
    waiting: float = 1.0
    seen: int = 0

    def update(self, factors: FloatArray, block: int) -> FloatArray:
        """(n,) evidence after each of n outcomes, given the factors (n, bets) they multiply wealth with."""
        found = np.empty(len(factors))
        at = 0
        while at < len(factors):
            if self.seen % block == 0:
                self._start()
            end = min(len(factors), at + block - self.seen % block)
            grown = np.cumprod(np.vstack([self.wealth, factors[at:end]]), axis=0)[1:]
            found[at:end] = grown.mean(axis=1) + self.waiting
            self.wealth = grown[-1].tolist()
            self.seen += end - at
            at = end
        return found

    def update_one(self, factors: list[float], block: int) -> float:
        """`update` for one outcome."""
        if self.seen % block == 0:
            self._start()
        self.seen += 1
        self.wealth = [w * f for w, f in zip(self.wealth, factors, strict=True)]
        total = 0.0
        for w in self.wealth:  # sum() rounds otherwise than numpy
            total += w
        return total / len(self.wealth) + self.waiting

    def _start(self) -> None:
        weight = 1 / ((self.begun + 2) * math.log(self.begun + 2) ** 2) / _TOTAL
        self.wealth = [min(w, _BOUND) + weight for w in self.wealth]
        self.waiting -= weight
        self.begun += 1

    def state(self) -> dict[str, Any]:
        return dict(wealth=list(self.wealth), begun=self.begun, waiting=self.waiting, seen=self.seen)

    @classmethod
    def restored(cls, state: dict[str, Any], bets: int) -> _Mixture:
        wealth = np.asarray(state['wealth'], dtype=np.float64)
        if wealth.shape != (bets,) or not np.isfinite(wealth).all():
            raise ThresholdError(f'the wealth of a drift watch has shape {wealth.shape}; expected ({bets},), finite.')
        return cls(wealth.tolist(), int(state['begun']), float(state['waiting']), int(state['seen']))


class ConfidenceShift:
    """Whether confidences still come from where those of the calibration came from.

    Each image gets a smoothed conformal p-value: the rank of its bin among those of the calibration and of all images
    before it. While all are exchangeable the p-values are independent and uniform, exactly, whatever n and however
    many ties; bets against that are 1 + k (p - 1/2).

    Example:
        >>> shift = ConfidenceShift(histogram_of(calibration.confidence[:, 0]), np.random.default_rng(0))
        >>> shift.update(new_confidences).max() >= 100  # alarm at 1 %

    Args:
        histogram: (BINS,) counts of the calibration's confidences, see `histogram_of`.
        rng: Breaks ties.
        floor: Bins up to this one count as one, where confidences below a threshold are not known.
    """

    def __init__(self, histogram: ArrayLike, rng: np.random.Generator, floor: int = 0) -> None:
        counts = np.asarray(histogram, dtype=np.int64)
        if counts.shape != (BINS,) or (counts < 0).any() or not counts.any():
            raise ThresholdError(f'histogram has shape {counts.shape}; expected ({BINS},) counts, not all zero.')
        self.floor, self.rng, self.total = floor, rng, int(counts.sum())
        self.counts: list[int] = [*[0] * floor, int(counts[: floor + 1].sum()), *counts[floor + 1 :].tolist()]
        self.mixture = _Mixture([0.0] * len(_BETS))

    def update(self, confidence: ArrayLike) -> FloatArray:
        """(n,) evidence after each of n confidences, in their order."""
        bins = np.maximum(bins_of(confidence), self.floor)
        parts = [self._pvalues(bins[i : i + _BLOCK]) for i in range(0, len(bins), _BLOCK)]
        p = np.concatenate([np.empty(0), *parts])
        return self.mixture.update(1 + (p - 0.5)[:, None] * np.array(_BETS), _BLOCK)

    def update_one(self, confidence: float) -> float:
        """The evidence after one confidence: what `update` gives, in a fraction of the time."""
        b = bisect_right(_EDGE_LIST, confidence) + 1 if confidence == confidence else 0
        b = max(b, self.floor)
        equal = self.counts[b]
        step = (sum(self.counts[:b]) + self.rng.random() * (equal + 1)) / (self.total + 1) - 0.5
        self.counts[b] = equal + 1
        self.total += 1
        return self.mixture.update_one([1 + step * bet for bet in _BETS], _BLOCK)

    def _pvalues(self, bins: IntArray) -> NDArray[np.float64]:
        """Ranks among all that came before; those of the same call are counted by comparing them with each other."""
        counts = np.array(self.counts)
        earlier = np.tri(len(bins), k=-1, dtype=np.bool_)
        equal = counts[bins] + ((bins[None] == bins[:, None]) & earlier).sum(axis=1)
        below = (np.cumsum(counts) - counts)[bins] + ((bins[None] < bins[:, None]) & earlier).sum(axis=1)
        before = self.total + np.arange(len(bins))
        self.counts = (counts + np.bincount(bins, minlength=BINS)).tolist()
        self.total += len(bins)
        return (below + self.rng.random(len(bins)) * (equal + 1)) / (before + 1)

    def state(self) -> dict[str, Any]:
        """Plain values that `load` reads."""
        return dict(counts=list(self.counts), floor=self.floor, mixture=self.mixture.state())

    def load(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken."""
        counts = np.asarray(state['counts'], dtype=np.int64)
        if counts.shape != (BINS,) or (counts < 0).any() or not 0 <= int(state['floor']) < BINS:
            raise ThresholdError(
                f'counts of a drift watch have shape {counts.shape}; expected ({BINS},), not negative.'
            )
        mixture = _Mixture.restored(state['mixture'], len(_BETS))
        self.counts, self.total = counts.tolist(), int(counts.sum())
        self.floor, self.mixture = int(state['floor']), mixture


class DisagreementRise:
    """Whether early answers disagree with the full network more often than the calibration says they may.

    The limit is the upper end of a Clopper-Pearson interval for the calibration's count. Its error is half of
    `false_alarm`, so that an alarm takes evidence of 2 / false_alarm.

    Args:
        disagreeing: Calibration samples that are answered otherwise than by the full network at the active thresholds.
        n: Calibration samples.
        false_alarm: Probability of ever alarming while the rate is the calibration's.
    """

    def __init__(self, disagreeing: int, n: int, false_alarm: float) -> None:
        from scipy import special

        if not 0 <= disagreeing <= n or n < 1:
            raise ThresholdError(f'{disagreeing} of {n} samples disagree; expected a count from 0 to n, with n >= 1.')
        beta = false_alarm / 2
        self.limit = 1.0 if disagreeing == n else float(special.betaincinv(disagreeing + 1, n - disagreeing, 1 - beta))
        self.mixture = _Mixture([0.0] * len(_RATIOS))
        self.disagreed = 0

    def update(self, disagrees: ArrayLike) -> FloatArray:
        """(n,) evidence after each of n shadowed images."""
        found = np.asarray(disagrees, dtype=np.bool_)
        self.disagreed += int(found.sum())
        q = self.limit
        if q >= 1:  # nothing exceeds it
            return np.ones(len(found))
        other = np.minimum(_RATIOS * q, (1 + q) / 2)
        return self.mixture.update(np.where(found[:, None], other / q, (1 - other) / (1 - q)), _BLOCK // 4)

    def state(self) -> dict[str, Any]:
        """Plain values that `load` reads."""
        return dict(limit=self.limit, disagreed=self.disagreed, mixture=self.mixture.state())

    def load(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken."""
        limit = float(state['limit'])
        if not 0 < limit <= 1:
            raise ThresholdError(f'the limit of a drift watch is {limit}; expected a rate above 0, at most 1.')
        mixture = _Mixture.restored(state['mixture'], len(_RATIOS))
        self.limit, self.disagreed, self.mixture = limit, int(state['disagreed']), mixture
