"""Seconds as costs."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import Stubborn, run

import timm_cascade
from timm_cascade import hub
from timm_cascade.inference import stopwatch
from timm_cascade.thresholds import (
    Profile,
    TableFormatError,
    in_time,
    outcome,
    profiles_from_json,
    profiles_to_json,
    savings,
)


def made(model, stages, heads, **kwargs):
    """A profile of this machine with these seconds."""
    measured = timm_cascade.profile(model, batch_size=2, repeats=1)
    model.profiles = [
        replace(
            measured,
            stage_seconds=stages,
            head_seconds=heads,
            cut_seconds=(0.0, 0.0),
            backbone_seconds=sum(stages),
            **kwargs,
        )
    ]
    return model.profiles[0]


def test_what_takes_longer_is_seen_to(small, monkeypatch):
    now = [0.0]

    def passing(seconds):
        def wait(*args):
            now[0] += seconds

        return wait

    def clock(device):  # a tick whenever it is looked at
        passing(1)()
        return now[0]

    monkeypatch.setattr(stopwatch, 'clock', clock)
    handles = [
        small.backbone.layer1.register_forward_pre_hook(passing(20)),
        small.backbone.layer3.register_forward_pre_hook(passing(60)),
        small.heads[1].register_forward_pre_hook(passing(40)),
    ]
    small.train()
    p = timm_cascade.profile(small, batch_size=2, repeats=3)
    for h in handles:
        h.remove()
    assert small.training and small.profiles == [p]
    assert [2 * s for s in p.stage_seconds] == [21, 1, 61]  # of a batch
    assert [2 * s for s in p.head_seconds] == [1, 41] and [2 * s for s in p.cut_seconds] == [1, 1]
    assert 2 * p.backbone_seconds == 81
    assert np.allclose(p.stage_cost, np.add(p.stage_seconds, [*p.head_cost, 0]))
    assert p.exits == ('layer1', 'layer2') and p.batch_size == 2 and p.dtype == 'float32' and not p.compiled
    timm_cascade.profile(small, batch_size=2, repeats=1)
    timm_cascade.profile(small, batch_size=3, repeats=1)
    assert [q.batch_size for q in small.profiles] == [2, 3] and small.profiles[0] != p


def test_shares_from_which_an_exit_pays(small):
    p = made(small, (4.0, 3.0, 1.0), (1.0, 2.0))
    assert p.rest.tolist() == [4.0, 1.0]
    assert p.break_even.tolist() == [0.25, 2.0]  # a head of 1 before a rest of 4; one of 2 before a rest of 1
    p = replace(p, cut_seconds=(1.0, 1.0))
    assert np.allclose(p.cut_share, [1 / 5, 1 / 2]) and np.allclose(p.break_even, [2 / 5, 3 / 2])


def test_the_dial_saves_time(calibrated):
    made(calibrated, (1e-3, 1e-3, 8e-3), (1e-5, 1e-5))
    in_macs = calibrated.set_max_drop(0.05, rule='joint')
    point = calibrated.set_max_drop(0.05, rule='joint', cost='time')
    assert point.cost < 1e-2 and 0 < point.cost_share <= 1 < in_macs.cost
    assert calibrated.thresholds.tolist() == pytest.approx(list(np.float32(point.thresholds)))
    # a head that takes longer than everything behind it: saving time keeps this exit closed
    made(calibrated, (1e-3, 1e-3, 1e-3), (9e-3, 1e-5))
    assert np.isinf(calibrated.set_max_drop(0.05, rule='joint', cost='time').thresholds[0])
    calibration = in_time(calibrated.calibration, calibrated.profiles[0])
    best = outcome(calibration.samples(), calibrated.thresholds.numpy())
    macs = outcome(calibration.samples(), in_macs.thresholds)
    assert best.cost <= macs.cost
    point = calibrated.set_cost(0.9, cost='time')
    assert point.cost_share <= 0.9 + 1e-9


def test_exits_that_save_macs_but_no_time_are_named(calibrated):
    made(calibrated, (1e-3, 1e-3, 1e-3), (9e-3, 1e-6))
    calibrated.thresholds = [0.3, None]
    (saving,) = savings(calibrated.calibration, calibrated.profiles[0], calibrated.thresholds)
    assert saving.exit == 'layer1' and saving.macs > 0 > saving.seconds
    (text,) = calibrated.exits_without_time()
    assert text.startswith('exit layer1 saves') and 'costs' in text
    made(calibrated, (1e-3, 1e-3, 1e-3), (1e-6, 1e-6))
    assert calibrated.exits_without_time() == []
    made(calibrated, (1e-3, 1e-3, 1e-3), (9e-3, 9e-3))
    with pytest.warns(UserWarning, match='saves .* MACs per image and costs'):
        calibrated.set_max_drop(0.05, rule='joint')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        calibrated.set_max_drop(0.05, rule='joint', cost='time')
    assert not calibrated.any_open


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Where profiles are kept on this machine, whose clock is steady."""
    steady = dict(
        stage_seconds=(1e-3, 1e-3, 8e-3), head_seconds=(1e-5, 1e-5), cut_seconds=(0.0, 0.0), backbone_seconds=1e-2
    )
    measure_soon = stopwatch.measure_soon
    monkeypatch.setattr('timm_cascade.model.measure_soon', lambda model: {**measure_soon(model), **steady})
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    return tmp_path / 'cache' / 'timm_cascade' / 'profiles'


def test_time_is_measured_once_where_it_was_not(calibrated, store):
    with pytest.warns(UserWarning, match='was not profiled on this machine') as said:
        point = calibrated.set_max_drop(0.05, rule='joint', cost='time')
    assert len(said) == 1 and said[0].filename == __file__
    (p,) = calibrated.profiles
    assert 0 < point.cost_share <= 1 and p.exits == ('layer1', 'layer2') and min(p.stage_seconds) > 0
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        calibrated.set_cost(0.9, cost='time')
        calibrated.profiles = []
        calibrated.set_max_drop(0.05, rule='joint', cost='time')  # stored, as for another process
    assert calibrated.profiles == [p]
    (file,) = store.iterdir()
    for damage in ('{', profiles_to_json([p, p]), profiles_to_json([replace(p, device='another')])):
        file.write_text(damage)
        calibrated.profiles = []
        with pytest.warns(UserWarning, match='was not profiled on this machine'):
            calibrated.set_cost(0.9, cost='time')
    for other in (dict(device='another'), dict(dtype='bfloat16'), dict(compiled=True)):
        calibrated.profiles = [replace(p, **other)]
        calibrated.set_max_drop(0.05, rule='joint', cost='time')
        assert len(calibrated.profiles) == 2


def test_another_model_is_measured_by_itself(calibrated, store):
    with pytest.warns(UserWarning, match='was not profiled'):
        calibrated.set_max_drop(0.05, rule='joint', cost='time')
    calibrated.heads[0].fc.weight.data.mul_(2)
    calibrated.calibration = replace(calibrated.calibration, heads_hash=calibrated.heads_hash())
    calibrated.profiles = []
    with pytest.warns(UserWarning, match='was not profiled'):
        calibrated.set_max_drop(0.05, rule='joint', cost='time')


def test_a_folder_that_cannot_be_written_to_is_done_without(calibrated, tmp_path, monkeypatch):
    (tmp_path / 'cache').write_text('a file')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    with pytest.warns(UserWarning, match='was not profiled'):
        calibrated.set_max_drop(0.05, rule='joint', cost='time')


def test_time_needs_a_calibration(calibrated, store):
    p = made(calibrated, (1e-3, 1e-3, 8e-3), (1e-5, 1e-5))
    calibrated.profiles, calibrated.calibration = [p], None
    with pytest.raises(timm_cascade.NotCalibratedError, match=r'no calibration; its table.*calibrate\(model'):
        calibrated.set_max_drop(0.05, cost='time')
    with pytest.raises(ValueError, match="cost is 'watts'"):
        calibrated.set_max_drop(0.05, cost='watts')
    with pytest.raises(ValueError, match='batch_size=0'):
        timm_cascade.profile(calibrated, batch_size=0)
    assert not store.exists()


def test_profiles_travel_with_the_release(capsys, calibrated, tmp_path):
    hub.save(calibrated, tmp_path)
    assert not (tmp_path / hub.PROFILES).exists()
    status, result, _ = run(capsys, 'profile', tmp_path, '--batch-size', 4, '--repeats', 2)
    assert status == 0 and [e['module'] for e in result['exits']] == ['layer1', 'layer2']
    assert result['saved'] == str(tmp_path) and result['backbone_ms'] > 0
    status, result, _ = run(capsys, 'profile', tmp_path, '--batch-size', 2, '--repeats', 2)
    model = timm_cascade.load(tmp_path)
    assert [p.batch_size for p in model.profiles] == [4, 2]
    model.set_max_drop(0.05, rule='joint', cost='time')
    hub.save(model, tmp_path / 'again')
    assert (tmp_path / 'again' / hub.PROFILES).read_text() == (tmp_path / hub.PROFILES).read_text()
    model.reset_classifier(3)
    assert model.profiles == []


def bad(change):
    p = dict(
        device='d',
        dtype='float32',
        batch_size=2,
        compiled=False,
        exits=['a'],
        stage_seconds=[1.0, 1.0],
        head_seconds=[0.1],
        cut_seconds=[0.0],
        backbone_seconds=2.0,
        repeats=1,
        versions={},
    )
    p.update(change)
    return json.dumps(dict(format_version=1, profiles=[p]))


@pytest.mark.parametrize(
    'text, message',
    [
        ('[' * 100_000, 'nested more than'),
        ('{}', 'format_version is missing'),
        ('{"format_version": 2, "profiles": []}', 'format_version is 2.*newer'),
        (bad(dict(stage_seconds=[1.0, 1.0, 1.0])), 'stage_seconds has 3 numbers for 1 exits'),
        (bad(dict(stage_seconds=[0.0, 0.0])), 'no time'),
        (bad(dict(head_seconds=[-1.0])), 'head_seconds'),
        (bad(dict(head_seconds=[True])), 'head_seconds'),
        (bad(dict(backbone_seconds=float('nan'))), r'profiles\.0\.backbone_seconds is nan'),
        (bad(dict(exits=[])), r'profiles\.0\.exits is .* at least 1'),
        (bad(dict(batch_size=0)), 'batch_size'),
        (bad(dict(batch_size=2.5)), r'profiles\.0\.batch_size is 2\.5'),
        (bad(dict(new=1)), r'profiles\.0\.new is not a known key'),
        (bad(dict(versions={'a': 1})), 'versions'),
        (bad(dict(device=3)), 'device'),
    ],
)
def test_damaged_profiles_are_refused(small, tmp_path, text, message):
    with pytest.raises(TableFormatError, match=message):
        profiles_from_json(text)
    hub.save(small, tmp_path)
    (tmp_path / hub.PROFILES).write_text(text)
    with pytest.raises(timm_cascade.ReleaseError, match=hub.PROFILES):
        timm_cascade.load(tmp_path)


def test_a_profile_of_other_exits_is_refused(small, tmp_path):
    hub.save(small, tmp_path)
    (tmp_path / hub.PROFILES).write_text(bad({}))
    with pytest.raises(timm_cascade.ReleaseError, match='other exits'):
        timm_cascade.load(tmp_path)
    (good,) = profiles_from_json(bad({}))
    assert isinstance(good, Profile) and profiles_from_json(profiles_to_json([good])) == [good]


def test_profiling_export_cut_backbones():
    model = timm_cascade.CascadeModel(Stubborn().eval(), 3).eval()
    p = timm_cascade.profile(model, images=torch.randn(4, 3, 16, 16), repeats=1)
    assert len(p.stage_seconds) == 4 and min(p.stage_seconds) > 0 and len(model._router._exported) == 1
