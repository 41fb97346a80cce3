"""Every file that may come from outside, described once; an error names the file and the place in it.

Only what loads and saves imports this module: it needs pydantic, which nothing else here does.
"""

from __future__ import annotations

import json
import math
import reprlib
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

__all__ = [
    'CALIBRATION_VERSION',
    'CONFIG_VERSION',
    'MAX_NUMBER',
    'PROFILES_VERSION',
    'TABLE_VERSION',
    'CalibrationEntry',
    'ConfigFile',
    'PathFile',
    'PointEntry',
    'ProfilesFile',
    'PublishedEntry',
    'TableFile',
    'parse',
]

CONFIG_VERSION = 2
TABLE_VERSION = CALIBRATION_VERSION = PROFILES_VERSION = 1

MAX_DEPTH = 16
MAX_LENGTH = 1000  # of texts, and of lists of values
MAX_NUMBER = 1 << 20
MAX_MACS = 1 << 60
MAX_CLASSES = 1 << 20
MAX_EXITS = 256
MAX_ITEMS = 64  # tensors in the output of a module
MAX_SIDE = 1 << 14  # pixels
MAX_FILE = 1 << 40  # bytes
MAX_POINTS = 10_000
MAX_PROFILES = 1000
SHOWN = 100  # characters of a value in a message
# What a release must not decide: these are the caller's, or timm's own between its functions.
NOT_ARGS = frozenset(
    'model_name pretrained pretrained_cfg pretrained_cfg_overlay pretrained_model_args cache_dir checkpoint_path '
    'scriptable exportable no_jit features_only out_indices feature_cls feature_cfg pretrained_strict '
    'pretrained_filter_fn kwargs_filter device dtype'.split()
)

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = SHOWN

M = TypeVar('M', bound=BaseModel)


def parse(model: type[M], content: str | dict[str, Any], source: str, error: type[Exception]) -> M:
    """A file's content as `model` describes it.

    Args:
        model: One of the models below.
        content: JSON, or what JSON was read as.
        source: Name of the file, with which the message begins.
        error: Class of the exception that is raised.

    Raises:
        error: Not JSON, or values that cannot be right. The message names the file, the first places that are wrong,
            and what is expected there: `config.json: cascade.exits.0.layout is 'NCWH'; it should be ...`.

    Example:
        >>> parse(TableFile, '{"format_version": 1}', 'thresholds.json', TableFormatError)
        TableFormatError: thresholds.json: exits is missing; num_classes is missing; ...
    """
    values: Any = content
    if isinstance(content, str):
        try:
            values = json.loads(content)
        except RecursionError:
            raise error(f'{source}: it is nested more than {MAX_DEPTH} deep.') from None
        except ValueError as e:
            raise error(f'{source}: it is not a JSON object ({str(e)[:SHOWN]}).') from e
    if not isinstance(values, dict):
        raise error(f'{source}: it is not a JSON object, but a {type(values).__name__}.')
    fault = _fault(values)
    if fault is not None:
        raise error(f'{source}: {fault}.')
    try:
        return model.model_validate(values)
    except ValidationError as e:
        found = e.errors(include_url=False, include_context=False)
        versions = [x for x in found if x['loc'][-1:] == ('format_version',)]  # explains all others
        said = [_message(x) for x in (versions or found)[:3]]
        more = f'; and {len(found) - 3} more' if len(found) > 3 and not versions else ''
        raise error(f'{source}: {"; ".join(said)}{more}.') from e


def _fault(value: Any, place: str = '', depth: int = MAX_DEPTH) -> str | None:
    """The first place that is nested too deep, or holds no finite number: JSON itself allows both."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'{place} is {value}; expected are finite numbers, and null for a closed exit'
    if not isinstance(value, (dict, list)):
        return None
    if not depth:
        return f'{place[:SHOWN]} is nested more than {MAX_DEPTH} deep'
    items = value.items() if isinstance(value, dict) else enumerate(value)
    faults = (_fault(child, f'{place}.{str(key)[:SHOWN]}'.lstrip('.'), depth - 1) for key, child in items)
    return next((fault for fault in faults if fault), None)


def _show(value: Any) -> str:
    text = _short.repr(value)  # of a list of a million, only the beginning is looked at
    return text if len(text) <= SHOWN else f'{text[:SHOWN]}...'


def _message(found: ErrorDetails) -> str:
    place = '.'.join(str(part)[:SHOWN] for part in found['loc'] if part not in ('full', 'heads'))  # tags of a union
    if found['type'] == 'missing':
        return f'{place} is missing'
    if found['type'] == 'extra_forbidden':
        return f'{place} is not a known key'
    if found['type'].startswith('union_tag'):
        return f"{place}.layout is {_show(found['input'].get('layout'))}; it should be 'full' or 'heads'"
    said = found['msg'].removeprefix('Value error, ')
    if found['type'] == 'value_error' and not isinstance(found['input'], (str, int, float)):  # says itself what it saw
        return f'{place}: {said}' if place else said
    return f'{place} is {_show(found["input"])}; {said.replace("Input", "it", 1)}'


class _Described(BaseModel):
    """Values must have the right type: no text is taken for a number, no number for a truth value."""

    model_config = ConfigDict(strict=True, extra='forbid', allow_inf_nan=False, protected_namespaces=())


class _Open(_Described):
    """Unknown keys are kept: a later version may add some, and they travel on."""

    model_config = ConfigDict(extra='allow')


def _known(version: int) -> Any:
    def check(value: int) -> int:
        if not 1 <= value <= version:
            raise ValueError(
                f'known here is {version}: the file is newer; upgrade timm_cascade, or ask for a file in the older '
                f'format'
                if value > version
                else 'it should be a whole number from 1'
            )
        return value

    return Annotated[int, AfterValidator(check)]


def _simple(value: Any, depth: int = 2) -> Any:
    """A JSON scalar of sane size, or a short list of such."""
    if isinstance(value, list):
        right = depth > 0 and len(value) <= MAX_LENGTH
        for v in value if right else ():
            _simple(v, depth - 1)
    elif isinstance(value, str):
        right = len(value) <= MAX_LENGTH and value.isprintable()
    else:
        right = value is None or isinstance(value, bool)
        right = right or (isinstance(value, (int, float)) and abs(value) <= MAX_NUMBER)
    if not right:
        raise ValueError(
            f'{_show(value)} where a short text, a number up to {MAX_NUMBER}, or a list of these is expected'
        )
    return value


def _labels(value: Any) -> Any:
    """timm knows a list of names, one per class, or an object from class to name where classes are missing."""
    texts = value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else [value]
    if value is not None and (len(texts) > MAX_CLASSES or not all(isinstance(t, str) for t in texts)):
        raise ValueError('it should be a list of texts, one per class, or an object with them')
    if any(len(t) > 10 * MAX_LENGTH for t in texts if t is not None):
        raise ValueError(f'a text is longer than {10 * MAX_LENGTH} characters')
    return value


def _repository(value: str) -> str:
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(value)
    return value


Text = Annotated[str, Field(max_length=MAX_LENGTH)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Simple = Annotated[Any, AfterValidator(_simple)]
Labels = Annotated[Any, AfterValidator(_labels)]
Number = Annotated[float, Field(ge=-MAX_NUMBER, le=MAX_NUMBER)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Thresholds = Annotated[list[Fraction | None], Field(min_length=1, max_length=MAX_EXITS)]  # null: a closed exit
Positive = Annotated[int, Field(ge=1, le=MAX_NUMBER)]
Count = Annotated[int, Field(ge=0, le=MAX_NUMBER)]
Macs = Annotated[int, Field(ge=1, le=MAX_MACS)]
Seconds = Annotated[float, Field(ge=0)]
Classes = Annotated[int, Field(ge=0, le=MAX_CLASSES)]
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
Exits = Annotated[list[Text], Field(min_length=1, max_length=MAX_EXITS)]
ImageSize = Annotated[list[Side], Field(min_length=3, max_length=3)]
Digest = Annotated[str, Field(pattern='^[0-9a-f]{16}$')]


# ---- config.json


class HeadEntry(_Described):
    """One exit head."""

    grid: Annotated[int, Field(ge=1, le=1000)]
    hidden: Annotated[int, Field(ge=0, le=1 << 16)]
    norm: bool
    mean: bool = False
    tokens: bool = False


class ExitEntry(_Described):
    """One exit point; see `backbone.ExitPoint`."""

    module: Text
    layout: Literal['NCHW', 'NHWC', 'NLC']
    channels: Positive
    size: Annotated[list[Annotated[int, Field(ge=1, le=MAX_SIDE**2)]], Field(min_length=2, max_length=2)]
    prefix_tokens: Count
    macs: Macs
    total: Macs
    cut: Literal['hook', 'export']
    item: Annotated[int, Field(ge=0, lt=MAX_ITEMS)]
    rows: Annotated[list[Count], Field(min_length=1, max_length=MAX_ITEMS)]

    @model_validator(mode='after')
    def _fits(self) -> ExitEntry:
        if self.item >= len(self.rows) or self.rows[self.item] != 1:
            raise ValueError(f'item {self.item} does not go with rows {self.rows}: it should have one row per sample')
        if self.macs > self.total:
            raise ValueError(f'macs {self.macs} is more than total {self.total}')
        return self


class OwnBackboneEntry(_Described):
    """The backbone of a release that holds it."""

    digest: Digest | None
    base_model: Annotated[str, Field(max_length=200)] | None = None


class PublishedEntry(_Described):
    """The backbone of a release of heads only; see `hub.pretrained.Published`."""

    name: Name
    hub_id: Annotated[Name, AfterValidator(_repository)] | None
    revision: Annotated[str, Field(pattern='^[0-9a-f]{40}$')] | None
    filename: Annotated[str, Field(max_length=200, pattern=r'^\w[\w.-]*\.safetensors$')] | None
    digest: Annotated[str, Field(max_length=200)]
    dtype: Annotated[str, Field(max_length=200)]

    @model_validator(mode='after')
    def _pinned(self) -> PublishedEntry:
        if self.hub_id is not None and (self.revision is None or self.filename is None):
            raise ValueError(f'a backbone from {self.hub_id} needs its revision (a commit) and filename')
        return self


class FileEntry(_Described):
    """What a file of the release must be."""

    sha256: Annotated[str, Field(pattern='^[0-9a-f]{64}$')]
    size: Annotated[int, Field(ge=0, le=MAX_FILE)]


class _CascadeEntry(_Open):
    format_version: _known(CONFIG_VERSION)  # type: ignore[valid-type]
    heads_hash: Digest
    files: Annotated[dict[Name, FileEntry], Field(max_length=MAX_ITEMS)] | None = None
    exits: Annotated[list[ExitEntry], Field(min_length=1, max_length=MAX_EXITS)]

    @model_validator(mode='after')
    def _complete(self) -> _CascadeEntry:
        if self.format_version > 1 and 'model.safetensors' not in (self.files or {}):
            raise ValueError('files should have the sha256 and size of every file, and lacks model.safetensors')
        macs = [e.macs for e in self.exits]
        if macs != sorted(macs):
            raise ValueError(f'exits should stand in the order of their cost, and have macs {_show(macs)}')
        return self


class FullEntry(_CascadeEntry):
    """`cascade` of a release that holds its backbone."""

    layout: Literal['full']
    backbone: OwnBackboneEntry


class HeadsEntry(_CascadeEntry):
    """`cascade` of a release of heads only."""

    layout: Literal['heads']
    backbone: PublishedEntry


class _ModelArgs(_Open):
    """Arguments of the model's constructor; those of the backbone are kept as they are."""

    __pydantic_extra__: dict[str, Simple]
    exits: Exits
    head: Annotated[list[HeadEntry], Field(min_length=1, max_length=MAX_EXITS)]
    thresholds: Thresholds

    @model_validator(mode='after')
    def _fit(self) -> _ModelArgs:
        names = list(self.model_extra or {})
        wrong = [n for n in names if not n.isidentifier() or n in NOT_ARGS or len(n) > SHOWN]
        if wrong or len(names) > SHOWN:
            raise ValueError(f'{_show(wrong or names)} are not arguments that a release may set')
        for what, given in (('thresholds', self.thresholds), ('descriptions of a head', self.head)):
            if len(given) != len(self.exits):
                raise ValueError(f'it has {len(given)} {what} for {len(self.exits)} exits')
        return self


class _PretrainedCfg(_Open):
    """timm's own description of weights; its other keys are short values."""

    __pydantic_extra__: dict[str, Simple]
    input_size: ImageSize
    mean: Annotated[list[Number], Field(min_length=1, max_length=MAX_LENGTH)]
    std: Annotated[list[Number], Field(min_length=1, max_length=MAX_LENGTH)]
    first_conv: Simple = None
    classifier: Simple = None
    label_names: Labels = None
    label_descriptions: Labels = None
    description: Any = None
    notes: Any = None

    @model_validator(mode='after')
    def _modules(self) -> _PretrainedCfg:
        for key in ('first_conv', 'classifier'):
            value = getattr(self, key)
            names = value if isinstance(value, list) else [value]
            if value is not None and not all(isinstance(n, str) for n in names):
                raise ValueError(f'{key} is {_show(value)}; it should name modules')
        return self


class ConfigFile(BaseModel):
    """config.json: timm's own keys, and this library's under `cascade` (absent where timm itself saved)."""

    model_config = ConfigDict(strict=True, extra='ignore', allow_inf_nan=False, protected_namespaces=())

    architecture: Text
    num_classes: Classes
    pretrained_cfg: _PretrainedCfg
    model_args: _ModelArgs
    label_names: Labels = None
    label_descriptions: Labels = None
    cascade: Annotated[FullEntry | HeadsEntry, Field(discriminator='layout')] | None = None

    @model_validator(mode='after')
    def _agrees(self) -> ConfigFile:
        names = self.label_names or self.pretrained_cfg.label_names or []
        if len(names) > self.num_classes or (isinstance(names, list) and names and len(names) != self.num_classes):
            raise ValueError(f'it has {len(names)} label_names for {self.num_classes} classes')
        if self.cascade is not None and [e.module for e in self.cascade.exits] != self.model_args.exits:
            there = [e.module for e in self.cascade.exits]
            raise ValueError(
                f'cascade.exits has the modules {_show(there)}, model_args.exits {_show(self.model_args.exits)}'
            )
        return self


# ---- thresholds.json


class PointEntry(_Open):
    """One operating point; see `thresholds.OperatingPoint`."""

    rule: Literal['per_exit', 'joint', 'certified', 'cost']
    max_drop: Fraction | None
    level: Fraction | None
    certified: bool
    reference: Literal['labels', 'backbone', 'best']
    scope: Literal['dial', 'setting'] | None = None  # of a certified point without: 'setting'
    thresholds: Thresholds
    accuracy: float
    full_accuracy: float
    drop: float
    drop_interval: Annotated[list[float], Field(min_length=2, max_length=2)]
    cost: float
    cost_share: float
    exit_shares: Annotated[list[Fraction], Field(min_length=2, max_length=MAX_EXITS + 1)]
    n: Annotated[int, Field(ge=0)]
    measured_on: Annotated[int, Field(ge=0)]

    @model_validator(mode='after')
    def _fits(self) -> PointEntry:
        if (self.rule == 'cost') != (self.max_drop is None):
            raise ValueError(f'rule {self.rule!r} does not go with max_drop {self.max_drop!r}')
        if self.certified and self.level is None:
            raise ValueError('a certified point needs its level')
        if len(self.exit_shares) != len(self.thresholds) + 1:
            raise ValueError(
                f'{len(self.thresholds)} thresholds and {len(self.exit_shares)} exit_shares do not fit together; '
                f'expected are M and M+1'
            )
        return self


class TableFile(_Open):
    """thresholds.json."""

    format_version: _known(TABLE_VERSION)  # type: ignore[valid-type]
    exits: Exits
    num_classes: Classes
    heads_hash: Text
    input_size: ImageSize | None
    points: Annotated[list[PointEntry], Field(max_length=MAX_POINTS)]
    provenance: dict[str, Any]

    @model_validator(mode='after')
    def _fits(self) -> TableFile:
        for i, point in enumerate(self.points):
            if len(point.thresholds) != len(self.exits):
                raise ValueError(f'points.{i} has {len(point.thresholds)} thresholds for {len(self.exits)} exits')
        return self


# ---- calibration.safetensors


class CalibrationEntry(_Described):
    """What stands in the header of calibration.safetensors beside its arrays."""

    format_version: _known(CALIBRATION_VERSION)  # type: ignore[valid-type]
    exits: Exits
    num_classes: Annotated[int, Field(ge=1, le=MAX_CLASSES)]
    heads_hash: Text
    backbone_cost: Annotated[float, Field(gt=0)]
    provenance: dict[str, Any]


class PathFile(_Described):
    """path.json: thresholds from the heads' training features, from all exits closed (null) to most permissive."""

    format_version: _known(1)  # type: ignore[valid-type]
    exits: Exits
    heads_hash: Text
    thresholds: Annotated[list[Thresholds], Field(min_length=1, max_length=MAX_POINTS)]


# ---- profiles.json


class ProfileEntry(_Described):
    """Times on one machine; see `thresholds.Profile`."""

    device: Text
    dtype: Text
    batch_size: Positive
    compiled: bool
    exits: Exits
    stage_seconds: Annotated[list[Seconds], Field(min_length=2, max_length=MAX_EXITS + 1)]
    head_seconds: Annotated[list[Seconds], Field(min_length=1, max_length=MAX_EXITS)]
    cut_seconds: Annotated[list[Seconds], Field(min_length=1, max_length=MAX_EXITS)]
    backbone_seconds: Annotated[float, Field(gt=0)]
    repeats: Positive
    versions: dict[Text, Text]

    @model_validator(mode='after')
    def _fits(self) -> ProfileEntry:
        count = len(self.exits)
        for name, expected in (('stage_seconds', count + 1), ('head_seconds', count), ('cut_seconds', count)):
            if (given := len(getattr(self, name))) != expected:
                raise ValueError(f'{name} has {given} numbers for {count} exits; expected are {expected}')
        if not sum(self.stage_seconds) > 0:
            raise ValueError('the stages take no time; measure again')
        return self


class ProfilesFile(_Described):
    """profiles.json."""

    format_version: _known(PROFILES_VERSION)  # type: ignore[valid-type]
    profiles: Annotated[list[ProfileEntry], Field(max_length=MAX_PROFILES)]
