"""Every exception that timm-cascade raises by a name of its own."""

from __future__ import annotations

__all__ = [
    'BackboneError',
    'BadImageError',
    'CascadeError',
    'ExitError',
    'ExportError',
    'FrontError',
    'HubUnavailableError',
    'LaunchError',
    'NotCalibratedError',
    'PlanError',
    'PointNotFoundError',
    'PushConflictError',
    'PushDeniedError',
    'PushError',
    'ReleaseError',
    'RequestError',
    'RoutingError',
    'TableFormatError',
    'TableMismatchError',
    'ThresholdError',
]


class CascadeError(Exception):
    """Base class of all errors below."""


# ---- data


class BadImageError(CascadeError, ValueError):
    """An image cannot be decoded; the message names it."""


# ---- backbones and inference


class BackboneError(CascadeError, ValueError):
    """The timm model cannot be a backbone because it does not classify."""


class ExitError(CascadeError, ValueError):
    """The backbone cannot have the requested exits; the message lists those that it can have."""


class FrontError(CascadeError, ValueError):
    """A network cannot stand in front of a backbone; the message names both, and nothing was changed."""


class RoutingError(CascadeError, RuntimeError):
    """The backbone did not return one row per remaining sample; no answer was given."""


# ---- thresholds


class ThresholdError(CascadeError, ValueError):
    """Calibration arrays, thresholds or settings are out of range or do not fit together."""


class TableFormatError(ThresholdError):
    """A threshold table, calibration or profile file cannot be read, or not by this version."""


class TableMismatchError(ThresholdError):
    """A threshold table belongs to other heads, exits, classes or another resolution."""


class PointNotFoundError(ThresholdError, LookupError):
    """A threshold table has no operating point for what was asked."""


class NotCalibratedError(CascadeError, RuntimeError):
    """Thresholds were requested from a model that has not been calibrated."""


# ---- releases and the Hub


class ReleaseError(CascadeError, ValueError):
    """A release cannot be saved, published or loaded; the message says which file and why."""


class HubUnavailableError(ReleaseError):
    """A file is not in the cache, and the Hub cannot be reached."""


class PushError(ReleaseError):
    """Nothing was published; the message says why."""


class PushConflictError(PushError):
    """The repository received another commit since it was read."""


class PushDeniedError(PushError):
    """The token is missing, not valid, or may not write to the repository."""


# ---- export


class ExportError(CascadeError, ValueError):
    """A cascade cannot be exported as asked, or exported files are damaged; nothing was written."""


# ---- training


class LaunchError(CascadeError, RuntimeError):
    """Several processes were requested, but each runs as if it were alone."""


# ---- prediction


class PlanError(CascadeError, ValueError):
    """A folder of predictions was begun with another model, other thresholds, another input or other settings."""


# ---- serving


class RequestError(CascadeError, ValueError):
    """A request to a server cannot be answered.

    Attributes:
        status: HTTP status that says so.
        reason: One word for the metrics, such as `too_large`.
    """

    def __init__(self, status: int, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.reason = reason
