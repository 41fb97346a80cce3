import json

import numpy as np
import pytest
import torch
from helpers import as_png, run, write_idx

import timm_cascade
from timm_cascade.cli.main import main


@pytest.fixture
def idx(tmp_path, images):
    folder = tmp_path / 'data'
    folder.mkdir()
    for name in ('train', 't10k'):
        write_idx(folder / f'{name}-images-idx3-ubyte.gz', np.asarray(images.images))
        write_idx(folder / f'{name}-labels-idx1-ubyte.gz', images.labels.astype(np.uint8))
    return str(folder)


def test_the_whole_path(capsys, idx, tmp_path):
    folder = tmp_path / 'release'
    status, result, _ = run(
        capsys,
        'train',
        '--model',
        'cascade_cifar_resnet20',
        '--data',
        idx,
        '--split',
        'train[:64]',
        '--val-split',
        'train[64:]',
        '--out',
        folder,
        '--epochs',
        2,
        '--exits',
        'layer1,layer2',
        '--model-kwargs',
        'in_chans=1',
        'depth=1',
    )
    assert status == 0 and result['epoch'] == 2 and len(result['accuracy']) == 3 and result['processes'] == 1

    status, result, err = run(capsys, 'evaluate', folder, '--data', idx, '--split', 'test', '--max-drop', 0.1)
    assert status == 2 and 'timm-cascade calibrate' in err

    status, result, _ = run(capsys, 'calibrate', folder, '--data', idx, '--split', 'train[64:]')
    assert status == 0 and result['n'] == 32 and len(result['accuracy']) == 3

    status, result, _ = run(
        capsys, 'evaluate', folder, '--data', idx, '--split', 'test', '--max-drop', 0.1, '--rule', 'joint'
    )
    assert status == 0 and result['n'] == 96 and result['point']['rule'] == 'joint'

    status, result, _ = run(capsys, 'info', folder)
    assert [e['module'] for e in result['exits']] == ['layer1', 'layer2'] and result['calibrated_on']['n'] == 32
    assert [e['cut'] for e in result['exits']] == ['hook', 'hook']
    assert main(['info', str(folder)]) == 0
    assert 'layer1  0.' in capsys.readouterr().out


def test_a_linear_probe_on_other_classes(capsys, tmp_path):
    """No checkpoint: the classifier is new and trained; the names go to config.json; the log says which."""
    generator = np.random.default_rng(0)
    for split in ('train', 'test'):
        for k, name in enumerate(['cat', 'dog', 'owl']):
            (tmp_path / 'data' / split / name).mkdir(parents=True)
            for i in range(8):
                picture = generator.integers(0, 90, (24, 24, 3), dtype=np.uint8)
                picture[..., k] += 150
                as_png(picture, tmp_path / 'data' / split / name / f'{i}.png')
    (tmp_path / 'data' / 'train' / 'cat' / '9.png').write_text('no image')
    argv = [
        'train',
        '--model',
        'cascade_cifar_resnet20',
        '--data',
        tmp_path / 'data',
        '--val-split',
        'test',
        '--out',
        tmp_path / 'out',
        '--epochs',
        30,
        '--views',
        2,
        '--lr',
        1e-2,
        '--model-kwargs',
        'depth=1',
        '--grad-accum',
        2,
        '--batch-size',
        4,
    ]
    status, _, err = run(capsys, *argv)
    assert status == 2 and '9.png is not an image' in err and not (tmp_path / 'out' / 'config.json').exists()
    assert not list((tmp_path / 'out').rglob('*.npy'))
    status, result, err = run(capsys, *argv, '--on-bad-image', 'skip')
    assert status == 0 and result['images'] == 24 and result['classifier_trained'] and result['accuracy'][-1] > 0.9
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == [
        'README.md',
        'config.json',
        'features',
        'heads.jsonl',
        'model.safetensors',
        'path.json',
    ]
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['label_names'] == ['cat', 'dog', 'owl']
    status, result, _ = run(capsys, 'evaluate', tmp_path / 'out', '--data', tmp_path / 'data', '--split', 'test')
    assert status == 0 and result['full_accuracy'] > 0.9
    (tmp_path / 'data' / 'train' / 'dog').rename(tmp_path / 'data' / 'train' / 'emu')
    (tmp_path / 'data' / 'test' / 'dog').rename(tmp_path / 'data' / 'test' / 'emu')
    status, _, err = run(capsys, 'calibrate', tmp_path / 'out', '--data', tmp_path / 'data', '--split', 'test')
    assert status == 2 and "class 1 is 'emu' there and 'dog' here" in err
    assert not (tmp_path / 'out' / 'thresholds.json').exists()


@pytest.mark.parametrize(
    'flags, trained, said',
    [
        ([], True, 'new, 4 classes; trained as the final exit'),
        (['--classifier', 'keep'], False, 'kept as it is, RANDOM'),
        (['--checkpoint', 'backbone.pt'], False, 'kept as it is'),
        (['--checkpoint', 'backbone.pt', '--classifier', 'train'], True, 'trained again'),
    ],
)
def test_which_classifier(capsys, caplog, idx, tmp_path, small, monkeypatch, flags, trained, said):
    monkeypatch.chdir(tmp_path)
    torch.save(small.backbone.state_dict(), 'backbone.pt')
    status, result, _ = run(
        capsys,
        'train',
        '--model',
        'cascade_cifar_resnet20',
        '--data',
        idx,
        '--out',
        'out',
        '--epochs',
        1,
        '--exits',
        'layer1',
        '--model-kwargs',
        'in_chans=1',
        'depth=1',
        '--no-cache',
        *flags,
    )
    assert status == 0 and result['classifier_trained'] is trained
    assert any(m.startswith(f'classifier: {said}') for m in caplog.messages)
    backbone = timm_cascade.load('out').backbone.state_dict()
    changed = {k for k, v in small.backbone.state_dict().items() if not torch.equal(v, backbone[k])}
    if '--checkpoint' in flags:
        assert changed == ({'fc.weight', 'fc.bias'} if trained else set())


def test_how_the_model_reads_images_is_said_as_in_timm_scripts(capsys, idx, tmp_path):
    argv = ['train', '--model', 'cascade_cifar_resnet20', '--data', idx, '--out', tmp_path, '--exits', 1, '--epochs', 1]
    how = ['--img-size', 20, '--in-chans', 1, '--mean', 0.3, '--std', 0.2, '--crop-pct', 0.9]
    status, _, _ = run(capsys, *argv, *how, '--interpolation', 'bilinear')
    assert status == 0
    config = json.loads((tmp_path / 'config.json').read_text())['pretrained_cfg']
    assert config['input_size'] == [1, 20, 20] and config['mean'] == [0.3] and config['std'] == [0.2]
    assert config['crop_pct'] == 0.9 and config['interpolation'] == 'bilinear'
    for wrong, message in (
        (['--mean', 0.1, 0.2], '--mean has 2 values'),
        (['--crop-pct', 2], '--crop-pct 2.0'),
        (['--img-size', 0], '--img-size 0'),
    ):
        status, _, err = run(capsys, *argv, *wrong)
        assert status == 2 and message in err


def test_finetuned_measured_and_reported(capsys, idx, tmp_path):
    argv = ['train', '--model', 'cascade_cifar_resnet20', '--data', idx, '--out', tmp_path / 'out', '--in-chans', 1]
    argv += ['--model-kwargs', 'depth=1', '--exits', 2, '--epochs', 2, '--finetune', 2, '--finetune-lr', 5e-3]
    status, _, err = run(capsys, *argv)
    assert status == 2 and '--val-split' in err and not (tmp_path / 'out').exists()
    status, result, _ = run(capsys, *argv, '--val-split', 'test')
    assert status == 0 and result['finetuned']['epochs'] == 2 and not result['classifier_trained']
    assert result['accuracy'][-1] == pytest.approx(result['finetuned']['accuracy'], abs=1e-4)
    assert not list((tmp_path / 'out').glob('*.pt')) and (tmp_path / 'out' / 'backbone.jsonl').exists()
    test = ['--data', idx, '--split', 'test']
    status, _, err = run(capsys, 'evaluate', tmp_path / 'out', *test, '--curve')
    assert status == 2 and 'timm-cascade calibrate' in err
    assert run(capsys, 'calibrate', tmp_path / 'out', *test)[0] == 0
    status, result, _ = run(
        capsys, 'evaluate', tmp_path / 'out', *test, '--curve', '--report', tmp_path / 'report.html'
    )
    assert status == 0 and max(p['accuracy'] for p in result['curve']) == result['most_accurate']['accuracy']
    assert (tmp_path / 'report.html').read_text().startswith('<!doctype html>')
    status, _, err = run(capsys, 'evaluate', tmp_path / 'out', *test, '--curve', tmp_path / 'curve.bmp')
    assert status == 2 and '.png' in err


def test_a_checkpoint_of_other_classes(capsys, idx, tmp_path, small):
    small.backbone.reset_classifier(5)
    torch.save(small.backbone.state_dict(), tmp_path / 'backbone.pt')
    status, _, err = run(
        capsys,
        'train',
        '--model',
        'cascade_cifar_resnet20',
        '--data',
        idx,
        '--out',
        tmp_path / 'out',
        '--model-kwargs',
        'in_chans=1',
        'depth=1',
        '--checkpoint',
        tmp_path / 'backbone.pt',
    )
    assert status == 2 and 'size mismatch' in err and 'backbone.pt' in err and not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    'argv, message',
    [
        (['info', 'no/such/folder'], 'neither a folder'),
        (['calibrate', 'nowhere', '--data', 'x'], 'neither a folder'),
        (
            ['train', '--model', 'cascade_cifar_resnet20', '--data', '/no/where/at/all', '--out', 'x'],
            'neither an IDX folder',
        ),
    ],
)
def test_requests_that_cannot_be_met(capsys, argv, message):
    status, _, err = run(capsys, *argv)
    assert status == 2 and message in err


@pytest.mark.parametrize(
    'model, message',
    [
        ('cascade_nonesuch', 'Unknown model'),
        ('cascade_resnet50.bogus', 'Invalid pretrained tag'),
        ('cifar_resnet20', 'cascade_cifar_resnet20'),
    ],
)
def test_names_that_are_no_cascade(capsys, idx, tmp_path, model, message):
    argv = ['train', '--model', model, '--data', idx, '--split', 'train', '--out', tmp_path / 'out']
    status, _, err = run(capsys, *argv)
    assert status == 2 and message in err and not (tmp_path / 'out').exists()


def test_it_starts_as_a_module(interpreter, tmp_path):
    code = "import runpy, sys; sys.argv = ['', '--help']; runpy.run_module('timm_cascade', run_name='__main__')"
    done = interpreter.run(code, tmp_path)
    assert done.returncode == 0 and 'usage: timm-cascade' in done.stdout, done.stderr


@pytest.mark.parametrize('command', ['train', 'calibrate', 'evaluate', 'info', 'push'])
def test_every_command_has_help(capsys, command):
    with pytest.raises(SystemExit) as e:
        main([command, '--help'])
    assert e.value.code == 0 and f'timm-cascade {command}' in capsys.readouterr().out


def test_predict(small, images, capsys, tmp_path):
    small.thresholds = [0.3, None]
    timm_cascade.save(small, tmp_path / 'release')
    (tmp_path / 'photos').mkdir()
    for i in range(5):
        as_png(images.images[i], tmp_path / 'photos' / f'{i}.png')
    argv = ['predict', tmp_path / 'release', '--data', tmp_path / 'photos', '--out', tmp_path / 'out', '--unit', '2']
    status, done, _ = run(capsys, *argv)
    assert status == 0 and done['images'] == 5 and done['parts_written'] == 3
    assert run(capsys, *argv)[1]['parts_written'] == 0
    status, nothing, said = run(capsys, *argv, '--topk', '2')
    assert status == 2 and nothing is None and 'topk was 5 and is 2' in said
