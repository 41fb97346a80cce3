"""The saved format: config.json, model.safetensors, thresholds.json, calibration.safetensors, profiles.json, README.md.

The one module that writes and reads these files. Reading takes them for what they are, a stranger's: everything is
checked before a model is built, and whatever is wrong is a ReleaseError that names the file.

Two layouts: `full` holds backbone and heads, `heads` the heads only and names the published backbone they belong to.
"""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from ..backbone import input_size_of
from ..errors import ReleaseError
from ..model import CascadeModel
from ..thresholds import Calibration, Profile, ThresholdTable, profiles_from_json, profiles_to_json
from ..utils.digest import heads_digest, state_digest
from ..utils.files import replacing, write_text
from .card import GENERATED, PICTURE, render
from .config import LAYOUTS, ReleaseConfig, cascade_entry, parse_config
from .download import Folder, Repository
from .pretrained import Published

__all__ = [
    'CALIBRATION',
    'CARD',
    'CONFIG',
    'FILES',
    'PROFILES',
    'TABLE',
    'WEIGHTS',
    'Release',
    'binding',
    'save',
    'save_profiles',
]

CONFIG, WEIGHTS, TABLE, CALIBRATION, PROFILES, CARD = FILES = (
    'config.json',
    'model.safetensors',
    'thresholds.json',
    'calibration.safetensors',
    'profiles.json',
    'README.md',
)
PICKLE = 'pytorch_model.bin'
MAX_CONFIG, MAX_TABLE, MAX_CALIBRATION, MAX_HEADER = 8 << 20, 32 << 20, 256 << 20, 16 << 20  # bytes
MAX_PROFILES = 8 << 20
MAX_SIZE = 100 << 30  # of weights, where no model says how large they may be


class Release:
    """The files of a release, checked.

    Args:
        source: The folder or Hub repository that holds them.
    """

    def __init__(self, source: Folder | Repository) -> None:
        self.source = source
        self._heads_hash = ''  # of the weights that were read

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
            raise ReleaseError(f'{self} is no release: it has no {CONFIG}.')
        try:
            return parse_config(path.read_text(encoding='utf-8'), str(path))
        except UnicodeDecodeError as e:
            raise ReleaseError(f'{path}: it is not UTF-8 ({e}).') from e

    def weights(self, shapes: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, Tensor]:
        """The tensors of model.safetensors by name, `backbone.*` and `heads.*`.

        Args:
            shapes: What the config says the file holds, by name; without it any names and shapes will do.

        Raises:
            ReleaseError: No such file, a damaged one, or tensors that are not those of the config, or not finite.
        """
        numbers = sum(torch.Size(s).numel() for s in shapes.values()) if shapes else 0
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
                names = list(tensors.keys())
                found = {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
                self._check_names(path, found, shapes)
                state = {name: tensors.get_tensor(name) for name in names}
        except ReleaseError:
            raise
        except Exception as e:  # a stranger's file: whatever reading it raises, it is damaged
            raise ReleaseError(f'{path} is truncated or damaged ({e}); fetch or save it again.') from e
        wrong = [name for name, t in state.items() if t.is_floating_point() and not torch.isfinite(t).all()]
        if wrong:
            raise ReleaseError(f'{path}: {", ".join(wrong[:5])} holds NaN or infinite values; the file is damaged.')
        self._check_hashes(path, state)
        return state

    def _check_names(
        self, path: Path, found: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]] | None
    ) -> None:
        groups = {name.partition('.')[0] for name in found}
        strange = sorted(name for name in found if name.partition('.')[0] not in ('backbone', 'heads'))
        if strange:
            raise ReleaseError(f'{path} holds {strange[0][:200]!r}; expected were backbone.* and heads.* only.')
        wanted = {'heads'} if self.config.layout == 'heads' else {'backbone', 'heads'}
        if groups != wanted:
            raise ReleaseError(
                f'{path} holds {" and ".join(sorted(groups)) or "nothing"}; a release with the layout '
                f'{self.config.layout!r} holds {" and ".join(sorted(wanted))}. There is no '
                f'{" and no ".join(sorted(wanted - groups)) or "place for the backbone"} in it.'
            )
        if shapes is None:
            return
        missing, extra = sorted(set(shapes) - set(found)), sorted(set(found) - set(shapes))
        other = [
            f'{name} is {found[name]}, not {shape}'
            for name, shape in shapes.items()
            if name in found and found[name] != tuple(shape)
        ]
        if missing or extra or other:
            differences = [f'{n} is missing' for n in missing] + [f'{n[:200]} is not expected' for n in extra] + other
            raise ReleaseError(
                f'{path}: the tensors do not fit {CONFIG}: {"; ".join(differences[:5])}'
                f'{f" and {len(differences) - 5} more" if len(differences) > 5 else ""}.'
            )

    def _check_hashes(self, path: Path, state: Mapping[str, Tensor]) -> None:
        config = self.config
        self._heads_hash = heads_digest(config.model_args['exits'], _part(state, 'heads'))
        if config.heads_hash is not None and self._heads_hash != config.heads_hash:
            raise ReleaseError(
                f'{path}: its heads are {self._heads_hash}, but {CONFIG} and the table were made '
                f'for the heads {config.heads_hash}. The file is damaged, or from another release.'
            )
        if config.digest is not None:
            digest = state_digest(_part(state, 'backbone'))
            if digest != config.digest:
                raise ReleaseError(
                    f'{path}: its backbone is {digest}, but {CONFIG} was made for {config.digest}. The '
                    f'file is damaged, or from another release.'
                )

    def dial(self) -> tuple[ThresholdTable | None, Calibration | None]:
        """Table and calibration, where there are any; to be read after the weights, to whose heads they must belong.

        Raises:
            ReleaseError: Damaged files, or files that belong to another cascade.
        """
        config, heads_hash = self.config, self._heads_hash
        table, calibration = None, None
        path = self.source.path(TABLE, MAX_TABLE)
        try:
            if path is not None:
                table = ThresholdTable.from_json(path.read_text(encoding='utf-8'), str(path))
                table.check(config.model_args['exits'], config.num_classes, heads_hash, config.input_size)
            path = self.source.path(CALIBRATION, MAX_CALIBRATION)
            if path is not None:
                calibration = Calibration.load(path)
                calibration.table(max_drops=()).check(
                    config.model_args['exits'], config.num_classes, heads_hash, config.input_size
                )
        except ReleaseError:
            raise
        except Exception as e:  # a file from outside: whatever reading it raises, it is damaged
            said = str(e).removeprefix(f'{path}: ') or type(e).__name__
            raise ReleaseError(f'{path}: {said} Fetch the file again, or calibrate again.') from e
        return table, calibration

    def profiles(self) -> list[Profile]:
        """What its parts cost by the clock, on the machines where that was measured.

        Raises:
            ReleaseError: A damaged file, or one of another cascade.
        """
        path = self.source.path(PROFILES, MAX_PROFILES)
        if path is None:
            return []
        try:
            profiles = profiles_from_json(path.read_text(encoding='utf-8'), str(path))
        except ValueError as e:  # also of an encoding that is not UTF-8
            raise ReleaseError(f'{path}: {str(e).removeprefix(f"{path}: ")}') from e
        if any(list(p.exits) != self.config.model_args['exits'] for p in profiles):
            raise ReleaseError(f'{path}: profiles of other exits; fetch the file again, or measure again.')
        return profiles

    def check(self) -> None:
        """Reads everything without building a model.

        Raises:
            ReleaseError: The first thing that is wrong.
        """
        self.weights()
        self.dial()
        self.profiles()


def _part(state: Mapping[str, Tensor], group: str) -> dict[str, Tensor]:
    """The tensors of `backbone` or `heads`, under their names there."""
    return {name.partition('.')[2]: t for name, t in state.items() if name.partition('.')[0] == group}


def binding(model: CascadeModel) -> dict[str, Any]:
    """What a threshold table must agree on with the model it is used with."""
    return dict(
        exits=tuple(p.module for p in model.exits),
        num_classes=model.num_classes,
        heads_hash=model.heads_hash(),
        input_size=input_size_of(model.backbone),
    )


def save(model: nn.Module, folder: str | Path, layout: str | None = None, card: str | None = None) -> Path:
    """Writes a release that `timm.create_model('local-dir:FOLDER', pretrained=True)` loads.

    Each file replaces its forerunner in one step; what the model does not have (a table, say) is removed.

    Args:
        model: A cascade; its active thresholds are kept.
        folder: Made if it is not there.
        layout: `heads` (the backbone is named, not saved) or `full`; by default `heads` if the backbone is exactly a
            published checkpoint, else `full`.
        card: Text of README.md; without it a card you wrote stays, and one that was generated is written anew.

    Raises:
        ReleaseError: `heads` asked for a backbone that is no published one, a table that belongs to other heads, or
            weights that are not finite.
    """
    if not isinstance(model, CascadeModel):
        raise ReleaseError(
            f'{type(model).__name__} is no cascade; create one with '
            f'timm.create_model("cascade_...") or save the model with timm.'
        )
    published = _unchanged(model)
    layout = layout or ('heads' if published else 'full')
    if layout not in LAYOUTS:
        raise ReleaseError(f'layout is {layout!r}; expected {" or ".join(LAYOUTS)}.')
    if layout == 'heads' and published is None:
        was = (
            f'no longer {model.published.name}'
            if model.published
            else 'not a published checkpoint with nothing adapted'
        )
        raise ReleaseError(
            f'a release of heads only names its backbone, but this one is {was}; save it with layout="full".'
        )
    state = {
        name: t.detach().cpu().contiguous()
        for name, t in model.state_dict().items()
        if layout == 'full' or name.startswith('heads.')
    }
    wrong = [name for name, t in state.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if wrong:
        raise ReleaseError(f'{", ".join(wrong[:5])} holds NaN or infinite values; nothing was saved.')
    if model.table is not None:
        model.table.check(**binding(model))

    folder = Path(folder)
    entry = cascade_entry(
        layout,
        model.exits,
        model.heads_hash(),
        state_digest(_part(state, 'backbone')) if layout == 'full' else None,
        published if layout == 'heads' else None,
        model.base_model,
    )
    config = _config_text(model, entry)
    with replacing(folder / WEIGHTS) as path:
        save_file(state, path, metadata={'format': 'pt'})
    write_text(folder / CONFIG, config)
    for name, part in ((TABLE, model.table), (CALIBRATION, model.calibration)):
        if part is None:
            (folder / name).unlink(missing_ok=True)
        elif isinstance(part, ThresholdTable):
            write_text(folder / name, part.to_json())
        else:
            part.save(folder / name)
    save_profiles(model, folder)
    if card is not None or not (folder / CARD).exists() or GENERATED in (folder / CARD).read_text(encoding='utf-8'):
        write_text(
            folder / CARD,
            card or render(model, layout=layout, picture=PICTURE if (folder / PICTURE).exists() else None),
        )
    return folder


def save_profiles(model: CascadeModel, folder: str | Path) -> None:
    """Writes what was measured of this model to its release; removes the file where nothing was."""
    path = Path(folder) / PROFILES
    if model.profiles:
        write_text(path, profiles_to_json(model.profiles))
    else:
        path.unlink(missing_ok=True)


def _config_text(model: CascadeModel, entry: dict[str, Any]) -> str:
    """config.json, checked as it will be when it is read."""
    extra: dict[str, Any] = {'cascade': entry}
    if model.label_names:
        extra['label_names'] = model.label_names
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / CONFIG
        save_config_for_hf(model, str(path), model_config=extra)
        config = json.loads(path.read_text(encoding='utf-8'))
    config['pretrained_cfg'].pop('label_names', None)  # they stand at the top already
    text = json.dumps(config, indent=2, sort_keys=True) + '\n'
    parse_config(text)
    return text


def _unchanged(model: CascadeModel) -> Published | None:
    """The published checkpoint that the backbone still is."""
    if model.published is None or state_digest(model.backbone.state_dict()) != model.published.digest:
        return None
    return model.published
