"""What the dial would save with networks in front, told from one pass of each."""

from __future__ import annotations

import shlex

import numpy as np
import pytest
import timm
import torch
from helpers import run, save_as_timm_does, write_idx
from torch import nn

import timm_cascade
from timm_cascade.errors import FrontError
from timm_cascade.measure.suggest import MAX_DROPS, RULES

GREY = dict(in_chans=1, num_classes=4, pretrained_cfg_overlay=dict(input_size=(1, 16, 16), mean=(0.5,), std=(0.25,)))


def network(depth=1, seed=0):
    """A small network that answers by which quarter of the image is bright; less surely the higher the seed."""
    torch.manual_seed(seed)
    net = timm.create_model('cifar_resnet20', depth=depth, **GREY).eval()

    class Bright(nn.Module):
        def forward(self, x):
            quarters = nn.functional.adaptive_avg_pool2d(x[:, :1], 2).flatten(1)
            return quarters * (4 - 0.3 * seed) + seed * 0.4 * torch.sin(9 * x.mean((1, 2, 3), keepdim=False))[:, None]

    net.fc.register_forward_hook(lambda m, args, out: out * 1e-3 + net.bright)
    net.register_forward_pre_hook(lambda m, args: setattr(net, 'bright', Bright()(args[0])))
    return net


@pytest.fixture
def large():
    return timm_cascade.CascadeModel(network(3), ['layer1', 'layer2']).eval()


@pytest.fixture
def many(images):
    """The 96 images several times over, with noise of their own."""
    noise = np.random.default_rng(1).integers(0, 40, (4 * 96, 16, 16), dtype=np.uint8)
    return timm_cascade.ImageData(
        np.concatenate([images.images] * 4) // 2 + noise, np.tile(images.labels, 4), images.class_names, 'quarters'
    )


def counted(module):
    """The module, and a list that gets the size of every batch it runs on."""
    sizes: list[int] = []
    module.register_forward_pre_hook(lambda m, args: None if args[0].is_meta else sizes.append(len(args[0])))
    return module, sizes


def test_candidates_take_a_pass_each_and_nothing_else(large, many, tmp_path, monkeypatch):
    monkeypatch.setattr('timm_cascade.measure.suggest._choices', lambda *args: [])  # arithmetic, tested below
    candidates, sizes = zip(*(counted(network(1, seed)) for seed in range(6)), strict=True)
    _, of_large = counted(large.backbone)
    subset = torch.utils.data.Subset(many, range(64))
    found = timm_cascade.suggest(large, candidates, subset, batch_size=32, work_dir=tmp_path)
    assert all(s == [32, 32] for s in sizes) and of_large == [32, 32]
    assert len(found) == 6 + 6 * 5 // 2
    again = timm_cascade.suggest(large, candidates, subset, batch_size=32, work_dir=tmp_path)
    assert all(s == [32, 32] for s in sizes) and of_large == [32, 32]
    assert [(s.front, s.accuracy) for s in again] == [(s.front, s.accuracy) for s in found]


def test_an_interrupted_call_continues(large, many, tmp_path, monkeypatch):
    monkeypatch.setattr('timm_cascade.measure.suggest._choices', lambda *args: [])
    candidates, sizes = zip(*(counted(network(1, seed)) for seed in range(3)), strict=True)

    def stop(module, args):
        if not args[0].is_meta:
            raise KeyboardInterrupt

    handle = candidates[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        timm_cascade.suggest(large, candidates, many, work_dir=tmp_path)
    handle.remove()
    (tmp_path / 'suggest' / 'half.npz').write_bytes(b'junk')
    before = [len(s) for s in sizes]
    timm_cascade.suggest(large, candidates, many, work_dir=tmp_path)
    assert [len(s) for s in sizes] == [before[0], before[1] + 2, before[2] + 2] and before[0] == 2
    for file in (tmp_path / 'suggest').glob('*.npz'):  # damaged files are not trusted
        file.write_bytes(file.read_bytes()[:100])
    timm_cascade.suggest(large, candidates, many, work_dir=tmp_path)
    assert len(sizes[0]) == before[0] + 2


def test_what_is_suggested_is_what_the_cascade_then_does(large, many):
    many = timm_cascade.ImageData(many.images[:192], many.labels[:192], many.class_names, 'quarters')
    timm_cascade.train_heads(large, many, epochs=1)
    fronts = [network(1, 2), network(2, 1)]
    found = timm_cascade.suggest(large, fronts, many)
    assert len(found) == 1 + 2 * 3 and found == sorted(found, key=lambda s: s.rank(), reverse=True)
    for s in found:
        if not s.front:
            cascade = large
        else:
            front = list(s.front)
            inner = [p for p in large.exits if p.module in s.exits] or 0
            cascade = timm_cascade.CascadeModel(large.backbone, inner, large._head_configs, front=front).eval()
            for mine, theirs in zip(cascade.heads[len(front) :], large.heads, strict=bool(s.exits)):
                mine.load_state_dict(theirs.state_dict())
        timm_cascade.calibrate(cascade, many)
        assert s.accuracy == pytest.approx(cascade.calibration.correct.mean(0).tolist())
        for rule in RULES:
            for d in MAX_DROPS:
                point = cascade.calibration.point(d, rule)
                assert s.saved[rule, d] == pytest.approx(1 - point.cost_share)
                assert s.drop[rule, d] == pytest.approx(point.drop)
    assert any(share > 0 for share in found[0].saved.values())


def test_what_cannot_be_compared_is_refused_before_anything_runs(large, many):
    other = timm.create_model('cifar_resnet20', **{**GREY, 'num_classes': 5})
    named, swapped = network(1), network(1, 1)
    swapped.pretrained_cfg['label_names'] = ['a', 'c', 'b', 'd']
    _, ran = counted(large.backbone)
    for candidates, data, error, message in (
        (['nonsense'], many, FrontError, "'nonsense' in front of cifar_resnet20"),
        ([named, other], many, FrontError, '5 classes, cifar_resnet20 has 4'),
        ([named, swapped], many, FrontError, "class 1 is 'c' there and 'b' in quarters"),
        ([named], many.without_labels(), ValueError, 'some images have no label'),
        ([named, named], many, ValueError, 'among the candidates twice'),
        ([], many, ValueError, 'nothing to compare'),
    ):
        with pytest.raises(error, match=message):
            timm_cascade.suggest(large, candidates, data)
    with pytest.raises(ValueError, match="exits has 'layer9'; this cascade has layer1, layer2"):
        timm_cascade.suggest(large, [named], many, exits=['layer9'])
    with pytest.raises(FrontError, match='stands in front of this cascade already'):
        timm_cascade.suggest(timm_cascade.CascadeModel(network(3), 0, front=named), [swapped], many)
    assert not ran
    some = [
        (image, -1 if i == 3 else int(label))
        for i, (image, label) in enumerate(zip(many.images, many.labels, strict=True))
    ]
    with pytest.raises(ValueError, match='some images have no label'):
        timm_cascade.suggest(large, [named], some)


def test_the_command_prints_what_builds_the_winner(images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'data').mkdir()
    for part in ('train', 't10k'):
        write_idx(tmp_path / 'data' / f'{part}-images-idx3-ubyte.gz', np.asarray(images.images))
        write_idx(tmp_path / 'data' / f'{part}-labels-idx1-ubyte.gz', images.labels.astype(np.uint8))
    large = timm_cascade.CascadeModel(timm.create_model('cifar_resnet20', **GREY), ['layer1'])
    timm_cascade.train_heads(large, images, epochs=3, classifier=True)
    large.label_names = list('0123')
    timm_cascade.save(large, 'release')
    for depth in (1, 2):
        small = timm_cascade.CascadeModel(timm.create_model('cifar_resnet20', depth=depth, **GREY), ['layer1'])
        timm_cascade.train_heads(small, images, epochs=3, classifier=True)
        save_as_timm_does(small.backbone, f'net{depth}')
    data = ['--data', 'data', '--split', 'test']
    networks = ['local-dir:net1', 'local-dir:net2']
    status, out, _ = run(
        capsys, 'suggest', '--model', 'release', '--candidates', *networks, *data, '--work-dir', 'work'
    )
    assert status == 0 and [c['network'] for c in out['candidates']] == ['cifar_resnet20@16', 'cifar_resnet20@16#2']
    assert len(out['share_of_macs_saved']) == 1 + 2 * 3 and {r['exits'] for r in out['share_of_macs_saved']} == {
        '-',
        'layer1',
    }
    again = ['suggest', '--model', 'release', '--candidates', *networks, *data, '--work-dir', 'work', '--exits', 0]
    status, out, _ = run(capsys, *again)
    rows = out['share_of_macs_saved']
    assert status == 0 and len(rows) == 3 and rows[0]['joint 1 points'] > 0
    built, calibrated = map(shlex.split, out['build'])
    assert built[:2] == ['python', '-c'] and calibrated[:2] == ['timm-cascade', 'calibrate']
    with pytest.warns(UserWarning, match='No exit fires until the cascade is calibrated'):
        exec(built[2])
    status, _, _ = run(capsys, *calibrated[1:-1], 'test')
    winner = timm_cascade.load(calibrated[2])
    assert status == 0
    assert len(winner.fronts) == len(winner.exits) == len(rows[0]['front'].split(' + '))
    point = winner.calibration.point(0.01, 'joint')
    assert round(1 - point.cost_share, 4) == rows[0]['joint 1 points']

    status, _, err = run(capsys, 'suggest', '--model', 'cascade_cifar_resnet20', '--candidates', *networks, *data)
    assert status == 2 and 'has published weights for no classes, data test has 4' in err
    torch.save(large.backbone.state_dict(), 'large.pt')
    fresh = ['suggest', '--model', 'cascade_cifar_resnet20', '--candidates', *networks, *data]
    fresh += ['--checkpoint', 'large.pt', '--img-size', 16, '--in-chans', 1, '--mean', 0.5, '--std', 0.25]
    status, out, _ = run(capsys, *fresh)
    assert status == 0 and {r['exits'] for r in out['share_of_macs_saved']} == {'-'}
    assert shlex.split(out['build'][0])[:4] == ['timm-cascade', 'train', '--model', 'cascade_cifar_resnet20']
    status, _, err = run(capsys, *fresh, '--exits', 'layer1')
    assert status == 2 and 'heads of a new cascade_cifar_resnet20 are not trained' in err


def test_heads_are_kept_when_a_release_gets_other_networks_in_front(large, images, tmp_path):
    timm_cascade.train_heads(large, images, epochs=1)
    timm_cascade.calibrate(large, images)
    timm_cascade.save(timm_cascade.CascadeModel(timm.create_model('cifar_resnet20', **GREY), 1), tmp_path / 'a')
    first = timm_cascade.load(tmp_path / 'a')
    fronted = timm_cascade.CascadeModel(first.backbone, first.exits, first._head_configs, front='cifar_resnet20@12')
    fronted.heads[1].load_state_dict(first.heads[0].state_dict())
    timm_cascade.save(fronted, tmp_path / 'b')
    with pytest.warns(UserWarning, match='other networks in front: its calibration and thresholds do not apply'):
        other = timm_cascade.load(tmp_path / 'b', front=['cifar_resnet20@8', 'cifar_resnet20@12'])
    assert len(other.exits) == 3 and other.calibration is None
    for name, tensor in first.heads[0].state_dict().items():
        assert torch.equal(other.heads[2].state_dict()[name], tensor)
