from __future__ import annotations

import copy

import pytest
from helpers import quarters

import timm_cascade


@pytest.fixture(scope='session')
def _trained(_small) -> timm_cascade.CascadeModel:
    model = copy.deepcopy(_small)
    timm_cascade.train_heads(model, quarters(), epochs=8, batch_size=32, lr=1e-2)
    return model


@pytest.fixture(scope='session')
def _calibrated(_trained) -> timm_cascade.CascadeModel:
    model = copy.deepcopy(_trained)
    timm_cascade.calibrate(model, quarters())
    return model


@pytest.fixture
def trained(_trained) -> timm_cascade.CascadeModel:
    """The small cascade with heads trained on `images`."""
    return copy.deepcopy(_trained)


@pytest.fixture
def calibrated(_calibrated) -> timm_cascade.CascadeModel:
    """The same, calibrated on them."""
    return copy.deepcopy(_calibrated)
