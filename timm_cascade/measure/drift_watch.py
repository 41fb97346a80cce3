"""A watch on the images that come after the calibration: whether its certificate still applies. No labels needed."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import NotCalibratedError, TableFormatError
from ..inference.batch import CascadeOutput, confidence
from ..inference.request import unwrap
from ..model import CascadeModel
from ..thresholds import OperatingPoint, route
from ..thresholds.drift import ConfidenceShift, DisagreementRise, bins_of, histogram_of
from ..utils.files import plain
from .calibrate import calibration_of

__all__ = ['DriftWatch']

STATE_VERSION = 1
TOGETHER = 16  # shadowed images wait until there are this many, and are compared together
KEPT = 20_000  # shadowed images that `recalibrate` can use


class _Reference(NamedTuple):
    """What the calibration says about the active thresholds."""

    thresholds: list[float]
    exit: int  # the first that is open
    histogram: np.ndarray
    disagreeing: int | None
    n: int


class DriftWatch:
    """Compares new images with those of the calibration, by what the exits say about them.

    `warning_detected` ("changed"): confidences of the first open exit no longer come from where the calibration's did.
    The certificate assumes that they do, so it has ended. `drift_detected` ("broken"): on a random share of the images
    the early answers disagree with the full network more often than the calibration allows. While nothing changes,
    each is false with probability at least 1 - false_alarm, however long it runs. Neither being set is not an
    all-clear: a change that leaves the first exit's confidences alone, or labels that have changed their meaning, are
    not seen.

    Safe for use from several threads. What is found does not depend on how the images are split into batches. If the
    model's thresholds change, both comparisons start again for the new ones.

    Example:
        >>> watch = timm_cascade.DriftWatch(model)
        >>> output = model.predict(images, watch=watch)
        >>> if watch.warning_detected: print(watch.compute())

    Args:
        model: A calibrated cascade with open exits.
        false_alarm: Probability that a flag is ever set although nothing has changed, for each of the two.
        shadow: Share of the images, drawn at random, that also run to the end.
        shadow_alert: The same after "changed".
        seed: Seed of the draws, and of how ties are broken.

    Raises:
        NotCalibratedError: No calibration or table, one without the confidences (written before there was a watch), or
            all exits closed.
        ValueError: Numbers out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        false_alarm: float = 0.01,
        shadow: float = 0.01,
        shadow_alert: float = 0.25,
        seed: int = 0,
    ) -> None:
        for name, value in dict(false_alarm=false_alarm, shadow=shadow, shadow_alert=shadow_alert).items():
            if not 0 <= value <= 1 or (name == 'false_alarm' and not value):
                raise ValueError(f'{name} is {value!r}; expected a probability, such as 0.01.')
        self.model = unwrap(model, CascadeModel)
        self.false_alarm, self.shadow, self.shadow_alert, self.seed = false_alarm, shadow, shadow_alert, seed
        self._lock = threading.RLock()
        self.reset()

    def reset(self) -> None:
        """Starts again, with the model's present calibration and thresholds."""
        reference = _reference(self.model)
        with self._lock:
            # one for ties, one for which images are shadowed: each gives a number per image, however they come
            self._rng, self._draws = np.random.default_rng(self.seed), np.random.default_rng([self.seed, 1])
            self.warning_detected = self.drift_detected = False
            self._images = self._shadowed = 0
            self._changed_at: int | None = None
            self._broken_at: int | None = None
            self._start(reference)

    def _start(self, reference: _Reference) -> None:
        self._reference = reference
        self._shift = ConfidenceShift(reference.histogram, self._rng)
        known = reference.disagreeing
        self._rise = None if known is None else DisagreementRise(known, reference.n, self.false_alarm)
        self._evidence = [1.0, 1.0]
        self._exited_only: bool | None = None
        self._waiting: list[tuple[int, Tensor]] = []  # number of the image, the image
        self._rows: list[tuple[np.ndarray, np.ndarray]] = []

    def begin(self, own_thresholds: bool) -> list[Tensor]:
        """Called by `predict` before a batch: the list that takes the first open exit's confidences.

        Raises:
            ValueError: Thresholds for one call only, or a model in training mode.
            NotCalibratedError: All exits are closed by now.
        """
        if own_thresholds:
            raise ValueError('watch compares images at the thresholds of the model; give no max_drop or thresholds.')
        if self.model.training:
            raise ValueError('watch needs a model in evaluation mode; call model.eval() first.')
        self._follow()
        return []

    def _follow(self) -> None:
        if self.model._thresholds != self._reference.thresholds:
            reference = _reference(self.model)
            with self._lock:
                if reference.thresholds != self._reference.thresholds:
                    self._start(reference)

    def observe(self, images: Tensor, first: Tensor) -> None:
        """Called by `predict` after a batch.

        Args:
            images: (N, C, H, W).
            first: (N,) confidences of the first open exit.
        """
        values = first.tolist()
        with self._lock:
            before = self._images
            quiet = self._update(values, exited_only=False)
            if self._rise is None:
                return
            numbers = [self._draws.random()] if len(values) == 1 else self._draws.random(len(values)).tolist()
            drawn = [i for i, u in enumerate(numbers) if u < (self.shadow if i < quiet else self.shadow_alert)]
            if not drawn:
                return
            self._waiting += [(before + i + 1, images[i].detach().clone()) for i in drawn]
            whole = len(self._waiting) // TOGETHER * TOGETHER
            ready, self._waiting = self._waiting[:whole], self._waiting[whole:]
        if ready:
            self._run_to_the_end(ready)

    def update(self, output: CascadeOutput) -> None:
        """Takes the results of a `predict` (or `stream`) that ran without the watch.

        Of images that did not exit at the first open exit only that is known, so that the comparison is coarser, and
        none can be shadowed: `drift_detected` needs `predict(images, watch=watch)`. A watch takes one form or the
        other.

        Raises:
            ValueError: The watch was used in the other form.
        """
        self._follow()
        exited = output.exit.cpu().numpy() == self._reference.exit
        values = np.where(exited, output.confidence.detach().float().cpu().numpy(), np.nan)
        with self._lock:
            self._update(values.tolist(), exited_only=True)

    def _update(self, values: list[float], exited_only: bool) -> int:
        """Compares the first exit's confidences; returns how many of the images came before "changed"."""
        if self._exited_only is None:
            self._exited_only = exited_only
            if exited_only:  # the threshold's own bin is known in part only
                floor = int(bins_of([self._reference.thresholds[self._reference.exit]])[0])
                self._shift = ConfidenceShift(self._reference.histogram, self._rng, floor)
        elif self._exited_only is not exited_only:
            raise ValueError('this watch was used with the other of update(output) and predict(images, watch=watch).')
        count = len(values)
        evidence = [self._shift.update_one(values[0])] if count == 1 else self._shift.update(values).tolist()
        quiet = 0 if self.warning_detected else count
        if quiet and max(evidence) >= 1 / self.false_alarm:
            quiet = next(i for i, e in enumerate(evidence) if e >= 1 / self.false_alarm)
            self.warning_detected, self._changed_at = True, self._images + quiet + 1
            self._rows.clear()  # recalibrate takes images that came after it
        self._images += count
        if count:
            self._evidence[0] = evidence[-1]
        return quiet

    @torch.no_grad()
    def _run_to_the_end(self, ready: list[tuple[int, Tensor]]) -> None:
        logits = self.model.forward_exits(self.model.as_images(torch.stack([image for _, image in ready])))
        answer = torch.stack([x.argmax(1) for x in logits], 1)
        confident = torch.stack([confidence(x) for x in logits], 1).cpu().numpy()
        agrees = (answer == answer[:, -1:]).cpu().numpy()
        with self._lock:
            if self._rise is None:
                return
            exits = route(confident, self._reference.thresholds)
            disagrees = ~agrees[np.arange(len(exits)), exits]
            for at in range(0, len(ready), TOGETHER):
                group, last = slice(at, at + TOGETHER), ready[at + TOGETHER - 1][0]
                evidence = self._rise.update(disagrees[group])
                self._shadowed += TOGETHER
                self._evidence[1] = float(evidence[-1])
                if not self.drift_detected and evidence.max() >= 2 / self.false_alarm:
                    self.drift_detected, self._broken_at = True, last
                if self._changed_at is None or last >= self._changed_at:
                    self._rows.append((confident[group], agrees[group]))
            while sum(len(c) for c, _ in self._rows) > KEPT:
                self._rows.pop(0)

    def compute(self) -> dict[str, Any]:
        """What was seen: images, flags with the image at which each was set, evidence, rates.

        Returns:
            images, changed, broken, changed_at, broken_at, evidence_changed and evidence_broken (an alarm takes
            1 / false_alarm, and twice that), shadowed, disagreement (its rate since the thresholds were set; None
            before the first), disagreement_limit (None where the table does not say what to expect).
        """
        with self._lock:
            seen = 0 if self._rise is None else self._rise.mixture.seen
            return dict(
                images=self._images,
                changed=self.warning_detected,
                broken=self.drift_detected,
                changed_at=self._changed_at,
                broken_at=self._broken_at,
                evidence_changed=self._evidence[0],
                evidence_broken=self._evidence[1],
                shadowed=self._shadowed,
                disagreement=self._rise.disagreed / seen if self._rise is not None and seen else None,
                disagreement_limit=None if self._rise is None else self._rise.limit,
            )

    def recalibrate(self, max_drop: float, level: float = 0.9) -> OperatingPoint:
        """Chooses thresholds from the shadowed images (those since "changed"), and starts the watch again.

        They have no labels: what is certified is agreement with the full network on images like these. The new
        calibration becomes `model.calibration`. How well the full network does on them nothing here can tell.

        Raises:
            NotCalibratedError: No shadowed images yet; the model is unchanged.
            ThresholdError: max_drop or level out of range; the model is unchanged.
        """
        with self._lock:
            rows = list(self._rows)
        if not rows:
            raise NotCalibratedError(
                'no image was shadowed since the change, so there is nothing to calibrate with. Predict more images '
                'with watch=watch (shadow_alert is the share that is kept), or call timm_cascade.calibrate.'
            )
        model = self.model
        confident, agrees = (np.concatenate(part) for part in zip(*rows, strict=True))
        provenance = dict(data='shadowed images', split='', labelled=False)
        path = model.dial.path if model.calibration is None else model.calibration.path
        calibration = calibration_of(
            model, provenance, confidence=confident, correct=agrees, agreement=agrees, path=path
        )
        point = calibration.point(max_drop, level=level, reference='backbone')
        table = calibration.table(reference='backbone', level=level)
        model.calibration, model.table, model.thresholds = calibration, table, point.thresholds
        if not model.any_open:
            warnings.warn('no exit was opened, so there is nothing to watch until one is.', UserWarning, stacklevel=2)
            return point
        self.reset()
        return point

    def state_dict(self) -> dict[str, Any]:
        """Everything but the model and the images that wait, as plain values (JSON, torch.save)."""
        with self._lock:
            return dict(
                version=STATE_VERSION,
                settings=[self.false_alarm, self.shadow, self.shadow_alert, self.seed],
                thresholds=plain(self._reference.thresholds),
                heads_hash=self.model.heads_hash(),
                flags=[self.warning_detected, self.drift_detected],
                counts=[self._images, self._shadowed, self._changed_at, self._broken_at],
                evidence=list(self._evidence),
                exited_only=self._exited_only,
                rng=self._rng.bit_generator.state,
                draws=self._draws.bit_generator.state,
                shift=self._shift.state(),
                rise=None if self._rise is None else self._rise.state(),
                rows=[[c.tolist(), a.tolist()] for c, a in self._rows],
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where `state_dict` was taken.

        Raises:
            TableFormatError: Not such a state, or one of other heads or thresholds; the watch is unchanged.
        """
        reference = _reference(self.model)
        try:
            if (state['version'], list(state['thresholds'])) != (STATE_VERSION, plain(reference.thresholds)):
                raise ValueError('it was taken by another version, or with other thresholds')
            if state['heads_hash'] != self.model.heads_hash():
                raise ValueError('it was taken with other heads')
            rng = np.random.default_rng()
            rng.bit_generator.state = state['rng']
            shift = ConfidenceShift(reference.histogram, rng)
            shift.load(state['shift'])
            rise = None
            if state['rise'] is not None:
                rise = DisagreementRise(reference.disagreeing or 0, reference.n, self.false_alarm)
                rise.load(state['rise'])
            (warned, drifted), (images, shadowed, changed_at, broken_at) = state['flags'], state['counts']
            false_alarm, shadow, shadow_alert, seed = state['settings']
            draws = np.random.default_rng([seed, 1])
            if 'draws' in state:  # earlier versions had one generator for both
                draws.bit_generator.state = state['draws']
            evidence, exited_only = [float(e) for e in state['evidence']], state['exited_only']
            rows = [(np.array(c, dtype=np.float32), np.array(a, dtype=np.bool_)) for c, a in state['rows']]
        except (KeyError, TypeError, ValueError) as error:
            raise TableFormatError(f'this is not the state of a watch on this model: {error}.') from error
        with self._lock:
            self._start(reference)
            self._rng, self._draws, self._shift, self._rise, self._rows = rng, draws, shift, rise, rows
            self.warning_detected, self.drift_detected = bool(warned), bool(drifted)
            self._images, self._shadowed, self._changed_at, self._broken_at = images, shadowed, changed_at, broken_at
            self.false_alarm, self.shadow, self.shadow_alert, self.seed = false_alarm, shadow, shadow_alert, seed
            self._evidence, self._exited_only = evidence, exited_only


def _reference(model: CascadeModel) -> _Reference:
    thresholds: list[float] = list(model._thresholds)
    is_open = np.isfinite(thresholds)
    if not is_open.any():
        raise NotCalibratedError('all exits are closed, so there is nothing to watch; call model.set_max_drop first.')
    first = int(np.argmax(is_open))
    if model.calibration is not None:
        calibration = model.calibration
        count = calibration.disagreeing(thresholds)
        return _Reference(thresholds, first, histogram_of(calibration.confidence[:, first]), count, calibration.n)
    table = model.table
    if table is None or table.confidences is None:
        raise NotCalibratedError(
            'this cascade has no calibration to compare images with'
            + ('' if table is None else ', and its table was written without confidences')
            + '. Run timm_cascade.calibrate(model, held_out).'
        )
    known = next((p for p in table.points_at(thresholds) if p.disagreeing is not None), None)
    histogram = np.array(table.confidences[table.exits[first]])
    return _Reference(thresholds, first, histogram, known and known.disagreeing, known.n if known else 1)
