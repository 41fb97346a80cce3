"""Predicts the units of an input on a Ray cluster.

Ray Data hands units to actors, restarts actors that died, and moves the work of nodes that are lost. The result depends
on none of that: an actor writes a unit's part itself, under the unit's own name, and a part that is written twice is
the same twice.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadImageError
from .units import Unit

if TYPE_CHECKING:
    from .local import UnitPredictor

__all__ = ['predict_on_ray']


class _Worker:
    """An actor: holds the model, and predicts the units it is given."""

    def __init__(self, predictor: Any, folder: str, gpu: bool) -> None:
        import ray

        self.predictor: UnitPredictor = ray.get(predictor)
        self.folder = Path(folder)
        if gpu:
            self.predictor.model.to('cuda')

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        units = [Unit(*numbers) for numbers in zip(*(batch[k].tolist() for k in Unit.__annotations__), strict=True)]
        error = ''
        for unit in units:
            if not unit.part(self.folder).exists():  # Ray asks again for what a lost node had done
                try:
                    list(self.predictor.write([unit], self.folder))
                except BadImageError as e:  # told as a value: Ray would wrap it, and try again
                    error = str(e)
        return {**batch, 'error': [error] * len(units)}


def predict_on_ray(
    predictor: UnitPredictor, units: Sequence[Unit], folder: Path, actors: int | None = None
) -> Iterator[Unit]:
    """Predicts units on the cluster that Ray is connected to (or on this machine), in any order.

    Args:
        predictor: Sent to every actor once.
        units: What to predict.
        folder: Where parts go; every node must see it under this path.
        actors: Most actors at once; by default one per GPU, or per CPU where there is none.

    Yields:
        Each unit once its part is written.

    Raises:
        ImportError: Ray is not installed.
        BadImageError: See `UnitPredictor`.
    """
    os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
    try:
        import ray
        import ray.data
    except ImportError as e:
        raise ImportError(f'engine="ray" needs Ray ({e}): pip install "timm-cascade[ray]"') from e
    if not units:
        return
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours counts images
    resources = ray.cluster_resources()
    gpu = resources.get('GPU', 0) > 0
    most = min(len(units), actors or int(resources['GPU' if gpu else 'CPU']))
    model = predictor.model
    device = next((p.device for p in model.parameters()), None)  # an exported cascade has none
    model.to('cpu')
    reference = ray.put(predictor)
    if device is not None:
        model.to(device)
    rows = ray.data.from_items([dict(vars(u)) for u in units], override_num_blocks=len(units))
    done = rows.map_batches(
        _Worker,
        batch_size=1,
        compute=_actors(max(most, 1)),
        num_cpus=0 if gpu else 1,
        num_gpus=1 if gpu else 0,
        fn_constructor_args=(reference, str(folder.absolute()), gpu),
    )
    for row in done.iter_rows():
        if row['error']:
            raise BadImageError(row['error'])
        yield Unit(**{k: int(row[k]) for k in Unit.__annotations__})


def _actors(most: int) -> Any:
    """As many as there is room for, up to `most`; all from the beginning where this version of Ray can."""
    from ray.data import ActorPoolStrategy

    knows = 'initial_size' in inspect.signature(ActorPoolStrategy).parameters
    return ActorPoolStrategy(min_size=1, max_size=most, **(dict(initial_size=most) if knows else {}))
