"""How fast and how large predictions are: python scripts/experiments/prediction [speed|memory|ray|kills|serve|hostile]

The release in the repository labels the repository's test images of Fashion-MNIST, repeated. `speed` compares rows per
second with `model.stream` over a loader that decodes the same rows, `memory` the peak at ten times as many rows, `ray`
the cost per row of an engine on this machine's cores with that of local shards, `kills` the parts of a run that is
killed again and again with those of a calm one. `serve` and `hostile` are about the server (serve.py).
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader

import timm_cascade
from scripts import ROOT
from scripts.experiments.prediction import serve
from timm_cascade.data import eval_transform
from timm_cascade.prediction.inputs import open_sources
from timm_cascade.prediction.local import DecodedChunks

RELEASE = ROOT / 'hub' / 'releases' / 'cascade_cifar_resnet20.fashion_mnist'
SAMPLES = ROOT / 'hub' / 'samples' / 'fashion_mnist_test.parquet'
BATCH = 256
UNIT = 1024  # rows of a part, where engines are compared


def repeated(folder: Path, rows: int) -> Path:
    """A parquet file with the samples' images, repeated to `rows` rows."""
    table = pq.read_table(SAMPLES)
    path = folder / f'{rows}.parquet'
    with pq.ParquetWriter(path, table.schema) as writer:
        for start in range(0, rows, len(table)):
            writer.write_table(table.slice(0, min(len(table), rows - start)))
    return path


def model_at_work() -> timm_cascade.CascadeModel:
    model = timm_cascade.load(RELEASE).eval()
    model.set_max_drop(0.005)
    return model


def streamed(model: timm_cascade.CascadeModel, path: Path, workers: int) -> float:
    """Rows per second of `stream` over a loader that decodes the file's rows."""
    (source,) = open_sources(path)
    ranges = [(source, s, min(s + BATCH, len(source))) for s in range(0, len(source), BATCH)]
    loader = DataLoader(DecodedChunks(ranges, eval_transform(model)), batch_size=None, num_workers=workers)
    began = time.perf_counter()
    for _ in model.stream((chunk.images for chunk in loader), batch_size=BATCH):
        pass
    return len(source) / (time.perf_counter() - began)


def speed(args: argparse.Namespace) -> dict:
    """Rows per second beside `stream`, in turns, within one process."""
    model = model_at_work()
    results: dict[str, list[float]] = {'predict': [], 'stream': []}
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        path = repeated(Path(temporary), args.rows)
        for turn in range(-1, args.repeats):  # the first round warms up
            names = list(results) if turn % 2 else list(results)[::-1]
            for name in names:
                if name == 'stream':
                    found = streamed(model, path, args.workers)
                else:
                    out = Path(temporary) / f'out{turn}'
                    found = timm_cascade.predict(
                        model, path, out, batch_size=BATCH, workers=args.workers
                    ).images_per_second
                if turn >= 0:
                    results[name].append(found)
    ratios = [p / s for p, s in zip(results['predict'], results['stream'], strict=True)]
    return dict(
        rows=args.rows,
        workers=args.workers,
        repeats=args.repeats,
        threads=torch.get_num_threads(),
        predict_rows_per_second=round(statistics.median(results['predict'])),
        stream_rows_per_second=round(statistics.median(results['stream'])),
        predict_over_stream=round(statistics.median(ratios), 3),
        lowest=round(min(ratios), 3),
        highest=round(max(ratios), 3),
    )


def peak(args: argparse.Namespace) -> dict:
    """Peak memory of this process over one prediction of --rows rows."""
    with tempfile.TemporaryDirectory() as temporary:
        timm_cascade.predict(
            model_at_work(), repeated(Path(temporary), args.rows), Path(temporary) / 'out', batch_size=BATCH
        )
    return dict(rows=args.rows, peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)


def memory(args: argparse.Namespace) -> dict:
    """Peak memory at --rows and at ten times as many rows, each in a process of its own."""
    found = []
    for rows in (args.rows, 10 * args.rows):
        command = [sys.executable, str(Path(__file__).parent), 'peak', '--rows', str(rows)]
        found.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    return dict(measured=found, ratio=round(found[1]['peak_mib'] / found[0]['peak_mib'], 3))


def pace(out: Path) -> float:
    """Seconds per row while the second half of the parts was written, when every worker has long begun."""
    times = sorted(p.stat().st_mtime for p in out.glob('part-*.parquet'))
    half = len(times) // 2
    return (times[-1] - times[half]) / ((len(times) - 1 - half) * UNIT)


def ray(args: argparse.Namespace) -> dict:
    """Seconds per row of `engine="ray"` once its actors work, beside as many local shards in processes of their own."""

    os.environ.setdefault('RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER', '0')  # Ray's own name for: the loopback interface only
    import ray as cluster

    actors = os.cpu_count() or 1
    rows = args.rows // (UNIT * actors) * UNIT * actors  # whole units, as many for each worker
    seconds, each = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        path = repeated(Path(temporary), rows)
        began = time.perf_counter()
        cluster.init(num_cpus=actors, include_dashboard=False, log_to_driver=False)
        model, out = model_at_work(), Path(temporary) / 'ray'
        started = time.perf_counter() - began
        timm_cascade.predict(model, path, out, batch_size=BATCH, unit=UNIT, engine='ray')
        seconds['ray'], each['ray'] = time.perf_counter() - began, pace(out)
        cluster.shutdown()
        out, began = Path(temporary) / 'local', time.perf_counter()
        command = [sys.executable, str(Path(__file__).parent), 'shard', '--path', str(path), '--out', str(out)]
        shards = [subprocess.Popen([*command, '--shard', f'{i + 1}/{actors}']) for i in range(actors)]
        for process in shards:
            assert process.wait() == 0
        seconds['local'], each['local'] = time.perf_counter() - began, pace(out)
    return dict(
        rows=rows,
        actors=actors,
        ray_start_seconds=round(started, 1),
        seconds={name: round(s, 1) for name, s in seconds.items()},
        microseconds_per_row={name: round(1e6 * s) for name, s in each.items()},
        ray_over_local=round(each['ray'] / each['local'], 3),
    )


def shard(args: argparse.Namespace) -> dict:
    torch.set_num_threads(1)
    done = timm_cascade.predict(model_at_work(), args.path, args.out, batch_size=BATCH, unit=UNIT, shard=args.shard)
    return dict(parts=done.parts_written)


MEASURES = dict(speed=speed, memory=memory, ray=ray, kills=serve.kills, serve=serve.serve, hostile=serve.hostile)


def main() -> None:
    """Runs one of the measurements and prints its result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=[*MEASURES, 'peak', 'shard'])
    parser.add_argument('--rows', type=int, default=20_000)
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--workers', type=int, default=1)
    parser.add_argument('--seconds', type=float, default=10.0, help='of a round of `serve`')
    parser.add_argument('--path', help='of `shard`, which `ray` starts')
    parser.add_argument('--out', help='of `shard`')
    parser.add_argument('--shard', help='of `shard`')
    args = parser.parse_args()
    measures = {**MEASURES, 'peak': peak, 'shard': shard}
    print(json.dumps(measures[args.what](args)))
