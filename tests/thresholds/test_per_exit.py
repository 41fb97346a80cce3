from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_cascade.thresholds import Samples, ThresholdError, outcome, per_exit, route


def slow_per_exit(confidence, correct, max_drop):
    """The formula, word by word."""
    thresholds = []
    for m in range(confidence.shape[1] - 1):
        column = confidence[:, m]
        observed = sorted({float(d) for d in column if not np.isnan(d)})
        alpha = {}
        for d in observed:
            chosen = [bool(correct[i, m]) for i in range(len(column)) if column[i] >= d]
            alpha[d] = Fraction(sum(chosen), len(chosen))
        best = max(alpha.values(), default=None)
        thresholds.append(next((d for d in observed if alpha[d] >= best - Fraction(str(max_drop))), np.inf))
    return np.array(thresholds)


@st.composite
def samples(draw, max_n=40, max_exits=3):
    n, exits = draw(st.integers(1, max_n)), draw(st.integers(1, max_exits))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(['distinct', 'ties', 'saturated', 'nan', 'all_nan', 'one_value', 'bumpy']))
    c = rng.random((n, exits + 1)).astype(draw(st.sampled_from(['f4', 'f8'])))
    r = rng.random(c.shape) < rng.random()
    if kind == 'ties':
        c = np.round(c, 1)
    elif kind == 'saturated':
        c[c > 0.5] = 1
    elif kind == 'nan':
        c[rng.random(c.shape) < 0.3] = np.nan
    elif kind == 'all_nan':
        c[:, 0] = np.nan
    elif kind == 'one_value':
        c[:] = 0.5
    elif kind == 'bumpy':  # accuracy goes up and down as the threshold rises
        r = (c * 6).astype(int) % 2 == 0
    if draw(st.booleans()):
        r[:, draw(st.integers(0, exits))] = draw(st.booleans())
    return c, r


@given(samples(), st.sampled_from([0, 0.0025, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 1]))
@settings(max_examples=400, deadline=None)
def test_per_exit_equals_the_formula(arrays, max_drop):
    c, r = arrays
    np.testing.assert_array_equal(per_exit((c, r), max_drop), slow_per_exit(c, r, max_drop))


@pytest.mark.parametrize('tenths', range(10))
def test_per_exit_is_not_spoilt_by_rounding(tenths):
    # alpha is 1 at the top and exactly 1 - 0.1 * tenths at the bottom: equality must pass
    c = np.array([[1.0, 0]] + [[0.5, 0]] * 9)
    r = np.ones((10, 2), bool)
    r[1 : 1 + tenths, 0] = False
    assert per_exit(Samples(c, r), tenths / 10)[0] == 0.5
    if tenths:
        assert per_exit(Samples(c, r), tenths / 10 - 1e-9)[0] == 1


def slow_route(confidence, thresholds):
    exits = []
    for row in confidence:
        for m, t in enumerate(thresholds):
            if t != np.inf and row[m] >= t:
                exits.append(m)
                break
        else:
            exits.append(len(thresholds))
    return exits


@given(samples(), st.data())
@settings(max_examples=200, deadline=None)
def test_route_equals_a_slow_loop(arrays, data):
    c, r = arrays
    choices = [*c[~np.isnan(c)].tolist(), np.inf, 0.0, 1.0]
    t = [data.draw(st.sampled_from(choices)) for _ in range(c.shape[1] - 1)]
    expected = slow_route(c, t)
    assert route(c, t).tolist() == expected

    stage, head = np.arange(1.0, c.shape[1] + 1), np.full(len(t), 0.5)
    got = outcome(Samples(c, r, stage, head), t)
    costs = [stage[: e + 1].sum() - sum(h for k, h in enumerate(head) if k <= e and t[k] == np.inf) for e in expected]
    assert got.cost == pytest.approx(np.mean(costs))
    assert got.accuracy == pytest.approx(np.mean([r[i, e] for i, e in enumerate(expected)]))
    assert got.drop == pytest.approx(got.full_accuracy - got.accuracy)
    assert sum(got.exit_shares) == pytest.approx(1) and got.harmful - got.helpful == round(got.drop * len(c))


def test_bad_input_says_what_to_do():
    c, r = np.full((4, 3), 0.5), np.ones((4, 3), bool)
    cases = [
        (lambda: per_exit((c, r[:, :2]), 0.01), r'must agree'),
        (lambda: per_exit((c, np.full((4, 3), 7)), 0.01), r'not the labels'),
        (lambda: per_exit((c[:, :1], r[:, :1]), 0.01), r'M >= 1'),
        (lambda: per_exit((c[:0], r[:0]), 0.01), r'n >= 1'),
        (lambda: per_exit((c + np.inf, r), 0.01), r'infinite'),
        (lambda: per_exit((c, r), -0.1), r'One percentage point is 0.01'),
        (lambda: per_exit((c, r), 5), r'One percentage point is 0.01'),
        (lambda: per_exit((c, r), np.nan), r'NaN'),
        (lambda: per_exit((c, r), 'much'), r'expected a number'),
        (lambda: per_exit((c.astype(str), r), 0), r'expected floats'),
        (lambda: Samples(c, r, agreement=r[:2]), r'agreement has shape'),
        (lambda: outcome(Samples(c, r), [0.5]), r'expected \(2,\)'),
        (lambda: route(c, [0.5]), r'expected \(2,\)'),
        (lambda: route(c, [0.5, np.nan]), r'NaN'),
        (lambda: Samples(c, r, [1, 1]), r'stage_cost has shape'),
        (lambda: Samples(c, r, [1, -1, 1]), r'not negative'),
        (lambda: Samples(c, r, [1, 1, 1], [2, 2]), r'includes the head'),
    ]
    for call, message in cases:
        with pytest.raises(ThresholdError, match=message):
            call()
