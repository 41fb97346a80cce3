from __future__ import annotations

import atexit
import copy
import os
import shutil
import socket
import tempfile

os.environ.setdefault('OMP_NUM_THREADS', '1')  # tiny networks: more threads only wait for each other
os.environ.setdefault('HF_HUB_OFFLINE', '1')  # the default tests need no network, and must not wait for one

# they do not depend on what is in the user's own cache, nor on whether it can be written to
os.environ['HF_HOME'] = tempfile.mkdtemp(prefix='timm-cascade-tests-')

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from interpreter import Interpreter

if TYPE_CHECKING:  # torch and ours only where a test asks for them: the process that hands out tests needs neither
    import timm_cascade
    from timm_cascade.data import ImageData

atexit.register(shutil.rmtree, os.environ['HF_HOME'], ignore_errors=True)
sys.path.insert(0, str(Path(__file__).parent.parent))  # for scripts.*
FAMILIES = ['test_resnet', 'test_vit', 'test_convnext', 'mobilenetv3_small_050']


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each worker gets a contiguous half: what a directory's tests share is made once, and the balance is as good."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getvalue('dist') == 'load' else None


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope='session', params=FAMILIES)
def family(request: pytest.FixtureRequest) -> timm_cascade.CascadeModel:
    """A small cascade of each family, 7 classes, 64 pixels, three exits; whoever sets thresholds puts them back."""
    import timm
    import torch

    import timm_cascade  # noqa: F401  registers the models

    torch.manual_seed(0)
    size = dict(img_size=64) if 'vit' in request.param else dict(pretrained_cfg_overlay=dict(input_size=(3, 64, 64)))
    return timm.create_model(f'cascade_{request.param}', num_classes=7, exits=[0.25, 0.5, 0.75], **size).eval()


@pytest.fixture(scope='session')
def _small() -> timm_cascade.CascadeModel:
    import timm
    import torch

    import timm_cascade  # noqa: F401  registers the models

    torch.manual_seed(0)
    return timm.create_model(
        'cascade_cifar_resnet20',
        depth=1,
        in_chans=1,
        num_classes=4,
        exits=['layer1', 'layer2'],
        pretrained_cfg_overlay=dict(input_size=(1, 16, 16), mean=(0.5,), std=(0.25,)),
    ).eval()


@pytest.fixture
def small(_small: timm_cascade.CascadeModel) -> timm_cascade.CascadeModel:
    """cascade_cifar_resnet20 of one block a group, with two exits, for grey 16x16 images."""
    return copy.deepcopy(_small)


@pytest.fixture(scope='session')
def _released(
    _small: timm_cascade.CascadeModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[timm_cascade.CascadeModel, Path]:
    from helpers import quarters

    import timm_cascade

    model, images = copy.deepcopy(_small), quarters()
    timm_cascade.train_heads(model, images, epochs=4, batch_size=32, lr=1e-2)
    timm_cascade.calibrate(model, images)
    model.set_max_drop(0.1, rule='joint')
    model.label_names = images.class_names
    return model, timm_cascade.save(model, tmp_path_factory.mktemp('released') / 'release')


@pytest.fixture
def released(
    _released: tuple[timm_cascade.CascadeModel, Path], tmp_path: Path
) -> tuple[timm_cascade.CascadeModel, Path]:
    """A calibrated model, and its full release with table and calibration."""
    model, folder = _released
    return copy.deepcopy(model), Path(shutil.copytree(folder, tmp_path / 'release'))


@pytest.fixture(scope='session')
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interpreter]:
    """Fresh processes, cheaply; their Hub is at one address, and has its cache behind one link (see tests/hub)."""
    folder = tmp_path_factory.mktemp('interpreter')
    (folder / 'cache').mkdir()
    (folder / 'home').symlink_to(folder / 'cache')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith('HF_')} | dict(
        HF_ENDPOINT=f'http://127.0.0.1:{port}',
        HF_HOME=str(folder / 'home'),
        HF_HUB_DISABLE_XET='1',
        HF_HUB_ETAG_TIMEOUT='30',
        HF_HUB_DOWNLOAD_TIMEOUT='30',
        HF_HUB_DISABLE_TELEMETRY='1',
        OMP_NUM_THREADS='1',
        PYTHONPATH=os.pathsep.join(p for p in sys.path if p),
    )
    started = Interpreter(folder, environment)
    yield started
    started.close()


@pytest.fixture
def images() -> ImageData:
    """See `quarters`; each test has its own."""
    from helpers import quarters

    return quarters()
