"""Weights that ConstantOfShape nodes make: as initializers while we work, and nodes again where every number stayed.

Files of topologies (onnx's own light models) store no weights but how to fill them. A weight that lost something is stored as such.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from relief_onnx.aside import array_of
from relief_onnx.bodies import replace_all
from relief_onnx.edits import set_initializer, unused
from relief_onnx.graph import FLOATS, Graph, attributes
from relief_onnx.layers import LAYER_OPERATORS
from relief_onnx.nodes import STANDARD, captured, subgraphs
from relief_onnx.sources import readers

if TYPE_CHECKING:
    from relief_onnx.datatypes import Kept
    from relief_onnx.lowering import Restore

__all__ = ["lay_open_fills"]


@dataclass(frozen=True)
class _Fill:
    """A node that fills a tensor, what it reads, and what every number of the tensor is."""

    node: onnx.NodeProto
    shape: tuple[int, ...]
    value: Any


def lay_open_fills(model: onnx.ModelProto) -> tuple[onnx.ModelProto, Restore] | None:
    """A copy in which float tensors that are filled with one number, of a size that is stored, are initializers, where a layer reads one.

    None where there is nothing to do.
    """
    graph = Graph(model)
    fills = {node.output[0]: fill for node in graph.nodes if (fill := _fill(graph, node)) is not None}
    if not any(_is_weight(graph, name) for name in fills):
        return None
    result = onnx.ModelProto()
    result.CopyFrom(model)
    replace_all(result.graph.node, [node for node in result.graph.node if not (node.output and node.output[0] in fills)])
    for name, fill in fills.items():
        set_initializer(result, name, np.full(fill.shape, fill.value))
    _drop_unread(result, {fill.node.input[0] for fill in fills.values()})

    def restore(cut: onnx.ModelProto, kept: Kept) -> onnx.ModelProto:
        return _filled_again(cut, fills, {name: item for name, item in graph.initializers.items() if item.data_type not in FLOATS})

    return result, restore


def _fill(graph: Graph, node: onnx.NodeProto) -> _Fill | None:
    if node.op_type != "ConstantOfShape" or node.domain not in STANDARD or graph.is_output(node.output[0]):
        return None
    shape, stored = graph.constant(node.input[0]), attributes(node).get("value")
    value = np.float32(0) if stored is None else array_of(stored).reshape(-1)[0]
    if shape is None or shape.size == 0 or (stored is not None and stored.data_type not in FLOATS):
        return None
    return _Fill(node, tuple(int(size) for size in shape), value)


def _is_weight(graph: Graph, name: str) -> bool:
    used = ((graph.nodes[use.node], use.slot) for use, _ in readers(graph, name))
    return any(slot in LAYER_OPERATORS[node.op_type].slots for node, slot in used if node.op_type in LAYER_OPERATORS)


def _filled_again(model: onnx.ModelProto, fills: Mapping[str, _Fill], sizes: Mapping[str, onnx.TensorProto]) -> onnx.ModelProto:
    """Whatever is still one number everywhere becomes a node again, of the size that it has now; the others stay initializers."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    nodes = []
    for item in [item for item in result.graph.initializer if item.name in fills]:
        fill, array = fills[item.name], array_of(item)
        if array.size == 0 or array.dtype != fill.value.dtype or not (array == fill.value).all():
            continue
        node = onnx.NodeProto()
        node.CopyFrom(fill.node)
        if node.input[0] not in {other.name for other in result.graph.initializer} or array.shape != fill.shape:
            same = array.shape == fill.shape and node.input[0] in sizes
            node.input[0] = node.input[0] if same else unused(result, f"{item.name}/shape")
            set_initializer(result, node.input[0], np.asarray(array.shape, np.int64))
        nodes.append(node)
    names = {node.output[0] for node in nodes}
    for part in (result.graph.initializer, result.graph.input):
        for entry in [entry for entry in part if entry.name in names]:
            part.remove(entry)
    replace_all(result.graph.node, [*nodes, *result.graph.node])
    return result


def _drop_unread(model: onnx.ModelProto, names: set[str]) -> None:
    """Sizes that nothing reads any more, from the initializers and the inputs that old files list them as."""
    read = {name for node in model.graph.node for name in node.input} | {item.name for item in model.graph.output}
    read |= {name for node in model.graph.node for body in subgraphs(node) for name in captured(body)}
    for part in (model.graph.initializer, model.graph.input):
        for entry in [entry for entry in part if entry.name in names - read]:
            part.remove(entry)
