"""Makes a cascade of every timm model and checks it: rows in docs/results/backbones.csv,
a summary in docs/pages/evidence/backbones.md.

    python scripts/experiments/every_backbone # every name that has no row yet, cheapest first; resumable
    python scripts/experiments/every_backbone --per-module # the cheapest model of each of timm's module files
    python scripts/experiments/every_backbone --retry # also those whose row says anything but "equal"
    python scripts/experiments/every_backbone --full --max-gmacs 60 # again what was reduced, up to this cost
    python scripts/experiments/every_backbone --names 'resnet*' # these, again if they have a row
    python scripts/experiments/every_backbone --summary # only write the page

A model is right when samples that go on get the logits they get in the whole batch, within 1e-4 of the logits' standard
deviation: two of three go on at each exit, one goes on, some leave at every exit in sequence, all leave.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import json
import multiprocessing
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, model_entrypoint
from tqdm import tqdm

from scripts import ROOT
from scripts.experiments.every_backbone.equality import batch, judge, layout_seen, randomise
from timm_cascade.backbone import BackboneError, backbone_macs, input_size_of

CSV = ROOT / 'docs' / 'results' / 'backbones.csv'
PAGE = ROOT / 'docs' / 'pages' / 'evidence' / 'backbones.md'
FIELDS = (
    'name',
    'module_file',
    'params',
    'status',
    'error',
    'exits',
    'fractions',
    'layout',
    'layout_seen',
    'cut',
    'stage_macs',
    'input',
    'reduced',
    'seconds',
    'reason',
)
SETTLED = ('equal', 'no classifier')
SMALL = 96  # pixels of the input that a large model is checked with
MEMORY = 16e9  # bytes of weights and activations that a model may take, estimated; above it is reduced


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
            stage_macs=';'.join(str(int(m)) for m in model.stage_macs()),
        )
        input_size = input_size_of(model.backbone)
        row['input'] = 'x'.join(map(str, input_size))
        images = batch(input_size)
        randomise(model, images)
        seen = layout_seen(model, images)
        equal, error, exact = judge(model, images)
        row.update(status='equal' if equal else 'differs', error=f'{error:.1e}', layout_seen=seen)
        if exact is not None:
            row.update(
                status='equal in float64' if equal else 'differs',
                reason=f'{error:.1e} in float32, {exact:.1e} in float64',
            )
    except Exception as e:
        row.update(status='fails', reason=f'{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ""}'[:300])
    row['seconds'] = round(time.time() - start, 1)
    return row


def reductions(name: str) -> list[dict[str, Any]]:
    """What to make a model with until it fits: nothing, else a smaller input, else fewer blocks as well."""
    cfg = get_pretrained_cfg(name)
    channels = cfg.input_size[0] if cfg is not None else 3
    inputs: list[dict[str, Any]] = [
        {'img_size': SMALL},
        {'pretrained_cfg_overlay': {'input_size': [channels, SMALL, SMALL]}},
    ]
    blocks: list[dict[str, Any]] = [{'depth': 4}, {'depths': [1, 1, 2, 1]}]
    return [{}, *inputs, *({**i, **b} for b in blocks for i in inputs), *blocks]


def size_of(name: str, kwargs: dict[str, Any]) -> tuple[int, float]:
    """Parameters and MACs of one image, on the meta device."""
    with torch.device('meta'):
        model = create(name, **kwargs)
    params = sum(p.numel() for p in model.parameters())
    return params, backbone_macs(model, input_size_of(model))


def work(size: tuple[int, float]) -> float:
    """What checking a model takes, in MACs of one image: weights must be made, and read for each batch, too."""
    return size[1] + 20 * size[0]


def _worker(connection: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            task, *args = connection.recv()
        except EOFError:  # the sweep is over
            return
        try:
            connection.send(dict(measure=measure, size=size_of)[task](*args))
        except Exception as e:
            connection.send(
                dict(
                    name=args[0],
                    status='fails',
                    reason=f'{type(e).__name__}: {e}'.splitlines()[0][:300],
                    module_file=model_entrypoint(args[0]).__module__.rpartition('.')[2],
                )
            )


class Worker:
    """A process of its own, because a model may take too long or too much memory; replaced when it is lost."""

    def __init__(self) -> None:
        self.process: Any = None

    def ask(self, task: str, *args: Any, timeout: float) -> Any:
        """The answer, or None after `timeout` seconds or where the process was lost."""
        if self.process is None or not self.process.is_alive():
            context = multiprocessing.get_context('spawn')
            self.connection, other = context.Pipe()
            self.process = context.Process(target=_worker, args=(other,), daemon=True)
            self.process.start()
        self.connection.send((task, *args))
        deadline = time.time() + timeout
        try:
            while time.time() < deadline and self.process.is_alive():
                if self.connection.poll(1):
                    return self.connection.recv()
        except EOFError:  # killed, for memory perhaps
            pass
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


def sizes(names: list[str]) -> dict[str, Any]:
    """Parameters and MACs of each name, as published; asked once, kept in runs/sizes.json."""
    cache = ROOT / 'runs' / 'sizes.json'
    known = json.loads(cache.read_text(encoding='utf-8')) if cache.exists() else {}
    missing = [n for n in names if n not in known]
    for name in tqdm(missing, desc='sizes', disable=None if missing else True):
        try:
            known[name] = size_of(name, {})
        except Exception:  # measure() will say why
            known[name] = (0, 0)
    if missing:
        cache.parent.mkdir(exist_ok=True)
        cache.write_text(json.dumps(known), encoding='utf-8')
    return {name: known[name] for name in names}


def module_file(name: str) -> str:
    return str(model_entrypoint(name).__module__.rpartition('.')[2])


def sweep(names: list[str], timeout: float, until: float, max_macs: float) -> None:
    rows: dict[str, dict[str, Any]] = dict(read_rows())
    worker = Worker()
    published = sizes(names)
    progress = tqdm(names, desc='sweep', disable=None)
    for name in progress:
        if time.time() > until:
            print(f'time is up; {len(rows)} rows')
            break
        progress.set_postfix_str(name)
        rows[name] = _one(worker, name, timeout, max_macs, published[name])
        write_rows(rows)
    write_page(rows)


def _one(worker: Worker, name: str, timeout: float, max_macs: float, published: tuple[int, int]) -> dict[str, Any]:
    why: list[str] = []
    options: list[tuple[float, dict[str, Any]]] = []  # the first that is cheap enough, else the cheapest
    refused: set[str] = set()  # arguments that this model does not take
    for reduction in reductions(name):
        if refused & set(reduction):
            continue
        size = worker.ask('size', name, reduction, timeout=120) if reduction else published
        if not isinstance(size, (tuple, list)):
            refused.add(list(reduction)[-1])
            continue
        if size[0] * 8 <= MEMORY:
            options.append((work(size), reduction))
            if work(size) <= max_macs:
                break
        why.append(f'{size[0] / 1e6:.0f} M parameters, {size[1] / 1e9:.0f} GMACs an image')
    if options:
        reduction = min(options, key=lambda o: o[0])[1]
        row: dict[str, Any] | None = worker.ask('measure', name, reduction, timeout=timeout)
        if row is not None:
            if reduction and not row.get('reason'):
                row['reason'] = why[0]
            return row
        why.append(f'longer than {timeout:.0f} s, or out of memory')
    return dict(
        name=name,
        module_file=module_file(name),
        status='not run',
        reason='; '.join(dict.fromkeys(why)) or 'size unknown',
    )


def write_page(rows: dict[str, dict[str, Any]]) -> None:
    names = all_names()
    done = [rows[n] for n in names if n in rows]
    total = Counter(row['status'] for row in done)
    reduced = sum(bool(row.get('reduced')) for row in done)
    lines = f"""# Backbones

Written by `python scripts/experiments/every_backbone` from [backbones.csv](../../results/backbones.csv), which has one
row per model. "Equal" means: samples that go on get the logits they get in the whole batch, within 1e-4 of the logits'
standard deviation, for two of three
and for one going on at each exit, for exits in sequence, and all of them leaving. Random weights, fp32, CPU; timm
{timm.__version__}, torch {torch.__version__.split('+')[0]}.

Of {len(names)} names {len(done)} were run: {total['equal']} equal,
{total['equal in float64']} equal in float64 only (with random weights, rounding alone is more than 1e-4 there),
{total['differs']} differ, {total['fails']} fail,
{total['no classifier']} are encoders without a classifier, {total['not run']} were too large or too slow here.
{reduced} are large and ran with a smaller input or fewer blocks than published; their rows say what and why.
{len(names) - len(done)} names have no row yet.

`cut` is how samples leave: `hook` where the batch can shrink inside the backbone's own code, `export` where the
exported graph is split at the exits (`model.exits[i].cut` and `timm-cascade info` say it for a model; the first batch
of each size, dtype and device then takes an export, some seconds to a minute).

timm's own scripts take a `cascade_*` name once the package is imported; for a script that is not yours:

    python -m timm_cascade.run validate.py DATA --model cascade_resnet50 ...

In training mode a cascade is its backbone, and its heads get no gradient: train.py trains the backbone, and wrapped in
DistributedDataParallel it needs `find_unused_parameters`. The simpler way is to train `resnet50` and to give its
checkpoint to `timm-cascade train --checkpoint`.

| module file | names | run | equal | no classifier | reduced | cut | largest error | others |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |""".split('\n')
    for family, members in sorted(_by_file(names).items()):
        own = [rows[n] for n in members if n in rows]
        statuses = Counter(row['status'] for row in own)
        cuts = sorted({cut for row in own for cut in (row.get('cut') or '').split(';') if cut})
        error = max((float(row['error']) for row in own if row.get('error')), default=None)
        others = [row['name'] for row in own if row['status'] not in SETTLED]
        cells = (
            family,
            len(members),
            len(own),
            statuses['equal'],
            statuses['no classifier'],
            sum(bool(row.get('reduced')) for row in own),
            ', '.join(cuts),
            '' if error is None else f'{error:.0e}',
            ', '.join(others),
        )
        lines.append('| ' + ' | '.join(map(str, cells)) + ' |')
    for title, statuses_shown in (
        ('Not equal', ('equal in float64', 'differs', 'fails', 'not run')),
        ('Encoders', ('no classifier',)),
    ):
        shown = [row for row in done if row['status'] in statuses_shown]
        if shown:
            lines += ['', f'## {title}', '', *(f'- `{row["name"]}`: {row["status"]}. {row["reason"]}' for row in shown)]
    PAGE.write_text('\n'.join(lines) + '\n', encoding='utf-8')


def _by_file(names: list[str]) -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    for name in names:
        files.setdefault(module_file(name), []).append(name)
    return files


def cheapest_of_each_file(names: list[str]) -> Iterator[str]:
    seen = set()
    for name in names:
        if module_file(name) not in seen:
            seen.add(module_file(name))
            yield name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--names', nargs='+', help='names or patterns; run again even if they have a row')
    parser.add_argument('--per-module', action='store_true', help='only the cheapest model of each module file')
    parser.add_argument('--retry', action='store_true', help='run again what did not come out equal')
    parser.add_argument('--full', action='store_true', help='run again, as published, what was run reduced')
    parser.add_argument(
        '--max-gmacs', type=float, default=60, help='reduce a model that takes more work than an image of so many GMACs'
    )
    parser.add_argument('--limit', type=int, help='at most so many')
    parser.add_argument('--minutes', type=float, default=float('inf'), help='start no model after this time')
    parser.add_argument('--timeout', type=float, default=600, help='seconds for one model')
    parser.add_argument('--summary', action='store_true', help='only write the page')
    args = parser.parse_args()
    if args.summary:
        write_page(read_rows())
        return
    names, rows = all_names(), read_rows()
    if args.names:
        names = [n for n in names if any(fnmatch.fnmatch(n, p) for p in args.names)]
    elif args.retry:
        names = [n for n in names if n not in rows or rows[n]['status'] not in SETTLED]
    elif args.full:
        names = [n for n in names if n not in rows or rows[n]['reduced']]
    elif not args.per_module:
        names = [n for n in names if n not in rows]
    macs = {name: work(size) for name, size in sizes(names).items()}
    names.sort(key=macs.__getitem__)
    if args.per_module:
        names = [n for n in cheapest_of_each_file(names) if n not in rows]
    if args.full:
        names = [n for n in names if macs[n] <= args.max_gmacs * 1e9]
    sweep(names[: args.limit], args.timeout, time.time() + 60 * args.minutes, args.max_gmacs * 1e9)
