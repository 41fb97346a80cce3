"""Reading the saved format: config.json, model.safetensors, thresholds.json, calibration.safetensors and the others.

They are files from outside: everything is checked before a model is built, and whatever is wrong is a ReleaseError that
names the file. `save_release.py` writes them.

Two layouts: `full` holds backbone and heads, `heads` the heads only and names the published backbone they belong to.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import ReleaseError
from ..thresholds import Calibration, Profile, ThresholdTable, profiles_from_json
from ..thresholds.path import path_from_json
from ..thresholds.samples import FloatArray
from ..utils.digest import state_digest
from ..utils.files import sha256_of
from .config import ReleaseConfig, parse_config
from .described import difference
from .download import Folder, Repository

__all__ = ['CALIBRATION', 'CARD', 'CONFIG', 'FILES', 'PATH', 'PROFILES', 'TABLE', 'WEIGHTS', 'Release', 'part_of']

CONFIG, WEIGHTS, TABLE, CALIBRATION, PROFILES, PATH, CARD = FILES = (
    'config.json',
    'model.safetensors',
    'thresholds.json',
    'calibration.safetensors',
    'profiles.json',
    'path.json',
    'README.md',
)
PICKLE = 'pytorch_model.bin'
MAX_CONFIG, MAX_TABLE, MAX_CALIBRATION, MAX_HEADER = 8 << 20, 32 << 20, 256 << 20, 16 << 20  # bytes
MAX_PROFILES = 8 << 20
MAX_SIZE = 100 << 30  # of weights, where no model says how large they may be

T = TypeVar('T')
Bound = TypeVar('Bound', ThresholdTable, Calibration)


class Release:
    """The files of a release, checked.

    Args:
        source: The folder or Hub repository that holds them.
    """

    def __init__(self, source: Folder | Repository) -> None:
        self.source = source
        self._heads_hash = ''  # of the weights that were read
        self._backbone_digest: str | None = None

    def __str__(self) -> str:
        return str(self.source)

    @cached_property
    def config(self) -> ReleaseConfig:
        """
        Raises:
            ReleaseError: There is no config.json, or it is not a cascade's.
        """
        path = self.source.path(CONFIG, MAX_CONFIG)
        if path is None:
            raise ReleaseError(f'{self} is not a release: it has no {CONFIG}.')
        try:
            return parse_config(path.read_text(encoding='utf-8'), str(path))
        except UnicodeDecodeError as e:
            raise ReleaseError(f'{path}: it is not UTF-8 ({e}).') from e

    def weights(self, shapes: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The tensors of model.safetensors by name, `backbone.*` and `heads.*`.

        Warns of a release in an older format, whose files have no hashes.

        Args:
            shapes: What the config says the file holds, meta tensors by name; without it any will do.

        Raises:
            ReleaseError: No such file, a damaged one, or tensors that are not those of the config, or not finite.
        """
        numbers = sum(t.numel() for t in shapes.values()) if shapes else 0
        path = self.source.path(WEIGHTS, 8 * numbers + MAX_HEADER if shapes else MAX_SIZE)
        if path is None:
            only_pickle = f'only {PICKLE}, a pickle: loading one can run anything, so it is not opened. Ask its author '
            raise ReleaseError(
                f'{self} has no {WEIGHTS}'
                + (
                    f', {only_pickle}to publish safetensors (timm_cascade.push_to_hub, or safe_serialization=True).'
                    if self.source.has(PICKLE)
                    else '; save the cascade there again.'
                )
            )
        try:
            with open(path, 'rb') as file:
                (length,) = struct.unpack('<Q', file.read(8))
            if length > MAX_HEADER:
                raise ReleaseError(f'{path} has a header of {length} bytes; expected are at most {MAX_HEADER}.')
            with safe_open(path, framework='pt') as tensors:
                self._check_groups(path, tensors.keys())
                state = {name: tensors.get_tensor(name) for name in tensors.keys()}
        except ReleaseError:
            raise
        except Exception as e:  # a file from outside: whatever reading it raises, it is damaged
            raise ReleaseError(f'{path} is truncated or damaged ({e}); fetch or save it again.') from e
        if shapes is not None and (found := difference(state, shapes)) is not None:
            raise ReleaseError(f'{path}: the tensors do not fit {CONFIG}: {found}.')
        wrong = [name for name, t in state.items() if t.is_floating_point() and not torch.isfinite(t).all()]
        if wrong:
            raise ReleaseError(f'{path}: {", ".join(wrong[:5])} holds NaN or infinite values; the file is damaged.')
        self._check_hashes(path, state)
        if self.config.version is not None and self.config.files is None:
            warnings.warn(
                f'{self} has format version {self.config.version}, without hashes: its files are not checked for '
                f'damage. Save it again with timm_cascade.save, then they are.',
                stacklevel=6,
            )
        return state

    def _check_groups(self, path: Path, names: Iterable[str]) -> None:
        groups = {name.partition('.')[0] for name in names}
        strange = sorted(name for name in names if name.partition('.')[0] not in ('backbone', 'heads'))
        if strange:
            raise ReleaseError(f'{path} holds {strange[0][:200]!r}; expected were backbone.* and heads.* only.')
        wanted = {'heads'} if self.config.layout == 'heads' else {'backbone', 'heads'}
        if groups != wanted:
            raise ReleaseError(
                f'{path} holds {" and ".join(sorted(groups)) or "nothing"}; a release with the layout '
                f'{self.config.layout!r} holds {" and ".join(sorted(wanted))}. There is no '
                f'{" and no ".join(sorted(wanted - groups)) or "place for the backbone"} in it.'
            )

    def _check_hashes(self, path: Path, state: Mapping[str, Tensor]) -> None:
        config = self.config
        heads = part_of(state, 'heads')
        for k, front in config.stored_fronts.items():
            network = {name.split('.', 2)[2]: heads.pop(name) for name in [*heads] if name.startswith(f'{k}.network.')}
            digest = state_digest(network)
            if digest != front.digest:
                raise ReleaseError(
                    f'{path}: its front {front.name} is {digest}, but {CONFIG} and the table were made for '
                    f'{front.digest}. The file is damaged, or from another release.'
                )
        self._heads_hash = state_digest(heads, also=[*config.exit_names, *(f.digest for f in config.fronts)])
        self._backbone_digest = config.published.digest if config.published else None
        if config.layout == 'full':
            self._backbone_digest = state_digest(part_of(state, 'backbone'))
        if config.files is not None:  # digests of older formats were taken in another way
            for what, found, expected in (
                ('heads are', self._heads_hash, config.heads_hash),
                ('backbone is', self._backbone_digest, config.digest or self._backbone_digest),
            ):
                if found != expected:
                    raise ReleaseError(
                        f'{path}: its {what} {found}, but {CONFIG} and the table were made for {expected}. The file is '
                        f'damaged, or from another release.'
                    )
        self._check_file(path)

    def _check_file(self, path: Path) -> None:
        """Size and sha256, which config.json holds; after the content, so that what is wrong there is named first."""
        if self.config.files is None:
            return
        if path.name not in self.config.files:
            raise ReleaseError(f'{path} is not a file of this release: {CONFIG} does not list it. Delete it.')
        sha256, size = self.config.files[path.name]
        found = path.stat().st_size
        if found != size or sha256_of(path) != sha256:
            difference = f'has {found:,} bytes, not {size:,}' if found != size else 'has another sha256'
            raise ReleaseError(
                f'{path} {difference} than {CONFIG} says: it is damaged, or from another release. Fetch it again, or '
                f'save the cascade again.'
            )

    def _read(self, name: str, limit: int, read: Callable[[Path], T]) -> T | None:
        """What `read` makes of a file, checked; None where there is no such file.

        Raises:
            ReleaseError: Whatever is wrong with it.
        """
        path = self.source.path(name, limit)
        if path is None:
            return None
        try:
            result = read(path)
        except ReleaseError:
            raise
        except Exception as e:  # a file from outside: whatever reading it raises, it is damaged
            said = str(e).removeprefix(f'{path}: ') or type(e).__name__
            raise ReleaseError(f'{path}: {said} Fetch the file again, or measure again.') from e
        self._check_file(path)
        return result

    def dial(self) -> tuple[ThresholdTable | None, Calibration | None]:
        """Table and calibration, where there are any; to be read after the weights, to which they must belong.

        Raises:
            ReleaseError: Damaged files, or files that belong to another cascade.
        """
        return (
            self._read(TABLE, MAX_TABLE, lambda p: self._bound(ThresholdTable.from_json(_text(p), str(p)))),
            self._read(CALIBRATION, MAX_CALIBRATION, lambda p: self._bound(Calibration.load(p))),
        )

    def _bound(self, part: Bound) -> Bound:
        """Makes sure that a table or calibration belongs to the weights that were read."""
        config = self.config
        heads_hash = self._heads_hash
        if config.version == 1:  # its digests were taken in another way: they must agree, and are replaced
            heads_hash = str(config.heads_hash)
        part.check(
            exits=config.exit_names,
            num_classes=config.num_classes,
            heads_hash=heads_hash,
            input_size=config.input_size,
            backbone_digest=self._backbone_digest,
        )
        if config.layout == 'full' and config.files is None:  # bound from now on
            part = replace(part, provenance={**part.provenance, 'backbone_digest': self._backbone_digest})
        return replace(part, heads_hash=self._heads_hash)

    def profiles(self) -> list[Profile]:
        """What its parts cost by the clock, on the machines where that was measured.

        Raises:
            ReleaseError: A damaged file, or one of another cascade.
        """

        def read(path: Path) -> list[Profile]:
            found = profiles_from_json(_text(path), str(path))
            if any(list(p.exits) != self.config.exit_names for p in found):
                raise ReleaseError(f'{path}: profiles of other exits; fetch the file again, or measure again.')
            return found

        return self._read(PROFILES, MAX_PROFILES, read) or []

    def path(self) -> FloatArray | None:
        """The path of thresholds from the heads' training features, where there is one.

        Raises:
            ReleaseError: A damaged file, or one of other heads.
        """
        exits = self.config.exit_names
        return self._read(PATH, MAX_TABLE, lambda path: path_from_json(_text(path), exits, self._heads_hash, str(path)))

    def check(self) -> None:
        """Reads everything without building a model.

        Raises:
            ReleaseError: The first thing that is wrong.
        """
        self.weights()
        self.dial()
        self.profiles()
        self.path()


def part_of(state: Mapping[str, Tensor], group: str) -> dict[str, Tensor]:
    """The tensors of `backbone` or `heads`, under their names there."""
    return {name.partition('.')[2]: t for name, t in state.items() if name.partition('.')[0] == group}


def _text(path: Path) -> str:
    return path.read_text(encoding='utf-8')
