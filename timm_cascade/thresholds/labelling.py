"""Where a certificate needs more: which samples to label, and how many images would do."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ThresholdError
from .path import first_flip, follow
from .rule_certified import Certificate
from .samples import BoolArray, IntArray, Samples, route

if TYPE_CHECKING:
    from .calibration import Calibration

__all__ = ['check_labelled', 'labels_needed', 'nothing_certified']

_FEW_FLIPS = 20
_USUAL_HARM, _USUAL_GAIN = 0.5, 0.25  # shares of the disagreements that harm and that help, before labels say


def check_labelled(labelled: BoolArray, samples: Samples) -> BoolArray:
    """Returns which samples have labels, (n,) bool."""
    labelled = np.asarray(labelled)
    if labelled.shape != (samples.n,) or labelled.dtype != np.bool_:
        raise ThresholdError(f'labelled is {labelled.dtype} {labelled.shape}; expected bool ({samples.n},).')
    assert samples.agreement is not None
    if (samples.correct != samples.agreement)[~labelled].any():
        raise ThresholdError('correct must equal agreement for the samples without a label.')
    return labelled


def labels_needed(calibration: Calibration, certificate: Certificate, max_drop: float) -> IntArray:
    """See `Calibration.to_label`."""
    assert calibration.path is not None
    known, first = calibration.has_label(), first_flip(calibration.path, calibration.samples('backbone'))
    flips = follow(calibration.path, replace(calibration.samples(), correct=calibration.correct & known[:, None]))
    unknown = follow(
        calibration.path, replace(calibration.samples(), correct=calibration.agreement & ~known[:, None])
    ).harmful
    # A walk stops where labels end; how far it would go depends on how those that are missing turn out.
    harm, gain = _flip_rates(calibration, known)
    hopeful = replace(
        flips,
        harmful=flips.harmful + np.floor(harm * unknown).astype(np.intp),
        helpful=flips.helpful + np.floor(gain * unknown).astype(np.intp),
    )
    stopped = certificate.stopped(max_drop)
    if (~known & (first <= stopped)).any():
        stopped = max(stopped, certificate.stopped(max_drop, hopeful))
    return np.flatnonzero(~known & (first <= stopped))


def nothing_certified(calibration: Calibration, certificate: Certificate, max_drop: float, reference: str) -> str:
    """What a user reads where no exit was opened: what would help, in numbers."""
    base = 'the most accurate point of the path' if reference == 'best' else 'the full network'
    text = (
        f'No exit was opened: max_drop={max_drop:g} from {base} cannot be certified from {calibration.n:,} calibration '
        f'images at confidence level {certificate.level:g}.'
    )
    if len(certificate.path) == 1 and calibration.n > 4:
        return f'{text} No exit saves anything at these costs.'
    if max_drop == 0:
        return f'{text} With 0 only exits that are better than the network pass: allow a small drop, such as 0.005.'
    labels, without = (_rounded(x) for x in certificate.needed(max_drop))
    ways = []
    if reference != 'backbone' and math.isfinite(labels):
        ways.append(f'about {max(labels, _rounded(1.5 * calibration.n)):,.0f} images with labels')
    if math.isfinite(without):
        pool = 0 if calibration.pool_confidence is None else len(calibration.pool_confidence)
        ways.append(
            f'about {max(without, _rounded(1.5 * (calibration.n + pool))):,.0f} images without labels (unlabelled=)'
        )
    if (
        calibration.path is not None
        and not calibration.has_label().all()
        and (wanted := calibration.to_label(max_drop).size)
    ):
        ways.append(f'labels for {wanted:,} of these images (calibration.to_label({max_drop:g}))')
    if not ways:
        return f'{text} As far as these images show, no number of them would do: allow a larger drop.'
    return f'{text} As far as these images show, {" or ".join(ways)} would do; or allow a larger drop.'


def _flip_rates(calibration: Calibration, known: BoolArray) -> tuple[float, float]:
    """Share of disagreements that harm and that help, among the samples with labels; a guess where these are few."""
    assert calibration.path is not None
    row = route(calibration.confidence, calibration.path[-1])
    everyone = np.arange(calibration.n)
    differs = known & ~calibration.agreement[everyone, row]
    if differs.sum() < _FEW_FLIPS:
        return _USUAL_HARM, _USUAL_GAIN
    full, early = calibration.correct[:, -1], calibration.correct[everyone, row]
    return float((full & ~early)[differs].mean()), float((early & ~full)[differs].mean())


def _rounded(value: float) -> float:
    """Two leading digits, upwards."""
    if not math.isfinite(value):
        return math.inf
    unit = 10 ** max(0, len(str(int(value))) - 2)
    return math.ceil(value / unit) * unit
