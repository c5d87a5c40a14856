"""A model as training sees it: only outputs of numbers, maps of probabilities (of a ZipMap) as the tensors that they are made of."""

from __future__ import annotations

from collections.abc import Collection

import onnx

from relief_onnx.bodies import keep_only
from relief_onnx.graph import Graph

__all__ = ["reduced", "without_maps"]


def without_maps(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose outputs are tensors where a ZipMap makes maps of them; the model itself where none does."""
    if not any(_makes_maps(node) for node in model.graph.node):
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for node in filter(_makes_maps, result.graph.node):
        for info in result.graph.output:
            if info.name == node.output[0]:
                info.CopyFrom(onnx.ValueInfoProto(name=info.name))
                info.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
        node.op_type, node.domain = "Identity", ""
        del node.attribute[:]
    return result


def reduced(model: onnx.ModelProto, outputs: Collection[str]) -> onnx.ModelProto:
    """A copy with those outputs only and the nodes that they need, so that torch need not run what makes labels of scores."""
    if {info.name for info in model.graph.output} == set(outputs):
        return model
    graph, needed, nodes = Graph(model), set(outputs), set[int]()
    for index in reversed(range(len(graph.nodes))):
        if needed.intersection(graph.nodes[index].output):
            nodes.add(index)
            needed.update(graph.read_by(index))
    result = onnx.ModelProto()
    result.CopyFrom(model)
    keep_only(result.graph.output, lambda info: info.name in outputs)
    for index in sorted(set(range(len(graph.nodes))) - nodes, reverse=True):
        del result.graph.node[index]
    return result


def _makes_maps(node: onnx.NodeProto) -> bool:
    return (node.domain, node.op_type) == ("ai.onnx.ml", "ZipMap")
