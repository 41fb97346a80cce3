"""What can go wrong in this room, by name; all of them are ValueErrors."""
from __future__ import annotations

__all__ = ['PointNotFoundError', 'TableFormatError', 'TableMismatchError', 'ThresholdError']


class ThresholdError(ValueError):
    """Calibration arrays, thresholds or settings that cannot be right."""


class TableFormatError(ThresholdError):
    """A threshold table or calibration file that cannot be read, or not by this version."""


class TableMismatchError(ThresholdError):
    """A table that belongs to other heads, exits, classes or another resolution."""


class PointNotFoundError(ThresholdError, LookupError):
    """A table has no operating point for what was asked."""
