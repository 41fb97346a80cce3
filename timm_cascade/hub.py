"""Releases: a folder or Hub repository with config.json, model.safetensors, thresholds.json and README.md.

config.json is timm's own, so timm's loader opens a release; what this library adds to it stands under `cascade`.
"""
from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import PretrainedCfg
from timm.models._hub import hf_split, save_config_for_hf
from timm.models._input import get_model_input_config
from torch import Tensor, nn

from .files import replacing, write_text
from .model import CascadeModel
from .thresholds import Calibration, ThresholdTable

__all__ = ['ReleaseError', 'create_cascade', 'load', 'push_to_hub', 'save']

_logger = logging.getLogger(__name__)

CONFIG, WEIGHTS, TABLE, CALIBRATION, CARD = (
    'config.json', 'model.safetensors', 'thresholds.json', 'calibration.safetensors', 'README.md')
FORMAT_VERSION = 1
_SOURCE_KEYS = ('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source', 'custom_load')


class ReleaseError(ValueError):
    """A release that cannot be loaded; the message says which file and why."""


def create_cascade(
        base: str,
        pretrained: bool = False,
        pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: str | Path | None = None,
        exits: Any = 3,
        head: Any = 'enhanced',
        thresholds: Any = None,
        pretrained_model_args: dict[str, Any] | None = None,
        **kwargs: Any,
) -> CascadeModel:
    """What `timm.create_model('cascade_<base>', ...)` calls.

    Args:
        base: timm name of the backbone.
        pretrained: Load a release's weights, or the backbone's published ones where there is no release.
        pretrained_cfg: Tag, or the config of a release as timm's loader read it.
        exits, head, thresholds: See CascadeModel.
        **kwargs: For the backbone.

    Raises:
        ReleaseError: A release that is damaged or does not fit its config.
    """
    for key in ('features_only', 'out_indices'):
        if kwargs.get(key):
            raise ValueError(f'{key} asks for features, but a cascade classifies. Create timm\'s "{base}" with it, or '
                             f'use model.backbone.')
    cfg = pretrained_cfg.to_dict() if isinstance(pretrained_cfg, PretrainedCfg) else pretrained_cfg
    released = isinstance(cfg, dict) and str(cfg.get('architecture') or cfg.get('source') or '') != '' and (
        cfg.get('source') in ('local-dir', 'hf-hub'))
    if not released:
        backbone = timm.create_model(
            base, pretrained, pretrained_cfg=cfg, pretrained_cfg_overlay=pretrained_cfg_overlay,
            cache_dir=cache_dir, **kwargs)
        model = CascadeModel(backbone, exits, head, thresholds)
        if pretrained:
            warnings.warn(f'cascade_{base}: the backbone has its published weights, but nobody has published heads '
                          f'for it. No exit fires until they are trained and calibrated.', stacklevel=3)
        return model

    assert isinstance(cfg, dict)
    backbone_cfg = {k: v for k, v in cfg.items() if k not in _SOURCE_KEYS} | {'architecture': base}
    if not pretrained:
        backbone = timm.create_model(base, pretrained_cfg=backbone_cfg, **kwargs)
        return CascadeModel(backbone, exits, head)
    release = _Release(cfg, cache_dir)
    weights = release.weights()
    overlay = {**(pretrained_cfg_overlay or {}), 'state_dict': weights['backbone']}
    backbone = timm.create_model(
        base, pretrained=True, pretrained_cfg=backbone_cfg, pretrained_cfg_overlay=overlay,
        pretrained_model_args={k: v for k, v in (pretrained_model_args or {}).items()
                               if k not in ('exits', 'head', 'thresholds')}, **kwargs)
    backbone.pretrained_cfg.pop('state_dict', None)
    model = CascadeModel(backbone, exits, head)
    if model.num_classes != cfg.get('num_classes'):
        warnings.warn(f'{release} was made for {cfg.get("num_classes")} classes, asked are {model.num_classes}: its '
                      f'heads and thresholds do not apply. No exit fires until heads are trained and calibrated.',
                      stacklevel=3)
        return model
    try:
        model.heads.load_state_dict(weights['heads'])
    except RuntimeError as e:
        raise ReleaseError(f'{release}: the heads in {WEIGHTS} do not fit {CONFIG}: {e}') from e
    release.read_dial(model, thresholds)
    return model


class _Release:
    """The files of a release, in a folder or on the Hub."""

    def __init__(self, cfg: Mapping[str, Any], cache_dir: str | Path | None) -> None:
        self.folder = Path(cfg['file']) if cfg.get('source') == 'local-dir' else None
        self.repo = '' if self.folder else str(cfg['hf_hub_id'])
        self.cache_dir = cache_dir

    def __str__(self) -> str:
        return str(self.folder or self.repo)

    def path(self, name: str) -> Path | None:
        """Where the file is, fetched if it has to be; None if the release has no such file."""
        if self.folder is not None:
            return self.folder / name if (self.folder / name).is_file() else None
        repo, revision = hf_split(self.repo)
        try:
            return Path(hf_hub_download(repo, name, revision=revision, cache_dir=self.cache_dir))
        except EntryNotFoundError:
            return None

    def weights(self) -> dict[str, dict[str, Tensor]]:
        path = self.path(WEIGHTS)
        if path is None:
            raise ReleaseError(f'{self} has no {WEIGHTS}; save the cascade there again.')
        try:
            tensors = load_file(path)
        except SafetensorError as e:
            raise ReleaseError(f'{path} is truncated or damaged ({e}); fetch or save it again.') from e
        groups: dict[str, dict[str, Tensor]] = {'backbone': {}, 'heads': {}}
        for name, tensor in tensors.items():
            group, _, rest = name.partition('.')
            if group not in groups:
                raise ReleaseError(f'{path} holds {name!r}; expected were backbone.* and heads.* only.')
            groups[group][rest] = tensor
        missing = [group for group, found in groups.items() if not found]
        if missing:
            raise ReleaseError(f'{path} has no {" and no ".join(missing)}; save the cascade there again.')
        return groups

    def read_dial(self, model: CascadeModel, thresholds: Any) -> None:
        """Table, calibration and active thresholds, where they belong to the model as it was built."""
        table_path, calibration_path = self.path(TABLE), self.path(CALIBRATION)
        if table_path is not None:
            table = ThresholdTable.from_json(table_path.read_text(encoding='utf-8'))
            table.check(**binding(model))
            model.table = table
        if calibration_path is not None:
            calibration = Calibration.load(calibration_path)
            if calibration.heads_hash != model.heads_hash():
                raise ReleaseError(f'{calibration_path} belongs to other heads ({calibration.heads_hash}) than '
                                   f'{WEIGHTS} ({model.heads_hash()}); calibrate again.')
            model.calibration = calibration
        if thresholds is not None:
            model.thresholds = thresholds


def binding(model: CascadeModel) -> dict[str, Any]:
    """What a threshold table must agree on with the model it is used with."""
    return dict(exits=tuple(p.module for p in model.exits), num_classes=model.num_classes,
                heads_hash=model.heads_hash(), input_size=tuple(get_model_input_config(model.backbone)['input_size']))


def save(model: CascadeModel, folder: str | Path, card: str | None = None) -> Path:
    """Writes a release that `timm.create_model('local-dir:FOLDER', pretrained=True)` loads.

    Each file replaces its forerunner in one step; what the model does not have (a table, say) is removed.

    Args:
        model: A cascade; its active thresholds are kept.
        folder: Made if it is not there.
        card: Text of README.md; without it an existing card stays, or a short one is written.
    """
    folder = Path(folder)
    with replacing(folder / WEIGHTS) as path:
        save_file({name: t.contiguous() for name, t in model.state_dict().items()}, path, metadata={'format': 'pt'})
    for name, part in ((TABLE, model.table), (CALIBRATION, model.calibration)):
        if part is None:
            (folder / name).unlink(missing_ok=True)
        elif isinstance(part, ThresholdTable):
            write_text(folder / name, part.to_json())
        else:
            part.save(folder / name)
    extra: dict[str, Any] = {'cascade': {
        'format_version': FORMAT_VERSION,
        'exits': [{'module': p.module, 'layout': p.layout, 'channels': p.channels, 'fraction': round(p.fraction, 4)}
                  for p in model.exits],
        'heads_hash': model.heads_hash(),
    }}
    if model.label_names:
        extra['label_names'] = model.label_names
    with replacing(folder / CONFIG) as path:
        save_config_for_hf(model, str(path), model_config=extra)
        config = json.loads(path.read_text(encoding='utf-8'))
        config['pretrained_cfg'].pop('label_names', None)  # they stand at the top already
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + '\n', encoding='utf-8')
    if card is not None or not (folder / CARD).exists():
        write_text(folder / CARD, card or f'# {model.pretrained_cfg["architecture"]}\n\nA timm model with early '
                                          f'exits. `import timm_cascade` before loading it with timm.\n')
    return folder


def load(where: str | Path, **kwargs: Any) -> CascadeModel:
    """A release from a folder or a Hub repository (`user/repo[@revision]`), by timm's own loader."""
    folder = Path(where)
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            raise ReleaseError(f'{folder} is no release: it has no {CONFIG}.')
        try:
            architecture = json.loads((folder / CONFIG).read_text(encoding='utf-8')).get('architecture', '')
        except (ValueError, AttributeError) as e:
            raise ReleaseError(f'{folder / CONFIG} is not a JSON object ({e}).') from e
        if not str(architecture).startswith('cascade_'):
            raise ReleaseError(f'{folder / CONFIG} describes {architecture!r}, which is no cascade.')
        name = f'local-dir:{folder}'
    elif folder.is_absolute() or str(where).count('/') != 1:
        raise ReleaseError(f'{where} is neither a folder nor a Hub repository (user/name).')
    else:
        name = f'hf-hub:{where}'
    return timm.create_model(name, pretrained=True, **kwargs)


def push_to_hub(
        model: CascadeModel | nn.Module,
        repo_id: str,
        private: bool = False,
        revision: str | None = None,
        create_pr: bool = False,
        token: str | None = None,
        commit_message: str = 'Add cascade',
        card: str | None = None,
) -> str:
    """Saves the cascade and uploads it in one commit; returns the commit's address."""
    assert isinstance(model, CascadeModel)
    api = HfApi(token=token, library_name='timm_cascade')
    api.create_repo(repo_id, private=private, exist_ok=True)
    parent = None if create_pr else api.model_info(repo_id, revision=revision).sha
    with tempfile.TemporaryDirectory() as folder:
        files = sorted(p for p in save(model, folder, card).iterdir())
        return str(api.create_commit(
            repo_id, [CommitOperationAdd(path_in_repo=p.name, path_or_fileobj=p) for p in files],
            commit_message=commit_message, revision=revision, create_pr=create_pr, parent_commit=parent).commit_url)
