"""timm's parameter groups (layer decay, freezing) for a backbone inside another module."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

__all__ = ['nested_groups']

_ANCHOR = re.compile(r'(?<![\[\\])\^')


def nested_groups(matcher: Callable[..., Any], prefix: str) -> Callable[..., Any]:
    """A backbone's `group_matcher` for parameters whose names begin with `prefix`.

    Other parameters match no group, so timm puts them last.

    Args:
        matcher: The backbone's own, called as matcher(coarse=...).
        prefix: Name of the backbone in the outer module, with the dot: `backbone.`
    """

    def renamed(pattern: str) -> str:
        # timm matches from the start of a name, so anchors are redundant; after a prefix they would never match
        return rf'^{re.escape(prefix)}(?:{_ANCHOR.sub("", pattern)})'

    def group(coarse: bool = False) -> dict[str, Any] | Callable[[str], Any]:
        groups = matcher(coarse=coarse)
        if callable(groups):
            return lambda name: groups(name.removeprefix(prefix)) if name.startswith(prefix) else math.inf
        return {
            key: renamed(spec) if isinstance(spec, str) else spec and [(renamed(p), order) for p, order in spec]
            for key, spec in groups.items()
        }

    return group
