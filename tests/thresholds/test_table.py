from __future__ import annotations

import dataclasses
import json
import warnings

import numpy as np
import pytest
from populations import realistic

from timm_cascade.thresholds import (
    Calibration,
    OperatingPoint,
    PointNotFoundError,
    TableFormatError,
    TableMismatchError,
    ThresholdError,
    ThresholdTable,
    outcome,
)


def make(n=2000, count=3, **changes):
    c, r = realistic(n, count)
    agreement = r == r[:, -1:]
    stage = np.ones(count + 1)
    arguments = dict(
        confidence=c,
        correct=r,
        agreement=agreement,
        stage_cost=stage,
        head_cost=np.full(count, 0.05),
        backbone_cost=stage.sum() - 0.05 * count,
        exits=tuple(f'layer{m}' for m in range(count)),
        num_classes=10,
        heads_hash='abc',
        provenance={'input_size': [3, 32, 32], 'data': 'a "set" [1,\n 2]', 'split': 'validation'},
    )
    return Calibration(**{**arguments, **changes})


@pytest.fixture(scope='module')
def calibration():
    return make()


@pytest.fixture(scope='module')
def table(calibration):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        return calibration.table()


def test_points_say_what_to_expect(calibration):
    for rule in ('per_exit', 'joint', 'certified'):
        point = calibration.point(0.02, rule=rule)
        assert point.rule == rule and point.max_drop == 0.02 and point.certified == (rule == 'certified')
        assert point.level == (0.9 if rule == 'certified' else None)
        assert point.drop == pytest.approx(point.full_accuracy - point.accuracy)
        assert point.drop_interval[0] <= point.drop <= point.drop_interval[1]
        assert sum(point.exit_shares) == pytest.approx(1) and len(point.exit_shares) == 4
        assert 0 < point.cost_share < 1 and point.n == 2000
        assert 'drop' in str(point) and 'n = 2000' in str(point)
        assert OperatingPoint.from_dict(json.loads(json.dumps(point.to_dict()))) == point
    agreeing = calibration.point(0.02, rule='joint', reference='backbone')
    assert agreeing.full_accuracy == 1 and agreeing.reference == 'backbone' and 'agreement' in str(agreeing)
    with pytest.raises(ThresholdError, match='expected certified, joint or per_exit'):
        calibration.point(0.02, rule='magic')
    with pytest.raises(ThresholdError, match='labels, backbone or best'):
        calibration.point(0.02, reference='teacher')


def test_cost_dial(calibration):
    point = calibration.at_cost(0.7)
    assert point.rule == 'cost' and point.max_drop is None and point.cost_share <= 0.7
    got = outcome(calibration.samples(), point.thresholds)
    assert got.cost <= 0.7 * calibration.backbone_cost * (1 + 1e-9)
    assert OperatingPoint.from_dict(point.to_dict()) == point
    with pytest.raises(ThresholdError, match='out of reach'):
        calibration.at_cost(0.1)


def test_calibration_travels(calibration, tmp_path):
    path = tmp_path / 'calibration.safetensors'
    for n, exits in ((2000, 3), (1, 1), (7, 2)):
        before = make(n, exits) if n != 2000 else calibration
        before.save(path)
        after = Calibration.load(path)
        for f in dataclasses.fields(Calibration):
            np.testing.assert_array_equal(getattr(before, f.name), getattr(after, f.name))
        assert after.confidence.dtype == np.float32 and after.correct.dtype == np.bool_
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(TableFormatError, match='not a calibration file'):
        Calibration.load(path)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(confidence=np.full((2000, 4), 3.0)), 'between 0 and 1'),
        (dict(correct=np.ones((2000, 3), bool)), 'must agree'),
        (dict(agreement=np.zeros((2000, 4), bool)), 'agrees with itself'),
        (dict(exits=('a', 'b')), '2 exits for 4 columns'),
        (dict(stage_cost=np.ones(3)), r'expected \(4,\)'),
        (dict(backbone_cost=np.nan), 'above 0'),
        (dict(num_classes=0), 'at least 1'),
        (dict(provenance={'x': np.nan}), 'JSON values'),
        (dict(provenance={'x': object()}), 'JSON values'),
    ],
)
def test_a_calibration_that_cannot_be_right_is_refused(changes, message):
    with pytest.raises(ThresholdError, match=message):
        make(**changes)


def test_table_travels(table):
    text = table.to_json()
    assert ThresholdTable.from_json(text) == table and ThresholdTable.from_json(text).to_json() == text
    content = json.loads(text)
    content['colour'], content['points'][0]['mood'] = {'a': [1]}, 'good'
    again = json.loads(ThresholdTable.from_json(json.dumps(content)).to_json())
    assert again == content
    assert any(None in p['thresholds'] for p in content['points']) or all(
        np.isfinite(p.thresholds).all() for p in table.points
    )


def test_table_gives_the_next_stricter_point(table):
    point = table.point(0.015)
    assert point.max_drop == 0.01 and point.rule == 'certified'
    assert table.point(0.02, rule='joint').max_drop == 0.02
    with pytest.raises(PointNotFoundError, match=r'It has: certified at level 0.9 \(labels\): 0, 0.001, 0.0025'):
        table.point(0.001, rule='joint')
    assert table.point(0.0005).max_drop == 0 and table.point(1.0).max_drop == 0.1
    with pytest.raises(PointNotFoundError):
        table.point(0.01, level=0.95)
    with pytest.raises(LookupError):
        table.point(0.01, reference='backbone')
    best = table.at_cost(0.9)
    assert best.cost_share <= 0.9
    with pytest.raises(PointNotFoundError, match='costs at most'):
        table.at_cost(0.01)


def test_table_of_other_heads_is_refused(table):
    right = dict(exits=['layer0', 'layer1', 'layer2'], num_classes=10, heads_hash='abc', input_size=(3, 32, 32))
    table.check(**right)
    for name, value, said in (
        ('exits', ['layer0'], 'its exits are'),
        ('num_classes', 9, '9 classes'),
        ('heads_hash', 'x', "the heads' weights"),
        ('input_size', (3, 64, 64), r'the input size is \[3, 64, 64\]'),
    ):
        with pytest.raises(TableMismatchError, match=said):
            table.check(**{**right, name: value})


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda t: t.update(format_version=2), 'newer'),
        (lambda t: t.update(format_version='1'), 'format_version'),
        (lambda t: t.pop('format_version'), 'format_version is missing'),
        (lambda t: t.pop('points'), 'points is missing'),
        (lambda t: t.update(exits='layer0'), "exits is 'layer0'; it should be a valid list"),
        (lambda t: t.update(exits=[]), 'exits is .* at least 1'),
        (lambda t: t.update(num_classes=True), 'num_classes'),
        (lambda t: t.update(input_size=['a']), 'input_size'),
        (lambda t: t.update(points=t['points'] * 1000), 'points is .* at most 10000'),
        (lambda t: t['points'].append(3), r'points\.18 is 3'),
        (lambda t: t['points'][0].pop('drop'), r'points\.0\.drop is missing'),
        (lambda t: t['points'][0]['thresholds'].pop(), r'points\.0: .*do not fit'),
        (lambda t: [t['points'][0][k].pop() for k in ('thresholds', 'exit_shares')], '2 thresholds for 3 exits'),
        (lambda t: t['points'][0]['thresholds'].__setitem__(0, 1.5), r'points\.0\.thresholds\.0 is 1\.5'),
        (lambda t: t['points'][0]['thresholds'].__setitem__(0, '0.5'), r"points\.0\.thresholds\.0 is '0\.5'"),
        (lambda t: t['points'][0]['thresholds'].__setitem__(0, float('nan')), r'points\.0\.thresholds\.0 is nan'),
        (lambda t: t['points'][0]['thresholds'].__setitem__(0, float('inf')), r'points\.0\.thresholds\.0 is inf'),
        (lambda t: t['points'][0].update(thresholds=0.5), r'points\.0\.thresholds is 0\.5'),
        (lambda t: t['points'][0].update(rule='magic'), r"points\.0\.rule is 'magic'"),
        (lambda t: t['points'][0].update(max_drop=None), 'max_drop'),
        (lambda t: t['points'][0].update(certified=True), 'level'),
        (lambda t: t['points'][0].update(n=-1), r'points\.0\.n is -1'),
    ],
)
def test_hostile_tables_are_refused(table, change, message):
    content = json.loads(table.to_json())
    change(content)
    with pytest.raises(TableFormatError, match=message):
        ThresholdTable.from_json(json.dumps(content))


@pytest.mark.parametrize('text', ['', 'null', '[]', '{', '[' * 100_000, '{"format_version": 1}', '1e999', '"x"'])
def test_text_that_is_no_table_is_refused(text):
    with pytest.raises(TableFormatError):
        ThresholdTable.from_json(text)


def test_a_table_without_a_guarantee_for_the_dial_says_so(table):
    content = json.loads(table.to_json())
    for point in content['points']:
        del point['scope']  # as an older version wrote it
    old = ThresholdTable.from_json(json.dumps(content))
    assert {p.scope for p in old.points if p.certified} == {'setting'}
    with pytest.warns(UserWarning, match='each setting by itself'):
        assert old.point(0.01).thresholds == table.point(0.01).thresholds
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert old.point(0.01, scope='setting').scope == 'setting'
        assert table.point(0.01, scope='setting').scope == 'dial'  # holds for a setting too
        table.point(0.01)
