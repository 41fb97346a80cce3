"""Thresholds of a single call, for all images or one by one."""

import pytest
import torch
from helpers import split_thresholds, whole

import timm_cascade
from timm_cascade import CascadeModel, NotCalibratedError
from timm_cascade.inference.batch import confidence

INF = float('inf')


def by_hand(model, x, rows):
    every = model.forward_exits(x)
    found = torch.stack([confidence(e) for e in every], 1)
    passes = torch.cat([found[:, :-1] >= rows, torch.ones(len(x), 1, dtype=torch.bool)], 1)
    return passes.to(torch.uint8).argmax(1)


@pytest.fixture
def x():
    return torch.randn(12, 1, 16, 16) * torch.linspace(0.2, 3, 12)[:, None, None, None]


@torch.no_grad()
@pytest.mark.parametrize('min_leave', [0.0, 1.0])
def test_a_row_per_image(small, x, min_leave):
    small.min_leave = min_leave
    low = torch.tensor(split_thresholds(small, x)) * 1.0001
    rows = low.repeat(12, 1)
    rows[::3] = INF
    rows[1::3] = 0.0
    out = small.predict(x, thresholds=rows)
    assert torch.equal(out.exit, by_hand(small, x, rows))
    assert set(out.exit[::3].tolist()) == {2} and set(out.exit[1::3].tolist()) == {0}
    assert torch.equal(small.predict(x[4:5], thresholds=rows[4:5]).exit, out.exit[4:5])
    order = torch.randperm(12)
    assert torch.equal(small.predict(x[order], thresholds=rows[order].numpy()).exit, out.exit[order])
    assert small.predict(x).exit.unique().tolist() == [2]  # nothing of it stays


@torch.no_grad()
def test_stream_takes_them_with_each_batch(small, x):
    low = torch.tensor(split_thresholds(small, x)) * 1.0001
    rows = low.repeat(12, 1)
    rows[::2] = INF
    batches = [(x[:4], dict(thresholds=rows[:4])), x[4:8], (x[8:], {'thresholds': rows[8:]})]
    index, _, exits, _ = whole(small.stream(batches, batch_size=3, thresholds=low))
    rows[4:8] = low
    assert torch.equal(exits[index.argsort()], by_hand(small, x, rows))
    _, _, exits, _ = whole(small.stream([x[:6], x[6:]], thresholds=[0.0, 0.0]))
    assert exits.tolist() == [0] * 12


@torch.no_grad()
def test_max_drop_per_image_is_chosen_once(small, images, x, monkeypatch):
    timm_cascade.calibrate(small, images, batch_size=96)
    calls = []
    choose = type(small.dial).choose
    monkeypatch.setattr(type(small.dial), 'choose', lambda *a, **k: calls.append(a[1]) or choose(*a, **k))
    drops = [0.0, 0.05, 1.0] * 4
    for _ in range(3):
        out = small.predict(x, max_drop=drops)
    assert sorted(calls) == [0.0, 0.05, 1.0]
    for i, drop in enumerate(drops[:3]):
        small.set_max_drop(drop)
        assert torch.equal(out.exit[i::3], small.predict(x).exit[i::3])
        assert torch.equal(small.predict(x, max_drop=drop).exit, small.predict(x).exit)
    assert len(calls) == 6
    timm_cascade.calibrate(small, images, batch_size=96)  # another calibration is asked again
    small.predict(x, max_drop=0.05)
    assert len(calls) == 7


@pytest.mark.parametrize(
    'request_, message',
    [
        (dict(max_drop=0.01, thresholds=[0.5, 0.5]), 'expected one of them'),
        (dict(max_drop=[0.01] * 3), r'shape \(3,\) for 12 images'),
        (dict(max_drop=[-0.1] * 12), 'max_drop is -0.1'),
        (dict(max_drop=float('nan')), 'max_drop is nan'),
        (dict(max_drop=1.5), 'max_drop is 1.5'),
        (dict(thresholds=[0.5]), '1 thresholds for 2 exits'),
        (dict(thresholds=torch.zeros(3, 2)), '3 rows for 12 images'),
        (dict(thresholds=torch.zeros(12, 3)), '3 thresholds for 2 exits'),
        (dict(thresholds=[[0.5, float('nan')]] * 12), 'confidence in 0..1'),
    ],
)
def test_bad_requests_change_nothing(small, x, request_, message):
    small.thresholds = [0.25, None]
    with pytest.raises(ValueError, match=message):
        small.predict(x, **request_)
    assert small.thresholds.tolist() == [0.25, INF]


def test_a_request_needs_a_calibration_and_evaluation_mode(small, x):
    with pytest.raises(NotCalibratedError):
        small.predict(x, max_drop=0.01)
    with pytest.raises(ValueError, match=r'model.eval\(\)'):
        small.train().predict(x, thresholds=[0.5, 0.5])
    with pytest.raises(ValueError, match='matrix'):
        small.thresholds = torch.zeros(12, 2)


@torch.no_grad()
def test_an_empty_batch_and_all_closed(small, x):
    assert small.predict(x[:0], max_drop=[]).exit.shape == (0,)
    assert small.predict(x, thresholds=[None, None]).exit.tolist() == [2] * 12
    assert isinstance(small, CascadeModel)
