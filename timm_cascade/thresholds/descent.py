"""Exact search over two exits at a time, all others held fixed."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from .checks import FloatArray, IntArray
from .problem import Levels, Problem

__all__ = ['descend']

Grid = NDArray[np.float64]


def descend(
    problem: Problem, levels: Levels, allowed: float = np.inf, budget: float | None = None, sweeps: int = 10
) -> Levels:
    """Lowers the cost, two thresholds at a time, while no more than `allowed` samples are lost on balance.

    Args:
        problem: The samples and the grid.
        levels: (M,) where to start; need not be feasible.
        allowed: Bound on the loss, a count.
        budget: If given, the roles are exchanged: lowers the loss while the total cost is no more than this.
        sweeps: At most this often through all pairs.

    Returns:
        (M,) levels which no change of any two exits can better; feasible if the start was.
    """
    levels = levels.copy()
    pairs = list(combinations(range(problem.exits), 2)) or [(0, 0)]

    def rank(cost: float, lost: float) -> tuple[float, float, float]:
        """Smaller is better: how far from feasible, then the aim, then the tie-breaker."""
        cost = round(cost / scale, 12)  # sums in different orders differ in the last digits
        if budget is None:
            return max(0.0, lost - allowed), cost, lost
        return max(0.0, cost - round(budget / scale, 12)), lost, cost

    scale = float(problem.n * (problem.stage_cost.sum() or 1.0))
    best = rank(*problem.measure(levels))
    quiet = 0
    for _ in range(sweeps):
        for a, b in pairs:
            cost, lost = tables(problem, levels, a, b)
            aim, other = (cost, lost) if budget is None else (lost, cost)
            feasible = lost <= allowed if budget is None else cost <= budget + 1e-12 * scale
            if feasible.any():
                masked = np.where(feasible, aim, np.inf)
                lowest = float(masked.min())
                tied = np.flatnonzero(masked <= lowest + 1e-12 * abs(lowest))
                # of equals the one that is also better otherwise, then the highest thresholds
                choice = int(tied[other.ravel()[tied] == other.ravel()[tied].min()][-1])
                found = rank(float(cost.ravel()[choice]), float(lost.ravel()[choice]))
                if found < best:
                    best, quiet = found, 0
                    levels[[a, b]] = np.unravel_index(choice, cost.shape) if a != b else choice
                    continue
            quiet += 1
            if quiet >= len(pairs):
                return levels
    return levels


def tables(problem: Problem, levels: Levels, a: int, b: int) -> tuple[Grid, Grid]:
    """Total cost and loss for every level of exits a and b > a; for a == b of that one exit."""
    p = problem
    out = [m for m in range(p.exits) if m not in (a, b)]
    is_open = levels < p.closed
    # Exits other than a and b: where a sample goes if neither of the two takes it.
    default = np.full(p.n, p.exits)
    for m in reversed(out):
        default[p.codes[m] >= levels[m]] = m
    heads = np.where(is_open, p.head_cost, 0.0)
    heads[[a, b]] = 0.0
    costs = p.bare + np.append(np.cumsum(heads), heads.sum())
    right = p.right
    samples = np.arange(p.n)
    full = int(right[-1].sum())
    value = right[default, samples]
    base_cost = float(np.bincount(default, minlength=p.exits + 1) @ costs)
    base_lost = float(full - int(value.sum()))

    reach = np.flatnonzero(default > a)
    x = p.codes[a][reach]
    size = p.closed[a] + 1
    # One exit alone: samples with code >= g leave at a instead.
    gain_cost = _from_top(x, costs[a] - costs[default[reach]], size)
    gain_lost = _from_top(x, value[reach] - right[a][reach], size)
    toll = np.full(size, p.head_cost[a] * len(reach))
    toll[-1] = 0.0
    if a == b:
        return base_cost + gain_cost + toll, base_lost + gain_lost

    later = reach[default[reach] > b]
    x, y = p.codes[a][later], p.codes[b][later]
    rows, columns = size, p.closed[b] + 1
    # cell (x + 1, y + 1), as -1 stands for NaN
    cell = (x + 1) * (columns + 1) + y + 1
    shape, count = (rows + 1, columns + 1), (rows + 1) * (columns + 1)

    def both(weights: FloatArray) -> Grid:
        # [ga, gb]: sum over samples with x < ga and y >= gb
        found = np.bincount(cell, weights, minlength=count).reshape(shape)
        found = np.cumsum(found[:, :0:-1], axis=1)[:, ::-1]  # y >= gb, rows x = -1..
        return np.cumsum(found, axis=0)[:rows]

    cost = base_cost + (gain_cost + toll)[:, None] + both(costs[b] - costs[default[later]])
    lost = base_lost + gain_lost[:, None] + both(value[later] - right[b][later])
    # Head b is paid by all who come so far: those who would pass a, whatever b's level.
    passing = np.cumsum(np.bincount(x + 1, minlength=rows + 1))[:rows]
    cost[:, :-1] += p.head_cost[b] * passing[:, None]
    return cost, lost


def _from_top(code: IntArray, weights: FloatArray, size: int) -> Grid:
    """(size,) sums of the weights with code >= g."""
    keep = code >= 0
    total = np.bincount(code[keep], weights[keep], minlength=size).astype(np.float64)
    return np.cumsum(total[::-1])[::-1]
