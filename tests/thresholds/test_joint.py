from __future__ import annotations

import time

import numpy as np
import pytest
from populations import realistic

from timm_cascade.thresholds import ThresholdError, at_cost, joint, outcome
from timm_cascade.thresholds.rule_joint import cost_dial, cross_fitted


def brute_force(c, r, stage, head):
    """(cost, lost) of all threshold vectors, by plain routing of every sample under every vector."""
    n, exits = len(c), c.shape[1] - 1
    values = [np.append(np.unique(c[:, m]), np.inf) for m in range(exits)]
    shape = [len(v) for v in values]
    # Suffix tables, the last exit first: total cost and right answers of each subset are sums of outer products.
    cost, right = np.zeros(shape), np.zeros(shape)
    leaves = [c[:, m][:, None] >= values[m][None] for m in range(exits)]
    for m in range(exits):
        leaves[m][:, -1] = False
    opened = [np.isfinite(v).astype(float) for v in values]
    grids = np.meshgrid(*opened, indexing='ij')
    letters = 'abc'[:exits]
    for e in range(exits + 1):
        parts = [~leaves[m] for m in range(e)] + ([leaves[e]] if e < exits else [])
        used = letters[: len(parts)]
        spec = ','.join(f'i{x}' for x in used) + f'->{used}'
        full = tuple([slice(None)] * len(used) + [None] * (exits - len(used)))
        count = np.einsum(spec, *[p.astype('f4') for p in parts], optimize=True)[full]
        hits = np.einsum(spec, *[p[r[:, e]].astype('f4') for p in parts], optimize=True)[full]
        price = stage[: e + 1].sum() - sum(head[k] * (1 - grids[k]) for k in range(min(e + 1, exits)))
        cost += count * price
        right += hits
    return cost / n, r[:, -1].sum() - np.round(right).astype(int)


def instances(exits, n, how_many):
    for seed in range(how_many):
        rng = np.random.default_rng(seed)
        if seed % 3:
            c, r = realistic(n, exits, seed)
        else:  # heads that know little, ties
            c, r = (
                np.round(rng.random((n, exits + 1)), 2),
                rng.random((n, exits + 1)) < np.linspace(0.5, 0.8, exits + 1),
            )
        stage = rng.random(exits + 1) + 0.3
        yield c, r, stage, stage[:-1] * rng.random(exits) * 0.3, float(rng.choice([0, 0.005, 0.01, 0.03, 0.1]))


@pytest.mark.parametrize(('exits', 'n', 'how_many'), [(2, 250, 120), pytest.param(3, 100, 40, marks=pytest.mark.slow)])
def test_joint_and_at_cost_are_near_brute_force(exits, n, how_many):
    ratios, gaps = [], []
    for c, r, stage, head, max_drop in instances(exits, n, how_many):
        costs, lost = brute_force(c, r, stage, head)
        t = joint(c, r, stage, max_drop, head)
        got = outcome(c, r, stage, t, head)
        assert got.harmful - got.helpful <= max_drop * n + 1e-9
        for m in range(exits):
            assert np.isinf(t[m]) or t[m] in c[:, m]
        ratios.append(got.cost / costs[lost <= max_drop * n + 1e-9].min())

        budget = np.quantile(costs, 0.1)
        got = outcome(c, r, stage, at_cost(c, r, stage, budget, head), head)
        assert got.cost <= budget * (1 + 1e-9)
        gaps.append((got.harmful - got.helpful - lost[costs <= budget * (1 + 1e-12)].min()) / n)
    assert min(ratios) >= 1 - 1e-9 and np.mean(ratios) <= 1.002 and max(ratios) < 1.1
    assert np.mean(gaps) <= 0.001 and min(gaps) >= -1e-9


def test_exits_that_do_not_pay_are_closed():
    c, r = realistic(400, 2)
    stage = np.array([1.0, 5.0, 1.0])  # the second head costs more than going on
    t = joint(c, r, stage, 1.0, head_cost=[0.1, 4.9])
    assert t[0] == c[:, 0].min() and np.isinf(t[1])
    c[:, 0] = np.nan
    assert np.isinf(joint(c, r, stage, 1.0, head_cost=[0.1, 4.9])).all()


def test_float32_confidences_come_back_exactly():
    c, r = realistic(20_000, 3)
    for t in (joint(c, r, np.ones(4), 0.01), cross_fitted(c, r, np.ones(4), 0.01).thresholds):
        for m in range(3):
            assert np.isinf(t[m]) or (np.float32(t[m]) in c[:, m] and np.float32(t[m]) == t[m])


@pytest.mark.parametrize('max_drop', [0.0, 0.01, 1.0])
@pytest.mark.parametrize('n', [1, 2, 3, 10])
@pytest.mark.parametrize('fill', ['ties', 'nan', 'right', 'wrong'])
def test_borders(n, max_drop, fill):
    c, r = np.random.default_rng(n).random((n, 2)), np.random.default_rng(n).random((n, 2)) < 0.5
    if fill == 'ties':
        c[:] = 0.5
    elif fill == 'nan':
        c[:] = np.nan
    else:
        r[:] = fill == 'right'
    t = joint(c, r, [1, 1], max_drop)
    assert outcome(c, r, [1, 1], t).drop <= max_drop
    if fill in ('right', 'wrong'):
        assert t[0] == c[:, 0].min()  # nothing to lose
    assert cross_fitted(c, r, [1, 1], max_drop).thresholds.shape == (1,)
    at_cost(c, r, [1, 1], 2.0)


def test_a_budget_out_of_reach_is_refused():
    c, r = realistic(200, 2)
    with pytest.raises(ThresholdError, match='cheapest thresholds cost 1 '):
        at_cost(c, r, [1, 1, 1], 0.99)
    with pytest.raises(ThresholdError, match='above 0'):
        at_cost(c, r, [1, 1, 1], np.nan)
    assert outcome(c, r, [1, 1, 1], at_cost(c, r, [1, 1, 1], 1.0)).cost == 1
    assert outcome(c, r, [1, 1, 1], cost_dial(c, r, [1, 1, 1], 1.0).thresholds).cost == 1


def test_cost_dial_keeps_the_budget_and_is_honest():
    population = realistic(60_000, 4, seed=1)
    stage, errors = np.ones(5), []
    for seed in range(20):
        i = np.random.default_rng(seed).integers(0, 60_000, 2000)
        choice = cost_dial(population[0][i], population[1][i], stage, 3.0)
        assert choice.measured.cost <= 3
        truth = outcome(*population, stage, choice.thresholds)
        assert truth.cost < 3.1
        errors.append(choice.measured.drop - truth.drop)
    assert abs(np.mean(errors)) < 0.002


@pytest.mark.slow
@pytest.mark.parametrize(
    ('exits', 'first', 'last', 'n'), [(3, 0.8, 0.93, 1500), (5, 0.66, 0.72, 3000), (4, 0.9, 0.93, 4000)]
)
def test_the_dial_is_on_target_on_unseen_data(exits, first, last, n):
    population = realistic(60_000, exits, seed=exits, first=first, last=last)
    stage, draws = np.ones(exits + 1), 40
    for max_drop in (0.005, 0.01, 0.02):
        lost, estimated = [], []
        for seed in range(draws):
            i = np.random.default_rng(seed).integers(0, 60_000, n)
            choice = cross_fitted(population[0][i], population[1][i], stage, max_drop)
            lost.append(outcome(*population, stage, choice.thresholds).drop / max_drop)
            estimated.append(choice.measured.drop / max_drop)
        error = np.std(lost) / np.sqrt(draws)
        assert np.mean(lost) <= 1 + 2 * error and np.mean(lost) >= 0.5 - 2 * error
        assert abs(np.mean(lost) - np.mean(estimated)) < 0.35


def test_it_is_quick():
    c, r = realistic(50_000, 8)
    stage, head = np.ones(9), np.full(8, 0.05)
    for solve in (joint, lambda *a: cross_fitted(*a[:4], head_cost=a[4])):
        best = np.inf
        for _ in range(3):
            start = time.process_time()
            solve(c, r, stage, 0.01, head)
            best = min(best, time.process_time() - start)
        assert best < 1
