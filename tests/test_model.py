import copy
import pickle

import numpy as np
import pytest
import timm
import torch
from helpers import batch_for, near

import timm_cascade
from timm_cascade import NotCalibratedError


def test_in_training_mode_no_sample_exits(small):
    small.thresholds = [0.0, 0.0]
    small.train()
    small.backbone.eval()  # batch norm as in evaluation, so that the two can be compared
    small.training = True
    x = torch.randn(3, 1, 16, 16)
    assert torch.equal(small(x), small.backbone(x))
    assert small.predict(x).exit.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    'values, message',
    [
        ([0.5], '1 thresholds for 2 exits'),
        ([0.5, float('nan')], 'confidence in 0..1'),
        ([0.5, float('-inf')], 'confidence in 0..1'),
        ([0.1, 0.2, 0.3], '3 thresholds for 2'),
    ],
)
def test_bad_thresholds_leave_the_old_ones(small, values, message):
    small.thresholds = [0.25, None]
    with pytest.raises(ValueError, match=message):
        small.thresholds = values
    assert small.thresholds.tolist() == [0.25, float('inf')]


def test_thresholds_take_a_tensor_an_array_and_none(small):
    small.thresholds = torch.tensor([0.5, 0.75])
    assert small.thresholds.tolist() == [0.5, 0.75]
    small.thresholds = np.array([0.25, np.inf])
    assert small.thresholds.tolist() == [0.25, float('inf')]
    small.thresholds = None
    assert not small.any_open


@pytest.mark.parametrize('shape', [(2, 3, 16, 16), (1, 16, 16), (2, 1, 16)])
def test_images_of_the_wrong_shape(small, shape):
    small.thresholds = [0.5, 0.5]
    with pytest.raises(ValueError, match=r'expected \(N, 1, H, W\)'):
        small(torch.randn(*shape))


def test_an_empty_batch(small):
    small.thresholds = [0.5, 0.5]
    out = small.predict(torch.randn(0, 1, 16, 16))
    assert out.logits.shape == (0, 4) and out.exit.shape == (0,) and out.confidence.shape == (0,)


def test_the_dial_on_an_uncalibrated_model_says_what_to_run(small):
    for turn in (lambda: small.set_max_drop(0.01), lambda: small.set_cost(0.5)):
        with pytest.raises(NotCalibratedError, match='timm-cascade calibrate'):
            turn()
    assert not small.any_open


def test_stage_macs_add_up(family):
    stages = family.stage_macs()
    assert len(stages) == len(family.exits) + 1
    assert stages.sum() == family.exits[-1].total + family.head_macs().sum()
    assert (stages > 0).all()


def test_timm_s_contract(family):
    x = batch_for(family, 2)
    with torch.no_grad():
        assert family(x).shape == (2, 7)
        assert near(family.forward_head(family.forward_features(x)), family(x))
    assert family.num_features == family.backbone.num_features
    assert family.get_classifier() is family.backbone.get_classifier()
    assert family.feature_info is family.backbone.feature_info
    assert timm.data.resolve_model_data_config(family) == timm.data.resolve_model_data_config(family.backbone)


def test_reset_classifier_closes_the_exits(small):
    small.thresholds = [0.5, 0.5]
    small.reset_classifier(9)
    x = torch.randn(2, 1, 16, 16)
    assert small(x).shape == (2, 9) and not small.any_open
    assert [e.shape for e in small.forward_exits(x)] == [(2, 9)] * 3


def test_no_classes_gives_the_backbone_s_features(small):
    small.reset_classifier(0)
    assert small(torch.randn(2, 1, 16, 16)).shape == (2, 64)


def test_state_dict_copy_and_pickle(small):
    x = torch.randn(3, 1, 16, 16)
    twin = timm.create_model(
        'cascade_cifar_resnet20',
        depth=1,
        in_chans=1,
        num_classes=4,
        exits=['layer1', 'layer2'],
        pretrained_cfg_overlay=dict(input_size=(1, 16, 16)),
    )
    twin.eval().load_state_dict(small.state_dict())
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(twin.forward_exits(x), small.forward_exits(x), strict=True))
        small.thresholds = [0.3, 0.3]
        for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
            assert torch.equal(other(x), small(x)) and torch.equal(other.thresholds, small.thresholds)
    assert all(k.startswith(('backbone.', 'heads.')) for k in small.state_dict())


def test_a_plain_state_dict_goes_to_the_backbone(small):
    other = timm.create_model('cifar_resnet20', depth=1, in_chans=1, num_classes=4)
    small.load_state_dict(other.state_dict())
    assert torch.equal(small.backbone.fc.weight, other.fc.weight)


def test_heads_hash_tells_heads_apart(small):
    before = small.heads_hash()
    assert copy.deepcopy(small).heads_hash() == before
    with torch.no_grad():
        small.heads[0].fc.bias[0] += 1e-3
    assert small.heads_hash() != before


def test_channels_last(small):
    x = torch.randn(3, 1, 16, 16)
    small.thresholds = [0.3, 0.3]
    with torch.no_grad():
        want = small(x)
        got = small.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert near(got, want)


def test_a_refused_request_leaves_the_backbone_untouched():
    backbone = timm.create_model('test_resnet')
    with pytest.raises(ValueError, match='head'):
        timm_cascade.CascadeModel(backbone, 2, head='nonsense')
    assert not any(m._forward_hooks for m in backbone.modules())
