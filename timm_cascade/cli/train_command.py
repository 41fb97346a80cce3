"""timm-cascade train: exit heads on a frozen backbone, which can be fine-tuned first."""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path
from typing import Any

from .. import hub
from ..data import ImageData, check_training_classes, match_classes
from ..data.splits import Slice
from ..measure.calibrate import calibrate
from ..measure.report import write_report
from ..training.finetune import finetune
from ..training.train import train_heads
from ..utils.distributed import create_accelerator
from .backbone_options import backbone_options, create_cascade
from .options import Commands, data_options, load_data_of, output_options

__all__ = ['add_command', 'run']

REPORT = 'report.html'
DESCRIPTION = """\
Trains the exit heads of a cascade on a frozen backbone and writes a release to --out. With --finetune the whole
backbone is trained on the same images first, with --report the result is calibrated and shown on a page. A command
that was interrupted continues when it is given again.
With networks in front and no exits behind them (--front NAME --exits 0) there is nothing to train: the cascade is
written as it is.
"""


def add_command(commands: Commands) -> None:
    """Adds the command and its options."""
    parser = commands.add_parser(
        'train',
        parents=[data_options(), backbone_options(), output_options()],
        description=DESCRIPTION,
        help='train exit heads on a frozen backbone, which can be fine-tuned first',
    )
    parser.add_argument('--out', required=True, type=Path, help='Folder for the release.')
    parser.add_argument('--split', default='train', help='Training images, such as train or train[:50000].')
    parser.add_argument(
        '--val-split',
        help='Images to report accuracy on. With --finetune they choose the epoch, and are the validation split if '
        'none is named.',
    )
    heads = parser.add_argument_group('training the heads')
    heads.add_argument('--epochs', type=int, default=20, help='Passes over the stored features.')
    heads.add_argument('--lr', type=float, default=2e-3, help='Learning rate.')
    heads.add_argument('--weight-decay', type=float, default=0.05, help='Weight decay of AdamW.')
    heads.add_argument(
        '--views', type=int, default=1, help='Views of each image: the first as in evaluation, the others augmented.'
    )
    heads.add_argument('--seed', type=int, default=0, help='Seed of weights, order and augmentation.')
    tuning = parser.add_argument_group('fine-tuning the backbone')
    tuning.add_argument(
        '--finetune', type=int, default=0, metavar='EPOCHS', help='Train the backbone first, for this many epochs.'
    )
    tuning.add_argument(
        '--finetune-lr', type=float, default=5e-4, metavar='X', help='Learning rate of the last layers.'
    )
    tuning.add_argument('--finetune-batch-size', type=int, default=64, metavar='N', help='Images per batch.')
    tuning.add_argument(
        '--layer-decay', type=float, default=0.75, metavar='X', help='Factor on the learning rate per group of layers.'
    )
    tuning.add_argument(
        '--ema-decay', type=float, default=0.0, metavar='X', help='Keep an average of the weights; 0 for none.'
    )
    page = parser.add_argument_group('calibrating and showing the result')
    page.add_argument(
        '--report',
        nargs='?',
        const='',
        metavar='FILE.html',
        help=f'Calibrate on one half of --test-split, and write a page about the other half; by default OUT/{REPORT}.',
    )
    page.add_argument(
        '--test-split', default='test', help='Labelled images for --report that nothing was trained or chosen on.'
    )
    page.add_argument(
        '--max-drop', type=float, default=0.01, help='Accuracy that may be lost, as a fraction, at the thresholds set.'
    )
    run_ = parser.add_argument_group('how it runs')
    run_.add_argument(
        '--work-dir',
        type=Path,
        help='Folder for stored features, the state to continue from and the logs; by default OUT. Several trainings '
        'of one backbone can share it, one after the other.',
    )
    run_.add_argument(
        '--no-cache', action='store_true', help='Store no features; the backbone then runs in every epoch of the heads.'
    )
    run_.add_argument('--mixed-precision', choices=['no', 'fp16', 'bf16'], help="Accelerate's mixed precision.")
    run_.add_argument('--grad-accum', type=int, default=1, metavar='N', help='Batches per step.')
    run_.add_argument(
        '--log-with', nargs='*', default=[], metavar='NAME', help='Trackers that Accelerate knows: tensorboard, ...'
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Runs the command; returns what it prints."""
    from accelerate.utils import set_seed

    if args.finetune < 0 or not 0 <= args.max_drop <= 1:
        raise ValueError(f'--finetune {args.finetune} --max-drop {args.max_drop}: expected at least 0, and 0 to 1.')
    accelerator = create_accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.grad_accum,
        log_with=args.log_with or None,
        project_dir=str(args.out),
    )
    logging.getLogger('timm_cascade').setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    set_seed(args.seed)  # fresh heads are part of the recipe
    train = load_data_of(args, args.split)
    val = _validation(args)
    check_training_classes(train)
    if val is not None:
        match_classes(val, len(train.class_names), train.class_names)
    halves = _test_halves(args, train) if args.report is not None else None
    model, classifier = create_cascade(args, len(train.class_names), finetuned=args.finetune > 0)
    model.label_names = train.class_names
    if args.log_with:
        accelerator.init_trackers('timm-cascade', {k: str(v) for k, v in vars(args).items() if k != 'run'})
    work_dir = args.work_dir or args.out
    if accelerator.is_main_process:
        for folder in (args.out, work_dir):  # what cannot be written is an error now, not after the first epoch
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
    common: dict[str, Any] = dict(seed=args.seed, workers=args.workers, work_dir=work_dir, accelerator=accelerator)
    tuned: dict[str, Any] = {}
    if args.finetune and val is not None:
        lines = finetune(
            model,
            train,
            val,
            epochs=args.finetune,
            batch_size=args.finetune_batch_size,
            lr=args.finetune_lr,
            layer_decay=args.layer_decay,
            ema_decay=args.ema_decay,
            **common,
        )
        best = max(lines, key=lambda line: line['accuracy'])
        tuned = dict(finetuned=dict(epochs=len(lines), best_epoch=best['epoch'], accuracy=best['accuracy']))
    if classifier or len(model.fronts) < len(model.exits):
        history = train_heads(
            model,
            train,
            val,
            epochs=args.epochs,
            batch_size=args.batch_size,
            lr=args.lr,
            weight_decay=args.weight_decay,
            views=args.views,
            classifier=classifier,
            cache=not args.no_cache,
            **common,
        )
    else:
        history = [dict(trained='no heads: all exits are networks in front')]
    main_process, processes = accelerator.is_main_process, accelerator.num_processes
    shown: dict[str, Any] = {}
    if halves is not None:
        calibrate(model, halves[0], batch_size=args.batch_size, workers=args.workers, accelerator=accelerator)
        model.set_max_drop(args.max_drop)
    if main_process:
        hub.save(model, args.out)
        if halves is not None:
            report = Path(args.report or args.out / REPORT)
            write_report(model, halves[1], report, batch_size=args.batch_size, workers=args.workers)
            shown = dict(report=str(report))
        for name in ('backbone.pt', 'heads.pt'):  # only now: a command killed before this has to save again, no more
            (work_dir / name).unlink(missing_ok=True)
    accelerator.end_training()
    if not main_process:
        return None
    return dict(
        folder=str(args.out),
        processes=processes,
        images=len(train),
        classifier_trained=classifier,
        **tuned,
        **history[-1],
        **shown,
        next=f'Look at {shown["report"]}; label images: timm-cascade predict {args.out} --data IMAGES --out PREDICTIONS'
        if shown
        else f'No exit fires until it is calibrated: timm-cascade calibrate {args.out} --data DATA --split HELD_OUT',
    )


def _validation(args: argparse.Namespace) -> ImageData | None:
    """The images of --val-split; for fine-tuning the validation split where none is named.

    Raises:
        ValueError: Fine-tuning has no images to choose the epoch by.
    """
    if args.val_split or not args.finetune:
        return load_data_of(args, args.val_split) if args.val_split else None
    needed = (
        f'--finetune {args.finetune} keeps the epoch that is best on images it was not trained on: name them with '
        f"--val-split. Where there are none, draw them: --split 'train[:80%]' --val-split 'train[80%:]'."
    )
    if args.split != 'train' or any(Path(name).is_file() for name in args.data):  # a file is taken for any split
        raise ValueError(needed)
    try:
        return load_data_of(args, 'validation')
    except (ValueError, OSError) as e:
        raise ValueError(f'{needed} {e}') from e


def _test_halves(args: argparse.Namespace, train: ImageData) -> list[ImageData]:
    """Two halves of the test images, drawn by class: one calibrates, the other is shown.

    Raises:
        ValueError: There are no such images, some have no label, or their classes are others.
    """
    try:
        data = load_data_of(args, args.test_split)
        halves = [Slice(start=start, stop=stop, percent=True).of(data) for start, stop in ((None, 50), (50, None))]
    except (ValueError, OSError) as e:
        raise ValueError(
            f'--report needs images that nothing was trained or chosen on: name them with --test-split, or draw them: '
            f"--split 'train[:60%]' --val-split 'train[60%:80%]' --test-split 'train[80%:]'. {e}"
        ) from e
    match_classes(data, len(train.class_names), train.class_names)
    for half, name in zip(halves, ('first', 'second'), strict=True):
        half.split = f'{name} half of {data.split}'  # a release says what it was calibrated on
    return halves
