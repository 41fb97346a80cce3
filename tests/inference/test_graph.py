"""Backbones that hooks cannot cut: the exported graph, split at the exits."""

import copy
import math
import pickle

import pytest
import torch
from helpers import Stubborn, between, near, rounding

from scripts.experiments.every_backbone.equality import judge
from timm_cascade import CascadeModel
from timm_cascade.backbone import ExitError, resolve_exits
from timm_cascade.errors import RoutingError
from timm_cascade.inference.batch import confidence


@pytest.fixture
def model():
    return CascadeModel(Stubborn().eval(), 3).eval()


@pytest.fixture
def images():
    return torch.randn(4, 3, 16, 16) * torch.linspace(0.3, 3, 4)[:, None, None, None]


def test_remaining_samples_get_the_logits_they_get_in_the_whole_batch(model, images):
    assert [p.cut for p in model.exits] == ['export'] * 3
    equal, *errors = judge(model, images)
    assert equal, errors
    assert len(model._router._exported) == 1  # one export served every number of remaining samples


def test_the_inside_of_a_block_is_not_offered(model):
    with pytest.raises(ExitError, match=r'Choose from.*blocks\.0 \(.*blocks\.3') as e:
        resolve_exits(model.backbone, ['blocks.1.inner.0'])
    assert 'inner' not in str(e.value).split('Choose from')[1]


@torch.no_grad()
def test_weights_are_the_backbone_s_own(model, images):
    model.thresholds = [1.5] * 3  # stages run, no sample exits
    assert near(model(images), model.backbone(images))
    exported = next(iter(model._router._exported.values()))
    before = model(images)
    model.load_state_dict(CascadeModel(Stubborn(), 3).state_dict())
    assert not near(model(images), before, 0.1)
    assert near(model(images), model.backbone(images))
    assert next(iter(model._router._exported.values())) is exported
    assert not any('exported' in key for key in model.state_dict())


@torch.no_grad()
def test_another_size_dtype_or_classifier_is_exported_again(model, images):
    model.thresholds = [1.5] * 3
    model(images)
    model.bfloat16()
    few = images.bfloat16()
    error = rounding(model, few)
    assert (model(few) - model.backbone(few)).abs().max() <= 4 * error
    model.float()
    with torch.autocast('cpu', torch.bfloat16):
        assert (model(images) - model.backbone(images)).abs().max() <= 4 * error
    assert len(model._router._exported) == 3
    model.reset_classifier(9)
    model.thresholds = [1.5] * 3
    assert model(images).shape == (4, 9)
    assert near(model(images), model.backbone(images))


@torch.no_grad()
def test_copies_and_pickles_work_on_their_own(model, images):
    model.thresholds = [0.21, 0.22, 0.23]
    want = model(images)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not other._router._exported
        assert near(other(images), want)


@torch.no_grad()
def test_channels_last_and_single_images(model, images):
    model.thresholds = [1.5] * 3
    want = model.backbone(images)
    last = torch.channels_last
    assert near(model.to(memory_format=last)(images.to(memory_format=last)), want)
    assert near(torch.cat([model(image) for image in images.split(1)]), want)


@torch.no_grad()
def test_closed_exits_and_training_need_no_export(model, images):
    assert torch.equal(model.predict(images).logits, model.backbone(images))
    model.forward_exits(images)
    assert not model._router._exported


def test_gradients_reach_the_backbone(model, images):
    every = model.forward_exits(images)
    model.thresholds = [between(confidence(every[0])), math.inf, math.inf]
    model(images).sum().backward()
    assert (model.backbone.embed.weight.grad != 0).any()


def test_what_cannot_be_exported_says_so(model, images):
    model.thresholds = [0.5] * 3
    model.backbone.blocks[2].forward = lambda x: x * float(x.mean())  # depends on values: no graph
    with torch.no_grad(), pytest.raises(RoutingError, match=r'Stubborn has to be exported.*and that failed'):
        model(images)
