"""The files in hub/ that users copy: the endpoint's handler and the Gradio app."""

import base64
import importlib.util
import io
import sys
import types

import pytest
from helpers import ROOT
from PIL import Image

import timm_cascade


@pytest.fixture
def release(cascade, tmp_path):
    timm_cascade.save(cascade, tmp_path / 'release')
    return tmp_path / 'release'


def load(name):
    spec = importlib.util.spec_from_file_location(f'copied_{name}', ROOT / 'hub' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_handler_answers_as_the_server(release, pictures):
    handler = load('handler').EndpointHandler(str(release))
    service = handler.service
    asked = service.prepare(pictures[3], 0.02, 2)
    want = service.describe(asked, *service.answers([asked]))
    parameters = {'max_drop': 0.02, 'topk': 2}
    for image in (pictures[3], base64.b64encode(pictures[3]).decode(), Image.open(io.BytesIO(pictures[3]))):
        assert handler({'inputs': image, 'parameters': parameters}) == want
    for wrong in ({}, {'inputs': '?'}, {'inputs': b'x'}, {'inputs': pictures[3], 'parameters': {'max_drop': 'much'}}):
        assert set(handler(wrong)) == {'error'}


def test_the_gradio_app_classifies(release, pictures, monkeypatch):
    parts = dict.fromkeys(('Interface', 'Image', 'Slider', 'Label', 'Textbox'), lambda *a, **k: (a, k))
    monkeypatch.setitem(sys.modules, 'gradio', types.SimpleNamespace(**parts))  # it pins an older Pillow
    monkeypatch.setenv('RELEASE', str(release))
    app = load('app')
    scores, text = app.classify(Image.open(io.BytesIO(pictures[0])), 0.0)
    assert len(scores) == 4 and sum(scores.values()) == pytest.approx(1) and 'answered, for' in text
    assert app.classify(None, 0.0) == ({}, 'Choose an image.')
    assert 'max_drop is 2' in app.classify(Image.new('L', (4, 4)), 2)[1]
