"""What timm asks of its models and a cascade leaves to its backbone."""
from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .backbone import input_size_of

__all__ = ['BackboneContract']

_ANCHOR = re.compile(r'(?<![\[\\])\^')


class BackboneContract(nn.Module):
    """A model that has what its `backbone` has."""
    backbone: Any  # a timm model: an nn.Module with timm's methods, which have no type of their own

    @property
    def num_classes(self) -> int:
        return self.backbone.num_classes

    @property
    def num_features(self) -> int:
        return self.backbone.num_features

    @property
    def head_hidden_size(self) -> int:
        return getattr(self.backbone, 'head_hidden_size', self.num_features)

    @property
    def feature_info(self) -> Any:
        return self.backbone.feature_info

    @cached_property  # every batch is checked against it, and timm's way to it takes as long as a small layer
    def in_chans(self) -> int:
        return input_size_of(self.backbone)[0]

    @property
    def _traits(self) -> dict[str, Any]:
        return getattr(self.backbone, '_traits', {})

    def forward_features(self, x: Tensor) -> Tensor:
        return self.backbone.forward_features(x)

    def forward_head(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.backbone.forward_head(x, *args, **kwargs)

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.backbone.forward_intermediates(x, *args, **kwargs)

    def get_classifier(self) -> nn.Module:
        return self.backbone.get_classifier()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.backbone.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        names = self.backbone.no_weight_decay() if hasattr(self.backbone, 'no_weight_decay') else set()
        return {f'backbone.{name}' for name in names}

    @property
    def group_matcher(self) -> Callable[..., Any]:
        """The backbone's groups, for its parameters under their names here; heads match none, so they come last.

        A property, so that this model has it only where its backbone has: timm asks `hasattr`.
        """
        matcher = self.backbone.group_matcher

        def renamed(pattern: str) -> str:
            # timm matches from the start of a name, so anchors say nothing; behind a prefix they would never hold
            return rf'^backbone\.(?:{_ANCHOR.sub("", pattern)})'

        def group(coarse: bool = False) -> dict[str, Any] | Callable[[str], Any]:
            groups = matcher(coarse=coarse)
            if callable(groups):
                return lambda name: groups(name.removeprefix('backbone.')) if name.startswith('backbone.') else math.inf
            return {
                key: renamed(spec) if isinstance(spec, str) else spec and [(renamed(p), order) for p, order in spec]
                for key, spec in groups.items()}

        return group
