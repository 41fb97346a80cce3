"""A corpus of hostile and damaged releases: each is refused by a ReleaseError that names the file, and nothing runs."""

from __future__ import annotations

import json
import shutil
import struct

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
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
        depth=1,
        in_chans=1,
        num_classes=4,
        exits=['layer1', 'layer2'],
        pretrained_cfg_overlay=dict(input_size=(1, 16, 16), mean=(0.5,), std=(0.25,)),
    ).eval()
    images = torch.randint(0, 255, (64, 16, 16), dtype=torch.uint8).numpy()
    model.dial.path = np.array([[np.inf, np.inf], [0.9, 0.8], [0.25, 0.8]])
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


def path_file(**changes):
    def apply(folder):
        file = folder / hub.PATH
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return apply, hub.PATH


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


def calibration(edit):
    def apply(folder):
        path = folder / hub.CALIBRATION
        with safe_open(path, framework='pt') as file:
            described = json.loads(file.metadata()['calibration'])
        tensors = load_file(path)
        edit(described, tensors)
        save_file(tensors, path, {'calibration': json.dumps(described)} if described else {})

    return apply, hub.CALIBRATION


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
        '(?i)overflow',
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
    'thousands of thresholds': (args(thresholds=[0.5] * 10**4), r'model_args\.thresholds is .* at most 256'),
    'a threshold out of range': (args(thresholds=[7.0, 0.5]), r'model_args\.thresholds\.0 is 7\.0'),
    'NaN for a threshold': (raw(hub.CONFIG, lambda b: b.replace(b'0.89999', b'NaN, 0')), 'config'),
    'thousands of thresholds in the table': (
        table(lambda t: t['points'][0].update(thresholds=[0.5] * 10**4)),
        r'points\.0\.thresholds is .* at most 256',
    ),
    'a table for other heads': (table(lambda t: t.update(heads_hash='0' * 16)), "heads' weights"),
    'deep table': (text(hub.TABLE, '{"a":' + DEEP + '}'), 'nested more than'),
    'table of the future': (table(lambda t: t.update(format_version=99)), 'format_version is 99.*newer.*upgrade'),
    'table without points': (table(lambda t: t.pop('points')), 'points is missing'),
    'calibration of junk': (raw(hub.CALIBRATION, lambda b: b'junk'), 'not a calibration'),
    'calibration flipped': (raw(hub.CALIBRATION, lambda b: flip(b, 30)), 'calibration'),
    'deep config': (text(hub.CONFIG, '{"cascade":' + DEEP + '}'), 'deep'),
    'config of a list': (text(hub.CONFIG, '[]'), 'not a JSON object'),
    'config of bytes': (raw(hub.CONFIG, lambda b: b'\xff\xfe' + b), 'config'),
    'huge config': (text(hub.CONFIG, ' ' * (9 << 20)), 'at most'),
    'format of the future': (entry(format_version=99), r'cascade\.format_version is 99.*upgrade'),
    'missing keys': (config(lambda c: c['cascade'].pop('exits')), r'cascade\.exits is missing'),
    'no thresholds': (config(lambda c: c['model_args'].pop('thresholds')), r'model_args\.thresholds is missing'),
    'a huge label list': (config(lambda c: c.update(label_names=['x'] * 200_000)), '200000 label_names for 4'),
    'a label that is a list': (
        config(lambda c: c.update(label_names=['a', 'b', 'c', []])),
        'label_names: it should be a list of texts',
    ),
    'another architecture': (config(lambda c: c.update(architecture='resnet18')), 'not a cascade'),
    'unknown architecture': (config(lambda c: c.update(architecture='cascade_../../x')), 'does not know'),
    'a path for an exit': (args(exits=['layer1/../../x', 'layer2']), r'layer1/\.\./\.\./x'),
    "an argument that is not the model's to set": (
        args(checkpoint_path='/etc/passwd'),
        'model_args: .*checkpoint_path',
    ),
    'an argument nobody knows': (args(frobnicate=1), 'frobnicate'),
    'giant width': (args(num_classes=2**40), 'model_args.num_classes'),
    'giant model': (args(depth=10**9), 'model_args.depth'),
    'many classes': (
        config(
            lambda c: (c.update(num_classes=1_000_000, label_names=None), c['model_args'].update(num_classes=1_000_000))
        ),
        'do not fit',
    ),
    'wrong head': (args(head='linear'), r"model_args\.head is 'linear'"),
    'giant head': (
        args(head=[dict(grid=1, hidden=2**40, norm=True)] * 2),
        r'model_args\.head\.0\.hidden is 1099511627776',
    ),
    'unknown key for timm': (config(lambda c: c['pretrained_cfg'].update(run='rm')), 'pretrained_cfg has keys .*run'),
    'images of 10**9 pixels': (
        config(lambda c: c['pretrained_cfg'].update(input_size=[1, 10**9, 10**9])),
        r'pretrained_cfg\.input_size\.1 is 1000000000',
    ),
    'a backbone by path': (backbone(hub_id='../../etc'), r'cascade\.backbone\.hub_id'),
    'a backbone by pickle': (backbone(filename='../x.bin'), r'cascade\.backbone\.filename .*safetensors'),
    'a backbone that is not pinned': (backbone(revision='main'), r'cascade\.backbone\.revision'),
    'heads for another backbone': (backbone(name='resnet18'), r'cascade\.backbone\.name .*resnet18'),
    'a backbone from anywhere': (backbone(hub_id=None), 'no Hub repository'),
}

EXIT = {
    'layout': ('NCWH', 'NCHW'),
    'channels': (0, 'greater'),
    'size': ([16], 'at least 2'),
    'prefix_tokens': (-1, 'greater'),
    'macs': (2**61, 'less'),
    'cut': ('eval', 'hook'),
    'item': (64, 'less'),
    'rows': ([1.5], 'integer'),
    'module': (None, 'string'),
    'extra': (1, 'not a known key'),
}
for key, (value, message) in EXIT.items():
    HOSTILE[f'{key} of an exit'] = (
        config(lambda c, key=key, value=value: c['cascade']['exits'][0].update({key: value})),
        rf'cascade\.exits\.0\.{key}.*{message}',
    )
HOSTILE |= {
    'exits in another order': (config(lambda c: c['cascade']['exits'].reverse()), 'in the order of their cost'),
    'exits that the model does not have': (
        config(lambda c: c['cascade']['exits'][0].update(module='layer3')),
        r'cascade\.exits has the modules .*layer3.* model_args\.exits',
    ),
    'an item without rows': (config(lambda c: c['cascade']['exits'][1].update(item=3)), r'cascade\.exits\.1: item 3'),
    'a layout of its own': (entry(layout='delta'), r"cascade\.layout is 'delta'"),
    'a digest of another kind': (entry(backbone=dict(digest='x', base_model=None)), r'cascade\.backbone\.digest'),
    'a truth value for a number': (config(lambda c: c.update(num_classes=True)), 'num_classes is True'),
    'a text for a number': (args(head=[dict(grid='1', hidden=0, norm=True)] * 2), r"model_args\.head\.0\.grid is '1'"),
    'an object for a number': (args(depth=dict(a=1)), r'model_args\.depth: '),
    'infinite numbers': (raw(hub.CONFIG, lambda b: b.replace(b'0.25', b'1e999')), r'pretrained_cfg\.std\.0 is inf'),
    'a backbone without a revision': (backbone(revision=None), r'cascade\.backbone: .*needs its revision'),
    'profiles of junk': (text(hub.PROFILES, 'junk'), 'not a JSON object'),
    'profiles of the future': (text(hub.PROFILES, '{"format_version": 9}'), 'format_version is 9.*newer'),
    'deep profiles': (text(hub.PROFILES, '{"a":' + DEEP + '}'), 'nested'),
    'profiles without end': (
        text(hub.PROFILES, json.dumps(dict(format_version=1, profiles=[{}] * 2000))),
        'profiles is .* at most 1000',
    ),
    'a time below zero': (
        text(hub.PROFILES, json.dumps(dict(format_version=1, profiles=[dict(backbone_seconds=-1.0)]))),
        r'profiles\.0\.',
    ),
    'a path of junk': (text(hub.PATH, '[1]'), 'path.json: it is not a JSON object'),
    'a path of the future': (path_file(format_version=9), 'path.json: format_version is 9.*newer'),
    'a path of other heads': (path_file(heads_hash='x'), 'path.json: a path of thresholds for other'),
    'a path that is not nested': (path_file(thresholds=[[None, None], [0.5, 0.5], [0.6, 0.5]]), 'path'),
    'a path of two widths': (path_file(thresholds=[[None, None], [0.5]]), 'path.json'),
    'a path beyond confidences': (path_file(thresholds=[[None, None], [5, 0]]), r'thresholds\.1\.0'),
    'provenance that is no number': (
        raw(hub.TABLE, lambda b: b.replace(b'"provenance": {', b'"provenance": {"a": NaN,')),
        r'provenance\.a is nan',
    ),
    'calibration without a description': (calibration(lambda m, t: m.clear()), 'calibration'),
    'calibration of the future': (calibration(lambda m, t: m.update(format_version=9)), 'format_version is 9.*newer'),
    'calibration of no exits': (calibration(lambda m, t: m.update(exits=[])), 'exits is .*at least 1'),
    'calibration that costs nothing': (calibration(lambda m, t: m.update(backbone_cost=0)), 'backbone_cost is 0'),
    'calibration with another key': (calibration(lambda m, t: m.update(run='rm')), 'run is not a known key'),
    'calibration of other samples': (
        calibration(lambda m, t: t.update(correct=t['correct'][:3])),
        'correct does not fit',
    ),
    'calibration with another array': (calibration(lambda m, t: t.update(more=t['correct'] * 1)), 'more'),
    'calibration of logits': (calibration(lambda m, t: t.update(confidence=t['confidence'] + 3)), 'between 0 and 1'),
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
    from timm_cascade.hub.described import bounded

    with pytest.raises(ReleaseError, match='not built'), bounded(1000), torch.device('meta'):
        timm.create_model('cifar_resnet20')
    timm.create_model('cifar_resnet20')  # and the bound is off again


def test_only_a_pickle_is_refused(corpus, tmp_path):
    folder = tmp_path / 'release'
    shutil.copytree(corpus, folder)
    (folder / hub.WEIGHTS).rename(folder / 'pytorch_model.bin')
    with pytest.raises(ReleaseError, match=r'only pytorch_model\.bin, a pickle'):
        timm.create_model(f'local-dir:{folder}', pretrained=True)
