"""From calibration arrays to thresholds one can trust: pure numpy, knows no model."""

from __future__ import annotations

from ..errors import PointNotFoundError, TableFormatError, TableMismatchError, ThresholdError
from .calibration import Calibration
from .operating_point import OperatingPoint
from .routing import Outcome, outcome, route
from .rule_certified import certified
from .rule_joint import at_cost, joint
from .rule_per_exit import per_exit
from .table import ThresholdTable
from .timing import Profile, Saving, in_time, profiles_from_json, profiles_to_json, savings

__all__ = [
    'Calibration',
    'OperatingPoint',
    'Outcome',
    'PointNotFoundError',
    'Profile',
    'Saving',
    'TableFormatError',
    'TableMismatchError',
    'ThresholdError',
    'ThresholdTable',
    'at_cost',
    'certified',
    'in_time',
    'joint',
    'outcome',
    'per_exit',
    'profiles_from_json',
    'profiles_to_json',
    'route',
    'savings',
]
