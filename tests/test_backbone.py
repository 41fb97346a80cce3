import itertools

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from timm_cascade.backbone import ExitError, backbone_macs, candidates, resolve_exits


@pytest.fixture(scope='module')
def resnet():
    return timm.create_model('resnet18')


def test_candidates_are_blocks_in_order_of_cost(resnet):
    points = candidates(resnet)
    names = [p.module for p in points]
    assert names == ['layer1.0', 'layer1', 'layer2.0', 'layer2', 'layer3.0', 'layer3', 'layer4.0', 'layer4'] or \
        names == ['act1', 'layer1.0', 'layer1', 'layer2.0', 'layer2', 'layer3.0', 'layer3', 'layer4.0', 'layer4']
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


@pytest.mark.parametrize('name, layout', [
    ('test_resnet', 'NCHW'), ('test_convnext', 'NCHW'), ('test_vit', 'NLC'), ('swin_tiny_patch4_window7_224', 'NHWC')])
def test_layouts_agree_with_forward_intermediates(name, layout):
    model = timm.create_model(name).eval()
    point = resolve_exits(model, [0.5])[0]
    assert point.layout == layout
    if name != 'swin_tiny_patch4_window7_224':
        sizes = {(t.shape[1], *t.shape[2:]) for t in model.forward_intermediates(
            torch.randn(1, *model.pretrained_cfg['input_size']), intermediates_only=True)}
        assert (point.channels, *point.size) in sizes


def test_counts_fractions_and_names(resnet):
    assert len(resolve_exits(resnet, 3)) == 3
    fractions = [p.fraction for p in resolve_exits(resnet, [0.25, 0.75])]
    assert abs(fractions[0] - 0.25) < 0.1 and abs(fractions[1] - 0.75) < 0.1
    assert [p.module for p in resolve_exits(resnet, ['layer3', 'layer1'])] == ['layer1', 'layer3']


def test_a_place_inside_a_residual_branch_is_refused():
    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.conv(x)

    class Residual(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = torch.nn.Sequential(Inner(), Inner())
            self.fc = torch.nn.Linear(4, 3)
            self.pretrained_cfg = dict(input_size=(4, 8, 8))
            self.num_classes = 3

        def forward(self, x):
            return self.fc((x + self.branch(x)).mean((2, 3)))

    with pytest.raises(ExitError, match='residual'):
        resolve_exits(Residual(), ['branch.0'])
