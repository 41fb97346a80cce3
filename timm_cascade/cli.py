"""The command line: train, calibrate, evaluate, profile, info, push."""
from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from . import hub
from .calibration import calibrate
from .data import ImageData, load_data
from .evaluation import evaluate
from .model import CascadeModel, NotCalibratedError
from .profiling import profile
from .training import train_heads

__all__ = ['main']


def _value(text: str) -> Any:
    """A JSON value where the text is one, else the text: 0.5, true, "a", [1, 2]."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _exits(text: str) -> Any:
    values = [_value(t) for t in text.split(',')]
    return values[0] if len(values) == 1 and isinstance(values[0], int) else values


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='timm-cascade', description='Early exits for every timm model.')
    commands = parser.add_subparsers(dest='command', required=True)
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument('--data', required=True, nargs='+',
                      help='Hub data set id, image folder, parquet file(s), or a folder of IDX files')
    data.add_argument('--batch-size', type=int, default=256, help='over all processes together')
    data.add_argument('--workers', type=int, default=0, help='processes that decode images')
    out = argparse.ArgumentParser(add_help=False)
    out.add_argument('--json', action='store_true', help='print the result as JSON')

    train = commands.add_parser('train', parents=[data, out], help='train exit heads on a frozen backbone')
    train.add_argument('--model', required=True, help='cascade_NAME[.tag]')
    train.add_argument('--out', required=True, type=Path, help='folder for the release')
    train.add_argument('--split', default='train', help='training images, such as train or train[:50000]')
    train.add_argument('--val-split', help='images to report accuracy on')
    train.add_argument('--checkpoint', help='weights of your fine-tuned backbone')
    train.add_argument('--no-pretrained', action='store_true', help='do not load published backbone weights')
    train.add_argument('--exits', type=_exits, default=3, help='how many, cost fractions, or module names: 3 or '
                                                               '0.25,0.5 or layer1,layer2')
    train.add_argument('--head', type=_value, default='enhanced', help='linear, enhanced, paper or a JSON description')
    train.add_argument('--model-kwargs', nargs='*', default=[], metavar='KEY=VALUE', help='for the backbone')
    train.add_argument('--epochs', type=int, default=20)
    train.add_argument('--lr', type=float, default=2e-3)
    train.add_argument('--weight-decay', type=float, default=0.05)
    train.add_argument('--seed', type=int, default=0)
    train.set_defaults(run=_train)

    cal = commands.add_parser('calibrate', parents=[data, out], help='measure every exit on held-out images')
    cal.add_argument('folder', help='a release')
    cal.add_argument('--split', help='images that neither backbone nor heads were trained on')
    cal.add_argument('--no-labels', action='store_true', help='count agreement with the full network instead')
    cal.set_defaults(run=_calibrate)

    ev = commands.add_parser('evaluate', parents=[data, out], help='accuracy, MACs, exits and time on test images')
    ev.add_argument('where', metavar='FOLDER|REPO')
    ev.add_argument('--split', help='test images')
    ev.add_argument('--max-drop', type=float, help='turn the dial first; else the release\'s active thresholds')
    ev.add_argument('--rule', default='certified', choices=['certified', 'joint', 'per_exit'])
    ev.add_argument('--level', type=float, default=0.9)
    ev.add_argument('--every-exit', action='store_true', help='accuracy and AUROC of each exit on all images, and the '
                                                              'best any policy could do')
    ev.set_defaults(run=_evaluate)

    prof = commands.add_parser('profile', parents=[out], help='what stages, heads and cuts cost by the clock here')
    prof.add_argument('where', metavar='FOLDER|REPO|cascade_NAME', help='a release; or a name, with random weights')
    prof.add_argument('--batch-size', type=int, default=64)
    prof.add_argument('--repeats', type=int, default=20)
    prof.add_argument('--dtype', choices=['float32', 'bfloat16', 'float16'], default='float32')
    prof.add_argument('--compile', action='store_true', help='compile the stages first')
    prof.set_defaults(run=_profile)

    info = commands.add_parser('info', parents=[out], help='what a release is')
    info.add_argument('where', metavar='FOLDER|REPO')
    info.set_defaults(run=_info)

    push = commands.add_parser('push', parents=[out], help='upload a release to the Hub')
    push.add_argument('folder')
    push.add_argument('repo', metavar='user/repo')
    push.add_argument('--private', action='store_true', help='for a repository that is made')
    push.add_argument('--revision', help='branch')
    push.add_argument('--create-pr', action='store_true', help='open a pull request')
    push.add_argument('--tag', help='git tag for the commit')
    push.add_argument('--message', help='of the commit')
    push.set_defaults(run=_push)
    return parser


def _load_data(args: argparse.Namespace, split: str | None, labels: bool = True) -> ImageData:
    return load_data(args.data if len(args.data) > 1 else args.data[0], split, labels)


def _same_classes(model: CascadeModel, data: ImageData) -> None:
    if len(data.class_names) > model.num_classes:
        raise ValueError(f'{data.source} has {len(data.class_names)} classes, the model {model.num_classes}.')


def _train(args: argparse.Namespace) -> dict[str, Any]:
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    if not args.model.startswith('cascade_'):
        raise ValueError(f'--model {args.model} is no cascade; did you mean cascade_{args.model}?')
    set_seed(args.seed)  # fresh heads are part of the recipe
    train = _load_data(args, args.split)
    val = _load_data(args, args.val_split) if args.val_split else None
    accelerator = Accelerator()
    kwargs = {key: _value(value) for key, _, value in (item.partition('=') for item in args.model_kwargs)}
    pretrained = not args.no_pretrained and args.checkpoint is None and timm.models.is_model_pretrained(
        args.model.removeprefix('cascade_'))
    try:
        model = timm.create_model(
            args.model, pretrained=pretrained, num_classes=len(train.class_names), exits=args.exits, head=args.head,
            checkpoint_path=args.checkpoint, **kwargs)
    except RuntimeError as e:  # timm's word for an unknown name or tag
        raise ValueError(f'--model {args.model}: {e}') from e
    model.label_names = train.class_names
    history = train_heads(
        model, train, val, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, seed=args.seed,
        weight_decay=args.weight_decay, workers=args.workers, log=args.out / 'training.jsonl',
        accelerator=accelerator)
    if accelerator.is_main_process:
        hub.save(model, args.out)
    return dict(folder=str(args.out), processes=accelerator.num_processes, images=len(train), **history[-1])


def _calibrate(args: argparse.Namespace) -> dict[str, Any]:
    model = hub.load(args.folder)
    data = _load_data(args, args.split, labels=not args.no_labels)
    _same_classes(model, data)
    calibration = calibrate(model, data, batch_size=args.batch_size, workers=args.workers)
    hub.save(model, args.folder)
    accuracy = calibration.correct.mean(0)
    return dict(folder=args.folder, n=len(data), exits=list(calibration.exits),
                **{'agreement' if args.no_labels else 'accuracy': [round(float(a), 4) for a in accuracy]})


def _evaluate(args: argparse.Namespace) -> dict[str, Any]:
    model = hub.load(args.where)
    data = _load_data(args, args.split)
    _same_classes(model, data)
    point = None
    if args.max_drop is not None:
        point = model.set_max_drop(args.max_drop, rule=args.rule, level=args.level).to_dict()
    model.to('cuda' if torch.cuda.is_available() else 'cpu')
    report = evaluate(model, data, batch_size=args.batch_size, workers=args.workers, every_exit=args.every_exit)
    return dict(point=point, **report.to_dict())


def _profile(args: argparse.Namespace) -> dict[str, Any]:
    folder = Path(args.where)
    if args.where.startswith('cascade_') and not folder.is_dir():
        model = timm.create_model(args.where)
    else:
        model = hub.load(args.where)
    model.eval().to('cuda' if torch.cuda.is_available() else 'cpu', getattr(torch, args.dtype))
    if args.compile:
        model.compile(batch_sizes=(args.batch_size,))
    p = profile(model, batch_size=args.batch_size, repeats=args.repeats)
    if folder.is_dir():
        hub.save_profiles(model, folder)
    time, macs = np.cumsum(p.stage_seconds), [x.fraction for x in model.exits]
    return dict(
        device=p.device, dtype=p.dtype, batch_size=p.batch_size, compiled=p.compiled,
        backbone_ms=round(1e3 * p.backbone_seconds, 4), stages_over_backbone=round(time[-1] / p.backbone_seconds, 3),
        exits=[dict(module=x.module, macs_share=round(macs[i], 3), time_share=round(time[i] / time[-1], 3),
                    head_ms=round(1e3 * p.head_seconds[i], 4), cut_ms=round(1e3 * p.cut_seconds[i], 4),
                    pays_from=round(p.break_even[i], 4), cut_pays_from=round(p.cut_share[i], 4))
               for i, x in enumerate(model.exits)],
        saved=str(folder) if folder.is_dir() else None,
        notes=model.exits_without_time() + [
            f'exit {x} can save no time here, whoever leaves' for x, b in zip(p.exits, p.break_even, strict=True)
            if b >= 1])


def _info(args: argparse.Namespace) -> dict[str, Any]:
    model = hub.load(args.where)
    return dict(
        architecture=model.pretrained_cfg['architecture'],
        backbone=None if model.published is None else model.published.to_dict(), num_classes=model.num_classes,
        label_names=model.label_names, input_size=list(hub.binding(model)['input_size']),
        exits=[dict(module=p.module, fraction=round(p.fraction, 4), layout=p.layout, channels=p.channels, cut=p.cut)
               for p in model.exits],
        stage_macs=model.stage_macs().tolist(), backbone_macs=model.exits[-1].total, heads_hash=model.heads_hash(),
        thresholds=[None if t == float('inf') else t for t in model.thresholds.tolist()],
        calibrated_on=None if model.calibration is None else
        dict(n=len(model.calibration.confidence), **model.calibration.provenance),
        table=None if model.table is None else
        [dict(rule=p.rule, max_drop=p.max_drop, drop=round(p.drop, 4), macs=round(p.cost_share, 4),
              exit_shares=[round(s, 3) for s in p.exit_shares], n=p.measured_on, certified=p.certified)
         for p in model.table.points])


def _push(args: argparse.Namespace) -> dict[str, Any]:
    done = hub.push_to_hub(
        args.folder, args.repo, private=args.private, revision=args.revision, create_pr=args.create_pr, tag=args.tag,
        commit_message=args.message)
    return dict(commit=done.url, files=list(done.files), pull_request=done.pull_request)


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
    except (ValueError, OSError, NotCalibratedError) as e:
        print(f'timm-cascade {args.command}: {e}', file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(result))
    else:
        _show(result)
    return 0
