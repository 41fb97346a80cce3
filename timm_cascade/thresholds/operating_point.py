"""One setting of the dial, and what may be expected of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from ..errors import TableFormatError

if TYPE_CHECKING:
    from ..formats import PointEntry

__all__ = ['RULES', 'OperatingPoint']

RULES = ('per_exit', 'joint', 'certified', 'cost')


@dataclass(frozen=True)
class OperatingPoint:
    """Thresholds and what they are expected to do on images like the calibration's.

    Where the figures come from: `per_exit` is measured on the samples that chose the thresholds; `joint` and `cost`
    are cross-fitted, every sample measured with thresholds that the others chose; `certified` is measured on the half
    that only tested. With few samples a drop so chosen still reads somewhat low, as it was picked to pass a bound:
    mind the interval.

    Attributes:
        rule: 'per_exit', 'joint', 'certified', or 'cost' for the cost dial.
        max_drop: What was asked, a fraction of accuracy; None for the cost dial.
        level: Of the certificate; None unless certified.
        certified: Whether P(true drop > max_drop) <= 1 - level holds.
        reference: 'labels', or 'backbone' where agreement with the full network stands for correctness.
        thresholds: (M,); inf closes an exit.
        accuracy: Expected, a fraction.
        full_accuracy: Of the full network on the same samples.
        drop: full_accuracy - accuracy.
        drop_interval: Two-sided, at `level` or else 0.9.
        cost: Expected cost of a sample, in MACs (or the unit of the calibration's stage_cost).
        cost_share: cost over the plain backbone's.
        exit_shares: (M+1,) fraction of samples each exit answers.
        n: Calibration samples.
        measured_on: Samples that the figures were measured on.
        extra: Keys of a stored point that this version does not know.
    """

    rule: str
    max_drop: float | None
    level: float | None
    certified: bool
    reference: str
    thresholds: tuple[float, ...]
    accuracy: float
    full_accuracy: float
    drop: float
    drop_interval: tuple[float, float]
    cost: float
    cost_share: float
    exit_shares: tuple[float, ...]
    n: int
    measured_on: int
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        asked = 'cost dial' if self.max_drop is None else f'{self.rule}, max_drop {100 * self.max_drop:g} %'
        if self.certified:
            asked += f' at level {self.level:g}'
        low, high = self.drop_interval
        what = 'accuracy' if self.reference == 'labels' else 'agreement with the backbone'
        shares = ' / '.join(f'{100 * share:.1f}' for share in self.exit_shares)
        return (
            f'{asked}: {what} {100 * self.accuracy:.2f} % (full network {100 * self.full_accuracy:.2f} %), drop '
            f'{100 * self.drop:.2f} % [{100 * low:.2f}, {100 * high:.2f}], cost {100 * self.cost_share:.1f} % of the '
            f'backbone, exits answer {shares} %, n = {self.n}'
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; a closed exit is None."""
        result = dict(self.extra)
        result.update({f.name: getattr(self, f.name) for f in fields(self) if f.name != 'extra'})
        result['thresholds'] = [None if math.isinf(t) else t for t in self.thresholds]
        result['drop_interval'], result['exit_shares'] = list(self.drop_interval), list(self.exit_shares)
        return result

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OperatingPoint:
        """The point that `to_dict` described; unknown keys are kept in `extra`.

        Raises:
            TableFormatError: A missing key, or a value of the wrong kind or out of range.
        """
        from ..formats import PointEntry, parse

        return cls.from_entry(parse(PointEntry, dict(values), 'an operating point', TableFormatError))

    @classmethod
    def from_entry(cls, entry: PointEntry) -> OperatingPoint:
        """The point of a stored table."""
        values = {f.name: getattr(entry, f.name) for f in fields(cls) if f.name != 'extra'}
        values['thresholds'] = tuple(math.inf if t is None else t for t in entry.thresholds)
        values['exit_shares'], values['drop_interval'] = tuple(entry.exit_shares), tuple(entry.drop_interval)
        return cls(**values, extra=dict(entry.model_extra or {}))
