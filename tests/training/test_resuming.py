"""Killed at any time, a training continues; and on two processes it is the same."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import timm
import torch
from helpers import near, near_weights, trained, write_idx

import timm_cascade
from timm_cascade.data import ImageData

# in a process of its own, which the compiler's tests have not been in: a process whose autograd has threads cannot fork
KILLED = """
import os, signal, threading, time
from pathlib import Path
import timm, torch, timm_cascade
from timm_cascade.data import ImageData
from timm_cascade.training.features import StoredFeatures
from tqdm.auto import tqdm

class Slow(ImageData):
    def __getitem__(self, index):
        time.sleep(0.004)  # so that there is time to be killed in
        return super().__getitem__(index)

    def with_transform(self, transform):
        return Slow(self.images, self.labels, self.class_names, self.source, self.split, transform)

def records_done():
    try:
        return sum(int((StoredFeatures(p).records['checksum'] != 0).sum()) for p in WORK.glob('features/*.part'))
    except (OSError, ValueError, EOFError):
        return 0

def epoch_of():
    try:
        return len(torch.load(WORK / 'heads.pt', weights_only=True)['history'])
    except FileNotFoundError:
        return 0

def killed_when(condition):
    process = os.fork()
    if not process:
        # tqdm's lock is one semaphore for all forks; a process killed while it holds that would stop all others
        tqdm.set_lock(threading.RLock())
        timm_cascade.train_heads(model, slow, slow, work_dir=WORK, **SETTINGS)
        os._exit(0)
    while not os.waitpid(process, os.WNOHANG)[0]:
        if condition():
            os.kill(process, signal.SIGKILL)
            return os.waitpid(process, 0)[1] == signal.SIGKILL
        time.sleep(0.005)

WORK = Path(WORK)
torch.set_num_threads(THREADS)
given = torch.load('given.pt', weights_only=True)
model = timm.create_model('cascade_cifar_resnet20', depth=1, in_chans=1, num_classes=4, exits=['layer1', 'layer2'],
                          pretrained_cfg_overlay=dict(input_size=(1, 16, 16), mean=(0.5,), std=(0.25,))).eval()
model.load_state_dict(given['model'])
slow = Slow(given['images'].numpy(), given['labels'].numpy(), given['classes'])
assert killed_when(lambda: records_done() >= 64)
assert records_done() >= 64  # those are not computed again
for moment in (3, 25):
    assert killed_when(lambda: epoch_of() >= moment)
    assert moment <= epoch_of() < SETTINGS['epochs']
"""


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks')
def test_killed_again_and_again_it_ends_the_same(interpreter, small, images, tmp_path):
    settings = dict(epochs=40, batch_size=16, classifier=True, views=2)
    history, whole = trained(small, images, images, **settings)
    given = dict(images=torch.from_numpy(images.images), labels=torch.from_numpy(images.labels))
    torch.save(dict(given, model=small.state_dict(), classes=images.class_names), tmp_path / 'given.pt')
    work = tmp_path / 'work'
    given = f'WORK, SETTINGS, THREADS = {str(work)!r}, {settings}, {torch.get_num_threads()}'
    done = interpreter.run(f'{given}\n{KILLED}', tmp_path, ours=True)
    assert done.returncode == 0, done.stderr
    timm_cascade.train_heads(small, images, images, work_dir=work, **settings)
    assert all(torch.equal(v, whole[k]) for k, v in small.state_dict().items())
    lines = [json.loads(line) for line in (work / 'heads.jsonl').read_text().splitlines()]
    for line in (*lines, *history):
        line.pop('seconds')
    assert lines == history


def test_what_is_finished_is_only_loaded(small, images, tmp_path):
    _, first = trained(small, images, epochs=2, work_dir=tmp_path)
    began = (tmp_path / 'heads.pt').stat().st_mtime_ns
    _, again = trained(small, images, epochs=2, work_dir=tmp_path)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert (tmp_path / 'heads.pt').stat().st_mtime_ns >= began


def test_a_state_that_cannot_be_read_is_named(small, images, tmp_path):
    trained(small, images, epochs=1, work_dir=tmp_path)
    state = tmp_path / 'heads.pt'
    state.write_bytes(state.read_bytes()[:1000])
    before = {k: v.clone() for k, v in small.state_dict().items()}
    with pytest.raises(ValueError, match=r'heads\.pt cannot be read'):
        timm_cascade.train_heads(small, images, epochs=1, work_dir=tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())


def test_a_log_that_is_a_line_short_is_completed(small, images, tmp_path):
    history, _ = trained(small, images, epochs=2, work_dir=tmp_path)
    log = tmp_path / 'heads.jsonl'
    log.write_text(log.read_text().splitlines()[0] + '\n')  # killed between the two files
    trained(small, images, epochs=2, work_dir=tmp_path)
    assert [json.loads(line) for line in log.read_text().splitlines()] == history


def test_the_state_of_another_training_is_not_continued(small, images, tmp_path, caplog):
    trained(small, images, epochs=2, work_dir=tmp_path)
    _, expected = trained(small, images, epochs=2, lr=1e-3)
    _, found = trained(small, images, epochs=2, lr=1e-3, work_dir=tmp_path)
    assert 'other settings' in caplog.text
    assert all(torch.equal(found[k], expected[k]) for k in found)


# what torchrun sets, and does when a process ends in another way than it should
LAUNCH = """
    import os, signal, sys
    processes = []
    for rank in '01':
        processes.append(os.fork())
        if not processes[-1]:
            os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE='2', LOCAL_WORLD_SIZE='2',
                              MASTER_ADDR='127.0.0.1', MASTER_PORT=PORT)
            signal.alarm(300)
            break
    else:
        status = os.wait()[1]
        if status:
            for process in processes:
                try:
                    os.kill(process, signal.SIGKILL)
                except ProcessLookupError:
                    pass
        status = max(status, os.wait()[1])
        sys.exit('SIGKILL' if status == signal.SIGKILL else status)
"""
TWO = """
    import os, signal, sys
    from pathlib import Path
    import numpy as np, timm, torch, timm_cascade
    from timm_cascade.data import ImageData
    from timm_cascade.training.work_dir import WorkDir
    from timm_cascade.utils.distributed import create_accelerator
    folder, resumes = Path(sys.argv[1]), sys.argv[2] == 'resume'
    torch.set_num_threads(1)
    accelerator = create_accelerator()
    assert accelerator.num_processes == 2, accelerator.num_processes
    rng = np.random.default_rng(0)
    data = ImageData(rng.integers(0, 255, (45, 16, 16), dtype=np.uint8), np.arange(45) % 4, list('abcd'))

    def train(name, **kwargs):
        torch.manual_seed(0)
        model = timm.create_model('cascade_cifar_resnet20', depth=1, in_chans=1, num_classes=4,
                                  exits=['layer1', 'layer2'],
                                  pretrained_cfg_overlay=dict(input_size=(1, 16, 16), mean=(0.5,), std=(0.25,)))
        timm_cascade.train_heads(model, data, data, epochs=3, batch_size=16, accelerator=accelerator, classifier=True,
                                 work_dir=folder / name, **kwargs)
        calibration = timm_cascade.calibrate(model, data, batch_size=16, accelerator=accelerator)
        if accelerator.is_main_process:
            state = {**model.state_dict(), 'confidence': torch.tensor(calibration.confidence)}
            torch.save(state, folder / f'{name}.pt')

    if not resumes:
        train('whole')
        save = WorkDir.save
        def dies(self, history, **parts):
            save(self, history, **parts)
            if len(history) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        WorkDir.save = dies
    train('killed')
"""


@pytest.fixture(params=['forks', pytest.param('torchrun', marks=pytest.mark.slow)])
def two_processes(request, interpreter, tmp_path):
    """Runs TWO with an argument in two processes; what they wrote to stderr comes back, their status too."""

    def run(argument):
        if request.param == 'torchrun':
            script = tmp_path / 'work.py'
            script.write_text(textwrap.dedent(TWO))
            torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
            return subprocess.run([*torchrun, script, tmp_path, argument], capture_output=True, text=True)
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = str(free.getsockname()[1])
        given = f'import sys; sys.argv = ["work.py", {str(tmp_path)!r}, {argument!r}]; PORT = {port!r}\n'
        return interpreter.run(given + textwrap.dedent(LAUNCH) + textwrap.dedent(TWO), tmp_path, ours=True)

    return run


def test_two_processes_killed_and_continued_are_as_one(two_processes, tmp_path):
    """gloo, data that two do not divide: as one process up to rounding, as without the kill to the bit."""
    first = two_processes('start')
    assert 'SIGKILL' in first.stderr and (tmp_path / 'whole.pt').exists() and not (tmp_path / 'killed.pt').exists()
    assert len(torch.load(tmp_path / 'killed' / 'heads.pt', weights_only=True)['history']) == 2
    again = two_processes('resume')
    assert again.returncode == 0, again.stderr
    whole, killed = (torch.load(tmp_path / f'{n}.pt', weights_only=True) for n in ('whole', 'killed'))
    assert all(torch.equal(whole[k], killed[k]) for k in whole)

    rng = np.random.default_rng(0)
    data = ImageData(rng.integers(0, 255, (45, 16, 16), dtype=np.uint8), np.arange(45) % 4, list('abcd'))
    torch.manual_seed(0)
    small = timm.create_model(
        'cascade_cifar_resnet20',
        depth=1,
        in_chans=1,
        num_classes=4,
        exits=['layer1', 'layer2'],
        pretrained_cfg_overlay=dict(input_size=(1, 16, 16), mean=(0.5,), std=(0.25,)),
    )
    start = {k: v.clone() for k, v in small.state_dict().items()}
    timm_cascade.train_heads(small, data, data, epochs=3, batch_size=16, classifier=True)
    calibration = timm_cascade.calibrate(small, data, batch_size=16)
    assert near(whole.pop('confidence'), calibration.confidence, 0.05)
    assert near_weights(whole, small.state_dict(), start)


@pytest.fixture(scope='module')
def command(tmp_path_factory):
    """The command line that trains into a folder, which one of them has done undisturbed."""
    folder = tmp_path_factory.mktemp('command')
    generator = np.random.default_rng(0)
    write_idx(folder / 'train-images-idx3-ubyte.gz', generator.integers(0, 255, (3000, 16, 16), dtype=np.uint8))
    write_idx(folder / 'train-labels-idx1-ubyte.gz', generator.integers(0, 4, 3000, dtype=np.uint8))

    def arguments(out):
        return [
            sys.executable,
            '-m',
            'timm_cascade',
            'train',
            '--model',
            'cascade_cifar_resnet20',
            '--data',
            str(folder),
            '--out',
            str(out),
            '--epochs',
            '100',
            '--model-kwargs',
            'in_chans=1',
            '--views',
            '2',
            '--json',
        ]

    subprocess.run(arguments(folder / 'whole'), check=True, capture_output=True)
    return arguments, folder / 'whole'


@pytest.mark.slow
@pytest.mark.parametrize('sign', ['features/*.part', 'features/*.npy', 'heads.pt', 'model.safetensors'])
def test_the_command_is_killed_and_given_again(command, tmp_path, sign):
    """In the first pass, the second, the epochs, while saving: afterwards the release has the bytes of the other."""
    arguments, whole = command
    process = subprocess.Popen(arguments(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob(sign)):
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = subprocess.run(arguments(tmp_path), check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)['epoch'] == 100
    for name in ('model.safetensors', 'config.json'):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith('.')) == [
        'README.md',
        'config.json',
        'features',
        'heads.jsonl',
        'model.safetensors',
        'path.json',
    ]
