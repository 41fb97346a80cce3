from __future__ import annotations

import copy
import dataclasses
import json
import threading
import warnings

import numpy as np
import pytest
import timm
import torch

import timm_cascade
from timm_cascade import DriftWatch, NotCalibratedError, TableFormatError


@pytest.fixture(scope='module')
def _model():
    torch.manual_seed(0)
    model = timm.create_model('cascade_test_resnet', num_classes=4, exits=2, in_chans=3).eval()
    data = [(image, int(i % 4)) for i, image in enumerate(torch.randn(300, 3, 32, 32))]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        timm_cascade.calibrate(model, data)
    model.thresholds = np.median(model.calibration.confidence[:, :2], axis=0).tolist()
    return model


@pytest.fixture
def model(_model):
    return copy.deepcopy(_model)


def images(n, scale=1.0, seed=1):
    return scale * torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_predict_gives_the_same_results_with_a_watch_and_counts_images(model):
    watch = DriftWatch(model, shadow=1.0)
    x = images(40)
    for found, expected in zip(model.predict(x, watch=watch), model.predict(x), strict=True):
        assert torch.equal(found, expected)
    model.predict(x[:1], watch=watch)
    model.predict(x[:0], watch=watch)
    seen = watch.compute()
    assert seen['images'] == 41 and seen['shadowed'] == 32  # two groups of 16; the others wait
    full = model.backbone(x).argmax(1)
    differs = (model.predict(x).logits.argmax(1) != full)[:32]
    assert seen['disagreement'] == pytest.approx(differs.float().mean().item())
    assert not watch.warning_detected and not watch.drift_detected


def test_other_images_are_noticed_and_the_thresholds_chosen_again(model):
    watch = DriftWatch(model, shadow=0.5, shadow_alert=1.0)
    x = images(256, scale=30.0)
    for _ in range(8):
        model.predict(x, watch=watch)
    assert watch.warning_detected and watch.compute()['changed_at'] < 1000
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        point = watch.recalibrate(0.5)
    assert point.reference == 'backbone' and model.calibration.provenance['labelled'] is False
    if model.any_open:
        assert not watch.warning_detected and watch.compute()['images'] == 0


@pytest.mark.parametrize('sizes', [[1] * 90, [64, 26], [1, 31, 1, 40, 17]])
def test_the_same_is_found_whatever_the_batches(model, sizes):
    def seen(sizes):
        watch = DriftWatch(model, shadow=0.3, shadow_alert=0.9)
        x = torch.cat([images(30), images(60, scale=30.0, seed=2)])  # the change comes within a batch
        for part in x.split(sizes):
            model.predict(part, watch=watch)
        rows = [agrees.tolist() for _, agrees in watch._rows]
        state = watch.state_dict()
        return watch.compute(), rows, [number for number, _ in watch._waiting], {**state, 'rows': None}

    found = seen(sizes)
    assert found == seen([90])
    assert found[0]['changed_at'] in range(31, 90) and 0 < found[0]['shadowed'] and found[1]


def test_update_takes_results_alone_but_not_in_turn_with_predict(model):
    watch = DriftWatch(model)
    watch.update(model.predict(images(64)))
    assert watch.compute()['images'] == 64 and watch.compute()['shadowed'] == 0
    with pytest.raises(ValueError, match='other of'):
        model.predict(images(4), watch=watch)


def test_a_table_alone_will_do(model):
    thresholds, table = model.thresholds, model.table
    point = dataclasses.replace(table.points[-1], thresholds=tuple(thresholds.tolist()), disagreeing=7)
    model.calibration = None
    model.table = timm_cascade.ThresholdTable.from_json(dataclasses.replace(table, points=(point,)).to_json())
    watch = DriftWatch(model)
    model.predict(images(10), watch=watch)
    assert watch.compute()['disagreement_limit'] is not None
    model.table = dataclasses.replace(table, confidences=None)  # of an earlier version
    with pytest.raises(NotCalibratedError, match='without confidences'):
        DriftWatch(model)


def test_state_goes_through_json(model):
    watch, other = DriftWatch(model, shadow=0.3), DriftWatch(model, seed=5)
    model.predict(images(200), watch=watch)
    other.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert other.compute() == watch.compute()
    watch._waiting.clear()  # not part of the state
    for w in (watch, other):
        model.predict(images(200, seed=2), watch=w)
    assert other.compute() == watch.compute()
    before = other.compute()
    for wrong in ({}, {**watch.state_dict(), 'heads_hash': 'x'}, {**watch.state_dict(), 'shift': {}}):
        with pytest.raises(TableFormatError, match='not the state'):
            other.load_state_dict(wrong)
    assert other.compute() == before


def test_what_cannot_be_watched_is_refused(model):
    with pytest.raises(ValueError, match='false_alarm'):
        DriftWatch(model, false_alarm=0)
    watch = DriftWatch(model)
    with pytest.raises(ValueError, match='thresholds of the model'):
        model.predict(images(2), max_drop=0.01, watch=watch)
    with pytest.raises(NotCalibratedError, match='no image was shadowed'):
        watch.recalibrate(0.01)
    model.thresholds = None
    with pytest.raises(NotCalibratedError, match='all exits are closed'):
        model.predict(images(2), watch=watch)
    with pytest.raises(NotCalibratedError, match='all exits are closed'):
        DriftWatch(model)
    assert watch.compute()['images'] == 0
    model.forget_calibration()
    model.thresholds = [0.5, 0.5]
    with pytest.raises(NotCalibratedError, match='no calibration'):
        DriftWatch(model)


def test_new_thresholds_start_the_comparison_again(model):
    watch = DriftWatch(model)
    model.predict(images(100), watch=watch)
    model.thresholds = [float('inf'), 0.3]
    model.predict(images(100), watch=watch)
    assert watch._reference.exit == 1 and watch._shift.mixture.seen == 100 and watch.compute()['images'] == 200


def test_two_threads_lose_no_image(model):
    watch = DriftWatch(model, shadow=0.5)

    def work(seed):
        for i in range(5):
            model.predict(images(16, seed=seed + i), watch=watch)

    threads = [threading.Thread(target=work, args=(s,)) for s in (10, 20)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert watch.compute()['images'] == 160 == watch._shift.mixture.seen
