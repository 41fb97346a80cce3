import itertools

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from timm_cascade.backbone import (
    BackboneError,
    ExitError,
    ExitPoint,
    backbone_macs,
    candidates,
    cut,
    features_of,
    resolve_exits,
)
from timm_cascade.backbone.layouts import find_layout


@pytest.fixture(scope='module')
def resnet():
    return timm.create_model('resnet18')


def test_candidates_are_blocks_in_order_of_cost(resnet):
    points = candidates(resnet)
    names = [p.module for p in points]
    assert names == ['layer1.0', 'layer1', 'layer2.0', 'layer2', 'layer3.0', 'layer3', 'layer4.0', 'layer4']
    assert all(a.macs < b.macs for a, b in itertools.pairwise(points))
    assert all(0 < p.fraction < 1 for p in points)


def test_macs_are_those_of_a_real_pass(resnet):
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        resnet.eval()(torch.randn(1, 3, 224, 224))
    assert candidates(resnet)[0].total == counter.get_total_flops() // 2
    assert backbone_macs(resnet, (3, 224, 224)) == counter.get_total_flops() // 2


def test_measuring_leaves_the_model_as_it_was():
    model = timm.create_model('test_resnet')
    model.layer1.eval()
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    resolve_exits(model, 2)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) and v.device.type == 'cpu' for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    'name, layout',
    [('test_resnet', 'NCHW'), ('test_convnext', 'NCHW'), ('test_vit', 'NLC'), ('swin_tiny_patch4_window7_224', 'NHWC')],
)
def test_layouts_agree_with_forward_intermediates(name, layout):
    model = timm.create_model(name).eval()
    point = resolve_exits(model, [0.5])[0]
    assert point.layout == layout
    if name != 'swin_tiny_patch4_window7_224':
        sizes = {
            (t.shape[1], *t.shape[2:])
            for t in model.forward_intermediates(
                torch.randn(1, *model.pretrained_cfg['input_size']), intermediates_only=True
            )
        }
        assert (point.channels, *point.size) in sizes


def test_counts_fractions_and_names(resnet):
    assert len(resolve_exits(resnet, 3)) == 3
    fractions = [p.fraction for p in resolve_exits(resnet, [0.25, 0.75])]
    assert abs(fractions[0] - 0.25) < 0.1 and abs(fractions[1] - 0.75) < 0.1
    assert [p.module for p in resolve_exits(resnet, ['layer3', 'layer1'])] == ['layer1', 'layer3']
    assert [p.module for p in resolve_exits(resnet, ['layer1.1'])] == ['layer1.1']  # where layer1 ends too


@pytest.mark.parametrize('name', ['resnet18', 'test_resnet', 'test_vit', 'mobilenetv3_small_050', 'vgg11'])
def test_by_default_five_exits_where_they_can_pay_or_fewer(name):
    points = resolve_exits(timm.create_model(name))
    fractions = [p.fraction for p in points]
    assert len(points) == dict(test_resnet=3, vgg11=3).get(name, 5)  # as many places as these have
    assert all(0.05 <= f <= 0.95 for f in fractions)
    assert all(b - a >= 0.04 for a, b in itertools.pairwise(fractions))
    assert not any(p.module.startswith(('bn', 'conv', 'stem')) for p in points)


def test_exits_stand_closer_together_where_the_network_is_cheap():
    model = timm.create_model('vit_tiny_patch16_224', depth=32)  # a place at every 3 % of the cost
    for exits in (None, 3, 6):
        places = [0.0, *(p.fraction for p in resolve_exits(model, exits)), 1.0]
        apart = [b - a for a, b in itertools.pairwise(places)]
        assert apart[0] < 1 / len(apart) < apart[-1] and places[1] >= 0.05


def test_a_number_of_exits_prefers_places_that_can_pay(resnet):
    assert [p.module for p in resolve_exits(resnet, 7)][-1] == 'layer4.0'  # eight places; the last is the whole network
    assert [p.module for p in resolve_exits(resnet, 8)][-1] == 'layer4'


def test_a_network_without_a_good_place_gets_the_one_it_has():
    model = Net()
    model.blocks = torch.nn.Sequential(Residual(4))  # 99 % of the cost, and no other place
    assert [p.module for p in resolve_exits(model)] == ['blocks.0']


class Inner(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = torch.nn.Conv2d(width, width, 1)

    def forward(self, x):
        return self.conv(x)


class Residual(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.branch = torch.nn.Sequential(Inner(width), Inner(width))

    def forward(self, x):
        return x + self.branch(x)


class Net(torch.nn.Module):
    def __init__(self, num_classes=3, size=(8, 8)):
        super().__init__()
        self.blocks = torch.nn.Sequential(*(Residual(4) for _ in range(5)))
        self.fc = torch.nn.Linear(4, 3)
        self.pretrained_cfg = dict(architecture='net', input_size=(4, *size))
        self.num_classes = num_classes

    def forward(self, x):
        return self.fc(self.blocks(x).mean((2, 3)))


def test_more_exits_than_images_in_a_probe():
    model = timm.create_model('vit_tiny_patch16_224', depth=14)
    names = [f'blocks.{i}' for i in range(13)]
    assert [(p.module, p.cut) for p in resolve_exits(model, names)] == [(name, 'hook') for name in names]


def test_a_place_inside_a_residual_branch_is_refused_and_not_listed():
    with pytest.raises(ExitError, match='residual') as e:
        resolve_exits(Net(), ['blocks.0.branch.0'])
    listed = str(e.value).partition('cost): ')[2]
    assert listed == ', '.join(f'blocks.{i} ({2 * i + 2}0%)' for i in range(4)) or 'branch' not in listed
    assert all('branch' not in p.module for p in resolve_exits(Net(), [0.1, 0.3, 0.7]))


def test_a_model_that_does_not_classify_is_refused():
    for classes in (7, None):
        with pytest.raises(BackboneError, match=r'net is an encoder without a classifier: it returns \(.N., 3\)'):
            candidates(Net(num_classes=classes))


@pytest.mark.parametrize(
    'shape, attributes, want',
    [
        ((64, 56, 56), {}, ('NCHW', 64, (56, 56), 0)),
        ((56, 56, 64), {}, ('NHWC', 64, (56, 56), 0)),
        ((56, 56, 56), {}, ('NCHW', 56, (56, 56), 0)),
        ((56, 56, 56), {'output_fmt': 'NHWC'}, ('NHWC', 56, (56, 56), 0)),
        ((196, 64), {}, ('NLC', 64, (14, 14), 0)),
        ((197, 64), {'num_prefix_tokens': 1}, ('NLC', 64, (14, 14), 1)),
        ((196, 64), {'num_prefix_tokens': 1}, ('NLC', 64, (14, 14), 0)),  # the class token comes later
        ((206, 64), {'num_prefix_tokens': 10}, ('NLC', 64, (14, 14), 10)),
        ((201, 64), {}, ('NLC', 64, (14, 14), 5)),
        ((49, 196, 64), {}, None),  # blocks of tokens
        ((64,), {}, None),
    ],
)
def test_layouts_by_shape(shape, attributes, want):
    model = torch.nn.Module()
    for key, value in attributes.items():
        setattr(model, key, value)
    layout = find_layout(model, shape, (3, 224, 224))
    assert layout == (want and dict(zip(('layout', 'channels', 'size', 'prefix_tokens'), want, strict=True)))


@pytest.mark.parametrize(
    'shape, want',
    [((64, 32, 24), ('NCHW', (32, 24))), ((32, 24, 64), ('NHWC', (32, 24))), ((769, 64), ('NLC', (32, 24)))],
)
def test_layouts_of_pictures_that_are_not_square(shape, want):
    layout = find_layout(torch.nn.Module(), shape, (3, 512, 384))
    assert (layout['layout'], layout['size']) == want


def test_rows_of_several_tensors():
    point = ExitPoint('m', 'NLC', 2, (1, 1), 0, 1, 2, item=1, rows=(3, 1, 0))
    output = (torch.arange(12.0).reshape(12, 1), [torch.arange(4.0).reshape(4, 1, 1), torch.zeros(7)], 'text')
    rows, (features, shared), text = cut(output, torch.tensor([0, 2]), point)
    assert rows.flatten().tolist() == [0, 1, 2, 6, 7, 8] and features.flatten().tolist() == [0, 2]
    assert shared is output[1][1] and text == 'text' and features_of(output, point) is output[1][0]
