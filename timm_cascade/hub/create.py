"""From a name to a cascade: what `timm.create_model('cascade_...')` and the loading of releases come down to."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
from timm.models import PretrainedCfg
from torch import Tensor

from ..backbone import input_size_of
from ..errors import ReleaseError, TableMismatchError
from ..fronts import FrontSpec
from ..heads import HeadSpec
from ..inference.weights import binding
from ..model import CascadeModel
from ..utils.digest import state_digest
from ..utils.timm_models import create_model
from .config import OWN_ARGS, ReleaseConfig
from .described import bounded, described_by, plan
from .download import Folder, Repository
from .front_networks import named_fronts, released_fronts
from .pretrained import NO_SOURCE, fetch_published, identify
from .release import CONFIG, MAX_CONFIG, Release, part_of

__all__ = ['create_cascade', 'load']


def create_cascade(
    base: str,
    pretrained: bool = False,
    pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    exits: int | Sequence[float] | Sequence[str] | None = None,
    head: HeadSpec = 'enhanced',
    thresholds: Any = None,
    front: FrontSpec = None,
    front_pretrained: bool | None = None,
    pretrained_model_args: dict[str, Any] | None = None,
    **kwargs: Any,
) -> CascadeModel:
    """What `timm.create_model('cascade_<base>', ...)` calls.

    Args:
        base: timm name of the backbone.
        pretrained: Load a release's weights, or the backbone's published ones where there is no release.
        pretrained_cfg: Tag, or the config of a release as timm's loader read it.
        exits, head, thresholds, front: See CascadeModel; a front may also be a name with or without a size
            (`NAME`, `NAME@160`), which is loaded as the backbone is (see `fronts.network_named`).
        front_pretrained: Whether fronts that are named have their published weights; by default as the backbone.
        pretrained_model_args: timm's record of what a release's config.json asked for.
        **kwargs: Arguments of the backbone.

    Raises:
        ReleaseError: A release that is damaged or does not fit its config.
    """
    for key in ('features_only', 'out_indices'):
        if kwargs.get(key):
            raise ValueError(
                f'{key} asks for features, but a cascade classifies. Create timm\'s "{base}" with it, or '
                f'use model.backbone.'
            )
    cfg = pretrained_cfg.to_dict() if isinstance(pretrained_cfg, PretrainedCfg) else pretrained_cfg
    if isinstance(cfg, dict) and cfg.get('source') in ('local-dir', 'hf-hub'):
        source = Folder(cfg['file']) if cfg['source'] == 'local-dir' else Repository(cfg['hf_hub_id'], cache_dir)
        if isinstance(source, Repository):
            source.commit(CONFIG)  # of the file that timm's loader has just read: the others must be of the same
        request = dict(kwargs, exits=exits, head=head, thresholds=thresholds, front=front)
        return _load_release(Release(source), base, pretrained, pretrained_cfg_overlay, cache_dir, request)

    backbone = create_model(
        base,
        pretrained,
        pretrained_cfg=cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        cache_dir=cache_dir,
        **kwargs,
    )
    fronts = named_fronts(front, backbone, pretrained if front_pretrained is None else front_pretrained, cache_dir)
    model = CascadeModel(backbone, exits, head, thresholds, fronts)
    if pretrained:
        model.published = identify(backbone, cache_dir)
        model.base_model = str(backbone.pretrained_cfg.get('hf_hub_id') or '').partition('@')[0] or None
        if len(model.fronts) < len(model.exits):
            warnings.warn(
                f'cascade_{base}: the backbone has its published weights, but no heads are published '
                f'for it. No exit fires until they are trained and calibrated.',
                stacklevel=4,
            )
    return model


def load(where: str | Path, **kwargs: Any) -> CascadeModel:
    """A release from a folder or a Hub repository (`user/repo[@revision]`), by timm's own loader.

    Unlike `timm.create_model` it checks config.json before timm reads it, so use it for files you do not trust.

    Args:
        where: Folder or repository.
        **kwargs: Arguments of timm.create_model.

    Raises:
        ReleaseError: There is no such release, or it is damaged; the message says which file and why.
    """
    source: Folder | Repository
    if Path(where).is_dir():
        source, name = Folder(where), f'local-dir:{where}'
    elif Path(where).is_absolute() or str(where).count('/') != 1 or str(where).startswith('.'):
        raise ReleaseError(f'{where} is neither a folder nor a Hub repository (user/name).')
    else:
        source, name = Repository(str(where), kwargs.get('cache_dir')), f'hf-hub:{where}'
        source.refresh(CONFIG, MAX_CONFIG)
    _ = Release(source).config
    return timm.create_model(name, pretrained=True, **kwargs)


def _load_release(
    release: Release,
    base: str,
    pretrained: bool,
    overlay: Mapping[str, Any] | None,
    cache_dir: str | Path | None,
    request: dict[str, Any],
) -> CascadeModel:
    """The release with what `request` (arguments of create_model) asks for otherwise."""
    config = release.config
    if config.base != base:
        raise ReleaseError(f'{release}: {CONFIG} changed while it was read; load again.')
    own = {key: request.pop(key) for key in OWN_ARGS}
    cfg = {**config.pretrained_cfg, 'architecture': base}
    if not pretrained:
        with described_by(str(release)), bounded():
            backbone = create_model(base, pretrained_cfg=cfg, pretrained_cfg_overlay=overlay, **request)
            fronts = released_fronts(config.fronts, config.layout, backbone, False, cache_dir)
            return CascadeModel(backbone, own['exits'], own['head'], front=fronts)

    size = fetch_published(config.published, cache_dir) if config.published else None
    described = plan(config, str(release), size)
    state = release.weights(described.tensors)
    own_weights = {**NO_SOURCE, 'state_dict': part_of(state, 'backbone')}
    source = config.published.source if config.published else own_weights
    with described_by(str(release)), bounded():
        backbone = create_model(
            base,
            pretrained=True,
            pretrained_cfg=cfg,
            pretrained_cfg_overlay={**(overlay or {}), **source},
            pretrained_model_args=config.backbone_args,
            cache_dir=cache_dir,
            **request,
        )
    backbone.pretrained_cfg.pop('state_dict', None)

    same_input = input_size_of(backbone) == config.input_size
    same_classes = backbone.num_classes == config.num_classes
    same_fronts = (own['front'] or []) == [f.name for f in config.fronts]
    same_inner = own['exits'] == config.model_args['exits']
    with described_by(str(release)), bounded():
        fronts = (
            released_fronts(config.fronts, config.layout, backbone, True, cache_dir)
            if same_fronts
            else named_fronts(own['front'], backbone, True, cache_dir)
        )
        points = described.points if same_input and same_inner else own['exits']
        model = CascadeModel(backbone, points, own['head'], front=fronts)
    if config.published is not None and same_input and same_classes and 'dtype' not in request:
        if config.files is None:  # an older format took digests in another way
            model.published = replace(config.published, digest=state_digest(backbone.state_dict()))
        else:
            config.published.check(backbone, str(release))
            model.published = config.published
    model.base_model = config.base_model
    if 'dtype' not in request and config.points is not None:
        _as_saved(model, state)
    fit = same_classes and same_inner and _fill_heads(model, part_of(state, 'heads'), config, same_fronts)
    if fit and same_input and same_fronts:
        model.table, model.calibration = release.dial()
        model.profiles = release.profiles()
        model.dial.path = release.path()
        if own['thresholds'] is not None:
            model.thresholds = own['thresholds']
        if 'dtype' in request or overlay:
            _forget_what_does_not_apply(model, release)
    else:
        reasons = (
            (same_classes, f'{backbone.num_classes} classes'),
            (same_input, f'images of {input_size_of(backbone)}'),
            (fit, 'other exits or heads'),
            (same_fronts, 'other networks in front'),
        )
        asked = next(text for same, text in reasons if not same)
        lost = 'calibration and thresholds do not' if fit else 'heads and thresholds do not'
        warnings.warn(
            f'{release} was made for {config.num_classes} classes and images of {config.input_size}; asked '
            f'are {asked}: its {lost} apply. No exit fires until the cascade is '
            f'{"calibrated" if fit or len(model.fronts) == len(model.exits) else "trained and calibrated"}.',
            stacklevel=5,
        )
    return model


def _fill_heads(model: CascadeModel, heads: Mapping[str, Tensor], config: ReleaseConfig, same_fronts: bool) -> bool:
    """Gives the model the heads of a release, if all of them fit, and says whether they do.

    With other fronts those behind them are kept, under their new numbers.
    """
    loaded = tuple(f'{k}.network.' for k, f in enumerate(config.fronts) if not f.is_stored(config.layout))
    if not same_fronts:
        before, now = len(config.fronts), len(model.fronts)
        numbered = [(name.partition('.'), t) for name, t in heads.items()]
        heads = {f'{int(k) - before + now}.{rest}': t for (k, _, rest), t in numbered if int(k) >= before}
        loaded = tuple(f'{k}.' for k in range(now))
    wanted = {name: t.shape for name, t in model.heads.state_dict().items() if not name.startswith(loaded)}
    if {name: t.shape for name, t in heads.items()} != wanted:
        return False
    model.heads.load_state_dict(heads, strict=not loaded)
    return True


def _as_saved(model: CascadeModel, state: Mapping[str, Tensor]) -> None:
    """Gives backbone and heads the precision of the saved tensors; timm builds everything in float32."""
    for group, module in (('backbone', model.backbone), ('heads', model.heads)):
        saved = {t.dtype for name, t in state.items() if name.startswith(f'{group}.') and t.is_floating_point()}
        if len(saved) == 1:
            module.to(next(iter(saved)))
        elif saved:  # each its own
            for name, t in module.state_dict(keep_vars=True).items():
                t.data = t.data.to(state[f'{group}.{name}'].dtype) if f'{group}.{name}' in state else t.data


def _forget_what_does_not_apply(model: CascadeModel, release: Release) -> None:
    """Drops the calibration where the caller asked for another precision or transform; thresholds stay as set."""
    try:
        for part in (model.table, model.calibration):
            if part is not None:
                part.check(**binding(model))
    except TableMismatchError as e:
        model.dial.clear()
        warnings.warn(
            f'{release}: {e} Thresholds stay as they were saved, without what was promised of them; to choose others, '
            f'calibrate this model first.',
            stacklevel=6,
        )
