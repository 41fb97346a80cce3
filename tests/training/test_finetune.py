import json

import pytest
import torch
from helpers import near_weights
from torch.utils.data import TensorDataset

import timm_cascade
from timm_cascade.data import ImageData
from timm_cascade.training.work_dir import WorkDir


def tuned(model, *args, **kwargs):
    """History and backbone; the model is left as it was."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    history = timm_cascade.finetune(model, *args, **kwargs)
    after = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    model.load_state_dict(state)
    return history, after


def part(images, begin, end):
    return ImageData(images.images[begin:end], images.labels[begin:end], images.class_names, 'quarters', str(begin))


def test_the_best_epoch_is_kept_and_heads_are_not_touched(small, images, tmp_path):
    heads = {k: v.clone() for k, v in small.heads.state_dict().items()}
    small.train()
    history = timm_cascade.finetune(
        small, part(images, 0, 64), part(images, 64, 96), epochs=4, batch_size=16, lr=5e-3, work_dir=tmp_path
    )
    assert small.training and small.published is None
    assert all(torch.equal(v, heads[k]) for k, v in small.heads.state_dict().items())
    best = max(line['accuracy'] for line in history)
    assert timm_cascade.evaluate(small.eval(), part(images, 64, 96)).full_accuracy == pytest.approx(best, abs=1e-4)
    assert [line['best'] for line in history].index(True) == 0 and best > 0.5
    assert [json.loads(line) for line in (tmp_path / 'backbone.jsonl').read_text().splitlines()] == history


def test_of_equally_accurate_epochs_the_last_is_kept(small, images, monkeypatch, tmp_path):
    monkeypatch.setattr('timm_cascade.training.finetune._Finetuner._accuracy', lambda self, val: 0.5)
    history = timm_cascade.finetune(
        small, part(images, 0, 64), part(images, 64, 96), epochs=2, batch_size=16, work_dir=tmp_path
    )
    last = torch.load(tmp_path / 'backbone.pt', weights_only=True)['backbone']
    assert [line['best'] for line in history] == [True, True]
    assert all(torch.equal(v, last[k]) for k, v in small.backbone.state_dict().items())


class Stops(Exception):
    pass


@pytest.mark.parametrize('ema_decay', [0.0, 0.9])
def test_interrupted_it_continues_to_the_same_bits(small, images, tmp_path, monkeypatch, ema_decay):
    settings = dict(epochs=3, batch_size=32, ema_decay=ema_decay)
    history, whole = tuned(small, images, images, **settings)
    before = {k: v.clone() for k, v in small.state_dict().items()}
    save = WorkDir.save

    def stops(self, history, **parts):
        save(self, history, **parts)
        if len(history) == 2:
            raise Stops

    monkeypatch.setattr(WorkDir, 'save', stops)
    with pytest.raises(Stops):
        timm_cascade.finetune(small, images, images, **settings, work_dir=tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())
    monkeypatch.setattr(WorkDir, 'save', save)
    torch.manual_seed(5)  # whatever else has drawn random numbers meanwhile
    continued, after = tuned(small, images, images, **settings, work_dir=tmp_path)
    assert all(torch.equal(after[k], whole[k]) for k in whole)
    for line in (*history, *continued):
        line.pop('seconds')
    assert continued == history


def test_accumulated_gradients_count_every_image_once(small, images):
    """Without batch norm statistics to differ, two halves of a step are the step."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    for module in small.backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum, module.train = 0.0, lambda mode=True: None
    start = {k: v.clone() for k, v in small.backbone.state_dict().items()}
    _, whole = tuned(small, images, images, epochs=1, batch_size=40)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    _, halves = tuned(small, images, images, epochs=1, batch_size=20, accelerator=accelerator)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    assert near_weights(halves, whole, start)


@pytest.mark.parametrize('dtype', [torch.bfloat16])
def test_half_precision_is_returned_to(small, images, dtype):
    small.to(dtype)
    timm_cascade.finetune(small, images, images, epochs=1)
    assert {p.dtype for p in small.parameters()} == {dtype}


def test_bad_requests_leave_the_backbone_as_it_was(small, images):
    before = {k: v.clone() for k, v in small.state_dict().items()}
    nan = TensorDataset(torch.full((8, 1, 16, 16), float('nan')), torch.arange(8) % 4)
    none = TensorDataset(torch.zeros(8, 1, 16, 16), torch.full((8,), -1))
    for data, settings, message in (
        (images, dict(epochs=0), 'epochs=0'),
        (images, dict(layer_decay=1.5), r'layer_decay=1\.5'),
        (nan, dict(epochs=1), 'loss is nan'),
        (none, dict(epochs=1), 'needs a label'),
    ):
        with pytest.raises(ValueError, match=message):
            timm_cascade.finetune(small, data, images, **settings)
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())
