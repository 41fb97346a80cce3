"""A calibration belongs to the weights, dtype and transform it was made with."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import timm_cascade
from timm_cascade import TableMismatchError
from timm_cascade.inference.weights import WeightWatch, calibrated_as


@pytest.fixture
def calibrated(small, images):
    timm_cascade.calibrate(small, images, batch_size=96)
    small.set_max_drop(1.0, rule='joint')
    small.thresholds = [0.3, 0.3]
    return small


def fine_tune(model):
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(4, 1, 16, 16)).square().sum().backward()
    optimizer.step()
    model.eval()


def merge_lora(model):
    for module in model.backbone.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data += 0.01 * torch.randn_like(module.weight)


def replace_parameter(model):
    model.backbone.fc.weight = nn.Parameter(model.backbone.fc.weight * 1.1)


def replace_module(model):
    model.backbone.fc = nn.Sequential(nn.Dropout(), nn.Linear(64, 4))


@torch.no_grad()
def edit_head(model):
    model.heads[1].fc.bias[0] += 1e-3


@torch.no_grad()
def other_checkpoint(model):
    model.backbone.load_state_dict({k: v + 1 for k, v in model.backbone.state_dict().items()})


def write_data(model):
    model.backbone.fc.weight.data[0, 0] += 1e-3


def other_mean(model):
    model.pretrained_cfg['mean'] = (0.4,)


CHANGES = {
    fine_tune: 'backbone',
    merge_lora: 'backbone',
    replace_parameter: 'backbone',
    replace_module: 'backbone',
    edit_head: 'heads',
    other_checkpoint: 'backbone',
    write_data: 'backbone',
    other_mean: r'the mean is \[0.4\]',
}


@pytest.mark.parametrize('change', CHANGES, ids=lambda f: f.__name__)
def test_a_changed_model_refuses_and_says_what_changed(calibrated, change):
    change(calibrated)
    for turn in (
        lambda: calibrated.set_max_drop(0.01),
        lambda: calibrated.set_cost(0.5),
        lambda: calibrated.predict(torch.randn(2, 1, 16, 16), max_drop=0.01),
    ):
        with pytest.raises(TableMismatchError, match=CHANGES[change]):
            turn()
    assert calibrated.thresholds.tolist() == pytest.approx([0.3, 0.3])
    calibrated.forget_calibration()
    assert not calibrated.any_open and calibrated.calibration is None


@pytest.mark.parametrize('change', [fine_tune, edit_head, other_checkpoint, replace_module])
def test_predict_goes_on_and_warns_once(calibrated, change):
    x = torch.randn(2, 1, 16, 16)
    change(calibrated)
    with pytest.warns(UserWarning, match='not the one that was calibrated'):
        calibrated.predict(x)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for _ in range(50):
            calibrated.predict(x)


def test_one_edited_tensor_is_noticed_after_some_calls(calibrated):
    x = torch.randn(2, 1, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for _ in range(30):
            calibrated.predict(x)
    with torch.no_grad():
        calibrated.backbone.layer1[0].conv1.weight[0, 0, 0, 0] += 1
    with pytest.warns(UserWarning, match="the backbone's weights have changed"):
        for _ in range(60):
            calibrated.predict(x)


def test_half_precision_is_another_model(calibrated):
    calibrated.bfloat16()
    with pytest.raises(TableMismatchError, match=r'the dtype is bfloat16 \(calibrated in float32\)'):
        calibrated.set_max_drop(0.01)
    with pytest.warns(UserWarning, match='the dtype is bfloat16'):
        calibrated.predict(torch.randn(2, 1, 16, 16).bfloat16())


def test_copies_pickles_and_modes_keep_the_calibration(calibrated):
    x = torch.randn(2, 1, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for model in (copy.deepcopy(calibrated), pickle.loads(pickle.dumps(calibrated)), calibrated.train().eval()):
            model.to('cpu', memory_format=torch.channels_last)
            model.requires_grad_(True).predict(x)
            model.set_max_drop(0.05, rule='joint')
            model.predict(x)
            assert model._guard.watch is not None
    edited = copy.deepcopy(calibrated)
    edit_head(edited)
    with pytest.raises(TableMismatchError):
        edited.set_max_drop(0.01)
    calibrated.set_max_drop(0.01, rule='joint')


def test_the_digest_is_that_of_the_values(small):
    before = calibrated_as(small)
    assert calibrated_as(copy.deepcopy(small)) == before
    small.bfloat16().float()
    assert calibrated_as(small)['backbone_digest'] != before['backbone_digest']


def test_the_watch_sees_every_tensor_and_module(small):
    def noticed(change):
        watch = WeightWatch(small)
        assert not any(watch.changed() for _ in range(100))
        change()
        return any(watch.changed() for _ in range(100))

    with torch.no_grad():
        for tensor in (*small.parameters(), *small.buffers()):
            assert noticed(tensor.zero_)
    assert noticed(lambda: setattr(small.backbone.layer2[0], 'conv1', nn.Identity()))
    assert noticed(lambda: setattr(small, 'backbone', nn.Identity()))


def test_save_refuses_a_calibration_of_other_weights(calibrated, tmp_path):
    fine_tune(calibrated)
    with pytest.raises(TableMismatchError):
        timm_cascade.save(calibrated, tmp_path / 'release')
    assert not (tmp_path / 'release').exists()
