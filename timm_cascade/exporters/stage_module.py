"""The stages of a cascade as modules of their own: live tensors in; live tensors, logits and confidence out.

This is what every export format writes. A stage holds its weights, its exit's head included, and computes sizes that
depend on the number of samples from the tensors it is given.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..errors import ExportError
from ..heads import ExitHead, columns_of, scale_and_shift
from ..inference.batch import confidence
from ..inference.graph import StagedBackbone

__all__ = ['IMAGES', 'FoldedHead', 'StageModule']

IMAGES = 'images'  # name of the first stage's input


class FoldedHead(nn.Module):
    """An exit head for inference: one pooling operation and its linear layers, with the normalisation folded in.

    Args:
        head: The trained head, in eval mode; it is not changed.
        shape: Features it reads, (N, C, H, W), (N, H, W, C) or (N, L, C) by the head's layout; N is not used.

    Shapes: features to logits (N, num_classes).
    """

    pooling: Tensor | None

    def __init__(self, head: ExitHead, shape: Sequence[int]) -> None:
        super().__init__()
        first = head.hidden[0] if isinstance(head.hidden, nn.Sequential) else head.fc
        assert isinstance(first, nn.Linear)
        weight, bias = first.weight.detach().double(), first.bias.detach().double()
        if isinstance(head.norm, nn.BatchNorm1d):
            scale, shift = scale_and_shift(head.norm, torch.float64)
            weight, bias = weight * scale, bias + weight @ shift
        if isinstance(head.hidden, nn.Sequential) and isinstance(head.hidden[1], nn.BatchNorm1d):
            scale, shift = scale_and_shift(head.hidden[1], torch.float64)
            weight, bias = weight * scale[:, None], bias * scale + shift
        self.kernel: tuple[int, int] | None = None
        by_channel = weight.unflatten(1, (-1, head.columns))
        if head.layout == 'NCHW':
            height, width = shape[2:]
            if height % head.grid[0] == 0 and width % head.grid[1] == 0:
                self.kernel = (height // head.grid[0], width // head.grid[1])
                pooling = None
                if head.mean:  # of cells of one size it is their mean
                    cells = by_channel[..., :-1]
                    weight = (cells + by_channel[..., -1:] / cells.shape[-1]).flatten(1)
            else:  # no pooling operator of ONNX has cells of different sizes: a product with their averages has
                pooling = columns_of(head, (height, width), head.mean).T
        else:
            pooling = columns_of(head, tuple(shape[1:3]) if head.layout == 'NHWC' else head.size, head.mean)
            # pooled cells come before channels here, while the head's weights have channels first
            weight = by_channel.transpose(1, 2).flatten(1)
        self.spatial = head.layout == 'NHWC'
        self.register_buffer('pooling', None if pooling is None else pooling.to(first.weight.dtype))
        self.first = _linear(weight, bias, first)
        self.second = copy.deepcopy(head.fc) if first is not head.fc else None

    def forward(self, features: Tensor) -> Tensor:
        if self.kernel is not None:
            pooled = F.avg_pool2d(features, self.kernel)
        elif self.spatial:
            pooled = self.pooling @ features.flatten(1, 2)  # type: ignore[operator]
        elif features.ndim == 4:
            pooled = features.flatten(2) @ self.pooling  # type: ignore[operator]
        else:
            pooled = self.pooling @ features  # type: ignore[operator]
        answer = self.first(pooled.flatten(1))
        return answer if self.second is None else self.second(answer.relu())


def _linear(weight: Tensor, bias: Tensor, like: nn.Linear) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=like.weight.dtype, device=like.weight.device)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer.requires_grad_(False)


class StageModule(nn.Module):
    """One stage: tensors `inputs` to (*tensors `outputs`, logits (N, C), confidence (N,) float32).

    Args:
        staged: The exported backbone.
        index: Which stage.
        backbone: Whose weights to hold; they are not copied.
        head: The exit's head; None for the last stage, whose features are the logits.

    Attributes:
        inputs, outputs: Names of the tensors it reads, and of those it makes for later stages.
        input_rows: Rows of each input that belong to one sample; 0 for a tensor that all samples share.
        live: (name, rows) of all tensors that later stages need, of this stage or an earlier one.
        examples: Inputs of two samples.
    """

    def __init__(self, staged: StagedBackbone, index: int, backbone: nn.Module, head: nn.Module | None) -> None:
        super().__init__()
        stage = staged.stages[index]
        assert stage.features is not None
        self.index = index

        def name(node: fx.Node) -> str:
            # a name of their own: the exporter may give a node of another stage the same
            return IMAGES if node is staged.images else f'live_{node.name}'

        root, graph = nn.Module(), fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        # in front of the backbone nothing is computed: the exit's head reads what came in
        reads = list(dict.fromkeys([*stage.inputs, *([] if stage.features in stage.nodes else [stage.features])]))
        for node in reads:
            if node in staged.weights or node in staged.constants:
                value = staged.weights[node](backbone).detach() if node in staged.weights else staged.constants[node]
                root.register_buffer(node.name, value)
                copies[node] = graph.get_attr(node.name)
        inputs = [node for node in reads if node not in copies]
        tensors = [node for node in inputs if isinstance(node.meta['val'], Tensor)]
        self.inputs = [name(node) for node in tensors]
        self.input_rows = [staged.rows_of(node.meta['val']) for node in tensors]
        if not any(self.input_rows):
            raise ExportError(
                f'stage {index} reads no tensor with a row per sample ({self.inputs}), so the number of samples is '
                f'unknown there. Choose other exits.'
            )
        # each input of the graph: which tensor it is, or a number a * samples + b
        self.given: list[int | tuple[int, int]] = []
        for node in inputs:
            copies[node] = graph.placeholder(node.name)
            self.given.append(tensors.index(node) if node in tensors else _affine(node, staged.batch))
        for node in stage.nodes:
            copies[node] = _copy(node, graph, copies)
            if node.op == 'get_attr':  # a graph within the graph
                setattr(root, str(node.target), getattr(stage.module, str(node.target)))
        live = set(stage.live)
        made = [node for node in stage.outputs if node in live]
        self.outputs = [name(node) for node in made]
        self.live = [(name(node), rows) for node, rows in zip(stage.live, stage.rows, strict=True)]
        graph.output((tuple(copies[node] for node in made), copies[stage.features]))
        self.body = fx.GraphModule(root, graph)
        features = stage.features.meta['val']
        if isinstance(head, ExitHead):
            head = FoldedHead(head, [1, *map(int, features.shape[1:])])
        self.head = head
        examples = [_example(node.meta['val'], staged.batch) for node in tensors]
        # images come in single precision whatever the stages compute in: they are cast inside
        self.casts = {i: examples[i].dtype for i, node in enumerate(tensors) if node is staged.images}
        self.examples = tuple(x.float() if i in self.casts else x for i, x in enumerate(examples))
        self.eval()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        which, rows = next((i, r) for i, r in enumerate(self.input_rows) if r)
        samples: Any = tensors[which].shape[0]
        if rows > 1:
            samples = samples // rows
        tensors = tuple(
            x.to(self.casts[i]) if i in self.casts and x.dtype != self.casts[i] else x for i, x in enumerate(tensors)
        )
        values = [tensors[g] if isinstance(g, int) else g[0] * samples + g[1] for g in self.given]
        made, features = self.body(*values)
        logits = features if self.head is None else self.head(features)
        return (*made, logits.float(), confidence(logits))


def _copy(node: fx.Node, graph: fx.Graph, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    """A node of a stage in the stage's own graph, put as exporters can take it."""
    copy = graph.node_copy(node, copies.__getitem__)
    if node.target is torch.ops.aten.scaled_dot_product_attention.default:
        copy.target = _attention
    elif str(node.target) == 'wrap_with_autocast' and not node.args[2]:  # nothing casts here that had to be stopped
        body, *args = copy.args[4:]
        assert isinstance(body, fx.Node)
        copy.op, copy.target, copy.args = 'call_module', str(body.target), tuple(args)
    return copy


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
    """Attention with one batch dimension, as ONNX has it, whatever number of them the network uses."""
    if query.ndim == 4:
        return F.scaled_dot_product_attention(query, key, value, mask, *args, **kwargs)
    if mask is not None:
        mask = mask.expand(*query.shape[:-1], key.shape[-2]).reshape(-1, *query.shape[-3:-1], key.shape[-2])
    q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    found = F.scaled_dot_product_attention(q, k, v, mask, *args, **kwargs)
    return found.reshape(*query.shape[:-1], value.shape[-1])


def _affine(node: fx.Node, batch: Any) -> tuple[int, int]:
    """(a, b) of a size that is a * samples + b; integers between stages are computed again from what comes in."""
    value = node.meta['val']
    if isinstance(value, int):
        return 0, value
    expression = value.node.expr
    one, two, three = (int(expression.subs(batch, n)) for n in (1, 2, 3))
    if three - two != two - one:
        raise ExportError(f'the size {expression} crosses an exit and does not grow evenly with the number of samples.')
    return two - one, 2 * one - two


def _example(value: Tensor, batch: Any) -> Tensor:
    shape = [int(s.node.expr.subs(batch, 2)) if isinstance(s, torch.SymInt) else s for s in value.shape]
    if value.is_floating_point():
        return torch.randn(shape, dtype=torch.float32).to(value.dtype)
    return torch.zeros(shape, dtype=value.dtype)
