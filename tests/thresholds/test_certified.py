from __future__ import annotations

import time
import warnings

import numpy as np
import pytest
from populations import one_point, overconfident, rare_harm, realistic, tied, useless
from scipy import stats
from scipy.special import gammaln

from timm_cascade.thresholds import certified, outcome, per_exit
from timm_cascade.thresholds.path import GRID, follow, nested_path
from timm_cascade.thresholds.problem import Problem
from timm_cascade.thresholds.pvalues import drop_interval, noninferiority_pvalue, score
from timm_cascade.thresholds.rule_certified import _sequence, certify


@pytest.mark.parametrize('margin', [0.0, 0.003, 0.05, 0.2])
@pytest.mark.parametrize('n', [1, 4, 15, 45])
def test_pvalue_is_valid_for_every_alternative(n, margin):
    """All outcomes, a fine grid of flip rates on the border of H0 and inside: P(p <= alpha) <= alpha."""
    x10, x01 = (x.ravel() for x in np.meshgrid(np.arange(n + 1), np.arange(n + 1)))
    x10, x01 = x10[x10 + x01 <= n], x01[x10 + x01 <= n]
    rest = n - x10 - x01
    p = np.array([noninferiority_pvalue(int(a), int(b), n, margin) for a, b in zip(x10, x01, strict=True)])
    ways = gammaln(n + 1) - gammaln(x10 + 1) - gammaln(x01 + 1) - gammaln(rest + 1)
    for extra in (0.0, 0.02, 0.1):
        for q in np.linspace(0, (1 - margin - extra) / 2, 201):
            rates = np.maximum([q + margin + extra, q, 1 - 2 * q - margin - extra], 1e-300)
            mass = np.exp(ways + np.log(rates[0]) * x10 + np.log(rates[1]) * x01 + np.log(rates[2]) * rest)
            for alpha in (0.01, 0.05, 0.1, 0.2):
                assert mass[p <= alpha].sum() <= alpha + 1e-12


@pytest.mark.parametrize('n', [1, 3, 20, 60])
@pytest.mark.parametrize('margin', [0.0, 0.001, 0.02, 0.3, 0.9])
def test_score_grows_with_harm(n, margin):
    for helpful in range(n + 1):
        z = score(np.arange(n - helpful + 1), np.array(helpful), n, margin)
        assert not np.isnan(z).any() and (np.diff(z) >= -1e-9).all()


def test_pvalue_is_near_the_z_test():
    n, margin, alpha = 5000, 0.01, 0.1
    for helpful in (10, 50, 300):
        harmful = max(h for h in range(n) if noninferiority_pvalue(h, helpful, n, margin, alpha / 100) <= alpha)
        drop, flips = (harmful - helpful) / n, (harmful + helpful) / n
        z_margin = stats.norm.isf(alpha) * np.sqrt((flips - drop**2) / n)
        assert (margin - drop) / z_margin < 1.3


def test_interval_covers():
    low, high = drop_interval(0, 0, 100)
    assert low == pytest.approx(-high) and 0.02 < high < 0.04
    assert drop_interval(100, 0, 100)[1] == 1 and drop_interval(0, 100, 100)[0] == -1
    rng, covered = np.random.default_rng(0), 0
    for _ in range(300):
        harmful, helpful, _ = rng.multinomial(400, [0.03, 0.01, 0.96])
        low, high = drop_interval(int(harmful), int(helpful), 400, 0.9)
        assert -1 <= low <= (harmful - helpful) / 400 <= high <= 1
        covered += low <= 0.02 <= high
    assert covered / 300 > 0.85


def share_over(population, n, max_drop, level, draws, exits):
    stage = np.ones(exits + 1)
    size, over, truths = len(population[0]), 0, {}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        for draw in range(draws):
            i = np.random.default_rng(draw).integers(0, size, n)
            t = certified(population[0][i], population[1][i], stage, max_drop, level, seed=draw)
            key = tuple(t)
            if key not in truths:
                truths[key] = outcome(*population, stage, t).drop
            over += truths[key] > max_drop + 1e-12
    return over / draws


CASES = {
    'all_or_nothing': (one_point(10_000, 0.0302, 0.01), 1, 600, 0.02),
    'all_or_nothing_tiny_n': (one_point(10_000, 0.1002, 0.0), 1, 60, 0.1),
    'all_or_nothing_rare': (one_point(10_000, 0.0051, 0.0), 1, 1000, 0.005),
    'rare_harm_among_the_surest': (rare_harm(10_000, 0.006), 1, 1000, 0.005),
    'heavy_ties': (tied(20_000, 3), 3, 400, 0.01),
    'tiny_n': (realistic(20_000, 2), 2, 40, 0.05),
    'useless_exits': (useless(20_000, 2), 2, 400, 0.02),
    'overconfident': (overconfident(20_000, 2), 2, 400, 0.02),
    'harm_and_help': (realistic(20_000, 2, first=0.7, last=0.71), 2, 400, 0.01),
    'no_drop_allowed': (realistic(20_000, 2, first=0.7, last=0.72), 2, 400, 0.0),
}


@pytest.mark.parametrize(
    'name', [name if name.startswith('all') else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_certified_keeps_its_word(name):
    population, exits, n, max_drop = CASES[name]
    draws, alpha = 500, 0.1
    share = share_over(population, n, max_drop, 1 - alpha, draws, exits)
    assert share <= alpha + 2.5 * np.sqrt(alpha * (1 - alpha) / draws)


def nested_per_exit(c, r, stage, max_drop, seed):
    """The simple path: per_exit thresholds at growing laxity, tested in the same way on the same halves."""
    order = np.random.default_rng(seed).permutation(len(c))
    half = len(c) // 2
    a, b = order[:half], order[half:]
    path = np.array(
        [np.full(c.shape[1] - 1, np.inf)] + [per_exit(c[a], r[a], d) for d in np.r_[0, np.geomspace(0.001, 1, 80)]]
    )
    along = follow(path, c[b], r[b], stage, np.zeros(c.shape[1] - 1))
    z = score(along.harmful, along.helpful, len(b), max_drop)
    passed = np.append(z[1:] <= stats.norm.ppf(0.1), False)
    return path[passed.argmin()]


def by_z_test(c, r, stage, max_drop, seed):
    """Our path and sequence on the same halves, but a one-sided z-test, which is valid for large n only."""
    order, head = np.random.default_rng(seed).permutation(len(c)), np.zeros(c.shape[1] - 1)
    a, b = order[: len(c) // 2], order[len(c) // 2 :]
    path = nested_path(Problem(c[a], r[a], stage, head, GRID))
    along = follow(path, c[b], r[b], stage, head)
    last = 0
    z = score(along.harmful, along.helpful, len(b), max_drop)
    for k in _sequence(follow(path, c[a], r[a], stage, head), len(b), max_drop, 0.1):
        if z[k] > stats.norm.ppf(0.1):
            break
        last = k
    return path[last]


@pytest.mark.slow
@pytest.mark.parametrize(('exits', 'n', 'max_drop'), [(3, 1000, 0.01), (3, 6000, 0.005), (8, 6000, 0.01)])
def test_certified_saves_more_than_the_nested_path(exits, n, max_drop):
    population = realistic(40_000, exits, seed=7)
    stage, draws = np.ones(exits + 1), 25
    ours, theirs, margins, z_margins = [], [], [], []
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        for draw in range(draws):
            i = np.random.default_rng(draw).integers(0, 40_000, n)
            c, r = population[0][i], population[1][i]
            truth = outcome(*population, stage, certify(c, r, stage, max_drop, seed=draw).thresholds)
            ours.append(truth.cost)
            theirs.append(outcome(*population, stage, nested_per_exit(c, r, stage, max_drop, draw)).cost)
            margins.append(max_drop - truth.drop)
            z_margins.append(max_drop - outcome(*population, stage, by_z_test(c, r, stage, max_drop, draw)).drop)
    assert np.mean(ours) < np.mean(theirs)
    assert np.mean(margins) < 1.3 * np.mean(z_margins)


@pytest.mark.parametrize('n', [1, 2, 5])
def test_too_few_samples_say_how_many_would_do(n):
    c, r = realistic(n, 2)
    with pytest.warns(UserWarning, match=r'samples certify no saving .* about [0-9,]+ would do'):
        t = certified(c, np.ones_like(r), np.ones(3), 0.01)
    assert np.isinf(t).all()


def test_the_number_named_is_honest():
    population = realistic(40_000, 3, seed=2)
    with pytest.warns(UserWarning, match='would do') as caught:
        certified(population[0][:150], population[1][:150], np.ones(4), 0.01)
    named = int(str(caught[0].message).split('about ')[1].split(' would')[0].replace(',', ''))
    saved = 0
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        for draw in range(20):
            i = np.random.default_rng(draw).integers(0, 40_000, 2 * named)
            saved += np.isfinite(certified(population[0][i], population[1][i], np.ones(4), 0.01)).any()
    assert saved >= 14


def test_borders():
    c, r = realistic(3000, 2)
    with pytest.warns(UserWarning, match='no exit saves anything'):
        assert np.isinf(certified(np.full_like(c, np.nan), r, np.ones(3), 0.1)).all()
    with pytest.warns(UserWarning, match='no exit saves anything'):
        assert np.isinf(certified(c, r, [1.0, 1.0, 0.0], 1.0, head_cost=[1.0, 1.0])).all()
    right = np.ones_like(r)
    assert certified(c, right, np.ones(3), 0.01)[0] <= np.quantile(c[:, 0], 0.02)
    assert np.isfinite(certified(c, r, np.ones(3), 1.0)[0])
    np.testing.assert_array_equal(certified(c, r, np.ones(3), 0.02, seed=3), certified(c, r, np.ones(3), 0.02, seed=3))
    better = r.copy()
    better[:, -1] &= np.arange(3000) % 20 > 0  # the full network is worse: even a drop of 0 lets samples leave
    assert np.isfinite(certified(c, better, np.ones(3), 0.0)).any()


def test_it_is_quick():
    c, r = realistic(50_000, 8)
    best = np.inf
    for _ in range(3):
        start = time.process_time()
        certified(c, r, np.ones(9), 0.01)
        best = min(best, time.process_time() - start)
    assert best < 1
