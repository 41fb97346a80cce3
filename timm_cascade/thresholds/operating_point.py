"""One setting of the dial, and what may be expected of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import TableFormatError

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
        if not isinstance(values, Mapping):
            raise TableFormatError(f'an operating point must be an object, got {type(values).__name__}.')
        names = [f.name for f in fields(cls) if f.name != 'extra']
        missing = [name for name in names if name not in values]
        if missing:
            raise TableFormatError(f'an operating point lacks {", ".join(missing)}; calibrate again.')
        known = {name: values[name] for name in names}
        for name in ('accuracy', 'full_accuracy', 'drop', 'cost', 'cost_share'):
            known[name] = _number(name, known[name])
        for name in ('max_drop', 'level'):
            known[name] = None if known[name] is None else _number(name, known[name], 0, 1)
        for name in ('n', 'measured_on'):
            if isinstance(known[name], bool) or not isinstance(known[name], int) or known[name] < 0:
                raise TableFormatError(f'{name} is {known[name]!r}; expected a count.')
        if known['rule'] not in RULES or known['reference'] not in ('labels', 'backbone'):
            raise TableFormatError(
                f'rule {known["rule"]!r} with reference {known["reference"]!r}; expected one of {", ".join(RULES)} '
                f'with labels or backbone.'
            )
        if (known['rule'] == 'cost') != (known['max_drop'] is None):
            raise TableFormatError(f'rule {known["rule"]!r} does not go with max_drop {known["max_drop"]!r}.')
        if not isinstance(known['certified'], bool) or (known['certified'] and known['level'] is None):
            raise TableFormatError('certified must be true or false, and a certified point needs its level.')
        known['thresholds'] = tuple(
            math.inf if t is None else _number('threshold', t, 0, 1) for t in _list('thresholds', known['thresholds'])
        )
        known['exit_shares'] = tuple(_number('exit share', s, 0, 1) for s in _list('exit_shares', known['exit_shares']))
        interval = _list('drop_interval', known['drop_interval'])
        if len(interval) != 2 or len(known['exit_shares']) != len(known['thresholds']) + 1:
            raise TableFormatError(
                f'{len(known["thresholds"])} thresholds, {len(known["exit_shares"])} exit shares and a drop_interval '
                f'of {len(interval)} numbers do not fit together; expected M, M+1 and 2.'
            )
        known['drop_interval'] = (_number('drop_interval', interval[0]), _number('drop_interval', interval[1]))
        return cls(**known, extra={key: value for key, value in values.items() if key not in names})


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TableFormatError(f'{name} must be a list, got {type(value).__name__}.')
    return value


def _number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TableFormatError(f'{name} is {value!r}; expected a finite number.')
    if not low <= value <= high:
        raise TableFormatError(f'{name} is {value!r}; expected a number from {low:g} to {high:g}.')
    return float(value)
