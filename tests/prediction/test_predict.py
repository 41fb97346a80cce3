"""Predictions of whole inputs: part files that are the same however often the run was stopped."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import as_png, near, write_idx
from PIL import Image

import timm_cascade
from timm_cascade.data.views import eval_transform
from timm_cascade.errors import BadImageError, PlanError
from timm_cascade.inference.batch import confidence
from timm_cascade.prediction import local
from timm_cascade.prediction.inputs import open_image
from timm_cascade.prediction.units import PLAN


@pytest.fixture
def cascade(small, images):
    x = torch.stack([eval_transform(small)(images[i][0]) for i in range(len(images))])
    with torch.no_grad():
        every = [confidence(e).sort().values for e in small.forward_exits(x)[:-1]]
    middle = slice(len(x) // 3, 2 * len(x) // 3)  # in the widest gap there: no rounding moves an image across it
    small.thresholds = [float(c[middle][(g := c[middle].diff().argmax())] + c[middle][g + 1]) / 2 for c in every]
    small.label_names = images.class_names
    return small


@pytest.fixture
def folder(images, tmp_path):
    """96 pictures in folders of two depths, with files beside them that are not pictures."""
    root = tmp_path / 'photos'
    for i, picture in enumerate(images.images):
        path = root / f'day {i % 3}' / ('late' if i % 2 else '') / f'{i:03d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        as_png(picture, path)
    (root / 'notes.txt').write_text('not a picture')
    (root / '.hidden.png').write_bytes(b'neither')
    return root


def read(out):
    parts = sorted(out.glob('part-*.parquet'))
    return pa.concat_tables([pq.read_table(p) for p in parts]).to_pylist()


def contents(out):
    return {p.name: p.read_bytes() for p in sorted(out.glob('part-*.parquet'))}


@torch.no_grad()
def test_every_image_gets_what_predict_gives_it(cascade, folder, tmp_path):
    summary = timm_cascade.predict(cascade, folder, tmp_path / 'out', topk=3, batch_size=16, unit=40)
    rows = read(tmp_path / 'out')
    assert [r['filename'] for r in rows] == [p.relative_to(folder).as_posix() for p in walk(folder)]
    transform = eval_transform(cascade)
    from PIL import Image

    want = cascade.predict(torch.stack([transform(Image.open(folder / r['filename'])) for r in rows]))
    assert [r['exit'] for r in rows] == want.exit.tolist() and len(set(want.exit.tolist())) > 1
    assert [r['index'] for r in rows] == want.logits.argmax(1).tolist()
    assert [r['label'] for r in rows] == ['abcd'[r['index']] for r in rows]
    assert near([r['prob'] for r in rows], want.confidence)
    assert all(r['topk_index'][0] == r['index'] and len(r['topk_index']) == 3 and r['row'] == -1 for r in rows)
    assert all(r['topk_prob'] == sorted(r['topk_prob'], reverse=True) and r['error'] is None for r in rows)
    shares = np.bincount(want.exit.numpy(), minlength=3) / len(rows)
    assert np.allclose(summary.exit_shares, shares) and summary.images == 96 and summary.bad_images == 0
    assert summary.parts == summary.parts_written == 3 and 0 < summary.macs_share < 1.02


def walk(folder):
    found = []
    for root, folders, names in os.walk(folder):
        folders.sort()
        found += [type(folder)(root, n) for n in sorted(names) if n.endswith('.png') and not n.startswith('.')]
    return found


def test_workers_change_nothing(cascade, folder, tmp_path):
    timm_cascade.predict(cascade, folder, tmp_path / 'a', batch_size=16, unit=40)
    timm_cascade.predict(cascade, folder, tmp_path / 'b', batch_size=16, unit=40, workers=2)
    assert contents(tmp_path / 'a') == contents(tmp_path / 'b')


def test_shards_make_the_parts_of_a_whole_run(cascade, folder, tmp_path):
    timm_cascade.predict(cascade, folder, tmp_path / 'whole', batch_size=16, unit=10)
    for shard in ('3/3', '1/3', '2/3'):
        last = timm_cascade.predict(cascade, folder, tmp_path / 'shared', batch_size=16, unit=10, shard=shard)
    assert contents(tmp_path / 'whole') == contents(tmp_path / 'shared') and last.parts_missing == 0
    assert last.parts_written == 3 and last.parts == 10
    for shard in ('0/3', '4/3', 'a/b', '1', '1/0'):
        with pytest.raises(ValueError, match='expected I/N'):
            timm_cascade.predict(cascade, folder, tmp_path / 'shared', shard=shard)


def test_only_missing_parts_are_made_again(cascade, folder, tmp_path):
    out = tmp_path / 'out'
    timm_cascade.predict(cascade, folder, out, batch_size=16, unit=20)
    before = contents(out)
    (out / 'part-000002.parquet').unlink()
    times = {p.name: p.stat().st_mtime_ns for p in out.glob('part-*.parquet')}
    again = timm_cascade.predict(cascade, folder, out, batch_size=16, unit=20)
    assert again.parts_written == 1 and contents(out) == before
    assert all((out / name).stat().st_mtime_ns == t for name, t in times.items())
    nothing = timm_cascade.predict(cascade, folder, out, batch_size=16, unit=20)
    assert nothing.parts_written == 0 and nothing.images == 96 and np.isnan(nothing.images_per_second)


def test_another_dial_input_or_setting_is_refused(cascade, folder, tmp_path):
    out = tmp_path / 'out'
    timm_cascade.predict(cascade, folder, out, unit=50)
    before = contents(out)
    with pytest.raises(PlanError, match=r'unit was 50 and is 40.*Give another folder'):
        timm_cascade.predict(cascade, folder, out, unit=40)
    was = cascade.thresholds
    cascade.thresholds = None
    with pytest.raises(PlanError, match='thresholds was'):
        timm_cascade.predict(cascade, folder, out, unit=50)
    cascade.thresholds = was
    picture = next(iter(walk(folder)))
    os.utime(picture, (1, 1))
    with pytest.raises(PlanError, match='input was'):
        timm_cascade.predict(cascade, folder, out, unit=50)
    assert contents(out) == before
    (out / PLAN).write_text('{"half')
    with pytest.raises(PlanError, match='damaged'):
        timm_cascade.predict(cascade, folder, out, unit=50)
    (out / PLAN).unlink()
    with pytest.raises(PlanError, match='part files but no'):
        timm_cascade.predict(cascade, folder, out, unit=50)


def test_bad_images_are_rows_with_their_error(cascade, folder, tmp_path):
    bad = walk(folder)[5]
    bad.write_bytes(bad.read_bytes()[:60])
    empty = walk(folder)[70]
    empty.write_bytes(b'')
    summary = timm_cascade.predict(cascade, folder, tmp_path / 'out', batch_size=16, unit=30)
    rows = read(tmp_path / 'out')
    wrong = [i for i, r in enumerate(rows) if r['error']]
    assert wrong == [5, 70] and summary.bad_images == 2 and summary.images == 96
    assert all(
        rows[i]['index'] is None
        and rows[i]['label'] is None
        and rows[i]['exit'] is None
        and rows[i]['topk_index'] is None
        for i in wrong
    )
    with pytest.raises(BadImageError, match=r'005\.png|day 0.*cannot be read') as error:
        timm_cascade.predict(cascade, folder, tmp_path / 'fail', on_bad_image='fail')
    assert bad.name in str(error.value) and not contents(tmp_path / 'fail')


def test_a_unit_of_nothing_but_bad_images(cascade, tmp_path):
    root = tmp_path / 'photos'
    root.mkdir()
    for i in range(3):
        (root / f'{i}.jpg').write_bytes(b'no picture')
    summary = timm_cascade.predict(cascade, root, tmp_path / 'out')
    assert summary.bad_images == 3 and [r['index'] for r in read(tmp_path / 'out')] == [None] * 3


def parquet(path, images, **columns):
    pictures = []
    for picture in images.images:
        as_png(picture, path.with_suffix('.png'))
        pictures.append(dict(bytes=path.with_suffix('.png').read_bytes(), path=None))
    path.with_suffix('.png').unlink()
    pq.write_table(pa.table({'image': pictures, **columns}), path, row_group_size=25)


def test_parquet_rows_globs_idx_and_several_inputs(cascade, images, folder, tmp_path):
    parquet(tmp_path / 'a.parquet', images, label=list(range(96)))
    write_idx(tmp_path / 'train-images-idx3-ubyte.gz', images.images)
    write_idx(tmp_path / 'train-labels-idx1-ubyte.gz', images.labels.astype(np.uint8))
    plain = timm_cascade.predict(cascade, images, tmp_path / 'plain', batch_size=16, unit=40)
    rows = timm_cascade.predict(cascade, tmp_path / 'a.parquet', tmp_path / 'rows', batch_size=16, unit=40)
    idx = timm_cascade.predict(cascade, tmp_path, tmp_path / 'idx', split='train', batch_size=16, unit=40)
    assert plain.exit_shares == rows.exit_shares == idx.exit_shares
    assert [r['row'] for r in read(tmp_path / 'rows')] == list(range(96))
    assert [r['prob'] for r in read(tmp_path / 'rows')] == [r['prob'] for r in read(tmp_path / 'plain')]
    globbed = timm_cascade.predict(cascade, f'{folder}/**/*.png', tmp_path / 'glob', unit=40)
    assert globbed.images == 96
    both = timm_cascade.predict(cascade, [folder, tmp_path / 'a.parquet'], tmp_path / 'both', unit=40)
    names = {r['filename'] for r in read(tmp_path / 'both')}
    assert both.images == 192 and len(names) == 97


def test_inputs_that_are_none(cascade, tmp_path):
    (tmp_path / 'empty').mkdir()
    pq.write_table(pa.table({'x': [1, 2]}), tmp_path / 'numbers.parquet')
    (tmp_path / 'broken.parquet').write_bytes(b'PAR1 no')
    for data, message in [
        (tmp_path / 'empty', 'holds no images'),
        (tmp_path / 'nowhere.png', 'does not exist'),
        (f'{tmp_path}/*.gif', 'matches no file'),
        (tmp_path / 'numbers.parquet', 'look like encoded images'),
        (tmp_path / 'broken.parquet', 'not a parquet file'),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            timm_cascade.predict(cascade, data, tmp_path / 'out')
    for wrong in (dict(topk=0), dict(unit=0), dict(batch_size=0), dict(workers=-1), dict(on_bad_image='skip')):
        with pytest.raises(ValueError):
            timm_cascade.predict(cascade, tmp_path / 'empty', tmp_path / 'out', **wrong)
    assert not (tmp_path / 'out').exists()


def test_a_full_disk_keeps_what_is_done(cascade, folder, tmp_path, monkeypatch):
    out, whole = tmp_path / 'out', tmp_path / 'whole'
    write, calls = local.write_part, []

    def full(path, table):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, 'No space left on device')
        write(path, table)

    monkeypatch.setattr(local, 'write_part', full)
    with pytest.raises(OSError, match='No space left'):
        timm_cascade.predict(cascade, folder, out, batch_size=16, unit=20)
    assert len(contents(out)) == 2
    timm_cascade.predict(cascade, folder, out, batch_size=16, unit=20)
    timm_cascade.predict(cascade, folder, whole, batch_size=16, unit=20)
    assert contents(out) == contents(whole)


def test_a_damaged_part_is_named(cascade, folder, tmp_path):
    timm_cascade.predict(cascade, folder, tmp_path / 'out', unit=50)
    part = tmp_path / 'out' / 'part-000001.parquet'
    part.write_bytes(part.read_bytes()[:50])
    with pytest.raises(ValueError, match=r'part-000001.parquet is damaged'):
        timm_cascade.predict(cascade, folder, tmp_path / 'out', unit=50)


def test_a_link_in_a_circle(cascade, folder, tmp_path):
    (folder / 'again').symlink_to(folder, target_is_directory=True)
    assert timm_cascade.predict(cascade, folder, tmp_path / 'out').images == 96


KILLED = """
import os, signal, time, torch, timm, timm_cascade
torch.set_num_threads(1)
torch.manual_seed(0)
model = timm.create_model('cascade_cifar_resnet20', depth=1, in_chans=1, num_classes=4, exits=['layer1', 'layer2'],
                          pretrained_cfg_overlay=dict(input_size=(1, 16, 16), mean=(0.5,), std=(0.25,))).eval()
model.thresholds = [0.3, 0.3]
predict = timm_cascade.predict

def start(out):
    process = os.fork()
    if not process:
        predict(model, FOLDER, out, batch_size=4, unit=4)
        os._exit(0)
    return process

whole = os.waitpid(start('whole'), 0)[1]
for moment in MOMENTS:
    process = start('out')
    time.sleep(moment)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
print(whole, os.waitpid(start('out'), 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks')
@pytest.mark.parametrize('kills', [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_times_nothing_is_lost_or_doubled(interpreter, folder, tmp_path, kills):
    moments = np.random.default_rng(0).uniform(0, 0.3, kills).tolist()
    done = interpreter.run(f'FOLDER, MOMENTS = {str(folder)!r}, {moments}\n{KILLED}', tmp_path, ours=True)
    assert done.returncode == 0 and done.stdout.split() == ['0', '0'], done.stderr
    assert contents(tmp_path / 'out') == contents(tmp_path / 'whole')
    assert json.loads((tmp_path / 'out' / PLAN).read_text())['units'] == len(contents(tmp_path / 'out')) == 24


def test_pictures_are_upright_whether_in_files_bytes_or_arrays(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # held sideways
    Image.fromarray(np.zeros((4, 8, 3), np.uint8)).save(tmp_path / 'a.jpg', exif=exif)
    assert [open_image(given).size for given in (tmp_path / 'a.jpg', (tmp_path / 'a.jpg').read_bytes())] == [(4, 8)] * 2
    assert open_image(np.zeros((4, 8), np.uint8)).size == (8, 4)
