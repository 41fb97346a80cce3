"""Confidence and correctness of held-out samples at every exit: what the dial is set from."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import TableFormatError, ThresholdError
from ..utils.files import replacing
from .checks import BoolArray, check_costs, check_level, check_max_drop, check_samples
from .choice import Choice
from .operating_point import OperatingPoint
from .pvalues import drop_interval
from .routing import outcome
from .rule_certified import certify
from .rule_joint import cost_dial, cross_fitted
from .rule_per_exit import per_exit
from .table import ThresholdTable

__all__ = ['Calibration']

FORMAT_VERSION = 1
_REFERENCES = ('labels', 'backbone')


@dataclass(frozen=True, eq=False)
class Calibration:
    """One full pass over held-out samples. Never calibrate on training data: heads are far surer and righter there.

    Attributes:
        confidence: (n, M+1) float32, max softmax of every exit and the final one; NaN never leaves.
        correct: (n, M+1) bool, whether each exit's answer is the label.
        agreement: (n, M+1) bool, whether each exit's answer is the full network's.
        stage_cost: (M+1,) float64, MACs of each stage, its head included.
        head_cost: (M,) float64, MACs of each head.
        backbone_cost: MACs of the plain backbone, no heads.
        exits: Module names of the M exits.
        num_classes: Of the classifier.
        heads_hash: Identifies the trained heads.
        provenance: JSON values: data set, split, transform, input_size, dtype, versions, ...
    """

    confidence: NDArray[np.float32]
    correct: BoolArray
    agreement: BoolArray
    stage_cost: NDArray[np.float64]
    head_cost: NDArray[np.float64]
    backbone_cost: float
    exits: tuple[str, ...]
    num_classes: int
    heads_hash: str
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        c, correct = check_samples(self.confidence, self.correct)
        _, agreement = check_samples(self.confidence, self.agreement)
        if ((c < 0) | (c > 1)).any():
            raise ThresholdError(
                f'confidence goes from {np.nanmin(c):g} to {np.nanmax(c):g}; expected max softmax, between 0 and 1. '
                f'Were logits passed?'
            )
        if not agreement[:, -1].all():
            raise ThresholdError('the last column of agreement must be all True: the full network agrees with itself.')
        if len(self.exits) != c.shape[1] - 1:
            raise ThresholdError(
                f'{len(self.exits)} exits for {c.shape[1]} columns of confidence; expected a column per exit and one '
                f'for the final exit.'
            )
        stage, head = check_costs(self.stage_cost, self.head_cost, len(self.exits))
        if not (math.isfinite(self.backbone_cost) and self.backbone_cost > 0):
            raise ThresholdError(f'backbone_cost is {self.backbone_cost!r}; expected a number above 0.')
        if self.num_classes < 1:
            raise ThresholdError(f'num_classes is {self.num_classes!r}; expected at least 1.')
        try:
            provenance = json.loads(json.dumps(dict(self.provenance), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ThresholdError(f'provenance must hold JSON values only: {error}.') from error
        for name, value in dict(
            confidence=c.astype(np.float32, copy=False),
            correct=correct,
            agreement=agreement,
            stage_cost=stage,
            head_cost=head,
            backbone_cost=float(self.backbone_cost),
            exits=tuple(self.exits),
            num_classes=int(self.num_classes),
            provenance=provenance,
        ).items():
            object.__setattr__(self, name, value)

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.confidence)

    def point(
        self, max_drop: float, rule: str = 'certified', level: float = 0.9, reference: str = 'labels', seed: int = 0
    ) -> OperatingPoint:
        """Thresholds for an accuracy that may be given up, and what to expect of them.

        What `certified` promises: for each max_drop taken by itself, over the draw of the calibration samples,
        P(true drop > max_drop) <= 1 - level on images from the same source. Not promised: anything under a shift of
        the images, nor the best of several dials read off and picked.

        Args:
            max_drop: Accuracy that may be given up, a fraction: 0.01 is one point.
            rule: 'certified' (promised), 'joint' (on target on average, saves most) or 'per_exit' (the paper's).
            level: Of the certificate.
            reference: 'labels', or 'backbone' to count agreement with the full network instead of correctness.
            seed: Of the splits that `certified` and `joint` make.

        Raises:
            ThresholdError: An unknown rule or reference, or numbers out of range.
        """
        max_drop, level, right = check_max_drop(max_drop), check_level(level), self._right(reference)
        arrays = (self.confidence, right, self.stage_cost)
        if rule == 'certified':
            choice = certify(*arrays, max_drop, level=level, seed=seed, head_cost=self.head_cost)
        elif rule == 'joint':
            choice = cross_fitted(*arrays, max_drop, seed=seed, head_cost=self.head_cost)
        elif rule == 'per_exit':
            thresholds = per_exit(self.confidence, right, max_drop)
            choice = Choice(thresholds, outcome(*arrays, thresholds, self.head_cost))
        else:
            raise ThresholdError(f'rule is {rule!r}; expected certified, joint or per_exit.')
        return self._describe(choice, rule, max_drop, level, reference)

    def at_cost(self, fraction: float, reference: str = 'labels') -> OperatingPoint:
        """The most accurate thresholds whose expected cost is at most this share of the plain backbone's.

        Raises:
            ThresholdError: Less than leaving everything at the cheapest exit costs.
        """
        right = self._right(reference)
        if not 0 < fraction:
            raise ThresholdError(f"fraction is {fraction!r}; expected a share of the backbone's cost, such as 0.5.")
        try:
            choice = cost_dial(
                self.confidence, right, self.stage_cost, fraction * self.backbone_cost, head_cost=self.head_cost
            )
        except ThresholdError as error:
            raise ThresholdError(f'a share of {fraction:g} of the backbone is out of reach: {error}') from error
        return self._describe(choice, 'cost', None, 0.9, reference)

    def table(
        self,
        rule: str | Sequence[str] = ('per_exit', 'joint', 'certified'),
        max_drops: Sequence[float] = (0.0025, 0.005, 0.01, 0.02, 0.05),
        level: float = 0.9,
        reference: str = 'labels',
        seed: int = 0,
    ) -> ThresholdTable:
        """Operating points of one rule or several, to travel with the heads.

        A point whose rule finds nothing that pays is kept: it says that nobody leaves.
        """
        rules = (rule,) if isinstance(rule, str) else tuple(rule)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', UserWarning)  # too few samples: the point itself says that nobody leaves
            points = tuple(self.point(d, r, level, reference, seed) for r in rules for d in max_drops)
        size = self.provenance.get('input_size')
        return ThresholdTable(
            exits=self.exits,
            num_classes=self.num_classes,
            heads_hash=self.heads_hash,
            input_size=None if size is None else tuple(size),
            points=points,
            provenance=self.provenance,
        )

    def save(self, path: str | Path) -> None:
        """Writes one .safetensors file; an existing one is replaced in one step."""
        from safetensors.numpy import save_file

        tensors = dict(
            confidence=np.ascontiguousarray(self.confidence),
            correct=np.packbits(self.correct),
            agreement=np.packbits(self.agreement),
            stage_cost=np.ascontiguousarray(self.stage_cost),
            head_cost=np.ascontiguousarray(self.head_cost),
        )
        rest = dict(
            format_version=FORMAT_VERSION,
            backbone_cost=self.backbone_cost,
            exits=list(self.exits),
            num_classes=self.num_classes,
            heads_hash=self.heads_hash,
            provenance=dict(self.provenance),
        )
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={'calibration': json.dumps(rest, sort_keys=True)})

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Reads what `save` wrote.

        Raises:
            TableFormatError: Not such a file, or a newer format version.
        """
        from safetensors import safe_open

        from ..formats import CalibrationEntry, parse

        try:
            with safe_open(path, framework='numpy') as file:
                described = (file.metadata() or {})['calibration']
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            shape = tensors['confidence'].shape
            for name in ('correct', 'agreement'):
                if tensors[name].size != -(-math.prod(shape) // 8):
                    raise TableFormatError(f'{path}: {name} does not fit confidences of shape {shape}.')
                tensors[name] = np.unpackbits(tensors[name], count=math.prod(shape)).reshape(shape).astype(np.bool_)
            entry = parse(CalibrationEntry, described, str(path), TableFormatError)
            rest = entry.model_dump(exclude={'format_version'})
            return cls(**tensors, **{**rest, 'exits': tuple(rest['exits'])})
        except ThresholdError as error:
            raise TableFormatError(str(error) if str(path) in str(error) else f'{path}: {error}') from error
        except Exception as error:  # a file from outside: whatever reading it raises, it is damaged
            raise TableFormatError(f'{path} is not a calibration file: {error!r}.') from error

    def _right(self, reference: str) -> BoolArray:
        if reference not in _REFERENCES:
            raise ThresholdError(f'reference is {reference!r}; expected labels or backbone.')
        return self.correct if reference == 'labels' else self.agreement

    def _describe(
        self, choice: Choice, rule: str, max_drop: float | None, level: float, reference: str
    ) -> OperatingPoint:
        measured = choice.measured
        certified = rule == 'certified'
        return OperatingPoint(
            rule=rule,
            max_drop=max_drop,
            level=level if certified else None,
            certified=certified,
            reference=reference,
            thresholds=tuple(choice.thresholds.tolist()),
            accuracy=measured.accuracy,
            full_accuracy=measured.full_accuracy,
            drop=measured.drop,
            drop_interval=drop_interval(measured.harmful, measured.helpful, measured.n, level),
            cost=measured.cost,
            cost_share=measured.cost / self.backbone_cost,
            exit_shares=measured.exit_shares,
            n=self.n,
            measured_on=measured.n,
        )
