"""The Ray engine on a real local cluster: whatever dies, every row is there once and parts are those of a calm run."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import ROOT, as_png

import timm_cascade

os.environ.setdefault('RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER', '0')  # Ray's own name for: the loopback interface only
ray = pytest.importorskip('ray', reason='pip install "timm-cascade[ray]"')
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings('ignore')]


@pytest.fixture(scope='module')
def cluster():
    """Two nodes of two processors on the loopback interface."""
    from ray.cluster_utils import Cluster

    before = dict(os.environ)
    os.environ.update(
        RAY_USAGE_STATS_ENABLED='0', PYTHONPATH=f'{ROOT}{os.pathsep}{ROOT / "tests"}', OMP_NUM_THREADS='1'
    )
    node = dict(num_cpus=2, object_store_memory=100 << 20, include_dashboard=False)
    found = Cluster(initialize_head=True, head_node_args=dict(node, num_cpus=1))
    found.add_node(**node)
    ray.init(address=found.address, log_to_driver=False)
    yield found
    ray.shutdown()
    found.shutdown()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def cascade(small, images):
    small.thresholds = [0.3, 0.3]
    small.label_names = images.class_names
    return small


@pytest.fixture
def folder(images, tmp_path):
    (tmp_path / 'photos').mkdir()
    for i, picture in enumerate(images.images):
        as_png(picture, tmp_path / 'photos' / f'{i:03d}.png')
    return tmp_path / 'photos'


def contents(out):
    return {p.name: p.read_bytes() for p in sorted(out.glob('part-*.parquet'))}


def workers():
    """Processes of the actors that predict."""
    found = []
    for entry in Path('/proc').glob('[0-9]*/cmdline'):
        try:
            if 'ray::' in (text := entry.read_bytes().decode(errors='replace')) and '_Worker' in text:
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


def disturbed(cascade, folder, out, disturb):
    """Predicts while `disturb` happens a moment after the first part is there."""
    happened = []

    def later():
        while not list(out.glob('part-*.parquet')):
            time.sleep(0.01)
        happened.append(disturb())

    thread = threading.Thread(target=later)
    thread.start()
    summary = timm_cascade.predict(cascade, folder, out, unit=2, batch_size=2, engine='ray')
    thread.join()
    return summary, happened[0]


def test_parts_are_those_of_a_local_run(cluster, cascade, folder, tmp_path):
    timm_cascade.predict(cascade, folder, tmp_path / 'local', unit=10, batch_size=4)
    summary = timm_cascade.predict(cascade, folder, tmp_path / 'ray', unit=10, batch_size=4, engine='ray')
    assert contents(tmp_path / 'local') == contents(tmp_path / 'ray') and summary.parts_written == 10
    again = timm_cascade.predict(cascade, folder, tmp_path / 'ray', unit=10, batch_size=4, engine='ray')
    assert again.parts_written == 0


def test_an_actor_that_is_killed(cluster, cascade, folder, tmp_path):
    timm_cascade.predict(cascade, folder, tmp_path / 'local', unit=2, batch_size=2)

    def kill():
        pids = workers()
        for pid in pids[:1]:
            os.kill(pid, signal.SIGKILL)
        return pids

    summary, pids = disturbed(cascade, folder, tmp_path / 'ray', kill)
    assert pids and summary.images == 96 and contents(tmp_path / 'ray') == contents(tmp_path / 'local')


def test_a_node_that_goes_away(cluster, cascade, folder, tmp_path):
    timm_cascade.predict(cascade, folder, tmp_path / 'local', unit=2, batch_size=2)
    extra = cluster.add_node(num_cpus=2, object_store_memory=100 << 20, include_dashboard=False)
    cluster.wait_for_nodes()
    summary, _ = disturbed(cascade, folder, tmp_path / 'ray', lambda: cluster.remove_node(extra, allow_graceful=False))
    assert summary.images == 96 and contents(tmp_path / 'ray') == contents(tmp_path / 'local')


DRIVER = """
import sys, torch, timm, timm_cascade, ray
ray.init(address=sys.argv[3], log_to_driver=False)
torch.manual_seed(0)
model = timm.create_model('cascade_cifar_resnet20', in_chans=1, num_classes=4, exits=['layer1', 'layer2'],
                          pretrained_cfg_overlay=dict(input_size=(1, 16, 16), mean=(0.5,), std=(0.25,))).eval()
model.thresholds = [0.3, 0.3]
timm_cascade.predict(model, sys.argv[1], sys.argv[2], unit=2, batch_size=2, engine='ray')
"""


def test_a_driver_that_is_killed_and_run_again(cluster, folder, tmp_path):
    def start(out):
        return subprocess.Popen(
            [sys.executable, '-c', DRIVER, str(folder), str(out), cluster.address],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    out = tmp_path / 'out'
    run = start(out)
    while run.poll() is None and len(list(out.glob('part-*.parquet'))) < 3:
        time.sleep(0.01)
    run.kill()
    run.communicate()
    done = len(contents(out))
    again = start(out)
    _, said = again.communicate(timeout=300)
    assert again.returncode == 0, said[-2000:]
    whole = start(tmp_path / 'whole')
    whole.communicate(timeout=300)
    assert 3 <= done <= 48 and contents(out) == contents(tmp_path / 'whole') and len(contents(out)) == 48


def test_a_bad_image_can_end_it(cluster, cascade, folder, tmp_path):
    (folder / '050.png').write_bytes(b'no picture')
    with pytest.raises(timm_cascade.BadImageError, match=r'050\.png'):
        timm_cascade.predict(cascade, folder, tmp_path / 'out', unit=10, engine='ray', on_bad_image='fail')
    recorded = timm_cascade.predict(cascade, folder, tmp_path / 'out', unit=10, engine='ray')
    assert recorded.bad_images == 1


def test_predictor_in_a_pipeline(cluster, cascade, folder, images, tmp_path):
    from timm_cascade.ray import Predictor

    timm_cascade.save(cascade, tmp_path / 'release')
    table = pa.table({'image': [p.read_bytes() for p in sorted(folder.glob('*.png'))], 'id': list(range(96))})
    found = ray.data.from_arrow(table).map_batches(
        Predictor, fn_constructor_args=(str(tmp_path / 'release'),), concurrency=2, batch_size=16
    )
    rows = sorted(found.take_all(), key=lambda r: r['id'])
    timm_cascade.predict(cascade, folder, tmp_path / 'out')
    want = pq.read_table(tmp_path / 'out' / 'part-000000.parquet').to_pylist()
    assert [(r['index'], r['label']) for r in rows] == [(r['index'], r['label']) for r in want]
    assert set(rows[0]) == {'image', 'id', 'index', 'label', 'prob', 'exit'}
    with pytest.raises(Exception, match=r"columns \['id', 'image'\], not 'picture'"):
        ray.data.from_arrow(table).map_batches(
            Predictor, fn_constructor_args=(str(tmp_path / 'release'), None, 'picture'), concurrency=1
        ).take_all()
