"""timm-cascade suggest: which networks would save the most in front of a large one."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

import timm

from .. import hub
from ..data import ImageData
from ..measure.suggest import MAX_DROPS, RULES, Suggestion, suggest
from ..model import CascadeModel
from .backbone_options import create_cascade, network_options
from .options import Commands, data_options, load_data_of, output_options

__all__ = ['add_command', 'run']

DESCRIPTION = """\
Runs the large network and each candidate once over labelled images, and prints what the dial would save with each
candidate, each pair, and each of these with the exits of a release, best first, with the commands that build the first.
Nothing is trained. Calibrate what you choose on other images than those it was chosen on.
"""


def add_command(commands: Commands) -> None:
    """Adds the command and its options."""
    parser = commands.add_parser(
        'suggest',
        parents=[
            data_options(),
            network_options('Name of the large network, cascade_NAME[.TAG], or a release with trained heads.'),
            output_options(),
        ],
        description=DESCRIPTION,
        help='which networks would save the most in front of a large one',
    )
    parser.add_argument(
        '--candidates',
        nargs='+',
        required=True,
        metavar='NAME[@SIZE]',
        help='Networks to compare: timm names, hf-hub:USER/NAME or local-dir:FOLDER; @160 shows one smaller images.',
    )
    parser.add_argument('--split', help='Images that none of the networks was trained on.')
    parser.add_argument(
        '--exits', help='Exits of a release that may be used: their modules as layer1,layer2, or 0. Default: all.'
    )
    parser.add_argument('--level', type=float, default=0.9, help='Confidence level of the certified rule.')
    parser.add_argument(
        '--work-dir', type=Path, help='Folder for what each network said; the same command continues from there.'
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the command; returns what it prints."""
    data = load_data_of(args, args.split)
    named = args.model.startswith('cascade_') and not Path(args.model).exists()
    if named and args.exits not in (None, '0'):
        raise ValueError(
            f'--exits {args.exits}: the heads of a new {args.model} are not trained. Train them (timm-cascade train) '
            f'and give the release as --model.'
        )
    model = _large_network(args, data) if named else hub.load(args.model)
    exits = None if args.exits is None else [] if args.exits == '0' else args.exits.split(',')
    found = suggest(
        model,
        args.candidates,
        data,
        exits=[] if named else exits,
        level=args.level,
        pretrained=not args.no_pretrained,
        batch_size=args.batch_size,
        workers=args.workers,
        work_dir=args.work_dir,
    )
    best = found[0]
    pays = any(share > 0 for share in best.saved.values())
    return dict(
        model=args.model,
        images=len(data),
        accuracy=round(best.accuracy[-1], 4),
        backbone_macs=best.backbone_macs,
        candidates=[
            dict(
                network=s.names[0],
                macs=s.macs[0],
                share=round(s.macs[0] / s.backbone_macs, 4),
                accuracy=round(s.accuracy[0], 4),
            )
            for s in sorted(found, key=lambda s: s.macs)
            if len(s.front) == 1 and not s.exits
        ],
        share_of_macs_saved=[_row(s) for s in found],
        build=_commands(args, best, named) if pays else ['nothing: no candidate saves anything at these settings'],
    )


def _row(suggestion: Suggestion) -> dict[str, Any]:
    saved = {
        f'{rule} {100 * d:g} points': round(suggestion.saved[rule, d], 4) for d in MAX_DROPS for rule in reversed(RULES)
    }
    return dict(front=' + '.join(suggestion.names) or '-', exits=', '.join(suggestion.exits) or '-', **saved)


def _large_network(args: argparse.Namespace, data: ImageData) -> CascadeModel:
    """The cascade of the options; its heads are not used.

    Raises:
        ValueError: The network has not learned the classes of the data.
    """
    plain = dict(exits=1, front=None, head='linear', classifier='keep')
    model, _ = create_cascade(argparse.Namespace(**{**vars(args), **plain}), len(data.class_names))
    published = not args.no_pretrained and timm.models.is_model_pretrained(args.model.removeprefix('cascade_'))
    own = model.backbone.pretrained_cfg.get('num_classes') if published else 'no'
    if args.checkpoint is None and own != len(data.class_names):
        raise ValueError(
            f'--model {args.model} has published weights for {own} classes, {data.title} has {len(data.class_names)}: '
            f'it cannot answer for these. Give a network that was trained on them, with --checkpoint FILE or as a '
            f'release.'
        )
    return model


def _commands(args: argparse.Namespace, best: Suggestion, named: bool) -> list[str]:
    """What builds the suggested cascade and calibrates it."""
    if not best.front:
        return ['nothing: no network in front of this release saves more than its exits alone']
    out = f'{Path(args.model).name}.fronts'
    data = ['--data', *args.data, *(['--split', args.split] if args.split else [])]
    kept = ('checkpoint', 'img_size', 'in_chans', 'crop_pct', 'mean', 'std', 'interpolation', 'model_kwargs')
    if named:
        options = []
        for key in (*kept, 'image_column', 'label_column', 'extensions'):
            value = getattr(args, key)
            if value:
                values = value if isinstance(value, list) else [value]
                options += [f'--{key.replace("_", "-")}', *map(str, values)]
        options += ['--class-order', args.class_order] if args.class_order != 'natural' else []
        built = ['timm-cascade', 'train', '--model', args.model, *options, '--front', *best.front, '--exits', '0']
        built += [*data, '--out', out]
    else:
        source = 'local-dir' if Path(args.model).is_dir() else 'hf-hub'
        exits = '' if best.exits else ', exits=0'
        code = (
            f'import timm, timm_cascade; timm_cascade.save(timm.create_model({f"{source}:{args.model}"!r}, '
            f'pretrained=True, front={list(best.front)!r}{exits}), {out!r})'
        )
        built = ['python', '-c', code]
    calibrated = ['timm-cascade', 'calibrate', out, '--data', *args.data, '--split', 'OTHER_IMAGES']
    return [shlex.join(built), shlex.join(calibrated)]
