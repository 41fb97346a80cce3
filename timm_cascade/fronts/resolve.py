"""From what users write for `front=` to fronts that fit the backbone; whatever does not fit is refused here."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from timm.models import get_pretrained_cfg, split_model_name_tag
from torch import nn

from ..backbone import check_classifier, input_size_of, meta_pass
from ..errors import BackboneError, FrontError
from ..utils.timm_models import create_model
from .front import Front, name_of, shown

__all__ = ['FrontSpec', 'check_names', 'create_fronts', 'network_named', 'refuse_classes', 'split_size']

Size = tuple[int, int]
OneFront = str | nn.Module | tuple[nn.Module, int | Size]
FrontSpec = OneFront | Sequence[OneFront] | None
MAX_SIDE = 9999  # pixels


def split_size(text: str) -> tuple[str, Size | None]:
    """A front's name and the size after it: `resnet50.a1_in1k@160`, `hf-hub:me/net@REVISION@160x224` (height first).

    Example:
        >>> split_size('resnet50.a1_in1k@160')
        ('resnet50.a1_in1k', (160, 160))
    """
    match = re.fullmatch(r'(.+?)@(\d{1,4})(?:x(\d{1,4}))?', text)
    if match is None:
        return text, None
    return match[1], (int(match[2]), int(match[3] or match[2]))


def network_named(
    name: str,
    backbone: nn.Module,
    size: Size | None = None,
    pretrained: bool = True,
    cache_dir: str | Path | None = None,
) -> nn.Module:
    """The network of a name, for images of `size`, with as many channels as the backbone reads.

    Args:
        name: timm name with or without a tag, `hf-hub:USER/NAME` or `local-dir:FOLDER`; these two bring their weights
            in any case.
        backbone: The large network. Where no weights are loaded, the new network has as many classes as it.
        size: Height and width; by default the network's own.
        pretrained: Load the published weights.
        cache_dir: See timm.create_model.

    Raises:
        FrontError: timm does not know the name, or cannot build or load the network.
    """
    stored = name.startswith(('hf-hub:', 'hf_hub:', 'local-dir:'))
    kwargs: dict[str, Any] = {}
    channels = input_size_of(backbone)[0]
    cfg = None if stored else get_pretrained_cfg(name, allow_unregistered=True)
    if cfg is not None and cfg.input_size[0] != channels:
        kwargs['in_chans'] = channels
    if cfg is not None and cfg.num_classes and not pretrained:
        kwargs['num_classes'] = backbone.num_classes
    if size is not None:
        kwargs['pretrained_cfg_overlay'] = dict(input_size=(channels, *size))
    try:
        return create_model(name, pretrained=pretrained or stored, cache_dir=cache_dir, **kwargs)
    except Exception as e:  # an unknown name, no connection, a damaged file: timm and its Hub client raise many kinds
        raise FrontError(
            f'front={name!r} in front of {name_of(backbone)} cannot be loaded: {type(e).__name__}: {e}. Expected a '
            f'name that timm.list_models() or timm.list_pretrained() has, hf-hub:USER/NAME, local-dir:FOLDER, or a '
            f'model.'
        ) from e


def create_fronts(
    front: FrontSpec, backbone: nn.Module, build: Callable[[str, Size | None], nn.Module] | None = None
) -> list[Front]:
    """The fronts that `front` describes, checked against the backbone and in the order given.

    Args:
        front: A name, a name with a size (`resnet50.a1_in1k@160`; the backbone's own name is the backbone itself on
            smaller images), a timm model, a model with a size as a tuple, or a list of these, cheapest first.
        backbone: The large network.
        build: Returns the network of a name at a size; without it only the backbone's own name is taken.

    Raises:
        FrontError: A front that does not fit, or cannot be loaded. Nothing was changed.
    """
    items = [] if front is None else list(front) if isinstance(front, list) else [front]
    fronts: list[Front] = []
    for item in items:
        made = item if isinstance(item, Front) else _create_front(item, backbone, build)
        others = [f for f in fronts if f.name.partition('#')[0] == made.name]
        if others:  # two trained networks of one architecture
            made.name += f'#{len(others) + 1}'
        fronts.append(made)
    costs = [_check(f, backbone) for f in fronts]
    for i in range(1, len(costs)):
        if costs[i] < costs[i - 1]:
            raise FrontError(
                f'front lists {fronts[i - 1].name} ({costs[i - 1]:,} MACs) before {fronts[i].name} ({costs[i]:,} '
                f'MACs); list the cheapest first.'
            )
    return fronts


def _create_front(item: Any, backbone: nn.Module, build: Callable[[str, Size | None], nn.Module] | None) -> Front:
    large = name_of(backbone)
    if isinstance(item, str):
        name, size = split_size(item)
        if size is not None and not (0 < size[0] <= MAX_SIDE and 0 < size[1] <= MAX_SIDE):
            raise FrontError(f'front={item!r} in front of {large}: a size is 1 to {MAX_SIDE} pixels.')
        network, label = (backbone, None) if _is_same(name, backbone) else (None, _label(name))
        if network is None:
            if build is None:
                raise FrontError(
                    f'front={item!r} is a name, and only timm.create_model("cascade_...", front={item!r}) loads one. '
                    f'Pass the model itself in front of {large}.'
                )
            network = build(name, size)
    else:
        network, size = item if isinstance(item, tuple) and len(item) == 2 else (item, None)
        label = None
        size = (size, size) if isinstance(size, int) else size
    if not isinstance(network, nn.Module):
        raise FrontError(
            f'front={item!r} in front of {large}: expected a name, a timm model, (model, size), or a list of these.'
        )
    if hasattr(network, 'set_max_drop'):
        raise FrontError(
            f'front {name_of(network)} in front of {large} is itself a cascade; pass the network inside it '
            f'(model.backbone).'
        )
    if network is backbone and (size is None or tuple(size) == input_size_of(backbone)[1:]):
        own = shown(input_size_of(backbone)[1:])  # type: ignore[arg-type]
        raise FrontError(
            f"the front is {large} at {own} pixels, which is the cascade's own network at its own size: nothing would "
            f'be saved. Ask for smaller images, such as front="{large}@{max(1, input_size_of(backbone)[1] * 5 // 7)}", '
            f'or for another network.'
        )
    classes, channels = getattr(network, 'num_classes', None), input_size_of(backbone)[0]
    if not classes:
        raise FrontError(
            f'front {name_of(network)} has no classifier, so it cannot answer in front of {large} '
            f'({backbone.num_classes} classes). Choose a network that classifies.'
        )
    if (found := input_size_of(network)[0]) != channels:
        raise FrontError(
            f'front {name_of(network)} reads images of {found} channels, {large} of {channels}; load it with '
            f'in_chans={channels}.'
        )
    return Front(network, backbone, size, label)


def _label(name: str) -> str | None:
    """What a front is called; a folder's place on this machine is not part of it."""
    source, _, rest = name.partition(':')
    return None if not rest or source == 'local-dir' else f'hf-hub:{rest}'


def _is_same(name: str, backbone: nn.Module) -> bool:
    """Whether a name is the backbone's own: the same architecture, and the same tag where one is given or implied."""
    cfg: Any = getattr(backbone, 'pretrained_cfg', None) or {}
    if ':' in name or not cfg.get('architecture'):
        return False
    architecture, tag = split_model_name_tag(name)
    if architecture != cfg['architecture']:
        return False
    known = get_pretrained_cfg(name, allow_unregistered=True)
    return (tag or (known.tag if known else None) or '') == (cfg.get('tag') or '')


def _check(front: Front, backbone: nn.Module) -> int:
    """Whether the front can answer for the backbone; returns its MACs.

    Raises:
        FrontError: It cannot; the message names both.
    """
    large, name = name_of(backbone), f'front {front.name}'
    channels = input_size_of(backbone)[0]
    if front.num_classes != backbone.num_classes:
        raise FrontError(
            f'{name} has {front.num_classes} classes, {large} has {backbone.num_classes}. A front is not trained here: '
            f'bring one that was trained on the same classes (its folder as local-dir:FOLDER, or the model).'
        )
    check_names(front, labels_of(backbone), large)
    try:
        output, macs = meta_pass(front.inner, (channels, *front.size), {})
    except Exception as e:  # a network for one size raises whatever its code does with another
        own = shown(input_size_of(front.inner)[1:])  # type: ignore[arg-type]
        raise FrontError(
            f'{name} does not read images of {shown(front.size)} pixels ({" ".join(str(e).split())[:200]}), only of '
            f'{own}. Name a network without a fixed size, leave the size away, or build this one for the size: '
            f'networks that take it read any with dynamic_img_size=True. {large} was left as it is.'
        ) from e
    try:
        check_classifier(front.inner, output)
    except BackboneError as e:
        raise FrontError(f'{name} cannot stand in front of {large} ({backbone.num_classes} classes): {e}') from e
    return macs


def labels_of(network: nn.Module) -> list[str] | None:
    """Names of a network's classes, where its config has them."""
    names = (getattr(network, 'pretrained_cfg', None) or {}).get('label_names')
    return list(names) if isinstance(names, (list, tuple)) and names else None


def check_names(front: Front, names: Sequence[str] | None, whose: str) -> None:
    """
    Raises:
        FrontError: The front's classes have other names, or stand in another order, where both are known. Names that
            are nothing but the classes' numbers say nothing.
    """
    own = labels_of(front.inner)
    numbers = [str(i) for i in range(front.num_classes)]
    if front.shared or not own or not names or list(names) == own or numbers in (own, list(names)):
        return
    i = next((i for i, (a, b) in enumerate(zip(own, names, strict=False)) if a != b), min(len(own), len(names)))
    mine, theirs = (repr(x[i]) if i < len(x) else 'missing' for x in (own, list(names)))
    other = 'the same classes in another order' if sorted(own) == sorted(names) else 'other classes'
    raise FrontError(
        f'front {front.name} answers {other}: class {i} is {mine} there and {theirs} in {whose}. Bring a front that '
        f'was trained on the same classes in the same order.'
    )


def refuse_classes(fronts: Sequence[Front], num_classes: int) -> None:
    """
    Raises:
        FrontError: There is a front, and it cannot follow when the classes change.
    """
    if fronts:
        raise FrontError(
            f'{num_classes} classes were asked for, and front {fronts[0].name} has {fronts[0].num_classes} and is not '
            f'trained here. Make another cascade without it: CascadeModel(model.backbone).'
        )
