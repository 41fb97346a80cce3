"""The experiment on networks in front, at toy size: settings, ratios, page and picture."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
import timm

from scripts.experiments.fronts import measure as measuring
from scripts.experiments.fronts import report
from scripts.experiments.fronts.equality import equality
from scripts.experiments.fronts.members import Members, cheapest_front
from timm_cascade.backbone import backbone_macs
from timm_cascade.measure.calibrate import record

GREY = dict(in_chans=1, num_classes=4, pretrained_cfg_overlay=dict(input_size=(1, 16, 16), mean=(0.5,), std=(0.25,)))


@pytest.fixture
def members(images):
    networks = {f'depth {d}': timm.create_model('cifar_resnet20', depth=d, **GREY).eval() for d in (1, 2, 3)}
    macs = [backbone_macs(n, (1, 16, 16)) for n in networks.values()]
    found = Members('toy', networks, macs, images, images, {})
    seen = record(found.cascade((0, 1)), images)
    right = np.random.default_rng(0).random((96, 3)) < np.array([0.6, 0.7, 0.8])
    seen['correct'], seen['confidence'] = right, np.where(right, seen['confidence'] + 0.3, seen['confidence'])
    found.seen = dict(calibration=seen, test=seen)
    return found


def test_the_cheapest_setting_is_as_accurate_as_asked(members):
    cost = [float(m) for m in members.macs]
    found = [cheapest_front(members, accuracy, cost) for accuracy in (0.5, 0.65)]
    assert found[0] is not None and found[1] is not None and found[0][1].cost <= found[1][1].cost < sum(cost)
    assert cheapest_front(members, 1.01, cost) is None


def test_page_picture_and_results(members, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, 'BATCHES', {1: 2, 8: 16})
    args = argparse.Namespace(seconds=0.0, repetitions=1, untimed=False)
    found = measuring.measure(members, args)
    assert [r['batch'] for r in found['rows'] if r['network'] == 'depth 3'] == [None, 1, 8]
    timed = [r for r in found['rows'] if r['batch'] and r['cascade']]
    assert timed and all(r['to_parts']['median'] > 0 and r['faster']['median'] > 0 for r in timed)
    assert all('stream_to_parts' in r for r in timed if r['batch'] == 8)
    machine = dict(device='a processor', torch='0', timm='0')
    section = dict(found, machine=machine, seconds=0.0, repetitions=1, untimed=False)
    pairs = equality([('test_vit', 'test_efficientnet')], images=4)
    assert pairs[0]['equal'] and pairs[0]['remaining'] == 2
    report.write(tmp_path, dict(toy=section, equality=dict(rows=pairs, machine=machine)))
    page = (tmp_path / 'pages' / 'evidence' / 'fronts.md').read_text()
    assert '| depth 3 |' in page and '| test_vit | test_efficientnet | 2 of 4 |' in page
    assert (tmp_path / 'results' / 'fronts.png').stat().st_size > 1000
    assert set(json.loads((tmp_path / 'results' / 'fronts.json').read_text())) == {'toy', 'equality'}


def test_fewer_than_two_networks_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match='nothing_like_it: 0 trained networks, expected two or more'):
        report.main(['nothing_like_it', '--runs', str(tmp_path), '--docs', str(tmp_path / 'docs')])
