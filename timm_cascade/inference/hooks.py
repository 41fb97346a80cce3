"""The first way to run a backbone: forward hooks at its exits, which may shrink the batch.

The hooks do nothing unless `HookRunner.run` is active in the same thread, so the backbone on its own is the plain timm
model, and several threads may use one model. Exits at the images (fronts) need no hook: they come before the backbone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

from ..backbone import ExitPoint
from .engine import Boundary, OnExit

__all__ = ['HookRunner']

_thread = threading.local()


class _ActiveRun(NamedTuple):
    """One forward of the backbone during which the hooks are active."""

    runner: HookRunner
    on_exit: OnExit
    start: int
    tensors: list[Tensor] | None
    wanted: Callable[[int], bool] | None


class _ExitHook:
    def __init__(self, runner: HookRunner, index: int) -> None:
        self.runner = runner
        self.index = index
        self.item, self.rows = runner.points[index].item, runner.points[index].rows

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        run: _ActiveRun | None = getattr(_thread, 'run', None)
        if run is None or run.runner is not self.runner or self.index < run.start - 1:
            return None
        resumes = self.index == run.start - 1
        if not resumes and run.wanted is not None and not run.wanted(self.index):
            return None
        if isinstance(output, Tensor):  # not flattened: that would cost single images time
            tensors = run.tensors if resumes else run.on_exit(self.index, Boundary(output, [output], self.rows))
            return None if tensors is None else tensors[0]
        leaves, spec = tree_flatten(output)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        found = [leaves[i] for i in places]
        tensors = run.tensors if resumes else run.on_exit(self.index, Boundary(found[self.item], found, self.rows))
        if tensors is None:
            return None
        for i, tensor in zip(places, tensors, strict=True):
            leaves[i] = tensor
        return tree_unflatten(leaves, spec)


class HookRunner:
    """Forward hooks on the modules where a backbone's exits are. The one place that registers hooks for inference.

    Args:
        backbone: The network.
        points: The exits of the network, in the order in which it runs them.
    """

    def __init__(self, backbone: nn.Module, points: Sequence[ExitPoint]) -> None:
        self.points = tuple(points)
        self.fronts = sum(p.cut == 'input' for p in points)
        self._hooked: list[tuple[nn.Module, RemovableHandle]] = []
        self.attach(backbone)

    def attach(self, backbone: nn.Module) -> bool:
        """Puts hooks on the exits' modules, and says whether they were not there, as some modules were replaced."""
        modules = [backbone.get_submodule(p.module) for p in self.points[self.fronts :]]
        if [id(m) for m in modules] == [id(m) for m, _ in self._hooked]:
            return False
        self.remove()
        self._hooked = [(m, m.register_forward_hook(_ExitHook(self, i))) for i, m in enumerate(modules, self.fronts)]
        return True

    def remove(self) -> None:
        """Removes the hooks from the backbone."""
        for _, handle in self._hooked:
            handle.remove()
        self._hooked = []

    def run(
        self,
        backbone: Callable[[Tensor], Tensor],
        images: Tensor,
        on_exit: OnExit,
        start: int = 0,
        tensors: list[Tensor] | None = None,
        wanted: Callable[[int], bool] | None = None,
    ) -> Tensor:
        """Runs `backbone` (the network, or a function that calls it); see `engine.Runner`."""
        outer = getattr(_thread, 'run', None)
        _thread.run = None  # a front may be this very network on smaller images, in which no sample exits
        try:
            if 0 < start <= self.fronts and tensors is not None:
                (images,) = tensors
            for index in range(start, self.fronts):
                if wanted is not None and not wanted(index):
                    continue
                changed = on_exit(index, Boundary(images, [images], (1,)))
                if changed is not None:
                    (images,) = changed
            _thread.run = _ActiveRun(self, on_exit, start, tensors, wanted)
            return backbone(images)
        finally:
            _thread.run = outer
