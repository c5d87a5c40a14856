"""Names in bodies of control flow that hide a tensor of the graphs around: onnxruntime runs such files, but whoever renames a tensor, or
puts another in its place, would reach what only bears its name.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from relief_onnx.bodies import Names, key_of
from relief_onnx.lifting import rename_in
from relief_onnx.nodes import subgraphs

__all__ = ["unshadowed"]


def unshadowed(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which what a body is given, holds or makes has no name that it could read from outside; the model where none has."""
    if not any(_hiding(model.graph, set())):
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    names = Names(result)
    for body, hiding, node in _hiding(result.graph, set()):
        rename_in(body, {name: names.free(f"{node.name or key_of(node)}/{name}") for name in sorted(hiding)})
    return result


def _hiding(graph: onnx.GraphProto, scope: set[str]) -> Iterator[tuple[onnx.GraphProto, set[str], onnx.NodeProto]]:
    """Bodies, those within others first, with their own names that hide one of outside, and the node."""
    seen = scope | {item.name for field in (graph.input, graph.initializer) for item in field}
    for node in graph.node:
        for body in subgraphs(node):
            yield from _hiding(body, seen)
            own = {item.name for field in (body.input, body.initializer) for item in field}
            own |= {name for item in body.node for name in item.output if name}
            if own & seen:
                yield body, own & seen, node
        seen |= set(node.output) - {""}
