"""A cascade with thresholds that send images to every exit, and a server around it."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from helpers import between, quarters
from PIL import Image

pytest.importorskip('starlette', reason='pip install "timm-cascade[serve]"')
pytest.importorskip('uvicorn', reason='pip install "timm-cascade[serve]"')
pytest.importorskip('prometheus_client', reason='pip install "timm-cascade[serve]"')

import timm_cascade
from timm_cascade.data.views import eval_transform
from timm_cascade.inference.batch import confidence


@pytest.fixture(scope='session')
def _calibrated(_small):
    small, images = copy.deepcopy(_small), quarters()
    x = torch.stack([eval_transform(small)(images[i][0]) for i in range(len(images))])
    timm_cascade.calibrate(small, images, batch_size=96)
    with torch.no_grad():
        small.thresholds = [between(confidence(e)) for e in small.forward_exits(x)[:-1]]
    small.label_names = images.class_names
    return small


@pytest.fixture
def cascade(_calibrated):
    """Calibrated on `images`, with thresholds between their confidences: no rounding moves one across."""
    return copy.deepcopy(_calibrated)


@pytest.fixture
def pictures(images):
    """The images as PNG files."""
    return [encoded(Image.fromarray(picture)) for picture in np.asarray(images.images)]


def encoded(image, kind='PNG', **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
