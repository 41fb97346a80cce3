"""From calibration arrays to thresholds one can trust: pure numpy, knows no model."""
from __future__ import annotations

from .calibration import Calibration
from .certified import certified
from .errors import PointNotFoundError, TableFormatError, TableMismatchError, ThresholdError
from .joint import at_cost, joint
from .operating_point import OperatingPoint
from .per_exit import per_exit
from .profile import Profile, Saving, in_time, profiles_from_json, profiles_to_json, savings
from .routing import Outcome, outcome, route
from .table import ThresholdTable

__all__ = [
    'Calibration', 'OperatingPoint', 'Outcome', 'PointNotFoundError', 'Profile', 'Saving', 'TableFormatError',
    'TableMismatchError', 'ThresholdError', 'ThresholdTable', 'at_cost', 'certified', 'in_time', 'joint', 'outcome',
    'per_exit', 'profiles_from_json', 'profiles_to_json', 'route', 'savings',
]
