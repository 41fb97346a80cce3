"""The second way to cut a batch: the backbone exported as one graph and split at its exits.

Some networks keep the whole batch, or its size, in local variables of their forward, out of reach of hooks. In the
exported graph every tensor that crosses an exit is visible, and its rows can be selected.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from .engine import Answer, Boundary, OnExit

__all__ = ['Stage', 'StagedBackbone', 'mark']


@torch.library.custom_op('timm_cascade::mark', mutates_args=())
def mark(features: Tensor, index: int) -> Tensor:
    """Marks exit `index` in the exported graph; never runs."""
    return features.clone()


@mark.register_fake
def _(features: Tensor, index: int) -> Tensor:
    return torch.empty_like(features)


class _Marked(nn.Module):
    """The backbone as `torch.export` sees it: `run` calls it so that its exits are marked."""

    def __init__(self, backbone: nn.Module, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.backbone = backbone
        self.run = run

    def forward(self, images: Tensor) -> Tensor:
        return self.run(images)


@dataclass
class Stage:
    """What is computed between two exits."""

    nodes: list[fx.Node] = field(default_factory=list)
    inputs: list[fx.Node] = field(default_factory=list)
    outputs: list[fx.Node] = field(default_factory=list)
    live: list[fx.Node] = field(default_factory=list)  # tensors that later stages need, once this one is done
    rows: list[int] = field(default_factory=list)  # of each of them for one sample
    features: fx.Node | None = None
    module: Any = None


class StagedBackbone:
    """The backbone as M+1 graphs, for images like those it was exported with, but of any number.

    Weights are looked up in the backbone at every run, so new weights need no new export. An export is for one size,
    dtype, device and memory format of the images.

    Args:
        backbone: The network, in eval mode.
        run: Calls it with `mark` applied to each exit's features.
        images: (N, C, H, W), an example; only its metadata is used.
        count: Number of exits.

    Raises:
        ValueError: The graph lacks an exit, or something that cannot be cut by samples crosses an exit.
    """

    def __init__(self, backbone: nn.Module, run: Callable[[Tensor], Tensor], images: Tensor, count: int) -> None:
        self.memory_format = torch.contiguous_format if images.is_contiguous() else torch.channels_last
        # of two images: torch.export treats a dimension of 1 as a constant
        example = torch.empty(
            (2, *images.shape[1:]), dtype=images.dtype, device=images.device, memory_format=self.memory_format
        )
        with torch.no_grad():
            program = torch.export.export(
                _Marked(backbone, run),
                (example,),
                # whatever range of batch sizes the kernels of this device allow
                dynamic_shapes={'images': {0: torch.export.Dim.DYNAMIC}},
                strict=False,
            )
        signature = program.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        constants = signature.inputs_to_lifted_tensor_constants
        self.weights: dict[fx.Node, Callable[[nn.Module], Tensor]] = {}
        self.constants: dict[fx.Node, Any] = {}
        self.numbers: dict[tuple[fx.Node, int], int] = {}  # computed sizes, for each number of samples
        for node in program.graph.find_nodes(op='placeholder'):
            if node.name in names:
                self.weights[node] = operator.attrgetter(names[node.name].removeprefix('backbone.'))
            elif node.name in constants:
                self.constants[node] = program.constants[constants[node.name]]
            else:
                self.images = node
        self.batch = self.images.meta['val'].shape[0].node.expr
        self.stages = self._split(program.graph, count)
        for stage in self.stages:
            stage.rows = [self.rows_of(node.meta['val']) for node in stage.live]
            stage.module = self._build(stage, program.graph_module)

    def _split(self, graph: fx.Graph, count: int) -> list[Stage]:
        stages = [Stage() for _ in range(count + 1)]
        home: dict[fx.Node, int] = {}
        current = 0
        for node in list(graph.nodes):
            if node.target is torch.ops.timm_cascade.mark.default:
                features, index = node.args
                assert isinstance(features, fx.Node) and isinstance(index, int)
                stages[index].features = features
                current = index + 1
                node.replace_all_uses_with(features)
            elif node.op == 'output':
                (result,) = (n for n in tree_leaves(node.args) if isinstance(n, fx.Node))
                stages[count].features = result
            elif node.op != 'placeholder' and not _is_assertion(node):
                # items of a tuple are taken in the stage that computes it, so that only tensors cross an exit
                home[node] = home[node.args[0]] if node.target is operator.getitem else current
                stages[home[node]].nodes.append(node)
        missed = [i for i, stage in enumerate(stages) if stage.features is None]
        if missed:
            raise ValueError(f'the exported graph does not have exits {missed}')
        last = {node: max((home[user] for user in node.users if user in home), default=-1) for node in graph.nodes}
        last[stages[count].features] = count
        for i, stage in enumerate(stages):
            own = set(stage.nodes)
            needed = {n: None for node in stage.nodes for n in node.all_input_nodes if n not in own}
            stage.inputs = list(needed)
            stage.live = [n for n in (self.images, *home) if home.get(n, -1) <= i < last[n] and not _is_number(n)]
            wanted = {n: None for n in (*stage.live, stage.features) if n in own}
            stage.outputs = list(wanted)
            if i < count and stage.features not in own and stage.features is not self.images:  # two at one place
                raise ValueError(f'nothing is computed between exit {i} and the one before it')
        return stages

    def _build(self, stage: Stage, root: nn.Module) -> fx.GraphModule:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in stage.inputs}
        for node in stage.nodes:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
        graph.output(tuple(copies[node] for node in stage.outputs))
        return fx.GraphModule(root, graph)

    def rows_of(self, value: Any) -> int:
        """Rows of a tensor that belong to one sample."""
        if not isinstance(value, Tensor):
            raise ValueError(f'{type(value).__name__} crosses an exit')
        sizes: list[Any] = [s.node.expr if isinstance(s, torch.SymInt) else s for s in value.shape]
        if not any(self.batch in getattr(s, 'free_symbols', ()) for s in sizes):
            return 0
        each = sizes[0].subs(self.batch, 1) if self.batch in getattr(sizes[0], 'free_symbols', ()) else 0
        if sizes[0] != each * self.batch or any(self.batch in getattr(s, 'free_symbols', ()) for s in sizes[1:]):
            raise ValueError(f'a tensor of shape {tuple(sizes)} crosses an exit: samples are not its rows')
        return int(each)

    def stale(self, backbone: nn.Module, heads: Sequence[nn.Module]) -> bool:
        """Whether the stages no longer compute what the backbone does."""
        return False

    def run(
        self,
        backbone: nn.Module,
        images: Tensor,
        on_exit: OnExit,
        start: int = 0,
        tensors: list[Tensor] | None = None,
        wanted: Callable[[int], bool] | None = None,
    ) -> Tensor:
        """Runs the stages from `start` on; see `engine.Runner`.

        Raises:
            AttributeError: The backbone no longer has a weight that the graphs use.
        """
        if start == 0:
            values = {self.images: images.contiguous(memory_format=self.memory_format)}
            alive = len(images)
        else:
            values, alive = self._crossed(start - 1, tensors)
        single = start == 0 and alive == 1
        for index in range(start, len(self.stages)):
            stage, last = self.stages[index], index == len(self.stages) - 1
            asked, answer = not last and wanted is not None and wanted(index), None
            if stage.outputs:  # in front of the backbone nothing is computed but the exit's head
                outputs, answer = self.compute(stage, values, backbone, alive, asked, single)
                values.update(zip(stage.outputs, outputs, strict=True))
            assert stage.features is not None
            if last:
                break
            tensors = [values[node] for node in stage.live]
            if asked or wanted is None:
                changed = on_exit(index, Boundary(values[stage.features], tensors, stage.rows, answer))
                if changed is not None:
                    values, alive = self._crossed(index, changed)
                    continue
            values = dict(zip(stage.live, tensors, strict=True))  # what no later stage needs is freed
        return values[stage.features]

    def compute(
        self, stage: Stage, values: Mapping[fx.Node, Tensor], backbone: nn.Module, alive: int, asked: bool, single: bool
    ) -> tuple[Sequence[Tensor], Answer | None]:
        """A stage's outputs for `alive` samples, from the tensors that came to it.

        With `asked` also what the head of its exit says, if stages hold their heads; `single` if the forward began with
        one sample.
        """
        return stage.module(*(self._value(node, values, backbone, alive) for node in stage.inputs)), None

    def _crossed(self, index: int, tensors: list[Tensor] | None) -> tuple[dict[fx.Node, Tensor], int]:
        stage = self.stages[index]
        assert tensors is not None
        alive = next(t.shape[0] // r for t, r in zip(tensors, stage.rows, strict=True) if r)
        return dict(zip(stage.live, tensors, strict=True)), alive

    def _value(self, node: fx.Node, values: Mapping[fx.Node, Any], backbone: nn.Module, alive: int) -> Any:
        if node in values:
            return values[node]
        if node in self.weights:
            return self.weights[node](backbone)
        if node in self.constants:
            return self.constants[node]
        # a size that depends on the number of samples, and was computed before some of them exited
        if (node, alive) not in self.numbers:
            self.numbers[node, alive] = int(node.meta['val'].node.expr.subs(self.batch, alive))
        return self.numbers[node, alive]


def _is_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get('val'), (torch.SymInt, int))


def _is_assertion(node: fx.Node) -> bool:
    return node.op == 'call_function' and not node.users and 'assert' in str(node.target)
