"""Everything that an accelerator is needed for, in one command: python scripts/experiments/benchmark gpu [--help]

Cascades with random weights, and the committed release on random pictures, beside the plain networks: eager, compiled
with CUDA graphs, in float32 and bfloat16; `stream` beside `predict`; memory; times to compile. Needs torch and timm, no
data and no network. The most important cells come first; each is written to docs/results/gpu.json and
docs/pages/evidence/gpu.md as soon as it is done, and what the time did not suffice for is named there.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from scripts import ROOT, evidence
from scripts.experiments.benchmark import gpu_page
from scripts.experiments.benchmark.gpu_cells import Subject, compare, prepare, regroup
from scripts.experiments.benchmark.timing import machine
from timm_cascade.utils.files import write_text

_logger = logging.getLogger('benchmark')
FIRST = ('resnet50', 'release')
OTHERS = ('mobilenetv3_large_100', 'vit_small_patch16_224', 'convnext_tiny', 'efficientnet_b0')
DTYPES = ('float32', 'bfloat16')
PREPARING = 0.4  # of the time, at most


class OutOfTime(BaseException):
    """The time is up. Not an Exception: what is running would take it for an error of its own."""


class Cell(NamedTuple):
    """What is measured in one go, and written when it is done."""

    kind: str  # compare or regroup
    network: str
    dtype: str
    batch: int
    modes: list[str]

    @property
    def name(self) -> str:
        return f'{self.kind}, {self.network}, {self.dtype}, batch {self.batch}, {" ".join(self.modes)}'


def plan(args: argparse.Namespace) -> list[Cell]:
    """All cells, the most important ones first."""
    dtypes, batches = args.dtypes, args.batch
    first = [n for n in args.networks if n in FIRST] or args.networks[:1]
    others = [n for n in args.networks if n not in first]
    low, high = min(batches), max(batches)
    middle = [b for b in batches if b not in (low, high)]
    cells = [
        Cell('compare', n, d, b, ['graphs'])
        for b in dict.fromkeys([*middle[:1], low, high])
        for n in first
        for d in dtypes
    ]
    cells += [Cell('regroup', n, d, high, ['graphs']) for n in first for d in dtypes[::-1]]
    cells += [Cell('compare', n, d, b, ['graphs']) for b in (*middle[:1], low) for n in others for d in dtypes[::-1]]
    cells += [
        Cell('compare', n, d, (middle or [high])[0], ['compiled', 'graphs', 'static']) for d in dtypes for n in first
    ]
    cells += [Cell('compare', n, d, b, ['graphs']) for b in middle[1:] for n in args.networks for d in dtypes]
    cells += [Cell('compare', n, d, high, ['graphs']) for n in others for d in dtypes]
    cells += [Cell('compare', n, d, low, ['max-autotune']) for n in first for d in dtypes]
    return cells


def jobs_of(cells: list[Cell]) -> list[tuple[str, str, str, str, int]]:
    """(network, dtype, way, mode, batch) of everything that the cells compile, in their order."""
    found: dict[tuple[str, str, str, str, int], None] = {}
    for cell in cells:
        for mode in cell.modes:
            if mode != 'static':
                found[cell.network, cell.dtype, 'plain', mode, cell.batch] = None
            if mode != 'compiled':  # one form serves every batch size but one
                same = [j for j in found if j[:4] == (cell.network, cell.dtype, 'cascade', mode) and j[4] > 1]
                if cell.batch == 1 or mode == 'static' or not same:
                    found[cell.network, cell.dtype, 'cascade', mode, cell.batch] = None
    return list(found)


def prepare_all(cells: list[Cell], args: argparse.Namespace, deadline: float) -> list[dict[str, Any]]:
    """Compiles in several processes at once, into the compiler's cache on disk; times to compile."""
    waiting = [j for j in jobs_of(cells) if j[3] not in ('static', 'max-autotune')]
    running: list[tuple[Any, subprocess.Popen]] = []
    rows = []
    env = {**os.environ, 'TORCHINDUCTOR_COMPILE_THREADS': '1', 'OMP_NUM_THREADS': '1'}
    script = str(ROOT / 'scripts' / 'experiments' / 'benchmark')
    options = ['--device', args.device, '--backend', args.backend]
    try:
        while (waiting or running) and time.monotonic() < deadline:
            while waiting and len(running) < args.workers:
                job = waiting.pop(0)
                command = [sys.executable, '-W', 'ignore', script, 'gpu', *options, '--prepare', *map(str, job)]
                process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
                )
                running.append((job, process))
            time.sleep(0.1)
            for job, process in [(j, p) for j, p in running if p.poll() is not None]:
                running.remove((job, process))
                lines = (process.communicate()[0] or '').strip().splitlines() or ['']
                row = dict(zip(('network', 'dtype', 'way', 'mode', 'batch'), job, strict=True))
                rows.append(row | (json.loads(lines[-1]) if not process.returncode else dict(error=lines[-1][:300])))
                _logger.info('prepared: %s', rows[-1])
    finally:
        for _, process in running:
            process.kill()
            process.communicate()
    return rows


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in this thread after some seconds."""

    def ring(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Results:
    """What was measured so far, on disk after every cell."""

    def __init__(self, args: argparse.Namespace, command: str) -> None:
        self.docs: Path = args.out
        self.content: dict[str, Any] = dict(
            command=command,
            machine=machine(args.device),
            cuda=torch.version.cuda if args.device != 'cpu' else None,
            tf32=dict(convolutions=torch.backends.cudnn.allow_tf32, products=torch.backends.cuda.matmul.allow_tf32),
            minutes=args.minutes,
            workers=args.workers,
            compile=[],
            cells=[],
            missing=[],
        )

    def write(self) -> None:
        results, pages = evidence(self.docs)
        write_text(results / 'gpu.json', json.dumps(self.content, indent=1) + '\n')
        write_text(pages / 'gpu.md', '\n'.join([*gpu_page.markdown(self.content), '']))


def measure(cell: Cell, subjects: dict[tuple[str, str], Subject], args: argparse.Namespace) -> dict[str, Any]:
    key = cell.network, cell.dtype
    if key not in subjects:
        subjects[key] = Subject(*key, args.device, args.backend)
    call: Callable[..., dict[str, Any]] = compare if cell.kind == 'compare' else regroup
    return call(subjects[key], cell.batch, cell.modes, args.seconds, args.repetitions)


def run(args: argparse.Namespace, command: str) -> Results:
    """Prepares, then measures cell by cell until the time is up."""
    began = time.monotonic()
    end = began + 60 * args.minutes
    results, cells = Results(args, command), plan(args)
    results.content['missing'] = [c.name for c in cells]
    subjects: dict[tuple[str, str], Subject] = {}
    results.write()
    if args.workers:
        results.content['compile'] = prepare_all(cells, args, began + PREPARING * 60 * args.minutes)
    for cell in cells:
        start = time.monotonic()
        if start >= end:
            break
        entry: dict[str, Any] = cell._asdict()
        try:
            with limit(end - start):
                entry |= measure(cell, subjects, args)
        except OutOfTime:
            break
        except Exception as e:  # the other cells may work
            _logger.warning(traceback.format_exc())
            entry['error'] = f'{type(e).__name__}: {" ".join(str(e).split())[:300]}'
        entry['took'] = time.monotonic() - start
        results.content['cells'].append(entry)
        results.content['missing'].remove(cell.name)
        results.write()
        _logger.info('%s: %.1f s%s', cell.name, entry['took'], f', {entry["error"]}' if 'error' in entry else '')
    results.write()
    return results


def parser_of() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog='benchmark gpu', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--device', default='cuda', help='cpu is a trial: its page is written to --out only')
    parser.add_argument('--minutes', type=float, default=4, help='in all, preparation included (default: 4)')
    parser.add_argument('--seconds', type=float, default=2, help='about how long a comparison is repeated (default: 2)')
    parser.add_argument('--repetitions', type=int, default=3, help='each is measured at least this often (default: 3)')
    parser.add_argument('--networks', nargs='+', default=[*FIRST, *OTHERS], help='timm networks, or `release`')
    parser.add_argument('--dtypes', nargs='+', default=list(DTYPES), choices=['float32', 'bfloat16', 'float16'])
    parser.add_argument('--batch', type=int, nargs='+', default=[1, 64, 8, 256])
    parser.add_argument('--backend', default='inductor', help='of torch.compile; `eager` is quick, for a trial')
    parser.add_argument('--workers', type=int, help='processes that compile at first; default: up to 14 on a GPU')
    parser.add_argument('--out', type=Path, help='docs folder (default: docs)')
    parser.add_argument('--prepare', nargs=5, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str]) -> None:
    parser = parser_of()
    args = parser.parse_args(argv)
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        parser.error('there is no CUDA device here; for a trial of the command, give --device cpu and --out FOLDER.')
    if args.prepare:
        network, dtype, way, mode, batch = args.prepare
        seconds = prepare(Subject(network, dtype, args.device, args.backend), way, mode, int(batch))
        print(json.dumps(dict(seconds=seconds)))
        return
    if args.device == 'cpu' and args.out is None:
        parser.error('figures of a CPU are not for the docs; say where they go with --out FOLDER.')
    args.out = args.out or ROOT / 'docs'
    if args.workers is None:
        args.workers = min(14, os.cpu_count() or 1) if args.device != 'cpu' else 0
    logging.basicConfig(level=logging.INFO, format='%(asctime)s %(message)s')
    shown = [a for i, a in enumerate(argv) if a != '--out' and (not i or argv[i - 1] != '--out')]
    results = run(args, shlex.join(['python', 'scripts/experiments/benchmark', 'gpu', *shown]))
    print('\n'.join(gpu_page.markdown(results.content)))
