"""Notices cheaply that tensors were written to or replaced."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

__all__ = ['Place', 'Snapshot', 'places_of']

Place = tuple[dict[str, Any], str, Any]  # a module's dictionary, a name in it, and the value it had
_version = operator.attrgetter('_version')


def places_of(module: nn.Module) -> list[Place]:
    """Where a module and all inside it keep their parameters, buffers and modules."""
    return [
        (owned, name, value)
        for inner in module.modules()
        for owned in (inner._parameters, inner._buffers, inner._modules)
        for name, value in owned.items()
    ]


class Snapshot:
    """Versions of some tensors, and what some places held, when it was made.

    Values written through `Tensor.data` leave no trace.

    Args:
        tensors: None of them made in inference mode: those have no version.
        places: See `places_of`.

    Example:
        >>> snapshot = Snapshot(layer.parameters(), places_of(layer))
        >>> layer.weight.mul_(2); snapshot.changed()
        True
    """

    def __init__(self, tensors: Iterable[Tensor], places: Iterable[Place] = ()) -> None:
        self.tensors = list(tensors)
        places = list(places)
        self.owners = [owner for owner, _, _ in places]
        self.names = [name for _, name, _ in places]
        self.values = [value for _, _, value in places]
        self.total = sum(map(_version, self.tensors))

    def changed(self) -> bool:
        """Whether a tensor was written to, or a place holds something else."""
        # versions only grow, so their sum tells; both loops run in C
        return sum(map(_version, self.tensors)) != self.total or not all(
            map(operator.is_, map(dict.get, self.owners, self.names), self.values)
        )
