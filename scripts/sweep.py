"""Makes a cascade of every timm model and checks it: rows in backbones.csv, a summary in docs/backbones.md.

    python scripts/sweep.py                     # every name that has no row yet, cheapest first; stop and resume at will
    python scripts/sweep.py --per-module        # the cheapest model of each of timm's module files
    python scripts/sweep.py --names 'resnet*'   # these, again if they have a row
    python scripts/sweep.py --summary           # only write docs/backbones.md

A model is right when samples that go on get the logits they get in the whole batch, within TOLERANCE of the logits'
standard deviation: two of four go on at each exit, one goes on, some leave at every exit in sequence, all leave.
"""
from __future__ import annotations

import argparse
import csv
import fnmatch
import json
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import model_entrypoint
from torch import Tensor, nn
from tqdm import tqdm

import timm_cascade
from timm_cascade.backbone import BackboneError, ExitPoint, tap_of

ROOT = Path(__file__).resolve().parent.parent
CSV = ROOT / 'docs' / 'backbones.csv'
PAGE = ROOT / 'docs' / 'backbones.md'
TOLERANCE = 1e-4
FIELDS = ('name', 'module_file', 'params', 'status', 'error', 'exits', 'fractions', 'layout', 'layout_seen', 'cut',
          'stage_macs', 'input', 'reduced', 'seconds', 'reason')
MEMORY = 16e9  # bytes of weights and activations that a model may take, estimated; above it is reduced
MAX_MACS = 60e9  # of one image; above it the model is reduced, or the check takes minutes


# ---- the check, also used by the tests

def randomise(model: nn.Module, images: Tensor) -> None:
    """Weights that let every part of the network matter.

    Fresh timm models have layers that add nothing (zero-initialised classifiers, layer scales of 1e-6): a wrong cut
    there would not show. Batch norm gets the statistics of `images`, which keeps deep networks finite.
    """
    with torch.no_grad():
        for p in model.parameters():
            if p.numel() > 1 and p.is_floating_point() and float(p.std()) < 1e-3:
                p.add_(torch.randn_like(p).mul_(0.02 if p.ndim > 1 else 0.1))
                if p.ndim == 1 and float(p.mean().abs()) < 1e-3:
                    p.add_(0.1)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if norms:
        momenta = [m.momentum for m in norms]
        for m in norms:
            m.momentum = 1.
            m.train()
        with torch.no_grad():
            model(images)
        for m, momentum in zip(norms, momenta, strict=True):
            m.momentum = momentum
            m.eval()


def batch(input_size: tuple[int, ...], n: int = 4) -> Tensor:
    """Random images of different contrast and brightness."""
    contrast = torch.linspace(0.3, 2, n)[:, None, None, None]
    return torch.randn(n, *input_size) * contrast + torch.linspace(-1, 1, n)[:, None, None, None]


def _stub(leaving: Callable[[int], list[int]], classes: int, head: Callable[[Tensor], Tensor] | None = None,
          seen: list[Tensor] | None = None) -> Callable[[Tensor], Tensor]:
    """A head that sends rows `leaving(rows)` away and nobody else."""
    def answer(tap: Tensor) -> Tensor:
        if head is not None and seen is not None:
            seen.append(head(tap))
        logits = tap.new_zeros(len(tap), classes)
        logits[leaving(len(tap)), 0] = 100
        return logits
    return answer


@torch.no_grad()
def check(model: timm_cascade.CascadeModel, images: Tensor) -> float:
    """Largest error of survivors' logits, over the logits' standard deviation.

    Raises:
        ValueError: The backbone answers every image alike, or nothing finite: the check would be blind.
    """
    want = model.backbone(images)
    every = model.forward_exits(images)
    scale = float(want.std())
    if not torch.isfinite(want).all() or not float(want.std(0).mean()) > 1e-3 * scale:
        raise ValueError(f'blind: logits of std {scale:.2g} that do not depend on the image')
    if not torch.allclose(every[-1], want, atol=TOLERANCE * scale):
        raise ValueError('forward_exits does not end with the backbone\'s logits')
    count, n, classes = len(model.exits), len(images), model.num_classes
    worst = 0.

    def run(stubs: list, open_exits: list[float]) -> Any:
        return model._router.route(model.backbone, images, stubs, open_exits)

    for i in range(count):
        for keep in ([0, 2], [1]):
            gone = [k for k in range(n) if k not in keep]
            stubs: list = [None] * count
            stubs[i] = _stub(lambda rows, gone=gone: gone, classes)
            out = run(stubs, [0.9 if k == i else float('inf') for k in range(count)])
            assert (out.exit == count).nonzero().flatten().tolist() == keep, out.exit
            worst = max(worst, float((out.logits[keep] - want[keep]).abs().max()) / scale)
    seen: list[list[Tensor]] = [[] for _ in range(count)]
    alive = [list(range(n))]
    for _ in range(count):
        alive.append(alive[-1][:-1] if len(alive[-1]) > 1 else alive[-1])
    out = run([_stub(lambda rows: [rows - 1] if rows > 1 else [], classes, head, s)
               for head, s in zip(model.heads, seen, strict=True)], [0.9] * count)
    keep = alive[-1]
    assert (out.exit == count).nonzero().flatten().tolist() == keep, out.exit
    worst = max(worst, float((out.logits[keep] - want[keep]).abs().max()) / scale)
    for i, (s, rows) in enumerate(zip(seen, alive, strict=False)):  # and the taps are the whole batch's
        worst = max(worst, float((s[0] - every[i][rows]).abs().max() / every[i].std().clamp_min(1e-6)))
    for i in (0, count - 1):
        stubs = [None] * count
        stubs[i] = _stub(lambda rows: list(range(rows)), classes)
        out = run(stubs, [0.9 if k == i else float('inf') for k in range(count)])
        assert out.exit.tolist() == [i] * n, out.exit
    return worst


def _as_picture(tap: Tensor, point: ExitPoint) -> Tensor:
    if point.layout == 'NHWC':
        return tap.permute(0, 3, 1, 2)
    if point.layout == 'NLC':
        return tap[:, point.prefix_tokens:].transpose(1, 2).unflatten(2, point.size)
    return tap


@torch.no_grad()
def layout_seen(model: timm_cascade.CascadeModel, images: Tensor) -> str:
    """How many exits' layouts agree by value with timm's forward_intermediates, of those it returns too."""
    taps, _ = model._router.collect(model.backbone, images[:2], [lambda tap: tap] * len(model.exits))
    try:
        pictures = model.backbone.forward_intermediates(images[:2], output_fmt='NCHW', intermediates_only=True)
    except Exception as e:
        return f'no forward_intermediates ({type(e).__name__})'
    same = other = 0
    for tap, point in zip(taps, model.exits, strict=True):
        ours = _as_picture(tap, point)
        for p in pictures:
            if isinstance(p, Tensor) and p.numel() == ours.numel() and torch.allclose(
                    p.flatten().sort().values, ours.flatten().sort().values, atol=1e-5):
                agrees = p.shape == ours.shape and torch.allclose(p, ours, atol=1e-5)
                same, other = same + agrees, other + (not agrees)
                break
    return f'{same} agree' + (f', {other} differ' if other else '')


# ---- one model

def create(name: str, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model = timm.create_model(name, **kwargs)
        if not getattr(model, 'num_classes', 0):  # published as an encoder; with classes it is a classifier
            model = timm.create_model(name, num_classes=1000, **kwargs)
        return model


def measure(name: str, reduction: dict[str, Any]) -> dict[str, Any]:
    """One row of the table."""
    start = time.time()
    torch.manual_seed(0)
    module_file = model_entrypoint(name).__module__.rpartition('.')[2]
    row: dict[str, Any] = dict(name=name, module_file=module_file, reduced=json.dumps(reduction) if reduction else '')
    try:
        model = create(f'cascade_{name}', **reduction).eval()
    except BackboneError as e:
        return {**row, 'status': 'no classifier', 'reason': str(e), 'seconds': round(time.time() - start, 1)}
    try:
        row.update(
            params=sum(p.numel() for p in model.backbone.parameters()),
            exits=';'.join(p.module for p in model.exits),
            fractions=';'.join(f'{p.fraction:.3f}' for p in model.exits),
            layout=';'.join(f'{p.layout} {p.channels}x{p.size[0]}x{p.size[1]}+{p.prefix_tokens}' for p in model.exits),
            cut=';'.join(p.cut for p in model.exits),
            stage_macs=';'.join(str(int(m)) for m in model.stage_macs()))
        input_size = timm.data.resolve_model_data_config(model)['input_size']
        row['input'] = 'x'.join(map(str, input_size))
        images = batch(input_size)
        randomise(model, images)
        error = check(model, images)
        row.update(status='equal' if error <= TOLERANCE else 'differs', error=f'{error:.1e}',
                   layout_seen=layout_seen(model, images))
    except Exception as e:
        row.update(status='fails', reason=f'{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ""}'[:300])
    row['seconds'] = round(time.time() - start, 1)
    return row


def reductions(name: str) -> list[dict[str, Any]]:
    """What to make a model with until it fits: nothing, else a smaller input, else fewer blocks."""
    steps: list[dict[str, Any]] = [{}]
    from timm.models import get_pretrained_cfg
    cfg = get_pretrained_cfg(name)
    if cfg is not None and cfg.input_size[-1] > 128 and cfg.input_size[1] == cfg.input_size[2]:
        steps.append(dict(img_size=224 if cfg.input_size[-1] > 288 else 128))
    steps.append(dict(depth=4))
    return steps


def size_of(name: str, kwargs: dict[str, Any]) -> tuple[int, float]:
    """Parameters and MACs of one image, on the meta device."""
    from timm_cascade.backbone import backbone_macs
    with torch.device('meta'):
        model = create(name, **kwargs)
    params = sum(p.numel() for p in model.parameters())
    return params, backbone_macs(model, timm.data.resolve_model_data_config(model)['input_size'])


def _worker(connection: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        task, *args = connection.recv()
        try:
            connection.send(dict(measure=measure, size=size_of)[task](*args))
        except Exception as e:
            connection.send(dict(name=args[0], status='fails', reason=f'{type(e).__name__}: {e}'.splitlines()[0][:300],
                                 module_file=model_entrypoint(args[0]).__module__.rpartition('.')[2]))


class Worker:
    """A process of its own, because a model may take too long or too much memory; replaced when it is lost."""

    def __init__(self) -> None:
        self.process: Any = None

    def ask(self, task: str, *args: Any, timeout: float) -> Any:
        """The answer, or None after `timeout` seconds."""
        if self.process is None or not self.process.is_alive():
            context = multiprocessing.get_context('spawn')
            self.connection, other = context.Pipe()
            self.process = context.Process(target=_worker, args=(other,), daemon=True)
            self.process.start()
        self.connection.send((task, *args))
        deadline = time.time() + timeout
        while time.time() < deadline and self.process.is_alive():
            if self.connection.poll(1):
                return self.connection.recv()
        self.process.kill()
        self.process.join()
        return None


# ---- all of them

def read_rows() -> dict[str, dict[str, str]]:
    if not CSV.exists():
        return {}
    with CSV.open(newline='', encoding='utf-8') as f:
        return {row['name']: row for row in csv.DictReader(f)}


def write_rows(rows: dict[str, dict[str, Any]]) -> None:
    CSV.parent.mkdir(exist_ok=True)
    temporary = CSV.with_suffix('.tmp')
    with temporary.open('w', newline='', encoding='utf-8') as f:
        writer = csv.DictWriter(f, FIELDS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows[name] for name in sorted(rows))
    temporary.replace(CSV)


def all_names() -> list[str]:
    return [n for n in timm.list_models() if not n.startswith(('cascade_', 'cifar_resnet'))]


def by_cost(names: list[str]) -> list[str]:
    """Cheapest first, by a guess that builds nothing: numbers in the names are poor, so parameters times pixels."""
    cache = ROOT / 'runs' / 'sizes.json'
    sizes = json.loads(cache.read_text()) if cache.exists() else {}
    missing = [n for n in names if n not in sizes]
    for name in tqdm(missing, desc='sizes', disable=not missing):
        try:
            with torch.device('meta'):
                model = create(name)
            pixels = timm.data.resolve_model_data_config(model)['input_size']
            sizes[name] = sum(p.numel() for p in model.parameters()) * (0.3 + pixels[1] * pixels[2] / 224 ** 2)
        except Exception:
            sizes[name] = 1e9
    if missing:
        cache.parent.mkdir(exist_ok=True)
        cache.write_text(json.dumps(sizes))
    return sorted(names, key=lambda n: sizes[n])


def module_file(name: str) -> str:
    return str(model_entrypoint(name).__module__.rpartition('.')[2])


def sweep(names: list[str], timeout: float, until: float) -> None:
    rows: dict[str, dict[str, Any]] = dict(read_rows())
    worker = Worker()
    progress = tqdm(names, desc='sweep')
    for name in progress:
        if time.time() > until:
            print(f'time is up; {len(rows)} rows')
            break
        progress.set_postfix_str(name)
        rows[name] = _one(worker, name, timeout)
        write_rows(rows)
    write_page(rows)


def _one(worker: Worker, name: str, timeout: float) -> dict[str, Any]:
    why = []
    for reduction in reductions(name):
        size = worker.ask('size', name, reduction, timeout=120)
        if not isinstance(size, (tuple, list)):
            if reduction:
                continue  # this model does not take the argument
        elif size[0] * 8 > MEMORY or size[1] > MAX_MACS:
            why.append(f'{size[0] / 1e6:.0f} M parameters, {size[1] / 1e9:.0f} GMACs an image')
            continue
        row = worker.ask('measure', name, reduction, timeout=timeout)
        if row is not None:
            if reduction and not row.get('reason'):
                row['reason'] = f'reduced: {"; ".join(why)}'
            return row
        why.append(f'longer than {timeout:.0f} s')
    return dict(name=name, module_file=module_file(name), status='not run', reason='; '.join(why) or 'size unknown')


def write_page(rows: dict[str, dict[str, Any]]) -> None:
    names = all_names()
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(module_file(name), []).append(name)
    done = [rows[n] for n in names if n in rows]

    def count(status: str, of: list[dict[str, Any]] = done) -> int:
        return sum(row['status'] == status for row in of)

    reduced = sum(bool(row.get('reduced')) for row in done)
    lines = [
        '# Backbones', '', 'Written by `scripts/sweep.py` from [backbones.csv](backbones.csv), which has a row for each '
        'model. "Equal" means: samples that go on get the logits they get in the whole batch, within 1e-4 of the '
        'logits\' standard deviation, for keep sets of two and of one, exits in sequence, and everybody leaving; random '
        'weights, fp32, CPU.', '',
        f'timm {timm.__version__}, torch {torch.__version__.split("+")[0]}. Of {len(names)} names {len(done)} were run: '
        f'{count("equal")} equal, {count("differs")} differ, {count("fails")} fail, {count("no classifier")} are '
        f'encoders without a classifier, {count("not run")} too large or too slow here. {reduced} of them ran smaller '
        f'than published; their rows say how. {len(names) - len(done)} names have no row yet.', '',
        '| module file | names | run | equal | no classifier | reduced | cut | largest error | not equal |',
        '| --- | --- | --- | --- | --- | --- | --- | --- | --- |']
    for family in sorted(families):
        own = [rows[n] for n in families[family] if n in rows]
        cuts = sorted({cut for row in own for cut in (row.get('cut') or '').split(';') if cut})
        errors = [float(row['error']) for row in own if row.get('error')]
        bad = [row['name'] for row in own if row['status'] not in ('equal', 'no classifier')]
        lines.append(
            f'| {family} | {len(families[family])} | {len(own)} | {count("equal", own)} | '
            f'{count("no classifier", own)} | {sum(bool(r.get("reduced")) for r in own)} | {", ".join(cuts)} | '
            f'{max(errors):.0e} |' if errors else
            f'| {family} | {len(families[family])} | {len(own)} | {count("equal", own)} | '
            f'{count("no classifier", own)} | {sum(bool(r.get("reduced")) for r in own)} | {", ".join(cuts)} | |')
        lines[-1] += f' {", ".join(bad)} |'
    problems = [row for row in done if row['status'] not in ('equal', 'no classifier')]
    if problems:
        lines += ['', '## Not equal', '', *(f'- `{r["name"]}`: {r["status"]}, {r["reason"]}' for r in problems)]
    encoders = [row for row in done if row['status'] == 'no classifier']
    if encoders:
        lines += ['', '## Encoders without a classifier', '', *(f'- `{r["name"]}`: {r["reason"]}' for r in encoders)]
    PAGE.write_text('\n'.join(lines) + '\n', encoding='utf-8')


def _cheapest_of_each_file(names: list[str]) -> Iterator[str]:
    seen = set()
    for name in by_cost(names):
        if module_file(name) not in seen:
            seen.add(module_file(name))
            yield name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--names', nargs='+', help='names or patterns; run again even if they have a row')
    parser.add_argument('--per-module', action='store_true', help='the cheapest model of each module file, again')
    parser.add_argument('--limit', type=int, help='at most so many')
    parser.add_argument('--minutes', type=float, default=float('inf'), help='start no model after this time')
    parser.add_argument('--timeout', type=float, default=600, help='seconds for one model')
    parser.add_argument('--summary', action='store_true', help='only write the page')
    args = parser.parse_args()
    if args.summary:
        write_page(read_rows())
        return
    names = all_names()
    if args.names:
        names = by_cost([n for n in names if any(fnmatch.fnmatch(n, p) for p in args.names)])
    elif args.per_module:
        names = sorted(_cheapest_of_each_file(names))
    else:
        names = by_cost([n for n in names if n not in read_rows()])
    sweep(names[:args.limit], args.timeout, time.time() + 60 * args.minutes)


if __name__ == '__main__':
    main()
