"""Assembles the commands, runs one, and prints what it returns."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from ..errors import CascadeError
from .output import show

__all__ = ['main']

COMMANDS = ('train', 'calibrate', 'evaluate', 'export', 'predict', 'serve', 'suggest', 'profile', 'info', 'push')


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='timm-cascade', description='Early exits for every timm model.')
    commands = parser.add_subparsers(dest='command', required=True)
    for name in COMMANDS:
        import_module(f'.{name}_command', __package__).add_command(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status, 2 for a request that cannot be met."""
    logging.basicConfig(level=logging.WARNING, format='%(message)s')
    args = _parser().parse_args(argv)
    formatted = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f'{message}\n'  # users of commands see no lines of code
    try:
        result = args.run(args)
    except (ValueError, OSError, CascadeError) as e:
        print(f'timm-cascade {args.command}: {e}', file=sys.stderr)
        return 2
    finally:
        warnings.formatwarning = formatted
    if result is None:  # another process prints it
        return 0
    show(result, args.json)
    return 0
