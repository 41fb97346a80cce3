"""timm-cascade calibrate: confidence and correctness of every exit on held-out images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import hub
from ..data import match_classes
from ..exporters import MANIFEST, calibrate_exported, read_manifest
from ..measure.calibrate import calibrate
from ..thresholds import Calibration
from ..utils.distributed import create_accelerator
from .options import Commands, data_options, load_data_of, output_options

__all__ = ['add_command', 'run']


def add_command(commands: Commands) -> None:
    """Adds the command and its options."""
    cal = commands.add_parser(
        'calibrate', parents=[data_options(), output_options()], help='measure every exit on held-out images'
    )
    cal.add_argument('folder', help='The release, or a folder that timm-cascade export wrote.')
    cal.add_argument('--split', help='Images that neither backbone nor heads were trained on.')
    cal.add_argument(
        '--no-labels', action='store_true', help='Read no labels; agreement with the full network counts instead.'
    )
    cal.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Runs the command; returns what it prints."""
    if (Path(args.folder) / MANIFEST).is_file():
        return _run_exported(args)
    accelerator = create_accelerator()
    model = hub.load(args.folder)
    data = load_data_of(args, args.split, labels=not args.no_labels)
    calibration = calibrate(model, data, batch_size=args.batch_size, workers=args.workers, accelerator=accelerator)
    main_process = accelerator.is_main_process
    if main_process:
        hub.save(model, args.folder)
    accelerator.end_training()
    if not main_process:
        return None
    return _summary(args, calibration)


def _run_exported(args: argparse.Namespace) -> dict[str, Any]:
    manifest = read_manifest(args.folder)
    data = load_data_of(args, args.split, labels=not args.no_labels)
    data = match_classes(data, manifest.num_classes, manifest.label_names)
    calibration = calibrate_exported(args.folder, data, batch_size=args.batch_size)
    return dict(precision=manifest.precision, **_summary(args, calibration))


def _summary(args: argparse.Namespace, calibration: Calibration) -> dict[str, Any]:
    accuracy = calibration.correct.mean(0)
    return dict(
        folder=args.folder,
        n=calibration.n,
        exits=list(calibration.exits),
        **{'agreement' if args.no_labels else 'accuracy': [round(float(a), 4) for a in accuracy]},
    )
