"""Notices that a cascade is no longer the one that was calibrated: other weights, dtype or input transform."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TableMismatchError
from ..utils.clock import device_name
from ..utils.digest import state_digest
from ..utils.snapshot import Snapshot, places_of
from ..utils.timm_models import resolve_input_data_config

__all__ = ['CalibrationGuard', 'WeightWatch', 'binding', 'calibrated_as', 'dtype_of', 'setup_of']

STEP = 8  # tensors and modules that one call looks at, beside each head's classifier
_TRANSFORM = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')


def dtype_of(model: nn.Module) -> torch.dtype:
    """Floating-point type of the weights, float32 where there are none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def setup_of(model: Any) -> tuple[str, str, bool]:
    """Device, dtype and whether stages are compiled, see `thresholds.timing.Setup`."""
    device = next(model.parameters()).device
    return device_name(device), str(dtype_of(model)).removeprefix('torch.'), model.compiled


def calibrated_as(model: Any) -> dict[str, Any]:
    """What confidences and correctness depend on, beside the heads: backbone (digest), dtype and transform.

    The digest is the same on every device, and takes about a tenth of a second per gigabyte of weights.
    """
    config = resolve_input_data_config(model)
    return dict(
        backbone_digest=state_digest(model.backbone.state_dict()),
        dtype=str(dtype_of(model)).removeprefix('torch.'),
        **{name: list(v) if isinstance(v := config[name], tuple) else v for name in _TRANSFORM},
    )


def binding(model: Any) -> dict[str, Any]:
    """What a threshold table or a calibration must agree on with the model it is used with."""
    exits = tuple(p.module for p in model.exits)
    return dict(exits=exits, num_classes=model.num_classes, heads_hash=model.heads_hash(), **calibrated_as(model))


class WeightWatch:
    """Compares weights with those of its creation, a few per call, so that `predict` can afford it.

    The first call looks at every tensor and module. The others look at the heads' classifiers and a few tensors from
    all over the network, in turn: training, another checkpoint and replaced layers show at once, one edited tensor
    after some calls. Values written through `Tensor.data` leave no trace that is cheap to find; only the digest
    notices them.

    Args:
        model: The cascade.
    """

    def __init__(self, model: nn.Module) -> None:
        heads: Any = model.heads
        places = places_of(model)
        seen = {id(v): v for _, _, v in places if isinstance(v, Tensor) and not v.is_inference()}
        tensors = list(seen.values())
        classifiers = [p for h in heads for p in list(h.parameters())[-2:-1] if not p.is_inference()]
        turns = max(1, -(-len(tensors) // STEP), -(-len(places) // STEP))
        self._all = Snapshot(tensors, places)
        self._parts = [Snapshot([*classifiers, *tensors[i::turns]], places[i::turns]) for i in range(turns)]
        self._probe = classifiers[:1]
        self._dtype = classifiers[0].dtype if classifiers else None
        self._turn = 0
        self._first = True

    def changed(self) -> bool:
        """Whether a change was found; False says that none was found yet."""
        if self._first:
            self._first = False
            return self._all.changed()
        if self._probe and self._probe[0].dtype is not self._dtype:
            return True
        turn = self._turn
        self._turn = turn + 1 if turn + 1 < len(self._parts) else 0
        return self._parts[turn].changed()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copy of the model watches its own weights


class CalibrationGuard:
    """Keeps a cascade's calibration to the weights, dtype and transform that it was made for."""

    def __init__(self) -> None:
        self.watch: WeightWatch | None = None  # since thresholds were chosen

    def check(self, model: Any) -> None:
        """See `CascadeModel.check_calibration`."""
        source = model.calibration if model.calibration is not None else model.table
        if source is not None:
            source.check(**binding(model))

    def begin(self, model: Any) -> None:
        """Watches the weights from now on."""
        self.watch = WeightWatch(model)

    def notice(self, model: Any) -> None:
        """Warns once when the weights are no longer those of the calibration."""
        watch = self.watch
        if watch is None or torch.compiler.is_compiling() or not watch.changed():
            return
        self.watch = None
        try:
            self.check(model)
        except TableMismatchError as e:
            warnings.warn(f'{e} Until then thresholds stay as they are, and nothing is guaranteed.', stacklevel=4)
        else:  # moved to another device, or a copy
            self.begin(model)
