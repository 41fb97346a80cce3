"""The runner in an exported folder: it routes as the model does, without torch, and refuses what does not belong."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from exporters.cases import between, load_runner
from helpers import batch_for, near
from PIL import Image

from timm_cascade.data.images import upright
from timm_cascade.data.views import eval_transform


@pytest.fixture
def cascade(exported):
    return load_runner(exported).Cascade(exported, threads=1)


@pytest.fixture
def pictures(calibrated):
    return batch_for(calibrated, 9)


def changed(exported, tmp_path, change):
    """A copy of the folder whose manifest `change` was applied to."""
    folder = tmp_path / 'copy'
    shutil.copytree(exported, folder)
    manifest = json.loads((folder / 'cascade.json').read_text())
    change(manifest)
    (folder / 'cascade.json').write_text(json.dumps(manifest))
    return folder


@torch.no_grad()
@pytest.mark.parametrize('case', ['none', 'some', 'all'])
def test_routes_as_the_model_does(case, cascade, calibrated, pictures):
    before = calibrated.thresholds
    values = dict(none=[None, None], some=between(calibrated, pictures), all=[0.0, 0.0])[case]
    calibrated.thresholds = values
    want = calibrated.predict(pictures)
    calibrated.thresholds = before
    cascade.set_thresholds(values)
    got = cascade.predict(pictures.numpy())
    assert (got.exit == want.exit.numpy()).all() and len(set(got.exit)) == (3 if case == 'some' else 1)
    assert near(got.logits, want.logits)
    assert near(got.confidence, want.confidence)
    order = np.random.default_rng(0).permutation(len(pictures))
    again = cascade.predict(pictures.numpy()[order])
    assert (again.exit == got.exit[order]).all() and near(again.logits, got.logits[order])
    for i in range(3):  # a batch of one
        alone = cascade.predict(pictures.numpy()[i : i + 1])
        assert alone.exit[0] == got.exit[i] and near(alone.logits[0], got.logits[i])


def test_a_single_image_takes_one_call_where_no_exit_is_closed(exported, tmp_path, cascade, calibrated, pictures):
    stages = load_runner(exported).Cascade(changed(exported, tmp_path, lambda m: m['others'].pop('cascade.onnx')))
    broken = np.full((1, 3, 16, 16), np.nan, np.float32)
    for values in ([None, 0.5], between(calibrated, pictures), [0.0, 0.0], [2.0, 2.0]):
        for one in (cascade, stages):
            one.set_thresholds(values)
        for image in [*pictures.numpy()[:, None], broken]:
            got, want = cascade.predict(image), stages.predict(image)
            assert got.exit == want.exit and got.exit.dtype == want.exit.dtype
            assert np.isnan(got.logits).all() if image is broken else near(got.logits, want.logits)
            assert got.logits.shape == want.logits.shape and got.confidence.shape == (1,)
        assert len(cascade._single) == (None not in values)
    assert not stages._single


def test_a_single_file_that_was_removed_is_not_missed(exported, tmp_path, pictures):
    folder = changed(exported, tmp_path, lambda m: m.update(thresholds=[0.5, 0.5]))
    (folder / 'cascade.onnx').unlink()
    cascade = load_runner(folder).Cascade(folder)
    assert cascade.predict(pictures.numpy()[:1]).exit.shape == (1,) and not cascade._single


def test_a_damaged_single_file(exported, tmp_path, pictures):
    folder = changed(exported, tmp_path, lambda m: m.update(thresholds=[0.5, 0.5]))
    (folder / 'cascade.onnx').write_bytes((folder / 'cascade_batch.onnx').read_bytes())
    with pytest.raises(ValueError, match=r'cascade\.onnx is damaged or another file'):
        load_runner(folder).Cascade(folder).predict(pictures.numpy()[:1])


def test_a_tie_leaves_and_nan_does_not(cascade, calibrated, pictures):
    cascade.set_thresholds([0.0, None])
    confidence = cascade.predict(pictures.numpy()).confidence
    cascade.set_thresholds([float(confidence[0]), None])
    assert cascade.predict(pictures.numpy()[:1]).exit[0] == 0
    cascade.set_thresholds([float(np.nextafter(confidence[0], np.float32(2))), None])
    assert cascade.predict(pictures.numpy()[:1]).exit[0] == 2
    cascade.set_thresholds([0.0, 0.0])
    broken = pictures.numpy()[:3].copy()
    broken[1] = np.nan
    assert cascade.predict(broken).exit.tolist() == [0, 2, 0]


def test_an_empty_batch(cascade):
    out = cascade.predict(np.empty((0, 3, 16, 16), np.float32))
    assert out.logits.shape == (0, 5) and out.exit.shape == out.confidence.shape == (0,)


def test_threads_share_a_cascade(cascade, pictures, calibrated):
    cascade.set_thresholds(between(calibrated, pictures))
    want = cascade.predict(pictures.numpy())
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(cascade.predict, [pictures.numpy()] * 16):
            assert (got.exit == want.exit).all() and near(got.logits, want.logits)


@pytest.mark.parametrize('rule', ['certified', 'joint', 'per_exit'])
def test_set_max_drop_chooses_what_the_models_table_chooses(rule, cascade, calibrated):
    for max_drop in (0.01, 0.05, 0.3):
        want = calibrated.table.point(max_drop, rule)
        point = cascade.set_max_drop(max_drop, rule)
        assert point['max_drop'] == want.max_drop
        assert cascade.thresholds.tolist() == np.float32(want.thresholds).tolist()


def test_the_models_thresholds_are_active_at_first(cascade, calibrated):
    assert cascade.thresholds.tolist() == calibrated.thresholds.tolist()


@pytest.mark.parametrize(
    'mode, shape, crop_mode',
    [('RGB', (40, 30), 'center'), ('L', (20, 55), 'center'), ('RGBA', (33, 33), 'squash'), ('RGB', (17, 90), 'border')],
)
def test_preprocessing_is_timms(mode, shape, crop_mode, exported, tmp_path, calibrated):
    folder = changed(exported, tmp_path, lambda m: m['preprocessing'].update(crop_mode=crop_mode))
    cascade = load_runner(folder).Cascade(folder)
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 255, (*shape, 3), dtype=np.uint8)).convert(mode)
    before = dict(calibrated.backbone.pretrained_cfg), dict(calibrated.pretrained_cfg)
    calibrated.pretrained_cfg['crop_mode'] = crop_mode
    try:
        want = eval_transform(calibrated)(image).numpy()
    finally:
        calibrated.pretrained_cfg['crop_mode'] = before[1].get('crop_mode', 'center')
    assert np.abs(cascade.preprocess(image) - want).max() < 1e-5


@pytest.mark.parametrize('mode', ['EXIF', 'I;16', 'P', 'LA', 'CMYK', '1'])
def test_other_kinds_of_image_are_read_as_in_calibration(mode, tmp_path, cascade, calibrated):
    pixels = np.random.default_rng(0).integers(0, 65535, (30, 40), dtype=np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6 if mode == 'EXIF' else 1  # held on its side
    image = Image.fromarray(pixels) if mode == 'I;16' else Image.fromarray((pixels >> 8).astype(np.uint8))
    path = tmp_path / ('image.tiff' if mode == 'CMYK' else 'image.png')
    (image if mode in ('EXIF', 'I;16') else image.convert(mode)).save(path, exif=exif)
    want = eval_transform(calibrated)(upright(Image.open(path))).numpy()
    assert np.abs(cascade.preprocess(path) - want).max() < 1e-5


def test_runs_where_torch_cannot_be_imported(exported, tmp_path, cascade, pictures):
    block = tmp_path / 'block'
    for name in ('torch', 'timm', 'timm_cascade', 'onnx', 'scipy', 'pydantic'):
        (block / name).mkdir(parents=True)
        (block / name / '__init__.py').write_text('raise ImportError("not here")')
    image = np.random.default_rng(1).integers(0, 255, (30, 30, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / 'image.png')
    command = [sys.executable, exported / 'runner.py', tmp_path / 'image.png', '--max-drop', '0.05']
    environment = {**os.environ, 'PYTHONPATH': str(block)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    cascade.set_max_drop(0.05)
    want = cascade.predict(cascade.preprocess(Image.fromarray(image))[None])
    label = cascade.manifest['label_names'][int(want.logits.argmax())]
    assert f'{label}, confidence {want.confidence[0]:.3f}, exit {want.exit[0]},' in done.stdout
    assert '% of all MACs' in done.stdout


def test_the_runner_is_small(exported):
    assert len((exported / 'runner.py').read_text().splitlines()) < 150


@pytest.mark.parametrize(
    'images', [np.zeros((2, 3, 16, 17), np.float32), np.zeros((3, 16, 16), np.float32), np.zeros((1, 3, 16, 16))]
)
def test_images_of_the_wrong_kind(images, cascade):
    with pytest.raises(ValueError, match=r'expected float32 \(N, 3, 16, 16\)'):
        cascade.predict(images)


def test_swapped_and_truncated_files(exported, tmp_path):
    folder = tmp_path / 'copy'
    shutil.copytree(exported, folder)
    first, second = folder / 'stage_0.onnx', folder / 'stage_1.onnx'
    whole = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(ValueError, match=r'stage_0\.onnx is damaged or another file'):
        load_runner(folder).Cascade(folder)
    first.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r'stage_0\.onnx is damaged or another file'):
        load_runner(folder).Cascade(folder)


def test_another_format_and_a_table_of_another_precision(exported, tmp_path):
    folder = changed(exported, tmp_path, lambda m: m.update(table_precision='float16'))
    cascade = load_runner(folder).Cascade(folder)
    with pytest.raises(ValueError, match=r'no table for float32, only float16.*timm-cascade calibrate'):
        cascade.set_max_drop(0.01)
    shutil.rmtree(folder)
    folder = changed(exported, tmp_path, lambda m: m.update(format_version=2))
    with pytest.raises(ValueError, match='not an ONNX export of format version 1'):
        load_runner(folder).Cascade(folder)


@pytest.mark.parametrize('content', [b'{"format": "timm-cascade-exp', b'', b'no JSON', b'[1]', b'\xff\xfe'])
def test_a_manifest_that_is_not_whole(content, exported, tmp_path):
    folder = changed(exported, tmp_path, lambda m: None)
    (folder / 'cascade.json').write_bytes(content)
    with pytest.raises(ValueError, match=r'cascade\.json: .*copy the folder again'):
        load_runner(folder).Cascade(folder)


def places(manifest, at=()):
    """Every key in the manifest, with those on the way to it; of lists the last item."""
    for key in manifest if isinstance(manifest, dict) else [-1] if isinstance(manifest, list) and manifest else ():
        if isinstance(manifest, dict):
            yield (*at, key)
        yield from places(manifest[key], (*at, key))


def test_every_value_that_is_missing_is_named_when_it_is_read(exported, tmp_path, pictures):
    folder = changed(exported, tmp_path, lambda m: m['others'].pop('cascade.onnx'))
    runner = load_runner(folder)
    text, needed = (folder / 'cascade.json').read_text(), set()
    image = Image.new('RGB', (20, 30))
    for *path, last in places(json.loads(text)):
        holder = manifest = json.loads(text)
        for key in path:
            holder = holder[key]
        del holder[last]
        (folder / 'cascade.json').write_text(json.dumps(manifest))
        try:
            cascade = runner.Cascade(folder)
            cascade.set_max_drop(0.05)
            cascade.set_thresholds([None, 1.0])  # joins two stages
            cascade.predict(np.concatenate([pictures.numpy()[:2], cascade.preprocess(image)[None]]))
        except ValueError as e:
            assert f'cascade.json is not as it was exported: no {last!r} beside' in str(e)
            needed.add((*path, last))
    assert needed >= {
        ('format',),
        ('thresholds',),
        ('stages', -1, 'sha256'),
        ('preprocessing', 'mean'),
        ('table', 'points', -1, 'rule'),
    }


@pytest.mark.parametrize('wrong', [[], {}, [[]], ['stage'], 'stages', 7, None])
@pytest.mark.parametrize('key', ['stages', 'thresholds'])
def test_a_value_of_another_type(key, wrong, exported, tmp_path):
    folder = changed(exported, tmp_path, lambda m: m.update({key: wrong}))
    with pytest.raises(ValueError, match=r'cascade\.json: '):
        load_runner(folder).Cascade(folder)


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda m: m['stages'].reverse(), r"no 'live.*' beside images"),
        (lambda m: m.update(thresholds=[None]), r'thresholds \[None\]: expected 2 numbers'),
        (
            lambda m: [s.update(sha256='0' * 64) for s in m['stages']],
            r'stage_0\.onnx is damaged.*cascade.json has another sha256',
        ),
    ],
    ids=['order', 'thresholds', 'hash'],
)
def test_values_that_do_not_fit_are_named(change, message, exported, tmp_path, pictures):
    folder = changed(exported, tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load_runner(folder).Cascade(folder).predict(pictures.numpy())


def test_a_missing_stage_is_named(exported, tmp_path):
    folder = changed(exported, tmp_path, lambda m: None)
    (folder / 'stage_1.onnx').unlink()
    with pytest.raises(OSError, match=r'copy.stage_1\.onnx'):
        load_runner(folder).Cascade(folder)


def test_a_file_outside_the_folder_is_not_read(exported, tmp_path):
    folder = changed(exported, tmp_path, lambda m: m['stages'][0].update(file='../stage_0.onnx'))
    (folder / 'stage_0.onnx').rename(tmp_path / 'stage_0.onnx')
    with pytest.raises(OSError, match=r'copy.stage_0\.onnx'):
        load_runner(folder).Cascade(folder)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['text.txt'], "cannot identify image file 'text.txt'"),
        (['nothing.png'], 'nothing.png'),
        (['image.png', '--max-drop', '1.5'], 'no certified point for max_drop 1.5; there are [0.0, 0.001'),
        ([], 'the following arguments are required: images'),
    ],
)
def test_the_command_says_what_is_wrong(arguments, message, exported, tmp_path, monkeypatch, capsys):
    (tmp_path / 'text.txt').write_text('no image')
    Image.new('RGB', (16, 16)).save(tmp_path / 'image.png')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['runner.py', *arguments])
    with pytest.raises(SystemExit, match='2'):
        runpy.run_path(str(exported / 'runner.py'), run_name='__main__')
    assert message in capsys.readouterr().err.split('error: ')[1]


def test_a_drop_that_the_table_does_not_have(cascade):
    for max_drop in (-0.1, 1.1, float('nan')):
        with pytest.raises(ValueError, match=f'no certified point for max_drop {max_drop}'):
            cascade.set_max_drop(max_drop)
    with pytest.raises(ValueError, match='expected 2 numbers'):
        cascade.set_thresholds([0.5])
