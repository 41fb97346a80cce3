"""What a timm model was built with, and what images it takes: the one place that tells versions of timm apart.

From 1.0.31 on timm keeps both in the model, and its own functions answer. What older versions have instead is the
description of the checkpoint, layers that know the size they were built for, and the first convolution; `create_model`
keeps the arguments where timm does not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import SpaceToDepth
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

try:
    from timm.data import model_config
    from timm.models import _input
except ImportError:
    model_config = _input = None
newer: Any = _input  # timm's own functions, or None

__all__ = [
    'create_model',
    'fault_of',
    'input_size_of',
    'keep_args',
    'kept_args',
    'model_args_of',
    'on_meta',
    'resolve_input_data_config',
    'save_config',
]

# what create_model takes for itself, and what changes no architecture
_NOT_KEPT = (
    *('pretrained_cfg', 'pretrained_cfg_overlay', 'checkpoint_path', 'cache_dir'),
    *('scriptable', 'exportable', 'no_jit', 'device', 'dtype'),
)


def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> Any:
    """timm.create_model; the model keeps the arguments, and loads weights that were made for any number of channels."""
    if newer is not None:
        return timm.create_model(name, pretrained, **kwargs)
    kwargs.pop('pretrained_model_args', None)
    place = {key: kwargs.pop(key) for key in ('device', 'dtype') if key in kwargs}  # few models take them
    cfg, overlay = kwargs.get('pretrained_cfg'), dict(kwargs.pop('pretrained_cfg_overlay', None) or {})
    described = {**cfg, **overlay} if isinstance(cfg, dict) else overlay
    channels = described.get('input_size', (3,))[0]
    adapts = bool(described.get('state_dict')) and channels != 3  # timm takes all weights for those of 3 channels
    if adapts:
        state = _with_channels(described, channels, kwargs.get('in_chans') or channels)
        overlay |= dict(state_dict=state, first_conv=None)
    model = timm.create_model(name, pretrained, pretrained_cfg_overlay=overlay, **kwargs)
    if any(value is not None for value in place.values()):
        model.to(**place)
    if adapts:
        model.pretrained_cfg['first_conv'] = described.get('first_conv')
    if ':' not in name:  # a stored model has further arguments, which timm read by itself
        keep_args(model, kwargs)
    return model


def keep_args(model: nn.Module, args: Mapping[str, Any]) -> None:
    """Keeps what a model was built with where timm does not."""
    if newer is None:
        model._model_args = {k: v for k, v in args.items() if v is not None and k not in _NOT_KEPT}  # type: ignore


@contextmanager
def on_meta() -> Iterator[None]:
    """Models are built on the meta device, where they take no memory.

    Up to 1.0.20 timm reads numbers of linspace while it builds transformers, so that function stays on the CPU.
    """
    with torch.device('meta'), _LinspaceOnCpu():
        yield


class _LinspaceOnCpu(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **{**(dict(device='cpu') if func is torch.linspace else {}), **(kwargs or {})})


def _with_channels(described: Mapping[str, Any], channels: int, wanted: int) -> dict[str, Tensor]:
    """The tensors of a checkpoint with its first convolutions for `wanted` channels, as timm 1.0.31 makes them.

    Raises:
        ValueError: Weights that only that version makes.
    """
    state = dict(described['state_dict'])
    for name in _names(described.get('first_conv')) if wanted != channels else ():
        weight = state[f'{name}.weight']
        if weight.ndim != 4 or weight.shape[1] != channels:
            raise ValueError(
                f'{name} was made for {channels} channels, and timm {timm.__version__} cannot make it one for '
                f'{wanted}; timm 1.0.31 can. Upgrade timm.'
            )
        repeated = weight.float().repeat(1, math.ceil(wanted / channels), 1, 1)[:, :wanted] * (channels / wanted)
        made = weight.float().sum(1, keepdim=True) if wanted == 1 else repeated
        state[f'{name}.weight'] = made.to(weight.dtype)
    return state


def input_size_of(backbone: Any) -> tuple[int, ...]:
    """(C, H, W) of the images that the backbone was built for."""
    if newer is not None:
        return tuple(newer.get_model_input_config(backbone)['input_size'])
    cfg, args = _cfg(backbone), _kept(backbone)
    sizes = [getattr(layer, 'img_size', None) for layer in (getattr(backbone, 'patch_embed', None), backbone)]
    # where timm passes on no size of the checkpoint's, a layer that was not told of one has a default of its own
    size = next(filter(None, sizes if cfg.get('fixed_input_size') else []), None)
    size = size or args.get('img_size') or cfg.get('input_size', (3, 224, 224))[-2:]
    return (_channels(backbone), *((size, size) if isinstance(size, int) else size))


def resolve_input_data_config(model: Any) -> dict[str, Any]:
    """What timm.data.create_transform is called with for the model as it is, its channels and image size included."""
    if newer is not None:
        return model_config.resolve_input_data_config(model)
    cfg, size = _cfg(model), input_size_of(model)
    if not _is_fixed(model):
        size = (size[0], *cfg.get('input_size', size)[-2:])
    args: dict[str, Any] = dict(input_size=size)
    for key, default in (('mean', IMAGENET_DEFAULT_MEAN), ('std', IMAGENET_DEFAULT_STD)):
        value = default if cfg.get(key) is None else cfg[key]
        value = (value,) if isinstance(value, (int, float)) else tuple(value)
        args[key] = value if len(value) in (1, size[0]) else (sum(value) / len(value),)
    return timm.data.resolve_data_config(args, pretrained_cfg=cfg, model=model)


def kept_args(model: nn.Module) -> dict[str, Any]:
    """Arguments that create_model built the model with, or where nothing kept them, those of `model_args_of`."""
    kept = getattr(model, '_model_args', None)
    return model_args_of(model) if kept is None else kept


def model_args_of(model: nn.Module) -> dict[str, Any]:
    """Arguments of create_model that build the model again as it is now, without its drop rates.

    Raises:
        ValueError: Before timm 1.0.31, a model whose arguments are not known: timm.create_model built it with others
            than its size, channels, classes and pooling.
    """
    if newer is not None:
        return newer.get_model_args(model)
    kept = getattr(model, '_model_args', None)
    args = {k: v for k, v in (kept or {}).items() if not k.endswith(('drop_rate', 'drop_path_rate', 'drop_block_rate'))}
    args |= dict(in_chans=_channels(model), num_classes=model.num_classes)
    if (pool := _pool_of(model)) is not None:
        args['global_pool'] = pool
    if _cfg(model).get('fixed_input_size') or 'img_size' in args:
        args['img_size'] = input_size_of(model)[1:]
    if kept is None:
        _check_arguments(model, args)
    return args


def save_config(model: nn.Module, path: Path, extra: Mapping[str, Any]) -> None:
    """Writes config.json as timm does, with `extra` at the top level; of the model as it is, not of its checkpoint.

    Raises:
        TypeError, ValueError: Arguments that JSON does not hold, or that are not known (see `model_args_of`).
    """
    if newer is not None:
        return save_config_for_hf(model, path, model_config=dict(extra))
    save_config_for_hf(model, path, model_config=dict(extra), model_args=model_args_of(model))
    config = json.loads(path.read_text(encoding='utf-8'))
    cfg, fixed = config['pretrained_cfg'], _is_fixed(model)
    size = tuple(cfg.get('input_size', ()))
    cfg |= resolve_input_data_config(model)
    cfg |= dict(num_classes=model.num_classes, fixed_input_size=fixed, custom_load=False)
    cfg['first_conv'] = _cfg(model).get('first_conv')
    if size[1:] != tuple(cfg['input_size'][1:]):
        cfg['pool_size'] = None
    for key in ('test_input_size', 'min_input_size'):
        if cfg.get(key):
            cfg[key] = (cfg['input_size'][0], *cfg[key][1:])
    for key in ('label_offset', *(['test_input_size'] if fixed else [])):
        cfg.pop(key, None)
    path.write_text(json.dumps(config), encoding='utf-8')


def fault_of(model: nn.Module) -> str | None:
    """Why images must not leave a batch of this model, with this version of timm; None if they may."""
    if newer is None and type(model).__name__ == 'GlobalContextVit':
        return (
            f'before 1.0.31 (here is {timm.__version__}) timm gives windows of one image the global query of another, '
            f'so that its answer depends on the rest of the batch. Upgrade timm.'
        )
    return None


def _cfg(model: Any) -> dict[str, Any]:
    return getattr(model, 'pretrained_cfg', None) or {}


def _names(first_conv: str | tuple[str, ...] | list[str] | None) -> tuple[str, ...]:
    return (first_conv,) if isinstance(first_conv, str) else tuple(first_conv or ())


def _kept(model: Any) -> dict[str, Any]:
    """The arguments that `create_model` kept, in a cascade those of its backbone."""
    return vars(getattr(model, 'backbone', model)).get('_model_args') or {}


def _pool_of(model: Any) -> str | None:
    head = getattr(model, 'head', None)
    pools = (getattr(head, 'global_pool', None), getattr(head, 'pool_type', None), getattr(model, 'global_pool', None))
    names = (getattr(pool, 'pool_type', pool) for pool in pools)
    return next((name for name in names if isinstance(name, str)), None)


def _is_fixed(model: Any) -> bool:
    """Whether images must have the size that the model was built for."""
    args, embed = _kept(model), getattr(model, 'patch_embed', None)
    fixed = getattr(embed, 'strict_img_size', _cfg(model).get('fixed_input_size', False))
    dynamic = args.get('dynamic_img_size', getattr(model, 'dynamic_img_size', False)) or args.get('use_naflex')
    return bool(fixed and not dynamic and args.get('strict_img_size', True))


def _channels(model: Any) -> int:
    """Channels of the images: the model knows (mostly, from timm 1.0.27 on), or its first convolution."""
    cfg = _cfg(model)
    known = getattr(model, 'in_chans', None) or _kept(model).get('in_chans')
    if known is None and isinstance(model, nn.Module):
        modules = dict(model.named_modules())
        first = modules.get(next(iter(_names(cfg.get('first_conv'))), ''))
        if isinstance(first, nn.Conv2d):
            pixels = 16 if any(isinstance(m, SpaceToDepth) for m in modules.values()) else 1  # 4x4 of them as channels
            known = first.in_channels // pixels
    return known or cfg.get('input_size', (3, 224, 224))[0]


def _check_arguments(model: nn.Module, args: Mapping[str, Any]) -> None:
    """Makes sure that arguments read from a model build it: the same modules with the same settings."""
    cfg = {k: v for k, v in _cfg(model).items() if k not in ('state_dict', 'url', 'file', 'hf_hub_id')}
    name = cfg.get('architecture') or type(model).__name__
    try:
        with on_meta():
            again = _structure(timm.create_model(name, pretrained_cfg=cfg, **args))
    except Exception as e:  # arguments that do not go together in a model's constructor: anything may come
        again = [f'{type(e).__name__}: {e}']
    mine = _structure(model)
    if mine != again:
        wrong = next((pair for pair in zip(mine, again, strict=False) if pair[0] != pair[1]), ('more', 'fewer layers'))
        raise ValueError(
            f'{name} with {dict(args)} is not this model ({wrong[0][:100]}, not {wrong[1][:100]}), and timm '
            f'{timm.__version__} does not keep what else it was built with; timm 1.0.31 does. Upgrade timm, or say it: '
            f'network._model_args = dict(NAME=VALUE), with the arguments of timm.create_model.'
        )


def _structure(model: nn.Module) -> list[str]:
    """Every module's kind and settings, without those that only train."""
    plain = (nn.Identity, nn.Dropout)
    kinds = [m for m in model.modules() if not isinstance(m, plain) and not type(m).__name__.startswith('Drop')]
    return [f'{type(m).__name__}({m.extra_repr()})' for m in kinds]
