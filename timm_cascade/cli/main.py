"""Assembles the commands, runs one, and prints what it returns."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from ..errors import CascadeError
from . import (
    calibrate_command,
    evaluate_command,
    export_command,
    info_command,
    predict_command,
    profile_command,
    push_command,
    serve_command,
    suggest_command,
    train_command,
)
from .output import show

__all__ = ['main']

COMMANDS = (
    train_command,
    calibrate_command,
    evaluate_command,
    export_command,
    predict_command,
    serve_command,
    suggest_command,
    profile_command,
    info_command,
    push_command,
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='timm-cascade', description='Early exits for every timm model.')
    commands = parser.add_subparsers(dest='command', required=True)
    for module in COMMANDS:
        module.add_command(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status, 2 for a request that cannot be met."""
    logging.basicConfig(level=logging.WARNING, format='%(message)s')
    args = _parser().parse_args(argv)
    try:
        result = args.run(args)
    except (ValueError, OSError, CascadeError) as e:
        print(f'timm-cascade {args.command}: {e}', file=sys.stderr)
        return 2
    if result is None:  # another process prints it
        return 0
    show(result, args.json)
    return 0
