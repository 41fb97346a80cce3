"""Operating points with provenance, as diffable JSON that travels with the heads."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import PointNotFoundError, TableFormatError, TableMismatchError
from ..utils.files import plain, readable_json
from .operating_point import OperatingPoint
from .samples import check_level, check_max_drop

__all__ = ['ThresholdTable', 'check_same_model']

_NAMES = dict(input_size='input size', std='standard deviation', crop_pct='crop')


@dataclass(frozen=True)
class ThresholdTable:
    """Operating points of several rules, bound to the heads, exits, classes and resolution they were measured with.

    Attributes:
        exits: Module names of the M exits.
        num_classes: Number of classes of the classifier.
        heads_hash: Identifies the trained heads.
        input_size: (channels, height, width); None where unknown.
        points: Operating points in any order.
        provenance: Data set, split, transform, dtype, versions and the like; JSON values.
        confidences: Histogram of the confidences of each exit on the calibration samples, see `drift.bins_of`;
            None in tables of earlier versions.
        extra: Keys of a stored table that this version does not know.
    """

    exits: tuple[str, ...]
    num_classes: int
    heads_hash: str
    input_size: tuple[int, ...] | None
    points: tuple[OperatingPoint, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    confidences: Mapping[str, Sequence[int]] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for point in self.points:
            if len(point.thresholds) != len(self.exits):
                raise TableFormatError(
                    f'an operating point has {len(point.thresholds)} thresholds for {len(self.exits)} exits; '
                    f'calibrate again.'
                )

    def point(
        self,
        max_drop: float,
        rule: str = 'certified',
        level: float = 0.9,
        reference: str = 'labels',
        scope: str = 'dial',
    ) -> OperatingPoint:
        """The stored point with the largest max_drop that is no more than asked.

        Args:
            max_drop: Accuracy that may be given up, a fraction.
            rule: 'per_exit', 'joint' or 'certified'.
            level: Wanted at least, for certified points.
            reference: 'labels', 'backbone' or 'best'.
            scope: 'dial' for points whose guarantee holds for every max_drop at once. Where the table only has such
                for one setting each (it was written by an older version), one of these is returned, with a warning.

        Raises:
            PointNotFoundError: No such point; the message says which exist.
        """
        max_drop, level = check_max_drop(max_drop), check_level(level)
        found = [
            p
            for p in self.points
            if p.max_drop is not None
            and p.max_drop <= max_drop
            and p.rule == rule
            and p.reference == reference
            and (rule != 'certified' or (p.level or 0) >= level)
        ]
        if not found:
            asked = f'rule {rule}, reference {reference}, max_drop {max_drop:g}'
            raise PointNotFoundError(
                f'the table has no point for {asked}{f", level {level:g}" if rule == "certified" else ""}. It has: '
                f'{self._contents()}. Ask for one of these, or calibrate again.'
            )
        # what holds for the whole dial holds for a setting, not the other way round
        whole = [p for p in found if p.scope == 'dial'] if rule == 'certified' and scope == 'dial' else found
        if not whole:
            warnings.warn(
                'this table guarantees each setting by itself, not the whole dial at once: set it once, or calibrate '
                'again.',
                UserWarning,
                stacklevel=3,
            )
        return max(whole or found, key=lambda p: (p.max_drop, -(p.level or 0), -p.cost))

    def at_cost(self, fraction: float, reference: str = 'labels') -> OperatingPoint:
        """The most accurate stored point whose expected cost is at most this share of the backbone's.

        Raises:
            PointNotFoundError: All points cost more.
        """
        found = [p for p in self.points if p.cost_share <= fraction and p.reference == reference]
        if not found:
            raise PointNotFoundError(
                f'the table has no point that costs at most {fraction:g} of the backbone (reference {reference}). It '
                f'has: {self._contents()}.'
            )
        return max(found, key=lambda p: (p.accuracy, -p.cost))

    def points_at(self, thresholds: ArrayLike) -> list[OperatingPoint]:
        """The points with these thresholds (M,), compared in single precision as a model keeps them."""
        active = np.asarray(thresholds, np.float32)
        return [p for p in self.points if np.array_equal(np.asarray(p.thresholds, np.float32), active)]

    def _contents(self) -> str:
        kinds: dict[str, set[float]] = {}
        for p in self.points:
            name = p.rule + (f' at level {p.level:g}' if p.level else '') + f' ({p.reference})'
            kinds.setdefault(name, set()).add(p.cost_share if p.max_drop is None else p.max_drop)
        return (
            '; '.join(
                f'{kind}: {", ".join(f"{value:.4g}" for value in sorted(values))}'
                for kind, values in sorted(kinds.items())
            )
            or 'nothing'
        )

    def check(
        self,
        exits: Sequence[str],
        num_classes: int,
        heads_hash: str,
        input_size: Sequence[int] | None = None,
        **provenance: Any,
    ) -> None:
        """Makes sure that the table belongs to this cascade.

        Args:
            exits: Module names of the exits.
            num_classes: Number of classes.
            heads_hash: Identifies the heads.
            input_size: (channels, height, width) of the images.
            **provenance: What else the figures follow from (backbone_digest, dtype, mean, ...), where both have it.

        Raises:
            TableMismatchError: Lists all that differs.
        """
        stored = {**self.provenance, 'input_size': self.input_size}
        check_same_model(self, stored, exits, num_classes, heads_hash, {**provenance, 'input_size': input_size})

    def to_json(self) -> str:
        """JSON with sorted keys, lists of numbers on one line, a closed exit as null."""
        from ..formats import TABLE_VERSION

        content = dict(self.extra)
        content.update(
            format_version=TABLE_VERSION,
            exits=list(self.exits),
            num_classes=self.num_classes,
            heads_hash=self.heads_hash,
            input_size=None if self.input_size is None else list(self.input_size),
            provenance=dict(self.provenance),
            points=[p.to_dict() for p in self.points],
        )
        if self.confidences is not None:
            content['confidences'] = {name: list(counts) for name, counts in self.confidences.items()}
        return readable_json(content, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, source: str = 'thresholds.json') -> ThresholdTable:
        """Reads what `to_json` wrote; unknown keys are kept.

        Raises:
            TableFormatError: Not such a table, a newer format version, or values that cannot be right.
        """
        from ..formats import TableFile, parse

        file = parse(TableFile, text, source, TableFormatError)
        return cls(
            exits=tuple(file.exits),
            num_classes=file.num_classes,
            heads_hash=file.heads_hash,
            input_size=None if file.input_size is None else tuple(file.input_size),
            points=tuple(OperatingPoint.from_entry(p) for p in file.points),
            provenance=file.provenance,
            confidences=file.confidences,
            extra=dict(file.model_extra or {}),
        )


def check_same_model(
    measured: Any,
    stored: Mapping[str, Any],
    exits: Sequence[str],
    num_classes: int,
    heads_hash: str,
    provenance: Mapping[str, Any],
) -> None:
    """Makes sure that a table or calibration, `measured`, with the provenance `stored` is of this model.

    Raises:
        TableMismatchError: Lists all that differs.
    """
    pairs = {name: (plain(stored.get(name)), plain(value)) for name, value in provenance.items()}
    other = {name: pair for name, pair in pairs.items() if None not in pair and pair[0] != pair[1]}
    wrong = []
    if tuple(measured.exits) != tuple(exits):
        wrong.append(f'its exits are {tuple(exits)} (calibrated with {tuple(measured.exits)})')
    if measured.num_classes != num_classes:
        wrong.append(f'it has {num_classes} classes (calibrated with {measured.num_classes})')
    if 'dtype' in other:  # all values are rounded, so weights differ too
        before, present = other['dtype']
        wrong.append(f'the dtype is {present} (calibrated in {before})')
    else:
        if other.pop('backbone_digest', None):
            wrong.append("the backbone's weights have changed")
        if measured.heads_hash != heads_hash:
            wrong.append("the heads' weights have changed")
        for name, (before, present) in other.items():
            wrong.append(f'the {_NAMES.get(name, name)} is {present} (calibrated with {before})')
    if wrong:
        raise TableMismatchError(
            f'this cascade is not the one that was calibrated: {"; ".join(wrong)}. Calibrate it again '
            f'(timm_cascade.calibrate(model, held_out)), undo the change, or call model.forget_calibration().'
        )
