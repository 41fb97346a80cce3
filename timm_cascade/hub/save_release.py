"""Writing the saved format; `release.py` reads it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import ReleaseError
from ..inference.request import unwrap
from ..inference.weights import binding
from ..model import CascadeModel
from ..thresholds import profiles_to_json
from ..thresholds.path import path_to_json
from ..utils.digest import state_digest
from ..utils.files import replacing, sha256_of
from ..utils.timm_models import save_config
from .card import GENERATED, PICTURE, render
from .config import LAYOUTS, parse_config
from .described import difference, plan, shared_memory
from .front_networks import FrontConfig, describe_fronts
from .pretrained import Published
from .release import CALIBRATION, CARD, CONFIG, PATH, PROFILES, TABLE, WEIGHTS

__all__ = ['save', 'save_profiles']


def save(model: nn.Module, folder: str | Path, layout: str | None = None, card: str | None = None) -> Path:
    """Writes a release that `timm.create_model('local-dir:FOLDER', pretrained=True)` loads.

    All files are written beside the old ones, then renamed, config.json last; an error leaves the old release as it
    was. What the model does not have (a table, say) is removed.

    Args:
        model: A cascade; its active thresholds are kept.
        folder: Made if it is not there.
        layout: `heads` (the backbone is named, not saved) or `full`; by default `heads` if the backbone is exactly a
            published checkpoint, else `full`.
        card: Text of README.md; without it a card you wrote stays, and one that was generated is written again.

    Raises:
        ReleaseError: `heads` asked for a backbone that is not a published one, weights that are not finite, or tensors
            that are not those of the model that its own config describes; the message names the first.
        TableMismatchError: A table or calibration that was made for other weights, or with another dtype or transform.

    Example:
        >>> timm_cascade.save(model, 'cascade_resnet50.flowers')
    """
    try:
        model = unwrap(model, CascadeModel)
    except TypeError as e:
        raise ReleaseError(f'{e} Save other models with timm.') from e
    published = model.published
    if published is not None and state_digest(model.backbone.state_dict()) != published.digest:
        published = None  # no longer that checkpoint
    layout = layout or ('heads' if published else 'full')
    if layout not in LAYOUTS:
        raise ReleaseError(f'layout is {layout!r}; expected {" or ".join(LAYOUTS)}.')
    if layout == 'heads' and published is None:
        named = model.published.name if model.published else ''
        was = f'no longer {named}' if named else 'not a published checkpoint with nothing adapted'
        raise ReleaseError(
            f'a release of heads only names its backbone, but this one is {was}; save it with layout="full".'
        )
    published = published if layout == 'heads' else None
    fronts = describe_fronts(model.fronts, layout)
    state = _tensors(model, layout, [f'heads.{k}.network.' for k, f in enumerate(fronts) if not f.is_stored(layout)])
    now = binding(model)
    for part in (model.table, model.calibration):
        if part is not None:
            part.check(**now)

    config = _config(model, layout, published, now, fronts)
    described = plan(parse_config(json.dumps(config)), str(folder))
    wrong = difference(state, described.tensors) or shared_memory(state, described)
    if wrong is not None:
        raise ReleaseError(
            f'{wrong}. The cascade is not the one that its config describes ({config["architecture"]} with model_args '
            f'{str(config["model_args"])[:200]}), so it could not be loaded; nothing was saved. Merge what was added '
            f'(adapters, say) into the original weights, save the cascade as it was before its structure changed, or '
            f'create it with the arguments that describe it: timm.create_model({config["architecture"]!r}, ...).'
        )
    folder = Path(folder)
    with ExitStack() as stack:  # renamed in the opposite order: config.json last, which the others are checked against
        staged = stack.enter_context(replacing(folder / CONFIG))
        path = stack.enter_context(replacing(folder / WEIGHTS))
        # what is shared in the model as it will be built too, the file may hold twice
        twice = {name for group in described.shared for name in group}
        try:
            save_file({name: t.clone() if name in twice else t for name, t in state.items()}, path, {'format': 'pt'})
        except OSError:
            raise
        except Exception as e:  # safetensors' own: it names tensors, and says why it does not take them
            raise ReleaseError(f'{folder}: safetensors does not take these weights ({e}); nothing was saved.') from e
        paths = {WEIGHTS: path}
        texts = {}
        if model.table is not None:
            texts[TABLE] = model.table.to_json()
        if model.profiles:
            texts[PROFILES] = profiles_to_json(model.profiles)
        if model.dial.path is not None:
            texts[PATH] = path_to_json(model.dial.path, [p.module for p in model.exits], model.heads_hash())
        if model.calibration is not None:
            paths[CALIBRATION] = stack.enter_context(replacing(folder / CALIBRATION))
            model.calibration.save(paths[CALIBRATION])
        for name, text in texts.items():
            paths[name] = stack.enter_context(replacing(folder / name))
            paths[name].write_text(text, encoding='utf-8')
        config['cascade']['files'] = {name: _entry(path) for name, path in sorted(paths.items())}
        staged.write_text(_dumps(config), encoding='utf-8')
        if card is not None or not (folder / CARD).exists() or GENERATED in (folder / CARD).read_text(encoding='utf-8'):
            text = card or render(model, layout=layout, picture=PICTURE if (folder / PICTURE).exists() else None)
            stack.enter_context(replacing(folder / CARD)).write_text(text, encoding='utf-8')
        for name in {TABLE, CALIBRATION, PROFILES, PATH} - set(paths):
            (folder / name).unlink(missing_ok=True)
    return folder


def save_profiles(model: CascadeModel, folder: str | Path) -> None:
    """Writes what was measured of this model to its release; removes the file where nothing was."""
    folder = Path(folder)
    config = json.loads((folder / CONFIG).read_text(encoding='utf-8'))
    files = config.get('cascade', {}).get('files', {})
    with ExitStack() as stack:
        staged = stack.enter_context(replacing(folder / CONFIG))
        files.pop(PROFILES, None)
        if model.profiles:
            path = stack.enter_context(replacing(folder / PROFILES))
            path.write_text(profiles_to_json(model.profiles), encoding='utf-8')
            files[PROFILES] = _entry(path)
        else:
            (folder / PROFILES).unlink(missing_ok=True)
        staged.write_text(_dumps(config), encoding='utf-8')


def _tensors(model: CascadeModel, layout: str, named: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of a release of this model, without those that begin with one of `named`.

    Raises:
        ReleaseError: What is not a plain tensor, or not finite.
    """
    state: dict[str, Tensor] = {}
    for name, t in model.state_dict().items():
        if (layout == 'heads' and not name.startswith('heads.')) or name.startswith(tuple(named)):
            continue
        plain = type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided and not t.is_quantized and not t.is_meta
        if not plain:
            raise ReleaseError(
                f'{name} is not a plain tensor ({type(t).__name__}); a quantised or otherwise converted model cannot '
                f'be saved. Keep the original, save it, and convert what was loaded.'
            )
        if t.is_floating_point() and not torch.isfinite(t).all():
            raise ReleaseError(f'{name} holds NaN or infinite values; nothing was saved.')
        state[name] = t.detach().cpu().contiguous()
    return state


def _entry(path: Path) -> dict[str, Any]:
    return dict(sha256=sha256_of(path), size=path.stat().st_size)


def _dumps(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=2, sort_keys=True) + '\n'


def _config(
    model: CascadeModel,
    layout: str,
    published: Published | None,
    binding: Mapping[str, Any],
    fronts: Sequence[FrontConfig],
) -> dict[str, Any]:
    """config.json with everything but the hashes of the files, which are not written yet."""
    from ..formats import CONFIG_VERSION

    own = dict(digest=binding['backbone_digest'], base_model=model.base_model)
    entry = dict(
        format_version=CONFIG_VERSION if fronts else CONFIG_VERSION - 1,
        layout=layout,
        exits=[asdict(p) for p in model.exits if p.cut != 'input'],
        **({'fronts': [asdict(f) for f in fronts]} if fronts else {}),
        files={WEIGHTS: dict(sha256='0' * 64, size=0)},
        heads_hash=binding['heads_hash'],
        backbone=own if published is None else asdict(published),
    )
    extra: dict[str, Any] = {'cascade': entry}
    if model.label_names:
        extra['label_names'] = model.label_names
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / CONFIG
        try:
            save_config(model, path, extra)
        except (TypeError, ValueError) as e:  # timm's own: an argument that JSON does not hold
            raise ReleaseError(f'timm cannot describe this model in {CONFIG}: {e} Nothing was saved.') from e
        config = json.loads(path.read_text(encoding='utf-8'))
    config['pretrained_cfg'].pop('label_names', None)  # they stand at the top already
    return config
