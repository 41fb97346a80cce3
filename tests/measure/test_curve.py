import sys

import numpy as np
import pytest

import timm_cascade
from timm_cascade.measure.calibrate import record
from timm_cascade.measure.curve import curve, curve_of, plot_curve


def test_every_point_is_what_evaluate_measures(calibrated, images):
    points = curve(calibrated, images)
    assert len(points) > 1 and [p.macs_share for p in points] == sorted(p.macs_share for p in points)
    for point in (points[0], points[-1]):
        calibrated.thresholds = point.thresholds
        report = timm_cascade.evaluate(calibrated, images)
        assert report.accuracy == pytest.approx(point.accuracy, abs=1e-9)
        assert report.macs_share == pytest.approx(point.macs_share, abs=1e-9)
        assert report.exit_shares == pytest.approx(point.exit_shares)
    assert any(p.exit_shares[-1] == 1 and p.change == 0 and p.macs_share == pytest.approx(1) for p in points)


def test_it_needs_a_calibration_and_labels(small, images):
    seen = record(small, images)
    with pytest.raises(timm_cascade.NotCalibratedError, match='calibrate'):
        curve_of(small, seen)
    timm_cascade.calibrate(small, images)
    del seen['correct']
    with pytest.raises(ValueError, match='no labels'):
        curve_of(small, seen)


def test_the_picture(calibrated, images, tmp_path, monkeypatch):
    points = curve(calibrated, images)
    plot_curve(points, tmp_path / 'curve.png')
    assert (tmp_path / 'curve.png').read_bytes()[:4] == b'\x89PNG'
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with pytest.raises(ImportError):
        plot_curve(points, tmp_path / 'other.png')
    assert not (tmp_path / 'other.png').exists() and np.isfinite(points[0].accuracy)
