"""Bulk inference: however batches are merged, every sample gets the same result as in `predict`."""

import gc
import math
import os
import subprocess
import sys
import weakref

import pytest
import timm
import torch
from helpers import ROOT, Stubborn, batch_for, between, near, rounding, same, split_thresholds, whole
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from timm_cascade import CascadeModel
from timm_cascade.inference.batch import confidence

N, BATCH = 22, 5


@pytest.fixture(params=['test_resnet', 'test_vit', 'test_convnext', 'stubborn'])
def cascade(request):
    torch.manual_seed(1)
    if request.param == 'stubborn':  # cut by export
        return CascadeModel(Stubborn().eval(), 3).eval()
    size = dict(img_size=64) if 'vit' in request.param else dict(pretrained_cfg_overlay=dict(input_size=(3, 64, 64)))
    return timm.create_model(f'cascade_{request.param}', num_classes=7, **size).eval()


def pictures(model, n=N):
    return batch_for(model, n)[torch.randperm(n)]


def spread(model, x):
    """Thresholds that send some samples out at each exit."""
    model.thresholds = split_thresholds(model, x)


def sizes_seen(model):
    """The batch sizes that each exit's module worked on, from now on."""
    seen = {p.module: [] for p in model.exits}
    for name, sizes in seen.items():
        model.backbone.get_submodule(name).register_forward_pre_hook(
            lambda module, args, sizes=sizes: sizes.append(len(args[0]))
        )
    return seen


@torch.no_grad()
def test_samples_get_what_they_get_in_predict(cascade):
    x = pictures(cascade)
    spread(cascade, x)
    want = cascade.predict(x)
    assert len(want.exit.unique()) >= 3
    results = list(cascade.stream(x.split(BATCH)))
    assert [r.index.tolist() for r in results] == [list(range(i, min(i + BATCH, N))) for i in range(0, N, BATCH)]
    same(results, want)
    same(list(cascade.stream(x.split(BATCH), ordered=False)), want)
    same(list(cascade.stream(x.split(BATCH), max_held=BATCH)), want)
    same(list(cascade.stream(x.split(1), batch_size=4)), want)  # batches of one are put together
    same(list(cascade.stream([x], batch_size=3, max_held=7)), want)  # a large one is taken apart
    same(list(cascade.stream(x.split(1))), want)


@torch.no_grad()
@pytest.mark.parametrize('thresholds', [0.0, 1.5, None])
def test_all_samples_exit_at_once_or_none(cascade, thresholds):
    x = pictures(cascade)
    cascade.thresholds = [thresholds] * len(cascade.exits)
    results = list(cascade.stream(x.split(BATCH)))
    same(results, cascade.predict(x))
    assert torch.cat([r.exit for r in results]).unique().tolist() == [0 if thresholds == 0.0 else len(cascade.exits)]


@torch.no_grad()
def test_later_stages_run_on_full_batches(small):
    x = torch.randn(64, 1, 16, 16)
    found = confidence(small.forward_exits(x)[0])
    small.thresholds = [between(found), None]
    seen = sizes_seen(small)
    results = list(small.stream(x.split(8)))
    stay = int((whole(results)[2] == 2).sum())
    assert 16 <= stay <= 48
    later = seen['layer2']
    assert later == [8] * (stay // 8) + ([stay % 8] if stay % 8 else [])
    assert sum(seen['layer1']) <= 64 + 2  # and one image at most carries what was left


@torch.no_grad()
def test_memory_is_bounded(small):
    x = torch.randn(400, 1, 16, 16)
    small.thresholds = [float(confidence(small.forward_exits(x)[0]).quantile(0.03)), 1.5]  # few leave early
    read = 0

    def batches():
        nonlocal read
        for images in x.split(4):
            read += len(images)
            yield images

    given = 0
    # the last one to leave may wait long; no more than the stated number of samples wait
    for result in small.stream(batches(), max_held=24):
        assert read - given <= 24 + 4  # the batch that was read last is on its way in
        given += len(result.index)
    assert given == 400


class Peak(TorchDispatchMode):
    """The most bytes of tensors alive at once, of those made while it lasts; views of `known` ones are not new."""

    def __init__(self, known):
        super().__init__()
        self.alive, self.now, self.peak = {t.untyped_storage().data_ptr() for t in known}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                key, size = storage.data_ptr(), storage.nbytes()
                if key and key not in self.alive:
                    self.alive.add(key)
                    self.now += size
                    weakref.finalize(storage, self.freed, key, size)
                    self.peak = max(self.peak, self.now)
        return out

    def freed(self, key, size):
        self.alive.discard(key)
        self.now -= size


@torch.no_grad()
@pytest.mark.parametrize('name', ['test_resnet', 'test_vit'])
def test_peak_memory_is_the_backbone_s_and_the_buffers(name):
    """At most 1.2 times the plain backbone's peak, and what may wait: one batch of features per exit."""
    model = timm.create_model(f'cascade_{name}', num_classes=7, exits=3).eval()
    x = pictures(model, 64)
    spread(model, x)

    def batches():
        for batch in x.split(8):
            yield batch.clone()

    def plain():
        for batch in batches():
            model.backbone(batch)

    def streamed():
        for _ in model.stream(batches(), ordered=False):
            pass

    peaks = []
    for run in (plain, streamed):
        run()
        gc.collect()
        with Peak([x, *model.parameters(), *model.buffers()]) as counted:
            run()
        peaks.append(counted.peak)
    buffers = sum(8 * 4 * math.prod(p.shape) for p in model.exits)
    assert peaks[1] <= 1.2 * peaks[0] + buffers


@torch.no_grad()
def test_an_exception_in_the_input_loses_nothing(cascade):
    x = pictures(cascade)
    spread(cascade, x)

    def batches():
        yield from x.split(BATCH)
        raise OSError('the disk is gone')

    for ordered in (True, False):
        results = []
        with pytest.raises(OSError, match='the disk is gone'):
            for result in cascade.stream(batches(), ordered=ordered):
                results.append(result)
        same(results, cascade.predict(x))


@torch.no_grad()
def test_what_is_no_batch_of_images_is_said_after_the_rest_is_answered(small):
    x = torch.randn(6, 1, 16, 16)
    small.thresholds = [0.3, 0.3]
    for wrong, error, message in (
        (torch.randn(2, 3, 16, 16), ValueError, r'images are \(2, 3, 16, 16\)'),
        ('cat.png', TypeError, 'a batch is str'),
    ):
        results = []
        with pytest.raises(error, match=message):
            for result in small.stream([x, wrong, x]):
                results.append(result)
        same(results, small.predict(x))
    with pytest.raises(ValueError, match='batch_size is 0'):
        small.stream([x], batch_size=0)
    with pytest.raises(ValueError, match='max_held is 3'):
        small.stream([x], batch_size=4, max_held=3)


@torch.no_grad()
def test_no_input_and_empty_batches(small):
    assert list(small.stream([])) == []
    x = torch.randn(4, 1, 16, 16)
    same(list(small.stream([x[:0], x, x[:0]])), small.predict(x))


@torch.no_grad()
def test_images_of_another_size_do_not_meet(small):
    x, y = torch.randn(7, 1, 16, 16), torch.randn(5, 1, 24, 24)
    small.thresholds = [0.3, 0.35]
    results = list(small.stream([x[:4], y, x[4:]], batch_size=6))
    want = [small.predict(b) for b in (x[:4], y, x[4:])]
    for result, w in zip(results, want, strict=True):
        assert torch.equal(result.exit, w.exit) and near(result.logits, w.logits)


@torch.no_grad()
def test_loaders_nan_ties_and_the_order_of_the_input(small):
    x = torch.randn(24, 1, 16, 16)
    found = confidence(small.forward_exits(x)[0])
    small.thresholds = [float(found[3]), None]  # image 3 stands on the threshold, and leaves
    loader = DataLoader(TensorDataset(x, torch.arange(24)), batch_size=6)
    results = list(small.stream(loader))
    same(results, small.predict(x))
    assert whole(results)[2][3] == 0
    order = torch.randperm(24)
    mixed = whole(small.stream(x[order].split(5)))
    assert torch.equal(mixed[2], small.predict(x).exit[order])
    torch.nn.init.constant_(small.heads[0].fc.weight, float('nan'))
    small.thresholds = [0.0, 1.5]
    assert whole(small.stream(loader))[2].tolist() == [2] * 24


@torch.no_grad()
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(small, dtype):
    small.to(dtype)
    x = torch.randn(20, 1, 16, 16).to(dtype)
    spread(small, x)
    _, logits, exits, found = whole(small.stream(x.split(6)))
    assert logits.dtype == dtype and found.dtype == torch.float32
    want = small.predict(x)
    agree = exits == want.exit  # other batches round otherwise, and a sample close to a threshold may go the other way
    error = rounding(small, x)
    seen = [confidence(e) for e in small.forward_exits(x)[:-1]]
    gaps = torch.stack([(c - t).abs() for c, t in zip(seen, small.thresholds, strict=True)])
    assert agree[gaps.min(0).values > 4 * error].all() and agree.any()
    assert (logits[agree].float() - want.logits[agree].float()).abs().max() <= 4 * error


def test_gradients_are_not_kept_and_the_mode_outside_stays(small):
    x = torch.randn(8, 1, 16, 16)
    small.thresholds = [0.3, 0.3]
    for result in small.stream(x.split(4)):
        assert torch.is_grad_enabled() and not result.logits.requires_grad


SCRIPT = """
import sys, timm, torch, timm_cascade
from timm_cascade.inference.batch import confidence
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset
from helpers import between, near
from timm_cascade.inference.batch import confidence

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
torch.manual_seed(0)
model = timm.create_model('cascade_test_resnet', num_classes=5, exits=2).eval()
x = torch.randn(27, 3, 32, 32) * torch.linspace(0.2, 3, 27)[:, None, None, None]
with torch.no_grad():
    found = [confidence(e) for e in model.forward_exits(x)[:-1]]
    model.thresholds = [between(f) for f in found]
    want = model.predict(x)
loader = DataLoader(TensorDataset(x), batch_size=4)

def broken():
    yield from x[:20].split(4)
    if accelerator.process_index == 1:
        raise OSError('my disk')

for batches in (loader, x.split(4)):
    index, logits, exits, _ = (torch.cat(c) for c in zip(*model.stream(batches, accelerator=accelerator)))
    assert torch.equal(exits, want.exit[index]) and near(logits, want.logits[index])
    assert index.tolist() == [i for i in range(27) if i // 4 % 2 == accelerator.process_index]
try:
    list(model.stream(accelerator.prepare_data_loader(loader), accelerator=accelerator))
    print('not refused')
except ValueError as e:
    assert 'already sharded' in str(e)
try:
    for _ in model.stream(broken(), accelerator=accelerator):
        pass
    print('not noticed')
except (OSError, RuntimeError) as e:
    assert ('my disk' in str(e)) and (type(e) is OSError) == (accelerator.process_index == 1)
    print(f'process {accelerator.process_index} is well')
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_each_process_answers_its_share_and_all_fail_together(tmp_path):
    script = tmp_path / 'share.py'
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(script)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), str(ROOT / 'tests')])},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(line for line in done.stdout.splitlines() if line) == ['process 0 is well', 'process 1 is well']
