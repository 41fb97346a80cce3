"""What can go wrong with a release, by name."""
from __future__ import annotations

__all__ = ['HubUnavailableError', 'PushConflictError', 'PushDeniedError', 'PushError', 'ReleaseError']


class ReleaseError(ValueError):
    """A release that cannot be saved, published or loaded; the message says which file and why."""


class HubUnavailableError(ReleaseError):
    """A file is not in the cache, and the Hub cannot be reached."""


class PushError(ReleaseError):
    """Nothing was published; the message says why."""


class PushConflictError(PushError):
    """Somebody else pushed to the repository meanwhile."""


class PushDeniedError(PushError):
    """The token is missing, not valid, or may not write there."""
