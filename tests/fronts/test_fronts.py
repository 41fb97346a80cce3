import copy
import json
import pickle
import threading

import pytest
import timm
import torch
from helpers import batch_for, between, near, run, same, split_thresholds
from torch import nn

import timm_cascade
from timm_cascade import hub
from timm_cascade.errors import FrontError, ReleaseError
from timm_cascade.fronts import Front, split_size
from timm_cascade.inference.batch import confidence
from timm_cascade.thresholds import route

GREY = dict(in_chans=1, num_classes=4, pretrained_cfg_overlay=dict(input_size=(1, 16, 16), mean=(0.5,), std=(0.25,)))
# the large network, what stands in front of it, and the exits behind
PAIRS = [
    ('test_resnet', 'test_resnet@96', 1),
    ('test_resnet', 'test_mambaout', 0),
    ('test_vit', 'test_efficientnet', 1),
    ('test_vit', 'test_vit@96', 0),
    ('test_vit2', 'test_byobnet', 1),
    ('test_convnext', 'test_resnet@64', 1),
    ('test_efficientnet', 'mobilenetv3_small_050@128', 0),
    ('mobilenetv3_small_050', 'test_convnext2@96', 1),
    ('test_byobnet', 'test_vit3', 0),
    ('test_nfnet', 'test_resnet@80', 1),
]


def small_network(depth=1):
    return timm.create_model('cifar_resnet20', depth=depth, **GREY)


@pytest.fixture
def fronted():
    """cascade_cifar_resnet20 for grey 16x16 images with a ResNet-8 in front and one exit behind."""
    return timm.create_model('cascade_cifar_resnet20', front=small_network(), exits=['layer1'], **GREY).eval()


@pytest.mark.parametrize('large, front, exits', PAIRS)
def test_remaining_samples_get_the_large_network_s_logits(large, front, exits):
    model = timm.create_model(f'cascade_{large}', front=front, exits=exits, num_classes=7).eval()
    x = batch_for(model, 6)
    with torch.no_grad():
        every = model.forward_exits(x)
        model.thresholds = [between(confidence(every[0])), *[None] * exits]
        out = model.predict(x)
        network, alone = model.fronts[0].inner, model.fronts[0].prepare(x)
        assert near(every[0], network(alone)) and near(every[-1], model.backbone(x))
    assert 0 < int((out.exit == 0).sum()) < len(x)
    want = torch.where((out.exit == 0)[:, None], every[0], every[-1])
    assert near(out.logits, want)
    same(list(model.stream(x.split(4))), out)
    assert model.stage_macs()[0] == model.head_macs()[0] == model.fronts[0].macs()


def test_a_front_and_an_exit_inside_the_network_in_every_way_to_run(fronted):
    x = batch_for(fronted, 8)
    every = torch.stack([confidence(e) for e in fronted.forward_exits(x)], 1).detach()
    first = between(every[:, 0])
    fronted.thresholds = [first, between(every[every[:, 0] < first, 1])]
    with torch.no_grad():
        out = fronted.predict(x)
        assert out.exit.tolist() == route(every.numpy(), fronted.thresholds.numpy()).tolist()
        assert set(out.exit.tolist()) == {0, 1, 2}
        order = torch.randperm(len(x))
        assert torch.equal(fronted.predict(x[order]).exit, out.exit[order])
        for i in range(len(x)):  # a batch of one
            alone = fronted.predict(x[i : i + 1])
            assert alone.exit.item() == out.exit[i] and near(alone.logits, out.logits[i : i + 1])
        own = fronted.predict(x, thresholds=[[0.0, None]] * 4 + [[None, None]] * 4)
        assert own.exit.tolist() == [0] * 4 + [2] * 4
        found: list = []
        threads = [threading.Thread(target=lambda: found.append(fronted.predict(x).exit)) for _ in range(2)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert all(torch.equal(f, out.exit) for f in found)
        fronted.compile(backend='eager', choose=False)
        assert torch.equal(fronted.predict(x).exit, out.exit)
        assert fronted.fronts[0].run.router._exported  # the front's network is compiled, too
        assert torch.equal(copy.deepcopy(fronted).predict(x).exit, out.exit)
        same(list(fronted.stream(x.split(3))), out)
        fronted.compile(False)
        assert fronted.fronts[0].run is None
        fronted.thresholds = [0.0, None]
        assert fronted.predict(x).exit.tolist() == [0] * 8  # all exit in front, and the backbone does not run
        with torch.no_grad():
            fronted.fronts[0].inner.fc.bias.fill_(float('nan'))
        assert fronted.predict(x).exit.tolist() == [2] * 8  # a confidence of NaN never exits


def test_two_fronts_and_half_precision():
    fronts = [small_network(1), small_network(2)]
    model = timm.create_model('cascade_cifar_resnet20', front=fronts, exits=1, **GREY).eval()
    assert [p.module for p in model.exits[:2]] == ['front:cifar_resnet20@16', 'front:cifar_resnet20@16#2']
    x = batch_for(model, 6)
    with torch.no_grad():
        want = model.forward_exits(x)
        model.bfloat16()
        assert model.fronts[0].scale.dtype == torch.float32
        got = model.forward_exits(x.bfloat16())
    assert len(got) == 4 and all(near(a.float(), b, 0.2) for a, b in zip(got, want, strict=True))


def test_images_are_made_for_the_front_on_the_device():
    cfg = dict(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.125))
    network = timm.create_model(
        'test_resnet', num_classes=7, pretrained_cfg_overlay=dict(input_size=(3, 64, 64), **cfg)
    )
    backbone = timm.create_model('test_vit', num_classes=7)
    front = Front(network, backbone)
    pixels = torch.rand(2, 3, 160, 160)
    own = timm.data.resolve_model_data_config(backbone)
    mean, std = (torch.tensor(own[k])[:, None, None] for k in ('mean', 'std'))
    want = nn.functional.interpolate(pixels, (64, 64), mode=front.interpolation, antialias=True)
    want = (want - torch.tensor(cfg['mean'])[:, None, None]) / torch.tensor(cfg['std'])[:, None, None]
    assert front.name == 'test_resnet.r160_in1k@64'
    assert near(front.prepare((pixels - mean) / std), want)


def test_the_network_s_own_weights_are_shared_not_held_twice():
    model = timm.create_model('cascade_cifar_resnet20', front='cifar_resnet20@12', exits=1, **GREY).eval()
    assert model.fronts[0].inner is model.backbone
    assert not [k for k in model.state_dict() if k.startswith('heads.0.') and 'network' in k]
    assert len(list(model.parameters())) == len({id(p) for p in model.parameters()})
    x = batch_for(model, 4)
    model.thresholds = split_thresholds(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.fronts[0].inner is other.backbone and other.backbone is not model.backbone
        assert torch.equal(other.predict(x).exit, model.predict(x).exit)
    with torch.no_grad():
        model.backbone.fc.bias += 1.0
    assert near(model.forward_exits(x)[0], model.backbone(model.fronts[0].prepare(x)))


@pytest.mark.parametrize(
    'front, message',
    [
        ('nonsense', "front='nonsense' in front of test_vit.r160_in1k cannot be loaded"),
        ('test_vit', 'test_vit.r160_in1k at 160 pixels, which is the cascade.s own network at its own size'),
        (lambda: timm.create_model('test_resnet', num_classes=9), 'has 9 classes, test_vit.r160_in1k has 7'),
        (lambda: timm.create_model('test_resnet', num_classes=7, in_chans=1), 'images of 1 channels, test_vit.* of 3'),
        (lambda: timm.create_model('test_resnet', features_only=True), 'no classifier.* in front of test_vit'),
        (lambda: timm.create_model('test_resnet', num_classes=0), 'no classifier.* in front of test_vit'),
        (lambda: (timm.create_model('vit_tiny_patch16_224', num_classes=7), 100), '100 pixels .*only of 224'),
        (lambda: timm.create_model('cascade_test_resnet', num_classes=7, exits=1), 'is itself a cascade'),
        (['test_resnet', 'test_resnet@64'], 'list the cheapest first'),
        (3, 'expected a name, a timm model'),
        ('test_resnet@0', 'a size is 1 to 9999 pixels'),
    ],
)
def test_what_cannot_stand_in_front_is_refused(front, message):
    with pytest.raises(FrontError, match=message):
        timm.create_model('cascade_test_vit', front=front() if callable(front) else front, exits=0, num_classes=7)


def test_a_refused_front_leaves_both_networks_as_they_were():
    backbone, other = timm.create_model('test_vit', num_classes=7), timm.create_model('test_resnet', num_classes=9)
    with pytest.raises(FrontError, match='9 classes'):
        timm_cascade.CascadeModel(backbone, 1, front=other)
    assert other.training and all(p.requires_grad for p in [*backbone.parameters(), *other.parameters()])
    assert not any(m._forward_hooks for m in backbone.modules())
    with pytest.raises(FrontError, match='is a name'):
        timm_cascade.CascadeModel(backbone, 1, front='test_resnet')


def test_classes_in_another_order_are_refused(fronted):
    named, other = small_network(), small_network(3)
    named.pretrained_cfg['label_names'] = ['a', 'b', 'c', 'd']
    other.pretrained_cfg['label_names'] = ['a', 'c', 'b', 'd']
    with pytest.raises(FrontError, match="another order: class 1 is 'b' there and 'c' in"):
        timm_cascade.CascadeModel(other, 1, front=named)
    model = timm_cascade.CascadeModel(small_network(3), 1, front=named)
    with pytest.raises(FrontError, match="other classes: class 3 is 'd' there and 'e'"):
        model.label_names = ['a', 'b', 'c', 'e']
    assert model.label_names is None
    with pytest.raises(FrontError, match='9 classes were asked for, and front cifar_resnet20@16 has 4'):
        fronted.reset_classifier(9)
    assert fronted.num_classes == 4


def test_only_fresh_heads_are_trained(fronted, images):
    before = {k: v.clone() for k, v in fronted.state_dict().items()}
    history = timm_cascade.train_heads(fronted, images, images, epochs=2)
    changed = {k for k, v in fronted.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(k.startswith('heads.1.') for k in changed)
    assert len(history[-1]['accuracy']) == 3 and fronted.dial.path.shape[1] == 2
    alone = timm.create_model('cascade_cifar_resnet20', front=small_network(), exits=0, **GREY)
    with pytest.raises(ValueError, match='nothing to train: all exits of this cascade are fronts'):
        timm_cascade.train_heads(alone, images)


@pytest.mark.parametrize('front, exits', [('net', 0), ('net', 1), ('cifar_resnet20@12', 1)])
def test_calibrated_saved_and_loaded_again(front, exits, images, tmp_path):
    front = small_network() if front == 'net' else front
    model = timm.create_model('cascade_cifar_resnet20', front=front, exits=exits, **GREY).eval()
    timm_cascade.calibrate(model, images)
    timm_cascade.profile(model, batch_size=4, repeats=1)
    for rule, cost in (('joint', 'macs'), ('certified', 'macs'), ('per_exit', 'macs'), ('joint', 'time')):
        point = model.set_max_drop(0.3, rule=rule, cost=cost)
        assert len(point.thresholds) == 1 + exits
    model.thresholds = [0.3] * (1 + exits)
    assert timm_cascade.evaluate(model, images, every_exit=True).n == 96
    hub.save(model, tmp_path)
    x = batch_for(model, 5)
    for loaded in (hub.load(tmp_path), timm.create_model(f'local-dir:{tmp_path}', pretrained=True)):
        loaded.eval()
        assert torch.equal(loaded.predict(x).logits, model.predict(x).logits)
        assert loaded.heads_hash() == model.heads_hash() and loaded.calibration.exits == model.calibration.exits
        assert loaded.profiles and torch.equal(loaded.thresholds, model.thresholds)
        loaded.set_max_drop(0.3, rule='joint')
    with torch.no_grad():
        model.fronts[0].inner.fc.bias += 0.1
    with pytest.raises(timm_cascade.TableMismatchError, match='weights have changed'):
        model.set_max_drop(0.3)


def test_the_command_line_shows_and_calibrates_fronts(fronted, images, tmp_path, capsys):
    hub.save(fronted, tmp_path / 'release')
    status, out, _ = run(capsys, 'info', tmp_path / 'release')
    assert status == 0
    assert [m['network'] for m in out['members']] == ['cifar_resnet20@16', 'cifar_resnet20']
    assert out['members'][0]['macs'] == fronted.fronts[0].macs()


def test_a_release_with_other_fronts_is_not_loaded(fronted, tmp_path):
    hub.save(fronted, tmp_path)
    path = tmp_path / 'config.json'
    good = json.loads(path.read_text())
    assert good['cascade']['format_version'] == 3

    def spoilt(**values):
        config = copy.deepcopy(good)
        config['cascade']['fronts'][0].update(values)
        return config

    for config, message in [
        (spoilt(name='other@16'), 'cascade.fronts has'),
        (spoilt(architecture='cascade_test_resnet'), 'does not know'),
        (spoilt(architecture='os.system'), 'architecture'),
        (spoilt(args=dict(pretrained_cfg={'file': '/etc/passwd'})), 'args'),
        (spoilt(args=dict(checkpoint_path='x')), 'not arguments that a release may set'),
        (spoilt(args=dict(good['cascade']['fronts'][0]['args'], depth=3)), 'do not fit config.json'),
        (spoilt(args=dict(good['cascade']['fronts'][0]['args'], width=1 << 20)), 'numbers; it is not built|cannot be'),
        (spoilt(digest='0' * 16), 'its front cifar_resnet20@16 is'),
        (spoilt(size=[0, 16]), 'size'),
        (spoilt(url='https://example.org'), 'not a known key'),
    ]:
        path.write_text(json.dumps(config))
        with pytest.raises(ReleaseError, match=message):
            hub.load(tmp_path)


def test_asking_a_release_for_other_classes_names_the_front(fronted, tmp_path):
    hub.save(fronted, tmp_path)
    with pytest.raises(ReleaseError, match='front cifar_resnet20@16 has 4 classes, cifar_resnet20 has 5'):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=5)


@pytest.mark.parametrize(
    'text, want',
    [
        ('resnet50.a1_in1k@160', ('resnet50.a1_in1k', (160, 160))),
        ('resnet50@160x224', ('resnet50', (160, 224))),
        ('hf-hub:me/net@3f2a9c1', ('hf-hub:me/net@3f2a9c1', None)),
        ('hf-hub:me/net@3f2a9c1@96', ('hf-hub:me/net@3f2a9c1', (96, 96))),
        ('resnet50', ('resnet50', None)),
    ],
)
def test_a_size_after_a_name(text, want):
    assert split_size(text) == want
