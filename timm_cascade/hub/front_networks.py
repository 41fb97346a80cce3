"""Fronts by name, and in releases: which network, from where, and whether it is the one that was calibrated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
from torch import nn

from ..backbone import input_size_of
from ..errors import ReleaseError
from ..fronts import Front, FrontSpec, create_fronts, network_named
from ..utils.timm_models import create_model, model_args_of, resolve_input_data_config
from .pretrained import Published, fetch_published, identify

if TYPE_CHECKING:
    from ..formats import FrontEntry

__all__ = ['FrontConfig', 'describe_fronts', 'named_fronts', 'released_fronts']


@dataclass(frozen=True)
class FrontConfig:
    """A front as a release's config.json describes it.

    Attributes:
        name: With its size.
        shared: It is the backbone itself, on images of another size.
        architecture: timm's name of it.
        args: Arguments of its constructor.
        cfg: input_size, mean, std and interpolation of its images.
        size: Height and width of the images that it gets.
        digest: Digest of the weights (`state_digest`).
        published: The checkpoint that has them; None where there is none.
    """

    name: str
    shared: bool
    architecture: str
    args: dict[str, Any]
    cfg: dict[str, Any]
    size: tuple[int, int]
    digest: str
    published: Published | None

    @classmethod
    def from_entry(cls, entry: FrontEntry, source: str) -> FrontConfig:
        """
        Raises:
            ReleaseError: A network that timm does not know, or a checkpoint of another one.
        """
        if not timm.is_model(entry.architecture) or entry.architecture.startswith('cascade_'):
            raise ReleaseError(
                f'{source}: front {entry.name} is a {entry.architecture!r}, which this version of timm does not know.'
            )
        published = None
        if entry.published is not None:
            where = f'front {entry.name}: published'
            published = Published.from_entry(entry.published, entry.architecture, source, where)
        values = {**entry.model_dump(), 'size': (entry.size[0], entry.size[1]), 'published': published}
        return cls(**values)

    def is_stored(self, layout: str) -> bool:
        """Whether a release of this layout holds its weights."""
        return not self.shared and (layout == 'full' or self.published is None)

    def build(self, pretrained: bool = False, cache_dir: str | Path | None = None) -> nn.Module:
        """The network, with the published weights or with random ones."""
        cfg = {k: tuple(v) if isinstance(v, list) else v for k, v in self.cfg.items()}
        if pretrained and self.published is not None:
            cfg |= self.published.source
        return create_model(
            self.architecture, pretrained=pretrained, pretrained_cfg_overlay=cfg, cache_dir=cache_dir, **self.args
        )


def describe_fronts(fronts: Sequence[Front], layout: str) -> list[FrontConfig]:
    """What a release of this layout says about a model's fronts.

    Raises:
        ReleaseError: A front that is not a timm model, or one whose arguments are not known (see `model_args_of`), so
            that nothing could build it again.
    """
    found = []
    for f in fronts:
        digest, cfg = f.digest(), resolve_input_data_config(f.inner)
        architecture = (getattr(f.inner, 'pretrained_cfg', None) or {}).get('architecture')
        if not architecture or not timm.is_model(architecture):
            raise ReleaseError(
                f'front {f.name} is not a timm model ({type(f.inner).__name__}), so a release could not build it '
                f'again; nothing was saved. Register it with timm.models.register_model.'
            )
        try:
            args = {} if f.shared else model_args_of(f.inner)
        except ValueError as e:
            raise ReleaseError(f'front {f.name} cannot be described: {e} Nothing was saved.') from e
        published = f.published if layout == 'heads' and f.published and f.published.digest == digest else None
        found.append(
            FrontConfig(
                name=f.name,
                shared=f.shared,
                architecture=architecture,
                args=args,
                cfg=dict(
                    input_size=list(input_size_of(f.inner)),
                    mean=list(cfg['mean']),
                    std=list(cfg['std']),
                    interpolation=cfg['interpolation'],
                ),
                size=f.size,
                digest=digest,
                published=published,
            )
        )
    return found


def released_fronts(
    fronts: Sequence[FrontConfig], layout: str, backbone: nn.Module, pretrained: bool, cache_dir: str | Path | None
) -> list[Front]:
    """The fronts of a release; those whose weights it holds are still to be filled.

    Raises:
        ReleaseError: A published network that cannot be fetched, or is not the one that was calibrated.
    """
    made = []
    for config in fronts:
        named = pretrained and not config.shared and not config.is_stored(layout)
        if named and config.published is not None:
            fetch_published(config.published, cache_dir)
        network = backbone if config.shared else config.build(named, cache_dir)
        front = Front(network, backbone, config.size)
        front.name = config.name
        if named and config.published is not None:
            config.published.check(network, f'front {config.name}')
        front.published = config.published
        made.append(front)
    return made


def named_fronts(
    front: FrontSpec, backbone: nn.Module, pretrained: bool = True, cache_dir: str | Path | None = None
) -> list[Front]:
    """The fronts that `front` describes, names loaded as timm loads them.

    Args:
        front: See `fronts.create_fronts`.
        backbone: The large network.
        pretrained: Load published weights; those of `hf-hub:` and `local-dir:` are loaded in any case.
        cache_dir: See timm.create_model.

    Raises:
        FrontError: A front that cannot be loaded, or does not fit; the message names both networks.
    """
    loaded: list[nn.Module] = []

    def build(name: str, size: tuple[int, int] | None) -> nn.Module:
        network = network_named(name, backbone, size, pretrained, cache_dir)
        if pretrained or ':' in name:
            loaded.append(network)
        return network

    fronts = create_fronts(front, backbone, build)
    for f in fronts:
        if any(f.inner is network for network in loaded):
            f.published = identify(f.inner, cache_dir)
    return fronts
