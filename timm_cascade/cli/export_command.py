"""timm-cascade export: a release as files that run without torch."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from .. import hub
from ..data import load_data
from ..exporters import export, read_manifest
from .options import Commands, output_options

__all__ = ['add_command', 'run']


def add_command(commands: Commands) -> None:
    """Adds the command and its options."""
    exp = commands.add_parser('export', parents=[output_options()], help='write a release as files without torch')
    exp.add_argument('where', metavar='FOLDER|REPO', help='a release')
    exp.add_argument('--out', required=True, type=Path, help='folder to write; must not exist')
    exp.add_argument('--format', default='onnx', choices=['onnx', 'pt2'], help='pt2: torch.export programs')
    exp.add_argument('--opset', type=int, help='version of the ONNX operators; by default 18')
    size = exp.add_mutually_exclusive_group()
    size.add_argument('--dynamic-batch', action='store_true', help='stages take any number of images (the default)')
    size.add_argument('--batch-size', type=int, help='stages take exactly this many images')
    exp.add_argument('--fp16', action='store_true', help='compute in half precision; calibrate the files afterwards')
    exp.add_argument(
        '--int8', action='store_true', help='quantise with images of --data; calibrate the files afterwards'
    )
    exp.add_argument('--data', nargs='+', help='for --int8: images like those to come, as the other commands take them')
    exp.add_argument('--split', help='for --int8: which of them')
    exp.add_argument(
        '--single-file',
        default='image',
        choices=['image', 'batch', 'none'],
        help='also write cascade.onnx, all stages in one file: for one image, or for batches too',
    )
    exp.add_argument('--web', action='store_true', help='also write a page that runs it in a browser (npm is needed)')
    exp.add_argument('--samples', nargs='+', default=[], help='for --web: image files or folders of them')
    exp.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the command; returns what it prints."""
    if args.int8 and not args.data:
        raise ValueError('--int8 measures ranges on images; name some with --data, training images will do.')
    if not args.int8 and (args.data or args.split):
        raise ValueError('--data and --split are for --int8, which is not given; add it, or leave them out.')
    images = None
    if args.int8:
        images = load_data(args.data, args.split, labels=False)
    folder = export(
        hub.load(args.where).eval(),
        args.out,
        args.format,
        opset=args.opset,
        batch_size=args.batch_size,
        fp16=args.fp16,
        int8=images,
        single_file=None if args.single_file == 'none' else args.single_file,
        web=args.web,
        samples=args.samples,
    )
    manifest = read_manifest(folder)
    return dict(
        folder=str(folder),
        precision=manifest.precision,
        opset=manifest.opset,
        stages=[dict(file=s.file, bytes=s.bytes, exit=s.exit, macs=round(s.macs)) for s in manifest.stages],
        others=sorted(manifest.others),
        calibrated=manifest.table_precision == manifest.precision,
        run=f'python {shlex.quote(str(folder / "runner.py"))} IMAGE --max-drop 0.01'
        if manifest.kind == 'onnx'
        else None,
    )
