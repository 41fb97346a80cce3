"""Early exits for every timm model, with thresholds that follow from the accuracy you can give up.

Importing this package registers `cascade_<name>` with timm for every model timm knows.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from timm import create_model

from . import errors, moved, registry  # noqa: F401  registry registers the models, moved says where old modules are
from .errors import *  # noqa: F403  each is public
from .version import __version__

if TYPE_CHECKING:
    from .data import ImageData, load_data
    from .exporters import export
    from .hub import load, push_to_hub, save
    from .inference.batch import CascadeOutput
    from .inference.stream import StreamOutput
    from .measure.calibrate import calibrate
    from .measure.drift_watch import DriftWatch
    from .measure.evaluate import Report, evaluate
    from .measure.profile import profile
    from .measure.suggest import Suggestion, suggest
    from .model import CascadeModel
    from .prediction.local import predict
    from .thresholds import Calibration, OperatingPoint, Profile, ThresholdTable
    from .training.finetune import finetune
    from .training.train import train_heads

__all__ = [
    'Calibration',
    'CascadeModel',
    'CascadeOutput',
    'DriftWatch',
    'ImageData',
    'OperatingPoint',
    'Profile',
    'Report',
    'StreamOutput',
    'Suggestion',
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
    'suggest',
    'train_heads',
]
__all__ += errors.__all__  # the form that type checkers follow


# Importing the package registers the models and no more; what it exports is imported when it is asked for.
_MODULES = {
    name: module
    for module, names in {
        'data': 'ImageData load_data',
        'exporters': 'export',
        'hub': 'load push_to_hub save',
        'inference.batch': 'CascadeOutput',
        'inference.stream': 'StreamOutput',
        'measure.calibrate': 'calibrate',
        'measure.drift_watch': 'DriftWatch',
        'measure.evaluate': 'Report evaluate',
        'measure.profile': 'profile',
        'measure.suggest': 'Suggestion suggest',
        'model': 'CascadeModel',
        'prediction.local': 'predict',
        'thresholds': 'Calibration OperatingPoint Profile ThresholdTable',
        'training.finetune': 'finetune',
        'training.train': 'train_heads',
    }.items()
    for name in names.split()
}
_ROOMS = {*(m.partition('.')[0] for m in _MODULES.values()), 'formats', 'fronts', 'heads', 'utils'}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f'.{name}', __name__)
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = globals()[name] = getattr(import_module(f'.{_MODULES[name]}', __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
