"""From a name to a cascade: what `timm.create_model('cascade_...')` and the loading of releases come down to."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..backbone import ExitPoint, input_size_of, resolve_exits
from ..errors import ReleaseError
from ..heads import HeadSpec, create_heads, head_configs
from ..model import CascadeModel
from .config import OWN_ARGS, SOURCE_KEYS
from .download import Folder, Repository
from .pretrained import fetch_published, identify
from .release import CONFIG, MAX_CONFIG, WEIGHTS, Release

__all__ = ['create_cascade', 'load']

MAX_TENSORS, MAX_MODULES, MAX_NUMBERS = 20_000, 100_000, 50_000_000_000  # timm's largest: 3 thousand, 18 billion


def create_cascade(
    base: str,
    pretrained: bool = False,
    pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    exits: int | Sequence[float] | Sequence[str] = 3,
    head: HeadSpec = 'enhanced',
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
        pretrained_model_args: timm's record of what a release's config.json asked for.
        **kwargs: For the backbone.

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
        request = dict(kwargs, exits=exits, head=head, thresholds=thresholds)
        return _load_release(Release(source), base, pretrained, pretrained_cfg_overlay, cache_dir, request)

    backbone = timm.create_model(
        base,
        pretrained,
        pretrained_cfg=cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        cache_dir=cache_dir,
        **kwargs,
    )
    model = CascadeModel(backbone, exits, head, thresholds)
    if pretrained:
        model.published = identify(backbone, cache_dir)
        model.base_model = str(backbone.pretrained_cfg.get('hf_hub_id') or '').partition('@')[0] or None
        warnings.warn(
            f'cascade_{base}: the backbone has its published weights, but nobody has published heads '
            f'for it. No exit fires until they are trained and calibrated.',
            stacklevel=4,
        )
    return model


def load(where: str | Path, **kwargs: Any) -> CascadeModel:
    """A release from a folder or a Hub repository (`user/repo[@revision]`), by timm's own loader.

    Unlike `timm.create_model` it checks config.json before timm reads it, so use it for files you do not trust.

    Args:
        where: Folder or repository.
        **kwargs: For timm.create_model.

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
        with _described_by(release), _bounded():
            backbone = timm.create_model(base, pretrained_cfg=cfg, pretrained_cfg_overlay=overlay, **request)
            return CascadeModel(backbone, own['exits'], own['head'])

    size = fetch_published(config.published, cache_dir) if config.published else None
    points, shapes = _plan(release, size)
    state = release.weights(shapes)
    if config.published is None:
        source = dict.fromkeys(SOURCE_KEYS) | dict(
            custom_load=False,
            state_dict={k.removeprefix('backbone.'): v for k, v in state.items() if k.startswith('backbone.')},
        )
    else:
        source = config.published.source
    with _described_by(release), _bounded():
        backbone = timm.create_model(
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
    same_exits = own['exits'] == config.model_args['exits']
    with _described_by(release):
        model = CascadeModel(backbone, points if same_input and same_exits else own['exits'], own['head'])
    if config.published is not None and same_input and same_classes and 'dtype' not in request:
        config.published.check(backbone, str(release))
        model.published = config.published
    model.base_model = config.base_model
    heads = {k.removeprefix('heads.'): v for k, v in state.items() if k.startswith('heads.')}
    fit = (
        same_classes
        and same_exits
        and ({k: v.shape for k, v in heads.items()} == {k: v.shape for k, v in model.heads.state_dict().items()})
    )
    if fit:
        model.heads.load_state_dict(heads)
    if fit and same_input:
        model.table, model.calibration = release.dial()
        model.profiles = release.profiles()
        if own['thresholds'] is not None:
            model.thresholds = own['thresholds']
    else:
        asked = (
            f'{backbone.num_classes} classes'
            if not same_classes
            else f'images of {input_size_of(backbone)}'
            if not same_input
            else 'other exits or heads'
        )
        lost = 'calibration and thresholds do not' if fit else 'heads and thresholds do not'
        warnings.warn(
            f'{release} was made for {config.num_classes} classes and images of {config.input_size}; asked '
            f'are {asked}: its {lost} apply. No exit fires until the cascade is '
            f'{"calibrated" if fit else "trained and calibrated"}.',
            stacklevel=5,
        )
    return model


def _plan(release: Release, size: int | None) -> tuple[Sequence[ExitPoint], dict[str, tuple[int, ...]]]:
    """Exit points of a release, and the names and shapes that its weights file must hold.

    The model that the config describes is built on the meta device, where a giant one costs nothing. Of a release of
    heads only the backbone must not have more numbers than the published file has bytes (`size`); that step is left
    out where the config asks for nothing but timm's own model.
    """
    config, published = release.config, release.config.published
    args, cfg = config.model_args, {**config.pretrained_cfg, 'architecture': config.base}
    with _described_by(release), _bounded(size or MAX_NUMBERS), torch.device('meta'):
        backbone: Any = None
        if not (published and published.is_plain(config.backbone_args, config.num_classes, config.input_size)):
            backbone = timm.create_model(config.base, pretrained_cfg=cfg, **config.backbone_args)
        points = config.points or resolve_exits(backbone, args['exits'])
        heads = create_heads(points, config.num_classes, head_configs(args['head'], len(points)))
    modules = {'heads': heads} if config.layout == 'heads' else {'backbone': backbone, 'heads': heads}
    return points, {
        f'{group}.{name}': tuple(t.shape)
        for group, module in modules.items()
        for name, t in module.state_dict().items()
    }


@contextmanager
def _described_by(release: Release) -> Iterator[None]:
    """What goes wrong while a model is built goes back to the config that describes it."""
    try:
        yield
    except ReleaseError:
        raise
    except Exception as e:  # a stranger's arguments in a model's constructor: anything may come
        raise ReleaseError(
            f'{release}: the model that {CONFIG} and your arguments describe cannot be built, or does '
            f'not fit {WEIGHTS}: {type(e).__name__}: {e}'
        ) from e


@contextmanager
def _bounded(most: int = MAX_NUMBERS) -> Iterator[None]:
    """Ends the building of a model with more than `most` numbers, or of a size that nothing in timm has.

    For as long as it lasts, every module that is built in this process is counted.
    """
    tensors = modules = numbers = 0

    def parameter(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal tensors, numbers
        tensors += 1
        numbers += tensor.numel() if tensor is not None else 0
        check()

    def child(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
        nonlocal modules
        modules += 1
        check()

    def check() -> None:
        if tensors > MAX_TENSORS or modules > MAX_MODULES or numbers > most:
            raise ReleaseError(
                f'{CONFIG} describes a model with more than {MAX_TENSORS:,} tensors, {MAX_MODULES:,} '
                f'modules or {most:,} numbers; it is not built.'
            )

    handles = [
        torch_module.register_module_parameter_registration_hook(parameter),
        torch_module.register_module_module_registration_hook(child),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
