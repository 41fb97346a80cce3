"""The backbone's stages, each compiled together with its weights, and with its exit's head where that is open.

A stage is compiled for a single sample or for any larger number, when the first such batch comes. On a GPU, where a
CUDA graph replays one shape, samples are padded to a few batch sizes: the graph of each is recorded when it is first
needed. Where compiling fails, the stage runs as exported, and a warning says why.
"""

from __future__ import annotations

import logging
import math
import operator
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
import torch._inductor
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..backbone import select_rows
from ..heads import ExitHead
from ..utils.clock import clock
from ..utils.snapshot import Snapshot, places_of
from .batch import confidence
from .cuda_graphs import replaying
from .engine import Answer
from .graph import Stage, StagedBackbone

__all__ = ['CompileOptions', 'CompiledBackbone']

_logger = logging.getLogger(__name__)
REPEATS = 5  # of a stage, compiled and not, in turns
CLEARLY = 0.97  # of the compiled stage's time: from there on it runs as exported
GRAPHS = ('reduce-overhead', 'max-autotune')  # modes of torch.compile that replay CUDA graphs


@dataclass(frozen=True)
class CompileOptions:
    """How stages are compiled.

    Attributes:
        backend: Backend of torch.compile.
        mode: Mode of torch.compile; None is its default on a CPU and `max-autotune` on a GPU.
        channels_last: Images and weights of convolutions in channels-last memory.
        buckets: Pad to a few batch sizes; None where CUDA graphs need it.
        static: Compile each of these batch sizes by itself, instead of one form for all, of which each has its graph.
        choose: Run a stage as exported where that is faster; not where CUDA graphs are replayed.
    """

    backend: str = 'inductor'
    mode: str | None = None
    channels_last: bool = False
    buckets: bool | None = None
    static: bool = False
    choose: bool = True


class CompiledBackbone(StagedBackbone):
    """A StagedBackbone whose stages are compiled together with the current weights.

    A stage whose exit is closed runs without its head. Heads at the images (fronts) are not part of a stage.

    Args:
        backbone, run, images: See StagedBackbone.
        heads: One per exit.
        options: How to compile.
        wanted: Whether an exit is open, so that its head is compiled at once.
    """

    def __init__(
        self,
        backbone: nn.Module,
        run: Callable[[Tensor], Tensor],
        images: Tensor,
        heads: Sequence[nn.Module],
        options: CompileOptions,
        wanted: Callable[[int], bool],
    ) -> None:
        super().__init__(backbone, run, images, len(heads))
        parts = list(dict.fromkeys([backbone, *heads]))
        tensors = dict.fromkeys(t for m in parts for t in (*m.parameters(), *m.buffers()) if not t.is_inference())
        self.heads, self.snapshot = list(heads), Snapshot(tensors, [place for m in parts for place in places_of(m)])
        self.first = next(backbone.parameters())  # found once: looking for it costs single images time
        self.memory = self.first.data_ptr()
        mode = options.mode or ('max-autotune' if images.is_cuda else None)
        self.buckets = options.buckets if options.buckets is not None else images.is_cuda and mode in GRAPHS
        self.static = self.buckets and options.static
        choose, began = options.choose and not self.buckets, time.perf_counter()
        kwargs: dict[str, Any] = dict(backend=options.backend, dynamic=False if self.static else None, mode=mode)
        for index, stage in enumerate(self.stages):
            plain, answering = self._with_weights(stage, backbone, options.channels_last), None
            stage.inputs = [node for node in stage.inputs if node not in self.weights and node not in self.constants]
            if index < len(heads) and stage.features in stage.outputs:
                answering = _with_head(plain, stage.outputs.index(stage.features), heads[index])
            stage.module = CompiledStage(
                plain,
                answering,
                kwargs,
                [self._rows(n) for n in stage.inputs],
                [self._rows(n) for n in stage.outputs],
                choose,
                direct=options.backend == 'inductor' and not self.buckets,
            )
        self.run(backbone, images, lambda index, boundary: None, wanted=wanted)  # at once, so that errors show here
        for stage in self.stages:
            stage.module.settled = True
        eager = [str(i) for i, stage in enumerate(self.stages) if stage.module.chose_eager()]
        _logger.info(
            'compiled %d stages in %.1f s (mode %s%s); %s',
            len(self.stages),
            time.perf_counter() - began,
            mode or 'default',
            ', channels-last' if options.channels_last else '',
            f'eager is faster here for stages {", ".join(eager)}' if eager else 'each is faster than eager',
        )

    def stale(self, backbone: nn.Module, heads: Sequence[nn.Module]) -> bool:
        """Whether weights or modules were written to, moved or replaced."""
        return (
            self.snapshot.changed()
            or not all(map(operator.is_, heads, self.heads))
            or self.first.data_ptr() != self.memory
        )

    run = torch.no_grad()(StagedBackbone.run)

    def _rows(self, node: fx.Node) -> int:
        value = node.meta['val']
        return self.rows_of(value) if isinstance(value, Tensor) else 0

    def _with_weights(self, stage: Stage, backbone: nn.Module, channels_last: bool) -> fx.GraphModule:
        """The stage with its weights as attributes, so that the compiler can use their values."""
        root, graph, copies = nn.Module(), fx.Graph(), dict[fx.Node, fx.Node]()
        for node in stage.inputs:
            if node in self.weights or node in self.constants:
                value = self.weights[node](backbone).detach() if node in self.weights else self.constants[node]
                if channels_last and value.ndim == 4:
                    value = value.contiguous(memory_format=torch.channels_last)
                root.register_buffer(node.name, value)
                copies[node] = graph.get_attr(node.name)
        for node in stage.inputs:
            if node not in copies:
                copies[node] = graph.placeholder(node.name)
        for node in stage.nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[node] for node in stage.outputs))
        return fx.GraphModule(root, graph)

    def compute(
        self, stage: Stage, values: Mapping[fx.Node, Tensor], backbone: nn.Module, alive: int, asked: bool, single: bool
    ) -> tuple[Sequence[Tensor], Answer | None]:
        size = bucket(alive) if self.buckets else alive
        form: CompiledStage = stage.module
        asked = asked and form.answering is not None
        inputs = [self._value(node, values, backbone, size) for node in stage.inputs]
        if size > alive:
            device = next(t.device for t in inputs if isinstance(t, Tensor))
            padding = torch.arange(size, device=device).clamp_(max=alive - 1)
            inputs = [select_rows(t, padding, r) if r else t for t, r in zip(inputs, form.input_rows, strict=True)]
        key = size if self.static else min(size, 2)
        if not self.buckets:
            # one image that is left of a batch is not worth compiling for
            outputs = form(inputs, key, asked, alive > 1 or single)
        else:
            rows = [*form.output_rows, *([1, 1] if asked else [])]
            with replaying(next(t.device for t in inputs if isinstance(t, Tensor))):
                outputs = form(inputs, key, asked)
                # CUDA graphs write to the same memory every time, so outputs are copied
                outputs = [(t[: alive * r] if r else t).clone() for t, r in zip(outputs, rows, strict=True)]
        return (outputs[:-2], (outputs[-2], outputs[-1])) if asked else (outputs, None)


class _Head(nn.Module):
    """Features (N, ...) to a head's logits (N, C) and their confidence (N,), in the head's form for inference."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head: Any = head
        hooked = head._forward_hooks or head._forward_pre_hooks
        with torch.no_grad():
            form = head.inference_layers() if type(head) is ExitHead and not hooked else None
        # the compiler makes one loop of the pooling and what comes before it; a product it would only call
        leaves, self.spec = tree_flatten(form and form._replace(pooling=None))
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                self.register_buffer(f'leaf{i}', leaf.detach())
            else:
                setattr(self, f'leaf{i}', leaf)

    def forward(self, features: Tensor) -> Answer:
        form = tree_unflatten([getattr(self, f'leaf{i}') for i in range(self.spec.num_leaves)], self.spec)
        logits = self.head(features) if form is None else self.head.answer(features, form)
        return logits, confidence(logits)


def _with_head(plain: fx.GraphModule, features: int, head: nn.Module) -> fx.GraphModule:
    """The stage followed by its exit's head, whose logits and confidence are two more outputs."""
    graph = fx.Graph()
    outputs: Any = graph.graph_copy(plain.graph, {})
    answer = graph.call_module('exit_head', (outputs[features],))
    graph.output((*outputs, *(graph.call_function(operator.getitem, (answer, i)) for i in range(2))))
    return fx.GraphModule({**dict(plain.named_buffers()), 'exit_head': _Head(head)}, graph)


class CompiledStage:
    """A stage and its compiled forms. Until `settled`, a failure to compile is raised; later the stage runs eagerly.

    Args:
        plain: The stage.
        answering: The stage with its exit's head; None if that is not part of it.
        kwargs: Arguments of torch.compile.
        input_rows, output_rows: Rows of each input and output that belong to one sample.
        choose: Whether the stage runs as exported where that is faster for the first inputs.
        direct: Whether inductor compiles the form for a single sample, without torch.compile around it.
    """

    def __init__(
        self,
        plain: fx.GraphModule,
        answering: fx.GraphModule | None,
        kwargs: Mapping[str, Any],
        input_rows: Sequence[int],
        output_rows: Sequence[int],
        choose: bool,
        direct: bool,
    ) -> None:
        self.plain = plain
        self.answering = answering
        self.kwargs = kwargs
        self.input_rows = input_rows
        self.output_rows = output_rows
        self.choose = choose
        self.forms: dict[tuple[int, bool], Callable[..., Sequence[Tensor]]] = {}
        self.direct = direct  # until inputs come that differ in more than their values
        self.settled = self.failed = False

    def __call__(self, inputs: Sequence[Any], size: int, asked: bool, compiles: bool = True) -> Sequence[Tensor]:
        """Outputs of the form that was compiled for `size` samples, with `asked` also those of the exit's head.

        Where there is none, it is compiled now, or without `compiles` the stage runs as exported.
        """
        plain = self.answering if asked else self.plain
        assert plain is not None
        form = self.forms.get((size, asked))
        if self.failed or (form is None and not compiles):
            return plain(*inputs)
        try:
            if form is None:
                form = self.forms[size, asked] = self._compile(plain, inputs, size)
            return form(*inputs)
        except Exception as e:  # a compiler may raise anything
            if self.direct and size == 1:
                self.direct = False
                self.forms = {key: form for key, form in self.forms.items() if key[0] != 1}
                return self(inputs, size, asked, compiles)
            if not self.settled:
                raise
            outputs = plain(*inputs)  # raises too if the inputs are at fault
            self.failed = True
            warnings.warn(
                f'a stage of the cascade is no longer compiled and runs eagerly: {type(e).__name__}: '
                f'{" ".join(str(e).split())[:300]}',
                stacklevel=2,
            )
            return outputs

    def chose_eager(self) -> bool:
        """Whether a form is the stage as exported."""
        return any(form in (self.plain, self.answering) for form in self.forms.values())

    def _compile(self, plain: fx.GraphModule, inputs: Sequence[Any], size: int) -> Callable[..., Sequence[Tensor]]:
        # a copy has its own code, and so its own entries in the compiler's cache
        module, form = fx.GraphModule(plain, plain.graph), None
        with torch.inference_mode(False), torch.no_grad():
            # copies, because some stages write to what they are given
            spare = [t.clone() if isinstance(t, Tensor) else t for t in inputs]
            if self.direct and size == 1:
                # nothing about a single sample varies, so there is nothing that torch.compile would have to check at
                # every call; the compiler's own code checks sizes and strides
                mode = self.kwargs['mode']
                form = torch._inductor.compile(module, spare, torch._inductor.list_mode_options(mode) if mode else {})
        if form is None:
            form = torch.compile(module, **self.kwargs)
            for tensor, rows in zip(inputs, self.input_rows, strict=True):
                if rows and size == 2 and self.kwargs['dynamic'] is None:  # any number of samples but one
                    torch._dynamo.maybe_mark_dynamic(tensor, 0)
        if not self.choose:
            return form
        form(*inputs)
        device = next((t.device for t in spare if isinstance(t, Tensor)), torch.device('cpu'))
        best = dict.fromkeys((form, plain), math.inf)
        for _ in range(REPEATS):
            for call in best:
                began = clock(device)
                call(*spare)
                best[call] = min(best[call], clock(device) - began)
        return plain if best[plain] < CLEARLY * best[form] else form


def bucket(n: int) -> int:
    """The batch size that n samples are padded to: 1, 2, 3, 4, 6, 8, 12, 16, 24, ...; less than half as many again."""
    power = 1 << (n - 1).bit_length()
    return 3 * power // 4 if power >= 4 and n <= 3 * power // 4 else power
