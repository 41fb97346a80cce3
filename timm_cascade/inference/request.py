"""What users pass to a prediction: images, and thresholds per exit or per image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..backbone import ExitPoint

__all__ = ['Requests', 'Thresholds', 'check_images', 'check_thresholds', 'row_per_image', 'unwrap']

Thresholds = Sequence[float] | Tensor  # M numbers, or (N, M)
Model = TypeVar('Model', bound=nn.Module)


def unwrap(model: Any, kind: type[Model]) -> Model:
    """The cascade inside torch.compile, DistributedDataParallel, an EMA and the like.

    Raises:
        TypeError: There is no cascade inside.
    """
    inner = model
    while not isinstance(inner, kind):
        found = getattr(inner, '_orig_mod', getattr(inner, 'module', None))
        if not isinstance(found, nn.Module):
            raise TypeError(
                f'{type(inner).__name__} is not a cascade; create one with timm.create_model("cascade_...") or '
                f'CascadeModel(your_model).'
            )
        inner = found
    return inner


def check_images(x: Tensor, in_chans: int) -> None:
    """
    Raises:
        ValueError: Images of another shape than (N, in_chans, H, W).
    """
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(
            f'images are {tuple(x.shape)}; expected (N, {in_chans}, H, W). Convert them, or create '
            f'the model with in_chans={x.shape[1] if x.ndim == 4 else "..."}.'
        )


def check_thresholds(values: Any, points: Sequence[ExitPoint], count: int | None = None) -> list[float] | Tensor:
    """M thresholds as float32 numbers, inf for a closed exit; or, for `count` images, an (N, M) tensor.

    Args:
        values: M numbers, None closing an exit; with `count` also (N, M) of them.
        points: The M exits.
        count: Number of images.

    Raises:
        ValueError: Another shape, NaN or -inf.
    """
    rows = values.tolist() if isinstance(values, (Tensor, np.ndarray)) else list(values)
    matrix = bool(rows) and all(isinstance(row, (list, tuple, np.ndarray, Tensor)) for row in rows)
    names = ', '.join(p.module for p in points)
    if matrix and count is None:
        raise ValueError(f'thresholds are a matrix; expected one per exit ({names}). Pass a matrix to predict().')
    for row in rows if matrix else [rows]:
        if len(row) != len(points):
            raise ValueError(f'{len(row)} thresholds for {len(points)} exits; expected one per exit ({names}).')
    if matrix and len(rows) != count:
        raise ValueError(f'thresholds have {len(rows)} rows for {count} images; expected a row per image.')
    # kept as float32 values: a threshold is one of the confidences that were seen
    numbers = [[math.inf if v is None else float(np.float32(v)) for v in row] for row in (rows if matrix else [rows])]
    if any(math.isnan(t) or t == -math.inf for row in numbers for t in row):
        raise ValueError(f'thresholds {rows}: each is a confidence in 0..1, or inf to close the exit.')
    return torch.tensor(numbers).reshape(-1, len(points)) if matrix else numbers[0]


def row_per_image(max_drop: Any, count: int) -> list[float]:
    """One max_drop per image.

    Raises:
        ValueError: Another shape, or numbers outside 0..1.
    """
    values = np.asarray(max_drop.detach().cpu() if isinstance(max_drop, Tensor) else max_drop, dtype=np.float64)
    if values.shape not in ((), (count,)):
        raise ValueError(f'max_drop has the shape {values.shape} for {count} images; expected a number or ({count},).')
    wrong = values[~((values >= 0) & (values <= 1))]
    if wrong.size:
        raise ValueError(f'max_drop is {wrong.flat[0]}; expected fractions in 0..1, such as 0.01 for one point.')
    return np.broadcast_to(values, (count,)).tolist()


class Requests:
    """Thresholds of single calls; those of a max_drop are chosen once, then looked up."""

    def __init__(self) -> None:
        self.known: tuple[Any, dict[float, list[float]]] = None, {}  # a calibration or table, thresholds by max_drop

    def limits(self, model: Any, count: int | None, max_drop: Any, thresholds: Any) -> Any:
        """M numbers, or a tensor (count, M); see `CascadeModel.predict`."""
        if max_drop is not None and thresholds is not None:
            raise ValueError('max_drop and thresholds were both given; expected one of them.')
        if model.training:
            raise ValueError('max_drop and thresholds need a model in evaluation mode; call model.eval() first.')
        if max_drop is None:
            return check_thresholds(thresholds, model.exits, count)
        if isinstance(max_drop, (int, float)) and 0 <= max_drop <= 1:  # a lookup: arrays would cost single images time
            return self._resolved(model, float(max_drop))
        rows = [self._resolved(model, d) for d in row_per_image(max_drop, 1 if count is None else count)]
        return rows[0] if np.ndim(max_drop) == 0 else torch.tensor(rows).reshape(-1, len(model.exits))

    def _resolved(self, model: Any, max_drop: float) -> list[float]:
        source = model.calibration if model.calibration is not None else model.table
        if self.known[0] is not source:
            self.known = source, {}
        if max_drop not in self.known[1]:
            model.check_calibration()
            found = check_thresholds(model.dial.choose(max_drop).thresholds, model.exits)
            assert isinstance(found, list)
            self.known[1][max_drop] = found
            model._guard.begin(model)
        return self.known[1][max_drop]
