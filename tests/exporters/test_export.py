"""What export refuses, what it leaves behind, and what its manifest says."""

import json
import shutil

import numpy as np
import pytest
import torch
from exporters.cases import calibrate_by_hand, load_runner, quietly_export, small_model

import timm_cascade
from timm_cascade.exporters import assemble, read_manifest, stage_files


def test_the_manifest_says_what_is_needed(exported, calibrated):
    manifest = read_manifest(exported)
    assert manifest.exits == ('layer1', 'layer2')
    assert [s.macs for s in manifest.stages] == calibrated.stage_macs().tolist()
    assert manifest.label_names == calibrated.label_names
    assert manifest.preprocessing.mean == [0.5, 0.4, 0.3] and manifest.preprocessing.crop_pct == 0.8
    assert manifest.table_precision == manifest.precision == 'float32'
    assert set(manifest.versions) >= {'timm_cascade', 'timm', 'torch', 'onnx'}
    assert set(manifest.others) >= {'runner.py'}


@pytest.mark.slow
def test_exporting_changes_nothing(tmp_path):
    model = small_model()
    x = torch.randn(3, 3, 16, 16)
    before = {k: v.clone() for k, v in model.state_dict().items()}, model.forward_exits(x)
    quietly_export(model, tmp_path / 'out')
    assert all(torch.equal(v, before[0][k]) for k, v in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(model.forward_exits(x), before[1], strict=True))
    assert not model.training and model.thresholds.isinf().all()


def test_an_existing_folder_is_refused_and_kept(tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'mine.txt').write_text('keep')
    with pytest.raises(timm_cascade.ExportError, match='exists already'):
        timm_cascade.export(small_model(), tmp_path / 'out')
    assert [p.name for p in tmp_path.rglob('*')] == ['out', 'mine.txt']


def test_a_link_that_leads_nowhere_is_kept(tmp_path):
    (tmp_path / 'out').symlink_to(tmp_path / 'nothing')
    with pytest.raises(timm_cascade.ExportError, match='exists already'):
        timm_cascade.export(small_model(), tmp_path / 'out')
    assert (tmp_path / 'out').is_symlink()


@pytest.mark.parametrize('stage', [0, 2])
def test_an_interrupted_export_leaves_nothing(stage, tmp_path, monkeypatch):
    def fail(module, path, *args):
        path.write_bytes(b'half')
        if module.index == stage:
            raise KeyboardInterrupt
        return 18

    monkeypatch.setattr(assemble, 'write_stage', fail)
    with pytest.raises(KeyboardInterrupt):
        quietly_export(small_model(), tmp_path / 'out')
    assert list(tmp_path.iterdir()) == []


def test_bad_requests(tmp_path):
    model = small_model()
    for kwargs, message in [
        (dict(format='tflite'), "format is 'tflite'; expected onnx or pt2"),
        (dict(batch_size=0), 'batch_size is 0'),
        (dict(opset=3), 'opset is 3'),
        (dict(opset=18, format='pt2'), 'opset is 18, but format="pt2" has none'),
        (dict(single_file='batch', batch_size=2), 'stages of any batch size'),
    ]:
        with pytest.raises(timm_cascade.ExportError, match=message):
            quietly_export(model, tmp_path / 'out', **kwargs)
    with pytest.raises(timm_cascade.ExportError, match=r'training mode; call model.eval\(\)'):
        timm_cascade.export(small_model().train(), tmp_path / 'out')
    with pytest.raises(timm_cascade.ExportError, match='bfloat16'):
        timm_cascade.export(small_model().bfloat16(), tmp_path / 'out')
    model.label_names = ['ant', 'bee']
    with pytest.raises(timm_cascade.ExportError, match='2 label_names for 5 classes'):
        timm_cascade.export(model, tmp_path / 'out')
    with pytest.raises(timm_cascade.ExportError, match='Linear is not a cascade'):
        timm_cascade.export(torch.nn.Linear(2, 2), tmp_path / 'out')
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    real = stage_files.importlib.util.find_spec
    monkeypatch.setattr(
        stage_files.importlib.util, 'find_spec', lambda name, *a: None if name == 'onnxscript' else real(name, *a)
    )
    with pytest.raises(timm_cascade.ExportError, match=r'onnxscript is not installed.*timm-cascade\[onnx\]'):
        timm_cascade.export(small_model(), tmp_path / 'out')


@pytest.fixture
def empty_stages(monkeypatch):
    """Stage files are written empty: for what is said and described, they need not be exported."""
    monkeypatch.setattr(assemble, 'write_stage', lambda stage, path, opset, size: path.write_bytes(b'') or opset or 18)


def test_a_model_that_is_not_calibrated_says_so(tmp_path, empty_stages, exported):
    with pytest.warns(UserWarning, match='not calibrated'):
        timm_cascade.export(small_model(), tmp_path / 'out', single_file=None)
    manifest = json.loads((tmp_path / 'out' / 'cascade.json').read_text())
    assert manifest['table'] is None and manifest['thresholds'] == [None, None]
    shutil.copytree(exported, tmp_path / 'copy')
    for name in ('thresholds', 'table', 'table_precision'):
        change(tmp_path / 'copy', **{name: manifest[name]})
    cascade = load_runner(tmp_path / 'copy').Cascade(tmp_path / 'copy')
    assert np.isinf(cascade.thresholds).all()
    with pytest.raises(ValueError, match='no table for float32'):
        cascade.set_max_drop(0.01)


def test_thresholds_that_the_table_does_not_have_are_told(tmp_path, empty_stages, recwarn):
    model = calibrate_by_hand(small_model())
    model.set_max_drop(0.05)
    timm_cascade.export(model, tmp_path / 'chosen', single_file=None)
    assert not [w for w in recwarn if 'no point in the table' in str(w.message)]
    model.thresholds = [0.31, 0.77]
    with pytest.warns(UserWarning, match='no point in the table.*set_max_drop'):
        timm_cascade.export(model, tmp_path / 'set', single_file=None)
    assert json.loads((tmp_path / 'set' / 'cascade.json').read_text())['thresholds'] == pytest.approx([0.31, 0.77])


def change(folder, **entries):
    manifest = json.loads((folder / 'cascade.json').read_text())
    (folder / 'cascade.json').write_text(json.dumps(manifest | entries))


def test_thresholds_of_single_precision_do_not_serve_half(tmp_path, empty_stages, exported):
    model = calibrate_by_hand(small_model())
    model.set_max_drop(0.05)
    with pytest.warns(UserWarning, match='do not serve float16'):
        timm_cascade.export(model, tmp_path / 'out', fp16=True, single_file=None)
    manifest = json.loads((tmp_path / 'out' / 'cascade.json').read_text())
    assert manifest['thresholds'] == [None, None] and manifest['table_precision'] == 'float32'
    shutil.copytree(exported, tmp_path / 'copy')
    change(tmp_path / 'copy', precision='float16')
    with pytest.raises(ValueError, match='no table for float16, only float32'):
        load_runner(tmp_path / 'copy').Cascade(tmp_path / 'copy').set_max_drop(0.01)


def test_a_table_of_other_heads_is_refused(tmp_path):
    model = calibrate_by_hand(small_model())
    with torch.no_grad():
        model.heads[0].fc.bias.add_(1)
    with pytest.raises(timm_cascade.TableMismatchError, match="heads' weights"):
        timm_cascade.export(model, tmp_path / 'out')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    'change, place',
    [
        (lambda m: m['stages'][0].update(sha256='x'), 'stages.0.sha256'),
        (lambda m: m['stages'][1].update(file='../stage_1.onnx'), 'stages.1.file'),
        (lambda m: m['stages'][1].update(inputs=['nothing']), 'stage 1 reads'),
        (lambda m: m['stages'][1]['cuts'].pop(), 'stage 1 has the cuts .* expected 6 ascending offsets'),
        (lambda m: m['stages'][0]['cuts'].reverse(), 'stage 0 has the cuts'),
        (lambda m: m.update(thresholds=[None]), '1 thresholds for 2 exits'),
        (lambda m: m.update(format_version=9), 'format_version'),
        (lambda m: m['preprocessing'].update(std=[0.0]), 'preprocessing.std.0'),
        (lambda m: m['table'].update(heads_hash='other'), 'not the one that was calibrated'),
        (lambda m: m.pop('stages'), 'stages is missing'),
        (lambda m: m['stages'][0].update(macs='1'), "stages.0.macs is '1'; it should be a valid number"),
        (lambda m: m['table'].update(points={}), 'table: points is {}; it should be a valid list'),
        (lambda m: m.update(precision='float16'), 'thresholds of float32 do not serve float16'),
        (
            lambda m: m['preprocessing'].update(mean=[0.5, 0.5]),
            'mean and std for other images than those of 3 channels',
        ),
        (lambda m: m.update(label_names=['ant']), '1 label_names for 5 classes'),
    ],
)
def test_a_hostile_manifest_is_refused_by_name(change, place, exported, tmp_path):
    shutil.copytree(exported, tmp_path / 'copy')
    manifest = json.loads((exported / 'cascade.json').read_text())
    change(manifest)
    (tmp_path / 'copy' / 'cascade.json').write_text(json.dumps(manifest))
    with pytest.raises(timm_cascade.ExportError, match=place):
        read_manifest(tmp_path / 'copy')


def test_a_folder_without_a_manifest(tmp_path):
    with pytest.raises(timm_cascade.ExportError, match=r'no cascade.json.*timm-cascade export'):
        read_manifest(tmp_path)
