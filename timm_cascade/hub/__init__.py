"""Releases: what is saved, how it is checked, where it comes from, how it is published."""

from ..errors import HubUnavailableError, PushConflictError, PushDeniedError, PushError, ReleaseError
from .create import create_cascade, load
from .push import Pushed, compare, push_to_hub
from .release import CALIBRATION, CARD, CONFIG, PATH, PROFILES, TABLE, WEIGHTS
from .save_release import save, save_profiles

__all__ = [
    'CALIBRATION',
    'CARD',
    'CONFIG',
    'PATH',
    'PROFILES',
    'TABLE',
    'WEIGHTS',
    'HubUnavailableError',
    'PushConflictError',
    'PushDeniedError',
    'PushError',
    'Pushed',
    'ReleaseError',
    'compare',
    'create_cascade',
    'load',
    'push_to_hub',
    'save',
    'save_profiles',
]
