from __future__ import annotations

import json

import numpy as np
import pytest

from timm_cascade.errors import ThresholdError
from timm_cascade.thresholds.drift import BINS, ConfidenceShift, DisagreementRise, bins_of, histogram_of


def confidences(rng, n, shift=0.0):
    return 1 / (1 + np.exp(-(3 * rng.standard_normal(n) + 2 + shift)))


def test_exchangeable_images_rarely_alarm_whatever_the_calibration_and_the_ties():
    alarms = 0
    for run in range(200):
        rng = np.random.default_rng(run)
        n = (1, 30, 1000)[run % 3]
        values = confidences(rng, n + 5000)
        if run % 2:
            values = values.round(1)
        shift = ConfidenceShift(histogram_of(values[:n]), np.random.default_rng([1, run]))
        alarms += any(shift.update(values[i : i + 512]).max() >= 10 for i in range(n, n + 5000, 512))
    assert alarms <= 33  # at most 10 % are expected: P(Bin(200, 0.1) > 33) = 0.2 %


def test_pvalues_are_uniform():
    rng = np.random.default_rng(0)
    values = confidences(rng, 20_500).round(2)
    shift = ConfidenceShift(histogram_of(values[:500]), rng)
    p = np.concatenate([shift._pvalues(bins_of(values[i : i + 100])) for i in range(500, 20_500, 100)])
    assert np.abs(np.sort(p) - np.linspace(0, 1, len(p))).max() < 1.7 / np.sqrt(len(p))
    assert abs(np.corrcoef(p[1:], p[:-1])[0, 1]) < 0.03


@pytest.mark.parametrize('sizes', [[1] * 300, [299, 1], [7] * 42 + [6]])
def test_the_size_of_a_batch_does_not_matter(sizes):
    values = confidences(np.random.default_rng(3), 1300)
    whole, parts = (ConfidenceShift(histogram_of(values[:1000]), np.random.default_rng(5)) for _ in range(2))
    expected = whole.update(values[1000:])
    ends = np.cumsum(sizes)
    found = np.concatenate([parts.update(values[1000 + e - s : 1000 + e]) for s, e in zip(sizes, ends, strict=True)])
    np.testing.assert_array_equal(found, expected)
    assert parts.state() == whole.state()


def test_single_images_are_as_batches():
    values = confidences(np.random.default_rng(3), 4000).astype(np.float32)
    values[1500:1510] = np.nan
    counts = 100 * histogram_of(values[:1000])
    for shifted in (values[1000:], values[1000:] ** 9):  # evidence far beyond any alarm is bounded alike
        whole, one = (ConfidenceShift(counts, np.random.default_rng(5), floor=7) for _ in range(2))
        expected = whole.update(shifted)
        np.testing.assert_array_equal([one.update_one(v) for v in shifted.tolist()], expected)
        assert one.state() == whole.state()
    assert 1e200 < expected.max() < np.inf


def test_a_shift_is_found_at_once_and_after_a_long_quiet():
    for quiet in (0, 5000):
        rng = np.random.default_rng(quiet)
        shift = ConfidenceShift(histogram_of(confidences(rng, 5000)), rng)
        before = shift.update(confidences(rng, quiet))
        evidence = shift.update(confidences(rng, 2000, shift=-2.0))
        assert not (before >= 100).any()
        assert 10 < np.argmax(evidence >= 100) < 300 + quiet / 20


def test_nan_and_the_ends_have_bins():
    assert bins_of([np.nan, 0.0, 1.0]).tolist() == [0, 1, BINS - 1]
    rng = np.random.default_rng(0)
    shift = ConfidenceShift(histogram_of(confidences(rng, 500)), rng)
    assert shift.update(np.full(500, np.nan)).max() > 100  # all of them NaN is a change


def test_disagreement_alarms_when_it_rises_and_not_at_the_calibrations_own_rate():
    alarms = 0
    for run in range(200):
        rng = np.random.default_rng(run)
        rise = DisagreementRise(int(rng.binomial(2000, 0.02)), 2000, 0.1)
        alarms += rise.update(rng.random(3000) < 0.02).max() >= 20
    assert alarms <= 33
    rise = DisagreementRise(40, 2000, 0.01)
    assert np.argmax(rise.update(np.random.default_rng(0).random(2000) < 0.1) >= 200) in range(20, 500)
    assert (DisagreementRise(10, 10, 0.01).update([True] * 5) == 1).all()  # all of them did before
    assert np.isfinite(DisagreementRise(0, 1, 0.01).update([True] * 5000)).all()


def test_a_state_goes_through_json_and_continues_exactly():
    rng = np.random.default_rng(1)
    values = confidences(rng, 3000)
    one = ConfidenceShift(histogram_of(values[:1000]), np.random.default_rng(2))
    one.update(values[1000:1777])
    rest = np.random.default_rng()
    rest.bit_generator.state = one.rng.bit_generator.state
    two = ConfidenceShift(histogram_of(values[:1]), rest)
    two.load(json.loads(json.dumps(one.state())))
    np.testing.assert_array_equal(one.update(values[1777:]), two.update(values[1777:]))


def test_bad_input_is_refused():
    with pytest.raises(ThresholdError, match='expected'):
        ConfidenceShift(np.zeros(BINS), np.random.default_rng())
    with pytest.raises(ThresholdError, match='expected'):
        ConfidenceShift([1, 2], np.random.default_rng())
    with pytest.raises(ThresholdError, match='expected a count'):
        DisagreementRise(3, 2, 0.01)
