"""The whole way in one command: `timm-cascade train --finetune N --report` on an image folder."""

import shutil
import warnings

import numpy as np
import pytest
import timm
import torch
from helpers import as_png, run
from safetensors.torch import load_file

from timm_cascade.cli import train_command
from timm_cascade.cli.main import main

CLASSES = ('Große Bäume', 'it is <b>', '猫')
MODEL = ('train', '--model', 'cascade_cifar_resnet20', '--model-kwargs', 'depth=1', '--epochs', 2, '--finetune', 1)


@pytest.fixture
def flowers(tmp_path):
    generator = np.random.default_rng(0)
    for split in ('train', 'val', 'test'):
        for k, name in enumerate(CLASSES):
            (tmp_path / 'flowers' / split / name).mkdir(parents=True)
            for i in range(8):
                picture = generator.integers(0, 90, (24, 24, 3), dtype=np.uint8)
                picture[..., k] += 150
                as_png(picture, tmp_path / 'flowers' / split / name / f'{i}.png')
    return tmp_path / 'flowers'


def test_one_command_from_a_folder_to_a_page(capsys, flowers, tmp_path, monkeypatch):
    """The validation split chooses the epoch, half of the test images calibrates; killed at the page it continues."""
    monkeypatch.setattr(train_command, 'write_report', lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(capsys, *MODEL, '--data', flowers, '--report', '--out', tmp_path / 'out')
    before = load_file(tmp_path / 'out' / 'model.safetensors')
    monkeypatch.undo()
    monkeypatch.setattr(torch.optim.AdamW, 'step', lambda *args, **kwargs: 1 / 0)  # nothing is trained again
    status, result, _ = run(capsys, *MODEL, '--data', flowers, '--report', '--out', tmp_path / 'out')
    after = load_file(tmp_path / 'out' / 'model.safetensors')
    assert status == 0 and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    page = (tmp_path / 'out' / 'report.html').read_text(encoding='utf-8')
    assert result['report'] == str(tmp_path / 'out' / 'report.html') and 'On 12 images' in page
    assert all(name in page for name in (CLASSES[0], 'it is &lt;b&gt;', CLASSES[2])) and 'name="viewport"' in page
    assert not list((tmp_path / 'out').glob('*.pt'))
    _, result, _ = run(capsys, 'info', tmp_path / 'out')
    assert result['calibrated_on']['n'] == 12 and result['calibrated_on']['split'] == 'first half of test'


@pytest.mark.parametrize(
    'flags, gone, said',
    [
        (('--report',), 'test', '--test-split'),
        ((), 'val', "--val-split 'train[80%:]'"),
        (('--split', 'train[:80%]'), 'none', '--val-split'),  # a part of train could hold what validation repeats
        (('--report', '--max-drop', 2), 'none', '--max-drop 2'),
    ],
)
def test_what_is_missing_is_said_before_anything_is_written(capsys, flowers, tmp_path, flags, gone, said):
    shutil.rmtree(flowers / gone, ignore_errors=True)
    status, _, err = run(capsys, *MODEL, '--data', flowers, '--out', tmp_path / 'out', *flags)
    assert status == 2 and said in err and not (tmp_path / 'out').exists()


def test_an_output_that_cannot_be_written_is_an_error_before_the_first_epoch(capsys, flowers, tmp_path, monkeypatch):
    monkeypatch.setattr(train_command, 'finetune', lambda *args, **kwargs: 1 / 0)
    (tmp_path / 'out').write_text('a file')
    status, _, err = run(capsys, *MODEL, '--data', flowers, '--out', tmp_path / 'out')
    assert status == 2 and 'out' in err


def test_validation_images_that_are_trained_on_are_named_before_the_first_epoch(capsys, caplog, flowers, tmp_path):
    status, _, _ = run(capsys, *MODEL, '--data', flowers, '--out', tmp_path / 'out', '--val-split', 'train')
    said = [record.getMessage() for record in caplog.records]
    trained_on = next(i for i, text in enumerate(said) if 'were trained on' in text)
    assert status == 0 and trained_on < next(i for i, text in enumerate(said) if text.startswith('training on'))


def test_weights_that_cannot_be_fetched_may_be_a_file(capsys, flowers, tmp_path, monkeypatch):
    def fetch(*args, **kwargs):
        raise FileNotFoundError('no connection')

    monkeypatch.setattr(timm, 'create_model', fetch)
    argv = ['train', '--model', 'cascade_test_resnet.r160_in1k', '--data', flowers, '--out', tmp_path / 'out']
    status, _, err = run(capsys, *argv)
    assert status == 2 and 'cascade_test_resnet.r160_in1k' in err and '"file"' in err and 'no connection' in err


def test_labels_in_a_file_are_said_not_to_be_read(capsys, tmp_path):
    as_png(np.zeros((8, 8, 3), np.uint8), tmp_path / '0.png')
    (tmp_path / 'metadata.csv').write_text('file_name,label\n0.png,a\n')
    status, _, err = run(capsys, *MODEL, '--data', tmp_path, '--out', tmp_path / 'out')
    assert status == 2 and 'metadata.csv are not read here' in err and 'save_to_disk' in err


def test_warnings_of_a_command_show_no_code(capsys, flowers, tmp_path, monkeypatch):
    monkeypatch.setattr(train_command, 'create_cascade', lambda *args, **kwargs: warnings.warn('Look.', stacklevel=1))
    monkeypatch.setattr(warnings, 'showwarning', lambda *args: print(warnings.formatwarning(*args[:4])))
    with warnings.catch_warnings(), pytest.raises(TypeError):
        warnings.simplefilter('always')
        main(list(map(str, (*MODEL, '--data', flowers, '--out', tmp_path / 'out'))))
    assert 'Look.' in capsys.readouterr().out.splitlines()
