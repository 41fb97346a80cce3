"""The second way to cut a batch: the backbone exported as one graph and split at its exits.

Some networks keep the whole batch, or its size, in local variables of their forward, where no hook reaches it. In the
exported graph everything that crosses an exit is visible, and its rows can be selected.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from .backbone import select_rows

__all__ = ['StagedBackbone', 'mark']


@torch.library.custom_op('timm_cascade::mark', mutates_args=())
def mark(tap: Tensor, index: int) -> Tensor:
    """Stands in the exported graph where exit `index` is; never runs."""
    return tap.clone()


@mark.register_fake
def _(tap: Tensor, index: int) -> Tensor:
    return torch.empty_like(tap)


class _Marked(nn.Module):
    """The backbone as `torch.export` sees it: `run` calls it so that its exits are marked."""

    def __init__(self, backbone: nn.Module, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.backbone = backbone
        self.run = run

    def forward(self, images: Tensor) -> Tensor:
        return self.run(images)


@dataclass
class _Stage:
    nodes: list[fx.Node] = field(default_factory=list)
    inputs: list[fx.Node] = field(default_factory=list)
    outputs: list[fx.Node] = field(default_factory=list)
    live: list[fx.Node] = field(default_factory=list)  # what later stages need, once this one is done
    tap: fx.Node | None = None
    module: Any = None


class StagedBackbone:
    """The backbone as M+1 graphs, for images like those it was exported with, but of any number.

    It owns no weights: they are looked up in the backbone at every run, so loading or training them needs no new
    export. What an export fixes is the size, dtype, device and memory format of the images.

    Args:
        backbone: The network, in eval mode.
        run: Calls it with `mark` applied to each exit's tap.
        images: (N, C, H, W), an example; only its metadata is used.
        count: Number of exits.

    Raises:
        ValueError: The graph does not have its exits, or something crosses one that cannot be cut by samples.
    """

    def __init__(self, backbone: nn.Module, run: Callable[[Tensor], Tensor], images: Tensor, count: int) -> None:
        example = torch.empty_like(images[:1].expand(2, *images.shape[1:])) if len(images) < 2 else images[:2]
        with torch.no_grad():
            program = torch.export.export(
                _Marked(backbone, run), (example,), dynamic_shapes={'images': {0: torch.export.Dim('batch')}},
                strict=False)
        signature = program.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        constants = signature.inputs_to_lifted_tensor_constants
        self.weights: dict[fx.Node, Callable[[nn.Module], Tensor]] = {}
        self.constants: dict[fx.Node, Any] = {}
        for node in program.graph.find_nodes(op='placeholder'):
            if node.name in names:
                self.weights[node] = attrgetter(names[node.name].removeprefix('backbone.'))
            elif node.name in constants:
                self.constants[node] = program.constants[constants[node.name]]
            else:
                self.images = node
        self.batch = self.images.meta['val'].shape[0].node.expr
        self.stages = self._split(program.graph, count)
        for stage in self.stages:
            self._build(stage, program.graph_module)
        self.rows = {node: tree_map(self._rows, node.meta['val']) for stage in self.stages for node in stage.live
                     if not _is_number(node)}

    def _split(self, graph: fx.Graph, count: int) -> list[_Stage]:
        stages = [_Stage() for _ in range(count + 1)]
        home: dict[fx.Node, int] = {}
        current = 0
        for node in list(graph.nodes):
            if node.target is torch.ops.timm_cascade.mark.default:
                tap, index = node.args
                assert isinstance(tap, fx.Node) and isinstance(index, int)
                stages[index].tap = tap
                current = index + 1
                node.replace_all_uses_with(tap)
            elif node.op == 'output':
                (result,) = (n for n in tree_leaves(node.args) if isinstance(n, fx.Node))
                stages[count].tap = result
            elif node.op != 'placeholder' and not _is_assertion(node):
                home[node] = current
                stages[current].nodes.append(node)
        missed = [i for i, stage in enumerate(stages) if stage.tap is None]
        if missed:
            raise ValueError(f'the exported graph does not have exits {missed}')
        last = {node: max((home[user] for user in node.users if user in home), default=-1) for node in graph.nodes}
        last[stages[count].tap] = count
        for i, stage in enumerate(stages):
            own = set(stage.nodes)
            needed = {n: None for node in stage.nodes for n in node.all_input_nodes if n not in own}
            stage.inputs = list(needed)
            stage.live = [n for n in (self.images, *home) if (home.get(n, -1) <= i < last[n])]
            wanted = {n: None for n in (*stage.live, stage.tap) if n in own and not _is_number(n)}
            stage.outputs = list(wanted)
            if i < count and stage.tap not in own:  # two exits at one place, or an exit at the images
                raise ValueError(f'nothing is computed between exit {i} and the one before it')
        return stages

    def _build(self, stage: _Stage, root: nn.Module) -> None:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in stage.inputs}
        for node in stage.nodes:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
        graph.output(tuple(copies[node] for node in stage.outputs))
        stage.module = fx.GraphModule(root, graph)

    def _rows(self, value: Any) -> int:
        """Rows of a live tensor for each sample."""
        if not isinstance(value, Tensor):
            raise ValueError(f'{type(value).__name__} crosses an exit')
        sizes: list[Any] = [s.node.expr if isinstance(s, torch.SymInt) else s for s in value.shape]
        if not any(self.batch in getattr(s, 'free_symbols', ()) for s in sizes):
            return 0
        each = sizes[0].subs(self.batch, 1) if self.batch in getattr(sizes[0], 'free_symbols', ()) else 0
        if sizes[0] != each * self.batch or any(self.batch in getattr(s, 'free_symbols', ()) for s in sizes[1:]):
            raise ValueError(f'a tensor of shape {tuple(sizes)} crosses an exit: samples are not its rows')
        return int(each)

    def run(self, backbone: nn.Module, images: Tensor, leave: Callable[[int, Tensor], Tensor | None]) -> Tensor:
        """Runs all stages; after each of the first M, `leave(index, tap)` may name the samples that go on.

        Raises:
            AttributeError: The backbone no longer has a weight that the graphs use: export it again.
        """
        alive = len(images)
        values: dict[fx.Node, Any] = {self.images: images}
        for index, stage in enumerate(self.stages):
            inputs = [self._value(node, values, backbone, alive) for node in stage.inputs]
            values.update(zip(stage.outputs, stage.module(*inputs), strict=True))
            assert stage.tap is not None
            tap = values[stage.tap]
            if index == len(self.stages) - 1:
                return tap
            keep = leave(index, tap)
            values = {node: values[node] for node in stage.live if node in values}
            if keep is not None:
                alive = len(keep)
                values = {node: tree_map(lambda t, r, keep=keep: _select(t, keep, r), value, self.rows[node])
                          for node, value in values.items()}
        raise AssertionError('no last stage')

    def _value(self, node: fx.Node, values: dict[fx.Node, Any], backbone: nn.Module, alive: int) -> Any:
        if node in values:
            return values[node]
        if node in self.weights:
            return self.weights[node](backbone)
        if node in self.constants:
            return self.constants[node]
        # a size that follows from the number of samples; it was computed before some of them left
        return int(node.meta['val'].node.expr.subs(self.batch, alive))


def _is_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get('val'), (torch.SymInt, int))


def _is_assertion(node: fx.Node) -> bool:
    return node.op == 'call_function' and not node.users and 'assert' in str(node.target)


def _select(tensor: Tensor, keep: Tensor, rows: int) -> Tensor:
    """Rows of samples `keep`, in the memory order that the tensor had: the graph's views rely on it."""
    order: Sequence[int] = sorted(range(tensor.ndim), key=tensor.stride, reverse=True) if rows else ()
    selected = select_rows(tensor, keep, rows)
    if list(order) == list(range(len(order))):
        return selected
    back = sorted(range(len(order)), key=lambda i: order[i])
    return selected.permute(*order).contiguous().permute(*back)
