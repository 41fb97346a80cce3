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
from torch.utils.data import Dataset, TensorDataset

import timm_cascade
from timm_cascade.data import ImageData, View
from timm_cascade.heads import ExitHead
from timm_cascade.training import features as features_module
from timm_cascade.training.features import StoredTaps, Taps, store
from timm_cascade.training.trainer import Heads, Recipe, Trainer, moments


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
    return [torch.from_numpy(np.array(a)) for a in (*stored.maps, stored.labels)]


def heads_after(model, *args, **kwargs):
    state = {k: v.clone() for k, v in model.state_dict().items()}
    timm_cascade.train_heads(model, *args, **kwargs)
    after = {k: v.clone() for k, v in model.heads.state_dict().items()}
    model.load_state_dict(state)
    return after


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_what_is_stored_is_what_the_backbone_computes(small, images, accelerator, tmp_path):
    taps = Taps(small, images, accelerator, batch=40)
    stored = store(taps, tmp_path, 'key')
    x = torch.stack([View(small, images)[i][0] for i in range(len(images))])
    with torch.no_grad():
        pooled, logits = small.forward_pooled(x)
    for found, expected in zip(arrays(stored), [*pooled, logits, torch.from_numpy(images.labels)], strict=True):
        assert torch.allclose(found.double(), expected.double(), atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['key']


def test_the_backbone_runs_once(small, images, passes, tmp_path):
    first = heads_after(small, images, epochs=2, cache=tmp_path)
    assert sum(passes) == len(images)
    assert same(first, heads_after(small, images, epochs=2, cache=tmp_path))
    heads_after(small, images, epochs=2, lr=0.1, batch_size=7, cache=tmp_path)
    assert sum(passes) == len(images)
    assert same(first, heads_after(small, images, epochs=2))  # a temporary cache
    assert sum(passes) == 2 * len(images)


@pytest.mark.parametrize('views', [1, 2])
def test_without_a_cache_the_heads_are_the_same(small, images, passes, tmp_path, views):
    kept = heads_after(small, images, images, epochs=3, batch_size=32, views=views, cache=tmp_path)
    passes.clear()
    fresh = heads_after(small, images, images, epochs=3, batch_size=32, views=views, cache=False)
    assert sum(passes) == len(images) * (3 + views + 3)  # epochs, statistics of each view, validation
    assert all(torch.allclose(kept[k].float(), fresh[k].float(), atol=1e-4) for k in kept)


def test_the_key_knows_what_changes_the_taps(small, images, accelerator):
    def key(model=small, data=images, **kwargs):
        return Taps(model, data, accelerator, **kwargs).key()

    keys = [key(), key(view=1), key(view=1, seed=1), key(view=2), key(features=True)]
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
    before = key(), key(features=True)
    with torch.no_grad():
        next(small.heads.parameters()).add_(1)
        assert (key(), key(features=True)) == before
        small.get_classifier().weight.add_(1)
    assert key() != before[0] and key(features=True) == before[1]


def test_a_data_set_that_says_nothing_of_itself_is_not_kept(small, tmp_path):
    data = TensorDataset(torch.randn(8, 1, 16, 16), torch.arange(8) % 4)
    with pytest.raises(ValueError, match='fingerprint'):
        timm_cascade.train_heads(small, data, epochs=1, cache=tmp_path)
    assert not list(tmp_path.iterdir())
    timm_cascade.train_heads(small, data, epochs=1)
    data.fingerprint = 'noise 1'
    timm_cascade.train_heads(small, data, epochs=1, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


class Stops(Exception):
    pass


def test_an_interrupted_pass_goes_on_where_it_was(small, images, accelerator, passes, tmp_path):
    whole = arrays(store(Taps(small, images, accelerator, batch=16), tmp_path, 'whole'))
    passes.clear()
    taps = Taps(small, images, accelerator, batch=16)
    batches = taps.batches

    def stopping(plan):
        for i, batch in enumerate(batches(plan)):
            if i == 3:
                raise Stops
            yield batch

    taps.batches = stopping
    with pytest.raises(Stops):
        store(taps, tmp_path, 'key')
    assert not (tmp_path / 'key').exists()
    part = StoredTaps(tmp_path / 'key.part', writable=True)
    assert (part.sums != 0).tolist() == [True, True, True, False, False, False]
    part.maps[0][20, 7] += 1  # as after a power failure: said to be there, but something else
    part.flush()
    passes.clear()
    again = store(Taps(small, images, accelerator, batch=32), tmp_path, 'key')  # the batch is what it was begun with
    assert passes == [16, 16, 16, 16]
    assert all(torch.equal(a, b) for a, b in zip(arrays(again), whole, strict=True))


def test_a_part_made_for_other_images_is_not_continued(small, images, accelerator, tmp_path):
    fewer = ImageData(images.images[:50], images.labels[:50], images.class_names)
    features_module._allocate(tmp_path / 'key.part', Taps(small, fewer, accelerator), 'fewer')
    assert len(store(Taps(small, images, accelerator), tmp_path, 'key')) == len(images)


def test_the_size_is_said_and_compared_with_the_disk(small, images, tmp_path, monkeypatch, caplog):
    caplog.set_level('INFO', 'timm_cascade')
    timm_cascade.train_heads(small, images, epochs=1, cache=tmp_path / 'fits')
    said = next(r.getMessage() for r in caplog.records if 'MB' in r.getMessage())
    size = sum(f.stat().st_size for f in (tmp_path / 'fits').rglob('*.npy'))
    assert f'{size / 1e6:.1f} MB in {tmp_path}' in said
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: namedtuple('usage', 'free')(size - 1))
    before = {k: v.clone() for k, v in small.state_dict().items()}
    images.images[0, 0, 0] ^= 1
    with pytest.raises(OSError, match='--no-cache'):
        timm_cascade.train_heads(small, images, epochs=1, cache=tmp_path / 'full')
    assert not list((tmp_path / 'full').iterdir())
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())


def test_a_disk_that_fills_up_leaves_nothing(small, images, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(features_module.os, 'posix_fallocate', full)
    with pytest.raises(OSError, match='No space'):
        timm_cascade.train_heads(small, images, epochs=1, cache=tmp_path / 'full')
    assert not list((tmp_path / 'full').iterdir())


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
    alone, helped = (list(Taps(small, images, accelerator, view=1, workers=w).batches(plan)) for w in (0, 2))
    for (a, x), (b, y) in zip(alone, helped, strict=True):
        assert torch.equal(x, y) and all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_views_are_taken_in_turn(small, images, accelerator, tmp_path, monkeypatch):
    used = []
    original = StoredTaps.batches
    monkeypatch.setattr(StoredTaps, 'batches', lambda self, plan: used.append(id(self)) or original(self, plan))
    timm_cascade.train_heads(small, images, epochs=5, views=2, cache=tmp_path)
    statistics, epochs = used[:2], used[2:]
    assert len(set(statistics)) == 2 and epochs == [statistics[i % 2] for i in range(5)]
    assert len(list(tmp_path.iterdir())) == 2


def anonymous_memory():
    line = next(line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('RssAnon'))
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
    """Anonymous memory while training on 4 MB and on 400 MB of stored taps; mapped pages are the system's to drop."""
    peaks = []
    for n in (500, 50_000):
        source = Taps(small, Sized(n), accelerator)
        source.widths = [2048, 4]
        features_module._allocate(tmp_path / str(n), source, str(n))
        start, peak, running = anonymous_memory(), [0], [True]

        def watch(start=start, peak=peak, running=running):
            while running[0]:
                peak[0] = max(peak[0], anonymous_memory() - start)
                time.sleep(0.002)

        thread = threading.Thread(target=watch)
        thread.start()
        taps = StoredTaps(tmp_path / str(n))
        moments([taps], accelerator, 4)
        Trainer(
            Heads([ExitHead(2048, (1, 1), 4, hidden=8)]),
            [taps],
            accelerator,
            Recipe(1, 256, 1e-3, 0.0, 0),
            [taps],
            30.0,
        ).run(None, [], None)
        running[0] = False
        thread.join()
        peaks.append(peak[0])
        shutil.rmtree(tmp_path / str(n))
    assert peaks[1] - peaks[0] < 40e6, peaks
