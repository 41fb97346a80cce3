"""What the cascade costs where it saves nothing: exits off, import, first forward, memory of stream."""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import timm
import torch

import timm_cascade  # noqa: F401  registers the cascades
from scripts import ROOT
from scripts.experiments.benchmark.page import cell, unite, verdict
from scripts.experiments.benchmark.plain import bare, pictures
from scripts.experiments.benchmark.timing import in_turns, spread

_logger = logging.getLogger('benchmark')

IMPORT = """
import json, time
began = time.perf_counter()
import timm
middle = time.perf_counter()
import timm_cascade
print(json.dumps([middle - began, time.perf_counter() - middle]))
"""

# in a process of its own: what a first forward sets up stays set up
FIRST = """
import json, sys, time
import timm, torch
import timm_cascade
name, batch, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
model = timm.create_model(name).eval()
if hasattr(model, 'thresholds'):
    model.thresholds = [0.9] * len(model.exits)
images = torch.randn(batch, *model.pretrained_cfg['input_size'])
call = getattr(model, 'predict', model)
times = []
with torch.inference_mode():
    for _ in range(8):
        began = time.perf_counter()
        call(images)
        times.append(time.perf_counter() - began)
print(json.dumps(times))
"""

# peak resident memory over what the process had before, for each way to run the same batches
MEMORY = """
import json, resource, sys
import torch
from scripts.experiments.benchmark.plain import build, forced, observe, pictures
name, batch, way, threads = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
torch.set_num_threads(threads)
side = int(sys.argv[5])
images = pictures(batch, (3, side, side))
model = build(name, images[:16])
model.thresholds = forced(observe(model, list(images.split(16))), 0.4)
count = 8
def inputs():
    for _ in range(count):
        yield images.clone()
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def now():
    with open('/proc/self/statm') as f:
        return int(f.read().split()[1]) * resource.getpagesize()
before = now()
with torch.inference_mode():
    if way == 'plain':
        for x in inputs():
            model.backbone(x)
    elif way == 'predict':
        for x in inputs():
            model.predict(x)
    else:
        for _ in model.stream(inputs(), ordered=False):
            pass
features = sum(p.channels * p.size[0] * p.size[1] for p in model.exits) * 4 * batch
print(json.dumps(dict(peak=peak() - before, buffer=features)))
"""


def alone(code: str, *argv: Any) -> Any:
    """What a program in a process of its own prints, as JSON."""
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code, *map(str, argv)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), *sys.path])},
    )
    return json.loads(done.stdout.splitlines()[-1])


def exits_off(name: str, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Time of a forward of a fresh cascade, thresholds unset, over that of the plain timm model on the same weights."""
    torch.manual_seed(0)
    model = timm.create_model(f'cascade_{name}').eval().to(args.device, memory_format=torch.channels_last)
    images = pictures(batch, tuple(model.pretrained_cfg['input_size'])).to(args.device)
    images = images.contiguous(memory_format=torch.channels_last)
    contestants = {'off': model, 'plain': bare(model), 'control': bare(model)}
    runs = in_turns({k: partial(m, images) for k, m in contestants.items()}, args.seconds, args.repetitions)
    _logger.info('exits off, %s, batch %d: %.4f', name, batch, runs.ratio('off', 'plain')['median'])
    return dict(network=name, batch=batch, off=runs.ratio('off', 'plain'), control=runs.ratio('control', 'plain'))


def first_forward(name: str, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """First forward over the median of later ones, of the cascade and of its backbone, each in a fresh process."""
    row: dict[str, Any] = dict(network=name, batch=batch)
    for kind, made in (('cascade', f'cascade_{name}'), ('plain', name)):
        runs = [alone(FIRST, made, batch, torch.get_num_threads()) for _ in range(args.processes)]
        row[kind] = spread([r[0] / spread(r[2:])['median'] for r in runs])
    _logger.info(
        'first forward, %s, batch %d: %.2f (plain %.2f)', name, batch, row['cascade']['median'], row['plain']['median']
    )
    return row


def memory(name: str, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of stream and of predict over plain's plus the features that may wait."""
    side = timm.get_pretrained_cfg(name).input_size[-1] if args.size is None else args.size
    found = {
        way: [alone(MEMORY, name, batch, way, torch.get_num_threads(), side) for _ in range(args.processes)]
        for way in ('plain', 'predict', 'stream')
    }
    peaks = {way: spread([r['peak'] for r in runs])['median'] for way, runs in found.items()}
    buffer = found['plain'][0]['buffer']
    row = dict(
        network=name,
        batch=batch,
        peaks=peaks,
        buffer=buffer,
        stream=spread([r['peak'] / (peaks['plain'] + buffer) for r in found['stream']]),
        predict=spread([r['peak'] / peaks['plain'] for r in found['predict']]),
    )
    _logger.info('memory, %s, batch %d: stream %.2f of plain and buffer', name, batch, row['stream']['median'])
    return row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--networks', nargs='+', default=['resnet18', 'mobilenetv3_large_100', 'vit_small_patch16_224'])
    parser.add_argument('--batch', type=int, nargs='+', default=[1, 64])
    parser.add_argument('--memory-networks', nargs='*', default=['resnet18', 'mobilenetv3_large_100'])
    parser.add_argument('--processes', type=int, default=3, help='fresh processes for what happens once in each')
    parser.add_argument('--size', type=int, help='side of the pictures in the memory test')


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    imports = [alone(IMPORT) for _ in range(args.processes + 2)][1:]  # the first one fills the disk cache
    yield dict(
        imports=dict(timm=spread([a for a, _ in imports]), ours=spread([b for _, b in imports])),
        off=[],
        first=[],
        memory=[],
    )
    for name in args.networks:
        yield dict(off=[exits_off(name, batch, args) for batch in args.batch], first=[first_forward(name, 1, args)])
    for name in args.memory_networks:
        yield dict(memory=[memory(name, max(args.batch), args)])


merge = partial(unite, **dict.fromkeys(('off', 'first', 'memory'), ('network', 'batch')))


def markdown(section: dict[str, Any]) -> list[str]:
    ours, timms = section['imports']['ours'], section['imports']['timm']
    missed = ' **missed** (<= 150 ms)' if ours['median'] > 0.15 else ''
    text = [
        f'**Import**: `import timm_cascade` after `import timm` adds {1000 * ours["median"]:.0f} ms '
        f"({1000 * ours['low']:.0f} to {1000 * ours['high']:.0f}) to timm's {1000 * timms['median']:.0f} ms"
        f'{missed}.',
        '',
        '**Exits off**: time of a cascade whose thresholds are unset over that of the plain timm model, channels-last. '
        'Target: 1.01. Control: the same of a second copy of the plain model, which is the noise of the machine.',
        '',
        '| network | batch | exits off | control |',
        '| --- | --- | --- | --- |',
    ]
    text += [
        f'| {r["network"]} | {r["batch"]} | {verdict(r["off"], 1.01, digits=3)} | {cell(r["control"], 3)} |'
        for r in section['off']
    ]
    text += [
        '',
        '**First forward** in a fresh process over the median of later ones, eager, batch 1. Target: 1.2. '
        'Beside it what the plain network does: torch itself sets things up.',
        '',
        '| network | cascade | plain |',
        '| --- | --- | --- |',
    ]
    text += [f'| {r["network"]} | {verdict(r["cascade"], 1.2)} | {cell(r["plain"])} |' for r in section['first']]
    text += [
        '',
        '**Peak memory** above what the process had with the model loaded, eight batches, 40 % exiting at '
        "each of three exits: of `stream` over the plain network's plus the stated buffer (one batch of features per "
        "exit), of `predict` over the plain network's. Target: 1.2.",
        '',
        '| network | batch | plain, MB | buffer, MB | stream | predict |',
        '| --- | --- | --- | --- | --- | --- |',
    ]
    text += [
        f'| {r["network"]} | {r["batch"]} | {r["peaks"]["plain"] / 1e6:.0f} | {r["buffer"] / 1e6:.0f} | '
        f'{verdict(r["stream"], 1.2)} | {cell(r["predict"])} |'
        for r in section['memory']
    ]
    return text
