"""From calibration arrays to thresholds one can trust: pure numpy, knows no model."""
from __future__ import annotations

from .calibration import Calibration
from .certified import certified
from .errors import PointNotFoundError, TableFormatError, TableMismatchError, ThresholdError
from .joint import at_cost, joint
from .operating_point import OperatingPoint
from .per_exit import per_exit
from .routing import Outcome, outcome, route
from .table import ThresholdTable

__all__ = [
    'Calibration', 'OperatingPoint', 'Outcome', 'PointNotFoundError', 'TableFormatError', 'TableMismatchError',
    'ThresholdError', 'ThresholdTable', 'at_cost', 'certified', 'joint', 'outcome', 'per_exit', 'route',
]
