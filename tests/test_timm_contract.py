"""What a timm user and timm's own scripts expect of a model."""

import copy

import numpy as np
import pytest
import timm
import torch
from helpers import as_png, batch_for, needs
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3

import timm_cascade
from timm_cascade.backbone import BackboneError
from timm_cascade.utils.timm_models import on_meta


def test_image_size_channels_and_classes():
    model = timm.create_model('cascade_test_vit', img_size=64, in_chans=1, num_classes=5).eval()
    x = torch.randn(3, 1, 64, 64)
    assert [e.shape for e in model.forward_exits(x)] == [(3, 5)] * (len(model.exits) + 1)
    assert all(p.size == (4, 4) for p in model.exits)


def test_pictures_of_another_size_than_the_model_was_made_for():
    for name in ('cascade_test_resnet', 'cascade_test_vit'):
        kwargs = dict(dynamic_img_size=True) if 'vit' in name else {}
        model = timm.create_model(name, num_classes=5, **kwargs).eval()
        assert [e.shape for e in model.forward_exits(torch.randn(2, 3, 192, 192))] == [(2, 5)] * (len(model.exits) + 1)


def test_no_classes_at_all():
    model = timm.create_model('cascade_test_resnet', num_classes=0).eval()
    x = batch_for(model, 2)
    assert torch.equal(model(x), model.backbone(x)) and model(x).shape == (2, model.num_features)
    with pytest.raises(ValueError, match='no classes'):
        model.thresholds = [0.5] * len(model.exits)
    model.reset_classifier(5)
    model.thresholds = [0.5] * len(model.exits)
    assert model(x).shape == (2, 5)


@torch.no_grad()
def test_features_head_and_intermediates_are_the_backbone_s(family):
    x = batch_for(family, 2)
    assert torch.equal(family.forward_features(x), family.backbone.forward_features(x))
    want, got = (m.forward_intermediates(x, intermediates_only=True) for m in (family.backbone, family))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert family.head_hidden_size == family.backbone.head_hidden_size
    assert family.forward_head(family.forward_features(x), pre_logits=True).shape == (2, family.head_hidden_size)


def test_gradient_checkpointing(family):
    model = copy.deepcopy(family).train()
    model.backbone.eval()  # the same numbers twice
    x = batch_for(family, 3)
    grads = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        grads.append([p.grad for p in model.backbone.parameters()])
    largest = max(float(g.abs().max()) for g in grads[0])  # beside it, what should be zero is rounding only
    assert all((a - b).abs().max() <= 1e-3 * a.abs().max() + 1e-5 * largest for a, b in zip(*grads, strict=True))


def test_optimizers_with_layer_decay_and_without_weight_decay(family):
    model = copy.deepcopy(family)
    names = {id(p): n for n, p in model.named_parameters()}
    for kwargs in (dict(layer_decay=0.5), dict()):
        optimizer = create_optimizer_v2(model, 'adamw', lr=1e-3, weight_decay=0.05, **kwargs)
        groups = {names[id(p)]: g for g in optimizer.param_groups for p in g['params']}
        assert set(groups) == {n for n in names.values() if n.startswith('backbone.')}  # heads wait for train_heads
        assert all(groups[n]['weight_decay'] == 0 for n in model.no_weight_decay() & set(groups))
        if kwargs:
            scale = {n: g['lr_scale'] for n, g in groups.items()}
            assert max(scale.values()) == 1
            assert min(scale.values()) == scale[next(n for n in scale if n.startswith('backbone.'))] < 0.5


def test_averaging_saving_and_loading(tmp_path):
    model = timm.create_model('cascade_test_resnet', num_classes=5)
    ema = ModelEmaV3(model)
    ema.update(model)
    assert isinstance(ema.module, timm_cascade.CascadeModel)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'checkpoint.pth.tar')
    again = timm.create_model(
        'cascade_test_resnet', num_classes=5, checkpoint_path=str(tmp_path / 'checkpoint.pth.tar')
    )
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


@torch.no_grad()
def test_half_precision_and_autocast(family):
    x = batch_for(family, 3)
    model = copy.deepcopy(family)
    model.thresholds = [0.15] * len(model.exits)
    with torch.autocast('cpu', torch.bfloat16):
        assert model.predict(x).logits.shape == (3, 7)
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert all(p.dtype == torch.float16 for p in model.half().parameters())


@needs('qwen3_vit_88m_enc', 'deepseek_vit_412m_enc')
def test_encoders_without_a_classifier_are_refused():
    for name in ('qwen3_vit_88m_enc', 'deepseek_vit_412m_enc'):
        with on_meta(), pytest.raises(BackboneError, match=f'{name} is an encoder without a classifier'):
            timm.create_model(f'cascade_{name}', depth=4)


@needs('naflexvit_base_patch16_radio_v3')
def test_encoders_published_without_classes_can_have_them():
    with on_meta():
        model = timm.create_model('cascade_naflexvit_base_patch16_radio_v3', depth=4, num_classes=5)
    assert model.num_classes == 5 and all(p.prefix_tokens == 8 for p in model.exits)


VALIDATE = """
import argparse, timm, torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.utils import AverageMeter, accuracy

parser = argparse.ArgumentParser()
parser.add_argument('data')
parser.add_argument('--model')
parser.add_argument('--num-classes', type=int)
parser.add_argument('--checkpoint', default='')
args = parser.parse_args()
model = timm.create_model(
    args.model, pretrained=False, num_classes=args.num_classes, in_chans=3, global_pool=None, scriptable=False,
    checkpoint_path=args.checkpoint or None)
print('parameters', sum(m.numel() for m in model.parameters()))
config = resolve_data_config(vars(args), model=model, use_test_size=True, verbose=True)
model = model.to('cpu', memory_format=torch.channels_last).eval()
loader = create_loader(
    create_dataset(root=args.data, name='', split=''), input_size=config['input_size'], batch_size=4,
    use_prefetcher=False, interpolation=config['interpolation'], mean=config['mean'], std=config['std'],
    num_workers=0, persistent_workers=False, crop_pct=config['crop_pct'], device=torch.device('cpu'))
top1 = AverageMeter()
with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16):
    for images, target in loader:
        output = model(images.contiguous(memory_format=torch.channels_last))
        top1.update(accuracy(output.detach(), target, topk=(1,))[0].item(), images.size(0))
print('validated', top1.count)
"""

TRAIN = """
import argparse, timm, torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, get_state_dict

parser = argparse.ArgumentParser()
parser.add_argument('--model')
parser.add_argument('--output')
args = parser.parse_args()
model = timm.create_model(
    args.model, pretrained=False, in_chans=3, num_classes=4, drop_rate=0.1, drop_path_rate=None, drop_block_rate=None,
    global_pool=None, scriptable=False, checkpoint_path=None)
model.set_grad_checkpointing(enable=True)
optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-3, weight_decay=0.05, layer_decay=0.7)
scheduler, _ = create_scheduler_v2(optimizer, num_epochs=1)
ema = ModelEmaV3(model, decay=0.9)
saver = CheckpointSaver(model=model, optimizer=optimizer, args=args, model_ema=ema, checkpoint_dir=args.output,
                        recovery_dir=args.output, max_history=1)
model.train()
size = timm.data.resolve_data_config({}, model=model)['input_size']
for _ in range(2):
    loss = LabelSmoothingCrossEntropy()(model(torch.randn(4, *size)), torch.arange(4))
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.)
    optimizer.step()
    optimizer.zero_grad()
    ema.update(model)
scheduler.step(1)
saver.save_checkpoint(0, metric=1.)
"""

BENCHMARK = """
import argparse, time, timm, torch
from timm.data import resolve_data_config
from timm.optim import create_optimizer_v2

parser = argparse.ArgumentParser()
parser.add_argument('--model')
parser.add_argument('--precision', choices=['float32', 'bfloat16'])
args = parser.parse_args()
dtype = getattr(torch, args.precision)
for bench in ('inference', 'train'):
    model = timm.create_model(
        args.model, num_classes=None, in_chans=3, global_pool='avg', scriptable=False, drop_rate=0.,
        drop_path_rate=None, drop_block_rate=None)
    model.to(device='cpu', dtype=dtype, memory_format=torch.channels_last)
    images = torch.randn(4, *resolve_data_config({}, model=model, use_test_size=True)['input_size'], dtype=dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    start = time.perf_counter()
    if bench == 'inference':
        model.eval()
        with torch.no_grad():
            for _ in range(3):
                output = model(images)
    else:
        model.train()
        optimizer = create_optimizer_v2(model, opt='sgd', lr=1e-4)
        for _ in range(3):
            optimizer.zero_grad()
            output = model(images)
            torch.nn.CrossEntropyLoss()(output, torch.empty(4, dtype=torch.long).random_(model.num_classes)).backward()
            optimizer.step()
    print(bench, output.dtype, tuple(output.shape), sum(m.numel() for m in model.parameters()) / 1e6,
          f'{12 / (time.perf_counter() - start):.2f} samples/sec')
"""


def test_scripts_in_the_manner_of_timm_s_own_run_unchanged(interpreter, tmp_path):
    """timm's validate, train and benchmark scripts are not in its wheel: these call what they call, in the same way."""
    name = 'cascade_test_vit'
    for label in 'ab':
        (tmp_path / 'data' / label).mkdir(parents=True)
        for i in range(3):
            as_png(
                np.random.default_rng(i).integers(0, 255, (48, 48, 3), dtype=np.uint8),
                tmp_path / 'data' / label / f'{i}.png',
            )
    (tmp_path / 'validate.py').write_text(VALIDATE)
    (tmp_path / 'train.py').write_text(TRAIN)
    (tmp_path / 'benchmark.py').write_text(BENCHMARK)

    def run(*arguments):
        argv = ['timm_cascade.run', *map(str, arguments)]
        code = f'import runpy, sys; sys.argv = {argv!r}; runpy.run_module("timm_cascade.run", run_name="__main__")'
        return interpreter.run(code, tmp_path)

    out = run('train.py', '--model', name, '--output', tmp_path)
    assert out.returncode == 0, out.stderr
    out = run(
        'validate.py', 'data', '--model', name, '--num-classes', 4, '--checkpoint', tmp_path / 'model_best.pth.tar'
    )
    assert out.returncode == 0 and 'validated 6' in out.stdout, out.stderr
    for precision in ('float32', 'bfloat16'):
        out = run('benchmark.py', '--model', name, '--precision', precision)
        for bench in ('inference', 'train'):
            assert f'{bench} torch.{precision} (4, 1000)' in out.stdout, out.stderr
    out = run('nothing.py')
    assert out.returncode == 1 and 'is not a file' in out.stderr
