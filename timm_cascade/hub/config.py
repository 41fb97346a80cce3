"""config.json of a release, checked: it comes from strangers, and timm hands its model_args to a model's constructor.

The file is timm's own, so timm's loader opens it. What this library adds stands under `cascade`; a repository that
timm's own `push_to_hf_hub` made has no such key, and loads too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import timm
from timm.models import PretrainedCfg

from ..backbone import ExitPoint
from ..errors import ReleaseError
from .pretrained import Published

__all__ = ['FORMAT_VERSION', 'LAYOUTS', 'OWN_ARGS', 'SOURCE_KEYS', 'ReleaseConfig', 'cascade_entry', 'parse_config']

FORMAT_VERSION = 1
LAYOUTS = ('full', 'heads')
OWN_ARGS = ('exits', 'head', 'thresholds')  # model_args that are the cascade's and not the backbone's
SOURCE_KEYS = ('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source', 'custom_load')
# What a release must not decide: these are the caller's, or timm's own between its functions.
_NOT_ARGS = {
    'model_name',
    'pretrained',
    'pretrained_cfg',
    'pretrained_cfg_overlay',
    'pretrained_model_args',
    'cache_dir',
    'checkpoint_path',
    'scriptable',
    'exportable',
    'no_jit',
    'features_only',
    'out_indices',
    'feature_cls',
    'feature_cfg',
    'pretrained_strict',
    'pretrained_filter_fn',
    'kwargs_filter',
    'device',
    'dtype',
}
MAX_DEPTH = 6
MAX_LENGTH = 1000  # of lists and texts in model_args and pretrained_cfg
MAX_NUMBER = 1 << 20
MAX_CLASSES = 1 << 20
MAX_EXITS = 256
MAX_ITEMS = 64  # tensors in the output of a module
MAX_SIDE = 1 << 14


@dataclass(frozen=True)
class ReleaseConfig:
    """A checked config.json.

    Attributes:
        base: timm's name of the backbone.
        num_classes: Of the classifier and the heads.
        model_args: For the model, `exits`, `head` and `thresholds` among them.
        pretrained_cfg: timm's, with the labels and without where weights come from.
        layout: `full` or `heads`.
        points: Exit points; None in a repository that this library did not write.
        heads_hash: Of the heads in the weights file; None likewise.
        digest: Of the backbone's weights in a full release; None likewise.
        published: The backbone of a release of heads only.
        base_model: Hub id of what the backbone was made from, if that is known.
    """

    base: str
    num_classes: int
    model_args: dict[str, Any]
    pretrained_cfg: dict[str, Any]
    layout: str
    points: tuple[ExitPoint, ...] | None
    heads_hash: str | None
    digest: str | None
    published: Published | None
    base_model: str | None

    @property
    def input_size(self) -> tuple[int, ...]:
        """(channels, height, width) of the images it was made for."""
        return tuple(self.pretrained_cfg['input_size'])

    @property
    def backbone_args(self) -> dict[str, Any]:
        return {k: v for k, v in self.model_args.items() if k not in OWN_ARGS}


def cascade_entry(
    layout: str,
    points: Sequence[ExitPoint],
    heads_hash: str,
    digest: str | None,
    published: Published | None,
    base_model: str | None,
) -> dict[str, Any]:
    """What a release's config.json holds under `cascade`."""
    return dict(
        format_version=FORMAT_VERSION,
        layout=layout,
        exits=[asdict(p) for p in points],
        heads_hash=heads_hash,
        backbone=dict(digest=digest, base_model=base_model) if published is None else published.to_dict(),
    )


def parse_config(text: str) -> ReleaseConfig:
    """Reads config.json.

    Raises:
        ReleaseError: Not a cascade's, of a newer format, or with values that cannot be right.
    """
    try:
        config = json.loads(text, parse_constant=_refuse)
    except RecursionError as e:
        raise ReleaseError(f'is nested more than {MAX_DEPTH} deep') from e
    except ValueError as e:
        raise ReleaseError(f'is not a JSON object ({e})') from e
    if not isinstance(config, dict):
        raise ReleaseError(f'is not a JSON object, but a {type(config).__name__}')
    if _deeper_than(config, MAX_DEPTH):
        raise ReleaseError(f'is nested more than {MAX_DEPTH} deep')
    architecture = config.get('architecture')
    if not isinstance(architecture, str) or not architecture.startswith('cascade_'):
        raise ReleaseError(f'describes {str(architecture)[:100]!r}, which is no cascade')
    if not timm.is_model(architecture):
        raise ReleaseError(f'describes {architecture[:100]!r}, which this version of timm does not know; upgrade timm')
    cfg, args = config.get('pretrained_cfg') or {}, config.get('model_args') or {}
    num_classes = config.get('num_classes')
    _expect(_is_count(num_classes, MAX_CLASSES), 'num_classes', num_classes, 'a number of classes')
    assert isinstance(num_classes, int)
    _check_pretrained_cfg(cfg)
    _check_args(args)
    labels = {key: config.get(key, cfg.get(key)) for key in ('label_names', 'label_descriptions')}
    _check_labels(labels['label_names'], labels['label_descriptions'], num_classes)
    base = architecture.removeprefix('cascade_')
    ours = _check_cascade(config.get('cascade'), base)
    points = ours.get('points')
    if points is not None and [p.module for p in points] != args['exits']:
        raise ReleaseError(f'has the exits {[p.module for p in points]} in one place and {args["exits"]} in another')
    return ReleaseConfig(
        base=base,
        num_classes=num_classes,
        model_args=args,
        layout=ours.get('layout', 'full'),
        pretrained_cfg={
            **{k: v for k, v in cfg.items() if k not in SOURCE_KEYS},
            **{k: v for k, v in labels.items() if v},
        },
        points=points,
        heads_hash=ours.get('heads_hash'),
        digest=ours.get('digest'),
        published=ours.get('published'),
        base_model=ours.get('base_model'),
    )


def _refuse(constant: str) -> float:
    raise ReleaseError(f'holds {constant}; expected finite numbers')


def _deeper_than(value: Any, depth: int) -> bool:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth < 0 or any(_deeper_than(child, depth - 1) for child in children)


def _expect(right: bool, what: str, value: Any, expected: str) -> None:
    if not right:
        shown = repr(value)
        raise ReleaseError(f'has {what} {shown if len(shown) < 100 else shown[:100] + "..."}; expected {expected}')


def _is_count(value: Any, most: int, least: int = 0) -> bool:
    return type(value) is int and least <= value <= most


def _is_number(value: Any, most: float = MAX_NUMBER) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= most


def _is_simple(value: Any, depth: int = 2) -> bool:
    """A JSON scalar of sane size, or a short list of such."""
    if isinstance(value, list):
        return depth > 0 and len(value) <= MAX_LENGTH and all(_is_simple(v, depth - 1) for v in value)
    if isinstance(value, str):
        return len(value) <= MAX_LENGTH and value.isprintable()
    return value is None or isinstance(value, bool) or _is_number(value)


def _check_pretrained_cfg(cfg: Any) -> None:
    _expect(isinstance(cfg, dict), 'pretrained_cfg', cfg, 'an object')
    unknown = sorted(set(cfg) - {f.name for f in fields(PretrainedCfg)})
    if unknown:
        raise ReleaseError(f'has keys in pretrained_cfg that timm does not know: {str(unknown)[:200]}')
    size = cfg.get('input_size')
    _expect(
        isinstance(size, list) and len(size) == 3 and all(_is_count(s, MAX_SIDE, 1) for s in size),
        'input_size',
        size,
        f'[channels, height, width], each 1 to {MAX_SIDE}',
    )
    for key in ('mean', 'std'):
        value = cfg.get(key)
        _expect(
            isinstance(value, list) and 1 <= len(value) <= MAX_LENGTH and all(map(_is_number, value)),
            key,
            value,
            'a list of numbers',
        )
    for key in ('first_conv', 'classifier'):
        value = cfg.get(key)
        _expect(
            value is None
            or isinstance(value, str)
            or (isinstance(value, list) and all(isinstance(v, str) for v in value)),
            key,
            value,
            'names of modules',
        )
    for key, value in cfg.items():
        if key not in ('label_names', 'label_descriptions', 'description', 'notes'):
            _expect(_is_simple(value), f'pretrained_cfg.{key}'[:100], value, 'a short value')


def _check_args(args: Any) -> None:
    _expect(isinstance(args, dict) and len(args) <= 100, 'model_args', args, 'an object')
    for key, value in args.items():
        _expect(
            key.isidentifier() and key not in _NOT_ARGS and len(key) < 100,
            'the model argument',
            key,
            'an argument of the backbone',
        )
        if key not in ('head', 'thresholds'):
            _expect(
                _is_simple(value),
                f'model_args.{key}',
                value,
                f'a short text, a number up to {MAX_NUMBER}, or a short list of these',
            )
    exits, head, thresholds = (args.get(key) for key in OWN_ARGS)
    _expect(
        isinstance(exits, list) and 1 <= len(exits) <= MAX_EXITS and all(isinstance(e, str) for e in exits),
        'exits',
        exits,
        f'names of modules, 1 to {MAX_EXITS}',
    )
    assert isinstance(exits, list)
    _expect(
        isinstance(head, list)
        and len(head) == len(exits)
        and all(
            isinstance(h, dict)
            and set(h) == {'grid', 'hidden', 'norm'}
            and _is_count(h['grid'], 1000, 1)
            and _is_count(h['hidden'], 1 << 16)
            and isinstance(h['norm'], bool)
            for h in head
        ),
        'head',
        head,
        'grid, hidden and norm for each exit',
    )
    if not isinstance(thresholds, list) or len(thresholds) != len(exits):
        given = len(thresholds) if isinstance(thresholds, list) else type(thresholds).__name__
        raise ReleaseError(f'has {given} thresholds for {len(exits)} exits')
    for t in thresholds:
        _expect(t is None or (_is_number(t) and 0 <= t <= 1), 'the threshold', t, 'a confidence in 0..1, or null')


def _check_labels(names: Any, descriptions: Any, num_classes: int) -> None:
    """timm knows a list of names, one a class, or an object from class to name where classes are missing."""
    if isinstance(names, list):
        if len(names) != num_classes:
            raise ReleaseError(f'has {len(names)} label_names for {num_classes} classes')
        texts = list(names)
    else:
        _expect(
            names is None or (isinstance(names, dict) and len(names) <= num_classes),
            'label_names',
            names,
            'a name for each class',
        )
        texts = list((names or {}).values())
    _expect(
        descriptions is None or (isinstance(descriptions, dict) and len(descriptions) <= MAX_CLASSES),
        'label_descriptions',
        descriptions,
        'a text for each name',
    )
    texts += list((descriptions or {}).values())
    for text in texts:
        _expect(isinstance(text, str) and len(text) <= 10 * MAX_LENGTH, 'the label', text, 'a text')


def _check_cascade(entry: Any, base: str) -> Mapping[str, Any]:
    if entry is None:
        return {}
    _expect(isinstance(entry, dict), 'cascade', entry, 'an object')
    version = entry.get('format_version')
    if not _is_count(version, FORMAT_VERSION, 1):
        raise ReleaseError(
            f'has format_version {str(version)[:50]}, known here is {FORMAT_VERSION}; upgrade '
            f'timm_cascade, or ask for a release in the older format'
        )
    layout, heads_hash, backbone = (entry.get(key) for key in ('layout', 'heads_hash', 'backbone'))
    _expect(layout in LAYOUTS, 'layout', layout, ' or '.join(LAYOUTS))
    _expect(isinstance(heads_hash, str) and len(heads_hash) == 16, 'heads_hash', heads_hash, '16 hex digits')
    _expect(isinstance(backbone, dict), 'backbone', backbone, 'an object')
    exits = entry.get('exits')
    _expect(isinstance(exits, list) and 1 <= len(exits) <= MAX_EXITS, 'cascade.exits', exits, 'the exit points')
    result = dict(layout=layout, heads_hash=heads_hash, points=tuple(_exit_point(e) for e in exits))
    macs = [p.macs for p in result['points']]
    _expect(macs == sorted(macs), 'cascade.exits', macs, 'exits in order of cost')
    if layout == 'full':
        base_model = backbone.get('base_model')
        _expect(
            base_model is None or (isinstance(base_model, str) and len(base_model) < 200),
            'base_model',
            base_model,
            'a Hub id',
        )
        return {**result, 'digest': backbone.get('digest'), 'base_model': base_model}
    published = Published.from_dict(backbone, base)
    return {**result, 'published': published, 'base_model': published.hub_id}


def _exit_point(entry: Any) -> ExitPoint:
    names = [f.name for f in fields(ExitPoint)]
    _expect(isinstance(entry, dict) and sorted(entry) == sorted(names), 'the exit', entry, f'an object with {names}')
    size = entry['size']
    right = (
        isinstance(entry['module'], str)
        and entry['layout'] in ('NCHW', 'NHWC', 'NLC')
        and isinstance(size, list)
        and len(size) == 2
        and all(_is_count(s, MAX_SIDE * MAX_SIDE, 1) for s in size)
        and _is_count(entry['channels'], MAX_NUMBER, 1)
        and _is_count(entry['prefix_tokens'], MAX_NUMBER)
        and entry['cut'] in ('hook', 'export')
        and _is_count(entry['item'], MAX_ITEMS)
        and isinstance(entry['rows'], list)
        and entry['item'] < len(entry['rows']) <= MAX_ITEMS
        and all(_is_count(r, MAX_NUMBER) for r in entry['rows'])
        and entry['rows'][entry['item']] == 1
        and _is_count(entry['macs'], 1 << 60, 1)
        and _is_count(entry['total'], 1 << 60, entry['macs'])
    )
    _expect(right, 'the exit', entry, f'{names} in range')
    return ExitPoint(**{**entry, 'size': tuple(size), 'rows': tuple(entry['rows'])})
