"""Requests of different settings in one batch, and answers that come when an image exits."""

import threading
import time
from concurrent.futures import CancelledError

import pytest
import torch
from helpers import near

from timm_cascade.errors import RequestError
from timm_cascade.serving.batcher import Batcher
from timm_cascade.serving.service import Service

DROPS = (None, 0.0, 0.01, 0.05, 1.0)


def test_settings_in_one_batch_answer_as_each_alone(cascade, pictures):
    """300 images with five settings, in batches of 16."""
    service = Service(cascade)
    asked = [service.prepare(pictures[i % 96], DROPS[i * 7 % 5]) for i in range(300)]
    with torch.inference_mode():
        for start in range(0, 300, 16):
            batch = asked[start : start + 16]
            found = service.answers(batch)
            images = torch.stack([a.image for a in batch])
            for setting in {id(a.setting): a.setting for a in batch}.values():
                want = cascade.predict(images, thresholds=setting.thresholds)
                mine = [i for i, a in enumerate(batch) if a.setting is setting]
                assert [found[i].exit for i in mine] == want.exit[mine].tolist()
                assert [found[i].classes[0] for i in mine] == want.logits[mine].argmax(1).tolist()
                assert near([found[i].probabilities[0] for i in mine], want.confidence[mine], 1e-2)
    assert len({a.exit for a in found}) > 1


def test_an_image_that_exits_is_answered_before_the_rest_runs(cascade, pictures):
    service = Service(cascade)
    asked = [service.prepare(p) for p in pictures[:32]]
    order = []
    hook = cascade.backbone.layer2.register_forward_pre_hook(lambda *_: order.append('layer2'))
    service.run(asked, lambda place, answer: order.append(answer.exit))
    hook.remove()
    first = order.index('layer2')
    assert set(order[:first]) == {0} and 0 not in order[first:] and {1, 2} <= set(order[first:])
    assert len([o for o in order if o != 'layer2']) == 32


def test_every_image_is_answered_once_whatever_the_cut(cascade, pictures):
    service = Service(cascade)
    asked = [service.prepare(p) for p in pictures]
    want = service.answers(asked)
    for min_leave in (0.0, 0.5, 1.0):
        cascade.min_leave = min_leave
        places = []
        service.run(asked, lambda place, answer: places.append(place))  # noqa: B023
        assert sorted(places) == list(range(96))
        assert [a.exit for a in service.answers(asked)] == [a.exit for a in want]
    assert [service.answers([a])[0].exit for a in asked[:8]] == [a.exit for a in want[:8]]


class Slow:
    """Answers after the signal; remembers the batches."""

    def __init__(self):
        self.go, self.running, self.batches = threading.Event(), threading.Event(), []

    def run(self, batch, on_answer):
        self.batches.append(list(batch))
        self.running.set()
        assert self.go.wait(30)
        if 'bad' in batch:
            raise RuntimeError('out of memory')
        for place, asked in enumerate(batch):
            on_answer(place, asked)


def test_requests_that_were_cancelled_are_left_out():
    slow = Slow()
    batcher = Batcher(slow, max_batch=4)
    first = batcher.submit('first')
    assert slow.running.wait(30)
    futures = [batcher.submit(i) for i in range(6)]
    assert futures[1].cancel() and futures[4].cancel()
    slow.go.set()
    assert first.result(30) == 'first'
    assert [f.result(30) for i, f in enumerate(futures) if i not in (1, 4)] == [0, 2, 3, 5]
    with pytest.raises(CancelledError):
        futures[1].result(30)
    assert slow.batches == [['first'], [0, 2, 3, 5]]
    batcher.close()


def test_closing_answers_what_waits():
    slow = Slow()
    batcher = Batcher(slow, max_batch=2)
    futures = [batcher.submit(i) for i in range(7)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    slow.go.set()
    closing.join(30)
    assert [f.result(0) for f in futures] == list(range(7)) and not batcher.alive
    with pytest.raises(RuntimeError, match='closed'):
        batcher.submit(8)
    batcher.close()


def test_a_batch_that_fails_harms_no_other(caplog):
    slow = Slow()
    slow.go.set()
    batcher = Batcher(slow, max_batch=1)
    bad, good = batcher.submit('bad'), batcher.submit('good')
    assert good.result(30) == 'good' and batcher.alive
    with pytest.raises(RuntimeError, match='out of memory'):
        bad.result(30)
    assert 'a batch of 1 images failed' in caplog.text
    batcher.close()


def test_a_request_waits_for_others_at_most_as_long_as_allowed():
    slow = Slow()
    slow.go.set()
    batcher = Batcher(slow, max_batch=3, max_wait=60)
    began = time.monotonic()
    futures = [batcher.submit(i) for i in range(3)]
    assert [f.result(30) for f in futures] == [0, 1, 2] and slow.batches == [[0, 1, 2]]  # full, so it did not wait
    assert time.monotonic() - began < 30
    batcher.close()
    batcher = Batcher(slow, max_batch=3, max_wait=0.01)
    assert batcher.submit('alone').result(30) == 'alone'
    batcher.close()
    for wrong in (dict(max_batch=0), dict(max_wait=-1), dict(max_wait=float('nan'))):
        with pytest.raises(ValueError, match='expected at least 1'):
            Batcher(slow, **wrong)


def test_a_service_says_what_it_cannot_do(cascade, pictures):
    service = Service(cascade)
    assert service.setting(0.01999999999) is service.setting(0.0199)
    assert service.setting(0.01) is service.setting(0.01005)
    for wrong in (-1, float('nan'), float('inf'), 2):
        with pytest.raises(RequestError, match='max_drop is') as e:
            service.prepare(pictures[0], wrong)
        assert e.value.status == 422
    cascade.reset_classifier(0)
    with pytest.raises(ValueError, match='no classes'):
        Service(cascade)
