"""The dial: thresholds from what may be given up, on the model that they are for."""
from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from .machine import device_name
from .thresholds import Calibration, OperatingPoint, Profile, ThresholdTable, in_time, savings

__all__ = ['Dial', 'NotCalibratedError']

COSTS = ('macs', 'time')


class NotCalibratedError(RuntimeError):
    """The dial was turned on a model that has not what to choose from."""


class Dial(nn.Module):
    """A model whose `thresholds` follow from what may be given up.

    Attributes:
        calibration: What to choose thresholds from.
        table: Points that were chosen before, for where there is no calibration.
        profiles: What the parts of the model cost by the clock, on one machine or several.
    """
    thresholds: Any  # (M,), a property that takes sequences and None too
    backbone: Any
    calibration: Calibration | None
    table: ThresholdTable | None
    profiles: list[Profile]

    @property
    def compiled(self) -> bool:
        """Whether its stages are compiled."""
        raise NotImplementedError

    def set_max_drop(
            self,
            max_drop: float,
            rule: str = 'certified',
            level: float = 0.9,
            reference: str | None = None,
            cost: str = 'macs',
    ) -> OperatingPoint:
        """Sets the thresholds from the accuracy that may be given up.

        Warns of exits that save MACs but no time, where this machine was profiled (`timm_cascade.profile`).

        Args:
            max_drop: Acceptable loss of top-1 accuracy, absolute, as a fraction: 0.01 is one point.
            rule: `certified`, `joint` or `per_exit`.
            level: Confidence of the certificate.
            reference: What is right: `labels`, or `backbone` for what the full network answers. Default: labels,
                where the calibration had any.
            cost: What to save: `macs`, or `time` as it was profiled on this machine.

        Raises:
            NotCalibratedError: There is neither a calibration nor a table to choose from; or, for `time`, no
                calibration or no profile of this machine.
        """
        dial = self._dial(cost)
        point = dial.point(max_drop, rule=rule, level=level, reference=_reference(dial, reference))
        self.thresholds = point.thresholds
        for text in self.exits_without_time():
            warnings.warn(text, stacklevel=2)
        return point

    def set_cost(self, fraction: float, reference: str | None = None, cost: str = 'macs') -> OperatingPoint:
        """Sets the most accurate thresholds that spend at most this share of what the backbone costs on average.

        Args:
            fraction: Of the backbone's MACs, or of its time.
            reference: See `set_max_drop`.
            cost: `macs` or `time`.

        Raises:
            NotCalibratedError: As for `set_max_drop`.
        """
        dial = self._dial(cost)
        point = dial.at_cost(fraction, reference=_reference(dial, reference))
        self.thresholds = point.thresholds
        return point

    def profile_here(self) -> Profile | None:
        """The latest profile of this machine, with the model as it is now (dtype, compiled or not)."""
        weight = next(self.parameters())
        here = (device_name(weight.device), str(weight.dtype).removeprefix('torch.'), self.compiled)
        return next((p for p in reversed(self.profiles) if (p.device, p.dtype, p.compiled) == here), None)

    def exits_without_time(self) -> list[str]:
        """What is to be said of open exits that save MACs but no time here, by calibration and profile."""
        profile = self.profile_here()
        if profile is None or self.calibration is None:
            return []
        return [
            f'exit {s.exit} saves {s.macs:,.0f} MACs an image and costs {-1e6 * s.seconds:.1f} us, on {profile.device} '
            f'with batches of {profile.batch_size}. Close it, or use set_max_drop(..., cost="time").'
            for s in savings(self.calibration, profile, self.thresholds) if s.macs > 0 >= s.seconds]

    def _dial(self, cost: str) -> Calibration | ThresholdTable:
        if cost not in COSTS:
            raise ValueError(f'cost is {cost!r}; expected {" or ".join(COSTS)}.')
        dial = self.calibration if self.calibration is not None else self.table
        if dial is None:
            raise NotCalibratedError(
                'this cascade is not calibrated. Run timm_cascade.calibrate(model, held_out) or '
                '`timm-cascade calibrate FOLDER --data DATA` on images it was not trained on.')
        if cost == 'macs':
            return dial
        profile = self.profile_here()
        if profile is None or self.calibration is None:
            missing = 'calibration; its table was made for MACs' if profile is not None else 'profile of this machine'
            raise NotCalibratedError(
                f'to save time the cascade needs calibration and profile, and it has no {missing}. Run '
                f'timm_cascade.{"calibrate(model, held_out)" if profile is not None else "profile(model)"}, with the '
                f'model on the device, in the dtype and compiled or not as it will be used.')
        return in_time(self.calibration, profile)

    def forget_calibration(self) -> None:
        """Closes all exits and drops calibration, table and profiles: they belong to other heads or classes."""
        self.calibration = self.table = None
        self.profiles = []
        self.thresholds = None


def _reference(dial: Calibration | ThresholdTable, asked: str | None) -> str:
    labelled = dial.provenance.get('labelled', True)
    if asked == 'labels' and not labelled:
        raise ValueError('this cascade was calibrated without labels: accuracy cannot be promised, only agreement with '
                         'the full network. Use reference="backbone", or calibrate with labels.')
    return asked or ('labels' if labelled else 'backbone')
