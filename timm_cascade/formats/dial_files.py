"""What thresholds.json, calibration.safetensors, path.json and profiles.json may hold."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .fields import (
    MAX_CLASSES,
    MAX_EXITS,
    MAX_POINTS,
    Classes,
    Count,
    Described,
    Exits,
    Fraction,
    ImageSize,
    Open,
    Positive,
    Text,
    Thresholds,
    known_version,
    show,
)

__all__ = [
    'CALIBRATION_VERSION',
    'PATH_VERSION',
    'PROFILES_VERSION',
    'TABLE_VERSION',
    'CalibrationEntry',
    'PathFile',
    'PointEntry',
    'ProfilesFile',
    'TableFile',
]

TABLE_VERSION = CALIBRATION_VERSION = PATH_VERSION = PROFILES_VERSION = 1
MAX_PROFILES = 1000

Seconds = Annotated[float, Field(ge=0)]


# ---- thresholds.json


class PointEntry(Open):
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
    disagreeing: Count | None = None

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


class TableFile(Open):
    """thresholds.json."""

    format_version: known_version(TABLE_VERSION)  # type: ignore[valid-type]
    exits: Exits
    num_classes: Classes
    heads_hash: Text
    input_size: ImageSize | None
    points: Annotated[list[PointEntry], Field(max_length=MAX_POINTS)]
    provenance: dict[str, Any]
    confidences: dict[Text, Annotated[list[Count], Field(min_length=128, max_length=128)]] | None = None

    @model_validator(mode='after')
    def _fits(self) -> TableFile:
        if self.confidences is not None and set(self.confidences) != set(self.exits):
            raise ValueError(f'confidences are of {show(list(self.confidences))}; expected one histogram per exit')
        for i, point in enumerate(self.points):
            if len(point.thresholds) != len(self.exits):
                raise ValueError(f'points.{i} has {len(point.thresholds)} thresholds for {len(self.exits)} exits')
        return self


# ---- calibration.safetensors


class CalibrationEntry(Described):
    """What stands in the header of calibration.safetensors beside its arrays."""

    format_version: known_version(CALIBRATION_VERSION)  # type: ignore[valid-type]
    exits: Exits
    num_classes: Annotated[int, Field(ge=1, le=MAX_CLASSES)]
    heads_hash: Text
    backbone_cost: Annotated[float, Field(gt=0)]
    provenance: dict[str, Any]


class PathFile(Described):
    """path.json: thresholds from the heads' training features, from all exits closed (null) to most permissive."""

    format_version: known_version(PATH_VERSION)  # type: ignore[valid-type]
    exits: Exits
    heads_hash: Text
    thresholds: Annotated[list[Thresholds], Field(min_length=1, max_length=MAX_POINTS)]


# ---- profiles.json


class ProfileEntry(Described):
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


class ProfilesFile(Described):
    """profiles.json."""

    format_version: known_version(PROFILES_VERSION)  # type: ignore[valid-type]
    profiles: Annotated[list[ProfileEntry], Field(max_length=MAX_PROFILES)]
