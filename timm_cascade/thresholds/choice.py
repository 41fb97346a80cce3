"""What a rule hands back inside this room: thresholds, and what they do to samples that did not choose them."""

from __future__ import annotations

from dataclasses import dataclass

from .checks import FloatArray
from .routing import Outcome

__all__ = ['Choice']


@dataclass(frozen=True)
class Choice:
    """Thresholds (M,) and their measured outcome."""

    thresholds: FloatArray
    measured: Outcome
