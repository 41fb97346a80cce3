"""The release in the repository, on the test images in the repository."""

import numpy as np
import timm
from helpers import ROOT

import timm_cascade

HUB = ROOT / 'hub'


def test_it_does_what_its_card_says():
    model = timm.create_model(
        f'local-dir:{HUB / "releases" / "cascade_cifar_resnet20.fashion_mnist"}', pretrained=True
    ).eval()
    data = timm_cascade.load_data(HUB / 'samples' / 'fashion_mnist_test.parquet')
    assert model.any_open and model.label_names == data.class_names
    report = timm_cascade.evaluate(model, data)
    assert report.full_accuracy > 0.925 and report.change > -0.015  # 94.4 % and -0.3 points on all 10,000
    assert report.macs_share < 0.25
    macs = [model.set_max_drop(d).cost_share for d in (0.0025, 0.005, 0.01, 0.02)]
    assert macs == sorted(macs, reverse=True)
    assert np.array_equal(model.calibration.confidence.shape, (10_000, 9))
