"""All exits of a cascade: its fronts, then those inside the backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from ..backbone import ExitPoint, backbone_macs, input_point, resolve_exits
from ..heads import HeadSpec, create_heads, head_configs
from ..utils.digest import state_digest
from .front import Front
from .resolve import FrontSpec, create_fronts

__all__ = ['Exits', 'create_exits', 'exits_digest', 'heads_macs']


class Exits(NamedTuple):
    """What samples may exit at.

    Attributes:
        points: The M exits, fronts first.
        heads: M modules, features to logits.
        configs: Descriptions of the heads behind the fronts.
    """

    points: tuple[ExitPoint, ...]
    heads: nn.ModuleList
    configs: list[dict[str, Any]]


def create_exits(backbone: Any, exits: Any, head: HeadSpec, front: FrontSpec) -> Exits:
    """Exits and heads of a new cascade; the backbone is not touched.

    Args:
        backbone: A timm classifier.
        exits: See `backbone.resolve_exits`, or resolved points; 0 or an empty list for none where there is a front.
        head: See `heads.head_configs`.
        front: See `create_fronts`.

    Raises:
        BackboneError, ExitError, FrontError, ValueError: What does not fit.
    """
    known = [e for e in exits if isinstance(e, ExitPoint)] if isinstance(exits, Sequence) else []
    fronts = create_fronts(front, backbone)
    none = fronts and (exits == 0 or (isinstance(exits, Sequence) and not len(exits)))
    inner = [] if none else known or resolve_exits(backbone, exits)
    configs = head_configs(head, inner, backbone.num_classes) if inner else []
    heads = create_heads(inner, backbone.num_classes, configs)
    points = [input_point(backbone, f'front:{f.name}', inner[0].total if inner else None) for f in fronts]
    return Exits((*points, *inner), nn.ModuleList([*fronts, *heads]), configs)


def exits_digest(heads: nn.ModuleList, names: Sequence[str]) -> str:
    """Identifies exits by their names, the heads' weights, and of a front the digest of its network.

    Args:
        heads: All heads, fronts first.
        names: The module of each exit point.
    """
    fronts = {k: h for k, h in enumerate(heads) if isinstance(h, Front)}
    networks = tuple(f'{k}.network.' for k in fronts)
    own = {name: t for name, t in heads.state_dict().items() if not name.startswith(networks)}
    return state_digest(own, also=[*names, *(f.digest() for f in fronts.values())])


def heads_macs(heads: nn.ModuleList, points: Sequence[ExitPoint]) -> list[int]:
    """MACs of each head for one image, of a front those of its whole network."""
    return [h.macs() if isinstance(h, Front) else backbone_macs(h, p.shape) for h, p in zip(heads, points, strict=True)]
