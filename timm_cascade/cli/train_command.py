"""timm-cascade train: exit heads on a frozen backbone."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import timm

from .. import hub
from ..data import check_classes, check_training_classes
from ..model import CascadeModel
from ..training.train import train_heads
from ..utils.distributed import create_accelerator
from .options import Commands, data_options, exits_value, load_data_of, output_options, value

__all__ = ['add_command', 'run']

_logger = logging.getLogger(__name__)


def add_command(commands: Commands) -> None:
    """Adds the command and its options."""
    train = commands.add_parser(
        'train', parents=[data_options(), output_options()], help='train exit heads on a frozen backbone'
    )
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
        type=exits_value,
        default=3,
        help='how many, cost fractions, or module names: 3 or 0.25,0.5 or layer1,layer2',
    )
    train.add_argument('--head', type=value, default='enhanced', help='linear, enhanced, paper or a JSON description')
    train.add_argument('--model-kwargs', nargs='*', default=[], metavar='KEY=VALUE', help='for the backbone')
    train.add_argument('--epochs', type=int, default=20)
    train.add_argument('--lr', type=float, default=2e-3)
    train.add_argument('--weight-decay', type=float, default=0.05)
    train.add_argument('--seed', type=int, default=0)
    train.add_argument(
        '--views', type=int, default=1, help='looks at each image: the first as in evaluation, the others augmented'
    )
    train.add_argument(
        '--work-dir',
        type=Path,
        help='folder for stored features, the state to continue from and the log; by default OUT itself. Several '
        'trainings of one backbone can share it, one after the other',
    )
    train.add_argument(
        '--no-cache', action='store_true', help='store no features; the backbone then runs in every epoch'
    )
    train.add_argument('--mixed-precision', choices=['no', 'fp16', 'bf16'])
    train.add_argument('--grad-accum', type=int, default=1, help='batches to a step')
    train.add_argument('--log-with', nargs='*', default=[], help='trackers that Accelerate knows: tensorboard, ...')
    train.set_defaults(run=run)


def _create(args: argparse.Namespace, num_classes: int) -> tuple[CascadeModel, bool]:
    """The cascade, and whether its classifier is new and to be trained."""
    kwargs = {key: value(text) for key, _, text in (item.partition('=') for item in args.model_kwargs)}
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


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Runs the command; returns what it prints."""
    from accelerate.utils import set_seed

    if not args.model.startswith('cascade_'):
        raise ValueError(f'--model {args.model} is no cascade; did you mean cascade_{args.model}?')
    accelerator = create_accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.grad_accum,
        log_with=args.log_with or None,
        project_dir=str(args.out),
    )
    logging.getLogger('timm_cascade').setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    set_seed(args.seed)  # fresh heads are part of the recipe
    train = load_data_of(args, args.split)
    val = load_data_of(args, args.val_split) if args.val_split else None
    check_training_classes(train)
    if val is not None:
        check_classes(val, len(train.class_names), train.class_names)
    model, classifier = _create(args, len(train.class_names))
    model.label_names = train.class_names
    if args.log_with:
        accelerator.init_trackers('timm-cascade', {k: str(v) for k, v in vars(args).items() if k != 'run'})
    work_dir = args.work_dir or args.out
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
        work_dir=work_dir,
        cache=not args.no_cache,
        accelerator=accelerator,
    )
    main_process, processes = accelerator.is_main_process, accelerator.num_processes
    if main_process:
        hub.save(model, args.out)
        (work_dir / 'heads.pt').unlink()  # only now: a command that is killed before has to save again, and no more
    accelerator.end_training()
    if not main_process:
        return None
    return dict(
        folder=str(args.out), processes=processes, images=len(train), classifier_trained=classifier, **history[-1]
    )
