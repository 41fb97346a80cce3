"""Half-precision models in every public function."""

import pytest
import timm
import torch
from helpers import batch_for

import timm_cascade
from timm_cascade.data import create_loader


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=['bfloat16', 'float16'])
def half(request, small):
    return small.to(request.param)


def test_heads_train_and_the_model_keeps_its_precision(half, images):
    dtype = next(half.parameters()).dtype
    before = {name: t.clone() for name, t in half.backbone.state_dict().items()}
    history = timm_cascade.train_heads(half, images, images, epochs=12, batch_size=32, lr=1e-2)
    assert history[-1]['loss'] < history[0]['loss'] and history[-1]['accuracy'][0] > 0.9
    assert {p.dtype for p in half.heads.parameters()} == {dtype}
    assert all(torch.equal(t, before[name]) for name, t in half.backbone.state_dict().items())


def test_calibrated_evaluated_profiled_and_streamed(half, images):
    calibration = timm_cascade.calibrate(half, images)
    assert calibration.provenance['dtype'] == str(next(half.parameters()).dtype).removeprefix('torch.')
    half.thresholds = [0.3, 0.3]
    report = timm_cascade.evaluate(half, images)
    assert report.n == len(images) and abs(sum(report.exit_shares) - 1) < 1e-9
    assert timm_cascade.profile(half, batch_size=2, repeats=1).dtype == calibration.provenance['dtype']
    found = list(half.stream(create_loader(half, images, 32)))
    assert sum(len(part.index) for part in found) == len(images)


@torch.no_grad()
def test_confidence_is_in_single_precision(half):
    dtype = next(half.parameters()).dtype
    output = half.predict(torch.randn(3, 1, 16, 16, dtype=dtype))
    assert output.logits.dtype == dtype and output.confidence.dtype == torch.float32


def test_calibrated_in_one_precision_and_used_in_another_is_refused(small, images):
    timm_cascade.calibrate(small, images)
    small.bfloat16()
    with pytest.raises(timm_cascade.CascadeError, match='bfloat16'):
        small.set_max_drop(0.1, rule='joint')


@torch.no_grad()
def test_a_backbone_of_another_family():
    model = timm.create_model('cascade_test_vit', num_classes=5, exits=2).eval().bfloat16()
    model.thresholds = [0.0, None]
    assert model.predict(batch_for(model, 3).bfloat16()).exit.tolist() == [0, 0, 0]
