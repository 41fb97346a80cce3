"""Early exits for every timm model, with thresholds that follow from the accuracy you can give up.

Importing this package registers `cascade_<name>` with timm for every model timm knows.
"""
from timm import create_model

from . import registry  # noqa: F401  registers the models
from .calibration import calibrate
from .data import ImageData, load_data
from .evaluation import Report, evaluate
from .hub import (
    HubUnavailableError,
    PushConflictError,
    PushDeniedError,
    PushError,
    ReleaseError,
    load,
    push_to_hub,
    save,
)
from .model import CascadeModel, NotCalibratedError
from .profiling import profile
from .routing import CascadeOutput
from .stream import StreamOutput
from .thresholds import Calibration, OperatingPoint, Profile, ThresholdTable
from .training import train_heads
from .version import __version__

__all__ = [
    'Calibration', 'CascadeModel', 'CascadeOutput', 'HubUnavailableError', 'ImageData', 'NotCalibratedError',
    'OperatingPoint', 'Profile', 'PushConflictError', 'PushDeniedError', 'PushError', 'ReleaseError', 'Report',
    'StreamOutput', 'ThresholdTable', '__version__', 'calibrate', 'create_model', 'evaluate', 'load', 'load_data',
    'profile', 'push_to_hub', 'save', 'train_heads',
]
