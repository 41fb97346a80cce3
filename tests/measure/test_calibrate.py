import warnings

import numpy as np
import pytest
import torch
from helpers import near
from torch.utils.data import TensorDataset

import timm_cascade
from timm_cascade.inference.batch import confidence
from timm_cascade.measure.calibrate import record
from timm_cascade.measure.evaluate import report_of


def test_calibration_is_what_the_exits_say(trained, images):
    calibration = timm_cascade.calibrate(trained, images, batch_size=40)
    transform = timm_cascade.data.eval_transform(trained)
    x = torch.stack([transform(images[i][0]) for i in range(len(images))])
    with torch.no_grad():
        logits = trained.forward_exits(x)
    assert calibration.confidence.shape == (96, 3)
    for m, out in enumerate(logits):
        assert near(calibration.confidence[:, m], confidence(out))
        assert (calibration.correct[:, m] == (out.argmax(1).numpy() == images.labels)).mean() > 0.98
    assert calibration.agreement[:, -1].all()
    assert calibration.heads_hash == trained.heads_hash()
    assert calibration.exits == ('layer1', 'layer2')
    assert calibration.provenance['data'] == 'quarters' and calibration.provenance['input_size'] == [1, 16, 16]
    assert trained.calibration is calibration and trained.table is not None


@pytest.mark.parametrize('rule', ['per_exit', 'joint'])
def test_the_dial_delivers_its_point_on_the_calibration_images(trained, images, rule):
    calibration = timm_cascade.calibrate(trained, images)
    point = trained.set_max_drop(0.1, rule=rule)
    assert tuple(np.float32(point.thresholds)) == tuple(trained.thresholds.numpy())
    report = timm_cascade.evaluate(trained, images, batch_size=32)
    left = timm_cascade.thresholds.route(calibration.confidence, point.thresholds)
    shares = [(left == m).mean() for m in range(3)]
    assert np.allclose(report.exit_shares, shares, atol=0.021)  # a confidence on the threshold may round either way
    assert report.full_accuracy == pytest.approx(calibration.correct[:, -1].mean())


def test_too_few_images_for_a_certificate_close_all_exits(trained, images):
    timm_cascade.calibrate(trained, TensorDataset(torch.randn(12, 1, 16, 16), torch.zeros(12, dtype=torch.long)))
    with pytest.warns(UserWarning, match='would'):
        point = trained.set_max_drop(0.001)
    assert not trained.any_open and point.cost_share == 1


def test_set_cost_keeps_to_the_budget(trained, images):
    timm_cascade.calibrate(trained, images)
    point = trained.set_cost(0.6)
    assert point.cost_share <= 0.6
    with pytest.raises(ValueError):
        trained.set_cost(0.001)
    assert tuple(trained.thresholds.numpy()) == tuple(np.float32(point.thresholds))


def test_labels_of_other_classes(trained):
    with pytest.raises(ValueError, match='other classes'):
        timm_cascade.calibrate(trained, TensorDataset(torch.randn(4, 1, 16, 16), torch.tensor([0, 1, 2, 9])))
    assert trained.calibration is None


def test_evaluate_counts_what_happened(trained, images):
    trained.thresholds = [0.9, 0.8]
    report = timm_cascade.evaluate(trained, images, batch_size=32)
    transform = timm_cascade.data.eval_transform(trained)
    with torch.no_grad():
        out = trained.predict(torch.stack([transform(images[i][0]) for i in range(len(images))]))
    answered = out.exit.numpy()
    right = out.logits.argmax(1).numpy() == images.labels
    assert report.n == 96 and sum(report.exit_shares) == pytest.approx(1)
    assert report.accuracy == pytest.approx(right.mean(), abs=0.02)
    cost = np.cumsum(trained.stage_macs())
    assert report.macs == pytest.approx(sum(c * s for c, s in zip(cost, report.exit_shares, strict=True)))
    assert report.exit_shares[0] == pytest.approx((answered == 0).mean(), abs=0.02)
    assert report.change_interval[0] <= report.change <= report.change_interval[1]
    assert report.time_share > 0
    assert None in timm_cascade.Report(**{**report.__dict__, 'thresholds': (0.5, float('inf'))}).to_dict()['thresholds']


def test_a_report_from_one_pass_is_that_of_running_the_cascade(trained, images):
    seen = record(trained, images)
    for thresholds in ([0.9, 0.8], [None, 0.5], None):
        trained.thresholds = thresholds
        run, computed = (r.to_dict() for r in (timm_cascade.evaluate(trained, images), report_of(trained, seen)))
        assert run.pop('time_share') > 0 and computed.pop('time_share') is None
        assert computed == run


def test_closed_exits_cost_no_head(trained, images):
    trained.thresholds = [None, 0.0]
    report = timm_cascade.evaluate(trained, images)
    assert report.macs == trained.exits[1].macs + trained.head_macs()[1]
    trained.thresholds = None
    assert timm_cascade.evaluate(trained, images).macs_share == 1


def test_every_exit_and_the_oracle(trained, images):
    report = timm_cascade.evaluate(trained, images, every_exit=True)
    seen = record(trained, images)
    correct, confidences = seen['correct'], seen['confidence']
    every = report.every_exit
    assert every.accuracy == pytest.approx(correct.mean(0).tolist())
    cost = np.cumsum(trained.stage_macs())
    spent = [cost[np.flatnonzero(row)[0]] if row.any() else cost[0] for row in correct]
    assert every.oracle_accuracy == pytest.approx(correct.any(1).mean())
    assert every.oracle_macs_share == pytest.approx(np.mean(spent) / trained.exits[-1].total)
    for m in range(3):
        sure, right = confidences[:, m], correct[:, m]
        if right.all() or not right.any():
            assert np.isnan(every.auroc[m])
            continue
        wins = [(a > b) + 0.5 * (a == b) for a in sure[right] for b in sure[~right]]
        assert every.auroc[m] == pytest.approx(np.mean(wins))
    assert report.survivors[0] == 1 and report.to_dict()['every_exit']['oracle_accuracy'] == every.oracle_accuracy


def test_without_labels_agreement_is_what_counts(trained, images):
    unlabelled = timm_cascade.ImageData(images.images, None, source='quarters')
    calibration = timm_cascade.calibrate(trained, unlabelled)
    assert calibration.agreement[:, -1].all() and not calibration.provenance['labelled']
    point = trained.set_max_drop(0.1, rule='joint')
    assert point.reference == 'backbone' and point.full_accuracy == 1
    assert {p.reference for p in trained.table.points} == {'backbone'}
    with pytest.raises(ValueError, match='without labels'):
        trained.set_max_drop(0.1, reference='labels')
    labelled = timm_cascade.calibrate(trained, images)
    assert np.array_equal(labelled.agreement, calibration.agreement)
    assert trained.set_max_drop(0.1, rule='joint', reference='backbone') == point


def tensors(images, model):
    transform = timm_cascade.data.eval_transform(model)
    return torch.stack([transform(images[i][0]) for i in range(len(images))])


def test_exact_copies_are_counted_and_said(trained, images):
    x, labels = tensors(images, trained), torch.as_tensor(images.labels)
    with pytest.warns(UserWarning, match='9 of 105 calibration images are exact copies'):
        calibration = timm_cascade.calibrate(
            trained, TensorDataset(torch.cat([x, x[:9]]), torch.cat([labels, labels[:9]]))
        )
    assert calibration.provenance['duplicates'] == 9
    with pytest.warns(UserWarning, match='1 of 97'):  # also between the images with and those without labels
        timm_cascade.calibrate(trained, TensorDataset(x, labels), TensorDataset(x[:1], labels[:1]))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert timm_cascade.calibrate(trained, images).provenance['duplicates'] == 0


def test_some_images_may_have_no_label(trained, images):
    whole = timm_cascade.calibrate(trained, images)
    x, labels = tensors(images, trained), torch.as_tensor(images.labels).clone()
    labels[::2] = -1
    calibration = timm_cascade.calibrate(trained, TensorDataset(x, labels), batch_size=40)
    assert calibration.labelled.tolist() == (labels != -1).tolist() and calibration.provenance['labelled'] is True
    known = calibration.labelled
    assert (calibration.correct[~known] == calibration.agreement[~known]).all()
    assert (calibration.correct[known] == whole.correct[known]).mean() > 0.98
    wanted = calibration.to_label(0.1)
    assert not known[wanted].any()
    nothing = timm_cascade.calibrate(trained, TensorDataset(x, torch.full((96,), -1)))
    assert nothing.labelled is None and nothing.provenance['labelled'] is False
    assert set(nothing.to_label(0.1)) <= set(range(96))
    with pytest.raises(ValueError, match='without labels'):
        trained.set_max_drop(0.1, reference='labels')


def test_unlabelled_images_go_to_the_test_of_disagreement(trained, images):
    x = tensors(images, trained)
    calibration = timm_cascade.calibrate(trained, images, TensorDataset(x + 0.01, torch.full((96,), -1)))
    assert calibration.n == 96 and calibration.pool_confidence.shape == calibration.pool_agreement.shape == (96, 3)
    assert trained.calibration is calibration


def test_the_dial_of_a_trained_model_walks_its_stored_path(trained, images):
    path = trained.dial.path
    assert path.shape[1] == 2 and np.isinf(path[0]).all() and (path[1:] <= path[:-1]).all()
    calibration = timm_cascade.calibrate(trained, images)
    assert calibration.path is not None and calibration.certificate().path.tolist() == path.tolist()
    point = trained.set_max_drop(0.3, level=0.5)
    assert point.scope == 'dial' and point.measured_on == point.n == 96  # every image tests
    assert trained.set_max_drop(0.3, level=0.5, scope='setting').scope == 'setting'
    before = trained.thresholds.tolist()
    with pytest.raises(ValueError, match='scope'):
        trained.set_max_drop(0.3, scope='everything')
    assert trained.thresholds.tolist() == before
    trained.reset_classifier(3)
    assert trained.dial.path is None


def test_a_max_drop_in_points_is_questioned(trained, images, recwarn):
    timm_cascade.calibrate(trained, images)
    recwarn.clear()
    for asked, meant in ((1, '0.01'), (0.5, '0.005')):
        with pytest.warns(UserWarning, match=f'did you mean {meant}'):
            trained.set_max_drop(asked, rule='joint')
    with pytest.raises(ValueError, match=r'expected a fraction between 0 and 1. One percentage point is 0\.01'):
        trained.set_max_drop(2)
    recwarn.clear()
    trained.set_max_drop(0.1, rule='joint')
    assert not [w for w in recwarn if 'did you mean' in str(w.message)]
