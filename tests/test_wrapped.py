"""In training a cascade is its backbone, in parameters too; and what wraps a model is looked through."""

import pytest
import timm
import torch
import torch.distributed as dist
from helpers import batch_for
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel

import timm_cascade


@pytest.fixture
def group(tmp_path):
    """A group of one process, which is all that DistributedDataParallel needs to check what takes part."""
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/meeting', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def steps(model, parameters, count=3):
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    for _ in range(count):
        loss = torch.nn.functional.cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_distributed_training_goes_on_after_its_first_step(group):
    model = timm.create_model('cascade_test_resnet', num_classes=5).train()
    heads = {name: t.clone() for name, t in model.heads.state_dict().items()}
    steps(DistributedDataParallel(model), [p for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(t, heads[name]) for name, t in model.heads.state_dict().items())


def test_an_optimizer_has_the_backbone_s_parameters():
    torch.manual_seed(0)
    plain = timm.create_model('test_vit', num_classes=5)
    model = timm.create_model('cascade_test_vit', num_classes=5)
    for kwargs in (dict(), dict(layer_decay=0.7)):
        found, want = (
            sorted(
                p.numel()
                for g in create_optimizer_v2(m, 'adamw', lr=1e-3, **kwargs).param_groups
                for p in g['params']
                if p.requires_grad  # older versions of timm list all, and those without a gradient stay as they are
            )
            for m in (model, plain)
        )
        assert found == want


def test_train_heads_trains_them_all_the_same(small, images):
    before = {name: t.clone() for name, t in small.heads.state_dict().items()}
    timm_cascade.train_heads(small, images, epochs=1)
    assert any(not torch.equal(t, before[name]) for name, t in small.heads.state_dict().items())
    assert not any(p.requires_grad for p in small.heads.parameters())


def test_wrapped_models_are_looked_through(small, images, group, tmp_path):
    ema = ModelEmaV3(small)
    for wrapped in (DistributedDataParallel(small), torch.compile(small, backend='eager'), ema):
        assert timm_cascade.calibrate(wrapped, images).n == len(images)
        timm_cascade.save(wrapped, tmp_path / type(wrapped).__name__)
    with pytest.raises(TypeError, match='ResNet'):
        timm_cascade.calibrate(timm.create_model('test_resnet'), images)


def test_an_average_of_weights_answers_as_its_cascade(small):
    ema = ModelEmaV3(small.train())
    ema.update(small)
    x = batch_for(small, 3)
    with torch.no_grad():
        assert torch.equal(ema.module.eval()(x), small.eval()(x))
