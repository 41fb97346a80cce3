"""One calibration set prepared for search: confidences as grid levels, outcomes as sums over samples.

Exit m's candidate thresholds are `values[m][0] < values[m][1] < ...`, all of them observed confidences; level g stands
for values[m][g], and level len(values[m]) for a closed exit. `codes[m]` gives the level of every sample, -1 for NaN,
such that a sample leaves at a level k iff its code is at least k.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .checks import BoolArray, FloatArray
from .routing import exit_costs

__all__ = ['Problem', 'grid']

Levels = NDArray[np.intp]


def grid(confidence: FloatArray, size: int) -> FloatArray:
    """At most `size` observed values of one exit, rising, the lowest included, evenly spread over the samples."""
    values, counts = np.unique(confidence[~np.isnan(confidence)], return_counts=True)
    if len(values) <= size:
        return values
    below = np.cumsum(counts) - counts
    picked = np.searchsorted(below, np.linspace(0, below[-1], size))
    return values[np.unique(picked)]


class Problem:
    """Samples, costs and a grid of candidate thresholds.

    Args:
        confidence: (n, M+1).
        correct: (n, M+1).
        stage_cost: (M+1,).
        head_cost: (M,).
        values: M arrays of candidate thresholds, rising; or the size of the grid to make.
    """

    def __init__(
        self,
        confidence: FloatArray,
        correct: BoolArray,
        stage_cost: FloatArray,
        head_cost: FloatArray,
        values: list[FloatArray] | int,
    ):
        self.n, self.exits = len(confidence), confidence.shape[1] - 1
        columns = [np.ascontiguousarray(confidence[:, m]) for m in range(self.exits)]
        self.values = [grid(c, values) for c in columns] if isinstance(values, int) else values
        self.closed = np.array([len(v) for v in self.values], dtype=np.intp)
        self.codes = [
            np.where(np.isnan(c), -1, np.searchsorted(v, c, side='right') - 1)
            for c, v in zip(columns, self.values, strict=True)
        ]
        self.right = np.ascontiguousarray(correct.T).astype(np.int8)
        self.stage_cost, self.head_cost = stage_cost, head_cost
        # Costs are kept without the exit heads; the heads of open exits are added for the samples that reach them.
        self.bare = exit_costs(stage_cost, head_cost, np.ones(self.exits, dtype=np.bool_))

    def thresholds(self, levels: Levels) -> FloatArray:
        """(M,) float64; inf where closed."""
        pairs = zip(self.values, levels, strict=True)
        return np.array([v[g] if g < len(v) else np.inf for v, g in pairs], dtype=np.float64)

    def levels(self, thresholds: FloatArray) -> Levels:
        """The levels of thresholds; those between two candidates go to the upper one."""
        return np.array([np.searchsorted(v, t) for v, t in zip(self.values, thresholds, strict=True)], dtype=np.intp)

    def left(self, levels: Levels) -> NDArray[np.intp]:
        """(n,) exit of every sample."""
        left = np.full(self.n, self.exits)
        for m in reversed(range(self.exits)):
            left[self.codes[m] >= levels[m]] = m
        return left

    def measure(self, levels: Levels) -> tuple[float, int]:
        """(total cost, samples lost on balance) over all samples."""
        left = self.left(levels)
        costs = exit_costs(self.stage_cost, self.head_cost, levels >= self.closed)
        lost = int(self.right[-1].sum()) - int(self.right[left, np.arange(self.n)].sum())
        return float(np.bincount(left, minlength=self.exits + 1) @ costs), lost
