"""Confidence and correctness of held-out samples at every exit: what the dial is set from."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import TableFormatError, ThresholdError
from ..utils.files import replacing
from .drift import histogram_of
from .labelling import check_labelled, labels_needed, nothing_certified
from .operating_point import OperatingPoint
from .path import Choice, check_path
from .pvalues import drop_interval
from .rule_certified import SETTINGS, Certificate, certify, settings_for
from .rule_joint import Fit, cross_fit, joint_choice, within_budget
from .rule_per_exit import per_exit
from .samples import BoolArray, FloatArray, IntArray, Samples, check_level, check_max_drop, check_softmax, outcome
from .table import ThresholdTable, check_same_model

__all__ = ['Calibration']

REFERENCES = ('labels', 'backbone', 'best')
_MAX_DROPS = (0.0025, 0.005, 0.01, 0.02, 0.05)


@dataclass(frozen=True, eq=False)
class Calibration:
    """Confidence and correctness of every exit on held-out samples, from one full pass.

    Never calibrate on training data: heads are far more confident and more often right there.

    Attributes:
        confidence: (n, M+1) float32, max softmax of every exit and the final one; NaN does not exit early.
        correct: (n, M+1) bool, whether each exit's answer is the label; for samples without a label, `agreement`.
        agreement: (n, M+1) bool, whether each exit's answer is the full network's.
        stage_cost: (M+1,) float64, MACs of each stage, its head included.
        head_cost: (M,) float64, MACs of each head.
        backbone_cost: MACs of the plain backbone, without heads.
        exits: Module names of the M exits.
        num_classes: Number of classes.
        heads_hash: Identifies the trained heads.
        provenance: JSON values: data set, split, transform, input_size, dtype, versions, ...
        labelled: (n,) bool, which samples have labels; None where all have, or none (see provenance).
        path: (K, M) thresholds from the heads' training features, from all exits closed to most permissive; None
            where the heads were trained without one. With it every sample tests, instead of three quarters.
        pool_confidence, pool_agreement: (k, M+1) of further samples without labels, for the test of disagreement.
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
    labelled: BoolArray | None = None
    path: FloatArray | None = None
    pool_confidence: NDArray[np.float32] | None = None
    pool_agreement: BoolArray | None = None

    def __post_init__(self) -> None:
        samples = Samples(self.confidence, self.correct, self.stage_cost, self.head_cost, self.agreement)
        check_softmax(samples.confidence)
        if samples.agreement is None or not samples.agreement[:, -1].all():
            raise ThresholdError('the last column of agreement must be all True: the full network agrees with itself.')
        if len(self.exits) != samples.exits:
            raise ThresholdError(
                f'{len(self.exits)} exits for {samples.exits + 1} columns of confidence; expected a column per exit '
                f'and one for the final exit.'
            )
        if not (math.isfinite(self.backbone_cost) and self.backbone_cost > 0):
            raise ThresholdError(f'backbone_cost is {self.backbone_cost!r}; expected a number above 0.')
        if self.num_classes < 1:
            raise ThresholdError(f'num_classes is {self.num_classes!r}; expected at least 1.')
        try:
            provenance = json.loads(json.dumps(dict(self.provenance), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ThresholdError(f'provenance must hold JSON values only: {error}.') from error
        for name, value in dict(
            confidence=samples.confidence.astype(np.float32, copy=False),
            correct=samples.correct,
            agreement=samples.agreement,
            stage_cost=samples.stage_cost,
            head_cost=samples.head_cost,
            backbone_cost=float(self.backbone_cost),
            exits=tuple(self.exits),
            num_classes=int(self.num_classes),
            provenance=provenance,
            labelled=None if self.labelled is None else check_labelled(self.labelled, samples),
            path=None if self.path is None else check_path(self.path, samples.exits),
        ).items():
            object.__setattr__(self, name, value)
        if (pool := self._pool()) is not None:
            check_softmax(pool.confidence)
            object.__setattr__(self, 'pool_confidence', pool.confidence.astype(np.float32, copy=False))
            object.__setattr__(self, 'pool_agreement', pool.correct)

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.confidence)

    def samples(self, reference: str = 'labels') -> Samples:
        """The samples as the threshold rules take them; with `backbone`, agreement counts as correct."""
        if reference not in REFERENCES:
            raise ThresholdError(f'reference is {reference!r}; expected labels, backbone or best.')
        correct = self.agreement if reference == 'backbone' else self.correct
        return Samples(self.confidence, correct, self.stage_cost, self.head_cost, self.agreement)

    def point(
        self,
        max_drop: float,
        rule: str = 'certified',
        level: float = 0.9,
        reference: str = 'labels',
        seed: int = 0,
        scope: str = 'dial',
    ) -> OperatingPoint:
        """Thresholds for an accuracy that may be given up, and what to expect of them.

        What `certified` promises: with probability `level` over the draw of the calibration samples, for all max_drop
        at once, accuracy on images from the same source falls by at most max_drop. With scope='setting' that holds for
        this max_drop taken by itself. Nothing is promised under a shift of the images, nor where samples are copies.

        Example:
            >>> print(calibration.point(0.01))

        Args:
            max_drop: Accuracy that may be given up, a fraction: 0.01 is one point.
            rule: 'certified' (guaranteed), 'joint' (on target on average, saves most) or 'per_exit' (the paper's).
            level: Confidence level of the guarantee: it holds with at least this probability.
            reference: 'labels'; 'backbone' to count agreement with the full network instead of correctness; 'best' to
                count max_drop from the most accurate point of the path instead of from the full network.
            seed: Seed of the splits that `certified` and `joint` make.
            scope: 'dial' or 'setting', for `certified`.

        Raises:
            ThresholdError: An unknown rule, reference or scope, or numbers out of range.
        """
        max_drop, level, samples = check_max_drop(max_drop), check_level(level), self.samples(reference)
        if reference == 'best' and rule != 'certified':
            raise ThresholdError(f"reference='best' goes with rule='certified', not with {rule!r}.")
        if rule == 'certified':
            certificate = self.certificate(level, reference, seed, scope, max_drop)
            choice = certificate.choice(max_drop)
            if not np.isfinite(choice.thresholds).any():
                warnings.warn(nothing_certified(self, certificate, max_drop, reference), UserWarning, stacklevel=3)
        elif rule == 'joint':
            choice = joint_choice(samples, max_drop, seed, self._fit(reference, seed))
        elif rule == 'per_exit':
            thresholds = per_exit(samples, max_drop)
            choice = Choice(thresholds, outcome(samples, thresholds))
        else:
            raise ThresholdError(f'rule is {rule!r}; expected certified, joint or per_exit.')
        return self._describe(choice, rule, max_drop, level, reference, scope)

    @cached_property
    def _kept(self) -> dict[tuple[Any, ...], Any]:
        return {}

    def _fit(self, reference: str, seed: int) -> Fit:
        """The cross-fitted path, made once: `joint`, the cost dial and the curve all read from it."""
        key = ('fit', reference, seed)
        if key not in self._kept:
            self._kept[key] = cross_fit(self.samples(reference), seed)
        return self._kept[key]

    def certificate(
        self, level: float = 0.9, reference: str = 'labels', seed: int = 0, scope: str = 'dial', max_drop: float = 0.01
    ) -> Certificate:
        """What can be certified, resolved once and kept: further settings of the same dial are a lookup."""
        settings = settings_for(max_drop, scope)
        if reference == 'best' and not self.has_label().all():
            raise ThresholdError("reference='best' needs labels for all calibration images; some have none.")
        key = (level, reference, seed, tuple(settings.items()))
        if key not in self._kept:
            self._kept[key] = certify(
                self.samples(reference),
                level,
                settings,
                self.path,
                self._pool(),
                seed,
                from_best=reference == 'best',
                label_free=1.0 if reference == 'backbone' else None,
                known=None if reference == 'backbone' else self.has_label(),
            )
        return self._kept[key]

    def to_label(self, max_drop: float, level: float = 0.9, scope: str = 'dial') -> IntArray:
        """Which samples without a label need one, for the certificate at max_drop; rising indices.

        A sample whose exits all agree with the full network along the path has no loss, whatever its label. Label the
        samples named here, calibrate again with these labels (-1 for the others), and ask again: once nothing is
        named, the certificate at max_drop is exactly that of all samples labelled. Until then it is valid, but goes
        only as far along the path as labels are complete. The rounds get smaller: each goes as far as labels suggest.

        Example:
            >>> images_to_label = calibration.to_label(0.01)

        Args:
            max_drop, level, scope: As for `point`.

        Raises:
            ThresholdError: Heads without a stored path, so that labels would be needed to propose one.
        """
        max_drop = check_max_drop(max_drop)
        if self.path is None:
            raise ThresholdError(
                'to_label needs the path of thresholds that timm_cascade.train_heads stores with the heads, and these '
                'have none. Train them again, or label all images.'
            )
        return labels_needed(self, self.certificate(level, 'labels', 0, scope, max_drop), max_drop)

    def curve(self, reference: str = 'labels', seed: int = 0) -> list[OperatingPoint]:
        """Accuracy against cost along the path, cross-fitted, from all exits closed to most permissive."""
        path, _, fitted = self._fit(reference, seed)
        rows = np.unique(np.linspace(0, len(path) - 1, 60).astype(int))
        points = [Choice(path[k], fitted.outcome(int(k))) for k in rows]
        return [self._describe(p, 'cost', None, reference=reference) for p in points]

    def at_cost(self, fraction: float, reference: str = 'labels') -> OperatingPoint:
        """The most accurate thresholds whose expected cost is at most this share of the plain backbone's.

        Where the exits are more accurate than the network, these may cost less than the budget.

        Raises:
            ThresholdError: Less than the cheapest thresholds of the path cost.
        """
        samples = self.samples(reference)
        if not 0 < fraction:
            raise ThresholdError(f"fraction is {fraction!r}; expected a share of the backbone's cost, such as 0.5.")
        try:
            choice = within_budget(samples, fraction * self.backbone_cost, self._fit(reference, 0))
        except ThresholdError as error:
            raise ThresholdError(f'a share of {fraction:g} of the backbone is out of reach: {error}') from error
        return self._describe(choice, 'cost', None, reference=reference)

    def table(
        self,
        rule: str | Sequence[str] = ('per_exit', 'joint', 'certified'),
        max_drops: Sequence[float] | None = None,
        level: float = 0.9,
        reference: str = 'labels',
        seed: int = 0,
    ) -> ThresholdTable:
        """Operating points of one rule or several, to travel with the heads.

        A point whose rule finds nothing that pays is kept: it closes all exits.

        Args:
            rule, level, reference, seed: As for `point`.
            max_drops: Settings; by default 0.25 to 5 %, and for `certified` all settings of the dial.
        """
        rules = (rule,) if isinstance(rule, str) else tuple(rule)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', UserWarning)  # too few samples: the point itself says that no exit opens
            points = tuple(
                self.point(d, r, level, reference, seed)
                for r in rules
                for d in (max_drops if max_drops is not None else SETTINGS if r == 'certified' else _MAX_DROPS)
            )
        size = self.provenance.get('input_size')
        return ThresholdTable(
            exits=self.exits,
            num_classes=self.num_classes,
            heads_hash=self.heads_hash,
            input_size=None if size is None else tuple(size),
            points=points,
            provenance=self.provenance,
            confidences={e: histogram_of(self.confidence[:, m]).tolist() for m, e in enumerate(self.exits)},
        )

    def save(self, path: str | Path) -> None:
        """Writes one .safetensors file; an existing one is replaced atomically."""
        from safetensors.numpy import save_file

        from ..formats import CALIBRATION_VERSION

        tensors = dict(
            confidence=np.ascontiguousarray(self.confidence),
            correct=np.packbits(self.correct),
            agreement=np.packbits(self.agreement),
            stage_cost=np.ascontiguousarray(self.stage_cost),
            head_cost=np.ascontiguousarray(self.head_cost),
        )
        for name in ('labelled', 'path', 'pool_confidence', 'pool_agreement'):
            value = getattr(self, name)
            if value is not None:  # flags as bits
                tensors[name] = np.packbits(value) if value.dtype == np.bool_ else np.ascontiguousarray(value)
        rest = dict(
            format_version=CALIBRATION_VERSION,
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
            shape, pool = (np.shape(tensors.get(name, ())) for name in ('confidence', 'pool_confidence'))
            shapes = dict(correct=shape, agreement=shape, labelled=shape[:1], pool_agreement=pool)
            for name, wanted in shapes.items():
                if name not in tensors:
                    continue
                if tensors[name].size != -(-math.prod(wanted) // 8):
                    raise TableFormatError(f'{path}: {name} does not fit confidences of shape {wanted}.')
                tensors[name] = np.unpackbits(tensors[name], count=math.prod(wanted)).reshape(wanted).astype(np.bool_)
            entry = parse(CalibrationEntry, described, str(path), TableFormatError)
            rest = entry.model_dump(exclude={'format_version'})
            return cls(**tensors, **{**rest, 'exits': tuple(rest['exits'])})
        except ThresholdError as error:
            raise TableFormatError(str(error) if str(path) in str(error) else f'{path}: {error}') from error
        except Exception as error:  # a file from outside: whatever reading it raises, it is damaged
            raise TableFormatError(f'{path} is not a calibration file: {error!r}.') from error

    def check(self, exits: Sequence[str], num_classes: int, heads_hash: str, **provenance: Any) -> None:
        """Makes sure that the calibration belongs to this cascade; see `ThresholdTable.check`."""
        check_same_model(self, self.provenance, exits, num_classes, heads_hash, provenance)

    def disagreeing(self, thresholds: ArrayLike) -> int:
        """Number of samples that are answered otherwise than by the full network at these thresholds (M,)."""
        return outcome(self.samples('backbone'), thresholds).harmful

    def has_label(self) -> BoolArray:
        """(n,) which samples have a label."""
        if self.labelled is not None:
            return self.labelled
        return np.full(self.n, bool(self.provenance.get('labelled', True)))

    def _pool(self) -> Samples | None:
        if self.pool_confidence is None and self.pool_agreement is None:
            return None
        if self.pool_confidence is None or self.pool_agreement is None:
            raise ThresholdError('pool_confidence and pool_agreement go together; give both or neither.')
        return Samples(self.pool_confidence, self.pool_agreement, self.stage_cost, self.head_cost)

    def _describe(
        self,
        choice: Choice,
        rule: str,
        max_drop: float | None,
        level: float = 0.9,
        reference: str = 'labels',
        scope: str = 'dial',
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
            scope=scope if certified else None,
            disagreeing=self.disagreeing(choice.thresholds),
        )
