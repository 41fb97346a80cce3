import shutil
import threading
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from helpers import near, near_weights
from torch.utils.data import Dataset, TensorDataset

import timm_cascade
from timm_cascade.data import ImageData, View
from timm_cascade.heads import ExitHead
from timm_cascade.training import features as features_module
from timm_cascade.training.features import FrozenFeatures, StoredFeatures, store
from timm_cascade.training.trainer import Trainer, moments
from timm_cascade.training.work_dir import WorkDir


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def passes(small, monkeypatch):
    """How many images went through the backbone."""
    seen = []
    forward = small.forward_pooled
    monkeypatch.setattr(small, 'forward_pooled', lambda x, *args: seen.append(len(x)) or forward(x, *args))
    return seen


def arrays(stored):
    return [torch.from_numpy(np.array(stored.records[name])) for name in (*stored.names, 'label')]


def heads_after(model, *args, **kwargs):
    state = {k: v.clone() for k, v in model.state_dict().items()}
    timm_cascade.train_heads(model, *args, **kwargs)
    after = {k: v.clone() for k, v in model.heads.state_dict().items()}
    model.load_state_dict(state)
    return after


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_what_is_stored_is_what_the_backbone_computes(small, images, accelerator, tmp_path):
    features = FrozenFeatures(small, images, accelerator, batch=40)
    stored = store(features, tmp_path / 'key.npy')
    x = torch.stack([View(small, images)[i][0] for i in range(len(images))])
    with torch.no_grad():
        pooled, logits = small.forward_pooled(x)
    for found, expected in zip(arrays(stored), [*pooled, logits, torch.from_numpy(images.labels)], strict=True):
        assert near(found, expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['key.npy']


def test_the_backbone_runs_once(small, images, passes, tmp_path):
    first = heads_after(small, images, epochs=2, work_dir=tmp_path)
    assert sum(passes) == len(images)
    assert same(first, heads_after(small, images, epochs=2, work_dir=tmp_path))
    heads_after(small, images, epochs=2, lr=0.1, batch_size=7, work_dir=tmp_path)
    assert sum(passes) == len(images)
    assert same(first, heads_after(small, images, epochs=2))  # a temporary cache
    assert sum(passes) == 2 * len(images)


@pytest.mark.parametrize('views', [1, 2])
def test_without_a_cache_the_heads_are_the_same(small, images, passes, tmp_path, views):
    kept = heads_after(small, images, images, epochs=3, batch_size=32, views=views, work_dir=tmp_path)
    passes.clear()
    fresh = heads_after(small, images, images, epochs=3, batch_size=32, views=views, cache=False)
    assert sum(passes) == len(images) * (
        3 + views + 3 + 1
    )  # epochs, statistics of each view, validation, the thresholds' path
    assert near_weights(fresh, kept, small.heads.state_dict())


def test_the_key_knows_what_changes_the_features(small, images, accelerator):
    def key(model=small, data=images, **kwargs):
        return FrozenFeatures(model, data, accelerator, **kwargs).key()

    keys = [key(), key(view=1), key(view=1, seed=1), key(view=2), key(pre_logits=True)]
    other = ImageData(images.images.copy(), images.labels, images.class_names)
    assert key(data=other) == key()
    other.images[3, 5, 5] ^= 1
    keys.append(key(data=other))
    small.pretrained_cfg['mean'] = small.backbone.pretrained_cfg['mean'] = (0.4,)
    keys.append(key())
    create = dict(in_chans=1, num_classes=4, pretrained_cfg_overlay=dict(input_size=(1, 16, 16)))
    for variant in (
        dict(exits=['layer1', 'layer3']),
        dict(exits=['layer1', 'layer2'], head=dict(grid=2)),
        dict(exits=['layer1', 'layer2']),
    ):
        torch.manual_seed(0)
        keys.append(key(timm.create_model('cascade_cifar_resnet20', **variant, **create).eval()))
    with torch.no_grad():
        small.backbone.bn1.running_mean += 1e-6
    keys.append(key())
    assert len(set(keys)) == len(keys)
    # neither the heads nor, where it is to be trained, the classifier
    before = key(), key(pre_logits=True)
    with torch.no_grad():
        next(small.heads.parameters()).add_(1)
        assert (key(), key(pre_logits=True)) == before
        small.get_classifier().weight.add_(1)
    assert key() != before[0] and key(pre_logits=True) == before[1]


def test_a_data_set_that_says_nothing_of_itself_is_not_kept(small, tmp_path):
    data = TensorDataset(torch.randn(8, 1, 16, 16), torch.arange(8) % 4)
    with pytest.raises(ValueError, match='fingerprint'):
        timm_cascade.train_heads(small, data, epochs=1, work_dir=tmp_path)
    assert not list(tmp_path.iterdir())
    timm_cascade.train_heads(small, data, epochs=1)
    data.fingerprint = 'noise 1'
    timm_cascade.train_heads(small, data, epochs=1, work_dir=tmp_path)
    assert len(list((tmp_path / 'features').iterdir())) == 1


class Stops(Exception):
    pass


def test_an_interrupted_pass_goes_on_where_it_was(small, images, accelerator, passes, tmp_path):
    whole = arrays(store(FrozenFeatures(small, images, accelerator, batch=16), tmp_path / 'whole.npy'))
    passes.clear()
    features = FrozenFeatures(small, images, accelerator, batch=16)
    batches = features.batches

    def stopping(plan):
        for i, batch in enumerate(batches(plan)):
            if i == 3:
                raise Stops
            yield batch

    features.batches = stopping
    with pytest.raises(Stops):
        store(features, tmp_path / 'key.npy')
    assert not (tmp_path / 'key.npy').exists()
    part = StoredFeatures(tmp_path / 'key.part', writable=True)
    assert (part.records['checksum'] != 0).tolist() == [True] * 48 + [False] * 48
    part.records['exit0'][20, 7] += 1  # as after a power failure: there, but something else
    part.map.flush()
    passes.clear()
    again = store(FrozenFeatures(small, images, accelerator, batch=16), tmp_path / 'key.npy')
    assert passes == [16, 16, 16, 16]
    assert all(torch.equal(a, b) for a, b in zip(arrays(again), whole, strict=True))


def test_a_part_made_for_other_images_is_not_continued(small, images, accelerator, tmp_path):
    fewer = ImageData(images.images[:50], images.labels[:50], images.class_names)
    features_module._allocate(tmp_path / 'key.part', FrozenFeatures(small, fewer, accelerator), 'fewer')
    assert len(store(FrozenFeatures(small, images, accelerator), tmp_path / 'key.npy')) == len(images)


def test_the_size_is_said_and_compared_with_the_disk(small, images, tmp_path, monkeypatch, caplog):
    caplog.set_level('INFO', 'timm_cascade')
    timm_cascade.train_heads(small, images, epochs=1, work_dir=tmp_path / 'fits')
    said = next(r.getMessage() for r in caplog.records if 'MB' in r.getMessage())
    size = sum(f.stat().st_size for f in (tmp_path / 'fits').rglob('*.npy'))
    assert f'{size / 1e6:.1f} MB in {tmp_path}' in said
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: namedtuple('usage', 'free')(size - 1))
    before = {k: v.clone() for k, v in small.state_dict().items()}
    images.images[0, 0, 0] ^= 1
    with pytest.raises(OSError, match='--no-cache'):
        timm_cascade.train_heads(small, images, epochs=1, work_dir=tmp_path / 'full')
    assert not list((tmp_path / 'full' / 'features').iterdir())
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())


def test_a_disk_that_fills_up_leaves_nothing(small, images, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(features_module.os, 'posix_fallocate', full)
    with pytest.raises(OSError, match='No space'):
        timm_cascade.train_heads(small, images, epochs=1, work_dir=tmp_path / 'full')
    assert not list((tmp_path / 'full' / 'features').iterdir())


def test_a_temporary_cache_leaves_nothing(small, images, tmp_path, monkeypatch):
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    timm_cascade.train_heads(small, images, epochs=1)
    assert not list(tmp_path.iterdir())


def test_views_repeat_and_differ(small, images):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    views = [View(small, images, number, seed=3) for number in range(3)]
    first = [[view[i][0] for i in range(8)] for view in views]
    for view, seen in zip(views, first, strict=True):
        assert all(torch.equal(view[i][0], seen[i]) for i in reversed(range(8)))
    plain = timm_cascade.data.eval_transform(small)
    assert all(torch.equal(first[0][i], plain(images[i][0])) for i in range(8))
    assert not any(torch.equal(first[1][i], first[2][i]) or torch.equal(first[0][i], first[1][i]) for i in range(8))
    assert not torch.equal(View(small, images, 1, seed=4)[0][0], first[1][0])
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_change_nothing(small, images, accelerator):
    plan = [np.arange(5), np.arange(5, 9)]
    alone, helped = (list(FrozenFeatures(small, images, accelerator, view=1, workers=w).batches(plan)) for w in (0, 2))
    for (a, x), (b, y) in zip(alone, helped, strict=True):
        assert torch.equal(x, y) and all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_views_are_taken_in_turn(small, images, accelerator, tmp_path, monkeypatch):
    used = []
    original = StoredFeatures.batches
    monkeypatch.setattr(StoredFeatures, 'batches', lambda self, plan: used.append(id(self)) or original(self, plan))
    timm_cascade.train_heads(small, images, epochs=5, views=2, work_dir=tmp_path)
    statistics, epochs = used[:2], used[2:7]  # and once more for the thresholds' path
    assert len(set(statistics)) == 2 and epochs == [statistics[i % 2] for i in range(5)]
    assert len(list((tmp_path / 'features').iterdir())) == 2


def anonymous_memory():
    line = next(
        line
        for line in Path('/proc/self/status').read_text(encoding='utf-8').splitlines()
        if line.startswith('RssAnon')
    )
    return int(line.split()[1]) * 1024


class Sized(Dataset):
    """Of a length only."""

    images = labels = None

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='reads RssAnon')
def test_memory_does_not_grow_with_the_data(small, accelerator, tmp_path):
    """Anonymous memory while training on 4 MB and on 130 MB of features; mapped pages are the system's to drop."""
    peaks = []
    for n in (500, 16_000):
        source = FrozenFeatures(small, Sized(n), accelerator)
        source.widths = [2048, 4]
        path = tmp_path / f'{n}.npy'
        features_module._allocate(path, source, str(n))
        start, peak, running = anonymous_memory(), [0], [True]

        def watch(start=start, peak=peak, running=running):
            while running[0]:
                peak[0] = max(peak[0], anonymous_memory() - start)
                time.sleep(0.002)

        thread = threading.Thread(target=watch)
        thread.start()
        features = StoredFeatures(path)
        moments([features], accelerator, 4)
        heads = torch.nn.ModuleList([ExitHead(2048, (1, 1), 4, hidden=8)])
        recipe = dict(epochs=1, batch_size=256, lr=1e-3, weight_decay=0.0, seed=0)
        Trainer(heads, [features], features, accelerator, **recipe).run(WorkDir(None, 'heads', accelerator, []))
        running[0] = False
        thread.join()
        peaks.append(peak[0])
        path.unlink()
    assert peaks[1] - peaks[0] < 40e6, peaks
