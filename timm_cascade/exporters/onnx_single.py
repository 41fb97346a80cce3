"""The stage files as one ONNX model whose later stages stand in the branches of `If` nodes.

Any ONNX runtime then skips what it need not compute, without a runner. Inputs are `images` and `thresholds` (M,)
float32; outputs are `logits` (N, C), `exit` (N,) int64 and `confidence` (N,).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ExportError
from .manifest import Manifest
from .stage_files import MAX_BYTES, common_opsets

__all__ = ['SINGLE', 'SINGLE_BATCH', 'write_single']

SINGLE, SINGLE_BATCH = 'cascade.onnx', 'cascade_batch.onnx'
ANSWERS = ('logits', 'exit', 'confidence')


def write_single(manifest: Manifest, folder: Path, path: Path, batch: bool = False) -> None:
    """Writes one file from the stage files of a folder.

    Args:
        manifest: The folder's; its active thresholds become the default.
        folder: Holds the stage files.
        path: The file.
        batch: Takes any number of images: those that remain are gathered for the next stage, and all answers put back
            in input order. Otherwise for one image, which then costs no gathering.

    Raises:
        ExportError: Stages with control flow of their own, or more than one file can hold.
    """
    import onnx

    size = sum(stage.bytes for stage in manifest.stages)
    if size > MAX_BYTES:
        raise ExportError(f'the stages have {size} bytes; one ONNX file holds at most {MAX_BYTES}.')
    builder = _Builder(manifest, folder, batch)
    nodes, weights = builder.stage(0, {'images': 'images'}, list(ANSWERS))
    limits = [f'exit_{k}/threshold' for k in range(len(manifest.thresholds))]
    nodes.insert(0, onnx.helper.make_node('Split', ['thresholds', 'ones'], limits))
    samples: Any = 'batch' if batch else 1
    thresholds = np.array([math.inf if t is None else t for t in manifest.thresholds], np.float32)
    weights.append(onnx.numpy_helper.from_array(thresholds, 'thresholds'))
    helper, types = onnx.helper, onnx.TensorProto
    graph = helper.make_graph(
        nodes,
        'cascade',
        [
            helper.make_tensor_value_info('images', types.FLOAT, [samples, *manifest.preprocessing.input_size]),
            helper.make_tensor_value_info('thresholds', types.FLOAT, [len(thresholds)]),
        ],
        [
            helper.make_tensor_value_info('logits', types.FLOAT, [samples, manifest.num_classes]),
            helper.make_tensor_value_info('exit', types.INT64, [samples]),
            helper.make_tensor_value_info('confidence', types.FLOAT, [samples]),
        ],
        initializer=[*builder.constants, *weights],
    )
    model = helper.make_model(
        graph, opset_imports=builder.opsets, ir_version=builder.ir_version, producer_name='timm-cascade'
    )
    about = manifest.model_dump(include={'architecture', 'precision', 'label_names', 'preprocessing', 'thresholds'})
    helper.set_model_props(model, {'timm_cascade': json.dumps(about)})
    onnx.save(model, str(path))


class _Builder:
    """Puts stages into each other, the first one outermost; their names get a prefix such as `stage_1/`."""

    def __init__(self, manifest: Manifest, folder: Path, batch: bool) -> None:
        import onnx

        self.helper, self.types = onnx.helper, onnx.TensorProto
        self.manifest, self.batch = manifest, batch
        self.models = [onnx.load(str(folder / stage.file)) for stage in manifest.stages]
        if any(len(model.functions) for model in self.models):
            raise ExportError('the stages hold functions, which cannot be put into one file.')
        self.opsets = common_opsets(self.models)
        self.ir_version = max(model.ir_version for model in self.models)
        self.rows = sorted({t.rows for stage in manifest.stages for t in stage.live if t.rows > 1}) if batch else []
        values: dict[str, Any] = dict(ones=[1] * (len(self.models) - 1))
        values |= dict(first=[0], last=[1], flat=[-1], nothing=0) if batch else {}
        for rows in self.rows:
            values |= {f'rows_{rows}': rows, f'offsets_{rows}': np.arange(rows)[None]}
        self.constants = [onnx.numpy_helper.from_array(np.asarray(v, np.int64), k) for k, v in values.items()]

    def stage(self, k: int, given: dict[str, str], answers: list[str]) -> tuple[list[Any], list[Any]]:
        """Nodes and weights of stage k and, inside them, of all later ones.

        Args:
            k: The stage.
            given: Name of each live tensor in the graph that the stage stands in.
            answers: Names for logits, exit and confidence.
        """
        node = self.helper.make_node
        final = k == len(self.models) - 1
        own = answers if final else [f'stage_{k}/answer/{name}' for name in ANSWERS]
        nodes, weights, made = self._body(k, given, own)
        nodes.append(node('Shape', [own[2]], [f'stage_{k}/samples']))
        number = self.helper.make_tensor('value', self.types.INT64, [1], [k])
        nodes.append(node('ConstantOfShape', [f'stage_{k}/samples'], [own[1]], value=number))
        if final:
            return nodes, weights
        available = {**given, **made}
        live = [(t.name, t.rows) for t in self.manifest.stages[k].live]
        leaves, done = f'exit_{k}/leaves', f'exit_{k}/all_leave'
        nodes.append(node('GreaterOrEqual', [own[2], f'exit_{k}/threshold'], [leaves]))  # of a NaN: no
        later = [f'stage_{k + 1}/{name}' for name in ANSWERS]
        if self.batch:
            select, given = self._select(k, leaves, done, {name: available[name] for name, _ in live}, dict(live))
            nodes += select[:5]
            inner, inner_weights = self.stage(k + 1, given, later)
            merged = [f'exit_{k}/merged/{name}' for name in ANSWERS]
            where = f'exit_{k}/where'
            inner = [*select[5:], *inner, node('Unsqueeze', [f'exit_{k}/keep', 'last'], [where])]
            inner += [
                node('ScatterND', [mine, where, theirs], [name])
                for mine, theirs, name in zip(own, later, merged, strict=True)
            ]
            later = merged
        else:
            done = leaves  # a condition of one element needs no scalar
            inner, inner_weights = self.stage(k + 1, {name: available[name] for name, _ in live}, later)
        taken = [f'exit_{k}/taken/{name}' for name in ANSWERS]
        yes = self.helper.make_graph(
            [node('Identity', [a], [b]) for a, b in zip(own, taken, strict=True)], f'exit_{k}', [], self._infos(taken)
        )
        no = self.helper.make_graph(inner, f'stage_{k + 1}', [], self._infos(later), initializer=inner_weights)
        nodes.append(node('If', [done], answers, name=f'exit_{k}', then_branch=yes, else_branch=no))
        return nodes, weights

    def _select(
        self, k: int, leaves: str, done: str, live: dict[str, str], rows: dict[str, int]
    ) -> tuple[list[Any], dict[str, str]]:
        """Five nodes that find which samples remain, then those that gather them; and the gathered tensors' names."""
        node, keep = self.helper.make_node, f'exit_{k}/keep'
        nodes = [
            node('Not', [leaves], [f'exit_{k}/stays']),
            node('NonZero', [f'exit_{k}/stays'], [f'exit_{k}/indices']),
            node('Squeeze', [f'exit_{k}/indices', 'first'], [keep]),
            node('Size', [keep], [f'exit_{k}/count']),
            node('Equal', [f'exit_{k}/count', 'nothing'], [done]),
        ]
        for r in sorted({r for r in rows.values() if r > 1}):
            at = f'exit_{k}/rows_{r}'
            nodes += [
                node('Unsqueeze', [keep, 'last'], [f'{at}/column']),
                node('Mul', [f'{at}/column', f'rows_{r}'], [f'{at}/starts']),
                node('Add', [f'{at}/starts', f'offsets_{r}'], [f'{at}/all']),
                node('Reshape', [f'{at}/all', 'flat'], [at]),
            ]
        gathered = {}
        for name, source in live.items():
            if not rows[name]:
                gathered[name] = source
                continue
            gathered[name] = f'exit_{k}/gathered/{name}'
            index = keep if rows[name] == 1 else f'exit_{k}/rows_{rows[name]}'
            nodes.append(node('Gather', [source, index], [gathered[name]], axis=0))
        return nodes, gathered

    def _infos(self, names: list[str]) -> list[Any]:
        kinds = [self.types.FLOAT, self.types.INT64, self.types.FLOAT]
        return [self.helper.make_tensor_value_info(n, t, None) for n, t in zip(names, kinds, strict=True)]

    def _body(self, k: int, given: dict[str, str], answers: list[str]) -> tuple[list[Any], list[Any], dict[str, str]]:
        """Nodes and weights of one stage file, renamed; and the names of the tensors that it makes."""
        entry, graph = self.manifest.stages[k], self.models[k].graph
        names = {value.name: given[name] for value, name in zip(graph.input, entry.inputs, strict=True)}
        made = {name: f'stage_{k}/{name}' for name in entry.outputs}
        targets = [*made.values(), answers[0], answers[2]]
        names |= {value.name: name for value, name in zip(graph.output, targets, strict=True)}

        def renamed(name: str) -> str:
            return names.setdefault(name, f'stage_{k}/inner/{name}') if name else ''

        for weight in graph.initializer:
            weight.name = renamed(weight.name)
        for node in graph.node:
            if any(a.HasField('g') or len(a.graphs) for a in node.attribute):
                raise ExportError(f'stage {k} has control flow of its own ({node.op_type}): no single file.')
            node.input[:] = [renamed(name) for name in node.input]
            node.output[:] = [renamed(name) for name in node.output]
            node.name = f'stage_{k}/{node.name}'
        return list(graph.node), list(graph.initializer), made
