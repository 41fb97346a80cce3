from __future__ import annotations

import bisect

import numpy as np
import pytest
from populations import in_sorts, one_point, overconfident, rare_harm, realistic, tied, useless
from scipy import stats
from scipy.special import gammaln

from timm_cascade.thresholds import Samples, ThresholdError, certified, outcome, route, training_path
from timm_cascade.thresholds.path import first_flip, follow, nested_path
from timm_cascade.thresholds.pvalues import drop_interval, noninferiority_pvalue, score
from timm_cascade.thresholds.rule_certified import SETTINGS, certify


@pytest.mark.parametrize('margin', [0.0, 0.003, 0.05, 0.2])
@pytest.mark.parametrize('n', [1, 4, 12, 24])
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


def log_ways(n, x10, x01):
    return gammaln(n + 1) - gammaln(x10 + 1) - gammaln(x01 + 1) - gammaln(n - x10 - x01 + 1)


@pytest.mark.parametrize(('n', 'margin'), [(30, 1e-4), (12, 0.003), (20, 0.05)])
def test_pvalue_is_never_below_the_supremum(n, margin):
    """For every outcome: not below the probability of its region at any of 1,000 nuisance values; not much above."""
    x10, x01 = (x.ravel() for x in np.meshgrid(np.arange(n + 1), np.arange(n + 1)))
    x10, x01 = x10[x10 + x01 <= n], x01[x10 + x01 <= n]
    z = score(x10, x01, n, margin)
    q = np.linspace(0, (1 - margin) / 2, 1001)[:, None]
    rates = np.maximum([q + margin, q, 1 - 2 * q - margin], 1e-300)
    mass = np.exp(
        log_ways(n, x10, x01) + np.log(rates[0]) * x10 + np.log(rates[1]) * x01 + np.log(rates[2]) * (n - x10 - x01)
    )
    gamma = 1e-3
    for a, b, observed in zip(x10[::2], x01[::2], z[::2], strict=True):
        if a - b >= n * margin:
            continue
        probability = mass[:, z <= observed + 1e-9 * max(1, abs(observed))].sum(1)
        low = stats.beta.ppf(gamma / 2, b, n - b + 1) if b else 0
        high = stats.beta.ppf(1 - gamma / 2, b + 1, n - b) if b < n else 1
        inside = probability[(q[:, 0] >= low) & (q[:, 0] <= high)].max(initial=0)
        p = noninferiority_pvalue(int(a), int(b), n, margin, gamma)
        assert p >= min(1, inside + gamma) - 1e-9
        assert p <= 1.03 * inside + gamma + 1e-6 or inside == 0
        for alpha in (0.1,):  # a decision needs no finer bound, but must be the same
            assert (noninferiority_pvalue(int(a), int(b), n, margin, gamma, alpha) <= alpha) == (p <= alpha) or (
                abs(p - alpha) < 0.02 * alpha
            )


@pytest.mark.parametrize('n', [1, 3, 20, 60])
@pytest.mark.parametrize('margin', [0.0, 0.001, 0.02, 0.3, 0.9])
def test_score_grows_with_harm(n, margin):
    for helpful in range(n + 1):
        z = score(np.arange(n - helpful + 1), np.array(helpful), n, margin)
        assert not np.isnan(z).any() and (np.diff(z) >= -1e-9).all()


def test_pvalue_is_near_the_z_test():
    n, margin, alpha = 5000, 0.01, 0.1
    for helpful in (10, 50, 300):
        possible = range(int(n * margin) + helpful + 1)
        refused = bisect.bisect(
            possible, alpha, key=lambda h: noninferiority_pvalue(h, helpful, n, margin, alpha / 100, alpha)
        )
        harmful = possible[refused - 1]
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


def share_over(population, n, level, draws, scope, max_drop=None, path=None, grid=None):
    """Share of the draws in which any setting of the dial (or the one asked for) loses more than it says."""
    everyone, over, truths = Samples(*population), 0, {}
    size = everyone.n
    for draw in range(draws):
        i = np.random.default_rng(draw).integers(0, size, n)
        c, r = population[0][i], population[1][i]
        samples = Samples(c, r, agreement=None if len(population) < 5 else population[4][i])
        settings = SETTINGS if scope == 'dial' else {max_drop: 1.0}
        certificate = certify(samples, level, settings, path=path, seed=draw)
        bad = False
        for d in settings if grid is None else grid:
            t = certificate.choice(d).thresholds
            key = tuple(t)
            if key not in truths:
                truths[key] = outcome(everyone, t).drop
            bad |= truths[key] > d + 1e-12
        over += bad
    return over / draws


CASES = {
    'all_or_nothing': (one_point(10_000, 0.0302, 0.01), 600, 0.02),
    'all_or_nothing_tiny_n': (one_point(10_000, 0.1002, 0.0), 60, 0.1),
    'all_or_nothing_rare': (one_point(10_000, 0.0051, 0.0), 1000, 0.005),
    'rare_harm_among_the_most_confident': (rare_harm(10_000, 0.006), 1000, 0.005),
    'heavy_ties': (tied(20_000, 3), 400, 0.01),
    'tiny_n': (realistic(20_000, 2), 40, 0.05),
    'useless_exits': (useless(20_000, 2), 400, 0.02),
    'overconfident': (overconfident(20_000, 2), 400, 0.02),
    'harm_and_help': (realistic(20_000, 2, first=0.7, last=0.71), 400, 0.01),
    'no_drop_allowed': (realistic(20_000, 2, first=0.7, last=0.72), 400, 0.0),
}
FAST = [name if name.startswith('all') else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize('name', FAST)
def test_one_setting_is_over_in_at_most_a_tenth_of_the_draws(name):
    population, n, max_drop = CASES[name]
    draws, alpha = 200, 0.1
    share = share_over(population, n, 1 - alpha, draws, 'setting', max_drop)
    assert share <= alpha + 2.5 * np.sqrt(alpha * (1 - alpha) / draws)


@pytest.mark.parametrize('name', FAST)
def test_any_setting_of_the_dial_is_over_in_at_most_a_tenth_of_the_draws(name):
    population, n, _ = CASES[name]
    draws, alpha = 100, 0.1
    grid = np.append(0, np.geomspace(5e-4, 0.2, 40))
    share = share_over(population, n, 1 - alpha, draws, 'dial', grid=grid)
    assert share <= alpha + 2.5 * np.sqrt(alpha * (1 - alpha) / draws)


def test_a_given_path_is_walked_with_all_samples_and_keeps_the_guarantee():
    """Every sample tests, the path is that of other data; one row is a trap, exactly over what is asked."""
    population = one_point(10_000, 0.0302, 0.01)
    path = np.array([[np.inf], [1.0]])
    for n in (200, 2000):
        share = share_over(population, n, 0.9, 200, 'setting', 0.02, path)
        assert share <= 0.1 + 2.5 * np.sqrt(0.09 / 200)
        assert share_over(population, n, 0.9, 100, 'dial', path=path) <= 0.1 + 2.5 * np.sqrt(0.09 / 100)


def enumerate_dial(n, level, harm, help_):
    """P(some setting is over), exactly: all outcomes of n samples with one exit that all samples take."""
    x10, x01 = (x.ravel() for x in np.meshgrid(np.arange(n + 1), np.arange(n + 1)))
    x10, x01 = x10[x10 + x01 <= n], x01[x10 + x01 <= n]
    rest = 1 - harm - help_
    logs = [x * np.log(max(rate, 1e-300)) for x, rate in ((x10, harm), (x01, help_), (n - x10 - x01, rest))]
    mass, path, over = np.exp(log_ways(n, x10, x01) + sum(logs)), np.array([[np.inf], [1.0]]), 0.0
    for a, b, weight in zip(x10, x01, mass, strict=True):
        if weight < 1e-9:
            over += weight
            continue
        correct = np.ones((n, 2), bool)
        correct[:a, 0], correct[a : a + b, 1] = False, False
        certificate = certify(Samples(np.ones((n, 2)), correct, agreement=correct[:, :1] == correct), level, path=path)
        over += weight * any(certificate.row(d) and harm - help_ > d + 1e-12 for d in certificate.settings)
    return over


@pytest.mark.parametrize(
    ('n', 'harm', 'help_'), [(12, 0.2, 0.02), (20, 0.051, 0.0), (20, 0.15, 0.0499), (16, 0.3, 0.28)]
)
@pytest.mark.parametrize('level', [0.5, 0.9])
def test_the_dial_holds_over_all_outcomes_of_a_few_samples(n, harm, help_, level):
    assert enumerate_dial(n, level, harm, help_) <= 1 - level


def test_shares_of_the_settings_sum_to_one():
    assert sum(SETTINGS.values()) == pytest.approx(1) and list(SETTINGS) == sorted(SETTINGS)


def with_agreement(n, exits, seed, **kwargs):
    c, r = realistic(n, exits, seed, **kwargs)
    rng = np.random.default_rng(seed + 1000)
    # both wrong: the same wrong answer in 60 %
    agreement = (r & r[:, -1:]) | (~r & ~r[:, -1:] & (rng.random(r.shape) < 0.6))
    agreement[:, -1] = True
    return c, r, agreement


def test_a_path_from_elsewhere_certifies_more_than_a_split():
    c, r, a = with_agreement(40_000, 4, 3)
    path = training_path(Samples(c[:20_000], a[:20_000]))
    assert len(path) <= 120 and np.isinf(path[0]).all() and (path[1:] <= path[:-1]).all()
    everyone, costs = Samples(c[20_000:], r[20_000:]), {True: [], False: []}
    for draw in range(4):
        i = 20_000 + np.random.default_rng(draw).integers(0, 20_000, 1000)
        for given in costs:
            samples = Samples(c[i], r[i], agreement=a[i])
            t = certified(samples, 0.01, seed=draw, path=path if given else None)
            costs[given].append(outcome(everyone, t).cost)
    assert np.mean(costs[True]) < np.mean(costs[False])


def test_unlabelled_samples_certify_where_labels_are_few():
    c, r, a = with_agreement(30_000, 3, 4)
    path = training_path(Samples(c[:5000], a[:5000]))
    few = Samples(c[5000:5150], r[5000:5150], agreement=a[5000:5150])
    pool = Samples(c[6000:], a[6000:])
    alone, with_pool = certify(few, path=path), certify(few, path=path, unlabelled=pool)
    assert with_pool.row(0.01) > alone.row(0.01) == 0
    assert with_pool.row(0.01) in with_pool.by_disagreement[: with_pool.setting(0.01) + 1]


def test_settings_in_between_take_the_next_lower_one():
    c, r, a = with_agreement(5000, 3, 5)
    certificate = certify(Samples(c, r, agreement=a))
    assert certificate.row(0.0099) == certificate.row(0.005) and certificate.row(0.01) == certificate.row(0.019)
    costs = [certificate.choice(d).measured.cost for d in sorted(SETTINGS)]
    assert costs == sorted(costs, reverse=True)
    assert certificate.row(1.0) == len(certificate.path) - 1


def test_exits_that_are_better_than_the_network_open_at_a_drop_of_zero():
    c, r = realistic(3000, 2)
    better = r.copy()
    better[:, -1] &= np.arange(3000) % 20 > 0
    for path in (None, training_path(Samples(*realistic(3000, 2, seed=9)))):
        t = certified(Samples(c, better), 0.0, path=path)
        assert np.isfinite(t).any()
        assert outcome(Samples(c, better), t).drop < 0


def test_the_best_point_takes_the_place_of_the_network():
    c, r = realistic(40_000, 3, first=0.85, last=0.8, seed=6)
    everyone = Samples(c, r)
    best = outcome(everyone, certify(everyone, from_best=True).path[0]).accuracy
    assert best > everyone.correct[:, -1].mean() + 0.02
    over = 0
    for draw in range(30):
        i = np.random.default_rng(draw).integers(0, 40_000, 2000)
        certificate = certify(Samples(c[i], r[i]), from_best=True, seed=draw)
        reference = outcome(everyone, certificate.path[0]).accuracy
        assert reference > everyone.correct[:, -1].mean()
        over += any(
            reference - outcome(everyone, certificate.choice(d).thresholds).accuracy > d + 1e-12 for d in SETTINGS
        )
    assert over / 30 <= 0.1 + 2.5 * np.sqrt(0.09 / 30)


def test_first_flip_is_the_first_row_that_answers_otherwise():
    c, _, a = with_agreement(300, 3, 7)
    c[::7, 1] = np.nan
    path = nested_path(Samples(c, a))
    answered = np.array([a[np.arange(300), route(c, t)] for t in path])
    expected = np.where(answered.all(0), len(path) + 1, (~answered).argmax(0))
    np.testing.assert_array_equal(first_flip(path, Samples(c, a)), expected)


def test_follow_is_the_outcome_of_every_row():
    c, r, _ = with_agreement(400, 3, 8)
    samples = Samples(c, r, [1, 2, 3, 4], [0.1, 0.2, 0.3])
    path = nested_path(samples)
    along = follow(path, samples)
    for k in range(0, len(path), max(1, len(path) // 15)):
        got, want = along.outcome(k), outcome(samples, path[k])
        assert got.cost == pytest.approx(want.cost)
        assert (got.harmful, got.helpful, got.exit_shares) == (want.harmful, want.helpful, want.exit_shares)


@pytest.mark.parametrize('n', [1, 2, 3, 50])
@pytest.mark.parametrize('exits', [1, 40])
@pytest.mark.parametrize('fill', ['random', 'right', 'wrong', 'ties', 'nan', 'copies'])
def test_borders(n, exits, fill):
    rng = np.random.default_rng(n)
    c, r = rng.random((n, exits + 1)), rng.random((n, exits + 1)) < 0.7
    if fill in ('right', 'wrong'):
        r[:] = fill == 'right'
    elif fill == 'ties':
        c[:] = 0.5
    elif fill == 'nan':
        c[:] = np.nan
    elif fill == 'copies':
        c[:], r[:] = c[0], r[0]
    samples = Samples(c, r, agreement=r == r[:, -1:])
    for max_drop in (0.0, 1e-6, 0.01, 1.0):
        for level in (0.5, 0.9, 0.999):
            for scope in ('dial', 'setting'):
                t = certified(samples, max_drop, level, scope=scope)
                assert t.shape == (exits,) and not np.isnan(t).any()
                if max_drop <= 0.01 and (1 - max_drop) ** n > 1 - level:  # too few for any proof, even without flips
                    assert np.isinf(t).all() or (r & ~r[:, -1:]).any()


def test_nothing_to_save_and_everything_allowed():
    c, r = realistic(3000, 2)
    assert np.isinf(certified(Samples(np.full_like(c, np.nan), r), 0.1)).all()
    assert np.isinf(certified(Samples(c, r, [1.0, 1.0, 0.0], [1.0, 1.0]), 1.0)).all()
    assert certified(Samples(c, np.ones_like(r)), 0.01)[0] <= np.quantile(c[:, 0], 0.02)
    assert np.isfinite(certified(Samples(c, r), 1.0)[0])
    samples = Samples(c, r)
    np.testing.assert_array_equal(certified(samples, 0.02, seed=3), certified(samples, 0.02, seed=3))


@pytest.mark.parametrize(
    'path', [[[0.5, 0.5]], [[np.inf, np.inf], [0.5, 0.4], [0.6, 0.4]], [[np.inf]], [[np.inf, np.nan]], []]
)
def test_a_path_that_cannot_be_right_is_refused(path):
    c, r = realistic(50, 2)
    with pytest.raises(ThresholdError, match='path'):
        certified(Samples(c, r), 0.1, path=path)
    with pytest.raises(ThresholdError, match="expected 'dial'"):
        certified(Samples(c, r), 0.1, scope='all')


@pytest.mark.slow  # a verdict about time
def test_it_is_quick():
    c, r = realistic(50_000, 8)
    assert in_sorts(lambda: certified(Samples(c, r), 0.01), len(c)) < 75  # about 15, for all settings
