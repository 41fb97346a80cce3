from __future__ import annotations

import pytest

import timm_cascade

pytest.importorskip('onnxscript')
pytest.importorskip('onnxruntime')

from exporters.cases import calibrate_by_hand, small_model


@pytest.fixture(scope='session')
def calibrated():
    """A calibrated cascade with an open exit; its state must not be changed."""
    model = calibrate_by_hand(small_model())
    model.set_max_drop(0.05)
    assert model.any_open
    return model


@pytest.fixture(scope='session')
def exported(calibrated, tmp_path_factory):
    return timm_cascade.export(calibrated, tmp_path_factory.mktemp('export') / 'cascade', single_file='batch')
