"""Operating points with provenance, as diffable JSON that travels with the heads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import PointNotFoundError, TableFormatError, TableMismatchError
from .checks import check_level, check_max_drop
from .operating_point import OperatingPoint

__all__ = ['FORMAT_VERSION', 'ThresholdTable']

FORMAT_VERSION = 1
MAX_POINTS = 10_000
MAX_CHARACTERS = 64_000_000


@dataclass(frozen=True)
class ThresholdTable:
    """Operating points of several rules, bound to the heads, exits, classes and resolution they were measured with.

    Attributes:
        exits: Module names of the M exits.
        num_classes: Of the classifier.
        heads_hash: Identifies the trained heads.
        input_size: (channels, height, width); None where unknown.
        points: In any order.
        provenance: Data set, split, transform, dtype, versions and the like; JSON values.
        extra: Keys of a stored table that this version does not know.
    """

    exits: tuple[str, ...]
    num_classes: int
    heads_hash: str
    input_size: tuple[int, ...] | None
    points: tuple[OperatingPoint, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.points) > MAX_POINTS:
            raise TableFormatError(f'{len(self.points)} operating points; expected at most {MAX_POINTS}.')
        for point in self.points:
            if len(point.thresholds) != len(self.exits):
                raise TableFormatError(
                    f'an operating point has {len(point.thresholds)} thresholds for {len(self.exits)} exits; '
                    f'calibrate again.'
                )

    def point(
        self, max_drop: float, rule: str = 'certified', level: float = 0.9, reference: str = 'labels'
    ) -> OperatingPoint:
        """The stored point with the largest max_drop that is no more than asked.

        Args:
            max_drop: Accuracy that may be given up, a fraction.
            rule: 'per_exit', 'joint' or 'certified'.
            level: Wanted at least, for certified points.
            reference: 'labels' or 'backbone'.

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
        return max(found, key=lambda p: (p.max_drop, -(p.level or 0)))

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
        self, exits: Sequence[str], num_classes: int, heads_hash: str, input_size: Sequence[int] | None = None
    ) -> None:
        """Makes sure that the table belongs to these heads.

        Raises:
            TableMismatchError: Lists all that differs.
        """
        pairs: list[tuple[str, Any, Any]] = [
            ('number of exits', len(self.exits), len(exits)),
            ('exits', tuple(self.exits), tuple(exits)),
            ('num_classes', self.num_classes, num_classes),
            ('heads_hash', self.heads_hash, heads_hash),
        ]
        if self.input_size is not None and input_size is not None:
            pairs.append(('input_size', tuple(self.input_size), tuple(input_size)))
        wrong = [
            f'{name} is {theirs!r} in the table, {ours!r} in the model'
            for name, theirs, ours in pairs
            if theirs != ours
        ]
        if wrong:
            raise TableMismatchError(
                f'this threshold table belongs to another cascade: {"; ".join(wrong)}. Calibrate this one, or load '
                f'the table that was saved with it.'
            )

    def to_json(self) -> str:
        """JSON with sorted keys, lists of numbers on one line, a closed exit as null."""
        content = dict(self.extra)
        content.update(
            format_version=FORMAT_VERSION,
            exits=list(self.exits),
            num_classes=self.num_classes,
            heads_hash=self.heads_hash,
            input_size=None if self.input_size is None else list(self.input_size),
            provenance=dict(self.provenance),
            points=[p.to_dict() for p in self.points],
        )
        text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
        # Only lists without strings or lists inside: a text can then not be mistaken for one.
        return (
            re.sub(
                r'(?m)(?<=": )\[\n[^\[\]{}"]*\]',
                lambda found: re.sub(r'\n\s*', ' ', found[0]).replace('[ ', '[').replace(' ]', ']'),
                text,
            )
            + '\n'
        )

    @classmethod
    def from_json(cls, text: str) -> ThresholdTable:
        """Reads what `to_json` wrote; unknown keys are kept.

        Raises:
            TableFormatError: Not such a table, a newer format version, or values that cannot be right.
        """
        if len(text) > MAX_CHARACTERS:
            raise TableFormatError(f'a threshold table of {len(text)} characters; expected at most {MAX_CHARACTERS}.')
        try:
            content = json.loads(text, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            if isinstance(error, TableFormatError):
                raise
            raise TableFormatError(f'this is not a threshold table: {error}.') from error
        if not isinstance(content, dict) or 'format_version' not in content:
            raise TableFormatError('this is not a threshold table: no format_version.')
        version = content.pop('format_version')
        if type(version) is not int or version < 1:
            raise TableFormatError(f'format_version is {version!r}; expected a whole number from 1.')
        if version > FORMAT_VERSION:
            raise TableFormatError(
                f'this threshold table has format version {version}, newer than the {FORMAT_VERSION} known here; '
                f'upgrade timm_cascade, or calibrate again.'
            )
        kinds: dict[str, tuple[type, ...]] = {
            'exits': (list,),
            'num_classes': (int,),
            'heads_hash': (str,),
            'input_size': (list, type(None)),
            'points': (list,),
            'provenance': (dict,),
        }
        known = {}
        for name, kind in kinds.items():
            if name not in content or not isinstance(content[name], kind) or isinstance(content[name], bool):
                raise TableFormatError(
                    f'{name} is {type(content[name]).__name__ if name in content else "missing"} in this threshold '
                    f'table; expected {kind[0].__name__}.'
                )
            known[name] = content.pop(name)
        if not known['exits'] or not all(isinstance(name, str) for name in known['exits']):
            raise TableFormatError('exits must be names, at least one.')
        if known['input_size'] is not None and not all(type(size) is int for size in known['input_size']):
            raise TableFormatError(f'input_size is {known["input_size"]!r}; expected whole numbers.')
        if len(known['points']) > MAX_POINTS:
            raise TableFormatError(f'{len(known["points"])} operating points; expected at most {MAX_POINTS}.')
        return cls(
            exits=tuple(known['exits']),
            num_classes=known['num_classes'],
            heads_hash=known['heads_hash'],
            input_size=None if known['input_size'] is None else tuple(known['input_size']),
            points=tuple(OperatingPoint.from_dict(p) for p in known['points']),
            provenance=known['provenance'],
            extra=content,
        )


def _refuse(constant: str) -> float:
    raise TableFormatError(f'{constant} in a threshold table; expected finite numbers, or null for a closed exit.')
