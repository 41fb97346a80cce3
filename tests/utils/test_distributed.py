import subprocess
import sys

import pytest
from accelerate import Accelerator

import timm_cascade
from timm_cascade.cli.main import main
from timm_cascade.utils.distributed import LaunchError, create_accelerator


def test_processes_that_believe_to_be_alone(small, images, monkeypatch, tmp_path):
    accelerator = Accelerator(cpu=True)
    monkeypatch.setenv('WORLD_SIZE', '2')  # as torchrun sets it
    with pytest.raises(LaunchError, match='2 processes, but each runs for itself'):
        timm_cascade.train_heads(small, images, epochs=1, work_dir=tmp_path / 'work', accelerator=accelerator)
    assert not list(tmp_path.iterdir())


def test_a_launch_of_several_that_started_one(small, images, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', 'no')
    timm_cascade.train_heads(small, images, epochs=1)  # accelerate launch --num_processes 1
    monkeypatch.setenv('MASTER_ADDR', '127.0.0.1')
    with pytest.raises(LaunchError, match='torchrun'):
        timm_cascade.train_heads(small, images, epochs=1)
    argv = ['train', '--model', 'cascade_cifar_resnet20', '--data', 'anything', '--out', str(tmp_path / 'out')]
    assert main(argv) == 2 and 'started one' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_is_not_there():
    with pytest.raises(ValueError, match="tracker 'nonesuch' is not installed"):
        create_accelerator(log_with=['nonesuch'])


WORK = """
from timm_cascade.utils.distributed import create_accelerator
accelerator = create_accelerator()
print('processes', accelerator.num_processes, accelerator.device)
accelerator.end_training()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    'launcher, answer',
    [
        ('accelerate.commands.accelerate_cli launch --cpu --num_processes 2 --num_machines 1', 'started one'),
        ('accelerate.commands.accelerate_cli launch --cpu --num_processes 1 --num_machines 1', 'processes 1'),
        (
            'accelerate.commands.accelerate_cli launch --multi_gpu --num_processes 2 --num_machines 1 '
            '--main_process_port 0',
            'processes 2',
        ),
        ('torch.distributed.run --standalone --nproc_per_node 2', 'processes 2'),
    ],
)
def test_real_launches(tmp_path, launcher, answer):
    (tmp_path / 'work.py').write_text(WORK)
    done = subprocess.run(
        [sys.executable, '-m', *launcher.split(), str(tmp_path / 'work.py')], capture_output=True, text=True
    )
    assert answer in done.stdout + done.stderr
    assert (done.returncode == 0) == answer.startswith('processes')
