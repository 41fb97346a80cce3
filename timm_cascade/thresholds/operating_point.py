"""One setting of the dial, and what may be expected of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from ..errors import TableFormatError
from ..utils.files import plain

if TYPE_CHECKING:
    from ..formats import PointEntry

__all__ = ['RULES', 'OperatingPoint']

RULES = ('per_exit', 'joint', 'certified', 'cost')


@dataclass(frozen=True)
class OperatingPoint:
    """Thresholds and what they are expected to do on images like the calibration's.

    Where the figures come from: `per_exit` is measured on the samples that chose the thresholds; `joint` and `cost`
    are cross-fitted, every sample measured with thresholds that the others chose; `certified` is measured on the
    samples that only tested. With few samples a drop so chosen still reads somewhat low, as it was picked to pass a
    bound: mind the interval. Samples without a label count as answered correctly by the full network.

    Attributes:
        rule: 'per_exit', 'joint', 'certified', or 'cost' for the cost dial.
        max_drop: What was asked, a fraction of accuracy; None for the cost dial.
        level: Confidence level of the guarantee; None unless certified.
        certified: Whether the drop on unseen data is at most max_drop with probability `level`.
        reference: 'labels', 'backbone' where agreement with the full network stands for correctness, or 'best' where
            the most accurate point of the path stands in place of the full network.
        thresholds: (M,); inf closes an exit.
        accuracy: Expected accuracy, a fraction.
        full_accuracy: Accuracy of the full network on the same samples.
        drop: full_accuracy - accuracy; negative where the cascade is expected to gain.
        drop_interval: Two-sided interval of the drop, at `level` or else 0.9.
        cost: Expected cost per sample, in MACs (or the unit of the calibration's stage_cost).
        cost_share: cost over the plain backbone's.
        exit_shares: (M+1,) fraction of samples each exit answers.
        n: Calibration samples.
        measured_on: Samples that the figures were measured on.
        scope: 'dial' where the guarantee holds for every max_drop at once, 'setting' where for this one; None unless
            certified.
        disagreeing: How many of the n samples are answered otherwise than by the full network; None in tables of
            earlier versions. `DriftWatch` compares new images with it.
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
    scope: str | None = None
    disagreeing: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        asked = 'cost dial' if self.max_drop is None else f'{self.rule}, max_drop {100 * self.max_drop:g} %'
        if self.certified:
            asked += f' at level {self.level:g}' + (' (this setting alone)' if self.scope == 'setting' else '')
        low, high = self.drop_interval
        what = 'agreement with the backbone' if self.reference == 'backbone' else 'accuracy'
        base = 'most accurate point' if self.reference == 'best' else 'full network'
        shares = ' / '.join(f'{100 * share:.1f}' for share in self.exit_shares)
        gain = f' (expected to gain {-100 * self.drop:.1f} points)' if self.drop <= -0.0005 else ''
        return (
            f'{asked}: {what} {100 * self.accuracy:.2f} % ({base} {100 * self.full_accuracy:.2f} %), drop '
            f'{100 * self.drop:.2f} % [{100 * low:.2f}, {100 * high:.2f}]{gain}, cost {100 * self.cost_share:.1f} % of '
            f'the backbone, exits answer {shares} %, n = {self.n}'
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; a closed exit is None."""
        return {**self.extra, **plain({f.name: getattr(self, f.name) for f in fields(self) if f.name != 'extra'})}

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
        if entry.certified and entry.scope is None:  # written before there was a guarantee for the whole dial
            values['scope'] = 'setting'
        values['thresholds'] = tuple(math.inf if t is None else t for t in entry.thresholds)
        values['exit_shares'], values['drop_interval'] = tuple(entry.exit_shares), tuple(entry.drop_interval)
        return cls(**values, extra=dict(entry.model_extra or {}))
