from __future__ import annotations

import os

os.environ.setdefault('OMP_NUM_THREADS', '1')  # tiny networks: more threads only wait for each other
os.environ.setdefault('HF_HUB_OFFLINE', '1')  # the default tests need no network, and must not wait for one

import sys

import numpy as np
import pytest
import timm
import torch
from helpers import ROOT

import timm_cascade
from timm_cascade.data import ImageData

sys.path.insert(0, str(ROOT))  # for scripts.*
FAMILIES = ['test_resnet', 'test_vit', 'test_convnext', 'mobilenetv3_small_050']


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope='session', params=FAMILIES)
def family(request: pytest.FixtureRequest) -> timm_cascade.CascadeModel:
    """A small cascade of each family, 7 classes, three exits, nothing set; whoever sets thresholds puts them back."""
    torch.manual_seed(0)
    return timm.create_model(f'cascade_{request.param}', num_classes=7, exits=3).eval()


@pytest.fixture
def small() -> timm_cascade.CascadeModel:
    """cascade_cifar_resnet20 with two exits for grey 16x16 images."""
    return timm.create_model(
        'cascade_cifar_resnet20',
        in_chans=1,
        num_classes=4,
        exits=['layer1', 'layer2'],
        pretrained_cfg_overlay=dict(input_size=(1, 16, 16), mean=(0.5,), std=(0.25,)),
    ).eval()


@pytest.fixture
def images() -> ImageData:
    """96 grey 16x16 images of 4 classes that a head can tell apart: a bright quarter on noise."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, 96)
    pictures = generator.integers(0, 120, (96, 16, 16), dtype=np.uint8)
    for picture, label in zip(pictures, labels, strict=True):
        y, x = 8 * (label // 2), 8 * (label % 2)
        picture[y : y + 8, x : x + 8] += 100
    return ImageData(pictures, labels, ['a', 'b', 'c', 'd'], 'quarters', 'all')
