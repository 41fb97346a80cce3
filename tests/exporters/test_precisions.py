"""Thresholds belong to the files that they were measured with: calibrating exported files, 8-bit integers, pt2."""

import json
import shutil

import numpy as np
import pytest
import torch
from exporters.cases import load_runner, quietly_export, small_model
from helpers import batch_for, near, run

import timm_cascade
from timm_cascade.data import ImageData
from timm_cascade.data.views import eval_transform
from timm_cascade.exporters import calibrate_exported, read_manifest
from timm_cascade.exporters.assemble import write_manifest
from timm_cascade.exporters.onnx_int8 import quantise_stages
from timm_cascade.utils.files import sha256_of


@pytest.fixture
def copy(exported, tmp_path):
    shutil.copytree(exported, tmp_path / 'copy')
    return tmp_path / 'copy'


@pytest.fixture(scope='module')
def data():
    generator = np.random.default_rng(0)
    pictures = generator.integers(0, 255, (48, 20, 20, 3), dtype=np.uint8)
    return ImageData(pictures, generator.integers(0, 5, 48), ['ant', 'bee', 'cat', 'dog', 'elk'], 'noise', 'test')


@torch.no_grad()
def test_calibrating_the_files_measures_what_the_model_does(copy, data, calibrated):
    calibration = calibrate_exported(copy, data, batch_size=10)
    transform = eval_transform(calibrated)
    every = calibrated.forward_exits(torch.stack([transform(data[i][0]) for i in range(48)]))
    want = torch.stack([e.softmax(1).amax(1) for e in every], 1).numpy()
    assert np.abs(calibration.confidence - want).max() < 1e-4
    answers = torch.stack([e.argmax(1) for e in every], 1).numpy()
    assert (calibration.correct == (answers == data.labels[:, None])).mean() > 0.99
    manifest = read_manifest(copy)
    assert manifest.table['provenance']['dtype'] == manifest.table_precision == 'float32'
    assert manifest.table['provenance']['files'] == [s.sha256 for s in manifest.stages]


def test_int8_files_are_smaller_and_need_thresholds_of_their_own(copy, data, calibrated):
    before = [s.bytes for s in read_manifest(copy).stages]
    quantise_stages(copy, data)
    manifest = read_manifest(copy)
    manifest.precision, manifest.thresholds = 'int8', [None, None]
    for entry in manifest.stages:
        entry.sha256, entry.bytes = sha256_of(copy / entry.file), (copy / entry.file).stat().st_size
        entry.cuts = []
    write_manifest(manifest, copy, [])
    assert sum(s.bytes for s in manifest.stages) < 0.6 * sum(before)
    cascade = load_runner(copy).Cascade(copy)
    images = batch_for(calibrated, 8)
    cascade.set_thresholds([None, None])
    got = cascade.predict(images.numpy()).logits
    with torch.no_grad():
        want = calibrated.backbone(images).numpy()
    assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > 0.9
    with pytest.raises(ValueError, match='no table for int8, only float32'):
        cascade.set_max_drop(0.05)
    calibrate_exported(copy, data)
    manifest = read_manifest(copy)
    assert manifest.table_precision == 'int8' and manifest.thresholds == [None, None]
    load_runner(copy).Cascade(copy).set_max_drop(0.05)


def test_from_a_shell(copy, data, capsys, tmp_path, monkeypatch, calibrated):
    from timm_cascade.cli import calibrate_command, export_command

    monkeypatch.setattr(calibrate_command, 'load_data_of', lambda *args, **kwargs: data)
    status, result, _ = run(capsys, 'calibrate', copy, '--data', 'noise')
    assert status == 0 and result['precision'] == 'float32' and result['n'] == 48
    monkeypatch.setattr(export_command.hub, 'load', lambda where: calibrated)
    status, _, error = run(capsys, 'export', 'release', '--out', copy)
    assert status == 2 and 'exists already' in error
    status, _, error = run(capsys, 'export', 'release', '--out', tmp_path / 'new', '--int8')
    assert status == 2 and 'name some with --data' in error
    status, _, error = run(capsys, 'export', 'release', '--out', tmp_path / 'new', '--data', 'noise')
    assert status == 2 and '--data and --split are for --int8' in error
    status, result, _ = run(capsys, 'export', 'release', '--out', tmp_path / 'new', '--format', 'pt2')
    assert status == 0 and [s['file'] for s in result['stages']] == ['stage_0.pt2', 'stage_1.pt2', 'stage_2.pt2']


@torch.no_grad()
def test_programs_of_torch_export(tmp_path):
    model = small_model()
    folder = quietly_export(model, tmp_path / 'out', format='pt2')
    x = batch_for(model, 3)
    values = {'images': x}
    manifest = json.loads((folder / 'cascade.json').read_text())
    for k, (stage, want) in enumerate(zip(manifest['stages'], model.forward_exits(x), strict=True)):
        program = torch.export.load(folder / stage['file']).module()
        *made, logits, confidence = program(*(values[name] for name in stage['inputs']))
        values |= zip(stage['outputs'], made, strict=True)
        assert near(logits, want), k
        assert near(confidence, want.softmax(1).amax(1))
    with pytest.raises(timm_cascade.ExportError, match='int8 goes with'):
        timm_cascade.export(
            model, tmp_path / 'other', format='pt2', int8=ImageData(np.zeros((1, 4, 4), np.uint8), None)
        )
