"""Packing weights that live inside bodies: as decode nodes in the main graph, which bodies read and onnxruntime folds when it loads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator

import onnx

from relief_onnx.nodes import STANDARD, captured, subgraphs
from relief_onnx.pack import PackedTensor, pack

__all__ = ["pack_with_inner"]


def pack_with_inner(
    model: onnx.ModelProto, weights: Collection[str], inner: Collection[str]
) -> tuple[onnx.ModelProto, tuple[PackedTensor, ...]]:  # fmt: skip
    """`pack`, with weights of the main graph and, of the names `inner`, those that bodies hold (initializers or Constant nodes) or read.

    What is smaller dense stays where it is.
    """
    read = {name for node in model.graph.node for body in subgraphs(node) for name in captured(body)}
    every = {*weights, *(item.name for item in model.graph.initializer if item.name in read and item.name in inner)}
    held = Counter(_held(model.graph))
    found = {name for name in inner if held[name] == 1 and name not in every}
    packed, rows = pack(_outward(model, found), sorted(every | found))
    dense = {row.name for row in rows if row.storage == "dense"} & found
    if dense:
        packed, _ = pack(_outward(model, found - dense), sorted(every | found - dense))
    return packed, rows


def _held(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        for body in subgraphs(node):
            yield from (item.name for item in body.initializer)
            yield from (child.output[0] for child in body.node if _tensor_of(child) is not None)
            yield from _held(body)


def _outward(model: onnx.ModelProto, names: Collection[str]) -> onnx.ModelProto:
    """The model with tensors of bodies as initializers of the main graph."""
    if not names:
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for node in result.graph.node:
        for body in subgraphs(node):
            _take(result.graph, body, set(names))
    return result


def _take(main: onnx.GraphProto, body: onnx.GraphProto, names: set[str]) -> None:
    for number in reversed(range(len(body.initializer))):
        if body.initializer[number].name in names:
            main.initializer.add().CopyFrom(body.initializer[number])
            del body.initializer[number]
    for number in reversed(range(len(body.node))):
        tensor = _tensor_of(body.node[number])
        if tensor is not None and body.node[number].output[0] in names:
            main.initializer.add().CopyFrom(tensor)
            main.initializer[-1].name = body.node[number].output[0]
            del body.node[number]
    for number in reversed(range(len(body.value_info))):
        if body.value_info[number].name in names:
            del body.value_info[number]
    for node in body.node:
        for inner in subgraphs(node):
            _take(main, inner, names)


def _tensor_of(node: onnx.NodeProto) -> onnx.TensorProto | None:
    if node.op_type != "Constant" or node.domain not in STANDARD:
        return None
    return next((item.t for item in node.attribute if item.name == "value"), None)
