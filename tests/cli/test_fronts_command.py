"""A cascade of whole networks from a shell: nothing to train, so it is written, calibrated and used."""

from __future__ import annotations

import numpy as np
import timm
import torch
from helpers import run, save_as_timm_does, write_idx

import timm_cascade

GREY = dict(in_chans=1, num_classes=4, pretrained_cfg_overlay=dict(input_size=(1, 16, 16), mean=(0.5,), std=(0.25,)))


def same_weights(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(t, theirs[name]) for name, t in mine.items())


def test_fronts_without_exits_are_written_and_calibrated(images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'data').mkdir()
    for part in ('train', 't10k'):
        write_idx(tmp_path / 'data' / f'{part}-images-idx3-ubyte.gz', np.asarray(images.images))
        write_idx(tmp_path / 'data' / f'{part}-labels-idx1-ubyte.gz', images.labels.astype(np.uint8))
    small, large = (timm.create_model('cifar_resnet20', depth=depth, **GREY) for depth in (1, 3))
    save_as_timm_does(small, 'small')
    torch.save(large.state_dict(), 'large.pt')
    command = ['train', '--model', 'cascade_cifar_resnet20', '--checkpoint', 'large.pt', '--front', 'local-dir:small']
    command += ['--img-size', 16, '--in-chans', 1, '--mean', 0.5, '--std', 0.25, '--data', 'data', '--out', 'out']
    status, out, _ = run(capsys, *command, '--exits', 0)
    assert status == 0 and out['trained'].startswith('no heads: all exits are networks in front')
    assert out['next'].startswith('No exit fires until it is calibrated: timm-cascade calibrate out --data')
    loaded = timm_cascade.load('out')
    for mine, theirs in ((loaded.backbone, large), (loaded.fronts[0].inner, small)):
        assert same_weights(mine, theirs)
    status, out, _ = run(capsys, 'calibrate', 'out', '--data', 'data', '--split', 'test')
    assert status == 0 and len(out['accuracy']) == 2
    status, out, _ = run(capsys, 'info', 'out')
    first, last = out['members']
    assert first['parameters'] == sum(p.numel() for p in small.parameters()) < last['parameters']
    assert (first['size'], first['weights'], last['share']) == ('16x16', 'in the release', 1.0)
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert (
        'behind a smaller network' in card
        and f'| cifar_resnet20@16 | 16x16 | {first["parameters"] / 1e6:.2f} M |' in card
    )
    status, out, _ = run(capsys, *command, '--exits', 1, '--epochs', 1)
    again = timm_cascade.load('out')
    assert status == 0 and out['epoch'] == 1 and same_weights(again.fronts[0].inner, small)
