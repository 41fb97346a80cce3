"""A nested path of threshold vectors, from all exits closed to most permissive: greedily, the cheapest loss first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import TableFormatError, ThresholdError
from ..utils.files import plain
from .samples import FloatArray, IntArray, Outcome, Samples, exit_costs

__all__ = [
    'Along',
    'Choice',
    'check_path',
    'first_flip',
    'follow',
    'nested_path',
    'path_from_json',
    'path_to_json',
    'training_path',
]

# A step's loss counts as its estimate plus this many standard errors (of the sum of flips), so that short lucky steps
# do not win. In simulations weights from 2 to 5 mostly certified more savings than 0.3 or 1.
CAUTION = 4.0
GRID = 256  # candidate thresholds per exit, at most
POINTS = 120  # rows of a path that is stored, at most

Levels = NDArray[np.intp]


class Choice(NamedTuple):
    """Thresholds (M,), and their outcome on samples that did not choose them."""

    thresholds: FloatArray
    measured: Outcome


def nested_path(samples: Samples) -> FloatArray:
    """Thresholds (K, M) of the greedy path, one grid level of one exit per row; the first row closes every exit.

    Lowers one threshold at a time, by as many levels as lose least per cost saved. Every row is at most the one
    before in every exit, so that samples only ever exit earlier: cost falls along the path, and loss rises nearly
    monotonically, which is what a sequence of tests needs.
    """
    search = _Greedy(samples)
    corners = search.run()
    rows = [corners[0]]
    for before, after in pairwise(corners):
        m = int(np.flatnonzero(before != after)[0])
        for level in range(int(before[m]) - 1, int(after[m]) - 1, -1):
            row = before.copy()
            row[m] = level
            rows.append(row)
    columns = [np.append(v, np.inf)[level] for v, level in zip(search.values, np.array(rows).T, strict=True)]
    return np.stack(columns, axis=1).astype(np.float64)


def training_path(samples: Samples) -> FloatArray:
    """The path that is stored with the heads, from their training features: (K, M), K up to 120, equal steps of cost.

    Its order is that of agreement with the full network: on training data the losses are far too small, but the order
    of the thresholds is not misleading. The held-out samples then have nothing to propose, and all of them test.

    Example:
        >>> training_path(Samples(confidence, agreement, stage_cost, head_cost))

    Args:
        samples: The heads' training data, with agreement as `correct`.
    """
    path = nested_path(samples)
    cost = follow(path, samples).cost
    rows = np.searchsorted(-np.minimum.accumulate(cost), -np.linspace(cost[0], cost.min(), POINTS))
    return path[np.unique(np.append(0, np.minimum(rows, len(path) - 1)))]  # the first and the cheapest stay


def check_path(path: FloatArray, exits: int) -> FloatArray:
    """Returns a path as (K, exits) float64.

    Raises:
        ThresholdError: It does not begin with all exits closed, or a threshold rises from row to row.
    """
    path = np.asarray(path, dtype=np.float64)
    if path.ndim != 2 or path.shape[1] != exits or not len(path) or np.isnan(path).any():
        raise ThresholdError(f'path has shape {path.shape}; expected (K, {exits}) thresholds, K >= 1, without NaN.')
    if not np.isposinf(path[0]).all() or (path[1:] > path[:-1]).any():
        raise ThresholdError('a path must begin with all exits closed (inf), and no threshold may rise along it.')
    return path


def path_to_json(path: FloatArray, exits: Sequence[str], heads_hash: str) -> str:
    """A text that `path_from_json` reads; a closed exit is null."""
    from ..formats import PATH_VERSION

    thresholds = plain(path.tolist())
    content = dict(format_version=PATH_VERSION, exits=list(exits), heads_hash=heads_hash, thresholds=thresholds)
    return json.dumps(content, sort_keys=True, allow_nan=False) + '\n'


def path_from_json(text: str, exits: Sequence[str], heads_hash: str, source: str = 'path.json') -> FloatArray:
    """Reads what `path_to_json` wrote for these heads.

    Raises:
        TableFormatError: Not such a text, or a path of other heads.
        ThresholdError: Thresholds that are not a path.
    """
    from ..formats import PathFile, parse

    entry = parse(PathFile, text, source, TableFormatError)
    if (entry.exits, entry.heads_hash) != (list(exits), heads_hash):
        raise TableFormatError(f'{source}: a path of thresholds for other heads; train again, or use its own heads.')
    if {len(row) for row in entry.thresholds} != {len(entry.exits)}:
        raise TableFormatError(f'{source}: rows of thresholds for other numbers of exits than {len(entry.exits)}.')
    return check_path(np.array([[np.inf if t is None else t for t in row] for row in entry.thresholds]), len(exits))


def _grid(confidence: FloatArray) -> FloatArray:
    """At most GRID observed values of one exit, rising, the lowest included, evenly spread over the samples."""
    values, counts = np.unique(confidence[~np.isnan(confidence)], return_counts=True)
    if len(values) <= GRID:
        return values
    below = np.cumsum(counts) - counts
    picked = np.searchsorted(below, np.linspace(0, below[-1], GRID))
    return values[np.unique(picked)]


class _Greedy:
    """For each exit a histogram over levels of the samples that would move if its threshold fell.

    Exit m's candidate thresholds are `values[m][0] < values[m][1] < ...`, all of them observed confidences; level g
    stands for values[m][g], and level len(values[m]) for a closed exit. `codes[m]` gives the level of every sample,
    -1 for NaN, such that a sample exits at level k iff its code is at least k.
    """

    def __init__(self, samples: Samples):
        self.samples = samples
        n, exits = samples.n, samples.exits
        columns = [np.ascontiguousarray(samples.confidence[:, m]) for m in range(exits)]
        self.values = [_grid(c) for c in columns]
        self.closed = np.array([len(v) for v in self.values], dtype=np.intp)
        self.codes = [
            np.where(np.isnan(c), -1, np.searchsorted(v, c, side='right') - 1)
            for c, v in zip(columns, self.values, strict=True)
        ]
        self.correct = np.ascontiguousarray(samples.correct.T).astype(np.int8)
        self.levels = self.closed.copy()
        self.exit = np.full(n, exits)
        self.order = [np.argsort(c, kind='stable') for c in self.codes]
        self.start = [
            np.searchsorted(c[o], np.arange(size + 1))
            for c, o, size in zip(self.codes, self.order, self.closed, strict=True)
        ]
        self.counts = [np.zeros((size, exits + 1)) for size in self.closed]  # by level and present exit
        self.losses = [np.zeros(size) for size in self.closed]
        self.flips = [np.zeros(size) for size in self.closed]
        self._add(np.arange(n), 1, exits)

    def _add(self, rows: IntArray, sign: int, below: int) -> None:
        """Adds, or takes away, what the rows contribute to the exits under `below` and under their own."""
        width = self.samples.exits + 1
        present = self.exit[rows]
        now = self.correct[present, rows]
        for m in range(below):
            keep = (present > m) & (self.codes[m][rows] >= 0)
            chosen = rows[keep]
            if not len(chosen):
                continue
            code, size = self.codes[m][chosen], len(self.losses[m])
            change = now[keep] - self.correct[m][chosen]
            self.counts[m] += sign * np.bincount(code * width + present[keep], minlength=size * width).reshape(
                size, width
            )
            self.losses[m] += sign * np.bincount(code, change, minlength=size)
            self.flips[m] += sign * np.bincount(code, change != 0, minlength=size)

    def _best(self) -> tuple[int, int]:
        """(exit, level) of the step with the least loss per cost saved; exit -1 when no step saves anything."""
        samples = self.samples
        closed = np.where(self.levels >= self.closed, np.inf, 0.0)
        costs = exit_costs(samples.stage_cost, samples.head_cost, closed)
        answered = np.bincount(self.exit, minlength=samples.exits + 1)
        best = (np.inf, -1, 0)
        for m in range(samples.exits):
            top = int(self.levels[m])
            if not top:
                continue
            saved = np.cumsum((self.counts[m][:top, m + 1 :] @ (costs[m + 1 :] - costs[m]))[::-1])
            if top >= self.closed[m]:
                # An open exit's head is run for every sample that reaches it, those that exit there included.
                saved -= samples.head_cost[m] * answered[m + 1 :].sum()
            flips = np.cumsum(self.flips[m][:top][::-1])
            lost = np.cumsum(self.losses[m][:top][::-1]) + CAUTION * np.sqrt(flips + 1)
            with np.errstate(divide='ignore', invalid='ignore'):
                # A gain on balance comes first, the larger the better, whatever it saves.
                ratio = np.where(saved > 0, np.where(lost > 0, lost / saved, lost), np.inf)
            k = int(ratio.argmin())
            if ratio[k] < best[0]:
                best = (float(ratio[k]), m, top - 1 - k)
        return best[1:]

    def run(self) -> list[Levels]:
        path = [self.levels.copy()]
        while True:
            m, level = self._best()
            if m < 0:
                return path
            moved = self.order[m][self.start[m][level] : self.start[m][self.levels[m]]]
            moved = moved[self.exit[moved] > m]
            self._add(moved, -1, self.samples.exits)
            self.exit[moved] = m
            self._add(moved, 1, m)
            self.levels[m] = level
            path.append(self.levels.copy())


@dataclass(frozen=True)
class Along:
    """What each of K nested threshold vectors does to n samples: counts (K,), exits (K, M+1), expected cost (K,)."""

    harmful: IntArray
    helpful: IntArray
    exits: IntArray
    cost: FloatArray
    n: int
    full: int

    def outcome(self, k: int) -> Outcome:
        """Outcome of one of the vectors."""
        return Outcome.of_counts(
            self.full, int(self.harmful[k]), int(self.helpful[k]), self.exits[k], float(self.cost[k])
        )


def follow(path: FloatArray, samples: Samples) -> Along:
    """Measures all of a nested path at once: every sample only moves from later exits to earlier ones.

    Args:
        path: (K, M), no threshold above the one in the row before.
        samples: Samples to measure on.
    """
    steps, exits = path.shape
    confidence, correct, n = samples.confidence, samples.correct, samples.n
    full = correct[:, -1]
    until = np.full(n, steps)  # the row from which on the sample exits before exit m
    harmful, helpful = np.zeros(steps + 1, dtype=np.intp), np.zeros(steps + 1, dtype=np.intp)
    shares = np.zeros((steps + 1, exits + 1), dtype=np.intp)

    def interval(total: NDArray[np.intp], first: IntArray, last: IntArray) -> None:
        total += np.bincount(first, minlength=steps + 1) - np.bincount(last, minlength=steps + 1)

    for m in range(exits):
        first = np.minimum(_first_row(path[:, m], confidence[:, m]), until)
        hit = correct[:, m]
        interval(harmful, first[full & ~hit], until[full & ~hit])
        interval(helpful, first[hit & ~full], until[hit & ~full])
        interval(shares[:, m], first, until)
        until = first
    interval(shares[:, -1], np.zeros(n, dtype=np.intp), until)
    harmful, helpful, shares = (np.cumsum(x, axis=0)[:steps] for x in (harmful, helpful, shares))
    cost = (shares * exit_costs(samples.stage_cost, samples.head_cost, path)).sum(axis=1) / n
    return Along(harmful, helpful, shares, cost, n, int(full.sum()))


def first_flip(path: FloatArray, samples: Samples) -> IntArray:
    """(n,) first row of a nested path at which a sample is answered otherwise than by the final exit; K+1 if at none.

    Args:
        path: (K, M).
        samples: Samples with agreement as `correct`.
    """
    steps = len(path)
    first, until = np.full(samples.n, steps + 1), np.full(samples.n, steps)
    for m in range(samples.exits):
        begin = np.minimum(_first_row(path[:, m], samples.confidence[:, m]), until)
        differs = (begin < until) & ~samples.correct[:, m]
        first[differs] = np.minimum(first, begin)[differs]
        until = begin
    return first


def _first_row(thresholds: FloatArray, confidence: FloatArray) -> IntArray:
    """(n,) first row whose threshold a confidence reaches; the number of rows if none."""
    # Rows rise when read backwards; NaN would sort above everything, and must never exit early.
    value = np.where(np.isnan(confidence), -np.inf, confidence)
    return len(thresholds) - np.searchsorted(thresholds[::-1], value, side='right')
