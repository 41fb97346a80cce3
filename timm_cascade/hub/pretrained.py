"""Which published checkpoint a backbone is, exactly; and getting that checkpoint again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from timm.models import get_pretrained_cfg
from torch import nn

from ..backbone import input_size_of
from ..errors import ReleaseError
from ..fronts import name_of
from ..utils.digest import state_digest
from .download import Repository

if TYPE_CHECKING:
    from ..formats import PublishedEntry

__all__ = ['NO_SOURCE', 'Published', 'fetch_published', 'identify']

MAX_BYTES = 100 << 30  # of a backbone's weights
# in timm's pretrained_cfg, all that says where weights come from
NO_SOURCE: dict[str, Any] = dict(
    url=None, file=None, state_dict=None, source=None, custom_load=False, hf_hub_id=None, hf_hub_filename=None
)


@dataclass(frozen=True)
class Published:
    """A checkpoint that timm can fetch.

    Attributes:
        name: timm's name, with its tag where it has one.
        hub_id: Repository on the Hub; None for timm's few checkpoints that are elsewhere.
        revision: Commit of that repository.
        filename: Name of the weights file there.
        digest: `state_digest` of the weights as timm loads them.
        dtype: dtype of the weights when the digest was taken.
    """

    name: str
    hub_id: str | None
    revision: str | None
    filename: str | None
    digest: str
    dtype: str

    @classmethod
    def from_entry(cls, entry: PublishedEntry, base: str, source: str, what: str = 'cascade.backbone') -> Published:
        """The checkpoint that a file describes.

        Raises:
            ReleaseError: A description of another backbone, or of one that cannot be fetched.
        """
        result = cls(**entry.model_dump())
        if result.name.split('.')[0] != base:
            raise ReleaseError(f'{source}: {what}.name is {result.name!r}; it should be {base} with or without a tag.')
        if result.hub_id is None and not result.registered.get('url'):
            raise ReleaseError(
                f'{source}: {what}.name is {result.name!r}, which has no published weights that this version '
                f'of timm knows, and no Hub repository is named. Upgrade timm.'
            )
        return result

    @property
    def registered(self) -> dict[str, Any]:
        """timm's own pretrained_cfg under this name, if it has one."""
        cfg = get_pretrained_cfg(self.name, allow_unregistered=True)
        return cfg.to_dict() if cfg else {}

    def is_plain(self, args: Mapping[str, Any], num_classes: int, input_size: tuple[int, ...]) -> bool:
        """Whether arguments for the backbone ask for nothing but the model as timm registered it."""
        cfg = self.registered
        return (
            bool(cfg)
            and set(args) <= {'num_classes', 'in_chans', 'img_size', 'global_pool'}
            and (num_classes == cfg['num_classes'] and input_size == tuple(cfg['input_size']))
        )

    @property
    def source(self) -> dict[str, Any]:
        """Overlay for timm's pretrained_cfg that makes it load this checkpoint."""
        if self.hub_id is None:
            return {**NO_SOURCE, 'url': self.registered['url']}
        own_name = None if self.filename == 'model.safetensors' else self.filename
        return {**NO_SOURCE, 'hf_hub_id': f'{self.hub_id}@{self.revision}', 'hf_hub_filename': own_name}

    def check(self, backbone: nn.Module, what: str) -> None:
        """Makes sure that `backbone` has these weights.

        Raises:
            ReleaseError: Others.
        """
        found = state_digest(backbone.state_dict())
        if found != self.digest:
            raise ReleaseError(
                f'{what} was made for a backbone {self.name} with the weights {self.digest}; '
                f'{self.hub_id or "timm"} gave {found}. Its heads and thresholds would not do what they promise. '
                f"Delete the backbone's file from the cache if it may be damaged, or ask for a release that holds "
                f'its backbone (layout="full").'
            )


def identify(backbone: nn.Module, cache_dir: str | Path | None = None) -> Published | None:
    """The published checkpoint that a backbone just loaded, with nothing adapted; None if there is none like it."""
    cfg: dict[str, Any] = backbone.pretrained_cfg  # type: ignore[assignment]
    name = name_of(backbone)
    adapted = backbone.num_classes != cfg['num_classes'] or input_size_of(backbone) != tuple(cfg['input_size'])
    if adapted or cfg.get('state_dict') or cfg.get('file') or cfg.get('label_offset'):
        return None
    hub_id = revision = filename = None
    if cfg.get('hf_hub_id'):
        hub_id, _, asked = str(cfg['hf_hub_id']).partition('@')
        filename = cfg.get('hf_hub_filename') or 'model.safetensors'
        cached = try_to_load_from_cache(hub_id, filename, cache_dir=cache_dir, revision=asked or None)
        if not isinstance(cached, str) or not filename.endswith('.safetensors'):
            return None  # a pickle; whoever loads the release must not need one
        revision = Path(cached).parent.name
    else:
        known = get_pretrained_cfg(name, allow_unregistered=True)
        if not cfg.get('url') or known is None or known.url != cfg['url'] or known.custom_load:
            return None
    state = backbone.state_dict()
    dtype = str(next(t.dtype for t in state.values() if t.is_floating_point())).removeprefix('torch.')
    return Published(name, hub_id, revision, filename, state_digest(state), dtype)


def fetch_published(published: Published, cache_dir: str | Path | None = None) -> int | None:
    """Makes sure that the weights are a whole safetensors file in the cache, where timm then finds them.

    Returns:
        Size of the file in bytes; None for a checkpoint that is not on the Hub.

    Raises:
        ReleaseError: There is no such file, or it is damaged.
    """
    if published.hub_id is None:
        return None
    assert published.filename is not None and published.revision is not None
    cached = try_to_load_from_cache(
        published.hub_id, published.filename, cache_dir=cache_dir, revision=published.revision
    )
    if isinstance(cached, str):  # checked when it was downloaded; its digest is compared once it is loaded
        return Path(cached).stat().st_size
    repository = Repository(f'{published.hub_id}@{published.revision}', cache_dir)
    path = repository.path(published.filename, MAX_BYTES)
    if path is None:
        raise ReleaseError(f'{repository}, the backbone of this release, has no {published.filename}.')
    try:
        with safe_open(path, framework='pt'):
            pass
    except Exception as e:  # from an untrusted file: anything may be raised
        raise ReleaseError(f'{path} ({repository}) is not a safetensors file ({e}).') from e
    return path.stat().st_size
