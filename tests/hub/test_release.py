import json
import shutil
import warnings

import pytest
import timm
import torch
from helpers import save_as_timm_does
from safetensors.torch import load_file, save_file

import timm_cascade
from timm_cascade import hub


@pytest.fixture
def release(released):
    return released


def x():
    return torch.randn(5, 1, 16, 16, generator=torch.Generator().manual_seed(1))


def test_timm_loads_it_in_one_line_dial_included(release):
    model, folder = release
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(loaded.forward_exits(x()), model.forward_exits(x()), strict=True))
        assert torch.equal(loaded(x()), model(x()))
    assert torch.equal(loaded.thresholds, model.thresholds) and loaded.any_open
    assert loaded.label_names == ['a', 'b', 'c', 'd']
    assert loaded.set_max_drop(0.02, rule='joint') == model.set_max_drop(0.02, rule='joint')
    configs = [
        {k: tuple(v) if isinstance(v, list) else v for k, v in timm.data.resolve_model_data_config(m).items()}
        for m in (loaded, model)
    ]
    assert configs[0] == configs[1]
    assert 'state_dict' not in loaded.backbone.pretrained_cfg


def test_saving_a_loaded_release_changes_nothing(release, tmp_path):
    _, folder = release
    again = timm_cascade.save(hub.load(folder), tmp_path / 'again')
    for file in folder.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_path_of_thresholds_travels_with_the_heads(release, images, tmp_path):
    model, folder = release
    assert model.dial.path is not None and (folder / hub.PATH).exists()
    loaded = hub.load(folder)
    assert (loaded.dial.path == model.dial.path).all() and (loaded.calibration.path == model.dial.path).all()
    assert (timm_cascade.calibrate(loaded, images).path == model.dial.path).all()
    assert loaded.set_max_drop(0.05, level=0.5) == model.set_max_drop(0.05, level=0.5)
    loaded.dial.path = None
    timm_cascade.save(loaded, folder)
    assert not (folder / hub.PATH).exists() and hub.load(folder).dial.path is None


def test_without_the_calibration_the_table_serves(release):
    model, folder = release
    (folder / hub.CALIBRATION).unlink()
    loaded = hub.load(folder)
    assert loaded.calibration is None
    point = loaded.set_max_drop(0.01, rule='joint')
    assert point == model.set_max_drop(0.01, rule='joint')


def test_unpretrained_is_fresh(release):
    _, folder = release
    model = timm.create_model(f'local-dir:{folder}', pretrained=False)
    assert not model.any_open and [p.module for p in model.exits] == ['layer1', 'layer2']


def test_other_classes_or_channels_adapt_and_say_so(release):
    _, folder = release
    with pytest.warns(UserWarning, match='heads and thresholds do not apply'):
        model = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=9).eval()
    assert model(x()).shape == (5, 9) and not model.any_open and model.calibration is None
    assert torch.equal(model.backbone.layer1[0].conv1.weight, release[0].backbone.layer1[0].conv1.weight)


def test_other_channels_keep_the_heads_and_drop_the_table(release):
    model, folder = release
    with pytest.warns(UserWarning, match='calibration and thresholds do not apply') as said:
        other = timm.create_model(f'local-dir:{folder}', pretrained=True, in_chans=3).eval()
    assert len(said) == 1 and other.in_chans == 3 and not other.any_open
    assert other.table is None and other.calibration is None
    assert all(
        torch.equal(a, b)
        for a, b in zip(other.heads.state_dict().values(), model.heads.state_dict().values(), strict=True)
    )


def test_another_image_size_is_resampled_and_drops_the_table(tmp_path):
    model = timm.create_model('cascade_test_vit', num_classes=3, exits=1).eval()
    model.thresholds = [0.5]
    folder = timm_cascade.save(model, tmp_path / 'vit')
    assert torch.equal(timm_cascade.load(folder).thresholds, model.thresholds)
    with pytest.warns(UserWarning, match=r'images of \(3, 96, 96\)') as said:
        other = timm.create_model(f'local-dir:{folder}', pretrained=True, img_size=96).eval()
    assert len(said) == 1 and not other.any_open and other(torch.randn(2, 3, 96, 96)).shape == (2, 3)


def test_a_table_of_other_heads_is_not_saved(release, tmp_path):
    model, _ = release
    with torch.no_grad():
        model.heads[0].fc.bias += 1
    with pytest.raises(ValueError, match="heads' weights"):
        timm_cascade.save(model, tmp_path / 'new')
    assert not (tmp_path / 'new').exists()


def test_the_card_says_what_there_is(release):
    model, folder = release
    card = (folder / hub.CARD).read_text()
    assert '| joint | 5 %' in card and 'model-index' in card and '{{' not in card and 'None' not in card
    (folder / hub.CARD).write_text('mine')
    timm_cascade.save(model, folder)
    assert (folder / hub.CARD).read_text() == 'mine'
    timm_cascade.save(model, folder, card='other')
    assert (folder / hub.CARD).read_text() == 'other'


def test_in_half_precision_it_loads_too(release):
    with pytest.warns(UserWarning, match=r'the dtype is bfloat16 \(calibrated in float32\)') as said:
        model = timm.create_model(f'local-dir:{release[1]}', pretrained=True, dtype=torch.bfloat16).eval()
    assert next(model.parameters()).dtype == torch.bfloat16 and model.any_open and len(said) == 1
    with pytest.raises(timm_cascade.NotCalibratedError):  # the certificate was for float32
        model.set_max_drop(0.1)


def test_half_precision_cascades_keep_their_table(small, images, tmp_path):
    small.to(torch.bfloat16)
    timm_cascade.calibrate(small, images)
    small.thresholds = [0.3, None]
    folder = timm_cascade.save(small, tmp_path / 'half')
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            loaded = timm_cascade.load(folder).eval()
        assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
        assert loaded.set_max_drop(0.1, rule='joint') == small.set_max_drop(0.1, rule='joint')
        with torch.no_grad():
            assert torch.equal(loaded(x().bfloat16()), small(x().bfloat16()))
        loaded.thresholds = [0.3, None]
        folder = timm_cascade.save(loaded, tmp_path / 'again')


@pytest.mark.parametrize('name', [hub.CALIBRATION, hub.TABLE, hub.WEIGHTS])
def test_flipped_bytes_are_refused(release, name):
    path = release[1] / name
    content = bytearray(path.read_bytes())
    at = len(content) - 40
    if name == hub.TABLE:  # a digit
        at = content.index(b'"accuracy": ') + 14
    elif name == hub.CALIBRATION:  # the last bit of a confidence
        length = int.from_bytes(content[:8], 'little')
        at = 8 + length + json.loads(content[8 : 8 + length])['confidence']['data_offsets'][0]
    content[at] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(timm_cascade.ReleaseError, match=f'{name}.*damaged'):
        timm_cascade.load(release[1])


def test_a_file_that_config_does_not_list_is_refused(release):
    change(release[1] / hub.CONFIG, lambda c: c['cascade']['files'].pop(hub.TABLE))
    with pytest.raises(timm_cascade.ReleaseError, match=f'{hub.TABLE} is not a file of this release'):
        timm_cascade.load(release[1])


def test_releases_of_version_1_load_with_one_notice_and_are_saved_as_version_2(release, tmp_path):
    model, folder = release

    def older(config):
        config['cascade'].update(format_version=1, heads_hash='0' * 16)
        config['cascade'].pop('files')
        config['cascade']['backbone']['digest'] = '0' * 16

    change(folder / hub.CONFIG, older)
    change(folder / hub.TABLE, lambda t: (t.update(heads_hash='0' * 16), t['provenance'].pop('backbone_digest')))
    (folder / hub.CALIBRATION).unlink()
    with pytest.warns(UserWarning, match='format version 1, without hashes') as said:
        loaded = timm_cascade.load(folder)
    assert len(said) == 1 and loaded.set_max_drop(0.02, rule='joint') == model.set_max_drop(0.02, rule='joint')
    assert loaded.table.provenance['backbone_digest'] == model.table.provenance['backbone_digest']
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        timm_cascade.load(timm_cascade.save(loaded, tmp_path / 'new'))


class Adapter(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.down = inner, torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.inner(x)


def wrap(model):
    model.backbone.fc = Adapter(model.backbone.fc)


def tie(model):
    model.heads[1].fc.bias = model.heads[0].fc.bias


def quantise(model):
    model.backbone.fc.register_buffer('scale', torch.ones(4, dtype=torch.int8))


def widen(model):
    model.backbone.fc = torch.nn.Linear(64, 5)


def as_integers(model):
    weight = model.backbone.fc.weight
    del model.backbone.fc.weight
    model.backbone.fc.register_buffer('weight', weight.detach().to(torch.int8))


@pytest.mark.parametrize(
    'edit, message',
    [
        (wrap, 'backbone.fc.weight is missing'),
        (tie, 'heads.0.fc.bias and heads.1.fc.bias share their memory'),
        (quantise, 'backbone.fc.scale is not part of the model'),
        (widen, r'backbone.fc.weight is \(5, 64\), not \(4, 64\)'),
        (as_integers, 'backbone.fc.weight holds torch.int8, not torch.float32'),
    ],
)
def test_save_refuses_what_load_would_refuse_and_writes_nothing(small, tmp_path, edit, message):
    edit(small)
    with pytest.raises(timm_cascade.ReleaseError, match=message) as e:
        timm_cascade.save(small, tmp_path / 'new')
    assert 'nothing was saved' in str(e.value) and 'Merge' in str(e.value) and not (tmp_path / 'new').exists()


def test_a_calibration_of_other_weights_or_another_transform_is_not_saved(release, tmp_path):
    model, _ = release
    model.pretrained_cfg['mean'] = (0.1,)
    with pytest.raises(timm_cascade.CascadeError, match=r'calibrated with \[0.5\]'):
        timm_cascade.save(model, tmp_path / 'new')
    model.pretrained_cfg['mean'] = (0.5,)
    with torch.no_grad():
        model.backbone.conv1.weight *= 1.01
    with pytest.raises(timm_cascade.CascadeError, match="backbone's weights"):
        timm_cascade.save(model, tmp_path / 'new')
    model.forget_calibration()
    timm_cascade.load(timm_cascade.save(model, tmp_path / 'new'))


def test_what_timm_s_own_saving_writes_loads_too(release, tmp_path):
    model, _ = release
    save_as_timm_does(model, tmp_path / 'foreign', safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path / "foreign"}', pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(x()), model(x()))
    assert torch.equal(loaded.thresholds, model.thresholds)


def change(path, edit):
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def drop_heads(folder):
    tensors = load_file(folder / hub.WEIGHTS)
    save_file({k: v for k, v in tensors.items() if k.startswith('backbone')}, folder / hub.WEIGHTS)


def other_heads(folder):
    tensors = load_file(folder / hub.WEIGHTS)
    tensors['heads.0.fc.bias'] += 1
    save_file(tensors, folder / hub.WEIGHTS)


@pytest.mark.parametrize(
    'damage, message',
    [
        (lambda f: (f / hub.WEIGHTS).unlink(), r'no model\.safetensors'),
        (lambda f: (f / hub.WEIGHTS).write_bytes((f / hub.WEIGHTS).read_bytes()[:5000]), 'truncated'),
        (lambda f: (f / hub.WEIGHTS).write_bytes(b''), 'truncated'),
        (drop_heads, 'no heads'),
        (other_heads, 'heads'),
        (lambda f: change(f / hub.CONFIG, lambda c: c['model_args'].update(head='linear')), r'model_args\.head'),
        (lambda f: change(f / hub.CONFIG, lambda c: c['model_args'].update(thresholds=[0.5])), '1 thresholds for 2'),
        (lambda f: change(f / hub.CONFIG, lambda c: c['model_args'].update(exits=['layer9', 'layer1'])), 'layer9'),
        (lambda f: change(f / hub.CONFIG, lambda c: c.update(architecture='resnet18')), 'not a cascade'),
        (lambda f: (f / hub.CONFIG).write_text('{'), 'not a JSON'),
        (lambda f: (f / hub.CONFIG).unlink(), 'not a release'),
        (lambda f: shutil.rmtree(f), 'neither a folder'),
        (lambda f: (f / hub.TABLE).write_text('{"format_version": 99}'), 'version'),
        (lambda f: (f / hub.CALIBRATION).write_bytes(b'zzz'), 'calibration'),
    ],
)
def test_damaged_releases_are_refused_by_name(release, damage, message):
    _, folder = release
    damage(folder)
    with pytest.raises(ValueError, match=message):
        hub.load(folder)


def test_a_full_disk_leaves_the_old_release(release, monkeypatch):
    model, folder = release
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(tensors, path, metadata=None):
        path.write_bytes(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('timm_cascade.hub.save_release.save_file', full)
    with torch.no_grad():
        model.backbone.fc.bias += 1
    model.forget_calibration()
    with pytest.raises(OSError, match='No space'):
        timm_cascade.save(model, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
