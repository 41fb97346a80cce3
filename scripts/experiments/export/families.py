"""Exports the smallest model of every module file of timm, and compares what the files compute with the network."""

from __future__ import annotations

import argparse
import copy
import csv
import functools
import importlib.util
import math
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.models import model_entrypoint

import timm_cascade
from scripts.experiments.every_backbone.equality import batch, randomise
from timm_cascade.backbone import input_size_of

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / 'docs' / 'results' / 'export.csv'
PAGE = ROOT / 'docs' / 'pages' / 'evidence' / 'export.md'
MARKS = '<!-- families -->', '<!-- end of families -->'  # the page's part between them is written here
COLUMNS = ('module', 'model', 'exits', 'head', 'passes', 'over_rounding', 'relative_error', 'cpu_seconds')
COLUMNS += ('megabytes', 'file_share', 'reason')
LIMIT = 10  # times the network's own rounding
EXITS, HEAD = 2, 'enhanced'  # whatever the defaults are, so that rows of several runs go together
# take longest, for their many operators or weights
LAST = """
    hrnet_w18_small inception_resnet_v2 inception_v4 mobilenetv5_base nasnetalarge pnasnet5large vgg11
""".split()


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def families() -> dict[str, dict[str, Any]]:
    """Models and their arguments, as the tests list them."""
    return load(ROOT / 'tests' / 'backbone' / 'test_every_family.py').FAMILIES


@torch.no_grad()
def measure(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """One row. The files' logits are compared exit by exit, with all samples leaving there."""
    torch.manual_seed(0)
    row = dict.fromkeys(COLUMNS, '') | dict(model=name, module=model_entrypoint(name).__module__.rpartition('.')[2])
    row |= dict(exits=EXITS, head=HEAD)
    try:
        model = timm.create_model(f'cascade_{name}', num_classes=11, exits=EXITS, head=HEAD, **kwargs).eval()
        images = batch(input_size_of(model.backbone), 3)
        randomise(model, images)
        own = model.forward_exits(images)
        try:
            exact = copy.deepcopy(model).double().forward_exits(images.double())
        except RuntimeError:  # a network that casts to single precision itself: judge by its own noise on shifted rows
            exact = [torch.cat([model.forward_exits(images[i : i + 1])[k] for i in range(3)]) for k in range(EXITS + 1)]
        with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
            warnings.simplefilter('ignore')
            start = time.process_time()
            folder = timm_cascade.export(model, Path(temporary) / 'out', single_file=None)
            row['cpu_seconds'] = round(time.process_time() - start, 1)
            size = sum(p.stat().st_size for p in folder.glob('stage_*'))
            row['megabytes'] = round(size / 1e6, 1)
            state = model.state_dict().values()
            row['file_share'] = round(size / sum(t.numel() * t.element_size() for t in state), 3)
            cascade = load(folder / 'runner.py').Cascade(folder)
        ratios, relative = [], []
        for k in range(EXITS + 1):
            cascade.set_thresholds([0.0 if i == k else None for i in range(EXITS)])
            for rows in (slice(0, 3), slice(1, 2)):  # a batch, and a single image
                got = cascade.predict(images[rows].numpy()).logits
                scale = float(exact[k].std())
                error = float(np.abs(got - exact[k][rows].numpy()).max())
                rounding = max(float((own[k].double() - exact[k]).abs().max()), 1e-6 * scale)
                ratios.append(error / rounding)
                relative.append(error / scale)
        row['over_rounding'], row['relative_error'] = round(max(ratios), 2), f'{max(relative):.1e}'
        row['passes'] = max(ratios) <= LIMIT
    except Exception as e:  # whatever the network or the exporter raises is this row's reason
        row['passes'], row['reason'] = False, ' '.join(f'{type(e).__name__}: {e}'.split())[:300]
    return row


def markdown(rows: list[dict[str, Any]], total: int) -> str:
    """What the page says about the families."""
    failed = [row for row in rows if str(row['passes']) != 'True']
    text = [f'**{len(rows)} of the {total} families have been run, {len(rows) - len(failed)} pass.**', '']
    if failed:
        text += ['| does not pass | model | why |', '| --- | --- | --- |']
        text += [f'| {r["module"]} | {r["model"]} | {r["reason"] or "differs by more"} |' for r in failed]
        text += ['']
    text += [
        '| family | model | over rounding | over deviation | export, CPU s | MB | file share |',
        '| --- | --- | --- | --- | --- | --- | --- |',
    ]
    for r in rows:
        if r not in failed:
            columns = ('module', 'model', 'over_rounding', 'relative_error', 'cpu_seconds', 'megabytes', 'file_share')
            text.append(f'| {" | ".join(str(r[c]) for c in columns)} |')
    return '\n'.join(text)


def write_page(rows: list[dict[str, Any]], total: int) -> None:
    """Replaces the page's table."""
    before, _, rest = PAGE.read_text(encoding='utf-8').partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    PAGE.write_text(f'{before}{MARKS[0]}\n\n{markdown(rows, total)}\n\n{MARKS[1]}{after}', encoding='utf-8')


def translate_once() -> None:
    """Makes torch's exporter read its 1,500 operators once per process instead of once per stage."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--only', nargs='*', default=[], help='these models, also where they have a row')
    parser.add_argument('--minutes', type=float, default=math.inf, help='begin no further family after this time')
    parser.add_argument('--out', type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    translate_once()
    began = time.monotonic()
    rows = {}
    if args.out.exists():
        with open(args.out, newline='', encoding='utf-8') as file:
            rows = {row['model']: row for row in csv.DictReader(file)}
    todo = [n for n in families() if n in args.only or not (args.only or n in rows)]
    for name in sorted(todo, key=lambda n: (n in LAST, n)):
        if time.monotonic() - began > 60 * args.minutes:
            break
        rows[name] = row = measure(name, families()[name])
        print({k: v for k, v in row.items() if v != ''}, flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with open(args.out, 'w', newline='', encoding='utf-8') as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
            writer.writeheader()
            writer.writerows(rows[name] for name in sorted(rows))
    if args.out == RESULTS:
        write_page([rows[name] for name in sorted(rows)], len(families()))
    passed = sum(str(row['passes']) == 'True' for row in rows.values())
    print(f'{passed} of {len(rows)} families pass, of {len(families())}')
