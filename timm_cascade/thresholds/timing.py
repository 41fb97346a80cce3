"""Measured seconds as costs: a dial that minimises time, and exits that save MACs but no time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import TableFormatError
from ..utils.files import write_text
from .calibration import Calibration
from .samples import check_thresholds, outcome

__all__ = [
    'Profile',
    'Saving',
    'Setup',
    'in_time',
    'load_profile',
    'profile_key',
    'profiles_from_json',
    'profiles_to_json',
    'savings',
    'store_profile',
]

Seconds = NDArray[np.float64]
Setup = tuple[str, str, bool]  # how a model runs: device (with threads on a CPU), dtype of its weights, compiled or not


@dataclass(frozen=True)
class Profile:
    """Seconds for one image of a batch, measured on one machine.

    Attributes:
        device: The machine's name.
        dtype: dtype of the weights.
        batch_size: Images in a batch.
        compiled: Whether the stages were compiled.
        exits: Module names of the M exits.
        stage_seconds: (M+1,) backbone between two exits, no heads.
        head_seconds: (M,) head and decision.
        cut_seconds: (M,) copying out an image that goes on, where others exit.
        backbone_seconds: The backbone, run alike without heads.
        repeats: Times that all this was measured; these are medians.
        versions: Versions of the packages.
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
    def setup(self) -> Setup:
        """How a model must run for these figures to apply."""
        return self.device, self.dtype, self.compiled

    @property
    def head_cost(self) -> Seconds:
        """(M,) what an open exit costs an image that reaches it."""
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
        """(M,) share of the images reaching an exit that must exit there for it to save time; never from 1 on."""
        return self.head_cost / (self.rest + self.cut_seconds)

    @property
    def cut_share(self) -> Seconds:
        """(M,) share of the batch that must have exited for a cut to save time; see the model's min_leave."""
        return np.array(self.cut_seconds) / (self.rest + self.cut_seconds)


def profiles_to_json(profiles: Sequence[Profile]) -> str:
    """A text that `profiles_from_json` reads."""
    from ..formats import PROFILES_VERSION

    content = dict(format_version=PROFILES_VERSION, profiles=[asdict(p) for p in profiles])
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + '\n'


def profiles_from_json(text: str, source: str = 'profiles.json') -> list[Profile]:
    """Reads what `profiles_to_json` wrote.

    Raises:
        TableFormatError: Not such a text, a newer format version, or values that cannot be right.
    """
    from ..formats import ProfilesFile, parse, values_of

    return [Profile(**values_of(p)) for p in parse(ProfilesFile, text, source, TableFormatError).profiles]


def in_time(calibration: Calibration, profile: Profile) -> Calibration:
    """The calibration with seconds for costs: a dial that minimises time."""
    return replace(
        calibration, stage_cost=profile.stage_cost, head_cost=profile.head_cost, backbone_cost=profile.backbone_seconds
    )


@dataclass(frozen=True)
class Saving:
    """What one open exit saves an image on average, the other thresholds as they are; negative where it costs.

    Attributes:
        exit: Module of the exit.
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
        profile: Profile of the same exits.
        thresholds: (M,); inf closes an exit.
    """
    t = check_thresholds(thresholds, len(calibration.exits))
    found = []
    for m in np.flatnonzero(np.isfinite(t)):
        without = t.copy()
        without[m] = np.inf
        saved = [
            outcome(c.samples(), without).cost - outcome(c.samples(), t).cost
            for c in (calibration, in_time(calibration, profile))
        ]
        found.append(Saving(calibration.exits[m], *saved))
    return found


# ---- profiles that were measured without being asked for, kept on this machine from one process to the next


def profile_key(calibration: Calibration, setup: Setup) -> str:
    """Identifies a calibrated model, how it runs and the versions that run it."""
    versions = [metadata.version(name) for name in ('torch', 'timm')]
    backbone = calibration.provenance.get('backbone_digest')
    parts = (*setup, *versions, tuple(calibration.exits), calibration.heads_hash, backbone)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def load_profile(key: str) -> Profile | None:
    """The stored profile; None if there is none that can be read."""
    path = _path(key)
    try:
        (profile,) = profiles_from_json(path.read_text(encoding='utf-8'), str(path))
    except (OSError, ValueError, TableFormatError):  # ValueError: more than one, or not text
        return None
    return profile


def store_profile(key: str, profile: Profile) -> None:
    """Stores a profile; where the folder cannot be written to, the next process measures again."""
    with contextlib.suppress(OSError):
        write_text(_path(key), profiles_to_json([profile]))


def _path(key: str) -> Path:
    cache = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(cache) / 'timm_cascade' / 'profiles' / f'{key}.json'
