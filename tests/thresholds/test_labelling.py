"""Labels only where they matter: partly labelled pools, unlabelled ones, and what the messages name."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from populations import realistic

from timm_cascade.thresholds import Calibration, Samples, TableFormatError, ThresholdError, training_path


def pool(n=3000, exits=3, seed=0, path=True):
    """A calibration of n fully labelled samples, with a path from other samples."""
    c, r = realistic(n + 8000, exits, seed, first=0.88)
    rng = np.random.default_rng(seed)
    agreement = (r & r[:, -1:]) | (~r & ~r[:, -1:] & (rng.random(r.shape) < 0.7))
    agreement[:, -1] = True
    return Calibration(
        confidence=c[8000:],
        correct=r[8000:],
        agreement=agreement[8000:],
        stage_cost=np.ones(exits + 1),
        head_cost=np.zeros(exits),
        backbone_cost=exits + 1.0,
        exits=tuple(f'layer{m}' for m in range(exits)),
        num_classes=10,
        heads_hash='abc',
        path=training_path(Samples(c[:8000], agreement[:8000])) if path else None,
    )


def with_labels(whole, chosen):
    labelled = np.zeros(whole.n, dtype=bool)
    labelled[chosen] = True
    correct = np.where(labelled[:, None], whole.correct, whole.agreement)
    return dataclasses.replace(whole, correct=correct, labelled=labelled)


@pytest.mark.parametrize('max_drop', [0.005, 0.01, 0.02])
@pytest.mark.parametrize('seed', [0, 1])
def test_labels_that_were_asked_for_give_the_certificate_of_all_labels(max_drop, seed):
    whole, chosen = pool(seed=seed), np.zeros(0, dtype=int)
    for _ in range(6):
        partly = with_labels(whole, chosen)
        wanted = partly.to_label(max_drop)
        if not len(wanted):
            break
        assert not np.isin(wanted, chosen).any() and (np.diff(wanted) > 0).all()
        chosen = np.union1d(chosen, wanted)
    else:
        pytest.fail('labels are asked for again and again')
    assert len(chosen) < 0.35 * whole.n
    for d in (0, 0.001, 0.0025, 0.005, 0.01, 0.02):
        if d <= max_drop:
            here, there = partly.point(d), whole.point(d)
            assert here.thresholds == there.thresholds
            assert (here.drop, here.drop_interval) == (there.drop, there.drop_interval)


def test_fewer_labels_never_certify_more():
    whole = pool()
    rng = np.random.default_rng(0)
    full = whole.certificate()
    for share in (0.0, 0.2, 0.7):
        partly = with_labels(whole, np.flatnonzero(rng.random(whole.n) < share)).certificate()
        assert all(a <= b for a, b in zip(partly.rows, full.rows, strict=True))


def test_to_label_needs_a_stored_path():
    with pytest.raises(ThresholdError, match='Train them again'):
        pool(path=False).to_label(0.01)
    assert pool().to_label(0.01).size == 0  # all have labels


def test_the_message_says_what_would_do_in_numbers():
    whole = pool(n=120)
    with pytest.warns(UserWarning, match=r'about [0-9,]+ images with labels or about [0-9,]+ images without') as caught:
        point = whole.point(0.005)
    assert not np.isfinite(point.thresholds).any()
    named = [int(x.replace(',', '')) for x in re.findall(r'about ([0-9,]+)', str(caught[0].message))]
    opened = 0
    for seed in range(5):
        enough = pool(n=2 * named[0], seed=seed)
        opened += np.isfinite(enough.point(0.005).thresholds).any()
    assert opened >= 4
    whole = pool(n=700)
    whole.confidence[0, 0], whole.agreement[0, 0] = 1, False  # the very first sample to exit disagrees
    partly = with_labels(whole, np.arange(1, 700))
    with pytest.warns(UserWarning, match=r'labels for 1 of these images \(calibration.to_label\(0.005\)\)'):
        partly.point(0.005)
    with pytest.warns(UserWarning, match='allow a small drop'):
        whole.point(0.0)


def test_everything_travels(tmp_path):
    whole = pool(n=200)
    partly = dataclasses.replace(
        with_labels(whole, np.arange(50)), pool_confidence=whole.confidence[:77], pool_agreement=whole.agreement[:77]
    )
    partly.save(tmp_path / 'calibration.safetensors')
    again = Calibration.load(tmp_path / 'calibration.safetensors')
    for f in dataclasses.fields(Calibration):
        np.testing.assert_array_equal(getattr(partly, f.name), getattr(again, f.name))
    assert again.point(0.05).thresholds == partly.point(0.05).thresholds


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(labelled=np.ones(3, bool)), r'expected bool \(50,\)'),
        (dict(labelled=np.zeros(50, bool)), 'correct must equal agreement'),
        (dict(path=np.array([[0.5, 0.5, 0.5]])), 'begin with all exits closed'),
        (dict(pool_confidence=np.full((4, 4), 2.0), pool_agreement=np.ones((4, 4), bool)), 'between 0 and 1'),
        (dict(pool_confidence=np.full((4, 2), 0.5), pool_agreement=np.ones((4, 2), bool)), 'stage_cost'),
        (dict(pool_confidence=np.full((4, 4), 0.5)), 'go together'),
    ],
)
def test_fields_that_cannot_be_right_are_refused(changes, message):
    with pytest.raises(ThresholdError, match=message):
        dataclasses.replace(pool(n=50), **changes)


def test_a_damaged_file_is_refused(tmp_path):
    from safetensors.numpy import load_file, save_file

    file = tmp_path / 'calibration.safetensors'
    with_labels(pool(n=200), [1]).save(file)
    from safetensors import safe_open

    with safe_open(file, framework='numpy') as opened:
        header = opened.metadata()
    tensors = load_file(file)
    for change in (
        dict(labelled=tensors['labelled'][:3]),
        dict(path=tensors['path'][::-1].copy()),
        dict(path=tensors['path'][:, :1].copy()),
        dict(surprise=np.zeros(3)),
    ):
        save_file({**tensors, **change}, file, metadata=header)
        with pytest.raises(TableFormatError):
            Calibration.load(file)


def test_the_best_point_needs_all_labels():
    with pytest.raises(ThresholdError, match='needs labels for all'):
        with_labels(pool(n=100), [1]).point(0.01, reference='best')
    with pytest.raises(ThresholdError, match="goes with rule='certified'"):
        pool(n=100).point(0.01, rule='joint', reference='best')


def test_an_expected_gain_is_said():
    c, r = realistic(4000, 2, first=0.85, last=0.8)
    base = pool(n=50, exits=2)
    agreement = r == r[:, -1:]
    better = dataclasses.replace(base, confidence=c, correct=r, agreement=agreement, path=None)
    point = better.point(0.0)
    assert point.drop < 0 and re.search(r'expected to gain [0-9.]+ points', str(point))
    curve = better.curve()
    costs = [p.cost_share for p in curve]
    assert costs[0] == pytest.approx(1) and costs[-1] == min(costs) and max(p.accuracy for p in curve) > r[:, -1].mean()
