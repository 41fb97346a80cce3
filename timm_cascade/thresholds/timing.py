"""Measured seconds as costs: a dial that minimises time, and exits that save MACs but no time."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import TableFormatError
from .calibration import Calibration
from .checks import check_thresholds
from .routing import outcome

__all__ = ['Profile', 'Saving', 'in_time', 'profiles_from_json', 'profiles_to_json', 'savings']

FORMAT_VERSION = 1
MAX_PROFILES = 1000

Seconds = NDArray[np.float64]


@dataclass(frozen=True)
class Profile:
    """Seconds for one image of a batch, measured on one machine.

    Attributes:
        device: The machine's name.
        dtype: Of the weights.
        batch_size: Images in a batch.
        compiled: Whether the stages were compiled.
        exits: Module names of the M exits.
        stage_seconds: (M+1,) backbone between two exits, no heads.
        head_seconds: (M,) head and decision.
        cut_seconds: (M,) copying out an image that goes on, where others leave.
        backbone_seconds: The backbone, run alike without heads.
        repeats: Times that all this was measured; these are medians.
        versions: Of the packages.
    """

    device: str
    dtype: str
    batch_size: int
    compiled: bool
    exits: tuple[str, ...]
    stage_seconds: tuple[float, ...]
    head_seconds: tuple[float, ...]
    cut_seconds: tuple[float, ...]
    backbone_seconds: float
    repeats: int
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def head_cost(self) -> Seconds:
        """(M,) what an open exit costs an image that comes to it."""
        return np.add(self.head_seconds, self.cut_seconds)

    @property
    def stage_cost(self) -> Seconds:
        """(M+1,) each stage, what its exit costs included."""
        return np.add(self.stage_seconds, np.append(self.head_cost, 0.0))

    @property
    def rest(self) -> Seconds:
        """(M,) seconds of the backbone behind each exit."""
        return np.cumsum(self.stage_seconds[:0:-1])[::-1]

    @property
    def break_even(self) -> Seconds:
        """(M,) share of the images coming to an exit that must leave there for it to save time; 1 and more: never."""
        return self.head_cost / (self.rest + self.cut_seconds)

    @property
    def cut_share(self) -> Seconds:
        """(M,) share of the images in flight that must have left for a cut to save time; see the model's min_leave."""
        return np.array(self.cut_seconds) / (self.rest + self.cut_seconds)

    @classmethod
    def from_dict(cls, values: Any) -> Profile:
        """
        Raises:
            TableFormatError: Keys or values that cannot be right.
        """
        names = [f.name for f in fields(cls)]
        if not isinstance(values, dict) or sorted(values) != sorted(names):
            raise TableFormatError(f'a profile must be an object with {", ".join(names)}; measure again.')
        exits, versions = values['exits'], values['versions']
        if not isinstance(exits, list) or not exits or not all(isinstance(e, str) for e in exits):
            raise TableFormatError('exits of a profile must be names, at least one.')
        for name, kind in (('device', str), ('dtype', str), ('compiled', bool), ('versions', dict)):
            if not isinstance(values[name], kind):
                raise TableFormatError(f'{name} of a profile is {values[name]!r}; expected {kind.__name__}.')
        if not all(isinstance(v, str) for v in versions.values()):
            raise TableFormatError('versions of a profile must be texts.')
        for name in ('batch_size', 'repeats'):
            if type(values[name]) is not int or values[name] < 1:
                raise TableFormatError(f'{name} of a profile is {values[name]!r}; expected a count.')
        for name, count in (
            ('stage_seconds', len(exits) + 1),
            ('head_seconds', len(exits)),
            ('cut_seconds', len(exits)),
            ('backbone_seconds', None),
        ):
            numbers = [values[name]] if count is None else values[name]
            if not isinstance(numbers, list) or len(numbers) != (count or 1) or not all(map(_is_time, numbers)):
                raise TableFormatError(f'{name} of a profile: expected {count or 1} numbers of seconds.')
        if not values['backbone_seconds'] > 0 or not sum(values['stage_seconds']) > 0:
            raise TableFormatError('a profile in which the backbone takes no time; measure again.')
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**known)


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def profiles_to_json(profiles: Sequence[Profile]) -> str:
    """A text that `profiles_from_json` reads."""
    return (
        json.dumps(
            dict(format_version=FORMAT_VERSION, profiles=[asdict(p) for p in profiles]),
            indent=1,
            sort_keys=True,
            allow_nan=False,
        )
        + '\n'
    )


def profiles_from_json(text: str) -> list[Profile]:
    """Reads what `profiles_to_json` wrote.

    Raises:
        TableFormatError: Not such a text, or a newer format version.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TableFormatError(f'these are no profiles: {error}.') from error
    if not isinstance(content, dict) or not isinstance(content.get('profiles'), list):
        raise TableFormatError('these are no profiles: no list of them.')
    if content.get('format_version') != FORMAT_VERSION:
        raise TableFormatError(
            f'profiles of format version {str(content.get("format_version"))[:50]}, known here is '
            f'{FORMAT_VERSION}; upgrade timm_cascade, or measure again.'
        )
    if len(content['profiles']) > MAX_PROFILES:
        raise TableFormatError(f'{len(content["profiles"])} profiles; expected at most {MAX_PROFILES}.')
    return [Profile.from_dict(p) for p in content['profiles']]


def in_time(calibration: Calibration, profile: Profile) -> Calibration:
    """The calibration with seconds for costs: a dial that minimises time."""
    return replace(
        calibration, stage_cost=profile.stage_cost, head_cost=profile.head_cost, backbone_cost=profile.backbone_seconds
    )


@dataclass(frozen=True)
class Saving:
    """What one open exit saves an image on average, the other thresholds as they are; negative where it costs.

    Attributes:
        exit: Its module.
        macs: Multiply-accumulates.
        seconds: Time.
    """

    exit: str
    macs: float
    seconds: float


def savings(calibration: Calibration, profile: Profile, thresholds: ArrayLike) -> list[Saving]:
    """What each open exit saves on the calibration's samples.

    Args:
        calibration: With MACs for costs.
        profile: Of the same exits.
        thresholds: (M,); inf closes an exit.
    """
    t = check_thresholds(thresholds, len(calibration.exits))
    found = []
    for m in np.flatnonzero(np.isfinite(t)):
        without = t.copy()
        without[m] = np.inf
        saved = [
            outcome(c.confidence, c.correct, c.stage_cost, without, c.head_cost).cost
            - outcome(c.confidence, c.correct, c.stage_cost, t, c.head_cost).cost
            for c in (calibration, in_time(calibration, profile))
        ]
        found.append(Saving(calibration.exits[m], *saved))
    return found
