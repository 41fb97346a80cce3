"""What config.json of a release may hold."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from .fields import (
    MAX_CLASSES,
    MAX_EXITS,
    MAX_LENGTH,
    MAX_NUMBER,
    MAX_SIDE,
    SHOWN,
    Classes,
    Count,
    Described,
    Digest,
    ImageSize,
    Open,
    Positive,
    Side,
    Text,
    Thresholds,
    known_version,
    show,
)

__all__ = ['CONFIG_VERSION', 'ConfigFile', 'FrontEntry', 'FullEntry', 'HeadsEntry', 'PublishedEntry']

CONFIG_VERSION = 3  # written for releases with fronts; 2 without
MAX_MACS = 1 << 60
MAX_ITEMS = 64  # tensors in the output of a module
MAX_FILE = 1 << 40  # bytes
MAX_GRID = 1000
# What a release must not decide: these are the caller's, or timm's own between its functions.
NOT_ARGS = frozenset(
    'model_name pretrained pretrained_cfg pretrained_cfg_overlay pretrained_model_args cache_dir checkpoint_path '
    'scriptable exportable no_jit features_only out_indices feature_cls feature_cfg pretrained_strict '
    'pretrained_filter_fn kwargs_filter device dtype'.split()
)


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
            f'{show(value)} where a short text, a number up to {MAX_NUMBER}, or a list of these is expected'
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


def _grid(value: Any) -> Any:
    sides = value if isinstance(value, list) and len(value) == 2 else [value]
    if not all(type(s) is int and 1 <= s <= MAX_GRID for s in sides):
        raise ValueError(f'it should be a whole number from 1 to {MAX_GRID}, or two: rows and columns')
    return value


def _check_arguments(names: list[str]) -> None:
    wrong = [n for n in names if not n.isidentifier() or n in NOT_ARGS or len(n) > SHOWN]
    if wrong or len(names) > SHOWN:
        raise ValueError(f'{show(wrong or names)} are not arguments that a release may set')


def _repository(value: str) -> str:
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(value)
    return value


Name = Annotated[str, Field(min_length=1, max_length=200)]
Simple = Annotated[Any, AfterValidator(_simple)]
Labels = Annotated[Any, AfterValidator(_labels)]
Number = Annotated[float, Field(ge=-MAX_NUMBER, le=MAX_NUMBER)]
Macs = Annotated[int, Field(ge=1, le=MAX_MACS)]


class HeadEntry(Described):
    """One exit head."""

    grid: Annotated[Any, AfterValidator(_grid)]
    hidden: Annotated[int, Field(ge=0, le=1 << 16)]
    norm: bool
    mean: bool = False
    tokens: bool = False
    hidden_norm: bool = False


class ExitEntry(Described):
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


class OwnBackboneEntry(Described):
    """The backbone of a release that holds it."""

    digest: Digest | None
    base_model: Annotated[str, Field(max_length=200)] | None = None


class PublishedEntry(Described):
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


class FrontEntry(Described):
    """A network in front of the backbone; see `fronts.Front`."""

    name: Name
    shared: bool
    architecture: Annotated[str, Field(max_length=200, pattern=r'^\w+$')]
    args: dict[Name, Simple]
    cfg: dict[Literal['input_size', 'mean', 'std', 'interpolation'], Simple]
    size: Annotated[list[Side], Field(min_length=2, max_length=2)]
    digest: Name
    published: PublishedEntry | None

    @model_validator(mode='after')
    def _fits(self) -> FrontEntry:
        _check_arguments(list(self.args))
        if self.published is not None and (self.shared or self.published.digest != self.digest):
            raise ValueError(f'digest {show(self.digest)} is not that of the published network')
        return self


class FileEntry(Described):
    """What a file of the release must be."""

    sha256: Annotated[str, Field(pattern='^[0-9a-f]{64}$')]
    size: Annotated[int, Field(ge=0, le=MAX_FILE)]


class _CascadeEntry(Open):
    format_version: known_version(CONFIG_VERSION)  # type: ignore[valid-type]
    heads_hash: Digest
    files: Annotated[dict[Name, FileEntry], Field(max_length=MAX_ITEMS)] | None = None
    exits: Annotated[list[ExitEntry], Field(max_length=MAX_EXITS)]
    fronts: Annotated[list[FrontEntry], Field(max_length=MAX_ITEMS)] = []

    @model_validator(mode='after')
    def _complete(self) -> _CascadeEntry:
        if self.format_version > 1 and 'model.safetensors' not in (self.files or {}):
            raise ValueError('files should have the sha256 and size of every file, and lacks model.safetensors')
        if not self.exits and not self.fronts:
            raise ValueError('it should have at least one exit or front')
        macs = [e.macs for e in self.exits]
        if macs != sorted(macs):
            raise ValueError(f'exits should stand in the order of their cost, and have macs {show(macs)}')
        return self


class FullEntry(_CascadeEntry):
    """`cascade` of a release that holds its backbone."""

    layout: Literal['full']
    backbone: OwnBackboneEntry


class HeadsEntry(_CascadeEntry):
    """`cascade` of a release of heads only."""

    layout: Literal['heads']
    backbone: PublishedEntry


class _ModelArgs(Open):
    """Arguments of the model's constructor; those of the backbone are kept as they are."""

    __pydantic_extra__: dict[str, Simple]
    exits: Annotated[list[Text], Field(max_length=MAX_EXITS)]
    head: Annotated[list[HeadEntry], Field(max_length=MAX_EXITS)]
    thresholds: Thresholds
    front: Annotated[list[Name], Field(max_length=MAX_ITEMS)] = []

    @model_validator(mode='after')
    def _fit(self) -> _ModelArgs:
        _check_arguments(list(self.model_extra or {}))
        inner, count = len(self.exits), len(self.front) + len(self.exits)
        for what, given, of in (('thresholds', self.thresholds, count), ('descriptions of a head', self.head, inner)):
            if len(given) != of:
                raise ValueError(f'it has {len(given)} {what} for {of} exits')
        return self


class _PretrainedCfg(Open):
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
                raise ValueError(f'{key} is {show(value)}; it should name modules')
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

    @model_validator(mode='before')
    @classmethod
    def _has_arguments(cls, values: Any) -> Any:
        if isinstance(values, dict) and 'architecture' in values and 'model_args' not in values:
            raise ValueError(
                'model_args is missing; before 1.0.31 timm writes it only where it is given, so save the cascade with '
                'timm_cascade.save, or push it with timm_cascade.push_to_hub'
            )
        return values

    @model_validator(mode='after')
    def _agrees(self) -> ConfigFile:
        names = self.label_names or self.pretrained_cfg.label_names or []
        if len(names) > self.num_classes or (isinstance(names, list) and names and len(names) != self.num_classes):
            raise ValueError(f'it has {len(names)} label_names for {self.num_classes} classes')
        if self.cascade is not None and [e.module for e in self.cascade.exits] != self.model_args.exits:
            there = [e.module for e in self.cascade.exits]
            raise ValueError(
                f'cascade.exits has the modules {show(there)}, model_args.exits {show(self.model_args.exits)}'
            )
        fronts = [f.name for f in self.cascade.fronts] if self.cascade is not None else []
        if fronts != self.model_args.front:
            raise ValueError(f'cascade.fronts has {show(fronts)}, model_args.front {show(self.model_args.front)}')
        return self
