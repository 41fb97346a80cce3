"""Loads a released cascade in one line and shows what its dial does on real test images.

python scripts/demo.py [--rule certified|joint|per_exit] [--images N] [--out runs/demo]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, so that scripts.* is found

import numpy as np
import timm
import torch

import timm_cascade
from scripts import ROOT
from scripts.datasets import fashion_mnist
from scripts.releases.pictures import contact_sheet, plot_tradeoff
from timm_cascade.data import ImageData
from timm_cascade.measure.calibrate import record
from timm_cascade.thresholds import route
from timm_cascade.utils.files import write_text

RELEASE = ROOT / 'hub' / 'releases' / 'cascade_cifar_resnet20.fashion_mnist'
MAX_DROPS = (0.0, 0.005, 0.01, 0.02)


def table(rows: list[dict[str, Any]], exits: int) -> str:
    """The rows as text: one for the plain backbone, one per max_drop."""
    head = ['allowed', 'accuracy', 'change', 'MACs', 'share', 'time', *(f'exit {m}' for m in range(exits)), 'whole']
    first = rows[0]
    lines = [
        head,
        [
            'backbone',
            f'{first["full_accuracy"]:.2%}',
            '',
            f'{first["backbone_macs"] / 1e6:.2f} M',
            '100.0%',
            '1.00',
            *[''] * exits,
            '100.0%',
        ],
    ]
    for row in rows:
        lines.append(
            [
                f'{100 * row["max_drop"]:g} %',
                f'{row["accuracy"]:.2%}',
                f'{100 * row["change"]:+.2f}',
                f'{row["macs"] / 1e6:.2f} M',
                f'{row["macs_share"]:.1%}',
                f'{row["time_share"]:.2f}',
                *(f'{share:.1%}' if share else '' for share in row['exit_shares']),
            ]
        )
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    text = ['  '.join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines]
    thresholds = [
        f'  {100 * row["max_drop"]:g} %: ' + ' '.join('-' if t is None else f'{t:.4f}' for t in row['thresholds'])
        for row in rows
    ]
    return '\n'.join([*text, '', 'thresholds (- is a closed exit)', *thresholds])


def draw(data: ImageData, n: int, seed: int = 0) -> ImageData:
    """`n` of the images, drawn without replacement; all of them where there are no more."""
    if n >= len(data):
        return data
    chosen = np.sort(np.random.default_rng(seed).permutation(len(data))[:n])
    split = f'{data.split}, {n:,} of {len(data):,} images'
    return ImageData([data[i][0] for i in chosen], data.labels[chosen], data.class_names, data.source, split)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rule', default='certified', choices=['certified', 'joint', 'per_exit'])
    parser.add_argument(
        '--images', type=int, default=2000, metavar='N', help='draw N of the test images (default: 2000)'
    )
    parser.add_argument('--out', type=Path, default=ROOT / 'runs' / 'demo')
    args = parser.parse_args()
    if args.images < 1:
        parser.error(f'--images is {args.images}; expected is at least 1')

    model = timm.create_model(f'local-dir:{RELEASE}', pretrained=True).eval()
    model.to('cuda' if torch.cuda.is_available() else 'cpu')
    data = draw(fashion_mnist.load_test(), args.images)
    print(f'{RELEASE.name}: {len(model.exits)} exits, {len(data):,} images ({data.title})', flush=True)

    rows, thresholds, notes = [], [], []
    for max_drop in MAX_DROPS:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            point = model.set_max_drop(max_drop, rule=args.rule)
        notes += [str(w.message) for w in caught]
        report = timm_cascade.evaluate(model, data, title=f'max_drop {max_drop:.1%}')
        thresholds.append(point.thresholds)
        rows.append(
            dict(
                rule=args.rule,
                max_drop=max_drop,
                certified=point.certified,
                backbone_macs=model.exits[-1].total,
                **report.to_dict(),
            )
        )
    print(f"""
Rule {args.rule}. Each line allows some loss of accuracy. share and time: the cascade's computation and time over
the backbone's, side by side in this run; then the share of the images that each exit answered.
""")
    print('\n'.join([table(rows, len(model.exits)), *(f'\nnote: {note}' for note in notes)]))

    # the sheet shows the second row of the table: half a point
    shown = record(model, data)
    exits = route(shown['confidence'], thresholds[1])
    args.out.mkdir(parents=True, exist_ok=True)
    names = [f'exit {m} ({p.module}, {p.fraction:.0%} of the network)' for m, p in enumerate(model.exits)]
    sheet, plot, numbers = (args.out / name for name in ('exits.png', 'tradeoff.png', 'table.json'))
    contact_sheet(
        [data[i][0] for i in range(len(data))],
        exits,
        shown['confidence'][range(len(exits)), exits],
        [*names, 'the whole network'],
        sheet,
    )
    plot_tradeoff(dict(rows=rows), plot, RELEASE.name)
    write_text(numbers, json.dumps(dict(data=data.source, split=data.split, n=len(data), rows=rows), indent=1))
    print('\nwritten:', *(os.path.relpath(path) for path in (numbers, plot, sheet)), sep='\n  ')


if __name__ == '__main__':
    main()
