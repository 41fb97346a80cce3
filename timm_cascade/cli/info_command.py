"""timm-cascade info: what a release holds."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from .. import hub
from ..hub.card import members
from ..utils.files import plain
from .options import Commands, output_options

__all__ = ['add_command', 'run']


def add_command(commands: Commands) -> None:
    """Adds the command and its options."""
    info = commands.add_parser('info', parents=[output_options()], help='what a release holds')
    info.add_argument('where', metavar='FOLDER|REPO', help='The release.')
    info.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the command; returns what it prints."""
    model = hub.load(args.where)
    return dict(
        architecture=model.pretrained_cfg['architecture'],
        backbone=None if model.published is None else asdict(model.published),
        num_classes=model.num_classes,
        label_names=model.label_names,
        input_size=list(model.provenance()['input_size']),
        **({'members': members(model)} if model.fronts else {}),
        exits=[
            dict(module=p.module, fraction=round(p.fraction, 4), layout=p.layout, channels=p.channels, cut=p.cut)
            for p in model.exits
        ],
        stage_macs=model.stage_macs().tolist(),
        backbone_macs=model.exits[-1].total,
        heads_hash=model.heads_hash(),
        thresholds=plain(model.thresholds.tolist()),
        calibrated_on=None
        if model.calibration is None
        else dict(n=len(model.calibration.confidence), **model.calibration.provenance),
        table=None
        if model.table is None
        else [
            dict(
                rule=p.rule,
                max_drop=p.max_drop,
                drop=round(p.drop, 4),
                macs=round(p.cost_share, 4),
                exit_shares=[round(s, 3) for s in p.exit_shares],
                n=p.measured_on,
                certified=p.certified,
            )
            for p in model.table.points
        ],
    )
