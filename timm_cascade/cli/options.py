"""What several commands share: options for the data and the output, and values written as JSON."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..data import ImageData, load_data
from ..thresholds import OperatingPoint

__all__ = [
    'Commands',
    'data_options',
    'dial_options',
    'exits_value',
    'load_data_of',
    'output_options',
    'turn_dial',
    'value',
]

Commands = Any  # argparse's own type of what add_subparsers returns is private


def value(text: str) -> Any:
    """A JSON value where the text is one, else the text: 0.5, true, "a", [1, 2]."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def exits_value(text: str) -> Any:
    values = [value(t) for t in text.split(',')]
    return values[0] if len(values) == 1 and isinstance(values[0], int) else values


def data_options() -> argparse.ArgumentParser:
    """Options of every command that reads images."""
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument(
        '--data',
        required=True,
        nargs='+',
        help='Image folder, parquet files or a folder of them, save_to_disk or IDX folder, or Hub id.',
    )
    data.add_argument('--label-column', help='Column with the labels, where a data set has several.')
    data.add_argument('--image-column', help='Column with the images, where a data set has several.')
    data.add_argument(
        '--class-order',
        default='natural',
        choices=['natural', 'text'],
        help='Order of class folders and text labels: class10 after class9 as in timm, or as text as in torchvision.',
    )
    data.add_argument(
        '--extensions', nargs='+', metavar='.EXT', help='File types to read in image folders beside .png, .jpg, .jpeg.'
    )
    data.add_argument('--batch-size', type=int, default=256, help='Images per batch, over all processes together.')
    data.add_argument('--workers', type=int, default=0, help='Processes that decode images.')
    data.add_argument(
        '--on-bad-image',
        default='fail',
        choices=['fail', 'skip'],
        help='What happens to images that cannot be read. skip: all are decoded first, those are named and left out.',
    )
    return data


def dial_options() -> argparse.ArgumentParser:
    """Options of every command that sets the thresholds of a release, see `turn_dial`."""
    dial = argparse.ArgumentParser(add_help=False)
    dial.add_argument(
        '--max-drop', type=float, help="Accuracy to give up, as a fraction; else the release's active thresholds."
    )
    dial.add_argument(
        '--rule',
        default='certified',
        choices=['certified', 'joint', 'per_exit'],
        help='How thresholds follow from --max-drop.',
    )
    dial.add_argument('--level', type=float, default=0.9, help='Confidence level of the certified rule.')
    return dial


def turn_dial(model: Any, max_drop: float | None, rule: str, level: float) -> OperatingPoint | None:
    """Sets the thresholds as `dial_options` say, if they say anything."""
    return None if max_drop is None else model.set_max_drop(max_drop, rule=rule, level=level)


def output_options() -> argparse.ArgumentParser:
    """Options of every command that prints a result."""
    out = argparse.ArgumentParser(add_help=False)
    out.add_argument('--json', action='store_true', help='Print the whole result as JSON.')
    return out


def load_data_of(args: argparse.Namespace, split: str | None, labels: bool = True) -> ImageData:
    """The images that the command line names."""
    return load_data(
        args.data,
        split,
        labels,
        args.on_bad_image,
        args.workers,
        image_column=args.image_column,
        label_column=args.label_column,
        class_order=args.class_order,
        extensions=args.extensions,
    )
