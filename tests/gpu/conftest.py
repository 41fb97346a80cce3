"""Tests of what only an accelerator shows: `pytest -m gpu`. TIMM_CASCADE_GPU_TESTS=cpu tries them on a CPU."""

from __future__ import annotations

import os

import pytest
import timm
import torch
from helpers import batch_for

import timm_cascade

ON_CPU = os.environ.get('TIMM_CASCADE_GPU_TESTS') == 'cpu'


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == 'gpu':
            item.add_marker(pytest.mark.gpu)
            if not (torch.cuda.is_available() or ON_CPU):
                item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))


@pytest.fixture
def device() -> torch.device:
    return torch.device('cpu' if ON_CPU else 'cuda')


@pytest.fixture(params=['test_resnet', 'test_vit'])
def model(request: pytest.FixtureRequest, device: torch.device) -> timm_cascade.CascadeModel:
    """A cascade on the device, 7 classes, three exits, nothing set."""
    return timm.create_model(f'cascade_{request.param}', num_classes=7, exits=3).eval().to(device)


@pytest.fixture
def x(model: timm_cascade.CascadeModel, device: torch.device) -> torch.Tensor:
    return batch_for(model, 12)[torch.randperm(12)].to(device)
