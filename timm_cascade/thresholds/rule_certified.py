"""Thresholds with a finite-sample guarantee: one for every setting of the dial at once, or for one setting.

The path of thresholds comes from other data than the samples that test it: from the heads' training features, or from a
quarter of the samples. Along it, each setting walks a fixed sequence of exact tests and stops at the first failure;
the settings share 1 - level (weighted Bonferroni). See docs/pages/explanation/what-the-number-promises.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from ..errors import ThresholdError
from .path import Along, Choice, check_path, first_flip, follow, nested_path
from .pvalues import noninferiority_pvalue, score
from .samples import BoolArray, FloatArray, IntArray, Samples, check_level, check_max_drop, route

__all__ = ['SETTINGS', 'Certificate', 'certified', 'certify', 'settings_for']

# max_drop: its share of 1 - level
SETTINGS = {0.0: 0.03, 0.001: 0.03, 0.0025: 0.15, 0.005: 0.30, 0.01: 0.25, 0.02: 0.14, 0.05: 0.07, 0.1: 0.03}
SCOPES = ('dial', 'setting')
_PROPOSING = 0.25  # share of the samples that proposes where no path is given
_LABEL_FREE, _FEW = 0.5, 5_000  # share of each setting's probability that tests disagreement, below so many samples
_GAINS = 0.01  # see certify
_STARTS = 8  # places of a given path from which max_drop = 0 is walked: its first rows have no flips to test
_TESTS = 60
_SAFE = -4.0  # a predicted score at which the first test passes almost certainly


def certified(
    samples: Samples,
    max_drop: float,
    level: float = 0.9,
    seed: int = 0,
    *,
    scope: str = 'dial',
    path: FloatArray | None = None,
    unlabelled: Samples | None = None,
) -> FloatArray:
    """Thresholds with a guarantee: accuracy falls by at most max_drop, for all max_drop at once.

    It holds with probability `level` over the draw of these samples, for unseen data from the same source, for any n
    and any heads; it says nothing under a shift of the data, nor for samples that are copies of each other.

    Example:
        >>> certified(Samples(confidence, correct, stage_cost), max_drop=0.01)

    Args:
        samples: Calibration samples. With `agreement`, disagreement with the full network is tested too.
        max_drop: Accuracy that may be given up, a fraction. With 0 only exits that better the network can pass.
        level: Confidence level of the guarantee: it holds with at least this probability.
        seed: Seed of the split, where a part of the samples proposes the path.
        scope: 'dial' for the guarantee at every max_drop at once, which is then resolved to the settings in
            `SETTINGS`; 'setting' for this max_drop alone.
        path: (K, M) nested thresholds, the first row all inf, from other data than these samples; by default a quarter
            of the samples proposes one.
        unlabelled: Further samples, with agreement as `correct`; they test disagreement only.

    Returns:
        (M,) float64; all inf where the samples are too few to certify any saving.

    Raises:
        ThresholdError: Numbers out of range, or a path that does not fit.
    """
    settings = settings_for(max_drop, scope)
    return certify(samples, level, settings, path, unlabelled, seed).choice(max_drop).thresholds


def settings_for(max_drop: float, scope: str) -> dict[float, float]:
    """The settings to certify, with their shares of 1 - level: all of the dial, or max_drop alone."""
    max_drop = check_max_drop(max_drop)
    if scope not in SCOPES:
        raise ThresholdError(f"scope is {scope!r}; expected 'dial' (every max_drop at once) or 'setting' (this one).")
    return SETTINGS if scope == 'dial' else {max_drop: 1.0}


@dataclass(frozen=True)
class Certificate:
    """What was certified: a row of a path of thresholds for each setting.

    Attributes:
        settings: Settings of max_drop, rising.
        rows: Row of the path for each setting; 0 closes all exits.
        alphas: (labels, disagreement) error probabilities of each setting.
        path: (K, M) thresholds, nested.
        along: What each row does to the samples that tested.
        predicted: The same on the samples that proposed the path; None where it was given.
        disagreeing: (K,) rate of disagreement with the full network; None where it was not tested.
        by_disagreement: Row that each setting reached by disagreement alone.
        complete: The last row at which every sample has a label or agrees with the full network.
        tested: Share of the samples that tested.
        level: Confidence level.
    """

    settings: tuple[float, ...]
    rows: tuple[int, ...]
    alphas: tuple[tuple[float, float], ...]
    path: FloatArray
    along: Along
    predicted: Along | None
    disagreeing: FloatArray | None
    by_disagreement: tuple[int, ...]
    complete: int
    tested: float
    level: float

    def setting(self, max_drop: float) -> int:
        """Index of the largest setting that is at most max_drop; -1 if there is none."""
        return int(np.searchsorted(self.settings, max_drop * (1 + 1e-12), side='right')) - 1

    def row(self, max_drop: float) -> int:
        """Row of the path for this max_drop."""
        if max_drop >= 1:  # nothing to certify
            return len(self.path) - 1
        index = self.setting(max_drop)
        return self.rows[index] if index >= 0 else 0

    def choice(self, max_drop: float) -> Choice:
        """Thresholds for this max_drop, and their outcome on the samples that tested."""
        row = self.row(check_max_drop(max_drop))
        return Choice(self.path[row], self.along.outcome(row))

    def stopped(self, max_drop: float, along: Along | None = None) -> int:
        """The last row whose labels decide what is certified at max_drop.

        Args:
            max_drop: The setting asked for.
            along: Counts as they might be with all labels, to see how far they would lead.
        """
        complete = self.complete if along is None else len(self.path) - 1
        along = along or self.along
        wide = max(max_drop, _GAINS) if len(self.settings) > 1 else max_drop
        positive = [i for i in range(self.setting(wide) + 1) if self.settings[i] > 0]
        if not positive:
            return len(self.path)
        walks = [_by_labels(along, self.predicted, self.settings[i], self.alphas[i][0], complete) for i in positive]
        reached = max(max(row, self.by_disagreement[i]) for i, (row, _) in zip(positive, walks, strict=True))
        return max(reached, *(stop for _, stop in walks))

    def needed(self, max_drop: float) -> tuple[float, float]:
        """Calibration samples that would certify a saving of 1 %: (with, without labels), roughly; maybe inf."""
        found = [(math.inf, math.inf)]
        usable = self.along.cost <= 0.99 * self.along.cost[0]
        drop = (self.along.harmful - self.along.helpful) / self.along.n
        flips = (self.along.harmful + self.along.helpful) / self.along.n
        for i in range(self.setting(max_drop) + 1):
            d, (by_label, by_disagreement) = self.settings[i], self.alphas[i]
            labels = _count(drop[usable], np.maximum(flips[usable], d), d, by_label) / max(self.tested, 1e-9)
            without = math.inf
            if self.disagreeing is not None:
                rate = self.disagreeing[usable]
                without = _count(rate, np.maximum(rate * (1 - rate), d), d, by_disagreement)
            found.append((labels, without))
        return min(x[0] for x in found), min(x[1] for x in found)


def certify(
    samples: Samples,
    level: float = 0.9,
    settings: Mapping[float, float] = SETTINGS,
    path: FloatArray | None = None,
    unlabelled: Samples | None = None,
    seed: int = 0,
    from_best: bool = False,
    label_free: float | None = None,
    known: BoolArray | None = None,
) -> Certificate:
    """Certifies all settings at once; see `certified`.

    Args:
        settings: Settings of max_drop and their shares of 1 - level, which sum to 1.
        from_best: Count max_drop from the row of the path that is the most accurate on a quarter of the samples,
            instead of from the full network.
        label_free: Share of each setting's error probability that goes to the test of disagreement; by default half
            below 5,000 samples or with further unlabelled ones, else none.
        known: (n,) which samples have labels; by default all. Rows at which another one disagrees with the full
            network are not tested by labels: that only stops a walk earlier, which is always valid.
    """
    level = check_level(level)
    given = path is not None
    split = int(samples.n * _PROPOSING) if path is None or from_best else 0
    drawn = np.random.default_rng(seed).permutation(samples.n)
    rows_tested = drawn[split:] if split else slice(None)
    proposing, testing = samples.take(drawn[:split]) if split else None, samples.take(rows_tested)
    if path is not None:
        path = check_path(path, samples.exits)
    else:
        path = nested_path(proposing) if proposing is not None else np.full((1, samples.exits), np.inf)
    if from_best and proposing is not None:
        along = follow(path, proposing)
        lost = along.harmful - along.helpful
        path = path[int(np.flatnonzero(lost == lost.min())[-1]) :]
        proposing, testing = _relative_to(path[0], proposing), _relative_to(path[0], testing)
    predicted = None if proposing is None or given else follow(path, proposing)
    along, complete = follow(path, testing), len(path) - 1
    if known is not None and testing.agreement is not None and not known.all():
        first = first_flip(path, replace(testing, correct=testing.agreement))
        complete = min(complete, int(first[~known[rows_tested]].min(initial=complete + 1)) - 1)

    # Disagreement bounds the loss from the full network, and needs no labels.
    share, count = 0.0, 0
    disagree: IntArray | None = None
    if testing.agreement is not None and not from_best:
        disagree, count = follow(path, replace(testing, correct=testing.agreement)).harmful, testing.n
        if unlabelled is not None:
            disagree, count = disagree + follow(path, unlabelled).harmful, count + unlabelled.n
        usual = _LABEL_FREE if samples.n < _FEW or unlabelled is not None else 0.0
        share = usual if label_free is None else label_free
    order = sorted(settings)
    alphas = [((1 - level) * settings[d] * (1 - share), (1 - level) * settings[d] * share) for d in order]
    without = [_by_disagreement(disagree, count, d, a) for d, (_, a) in zip(order, alphas, strict=True)]
    with_labels = [
        _by_labels(along, predicted, d, a, complete)[0] if d else 0 for d, (a, _) in zip(order, alphas, strict=True)
    ]
    if order[0] == 0:
        # Gains are looked for where at most one point of loss is certified: labels far beyond are then not needed.
        near = [max(x, y) for d, x, y in zip(order, with_labels, without, strict=True) if 0 < d <= _GAINS]
        reach = max(near, default=len(path) - 1)
        with_labels[0] = _by_labels(along, predicted, 0.0, alphas[0][0], min(reach, complete))[0]
    rows: list[int] = []
    for reached in zip(with_labels, without, strict=True):  # what is certified for a smaller setting holds too
        rows.append(min((*rows[-1:], 0, *reached), key=lambda row: float(along.cost[row])))
    return Certificate(
        settings=tuple(order),
        rows=tuple(rows),
        alphas=tuple(alphas),
        path=path,
        along=along,
        predicted=predicted,
        disagreeing=None if disagree is None else disagree / count,
        by_disagreement=tuple(without),
        complete=complete,
        tested=testing.n / samples.n,
        level=level,
    )


def _relative_to(thresholds: FloatArray, samples: Samples) -> Samples:
    """The samples with the cascade at these thresholds in place of the full network."""
    correct = samples.correct.copy()
    correct[:, -1] = samples.correct[np.arange(samples.n), route(samples.confidence, thresholds)]
    return replace(samples, correct=correct)


def _by_disagreement(disagree: IntArray | None, n: int, max_drop: float, alpha: float) -> int:
    """The last row before the first at which P(Bin(n, max_drop) <= disagreements) exceeds alpha."""
    from scipy import special

    if disagree is None or alpha <= 0 or not 0 < max_drop < 1:
        return 0
    passed = special.bdtr(disagree, n, max_drop) <= alpha
    passed[0] = True
    return len(passed) - 1 if passed.all() else int(np.argmin(passed)) - 1


def _by_labels(along: Along, predicted: Along | None, max_drop: float, alpha: float, last: int) -> tuple[int, int]:
    """(last row certified by labels, last row that a walk came to); those beyond `last` are not tested."""
    reached, stopped = 0, 0
    if len(along.cost) < 2 or alpha <= 0 or max_drop >= 1:
        return reached, stopped
    for walk, share in _walks(along, predicted, max_drop, alpha):
        for row in walk:
            stopped = max(stopped, row)
            if row > last or not passes(int(along.harmful[row]), int(along.helpful[row]), along.n, max_drop, share):
                break
            reached = max(reached, row)
    return reached, stopped


def _walks(
    along: Along, predicted: Along | None, max_drop: float, alpha: float
) -> Iterator[tuple[Sequence[int], float]]:
    """Sequences of rows to test and their shares of alpha; known before the testing samples are looked at."""
    k = len(along.cost)
    if predicted is not None:
        yield _sequence(predicted, along.n, max_drop, alpha), alpha
    elif max_drop > 0:
        yield range(1, k), alpha
    else:
        starts = np.unique(np.linspace(1, k, _STARTS + 1).astype(int)[:-1])
        for start in starts:
            yield range(int(start), k), alpha / len(starts)


def _sequence(predicted: Along, n: int, max_drop: float, alpha: float) -> list[int]:
    """Which points to test, in which order, by what the proposing samples predict."""
    z = score(predicted.harmful, predicted.helpful, predicted.n, max_drop) * math.sqrt(n / predicted.n)
    z[0] = 0.0 if max_drop == 0 else z[0]
    # The first points may be untestable (no flips, few samples) while later ones, which help, are not.
    # A gain is sought where it is most certain, as a loss of 0 leaves no margin to begin with.
    safe = float(z[1:].min())
    start = max(1, int(np.argmax(z <= (safe if max_drop == 0 else max(safe, _SAFE)))))
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


@lru_cache(maxsize=1 << 16)  # walks of several settings, and of several draws, ask for the same counts
def passes(harmful: int, helpful: int, n: int, max_drop: float, alpha: float) -> bool:
    """Whether a loss above max_drop is excluded at error probability alpha."""
    z = float(score(np.array(harmful), np.array(helpful), n, max_drop))
    # Declining to reject is always valid: spare the exact test where it cannot succeed.
    if z > NormalDist().inv_cdf(alpha) + 1:
        return False
    return noninferiority_pvalue(harmful, helpful, n, max_drop, gamma=alpha / 100, alpha=alpha) <= alpha


def _count(loss: FloatArray, variance: FloatArray, max_drop: float, alpha: float) -> float:
    """How many samples see the gap between loss and max_drop as wide as alpha asks, at the best of the rows."""
    ok = loss < max_drop
    if not ok.any() or alpha <= 0:
        return math.inf
    z = NormalDist().inv_cdf(1 - alpha)
    # Without any flip the test passes at (1 - max_drop)^n <= alpha.
    least = math.log(alpha) / math.log1p(-max_drop) if 0 < max_drop < 1 and loss[ok].min() >= 0 else 1.0
    return max(least, float((z * z * variance[ok] / (max_drop - loss[ok]) ** 2).min()))
