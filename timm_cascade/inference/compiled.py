"""The backbone's stages, each compiled together with its weights.

A stage is compiled once for any number of samples. On a GPU, where a CUDA graph replays one shape, samples are padded
to a few batch sizes: the graph of each is recorded when it is first needed. Where compiling fails, the stage runs as
exported, and a warning says why.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
import torch._inductor
from torch import Tensor, fx, nn

from ..backbone import select_rows
from ..utils.snapshot import Snapshot
from .cuda_graphs import replaying
from .graph import Stage, StagedBackbone

__all__ = ['CompileOptions', 'CompiledBackbone']

GRAPHS = ('reduce-overhead', 'max-autotune')  # modes of torch.compile that replay CUDA graphs


@dataclass(frozen=True)
class CompileOptions:
    """How stages are compiled.

    Attributes:
        backend: Backend of torch.compile.
        mode: Mode of torch.compile; None is its default on a CPU and `max-autotune` on a GPU.
        channels_last: Images and weights of convolutions in channels-last memory.
        fold: Let the compiler fold weights: batch norms into convolutions, and packed weights on a CPU.
        buckets: Pad to a few batch sizes; None where CUDA graphs need it.
        static: Compile each of these batch sizes by itself, instead of one form for all, of which each has its graph.
    """

    backend: str = 'inductor'
    mode: str | None = None
    channels_last: bool = False
    fold: bool = False
    buckets: bool | None = None
    static: bool = False


class CompiledBackbone(StagedBackbone):
    """A StagedBackbone whose stages are compiled together with the current weights.

    Args:
        backbone, run, images, count: See StagedBackbone.
        options: How to compile.
    """

    def __init__(
        self, backbone: nn.Module, run: Callable[[Tensor], Tensor], images: Tensor, count: int, options: CompileOptions
    ) -> None:
        super().__init__(backbone, run, images, count)
        tensors = [t for t in (*backbone.parameters(), *backbone.buffers()) if not t.is_inference()]
        self.weights_then, self.memory = Snapshot(tensors), next(backbone.parameters()).data_ptr()
        mode = options.mode or ('max-autotune' if images.is_cuda else None)
        self.buckets = options.buckets if options.buckets is not None else images.is_cuda and mode in GRAPHS
        self.static = self.buckets and options.static
        kwargs: dict[str, Any] = dict(backend=options.backend, dynamic=False if self.static else None, mode=mode)
        if options.backend == 'inductor' and options.fold:
            # torch.compile takes a mode or options, so the mode's options are spelled out
            kwargs['options'] = {**(torch._inductor.list_mode_options(mode) if mode else {}), 'freezing': True}
            kwargs['mode'] = None
        for stage in self.stages:
            plain = self._with_weights(stage, backbone, options.channels_last)
            stage.inputs = [node for node in stage.inputs if node not in self.weights and node not in self.constants]
            stage.module = CompiledStage(
                plain, kwargs, [self._rows(n) for n in stage.inputs], [self._rows(n) for n in stage.outputs]
            )
        # compiled at once, so that errors show here; for any number of samples, which a batch of one does not represent
        example = images if self.static or len(images) > 1 else images.expand(2, *images.shape[1:])
        self.run(backbone, example, lambda index, boundary: None)
        for stage in self.stages:
            stage.module.settled = True

    def stale(self, backbone: nn.Module) -> bool:
        """Whether weights were written to, moved or replaced."""
        return self.weights_then.changed() or next(backbone.parameters()).data_ptr() != self.memory

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
        self, stage: Stage, values: Mapping[fx.Node, Tensor], backbone: nn.Module, alive: int
    ) -> Sequence[Tensor]:
        size = bucket(alive) if self.buckets else alive
        form: CompiledStage = stage.module
        inputs = [self._value(node, values, backbone, size) for node in stage.inputs]
        if size > alive:
            device = next(t.device for t in inputs if isinstance(t, Tensor))
            padding = torch.arange(size, device=device).clamp_(max=alive - 1)
            inputs = [select_rows(t, padding, r) if r else t for t, r in zip(inputs, form.input_rows, strict=True)]
        if not self.static and not form.settled:
            for tensor, rows in zip(inputs, form.input_rows, strict=True):
                if rows:
                    torch._dynamo.maybe_mark_dynamic(tensor, 0)
        with torch.no_grad():
            if not self.buckets:
                return form(inputs, 0)
            with replaying(next(t.device for t in inputs if isinstance(t, Tensor))):
                outputs = form(inputs, size if self.static else 0)
                # CUDA graphs write to the same memory every time, so outputs are copied
                return [(t[: alive * r] if r else t).clone() for t, r in zip(outputs, form.output_rows, strict=True)]


class CompiledStage:
    """A stage and its compiled forms. Until `settled`, a failure to compile is raised; later the stage runs eagerly.

    Args:
        plain: The stage.
        kwargs: Arguments of torch.compile.
        input_rows, output_rows: Rows of each input and output that belong to one sample.
    """

    def __init__(
        self, plain: fx.GraphModule, kwargs: Mapping[str, Any], input_rows: Sequence[int], output_rows: Sequence[int]
    ) -> None:
        self.plain = plain
        self.kwargs = kwargs
        self.input_rows = input_rows
        self.output_rows = output_rows
        self.forms: dict[int, Callable[..., Sequence[Tensor]]] = {}
        self.settled = self.failed = False

    def __call__(self, inputs: Sequence[Any], size: int) -> Sequence[Tensor]:
        """Outputs of the form that was compiled for `size` samples; 0 is the form for any number."""
        if self.failed:
            return self.plain(*inputs)
        if size not in self.forms:
            # a copy has its own code, and so its own entries in the compiler's cache
            self.forms[size] = torch.compile(fx.GraphModule(self.plain, self.plain.graph), **self.kwargs)
        try:
            return self.forms[size](*inputs)
        except Exception as e:  # a compiler may raise anything
            if not self.settled:
                raise
            outputs = self.plain(*inputs)  # raises too if the inputs are at fault
            self.failed = True
            warnings.warn(
                f'a stage of the cascade is no longer compiled and runs eagerly: {type(e).__name__}: '
                f'{" ".join(str(e).split())[:300]}',
                stacklevel=2,
            )
            return outputs


def bucket(n: int) -> int:
    """The batch size that n samples are padded to: 1, 2, 3, 4, 6, 8, 12, 16, 24, ...; less than half as many again."""
    power = 1 << (n - 1).bit_length()
    return 3 * power // 4 if power >= 4 and n <= 3 * power // 4 else power
