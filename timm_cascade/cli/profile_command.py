"""timm-cascade profile: the time of stages, heads and cuts on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from .. import hub
from ..measure.profile import profile
from ..utils.clock import default_device
from .options import Commands, output_options

__all__ = ['add_command', 'run']


def add_command(commands: Commands) -> None:
    """Adds the command and its options."""
    prof = commands.add_parser(
        'profile', parents=[output_options()], help='time of stages, heads and cuts on this machine'
    )
    prof.add_argument('where', metavar='FOLDER|REPO|cascade_NAME', help='A release; or a name, with random weights.')
    prof.add_argument('--batch-size', type=int, default=64, help='Images per batch.')
    prof.add_argument('--repeats', type=int, default=20, help='Measurements; the medians are kept.')
    prof.add_argument('--dtype', choices=['float32', 'bfloat16', 'float16'], default='float32', help='Precision.')
    prof.add_argument('--compile', action='store_true', help='Compile the stages first.')
    prof.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the command; returns what it prints."""
    folder = Path(args.where)
    if args.where.startswith('cascade_') and not folder.is_dir():
        model = timm.create_model(args.where)
    else:
        model = hub.load(args.where)
    model.eval().to(default_device(), getattr(torch, args.dtype))
    if args.compile:
        model.compile(batch_sizes=(args.batch_size,))
    p = profile(model, batch_size=args.batch_size, repeats=args.repeats)
    if folder.is_dir():
        hub.save_profiles(model, folder)
    time, macs = np.cumsum(p.stage_seconds), [x.fraction for x in model.exits]
    return dict(
        device=p.device,
        dtype=p.dtype,
        batch_size=p.batch_size,
        compiled=p.compiled,
        backbone_ms=round(1e3 * p.backbone_seconds, 4),
        stages_over_backbone=round(time[-1] / p.backbone_seconds, 3),
        exits=[
            dict(
                module=x.module,
                macs_share=round(macs[i], 3),
                time_share=round(time[i] / time[-1], 3),
                head_ms=round(1e3 * p.head_seconds[i], 4),
                cut_ms=round(1e3 * p.cut_seconds[i], 4),
                pays_from=round(p.break_even[i], 4),
                cut_pays_from=round(p.cut_share[i], 4),
            )
            for i, x in enumerate(model.exits)
        ],
        saved=str(folder) if folder.is_dir() else None,
        notes=model.exits_without_time()
        + [
            f'exit {x} can save no time here, whatever share of the images exits'
            for x, b in zip(p.exits, p.break_even, strict=True)
            if b >= 1
        ],
    )
