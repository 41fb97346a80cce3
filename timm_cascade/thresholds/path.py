"""A nested path of threshold vectors, from nobody leaves to bold: greedily, the cheapest loss first."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .checks import BoolArray, FloatArray, IntArray
from .problem import Levels, Problem
from .routing import Outcome, exit_costs

__all__ = ['Along', 'follow', 'greedy_path', 'nested_path']

CAUTION = 4.0
GRID = 256


def nested_path(problem: Problem, caution: float = CAUTION) -> FloatArray:
    """Thresholds (K, M) of the greedy path, one grid level of one exit per step; the first row is all inf."""
    corners = greedy_path(problem, caution)
    rows = [corners[0]]
    for before, after in pairwise(corners):
        m = int(np.flatnonzero(before != after)[0])
        for level in range(int(before[m]) - 1, int(after[m]) - 1, -1):
            row = before.copy()
            row[m] = level
            rows.append(row)
    return np.array([problem.thresholds(row) for row in rows])


def greedy_path(problem: Problem, caution: float = CAUTION) -> list[Levels]:
    """Lowers one threshold at a time, by as many levels as lose least per cost saved.

    Every vector is at most the one before in every exit, so that samples only ever leave earlier: cost falls along
    the path, and loss rises nearly monotonically, which is what a sequence of tests needs.

    Args:
        problem: The samples and the grid.
        caution: A step's loss counts as its estimate plus this many standard errors (of the sum of flips), so that
            short lucky steps do not win. 0 is the plain greedy path, near the optimum of these very samples; in
            simulations weights from 2 to 5 mostly certified more savings than 0.3 or 1.

    Returns:
        Level vectors (M,), the first with every exit closed.
    """
    return _Greedy(problem, caution).run()


class _Greedy:
    """For each exit a histogram over levels of the samples that would move if its threshold fell."""

    def __init__(self, problem: Problem, caution: float):
        self.p, self.caution = problem, caution
        self.levels = problem.closed.copy()
        self.exit = np.full(problem.n, problem.exits)
        self.order = [np.argsort(c, kind='stable') for c in problem.codes]
        self.start = [
            np.searchsorted(c[o], np.arange(size + 1))
            for c, o, size in zip(problem.codes, self.order, problem.closed, strict=True)
        ]
        self.counts = [np.zeros((size, problem.exits + 1)) for size in problem.closed]  # by level and present exit
        self.losses = [np.zeros(size) for size in problem.closed]
        self.flips = [np.zeros(size) for size in problem.closed]
        self._add(np.arange(problem.n), 1, problem.exits)

    def _add(self, samples: IntArray, sign: int, below: int) -> None:
        """Adds, or takes away, what the samples contribute to the exits under `below` and under their own."""
        p, width = self.p, self.p.exits + 1
        present = self.exit[samples]
        now = p.right[present, samples]
        for m in range(below):
            keep = (present > m) & (p.codes[m][samples] >= 0)
            chosen = samples[keep]
            if not len(chosen):
                continue
            code, size = p.codes[m][chosen], len(self.losses[m])
            change = now[keep] - p.right[m][chosen]
            self.counts[m] += sign * np.bincount(code * width + present[keep], minlength=size * width).reshape(
                size, width
            )
            self.losses[m] += sign * np.bincount(code, change, minlength=size)
            self.flips[m] += sign * np.bincount(code, change != 0, minlength=size)

    def _best(self) -> tuple[int, int]:
        """(exit, level) of the step with the least loss per cost saved; exit -1 when no step saves anything."""
        p = self.p
        costs = exit_costs(p.stage_cost, p.head_cost, self.levels >= p.closed)
        answered = np.bincount(self.exit, minlength=p.exits + 1)
        best = (np.inf, -1, 0)
        for m in range(p.exits):
            top = int(self.levels[m])
            if not top:
                continue
            saved = np.cumsum((self.counts[m][:top, m + 1 :] @ (costs[m + 1 :] - costs[m]))[::-1])
            if top >= p.closed[m]:
                # Opening the exit makes all who reach it pay for its head; those who leave there pay it too.
                saved -= p.head_cost[m] * answered[m + 1 :].sum()
            flips = np.cumsum(self.flips[m][:top][::-1])
            lost = np.cumsum(self.losses[m][:top][::-1]) + self.caution * np.sqrt(flips + 1)
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
            self._add(moved, -1, self.p.exits)
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
        """Of one of the vectors."""
        lost = int(self.harmful[k] - self.helpful[k])
        return Outcome(
            accuracy=(self.full - lost) / self.n,
            full_accuracy=self.full / self.n,
            drop=lost / self.n,
            cost=float(self.cost[k]),
            exit_shares=tuple((self.exits[k] / self.n).tolist()),
            harmful=int(self.harmful[k]),
            helpful=int(self.helpful[k]),
            n=self.n,
        )


def follow(
    path: FloatArray, confidence: FloatArray, correct: BoolArray, stage_cost: FloatArray, head_cost: FloatArray
) -> Along:
    """Measures all of a nested path at once: every sample only moves from later exits to earlier ones.

    Args:
        path: (K, M), no threshold above the one in the row before.
        confidence, correct: (n, M+1).
        stage_cost, head_cost: (M+1,) and (M,).
    """
    steps, exits = path.shape
    n = len(confidence)
    full = correct[:, -1]
    until = np.full(n, steps)  # the row from which on the sample leaves before exit m
    harmful, helpful = np.zeros(steps + 1, dtype=np.intp), np.zeros(steps + 1, dtype=np.intp)
    shares = np.zeros((steps + 1, exits + 1), dtype=np.intp)

    def interval(total: NDArray[np.intp], first: IntArray, last: IntArray) -> None:
        total += np.bincount(first, minlength=steps + 1) - np.bincount(last, minlength=steps + 1)

    for m in range(exits):
        c = confidence[:, m]
        # Rows rise when read backwards; NaN would sort above everything, and must never leave.
        first = steps - np.searchsorted(path[::-1, m], np.where(np.isnan(c), -np.inf, c), side='right')
        first = np.minimum(first, until)
        right = correct[:, m]
        interval(harmful, first[full & ~right], until[full & ~right])
        interval(helpful, first[right & ~full], until[right & ~full])
        interval(shares[:, m], first, until)
        until = first
    interval(shares[:, -1], np.zeros(n, dtype=np.intp), until)
    harmful, helpful, shares = (np.cumsum(x, axis=0)[:steps] for x in (harmful, helpful, shares))
    paid = np.broadcast_to(stage_cost, (steps, exits + 1)).copy()
    paid[:, :-1] -= np.where(np.isinf(path), head_cost, 0.0)
    cost = (shares * np.cumsum(paid, axis=1)).sum(axis=1) / n
    return Along(harmful, helpful, shares, cost, n, int(full.sum()))
