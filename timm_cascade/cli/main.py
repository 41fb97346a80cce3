"""Assembles the commands, runs one, and prints what it returns."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

from ..errors import CascadeError
from . import (
    calibrate_command,
    evaluate_command,
    info_command,
    predict_command,
    profile_command,
    push_command,
    train_command,
)

__all__ = ['main']

COMMANDS = (
    train_command,
    calibrate_command,
    evaluate_command,
    predict_command,
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


def _show(result: dict[str, Any], indent: str = '') -> None:
    for key, value in result.items():
        if isinstance(value, dict):
            print(f'{indent}{key}:')
            _show(value, indent + '  ')
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            print(f'{indent}{key}:')
            for item in value:
                print(f'{indent}  ' + '  '.join(f'{k}={v}' for k, v in item.items()))
        else:
            print(f'{indent}{key}: {value}')


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
    if args.json:
        print(json.dumps(result))
    else:
        _show(result)
    return 0
