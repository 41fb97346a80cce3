"""From calibration samples to thresholds, with or without a guarantee: numpy and scipy, without torch."""

from __future__ import annotations

from ..errors import PointNotFoundError, TableFormatError, TableMismatchError, ThresholdError
from .calibration import Calibration
from .operating_point import OperatingPoint
from .path import training_path
from .rule_certified import certified
from .rule_joint import joint
from .rule_per_exit import per_exit
from .samples import Outcome, Samples, outcome, route
from .table import ThresholdTable
from .timing import Profile, Saving, in_time, profiles_from_json, profiles_to_json, savings

__all__ = [
    'Calibration',
    'OperatingPoint',
    'Outcome',
    'PointNotFoundError',
    'Profile',
    'Samples',
    'Saving',
    'TableFormatError',
    'TableMismatchError',
    'ThresholdError',
    'ThresholdTable',
    'certified',
    'in_time',
    'joint',
    'outcome',
    'per_exit',
    'profiles_from_json',
    'profiles_to_json',
    'route',
    'savings',
    'training_path',
]
