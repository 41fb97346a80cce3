"""The application by itself: what it answers, and what it refuses with which words."""

import base64
import io
import json
import threading

import numpy as np
import pytest
import torch
from helpers import near
from PIL import Image
from starlette.testclient import TestClient

from timm_cascade.data.views import eval_transform
from timm_cascade.serving.app import create_app
from timm_cascade.serving.decode import Limits
from timm_cascade.serving.service import Service


def encoded(image, kind='PNG', **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def client(cascade):
    service = Service(cascade, limits=Limits(image_bytes=50_000, pixels=200_000))
    with TestClient(create_app(service, warm_up=False)) as found:
        yield found


def predicted(cascade, pictures, **dial):
    transform = eval_transform(cascade)
    x = torch.stack([transform(Image.open(io.BytesIO(p))) for p in pictures])
    with torch.inference_mode():
        return cascade.predict(x, **dial)


def test_answers_are_those_of_predict(client, cascade, pictures):
    want = predicted(cascade, pictures)
    assert len(set(want.exit.tolist())) == 3
    for i, picture in enumerate(pictures[:24]):
        answer = client.post('/predict', content=picture).json()
        assert answer['exit'] == want.exit[i] and answer['index'] == want.logits[i].argmax()
        assert answer['label'] == 'abcd'[answer['index']] == answer['scores'][0]['label']
        assert near(torch.tensor([answer['confidence']]), want.confidence[i : i + 1], 1e-2)
        assert answer['confidence'] == answer['scores'][0]['score'] and answer['max_drop'] is None
        assert len(answer['scores']) == 4 and sum(s['score'] for s in answer['scores']) == pytest.approx(1)
    costs = client.get('/info').json()['exit_costs']
    assert answer['macs_fraction'] == costs[answer['exit']] and costs == sorted(costs) and costs[-1] > 1


def test_three_ways_to_send_an_image(client, pictures):
    text = base64.b64encode(pictures[0]).decode()
    plain = client.post('/predict?max_drop=0.02&topk=2', content=pictures[0]).json()
    assert plain['max_drop'] == 0.02 and len(plain['scores']) == 2
    asked = {'max_drop': 0.02, 'top_k': 2}
    others = [
        client.post('/predict', json={'inputs': text, 'parameters': asked}),
        client.post('/', json={'inputs': f'data:image/png;base64,{text}', 'parameters': asked}),
        client.post('/predict?topk=2', json={'inputs': text, 'parameters': {'max_drop': 0.02, 'topk': 4}}),
        client.post('/predict?max_drop=0.02', files={'image': pictures[0]}, data={'topk': '2'}),
        client.post('/predict?max_drop=0.02&topk=2', content=pictures[0], headers={'content-type': 'image/png'}),
    ]
    assert [o.json() for o in others] == [plain] * len(others)


def test_a_max_drop_is_rounded_down_and_settings_are_bounded(client, cascade, pictures):
    for asked, applied in (('0.01234', 0.0123), ('0.0003', 0.0003), ('1', 1.0), ('0', 0.0), ('2e-2', 0.02)):
        answer = client.post(f'/predict?max_drop={asked}', content=pictures[0]).json()
        assert answer['max_drop'] == applied
        assert answer['exit'] == predicted(cascade, pictures[:1], max_drop=applied).exit


@pytest.mark.parametrize(
    'path, content, status, message',
    [
        ('/predict', b'', 400, 'no image'),
        ('/predict', b'hello', 415, 'not an image that can be read'),
        ('/predict', b'x' * 50_001, 413, '50,000'),
        ('/predict?max_drop=nan', None, 422, 'max_drop is nan'),
        ('/predict?max_drop=1.5', None, 422, 'expected a fraction in 0..1'),
        ('/predict?max_drop=-0.1', None, 422, 'max_drop is -0.1'),
        ('/predict?max_drop=much', None, 422, "max_drop is 'much'"),
        ('/predict?max_drop=', None, 422, "max_drop is ''"),
        ('/predict?topk=0', None, 422, 'topk is 0'),
        ('/predict?topk=1.5', None, 422, "topk is '1.5'"),
        ('/predict?topk=' + '9' * 5000, None, 422, 'topk is'),
        ('/predict?max_dorp=0.1', None, 422, "the query has 'max_dorp'; known are max_drop and topk"),
        ('/predict?topk=1&topk=2', None, 422, 'topk twice'),
    ],
)
def test_refusals_name_what_is_wrong(client, pictures, path, content, status, message):
    answer = client.post(path, content=pictures[0] if content is None else content)
    assert answer.status_code == status and message in answer.json()['error']


@pytest.mark.parametrize(
    'body, message',
    [
        (b'{', 'cannot be read'),
        (b'[' * 60_000, 'cannot be read'),
        (b'[]', 'expected {"inputs"'),
        (b'{"inputs": 3}', 'inputs is int'),
        (b'{"inputs": "?"}', 'not base64'),
        (b'{"inputs": "", "parameters": [1]}', 'parameters is list'),
        (b'{"inputs": "", "parameters": {"topk": 1.5}}', 'topk is'),
        (b'{"inputs": "", "parameters": {"topk": true}}', 'topk is'),
        (b'{"inputs": "", "parameters": {"max_drop": [0.1]}}', 'max_drop is'),
        (b'{"inputs": "", "image": ""}', 'expected {"inputs"'),
        (b'\xff\xfe', 'cannot be read'),
    ],
)
def test_documents_that_are_wrong(client, body, message):
    answer = client.post('/predict', content=body, headers={'content-type': 'application/json'})
    assert answer.status_code == 422 and message in answer.json()['error']


def test_forms_that_are_wrong(client, pictures):
    for files, data, message in (
        ({}, {'topk': '1'}, '0 files'),
        ([('a', pictures[0]), ('b', pictures[0])], {}, 'send one'),
        ({'image': pictures[0]}, {'dial': '3'}, "the form has 'dial'"),
    ):
        sent = client.post('/predict', files=files or {'x': (None, 'y')}, data=data)
        assert sent.status_code == 422 and (message in sent.json()['error'] or not files)
    broken = client.post('/predict', content=b'--x', headers={'content-type': 'multipart/form-data; boundary=y'})
    nameless = client.post('/predict', content=b'--x', headers={'content-type': 'multipart/form-data'})
    assert broken.status_code == nameless.status_code == 422


def bomb():
    """A small PNG file that claims, truthfully, to hold 100 million pixels."""
    return encoded(Image.new('1', (10_000, 10_000)))


def test_hostile_images(client, pictures):
    def sent(content):
        return client.post('/predict', content=content)

    grey = Image.open(io.BytesIO(pictures[0]))
    assert len(bomb()) < 50_000 and '10000 x 10000 pixels' in sent(bomb()).json()['error']
    assert sent(bomb()).status_code == 413
    truncated = sent(encoded(grey, 'JPEG')[:-200])
    assert truncated.status_code == 415 and 'runcated' in truncated.json()['error'] and 'BytesIO' not in truncated.text
    assert sent(encoded(grey, 'TIFF')).status_code == 415
    assert sent(b'<svg xmlns="http://www.w3.org/2000/svg"/>').status_code == 415
    deep = Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257)
    for good in (
        encoded(deep),
        encoded(grey.convert('CMYK'), 'JPEG'),
        encoded(grey.convert('RGBA')),
        encoded(grey.convert('P')),
        encoded(grey.convert('1')),
        encoded(grey, 'GIF', save_all=True, append_images=[grey, grey]),
        encoded(grey.resize((1, 1))),
    ):
        assert sent(good).status_code == 200, sent(good).text
    assert sent(pictures[0]).status_code == 200


def test_a_token_is_asked_for(cascade, pictures):
    with TestClient(create_app(Service(cascade), token='secret')) as client:
        for wrong in ({}, {'authorization': 'Bearer other'}, {'authorization': 'Basic secret'}, {'authorization': ''}):
            refused = client.post('/predict', content=pictures[0], headers=wrong)
            assert refused.status_code == 401 and refused.headers['www-authenticate'] == 'Bearer'
            assert client.get('/metrics', headers=wrong).status_code == 401
            assert client.get('/info', headers=wrong).status_code == 401
        right = {'authorization': 'bearer secret'}
        assert client.post('/predict', content=pictures[0], headers=right).status_code == 200
        assert client.get('/metrics', headers=right).status_code == 200
        assert (
            client.get('/health').status_code == client.get('/ready').status_code == client.get('/').status_code == 200
        )


def numbers(client):
    lines = [line for line in client.get('/metrics').text.splitlines() if not line.startswith('#')]
    return {key: float(value) for key, value in (line.rsplit(' ', 1) for line in lines)}


def test_metrics_count_what_happened(client, cascade, pictures):
    want = predicted(cascade, pictures[:30])
    for picture in pictures[:30]:
        client.post('/predict', content=picture)
    client.post('/predict', content=b'?')
    client.post('/predict?topk=0', content=b'?')
    found = numbers(client)
    shares = want.exit.bincount(minlength=3).tolist()
    assert [found[f'timm_cascade_answers_total{{exit="{i}"}}'] for i in range(3)] == shares
    assert [found[f'timm_cascade_latency_seconds_count{{exit="{i}"}}'] for i in range(3)] == shares
    expected = [found[f'timm_cascade_expected_answers_total{{exit="{i}"}}'] for i in range(3)]
    assert np.allclose(expected, 30 * predicted(cascade, pictures).exit.bincount(minlength=3).numpy() / 96)
    assert found['timm_cascade_requests_total{status="200"}'] == 30 and found['timm_cascade_queue'] == 0
    assert found['timm_cascade_refusals_total{reason="not_an_image"}'] == 1
    assert found['timm_cascade_refusals_total{reason="bad_request"}'] == 1
    costs = np.array(client.get('/info').json()['exit_costs'])
    total = cascade.exits[-1].total
    assert found['timm_cascade_macs_total'] == pytest.approx(total * float(costs @ shares))
    assert found['timm_cascade_saved_macs_total'] == pytest.approx(total * float(np.maximum(1 - costs, 0) @ shares))
    assert found['timm_cascade_batch_size_sum'] == 30


def test_a_full_queue_refuses_and_recovers(cascade, pictures):
    """The model is held at its first batch, until the queue is full."""
    go, running = threading.Event(), threading.Event()
    service = Service(cascade, limits=Limits(queue=3))
    run = service.run

    def held(batch, on_answer):
        running.set()
        go.wait(30)
        run(batch, on_answer)

    service.run = held
    with TestClient(create_app(service, warm_up=False)) as client:
        results = []
        threads = [
            threading.Thread(target=lambda: results.append(client.post('/predict', content=pictures[0]).status_code))
            for _ in range(3)
        ]
        for t in threads:
            t.start()
        assert running.wait(30)
        while numbers(client)['timm_cascade_queue'] < 3:
            pass
        refused = client.post('/predict', content=pictures[0])
        assert refused.status_code == 503 and refused.headers['retry-after'] == '1' and '3 requests' in refused.text
        assert client.get('/ready').status_code == 503 and client.get('/health').status_code == 200
        go.set()
        for t in threads:
            t.join()
        assert results == [200] * 3 and client.get('/ready').status_code == 200
        assert client.post('/predict', content=pictures[0]).status_code == 200


def test_an_answer_that_is_not_a_number_is_an_error_of_the_server(client, cascade, pictures):
    with torch.no_grad():
        cascade.backbone.fc.bias.fill_(float('nan'))
    answers = [client.post('/predict', content=p) for p in pictures[:24]]
    bad = [a for a in answers if a.status_code == 500]
    assert bad and all('not a number' in a.json()['error'] for a in bad)
    good = [a.json()['exit'] for a in answers if a.status_code == 200]
    assert len(good) + len(bad) == 24 and set(good) == {0, 1}  # exits before it answer as ever


def test_the_page_needs_no_other_server(client):
    page = client.get('/')
    assert (
        page.headers['content-type'].startswith('text/html')
        and "default-src 'none'" in page.headers['content-security-policy']
    )
    assert 'http://' not in page.text and 'https://' not in page.text
    assert json.loads(client.get('/health').text) == {'status': 'ok'}


def test_a_model_without_calibration_has_only_its_own_thresholds(small, pictures):
    small.thresholds = [0.5, None]
    with TestClient(create_app(Service(small), warm_up=False)) as client:
        assert client.post('/predict', content=pictures[0]).status_code == 200
        refused = client.post('/predict?max_drop=0.01', content=pictures[0])
        assert refused.status_code == 422 and 'not calibrated' in refused.json()['error']
        assert client.get('/info').json()['calibrated'] is False
