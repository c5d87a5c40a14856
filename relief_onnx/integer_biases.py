"""Biases that a file rounds to integers when it runs, as onnxruntime's first dynamic quantisers wrote them: a pass of `lowering`.

A convolution of integers adds Floor(bias / scales) before its sums become floats. What rounds is less than one step of these sums, so the
bias is added as the float that it is behind them, as later quantisers do; that form stays in the result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import helper

from relief_onnx.bodies import keep_only, replace_all
from relief_onnx.edits import set_initializer, unused
from relief_onnx.graph import Graph
from relief_onnx.nodes import captured, subgraphs

__all__ = ["float_biases"]

_INTEGERS = frozenset({"ConvInteger", "MatMulInteger"})
# From the sum of integers back to the bias; a Reshape stands in front of them for convolutions.
_ROUNDED = ("Cast", "Floor", "Div")


def float_biases(model: onnx.ModelProto) -> tuple[onnx.ModelProto, Callable[[onnx.ModelProto, Any], onnx.ModelProto]] | None:
    """The model with such biases as floats, which it stays; None where there are none."""
    if not any(node.op_type in _INTEGERS for node in model.graph.node):
        return None
    graph = Graph(model)
    found = {index: bias for index, node in enumerate(graph.nodes) if node.op_type == "Add" and (bias := _bias(graph, index)) is not None}
    if not found:
        return None
    result = onnx.ModelProto()
    result.CopyFrom(model)
    behind: dict[int, onnx.NodeProto] = {}
    for index, (sums, name, value) in found.items():
        cast, product = _floats(graph, graph.nodes[index].output[0]) or (index, index)
        output = result.graph.node[product].output[0]
        held, inner = unused(result, f"{name}/wide"), unused(result, f"{output}/product")
        set_initializer(result, held, value)
        result.graph.node[cast].input[0], result.graph.node[product].output[0] = sums, inner
        behind[product] = helper.make_node("Add", [inner, held], [output], name=unused(result, f"{output}/bias"))
    nodes = [new for index, node in enumerate(result.graph.node) for new in (node, *([behind[index]] if index in behind else []))]
    replace_all(result.graph.node, nodes)
    _sweep(result, {name for index in found for name in _before(graph, index)})
    return result, lambda edited, kept: edited


def _before(graph: Graph, index: int) -> set[str]:
    """Tensors that lead to a sum, as far as bias and scales."""
    found, open_ = set(graph.nodes[index].output), [graph.nodes[index]]
    while open_:
        for name in open_.pop().input:
            found.add(name)
            if _made(graph, name) in {"Reshape", "Mul", *_ROUNDED}:
                open_.append(graph.nodes[graph.producer[name]])
    return found


def _sweep(model: onnx.ModelProto, names: set[str]) -> None:
    """Nodes and stored tensors among them that nobody reads any more."""
    before = -1
    while len(model.graph.node) != before:
        before = len(model.graph.node)
        read = {item.name for item in model.graph.output}
        read |= {name for node in model.graph.node for name in (*node.input, *(n for body in subgraphs(node) for n in captured(body)))}
        keep_only(model.graph.node, partial(_stays, read, names))
    gone = names.intersection(item.name for item in model.graph.initializer) - read
    for field in (model.graph.initializer, model.graph.input, model.graph.value_info):  # old files list what is stored among the inputs
        keep_only(field, lambda item: item.name not in gone)


def _stays(read: set[str], names: set[str], node: onnx.NodeProto) -> bool:
    return not names.issuperset(node.output) or bool(read & set(node.output))


def _made(graph: Graph, name: str) -> str:
    return graph.nodes[graph.producer[name]].op_type if name in graph.producer else ""


def _bias(graph: Graph, index: int) -> tuple[str, str, NDArray[Any]] | None:
    """Of an Add of integers: the sums, the bias that it adds, and its value in their rank without the batch; None where it is no such."""
    node = graph.nodes[index]
    sums = [name for name in node.input if _made(graph, name) in _INTEGERS]
    if len(sums) != 1 or len(graph.uses[sums[0]]) != 1 or _floats(graph, node.output[0]) is None:
        return None
    (name,) = (item for item in node.input if item != sums[0])
    integers = graph.nodes[graph.producer[sums[0]]]
    rank = 1
    if _made(graph, name) == "Reshape":
        weight = graph.initializers.get(integers.input[1])
        rank = 1 if weight is None or integers.op_type == "MatMulInteger" else len(weight.dims) - 1
        name = graph.nodes[graph.producer[name]].input[0]
    for operator in _ROUNDED:
        if _made(graph, name) != operator:
            return None
        name = graph.nodes[graph.producer[name]].input[0]
    value = graph.constant(name)
    if value is None or value.dtype.kind != "f" or value.ndim != 1 or (rank == 1) != (integers.op_type == "MatMulInteger"):
        return None
    return sums[0], name, value.reshape(-1, *(1,) * (rank - 1))


def _floats(graph: Graph, name: str) -> tuple[int, int] | None:
    """The Cast and the Mul, one behind the other, that make floats of integers for everyone who reads them."""
    places = []
    for operator in ("Cast", "Mul"):
        uses = graph.uses.get(name, [])
        if len(uses) != 1 or uses[0].slot < 0 or graph.is_output(name) or graph.nodes[uses[0].node].op_type != operator:
            return None
        places.append(uses[0].node)
        name = graph.nodes[uses[0].node].output[0]
    return places[0], places[1]
