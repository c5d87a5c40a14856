"""BatchNormalization that follows a convolution, moved into its weight and bias: int8 kernels need the two as one."""

from __future__ import annotations

from itertools import count

import numpy as np
import onnx
from onnx import numpy_helper

from relief_onnx.aside import tensor_of
from relief_onnx.graph import Graph, attributes
from relief_onnx.nodes import STANDARD

__all__ = ["fold_norms"]


def fold_norms(model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """A model without the BatchNormalization nodes that alone read a convolution, and the names of those; zeros stay zeros.

    The same function but for rounding. The model itself where there is nothing to fold.
    """
    graph = Graph(model)
    pairs = [(i, conv) for i in range(len(graph.nodes)) if (conv := _convolution_before(graph, i)) is not None]
    if not pairs:
        return model, ()
    folded = onnx.ModelProto()
    folded.CopyFrom(model)
    tensors = {item.name: item for item in folded.graph.initializer}
    taken = {*tensors, *graph.producer, *graph.uses, *(item.name for item in graph.inputs)}
    for number, conv in pairs:
        norm, node = graph.nodes[number], folded.graph.node[conv]
        gamma, beta, mean, variance = (graph.array(name).astype(np.float64) for name in norm.input[1:5])
        factor = gamma / np.sqrt(variance + attributes(norm).get("epsilon", 1e-5))
        weight = graph.array(node.input[1])
        axis = 1 if node.op_type == "ConvTranspose" else 0
        wide = factor.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
        has_bias = len(node.input) > 2 and bool(node.input[2])
        bias = graph.array(node.input[2]).astype(np.float64) if has_bias else np.zeros_like(mean)
        tensors[node.input[1]].CopyFrom(tensor_of((weight * wide).astype(weight.dtype), node.input[1], tensors[node.input[1]]))
        # The norm's own shift becomes the bias: it has the right size. Where something else reads it too there is a new one.
        shift = norm.input[2]
        if len(graph.uses[shift]) > 1 or graph.is_output(shift):
            shift = next(name for name in (f"{shift}/{i}" for i in count(1)) if name not in taken)
            taken.add(shift)
            tensors[shift] = folded.graph.initializer.add()
        tensors[shift].CopyFrom(numpy_helper.from_array((beta + (bias - mean) * factor).astype(weight.dtype), shift))
        inputs = [*node.input[:2], shift]
        del node.input[:]
        node.input.extend(inputs)
        node.output[0] = norm.output[0]
    _drop(folded, [number for number, _ in pairs])
    return folded, tuple(graph.names[number] for number, _ in pairs)


def _convolution_before(graph: Graph, index: int) -> int | None:
    """The number of the convolution that this node normalises, where the two can be one."""
    norm = graph.nodes[index]
    if norm.op_type != "BatchNormalization" or norm.domain not in STANDARD or attributes(norm).get("training_mode", 0):
        return None
    conv = graph.producer.get(norm.input[0])
    if conv is None or any(norm.output[1:]) or len(graph.uses[norm.input[0]]) > 1 or graph.is_output(norm.input[0]):
        return None
    node = graph.nodes[conv]
    is_plain = node.op_type == "Conv" or (node.op_type == "ConvTranspose" and attributes(node).get("group", 1) == 1)
    if not is_plain or node.domain not in STANDARD:
        return None
    has_bias = len(node.input) > 2 and bool(node.input[2])
    constants = (node.input[1], *((node.input[2],) if has_bias else ()), *norm.input[1:5])
    # An initializer that is an input too may be replaced by the caller, and one that others read must stay as it is.
    fixed = {item.name for item in graph.model.graph.input}
    if any(name not in graph.initializers or name in fixed for name in constants):
        return None
    own = len(graph.uses[node.input[1]]) == 1 and not graph.is_output(node.input[1])
    same_type = len({graph.initializers[name].data_type for name in constants}) == 1
    return conv if own and same_type else None


def _drop(model: onnx.ModelProto, numbers: list[int]) -> None:
    """Remove these nodes, and initializers that only they read."""
    graph = model.graph
    gone = {name for number in numbers for name in graph.node[number].input}
    for number in sorted(numbers, reverse=True):
        del graph.node[number]
    used = Graph(model).uses
    outputs = {item.name for item in graph.output}
    for position in range(len(graph.initializer) - 1, -1, -1):
        name = graph.initializer[position].name
        if name in gone and name not in used and name not in outputs:
            del graph.initializer[position]
    values = [item for item in graph.value_info if item.name not in gone]
    del graph.value_info[:]
    graph.value_info.extend(values)
