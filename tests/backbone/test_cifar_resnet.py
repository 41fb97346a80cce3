import numpy as np
import pytest
import timm
import torch
from timm.models.resnet import BasicBlock
from torch import nn


@pytest.mark.parametrize('layers', [20, 32, 44, 56, 110])
def test_depth_and_timm_s_contract(layers):
    model = timm.create_model(f'cifar_resnet{layers}', in_chans=1, num_classes=7).eval()
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) + 1 == layers  # and the classifier
    x = torch.randn(2, 1, 29, 29)  # an odd size: the shortcut must meet the convolution's
    assert model(x).shape == (2, 7)
    assert torch.equal(model.forward_head(model.forward_features(x)), model(x))
    final, features = model.forward_intermediates(x)
    assert [t.shape[1] for t in features] == [i['num_chs'] for i in model.feature_info]
    assert torch.equal(final, model.forward_features(x))
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)


def test_other_depths_and_widths():
    narrow = timm.create_model('cifar_resnet20', width=8)
    assert [i['num_chs'] for i in narrow.feature_info] == [8, 8, 16, 32]
    assert len(timm.create_model('cifar_resnet20', depth=1).layer2) == 1
    assert narrow.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def paper_macs(model: nn.Module, image: torch.Tensor, pooled: int) -> int:
    """The paper's count of one stage's layers run in one forward: conv = H*W*Cout*k*k*Cin + Cout, BN one operation an
    output element, pooling its input elements, FC = in*out + out. Shortcuts and activations are free."""
    total = 0

    def count(module, args, output):
        nonlocal total
        if isinstance(module, nn.Conv2d):
            cin, k = module.in_channels, module.kernel_size[0]
            total += output[0].numel() * k * k * cin + module.out_channels
        elif isinstance(module, nn.BatchNorm2d):
            total += output[0].numel()
        elif isinstance(module, nn.Linear):
            total += module.in_features * module.out_features + module.out_features

    handles = [m.register_forward_hook(count) for m in model.modules()]
    model(image)
    for handle in handles:
        handle.remove()
    return total + pooled


def test_the_paper_s_stages_under_its_counting_and_under_ours():
    """CI-ResNet(18) for CIFAR-10: 86,000,922 / 84,068,170 / 83,909,578 (paper, with its enhanced heads)."""
    cascade = timm.create_model('cascade_cifar_resnet110', exits=['layer1', 'layer2'], head='paper').eval()
    net, heads = cascade.backbone, cascade.heads
    x = torch.zeros(1, 3, 32, 32)
    features = net.forward_intermediates(x, intermediates_only=True)
    head = [paper_macs(h, t, pooled=t[0].numel()) for h, t in zip(heads, features[1:3], strict=True)]
    stages = [
        # the authors' sheet has no batch norm behind the stem (16 * 32 * 32 operations)
        paper_macs(nn.Sequential(net.conv1, net.layer1), x, 0) + head[0],
        paper_macs(net.layer2, features[1], 0) + head[1],
        # and 64 operations more for the final pooled vector
        paper_macs(nn.Sequential(net.layer3, net.global_pool, net.fc), features[2], features[3][0].numel()) + 64,
    ]
    assert stages == [86_000_922, 84_068_170, 83_909_578]

    # ours: convolutions and linear layers only, what FlopCounterMode counts
    ours = cascade.stage_macs()
    conv = 32 * 32 * 16 * 9 * (3 + 36 * 16)
    assert ours[0] == conv + 256 * 64 + 64 * 10
    assert ours.sum() == cascade.exits[-1].total + cascade.head_macs().sum()
    assert np.allclose(ours, stages, rtol=0.01)


def test_it_is_listed_like_any_timm_model():
    assert timm.list_models('cifar_resnet*') == [f'cifar_resnet{n}' for n in (20, 32, 44, 56, 110)]
    model = timm.create_model('cifar_resnet20')
    assert sum(isinstance(m, BasicBlock) for m in model.modules()) == 9
    model.set_grad_checkpointing()
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    assert model.conv1.weight.grad is not None
