"""Options that describe the backbone of a new cascade, under the names of timm's scripts, and what they create."""

from __future__ import annotations

import argparse
import logging
from typing import Any

import timm

from ..model import CascadeModel
from .options import exits_value, value

__all__ = ['backbone_options', 'create_cascade', 'network_options']

_logger = logging.getLogger(__name__)


def network_options(model_help: str = 'Name of the cascade: cascade_NAME[.TAG] for any timm model.') -> Any:
    """Options that describe the backbone."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group('backbone')
    group.add_argument('--model', required=True, help=model_help)
    group.add_argument('--checkpoint', help='File with the weights of your fine-tuned backbone.')
    group.add_argument('--no-pretrained', action='store_true', help='Do not load published weights.')
    group.add_argument('--img-size', type=int, metavar='N', help='Height and width of the images the model reads.')
    group.add_argument('--in-chans', type=int, metavar='N', help='Channels of the images the model reads.')
    group.add_argument('--crop-pct', type=float, metavar='X', help='Share of the image that the centre crop keeps.')
    group.add_argument('--mean', type=float, nargs='+', metavar='X', help='Mean of each channel, for normalisation.')
    group.add_argument(
        '--std', type=float, nargs='+', metavar='X', help='Standard deviation of each channel, for normalisation.'
    )
    group.add_argument(
        '--interpolation', choices=['bilinear', 'bicubic', 'nearest', 'random'], help='How images are resized.'
    )
    group.add_argument(
        '--model-kwargs', nargs='*', default=[], metavar='KEY=VALUE', help='Further arguments of the timm model.'
    )
    return parser


def backbone_options() -> argparse.ArgumentParser:
    """Options of the commands that create a cascade."""
    parser = argparse.ArgumentParser(add_help=False, parents=[network_options()])
    group = parser.add_argument_group('exits')
    group.add_argument(
        '--classifier',
        default='auto',
        choices=['auto', 'train', 'keep'],
        help="Whether the backbone's own classifier is trained, as the final exit's head. auto: only where the data "
        'have other classes than the published weights and there is neither --checkpoint nor --finetune.',
    )
    group.add_argument(
        '--exits',
        type=exits_value,
        default=None,
        help='Number of exits, their cost fractions, or module names: 3 or 0.25,0.5 or layer1,layer2.',
    )
    group.add_argument(
        '--front',
        nargs='+',
        metavar='NAME[@SIZE]',
        help='Whole networks in front, cheapest first: timm names, hf-hub:USER/NAME or local-dir:FOLDER. @160 shows '
        'the network smaller images; the name of --model itself then shares its weights. --exits 0 for no others.',
    )
    group.add_argument(
        '--head', type=value, default='enhanced', help='Exit heads: linear, enhanced, paper or a JSON description.'
    )
    return parser


def _input_config(args: argparse.Namespace) -> dict[str, Any]:
    """What the options change about how the model reads images, as timm's create_model takes it.

    Raises:
        ValueError: A number out of range, or not as many values as channels.
    """
    base = timm.models.get_pretrained_cfg(args.model.removeprefix('cascade_'), allow_unregistered=True)
    channels, height, width = getattr(base, 'input_size', None) or (3, 224, 224)
    channels = args.in_chans or channels
    if channels < 1 or (args.img_size is not None and args.img_size < 1):
        raise ValueError(f'--in-chans {args.in_chans} --img-size {args.img_size}: expected at least 1.')
    config: dict[str, Any] = {}
    for name in ('mean', 'std'):
        values = getattr(args, name)
        if values is None:
            continue
        if len(values) not in (1, channels):
            raise ValueError(f'--{name} has {len(values)} values; expected 1 or {channels}, one per channel.')
        config[name] = tuple(values * channels if len(values) == 1 else values)
    if args.crop_pct is not None:
        if not 0 < args.crop_pct <= 1:
            raise ValueError(f'--crop-pct {args.crop_pct}: expected more than 0 and at most 1.')
        config['crop_pct'] = args.crop_pct
    if args.interpolation is not None:
        config['interpolation'] = args.interpolation
    if args.img_size is not None:
        height = width = args.img_size
    if args.img_size is not None or (config and args.in_chans is not None):
        config['input_size'] = (channels, height, width)
    return config


def create_cascade(args: argparse.Namespace, num_classes: int, finetuned: bool = False) -> tuple[CascadeModel, bool]:
    """The cascade that the options describe, and whether its classifier is to be trained as the final exit's head.

    Args:
        args: Parsed options.
        num_classes: Classes of the data.
        finetuned: The whole backbone is going to be trained, its classifier with it.

    Raises:
        ValueError: A name that timm does not know, weights that do not fit, or options out of range.
    """
    if not args.model.startswith('cascade_'):
        raise ValueError(f'--model {args.model} is not a cascade; did you mean cascade_{args.model}?')
    kwargs = {key: value(text) for key, _, text in (item.partition('=') for item in args.model_kwargs)}
    if args.in_chans is not None:
        kwargs['in_chans'] = args.in_chans
    if args.exits is not None:
        kwargs['exits'] = args.exits
    if args.front:
        kwargs.update(front=args.front, front_pretrained=not args.no_pretrained)
    try:
        if config := _input_config(args):
            kwargs['pretrained_cfg_overlay'] = {**kwargs.get('pretrained_cfg_overlay', {}), **config}
        pretrained = (
            not args.no_pretrained
            and args.checkpoint is None
            and timm.models.is_model_pretrained(args.model.removeprefix('cascade_'))
        )
        model = timm.create_model(
            args.model,
            pretrained=pretrained,
            num_classes=num_classes,
            head=args.head,
            checkpoint_path=args.checkpoint,
            **kwargs,
        )
    except RuntimeError as e:  # timm's word for an unknown name or tag, torch's for weights that do not fit
        raise ValueError(
            f'--model {args.model}{f" --checkpoint {args.checkpoint}" if args.checkpoint else ""}: {e}'
        ) from e
    except OSError as e:  # of the Hub
        if not pretrained:
            raise
        raise ValueError(
            f'--model {args.model}: the published weights could not be fetched ({e}). Give them as a file, '
            f"""--model-kwargs 'pretrained_cfg_overlay={{"file": "weights.safetensors"}}', or start without: """
            f'--no-pretrained.'
        ) from e
    published = pretrained and model.backbone.pretrained_cfg.get('num_classes') == num_classes
    fits = published or args.checkpoint is not None
    train = args.classifier == 'train' or (args.classifier == 'auto' and not fits and not finetuned)
    if args.checkpoint:
        _logger.info('backbone: weights from %s', args.checkpoint)
    else:
        _logger.info('backbone: %s weights', 'published' if pretrained else 'random')
    if train and not fits:
        text = f"new, {num_classes} classes; trained as the final exit's head (linear probe), the rest is not changed"
    elif train:
        text = 'trained again (linear probe)'
    elif finetuned:
        text = 'fine-tuned with the backbone'
    else:
        text = 'kept as it is' if fits else 'kept as it is, RANDOM'
    _logger.info('classifier: %s', text)
    return model, train
