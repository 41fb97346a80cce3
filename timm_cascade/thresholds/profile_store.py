"""Profiles that were measured without being asked for, kept on this machine from one process to the next."""

from __future__ import annotations

import contextlib
import hashlib
import os
from importlib import metadata
from pathlib import Path

from ..errors import TableFormatError
from ..utils.files import write_text
from .calibration import Calibration
from .timing import Profile, Setup, profiles_from_json, profiles_to_json

__all__ = ['load_profile', 'profile_key', 'store_profile']


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
