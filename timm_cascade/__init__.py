"""Early exits for every timm model, with thresholds that follow from the accuracy you can give up.

Importing this package registers `cascade_<name>` with timm for every model timm knows.
"""

from typing import TYPE_CHECKING, Any

from timm import create_model

from . import moved, registry  # noqa: F401  registry registers the models, moved says where old modules are
from .data import ImageData, load_data
from .errors import (
    BackboneError,
    BadImageError,
    CascadeError,
    ExitError,
    ExportError,
    HubUnavailableError,
    LaunchError,
    NotCalibratedError,
    PlanError,
    PointNotFoundError,
    PushConflictError,
    PushDeniedError,
    PushError,
    ReleaseError,
    RequestError,
    RoutingError,
    TableFormatError,
    TableMismatchError,
    ThresholdError,
)
from .hub import load, push_to_hub, save
from .inference.batch import CascadeOutput
from .inference.stream import StreamOutput
from .measure.calibrate import calibrate
from .measure.drift_watch import DriftWatch
from .measure.evaluate import Report, evaluate
from .measure.profile import profile
from .model import CascadeModel
from .prediction.local import predict
from .thresholds import Calibration, OperatingPoint, Profile, ThresholdTable
from .training.finetune import finetune
from .training.train import train_heads
from .version import __version__

if TYPE_CHECKING:
    from .exporters import export

__all__ = [
    'BackboneError',
    'BadImageError',
    'Calibration',
    'CascadeError',
    'CascadeModel',
    'CascadeOutput',
    'DriftWatch',
    'ExitError',
    'ExportError',
    'HubUnavailableError',
    'ImageData',
    'LaunchError',
    'NotCalibratedError',
    'OperatingPoint',
    'PlanError',
    'PointNotFoundError',
    'Profile',
    'PushConflictError',
    'PushDeniedError',
    'PushError',
    'ReleaseError',
    'Report',
    'RequestError',
    'RoutingError',
    'StreamOutput',
    'TableFormatError',
    'TableMismatchError',
    'ThresholdError',
    'ThresholdTable',
    '__version__',
    'calibrate',
    'create_model',
    'evaluate',
    'export',
    'finetune',
    'load',
    'load_data',
    'predict',
    'profile',
    'push_to_hub',
    'save',
    'train_heads',
]


def __getattr__(name: str) -> Any:
    if name == 'export':  # few programs export, and its imports would take longer than all others
        from .exporters import export

        return export
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
