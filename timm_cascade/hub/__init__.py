"""Releases: what is saved, how it is checked, where it comes from, how it is published."""
from .errors import HubUnavailableError, PushConflictError, PushDeniedError, PushError, ReleaseError
from .loading import create_cascade, load
from .push import Pushed, compare, push_to_hub
from .releases import CALIBRATION, CARD, CONFIG, TABLE, WEIGHTS, binding, save

__all__ = [
    'CALIBRATION', 'CARD', 'CONFIG', 'TABLE', 'WEIGHTS', 'HubUnavailableError', 'PushConflictError', 'PushDeniedError',
    'PushError', 'Pushed', 'ReleaseError', 'binding', 'compare', 'create_cascade', 'load', 'push_to_hub', 'save',
]
