"""A corpus of hostile and damaged releases: each is refused by a ReleaseError that names the file, and nothing runs."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import timm_cascade
from timm_cascade import hub
from timm_cascade.errors import ReleaseError


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    """One sound release; tests work on copies."""
    torch.manual_seed(0)
    model = timm.create_model(
        'cascade_cifar_resnet20',
        in_chans=1,
        num_classes=4,
        exits=['layer1', 'layer2'],
        pretrained_cfg_overlay=dict(input_size=(1, 16, 16), mean=(0.5,), std=(0.25,)),
    ).eval()
    images = torch.randint(0, 255, (64, 16, 16), dtype=torch.uint8).numpy()
    timm_cascade.calibrate(model, timm_cascade.ImageData(images, torch.arange(64).numpy() % 4, list('abcd'), 'noise'))
    model.label_names = list('abcd')
    model.thresholds = [0.9, None]
    return timm_cascade.save(model, tmp_path_factory.mktemp('corpus') / 'sound')


def config(edit):
    def apply(folder):
        content = json.loads((folder / hub.CONFIG).read_text())
        edit(content)
        (folder / hub.CONFIG).write_text(json.dumps(content))

    return apply, hub.CONFIG


def args(**values):
    return config(lambda c: c['model_args'].update(values))


def entry(**values):
    return config(lambda c: c['cascade'].update(values))


def backbone(**values):
    return entry(
        layout='heads',
        backbone=dict(
            name='cifar_resnet20', hub_id='a/b', revision='0' * 40, filename='model.safetensors', digest='', dtype=''
        )
        | values,
    )


def text(name, content):
    return (lambda folder: (folder / name).write_text(content)), name


def weights(edit):
    def apply(folder):
        tensors = load_file(folder / hub.WEIGHTS)
        edit(tensors)
        save_file(tensors, folder / hub.WEIGHTS)

    return apply, hub.WEIGHTS


def header(content, data=b''):
    def apply(folder):
        head = json.dumps(content).encode()
        (folder / hub.WEIGHTS).write_bytes(struct.pack('<Q', len(head)) + head + data)

    return apply, hub.WEIGHTS


def raw(name, edit):
    return (lambda folder: (folder / name).write_bytes(edit((folder / name).read_bytes()))), name


def table(edit):
    def apply(folder):
        content = json.loads((folder / hub.TABLE).read_text())
        edit(content)
        (folder / hub.TABLE).write_text(json.dumps(content))

    return apply, hub.TABLE


def flip(content, at):
    return content[:at] + bytes([content[at] ^ 64]) + content[at + 1 :]


def set_nan(tensors):
    tensors['backbone.conv1.weight'][0] = float('nan')


def rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


DEEP = '[' * 100_000 + ']' * 100_000
HOSTILE = {
    'truncated weights': (raw(hub.WEIGHTS, lambda b: b[: len(b) // 2]), 'truncated'),
    'empty weights': (raw(hub.WEIGHTS, lambda b: b''), 'truncated'),
    'a bit of a head flipped': (raw(hub.WEIGHTS, lambda b: flip(b, len(b) - 9)), 'damaged'),
    'a bit of the backbone flipped': (raw(hub.WEIGHTS, lambda b: flip(b, len(b) // 2)), 'damaged'),
    'a bit of the header flipped': (raw(hub.WEIGHTS, lambda b: flip(b, 20)), 'safetensors'),
    'NaN': (weights(set_nan), 'NaN'),
    '2**62 numbers': (
        header({'heads.0.fc.weight': dict(dtype='F32', shape=[2**62], data_offsets=[0, 4])}, b'1234'),
        'overflow',
    ),
    '2**62 rows of nothing': (
        header(
            {
                'heads.0.fc.weight': dict(dtype='F32', shape=[2**62, 0], data_offsets=[0, 0]),
                'backbone.conv1.weight': dict(dtype='F32', shape=[0], data_offsets=[0, 0]),
            }
        ),
        'do not fit',
    ),
    'a header of 2**60 bytes': (raw(hub.WEIGHTS, lambda b: struct.pack('<Q', 2**60) + b[8:]), 'header'),
    'a path for a name': (weights(rename('heads.0.fc.bias', '../../fc.bias')), r'\.\./\.\./fc\.bias'),
    'tensors of another model': (weights(rename('heads.0.fc.bias', 'heads.7.fc.bias')), 'do not fit'),
    'no heads': (weights(lambda t: [t.pop(k) for k in list(t) if k[0] == 'h']), 'no heads'),
    'another shape': (weights(lambda t: t.update({'heads.0.fc.bias': torch.zeros(5)})), 'do not fit'),
    'far too large': (raw(hub.WEIGHTS, lambda b: b + bytes(24 << 20)), 'at most'),
    'a million thresholds': (args(thresholds=[0.5] * 10**6), '1000000 thresholds for 2'),
    'a threshold out of range': (args(thresholds=[7.0, 0.5]), '0..1'),
    'NaN for a threshold': (raw(hub.CONFIG, lambda b: b.replace(b'0.89999', b'NaN, 0')), 'config'),
    'a million thresholds in the table': (
        table(lambda t: t['points'][0].update(thresholds=[0.5] * 10**6)),
        'thresholds',
    ),
    'a table for other heads': (table(lambda t: t.update(heads_hash='0' * 16)), 'heads_hash'),
    'deep table': (text(hub.TABLE, '{"a":' + DEEP + '}'), 'not a threshold table'),
    'table of the future': (table(lambda t: t.update(format_version=99)), 'newer'),
    'table without points': (table(lambda t: t.pop('points')), 'missing'),
    'calibration of junk': (raw(hub.CALIBRATION, lambda b: b'junk'), 'not a calibration'),
    'calibration flipped': (raw(hub.CALIBRATION, lambda b: flip(b, 30)), 'calibration'),
    'deep config': (text(hub.CONFIG, '{"cascade":' + DEEP + '}'), 'deep'),
    'config of a list': (text(hub.CONFIG, '[]'), 'not a JSON object'),
    'config of bytes': (raw(hub.CONFIG, lambda b: b'\xff\xfe' + b), 'config'),
    'huge config': (text(hub.CONFIG, ' ' * (9 << 20)), 'at most'),
    'format of the future': (entry(format_version=99), 'upgrade'),
    'missing keys': (config(lambda c: c['cascade'].pop('exits')), 'exit points'),
    'no thresholds': (config(lambda c: c['model_args'].pop('thresholds')), 'thresholds for 2'),
    'a huge label list': (config(lambda c: c.update(label_names=['x'] * 200_000)), '200000 label_names for 4'),
    'a label that is a list': (config(lambda c: c.update(label_names=['a', 'b', 'c', []])), 'label'),
    'another architecture': (config(lambda c: c.update(architecture='resnet18')), 'no cascade'),
    'unknown architecture': (config(lambda c: c.update(architecture='cascade_../../x')), 'does not know'),
    'a path for an exit': (args(exits=['layer1/../../x', 'layer2']), r'layer1/\.\./\.\./x'),
    "an argument that is not the model's to set": (args(checkpoint_path='/etc/passwd'), 'checkpoint_path'),
    'an argument nobody knows': (args(frobnicate=1), 'frobnicate'),
    'giant width': (args(num_classes=2**40), 'model_args.num_classes'),
    'giant model': (args(depth=10**9), 'model_args.depth'),
    'many classes': (
        config(
            lambda c: (c.update(num_classes=1_000_000, label_names=None), c['model_args'].update(num_classes=1_000_000))
        ),
        'do not fit',
    ),
    'wrong head': (args(head='linear'), 'grid, hidden and norm'),
    'giant head': (args(head=[dict(grid=1, hidden=2**40, norm=True)] * 2), 'grid, hidden and norm'),
    'unknown key for timm': (config(lambda c: c['pretrained_cfg'].update(run='rm')), 'run'),
    'images of 10**9 pixels': (
        config(lambda c: c['pretrained_cfg'].update(input_size=[1, 10**9, 10**9])),
        'input_size',
    ),
    'a backbone by path': (backbone(hub_id='../../etc'), 'hub_id'),
    'a backbone by pickle': (backbone(filename='../x.bin'), 'safetensors'),
    'a backbone that is not pinned': (backbone(revision='main'), 'revision'),
    'heads for another backbone': (backbone(name='resnet18'), 'resnet18'),
    'a backbone from anywhere': (backbone(hub_id=None), 'no Hub repository'),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_refused_by_name(corpus, tmp_path, name):
    ((damage, file), message) = HOSTILE[name]
    folder = tmp_path / 'release'
    shutil.copytree(corpus, folder)
    damage(folder)
    with pytest.raises(ReleaseError, match=message) as e:
        hub.load(folder)
    assert file in str(e.value) and len(str(e.value)) < 2000


def test_the_corpus_is_made_of_a_sound_release(corpus):
    assert hub.load(corpus).any_open is False  # in training mode, as timm creates models
    assert hub.load(corpus).eval().any_open


def test_a_model_that_grows_without_end_is_stopped(corpus, tmp_path):
    from timm_cascade.hub.create import _bounded

    with pytest.raises(ReleaseError, match='not built'), _bounded(1000), torch.device('meta'):
        timm.create_model('cifar_resnet20')
    timm.create_model('cifar_resnet20')  # and the bound is off again


def test_only_a_pickle_is_refused(corpus, tmp_path):
    folder = tmp_path / 'release'
    shutil.copytree(corpus, folder)
    (folder / hub.WEIGHTS).rename(folder / 'pytorch_model.bin')
    with pytest.raises(ReleaseError, match=r'only pytorch_model\.bin, a pickle'):
        timm.create_model(f'local-dir:{folder}', pretrained=True)
