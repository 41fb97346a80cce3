"""timm-cascade evaluate: accuracy, MACs, exits and time on test images."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from .. import hub
from ..data import check_classes
from ..measure.evaluate import evaluate
from .options import Commands, data_options, load_data_of, output_options

__all__ = ['add_command', 'run']


def add_command(commands: Commands) -> None:
    """Adds the command and its options."""
    ev = commands.add_parser(
        'evaluate', parents=[data_options(), output_options()], help='accuracy, MACs, exits and time on test images'
    )
    ev.add_argument('where', metavar='FOLDER|REPO')
    ev.add_argument('--split', help='test images')
    ev.add_argument('--max-drop', type=float, help="turn the dial first; else the release's active thresholds")
    ev.add_argument('--rule', default='certified', choices=['certified', 'joint', 'per_exit'])
    ev.add_argument('--level', type=float, default=0.9)
    ev.add_argument(
        '--every-exit',
        action='store_true',
        help='accuracy and AUROC of each exit on all images, and the best any policy could do',
    )
    ev.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the command; returns what it prints."""
    model = hub.load(args.where)
    data = load_data_of(args, args.split)
    check_classes(data, model.num_classes, model.label_names)
    point = None
    if args.max_drop is not None:
        point = model.set_max_drop(args.max_drop, rule=args.rule, level=args.level).to_dict()
    model.to('cuda' if torch.cuda.is_available() else 'cpu')
    report = evaluate(model, data, batch_size=args.batch_size, workers=args.workers, every_exit=args.every_exit)
    return dict(point=point, **report.to_dict())
