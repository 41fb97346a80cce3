"""Exported folders label whole inputs: the part files of the model, from its exported files."""

import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from exporters.cases import between
from helpers import ROOT, batch_for, near, run
from PIL import Image

import timm_cascade
from timm_cascade.data.views import eval_transform
from timm_cascade.errors import PlanError
from timm_cascade.exporters import ExportedCascade

RELEASE = ROOT / 'hub' / 'releases' / 'cascade_cifar_resnet20.fashion_mnist'
SAMPLES = ROOT / 'hub' / 'samples' / 'fashion_mnist_test.parquet'


@pytest.fixture
def photos(tmp_path):
    generator = np.random.default_rng(0)
    (tmp_path / 'photos').mkdir()
    for i in range(12):
        pixels = generator.integers(0, 255, (3 + i % 5, 4 + i % 3, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((25, 20 + i)).save(tmp_path / 'photos' / f'{i:02}.png')
    (tmp_path / 'photos' / '99.png').write_bytes(b'no picture')
    return tmp_path / 'photos'


def rows_of(folder):
    return pa.concat_tables([pq.read_table(p) for p in sorted(folder.glob('part-*.parquet'))])


def assert_same(got, want):
    for column in ('filename', 'row', 'index', 'label', 'exit', 'error'):
        assert got[column].to_pylist() == want[column].to_pylist(), column
    assert got.schema == want.schema
    probabilities = [np.array(t['prob'].drop_null().to_pylist()) for t in (got, want)]
    assert near(*probabilities)


@pytest.fixture
def thresholds(calibrated, photos):
    transform = eval_transform(calibrated)
    images = torch.stack([transform(Image.open(p)) for p in sorted(photos.glob('[0-8]*.png'))])
    return between(calibrated, images)


def test_the_parts_hold_what_the_models_hold(exported, calibrated, photos, thresholds, tmp_path):
    cascade = ExportedCascade(exported, threads=1)
    cascade.runner.set_thresholds(thresholds)
    before, calibrated.thresholds = calibrated.thresholds, thresholds
    try:
        want = timm_cascade.predict(calibrated, photos, tmp_path / 'want', batch_size=4, unit=5)
    finally:
        calibrated.thresholds = before
    got = timm_cascade.predict(cascade, photos, tmp_path / 'got', batch_size=4, unit=5)
    assert_same(rows_of(tmp_path / 'got'), rows_of(tmp_path / 'want'))
    assert got.exit_shares == want.exit_shares and len([s for s in got.exit_shares if s]) > 1
    assert got.bad_images == 1 and got.parts == 3 and got.macs_share == pytest.approx(want.macs_share)
    with pytest.raises(PlanError, match='dtype was "float32" and is "float32 in onnxruntime"'):
        timm_cascade.predict(cascade, photos, tmp_path / 'want', batch_size=4, unit=5)


def test_from_a_shell(exported, calibrated, photos, tmp_path, capsys):
    status, result, _ = run(
        capsys, 'predict', exported, '--data', photos, '--out', tmp_path / 'out', '--max-drop', '0.05'
    )
    assert status == 0 and result['images'] == 13 and result['bad_images'] == 1
    status, _, error = run(capsys, 'predict', exported, '--data', photos, '--out', tmp_path / 'new', '--compile')
    assert status == 2 and 'leave out --compile and --device' in error
    shutil.copytree(exported, tmp_path / 'copy')
    text = (tmp_path / 'copy' / 'cascade.json').read_text()
    (tmp_path / 'copy' / 'cascade.json').write_text(
        text.replace('"table_precision": "float32"', '"table_precision": "int8"')
    )
    status, _, error = run(
        capsys, 'predict', tmp_path / 'copy', '--data', photos, '--out', tmp_path / 'new', '--max-drop', '0.05'
    )
    assert status == 2 and 'thresholds of int8 do not serve float32' in error and not (tmp_path / 'new').exists()


def test_an_actor_gets_the_thresholds_too(exported, calibrated):
    cascade = ExportedCascade(exported, threads=1)
    images = batch_for(calibrated, 6)
    cascade.runner.set_thresholds(between(calibrated, images, (0.5, 0.5)))
    copy = pickle.loads(pickle.dumps(cascade))
    (want,), (got,) = cascade.stream([images]), copy.stream([images])
    assert torch.equal(got.exit, want.exit) and len(set(want.exit.tolist())) > 1
    assert torch.equal(got.logits, want.logits) and got.index.tolist() == list(range(6))


def test_programs_of_torch_are_refused(exported, tmp_path):
    shutil.copytree(exported, tmp_path / 'copy')
    text = (tmp_path / 'copy' / 'cascade.json').read_text()
    (tmp_path / 'copy' / 'cascade.json').write_text(text.replace('"kind": "onnx"', '"kind": "pt2"'))
    with pytest.raises(timm_cascade.ExportError, match=r'holds pt2 files.*export as onnx'):
        ExportedCascade(tmp_path / 'copy')


@pytest.mark.slow
def test_the_release_answers_alike_through_its_exported_files(tmp_path):
    model = timm_cascade.load(RELEASE).eval()
    model.set_max_drop(0.005)
    folder = timm_cascade.export(model, tmp_path / 'exported', single_file=None)
    timm_cascade.predict(model, SAMPLES, tmp_path / 'want')
    timm_cascade.predict(ExportedCascade(folder), SAMPLES, tmp_path / 'got')
    got, want = rows_of(tmp_path / 'got'), rows_of(tmp_path / 'want')
    assert len(got) == 1000 and len(set(want['exit'].to_pylist())) > 3
    assert_same(got, want)
