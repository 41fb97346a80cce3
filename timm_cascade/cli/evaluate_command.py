"""timm-cascade evaluate: accuracy, MACs, exits and time on test images."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import hub
from ..measure.curve import curve, plot_curve
from ..measure.evaluate import evaluate
from ..measure.report import write_report
from ..utils.clock import default_device
from .options import Commands, data_options, dial_options, load_data_of, output_options, turn_dial

__all__ = ['add_command', 'run']


def add_command(commands: Commands) -> None:
    """Adds the command and its options."""
    parser = commands.add_parser(
        'evaluate',
        parents=[data_options(), dial_options(), output_options()],
        description='Runs a release and its plain backbone side by side on test images.',
        help='accuracy, MACs, exits and time on test images',
    )
    parser.add_argument('where', metavar='FOLDER|REPO', help='The release.')
    parser.add_argument('--split', help='Test images.')
    parser.add_argument(
        '--every-exit',
        action='store_true',
        help='Also print accuracy and AUROC of each exit on all images, and the best that any thresholds could do.',
    )
    parser.add_argument(
        '--curve',
        nargs='?',
        const='',
        metavar='PICTURE',
        help='Also print accuracy against cost for every budget; with a file name, draw it (needs matplotlib).',
    )
    parser.add_argument(
        '--report',
        type=Path,
        metavar='FILE.html',
        help='Also write a page with the curve, images per exit, accuracy per class, confusions and the certificate.',
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the command; returns what it prints."""
    if args.curve:
        _check_picture(Path(args.curve))
    model = hub.load(args.where)
    data = load_data_of(args, args.split)
    point = turn_dial(model, args.max_drop, args.rule, args.level)
    model.to(default_device())
    report = evaluate(model, data, batch_size=args.batch_size, workers=args.workers, every_exit=args.every_exit)
    result = dict(point=point and point.to_dict(), **report.to_dict())
    if args.curve is not None:
        points = curve(model, data, batch_size=args.batch_size, workers=args.workers)
        if args.curve:
            plot_curve(points, args.curve)
        best = max(points, key=lambda p: (p.accuracy, -p.macs_share))
        result.update(curve=[asdict(p) for p in points], most_accurate=asdict(best))
    if args.report is not None:
        write_report(model, data, args.report, batch_size=args.batch_size, workers=args.workers)
        result['report'] = str(args.report)
    return result


def _check_picture(path: Path) -> None:
    """Refuses a picture that could not be drawn, before anything long starts."""
    if path.suffix not in ('.png', '.pdf', '.svg'):
        raise ValueError(f'--curve {path}: expected a file name that ends in .png, .pdf or .svg.')
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise ValueError(f'--curve {path} needs matplotlib: pip install "timm-cascade[demo]".') from e
