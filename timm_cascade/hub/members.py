"""The whole networks of a cascade, for the card and for `timm-cascade info`."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..backbone import input_size_of
from ..fronts import name_of
from ..model import CascadeModel
from ..utils.files import plain

__all__ = ['members']


def members(model: CascadeModel) -> list[dict[str, Any]]:
    """A row for each network, those in front first: what it reads and costs, how good it is, and its threshold.

    Returns:
        Dicts of network (name), weights (where they come from), size ('224x224'), parameters and macs (integers), share
        (of the large network's MACs), accuracy (on the calibration images, None without) and threshold (None: closed).
    """
    accuracy: list[float | None] = [None] * (len(model.exits) + 1)
    if model.calibration is not None:
        accuracy = [round(float(a), 4) for a in model.calibration.correct.mean(0)]
    total = model.exits[-1].total
    rows = [
        dict(
            network=f.name,
            weights='of the large network' if f.shared else _source(f.published),
            size=f'{f.size[0]}x{f.size[1]}',
            parameters=0 if f.shared else _count(f.inner),
            macs=f.macs(),
            share=round(f.macs() / total, 4),
            accuracy=a,
            threshold=t,
        )
        for f, a, t in zip(model.fronts, accuracy, plain(model.thresholds.tolist()), strict=False)
    ]
    _, height, width = input_size_of(model.backbone)
    large: dict[str, Any] = dict(network=name_of(model.backbone), weights=_source(model.published))
    large.update(
        size=f'{height}x{width}',
        parameters=_count(model.backbone),
        macs=total,
        share=1.0,
        accuracy=accuracy[-1],
        threshold=None,
    )
    return [*rows, large]


def _source(published: Any) -> str:
    return 'in the release' if published is None else published.hub_id or published.name


def _count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
