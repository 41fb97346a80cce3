"""The whole networks of a cascade, for the card and for `timm-cascade info`."""

from __future__ import annotations

from typing import Any

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
    total, size = model.exits[-1].total, input_size_of(model.backbone)[1:]
    networks = [(f.name, f.shared, f.published, f.size, f.inner, f.macs()) for f in model.fronts]
    networks.append((name_of(model.backbone), False, model.published, size, model.backbone, total))
    accuracies = [*accuracy[: len(networks) - 1], accuracy[-1]]
    thresholds = [*plain(model.thresholds.tolist())[: len(networks) - 1], None]
    return [
        dict(
            network=name,
            weights='of the large network' if shared else _source(published),
            size=f'{height}x{width}',
            parameters=0 if shared else sum(p.numel() for p in network.parameters()),
            macs=macs,
            share=round(macs / total, 4),
            accuracy=a,
            threshold=t,
        )
        for (name, shared, published, (height, width), network, macs), a, t in zip(
            networks, accuracies, thresholds, strict=True
        )
    ]


def _source(published: Any) -> str:
    return 'in the release' if published is None else published.hub_id or published.name
