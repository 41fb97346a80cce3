"""Registers `cascade_<name>` for every timm model. Nothing is built here, so importing it stays cheap.

timm reads a module's `default_cfgs` when an entrypoint is registered, and takes the entrypoint's `__module__` as the
model's home: that is why the closures live in a module of their own.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import timm
from timm.models import DefaultCfg, PretrainedCfg, register_model
from timm.models._registry import _model_default_cfgs
from torch import nn

from . import backbone as _backbone  # noqa: F401  registers the CIFAR ResNets, which get their cascades below

__all__: list[str] = []
PREFIX = 'cascade_'
default_cfgs: dict[str, DefaultCfg] = {}
_NO_SOURCE = dict(url=None, file=None, state_dict=None, hf_hub_id=None, hf_hub_filename=None)


def _entrypoint(base: str) -> Any:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        from .hub import create_cascade  # its imports are only needed once something is built

        return create_cascade(base, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = PREFIX + base
    create.__module__ = __name__
    create.__doc__ = f'{base} with early exits.'
    return create


def _without_source(cfg: PretrainedCfg, name: str) -> PretrainedCfg:
    # dataclasses.replace reads every field by its name: 2,000 times that is half of what registering costs
    copied = object.__new__(PretrainedCfg)
    vars(copied).update(vars(cfg), architecture=name, **_NO_SOURCE)
    return copied


def _cascade_cfgs(base: str) -> DefaultCfg | None:
    """The backbone's tags, without its weights: without published heads a cascade is not pretrained."""
    # timm's public getter copies every cfg deeply, which alone would double what importing this package costs
    known = _model_default_cfgs.get(base)
    if known is None:
        return None
    return DefaultCfg(
        tags=deque(known.tags), cfgs={tag: _without_source(cfg, PREFIX + base) for tag, cfg in known.cfgs.items()}
    )


def register_all() -> None:
    """Registers a cascade for every model timm lists; existing names are kept."""
    for base in timm.list_models():
        if base.startswith(PREFIX) or timm.is_model(PREFIX + base):
            continue
        cfgs = _cascade_cfgs(base)
        if cfgs is not None:
            default_cfgs[PREFIX + base] = cfgs
        register_model(_entrypoint(base))
        __all__.clear()  # timm looks each name up in this list of those before


register_all()
