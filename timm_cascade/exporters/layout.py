"""The inner order of stage files: inputs, body, head, outputs, answers, so that files can be joined as bytes.

An exit that is closed then costs nothing: `runner.py` joins the stages around it into one graph, without the head, and
onnxruntime optimises across them. Each file stays an ONNX file of its own, for any runtime.
"""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

from .manifest import Manifest, StageEntry
from .stage_files import common_opsets

__all__ = ['lay_out']

GRAPH = b'\x3a'  # tag of ModelProto.graph


def lay_out(manifest: Manifest, folder: Path) -> None:
    """Rewrites the stage files of a folder in that order, and records where their parts begin.

    Names of one stage's inner values get its prefix, and all files import the same operators, so that joined parts do
    not collide.

    Args:
        manifest: The folder's; `cuts` of its stages are set, sizes and hashes are not.
        folder: Holds the stage files.
    """
    import onnx
    from onnx.inliner import inline_local_functions

    models = [inline_local_functions(onnx.load(str(folder / entry.file))) for entry in manifest.stages]
    opsets = common_opsets(models)
    for number, (model, entry) in enumerate(zip(models, manifest.stages, strict=True)):
        del model.opset_import[:]
        model.opset_import.extend(opsets)
        _rename(model.graph, f'stage_{number}/', {v.name for v in (*model.graph.input, *model.graph.output)})
        data, entry.cuts = _in_order(model, entry)
        (folder / entry.file).write_bytes(data)


def _rename(graph: Any, prefix: str, kept: set[str]) -> None:
    """Gives all names of a graph and of those within it a prefix, unless they have it."""

    def renamed(name: str) -> str:
        return name if not name or name in kept or name.startswith(prefix) else prefix + name

    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = renamed(value.name)
    for node in graph.node:
        node.name = renamed(node.name)
        node.input[:] = [renamed(name) for name in node.input]
        node.output[:] = [renamed(name) for name in node.output]
        for inner in _inner(node):
            _rename(inner, prefix, kept)


def _inner(node: Any) -> list[Any]:
    return [graph for a in node.attribute for graph in ([a.g] if a.HasField('g') else a.graphs)]


def _reads(node: Any) -> set[str]:
    return {*node.input, *(name for graph in _inner(node) for each in graph.node for name in _reads(each))}


def _in_order(model: Any, entry: StageEntry) -> tuple[bytes, list[int]]:
    """The file, and where the graph's tag, each input, body, head, each output, and the answers begin in it."""
    import onnx

    graph, needed = model.graph, set(entry.outputs)
    in_body = []
    for node in reversed(graph.node):  # they stand in the order of their execution
        in_body.append(bool(needed & set(node.output)))
        if in_body[-1]:
            needed |= _reads(node)
    parts = [onnx.GraphProto(name='stage', input=[value]) for value in graph.input]
    for body in (True, False):
        nodes = [n for n, b in zip(graph.node, reversed(in_body), strict=True) if b == body]
        weights = [w for w in graph.initializer if (w.name in needed) == body]
        parts.append(onnx.GraphProto(node=nodes, initializer=weights))
    parts += [onnx.GraphProto(output=[value]) for value in graph.output[:-2]]
    parts.append(onnx.GraphProto(output=graph.output[-2:]))
    contents = [part.SerializeToString() for part in parts]
    model.ClearField('graph')
    pieces = [model.SerializeToString(), GRAPH + _varint(sum(map(len, contents))), *contents]
    return b''.join(pieces), list(accumulate(map(len, pieces)))[:-1]


def _varint(number: int) -> bytes:
    """As protobuf writes lengths: seven bits per byte, the lowest first, the top bit set on all but the last."""
    return (bytes([number & 127 | 128]) + _varint(number >> 7)) if number > 127 else bytes([number])
