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

from .. import hub
from ..data import ImageData, check_classes, check_training_classes, load_data
from ..errors import CascadeError
from ..measure.calibrate import calibrate
from ..measure.evaluate import evaluate
from ..measure.profile import profile
from ..model import CascadeModel
from ..training.train import train_heads
from ..utils.distributed import create_accelerator

__all__ = ['main']

_logger = logging.getLogger(__name__)
TAPS, STATE, LOG = 'taps', 'unfinished.pt', 'training.jsonl'  # in the folder of `train --out`


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
    data.add_argument(
        '--data',
        required=True,
        nargs='+',
        help='Hub data set id, image folder, parquet file(s), or a folder of IDX files',
    )
    data.add_argument('--batch-size', type=int, default=256, help='over all processes together')
    data.add_argument('--workers', type=int, default=0, help='processes that decode images')
    data.add_argument(
        '--on-bad-image',
        default='fail',
        choices=['fail', 'skip'],
        help='images that cannot be read: stop, or decode all images once more, name and leave those out',
    )
    out = argparse.ArgumentParser(add_help=False)
    out.add_argument('--json', action='store_true', help='print the result as JSON')

    train = commands.add_parser('train', parents=[data, out], help='train exit heads on a frozen backbone')
    train.add_argument('--model', required=True, help='cascade_NAME[.tag]')
    train.add_argument('--out', required=True, type=Path, help='folder for the release')
    train.add_argument('--split', default='train', help='training images, such as train or train[:50000]')
    train.add_argument('--val-split', help='images to report accuracy on')
    train.add_argument('--checkpoint', help='weights of your fine-tuned backbone')
    train.add_argument(
        '--classifier',
        default='auto',
        choices=['auto', 'train', 'keep'],
        help="the backbone's own: by default it is trained, as the final exit's head, where the data "
        'has other classes than the published weights and there is no --checkpoint',
    )
    train.add_argument('--no-pretrained', action='store_true', help='do not load published backbone weights')
    train.add_argument(
        '--exits',
        type=_exits,
        default=3,
        help='how many, cost fractions, or module names: 3 or 0.25,0.5 or layer1,layer2',
    )
    train.add_argument('--head', type=_value, default='enhanced', help='linear, enhanced, paper or a JSON description')
    train.add_argument('--model-kwargs', nargs='*', default=[], metavar='KEY=VALUE', help='for the backbone')
    train.add_argument('--epochs', type=int, default=20)
    train.add_argument('--lr', type=float, default=2e-3)
    train.add_argument('--weight-decay', type=float, default=0.05)
    train.add_argument('--seed', type=int, default=0)
    train.add_argument(
        '--views', type=int, default=1, help='looks at each image: the first as in evaluation, the others augmented'
    )
    cache = train.add_mutually_exclusive_group()
    cache.add_argument('--cache', type=Path, help=f'folder for what the backbone computes, by default OUT/{TAPS}')
    cache.add_argument('--no-cache', action='store_true', help='keep nothing: the backbone runs in every epoch')
    train.add_argument('--save-every', type=float, default=30.0, help='seconds between two states to continue from')
    train.add_argument('--mixed-precision', choices=['no', 'fp16', 'bf16'])
    train.add_argument('--grad-accum', type=int, default=1, help='batches to a step')
    train.add_argument('--log-with', nargs='*', default=[], help='trackers that Accelerate knows: tensorboard, ...')
    train.set_defaults(run=_train)

    cal = commands.add_parser('calibrate', parents=[data, out], help='measure every exit on held-out images')
    cal.add_argument('folder', help='a release')
    cal.add_argument('--split', help='images that neither backbone nor heads were trained on')
    cal.add_argument('--no-labels', action='store_true', help='count agreement with the full network instead')
    cal.set_defaults(run=_calibrate)

    ev = commands.add_parser('evaluate', parents=[data, out], help='accuracy, MACs, exits and time on test images')
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
    return load_data(args.data if len(args.data) > 1 else args.data[0], split, labels, args.on_bad_image, args.workers)


def _create(args: argparse.Namespace, num_classes: int) -> tuple[CascadeModel, bool]:
    """The cascade, and whether its classifier is new and to be trained."""
    kwargs = {key: _value(value) for key, _, value in (item.partition('=') for item in args.model_kwargs)}
    pretrained = (
        not args.no_pretrained
        and args.checkpoint is None
        and timm.models.is_model_pretrained(args.model.removeprefix('cascade_'))
    )
    try:
        model = timm.create_model(
            args.model,
            pretrained=pretrained,
            num_classes=num_classes,
            exits=args.exits,
            head=args.head,
            checkpoint_path=args.checkpoint,
            **kwargs,
        )
    except RuntimeError as e:  # timm's word for an unknown name or tag, torch's for weights that do not fit
        raise ValueError(
            f'--model {args.model}{f" --checkpoint {args.checkpoint}" if args.checkpoint else ""}: {e}'
        ) from e
    published = pretrained and model.backbone.pretrained_cfg.get('num_classes') == num_classes
    fits = published or args.checkpoint is not None
    train = args.classifier == 'train' or (args.classifier == 'auto' and not fits)
    weights = (
        f'from {args.checkpoint}'
        if args.checkpoint
        else 'the published ones'
        if pretrained
        else 'random: none are published, or none were wanted'
    )
    _logger.info('backbone: weights %s', weights)
    _logger.info(
        'classifier: %s',
        f"new, {num_classes} classes; trained as the final exit's head (linear probe), the "
        'rest of the backbone is not changed'
        if train and not fits
        else 'trained anew (linear probe)'
        if train
        else 'kept as it is'
        if fits
        else 'kept as it is, RANDOM',
    )
    return model, train


def _train(args: argparse.Namespace) -> dict[str, Any] | None:
    from accelerate.utils import set_seed

    if not args.model.startswith('cascade_'):
        raise ValueError(f'--model {args.model} is no cascade; did you mean cascade_{args.model}?')
    accelerator = create_accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.grad_accum,
        log_with=args.log_with or None,
        project_dir=str(args.out),
    )
    logging.getLogger(__package__).setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    set_seed(args.seed)  # fresh heads are part of the recipe
    train = _load_data(args, args.split)
    val = _load_data(args, args.val_split) if args.val_split else None
    check_training_classes(train)
    if val is not None:
        check_classes(val, len(train.class_names), train.class_names)
    model, classifier = _create(args, len(train.class_names))
    model.label_names = train.class_names
    if args.log_with:
        accelerator.init_trackers('timm-cascade', {k: str(v) for k, v in vars(args).items() if k != 'run'})
    history = train_heads(
        model,
        train,
        val,
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
        weight_decay=args.weight_decay,
        workers=args.workers,
        views=args.views,
        classifier=classifier,
        cache=False if args.no_cache else args.cache or args.out / TAPS,
        state=args.out / STATE,
        save_every=args.save_every,
        log=args.out / LOG,
        accelerator=accelerator,
    )
    main_process, processes = accelerator.is_main_process, accelerator.num_processes
    if main_process:
        hub.save(model, args.out)
        (args.out / STATE).unlink()  # not before the release is there: whoever is stopped here only saves again
    accelerator.end_training()
    if not main_process:
        return None
    return dict(
        folder=str(args.out), processes=processes, images=len(train), classifier_trained=classifier, **history[-1]
    )


def _calibrate(args: argparse.Namespace) -> dict[str, Any] | None:
    accelerator = create_accelerator()
    model = hub.load(args.folder)
    data = _load_data(args, args.split, labels=not args.no_labels)
    check_classes(data, model.num_classes, model.label_names)
    calibration = calibrate(model, data, batch_size=args.batch_size, workers=args.workers, accelerator=accelerator)
    main_process = accelerator.is_main_process
    if main_process:
        hub.save(model, args.folder)
    accelerator.end_training()
    if not main_process:
        return None
    accuracy = calibration.correct.mean(0)
    return dict(
        folder=args.folder,
        n=len(data),
        exits=list(calibration.exits),
        **{'agreement' if args.no_labels else 'accuracy': [round(float(a), 4) for a in accuracy]},
    )


def _evaluate(args: argparse.Namespace) -> dict[str, Any]:
    model = hub.load(args.where)
    data = _load_data(args, args.split)
    check_classes(data, model.num_classes, model.label_names)
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
            f'exit {x} can save no time here, whoever leaves'
            for x, b in zip(p.exits, p.break_even, strict=True)
            if b >= 1
        ],
    )


def _info(args: argparse.Namespace) -> dict[str, Any]:
    model = hub.load(args.where)
    return dict(
        architecture=model.pretrained_cfg['architecture'],
        backbone=None if model.published is None else model.published.to_dict(),
        num_classes=model.num_classes,
        label_names=model.label_names,
        input_size=list(hub.binding(model)['input_size']),
        exits=[
            dict(module=p.module, fraction=round(p.fraction, 4), layout=p.layout, channels=p.channels, cut=p.cut)
            for p in model.exits
        ],
        stage_macs=model.stage_macs().tolist(),
        backbone_macs=model.exits[-1].total,
        heads_hash=model.heads_hash(),
        thresholds=[None if t == float('inf') else t for t in model.thresholds.tolist()],
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


def _push(args: argparse.Namespace) -> dict[str, Any]:
    done = hub.push_to_hub(
        args.folder,
        args.repo,
        private=args.private,
        revision=args.revision,
        create_pr=args.create_pr,
        tag=args.tag,
        commit_message=args.message,
    )
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
