import json
import subprocess
import sys

import numpy as np
import pytest
from test_data import write_idx

from timm_cascade.cli import main


@pytest.fixture
def idx(tmp_path, images):
    folder = tmp_path / 'data'
    folder.mkdir()
    for name in ('train', 't10k'):
        write_idx(folder / f'{name}-images-idx3-ubyte.gz', np.asarray(images.images))
        write_idx(folder / f'{name}-labels-idx1-ubyte.gz', images.labels.astype(np.uint8))
    return str(folder)


def run(capsys, *argv):
    status = main([*map(str, argv), '--json'])
    out = capsys.readouterr()
    return status, (json.loads(out.out) if out.out else None), out.err


def test_the_whole_path(capsys, idx, tmp_path):
    folder = tmp_path / 'release'
    status, result, _ = run(
        capsys, 'train', '--model', 'cascade_cifar_resnet20', '--data', idx, '--split', 'train[:64]', '--val-split',
        'train[64:]', '--out', folder, '--epochs', 2, '--exits', 'layer1,layer2', '--model-kwargs', 'in_chans=1')
    assert status == 0 and result['epoch'] == 2 and len(result['accuracy']) == 3 and result['processes'] == 1

    status, result, err = run(capsys, 'evaluate', folder, '--data', idx, '--split', 'test', '--max-drop', 0.1)
    assert status == 2 and 'timm-cascade calibrate' in err

    status, result, _ = run(capsys, 'calibrate', folder, '--data', idx, '--split', 'train[64:]')
    assert status == 0 and result['n'] == 32 and len(result['accuracy']) == 3

    status, result, _ = run(capsys, 'evaluate', folder, '--data', idx, '--split', 'test', '--max-drop', 0.1,
                            '--rule', 'joint')
    assert status == 0 and result['n'] == 96 and result['point']['rule'] == 'joint'

    status, result, _ = run(capsys, 'info', folder)
    assert [e['module'] for e in result['exits']] == ['layer1', 'layer2'] and result['calibrated_on']['n'] == 32
    assert [e['cut'] for e in result['exits']] == ['hook', 'hook']
    assert main(['info', str(folder)]) == 0
    assert 'module=layer1' in capsys.readouterr().out


@pytest.mark.parametrize('argv, message', [
    (['info', 'no/such/folder'], 'neither a folder'),
    (['calibrate', 'nowhere', '--data', 'x'], 'neither a folder'),
    (['train', '--model', 'cascade_cifar_resnet20', '--data', '/no/where/at/all', '--out', 'x'], 'no IDX folder'),
])
def test_requests_that_cannot_be_met(capsys, argv, message):
    status, _, err = run(capsys, *argv)
    assert status == 2 and message in err


@pytest.mark.parametrize('model, message', [
    ('cascade_nonesuch', 'Unknown model'), ('cascade_resnet50.bogus', 'Invalid pretrained tag'),
    ('cifar_resnet20', 'cascade_cifar_resnet20')])
def test_names_that_are_no_cascade(capsys, idx, tmp_path, model, message):
    argv = ['train', '--model', model, '--data', idx, '--split', 'train', '--out', tmp_path / 'out']
    status, _, err = run(capsys, *argv)
    assert status == 2 and message in err and not (tmp_path / 'out').exists()


def test_it_starts_as_a_module():
    done = subprocess.run([sys.executable, '-m', 'timm_cascade', '--help'], capture_output=True, text=True, check=True)
    assert 'usage: timm-cascade' in done.stdout


@pytest.mark.parametrize('command', ['train', 'calibrate', 'evaluate', 'info', 'push'])
def test_every_command_has_help(capsys, command):
    with pytest.raises(SystemExit) as e:
        main([command, '--help'])
    assert e.value.code == 0 and f'timm-cascade {command}' in capsys.readouterr().out
