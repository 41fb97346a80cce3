"""timm-cascade predict: labels whole folders and data sets."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import hub
from ..prediction.local import ENGINES, predict
from ..utils.clock import default_device
from .options import Commands, dial_options, output_options, turn_dial

__all__ = ['add_command', 'run']


def add_command(commands: Commands) -> None:
    """Adds the command and its options."""
    parser = commands.add_parser(
        'predict', parents=[dial_options(), output_options()], help='label every image of an input, into parquet files'
    )
    parser.add_argument('where', metavar='FOLDER|REPO', help='the release, or a folder that timm-cascade export wrote')
    parser.add_argument(
        '--data',
        required=True,
        nargs='+',
        help='image files, folders of them, globs, parquet files, IDX folders or Hub data set ids',
    )
    parser.add_argument('--out', required=True, help='folder for the part files; run again to continue')
    parser.add_argument('--split', help='split of a Hub data set or an IDX folder')
    parser.add_argument('--image-column', help='column with the images, where a parquet file has several')
    parser.add_argument('--topk', type=int, default=5, help='classes per image')
    parser.add_argument('--batch-size', type=int, default=256)
    parser.add_argument('--workers', type=int, default=0, help='processes that decode ahead')
    parser.add_argument('--unit', type=int, default=4096, help='images per part file')
    parser.add_argument('--shard', metavar='I/N', help='predict every N-th unit, from the I-th (1 to N) on')
    parser.add_argument('--engine', default='local', choices=ENGINES)
    parser.add_argument('--actors', type=int, help='most Ray actors at once')
    parser.add_argument('--device', help='such as cpu or cuda:1; by default a GPU where there is one')
    parser.add_argument('--compile', action='store_true', help='compile the stages first')
    parser.add_argument(
        '--on-bad-image',
        default='record',
        choices=['record', 'fail'],
        help='images that cannot be read: a row with the error, or stop',
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the command; returns what it prints."""
    exported = (Path(args.where) / 'cascade.json').is_file()
    if exported and (args.compile or args.device not in (None, 'cpu')):
        raise ValueError(
            f'{args.where} is an exported folder, which onnxruntime runs; leave out --compile and --device.'
        )
    model: Any
    if exported:
        from ..exporters import ExportedCascade  # whose imports take longer than all others

        model = ExportedCascade(args.where)
    else:
        model = hub.load(args.where).eval().to(args.device or default_device())
    turn_dial(model, args.max_drop, args.rule, args.level)
    if args.compile:
        model.compile(batch_sizes=(args.batch_size,))
    done = predict(
        model,
        args.data,
        args.out,
        split=args.split,
        topk=args.topk,
        batch_size=args.batch_size,
        workers=args.workers,
        unit=args.unit,
        shard=args.shard,
        on_bad_image=args.on_bad_image,
        image_column=args.image_column,
        engine=args.engine,
        actors=args.actors,
    )
    return asdict(done)
