"""What a calibrated model chooses its thresholds from: a calibration or a table, and the times of its parts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import ArrayLike

from ..errors import NotCalibratedError
from .calibration import Calibration
from .operating_point import OperatingPoint
from .samples import FloatArray
from .table import ThresholdTable
from .timing import Profile, Setup, in_time, load_profile, profile_key, savings, store_profile

__all__ = ['Dial', 'Measure']

Measure = Callable[[], Mapping[str, Any]]  # returns the fields of a Profile

COSTS = ('macs', 'time')
QUESTIONED = 0.5  # a max_drop from which a number of points was probably meant


class Dial:
    """Calibration, threshold table and profiles of one cascade.

    Attributes:
        calibration: Confidence and correctness of held-out samples, to choose thresholds from.
        table: Operating points that were chosen before, for a model without its calibration.
        profiles: Measured times of the model's parts, one per setup and batch size.
        path: (K, M) thresholds from the heads' training features, for the next calibration; see `training_path`.
    """

    def __init__(self) -> None:
        self.calibration: Calibration | None = None
        self.table: ThresholdTable | None = None
        self.profiles: list[Profile] = []
        self.path: FloatArray | None = None

    def clear(self) -> None:
        """Drops everything: it belongs to other heads or classes."""
        self.__init__()  # type: ignore[misc]

    def choose(
        self,
        max_drop: float,
        rule: str = 'certified',
        level: float = 0.9,
        scope: str = 'dial',
        reference: str | None = None,
        cost: str = 'macs',
        setup: Setup | None = None,
        measure: Measure | None = None,
    ) -> OperatingPoint:
        """Thresholds for an accuracy that may be given up; see `CascadeModel.set_max_drop`."""
        source = self._source(cost, setup, measure)
        if isinstance(max_drop, (int, float)) and QUESTIONED <= max_drop <= 1:
            warnings.warn(
                f'max_drop={max_drop:g} allows {100 * max_drop:g} percentage points of accuracy to be lost; did you '
                f'mean {max_drop / 100:g}?',
                stacklevel=3,
            )
        return source.point(max_drop, rule=rule, level=level, reference=_reference(source, reference), scope=scope)

    def choose_by_cost(
        self,
        fraction: float,
        reference: str | None = None,
        cost: str = 'macs',
        setup: Setup | None = None,
        measure: Measure | None = None,
    ) -> OperatingPoint:
        """Thresholds for a share of the backbone's cost; see `CascadeModel.set_cost`."""
        source = self._source(cost, setup, measure)
        return source.at_cost(fraction, reference=_reference(source, reference))

    def add_profile(self, profile: Profile) -> None:
        """Keeps a profile, in place of one of the same setup and batch size."""
        kind = (profile.setup, profile.batch_size)
        others = [p for p in self.profiles if (p.setup, p.batch_size) != kind]
        self.profiles = [*others, profile]

    def profile_for(self, setup: Setup | None) -> Profile | None:
        """The latest profile that was measured with this setup."""
        return next((p for p in reversed(self.profiles) if p.setup == setup), None)

    def exits_without_time(self, thresholds: ArrayLike, setup: Setup | None) -> list[str]:
        """Messages about open exits that save MACs but no time in this setup, by calibration and profile."""
        profile = self.profile_for(setup)
        if profile is None or self.calibration is None:
            return []
        return [
            f'exit {s.exit} saves {s.macs:,.0f} MACs per image and costs {-1e6 * s.seconds:.1f} us, on '
            f'{profile.device} with batches of {profile.batch_size}. Close it, or use '
            f'set_max_drop(..., cost="time").'
            for s in savings(self.calibration, profile, thresholds)
            if s.macs > 0 >= s.seconds
        ]

    def _measured(self, setup: Setup, measure: Measure) -> Profile:
        """A profile of this machine, stored by an earlier process or measured now."""
        assert self.calibration is not None
        key = profile_key(self.calibration, setup)
        profile = load_profile(key)
        if profile is None or profile.setup != setup:
            profile = Profile(**measure())
            store_profile(key, profile)
            warnings.warn(
                f'the cascade was not profiled on this machine, so it was measured now, with batches of '
                f'{profile.batch_size}, and the result is stored. For another batch size run '
                f'timm_cascade.profile(model, batch_size=...).',
                stacklevel=6,
            )
        self.add_profile(profile)
        return profile

    def _source(self, cost: str, setup: Setup | None, measure: Measure | None) -> Calibration | ThresholdTable:
        if cost not in COSTS:
            raise ValueError(f'cost is {cost!r}; expected {" or ".join(COSTS)}.')
        source = self.calibration if self.calibration is not None else self.table
        if source is None:
            raise NotCalibratedError(
                'this cascade is not calibrated. Run timm_cascade.calibrate(model, held_out) or '
                '`timm-cascade calibrate FOLDER --data DATA` on images it was not trained on.'
            )
        if cost == 'macs':
            return source
        profile = self.profile_for(setup)
        if profile is None and self.calibration is not None and setup is not None and measure is not None:
            profile = self._measured(setup, measure)
        if profile is None or self.calibration is None:
            missing = 'calibration; its table was made for MACs' if profile is not None else 'profile of this machine'
            raise NotCalibratedError(
                f'to save time the cascade needs calibration and profile, and it has no {missing}. Run '
                f'timm_cascade.{"calibrate(model, held_out)" if profile is not None else "profile(model)"}, with the '
                f'model on the device, in the dtype and compiled or not as it will be used.'
            )
        return in_time(self.calibration, profile)


def _reference(source: Calibration | ThresholdTable, asked: str | None) -> str:
    labelled = source.provenance.get('labelled', True)
    if asked in ('labels', 'best') and not labelled:
        raise ValueError(
            'this cascade was calibrated without labels: accuracy cannot be promised, only agreement with '
            'the full network. Use reference="backbone", or calibrate with labels.'
        )
    return asked or ('labels' if labelled else 'backbone')
