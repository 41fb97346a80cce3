"""Exported cascades in onnxruntime, beside the plain network as ONNX, the ideal from stage times, and earlyon's export.

--prepare measures nothing but the export, of all networks with five exits; what is measured otherwise has
three. Files are kept in `--folder`: give another one for other code. All sessions have one thread, since the pools of
several sessions would disturb each other; times are CPU time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

import timm_cascade
from scripts.datasets import fashion_mnist
from scripts.experiments.benchmark.page import cell, unite, verdict
from scripts.experiments.benchmark.peer import RELEASE, first, wrap
from scripts.experiments.benchmark.plain import NETWORKS, bare, build, forced, pictures
from scripts.experiments.benchmark.timing import ideal_seconds, in_turns, occurring
from scripts.releases.backbones import decode
from timm_cascade.backbone import input_size_of
from timm_cascade.exporters.recalibrate import every_stage, stage_sessions
from timm_cascade.exporters.stage_files import quiet
from timm_cascade.exporters.stage_module import FoldedHead
from timm_cascade.thresholds import route

_logger = logging.getLogger('benchmark')
SHARES = (0.0, 0.2, 0.4, 0.6)
IDEAL = {1: 1.10, 64: 1.05}
CLOSED, FASTER, PEER, SECONDS, BYTES = 1.03, 3.0, 1.5, 60.0, 1.02
MAX_DROP = 0.005
IMAGES = {1: 16}  # of other batch sizes, one batch


def runner(folder: Path) -> Any:
    """The exported folder's own runner on one thread."""
    spec = importlib.util.spec_from_file_location('exported_runner', folder / 'runner.py')
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules['exported_runner'] = module
    spec.loader.exec_module(module)
    return module.Cascade(folder, threads=1)


def session(path: Path) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])


def write_plain(backbone: nn.Module, path: Path) -> None:
    """The network without exits, by the exporter and with the options that its stages are written with."""
    images = torch.zeros(2, *input_size_of(backbone))
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            backbone,
            (images,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim('batch', min=1)},),
            input_names=['images'],
            output_names=['logits'],
            opset_version=18,
            verbose=False,
            external_data=False,
        )
    assert program is not None
    program.save(str(path), external_data=False)


def prepare(name: str, folder: Path, exits: int = 3, again: bool = False) -> dict[str, Any]:
    """Writes a network's files unless they are there, or again; returns what the export took."""
    target = folder / f'{name}_{exits}'
    kept = target / 'took.json'
    if again:
        shutil.rmtree(target, ignore_errors=True)
    if kept.exists():
        return dict(json.loads(kept.read_text(encoding='utf-8')))
    if name == 'release':
        model = timm.create_model(f'local-dir:{RELEASE}', pretrained=True).eval()
        model.set_max_drop(MAX_DROP)
    else:
        size = timm.get_pretrained_cfg(name).input_size
        model = build(name, pictures(16, size), exits=exits)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # not calibrated
        began = time.process_time()
        timm_cascade.export(model, target, single_file='batch' if name == 'release' else None)
        seconds = time.process_time() - began
        write_plain(bare(model).eval(), target / 'plain.onnx')
        if name == 'release':
            from earlyon.onnx import export_to_onnx

            size = input_size_of(model.backbone)
            peer: Any = wrap(model, size)
            for i, (head, point) in enumerate(zip(model.heads, model.exits, strict=True)):
                # the exporter that it uses cannot pool maps to grids that do not divide them: it gets our folded heads
                peer.exit_heads[f'e{i}'] = FoldedHead(head, [1, *point.shape]).eval()
            export_to_onnx(peer, target / 'earlyon.onnx', (1, *size))
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    stages = sum(p.stat().st_size for p in target.glob('stage_*.onnx'))
    took = dict(network=name, exits=len(model.exits), seconds=seconds, weights=weights, bytes=stages)
    kept.write_text(json.dumps(took), encoding='utf-8')
    return took


def stage_times(sessions: list[Any], images: np.ndarray, last: int) -> np.ndarray:
    """Seconds of stages 0..last for images that all go on, each with its head; no sample is compared or gathered."""
    values, stamps = {'images': images}, [time.process_time()]
    for one in sessions[: last + 1]:
        found = one.run(None, {value.name: values[value.name] for value in one.get_inputs()})
        values |= zip((value.name for value in one.get_outputs()), found, strict=True)
        stamps.append(time.process_time())
    return np.diff(stamps)


def confidences(cascade: Any, images: np.ndarray) -> np.ndarray:
    """(n, M) of all images at all exits, in one pass."""
    return np.stack([found for _, _, found in every_stage(cascade, stage_sessions(cascade), images)][:-1], 1)


def routed(cascade: Any, thresholds: list[float | None], batches: list[np.ndarray]) -> np.ndarray:
    """The exits that answered."""
    cascade.set_thresholds(thresholds)
    return np.concatenate([cascade.predict(b).exit for b in batches])


def run_all(one: Any, batches: list[np.ndarray]) -> None:
    for batch in batches:
        one.run(['logits'], {one.get_inputs()[0].name: batch})


def mean_stages(sessions: list[Any], images: np.ndarray, last: int, times: int) -> np.ndarray:
    return np.mean([stage_times(sessions, images, last) for _ in range(times)], axis=0)


def network_rows(name: str, folder: Path, batch: int, seconds: float, least: int) -> list[dict[str, Any]]:
    """Rows of a network with forced shares, at one batch size."""
    folder = folder / f'{name}_3'
    cascade, closed, plain = runner(folder), runner(folder), session(folder / 'plain.onnx')
    n = IMAGES.get(batch, batch)
    images = pictures(n, tuple(cascade.manifest['preprocessing']['input_size'])).numpy()
    batches, count = np.split(images, n // batch), len(cascade.stages)
    found = confidences(cascade, images)
    cascade.set_thresholds([2.0] * (count - 1))  # all exits open, as they stay
    sessions = [cascade.session([stage]) for stage in cascade.stages]
    contestants: dict[str, Callable[[], Any]] = dict(
        plain=partial(run_all, plain, batches), closed=partial(routed, closed, [None] * (count - 1), batches)
    )
    came = {}
    for share in SHARES:
        thresholds = forced(found, share)
        exits = route(np.column_stack([found, np.ones(n)]), np.array(thresholds)).reshape(-1, batch)
        came[share] = [[int((e >= k).sum()) for k in range(count)] for e in exits]
        contestants[f'{share}'] = partial(routed, cascade, thresholds, batches)
    for last, size in occurring([sizes for share in SHARES for sizes in came[share]]):
        contestants[f'stages {size}'] = partial(mean_stages, sessions, images[:size], last, len(batches))
    runs = in_turns(contestants, seconds, least, warm=int(batch < 64), now=time.process_time)
    stages = {int(k[7:]): np.stack(v) for k, v in runs.returned.items() if k.startswith('stages ')}
    rows = [
        dict(
            network=name,
            batch=batch,
            share=share,
            came=np.sum(sizes, axis=0).tolist(),
            to_ideal=runs.ratio(f'{share}', ideal_seconds(sizes, stages)),
            to_plain=runs.ratio(f'{share}', 'plain'),
            closed=runs.ratio('closed', 'plain'),
            plain_ms=1000 * float(np.median(runs.seconds['plain'])) / n,
        )
        for share, sizes in came.items()
    ]
    for share, sizes in came.items():
        exits = runs.returned[f'{share}'][0]
        if [int((exits >= k).sum()) for k in range(count)] != np.sum(sizes, axis=0).tolist():
            raise RuntimeError(f'{name}, {share:.0%}: other samples exited than were to.')
    return rows


def peer_routed(one: Any, thresholds: np.ndarray, batches: list[np.ndarray]) -> np.ndarray:
    """earlyon's rule on its graph: every exit is computed, then the first confident one answers."""
    answers = []
    for batch in batches:
        every = np.stack(one.run(None, {one.get_inputs()[0].name: batch}))
        powers = np.exp(every - every.max(-1, keepdims=True))
        found = (powers / powers.sum(-1, keepdims=True)).max(-1)
        passes = found >= np.append(thresholds, -np.inf)[:, None]
        answers.append(passes.argmax(0))
    return np.concatenate(answers)


def release_row(folder: Path, batch: int, n: int, seconds: float, least: int) -> dict[str, Any]:
    """The release at max_drop 0.5 % on test images, decoded before."""
    folder = folder / 'release_3'
    cascade, closed = runner(folder), runner(folder)
    plain, peer = session(folder / 'plain.onnx'), session(folder / 'earlyon.onnx')
    single = session(folder / ('cascade.onnx' if batch == 1 else 'cascade_batch.onnx'))
    point = cascade.set_max_drop(MAX_DROP)
    model = timm.create_model(f'local-dir:{RELEASE}', pretrained=True).eval()
    data = first(fashion_mnist.load_test(), n)
    images = decode(model, data)[0].numpy()
    batches, thresholds = np.split(images, n // batch), cascade.thresholds.copy()
    runs = in_turns(
        {
            'plain': partial(run_all, plain, batches),
            'closed': partial(routed, closed, [None] * len(thresholds), batches),
            'cascade': partial(routed, cascade, thresholds.tolist(), batches),
            'single': lambda: np.concatenate(
                [single.run(['logits', 'exit'], {'images': b, 'thresholds': thresholds})[1] for b in batches]
            ),
            'earlyon': partial(peer_routed, peer, thresholds, batches),
        },
        seconds,
        least,
        now=time.process_time,
    )
    exits = runs.returned['cascade'][0]
    began = time.process_time()
    some = [data[i][0] for i in range(100)]
    for image in some:
        cascade.preprocess(image)
    return dict(
        batch=batch,
        images=n,
        max_drop=point['max_drop'],
        shares=(np.bincount(exits, minlength=len(cascade.stages)) / n).tolist(),
        same_in_one_file=float((exits == runs.returned['single'][0]).mean()),
        same_as_earlyon=float((exits == runs.returned['earlyon'][0]).mean()),
        faster=runs.ratio('plain', 'cascade'),
        single=runs.ratio('plain', 'single'),
        peer=runs.ratio('earlyon', 'cascade'),
        closed=runs.ratio('closed', 'plain'),
        plain_ms=1000 * float(np.median(runs.seconds['plain'])) / n,
        preprocess_ms=1000 * (time.process_time() - began) / len(some),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--networks', nargs='*', default=list(NETWORKS))
    parser.add_argument('--batch', type=int, nargs='+', default=[1, 64])
    parser.add_argument('--release', action='store_true', help='the Fashion-MNIST release too; needs earlyon')
    parser.add_argument('--prepare', action='store_true', help='only export, and say what that took')
    parser.add_argument('--exits', type=int, default=5, help='for --prepare')
    parser.add_argument('--images', type=int, default=1024, help='of the release')
    parser.add_argument('--folder', type=Path, default=Path(tempfile.gettempdir()) / 'timm_cascade_export_benchmark')


def run(args: argparse.Namespace) -> dict[str, Any]:
    args.folder.mkdir(parents=True, exist_ok=True)
    names = [*args.networks, *(['release'] if args.release else [])]
    if args.prepare:
        return dict(rows=[], release=[], sizes=[prepare(name, args.folder, args.exits, again=True) for name in names])
    sizes = [prepare(name, args.folder) for name in names]
    rows, release = [], []
    for batch in args.batch:
        for name in args.networks:
            rows += network_rows(name, args.folder, batch, args.seconds, args.repetitions)
            _logger.info('%s, batch %d: %s', name, batch, [round(r['to_ideal']['median'], 3) for r in rows[-4:]])
        if args.release:
            n = args.images if batch > 1 else args.images // 4
            release.append(release_row(args.folder, batch, n, args.seconds, args.repetitions))
    return dict(rows=rows, release=release, sizes=sizes)


merge = partial(unite, rows=('network', 'batch', 'share'), release=('batch',), sizes=('network', 'exits'))


def markdown(section: dict[str, Any]) -> list[str]:
    times = [r['to_ideal']['n'] for r in section['rows']]
    text = [
        'Exported stages in onnxruntime, run by the exported `runner.py`; one thread, CPU time; random weights. A '
        f'repetition is {IMAGES[1]} pictures one by one at batch 1, and one batch at batch 64'
        + (f'; medians of {min(times)} to {max(times)} repetitions.' if times else '.'),
        '',
    ]
    text += [
        '| network | batch | exit at each | time over the ideal | over plain ONNX | exits closed, over plain |',
        '| --- | --- | --- | --- | --- | --- |',
    ]
    for r in section['rows']:
        text.append(
            f'| {r["network"]} | {r["batch"]} | {r["share"]:.0%} | {verdict(r["to_ideal"], IDEAL.get(r["batch"]))} | '
            f'{cell(r["to_plain"])} | {verdict(r["closed"], CLOSED) if not r["share"] else ""} |'
        )
    if section['release']:
        text += ['', 'The Fashion-MNIST release at max_drop 0.5 %, test images that were decoded before:', '']
        text += [
            "| batch | exit 0, 1, ... | throughput over plain ONNX | one file, over plain | over earlyon's export "
            '| exits closed, time over plain | plain, ms per image | preprocessing, ms per image |',
            '| --- | --- | --- | --- | --- | --- | --- | --- |',
        ]
    for r in section['release']:
        text.append(
            f'| {r["batch"]} | {", ".join(f"{s:.0%}" for s in r["shares"])} | '
            f'{verdict(r["faster"], FASTER, at_least=True)} | {cell(r["single"])} | '
            f'{verdict(r["peer"], PEER, at_least=True)} | {verdict(r["closed"], CLOSED)} | {r["plain_ms"]:.3f} | '
            f'{r["preprocess_ms"]:.3f} |'
        )
    if section['release']:
        same = min(min(r['same_in_one_file'], r['same_as_earlyon']) for r in section['release'])
        text += ['', f'At least {same:.1%} of the images exit at the same exit in all three; the others are rounding.']
    if section['sizes']:
        text += [
            '',
            '| network | exits | export, CPU s | stage files, MB | over the weights |',
            '| --- | --- | --- | --- | --- |',
        ]
    for r in section['sizes']:
        late = f' **missed** (<= {SECONDS:.0f})' if r['seconds'] > SECONDS else ''
        large = f' **missed** (<= {BYTES})' if r['bytes'] > BYTES * r['weights'] else ''
        text.append(
            f'| {r["network"]} | {r["exits"]} | {r["seconds"]:.1f}{late} | {r["bytes"] / 1e6:.1f} | '
            f'{r["bytes"] / r["weights"]:.3f}{large} |'
        )
    return text
