"""Weights as int8 in the file and floats when the model runs: a Cast and a Mul, which onnxruntime folds when it loads the model.

DequantizeLinear would do the same arithmetic, but onnxruntime does not fold it. Symmetric: the zero point is 0, so zeros stay zeros.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from relief_onnx.aside import array_of, tensor_of, wire_size
from relief_onnx.bodies import BODIES, replace_all
from relief_onnx.graph import Graph
from relief_onnx.layers import Plan
from relief_onnx.nodes import subgraphs

__all__ = ["Stored", "kept_axes", "quantised", "store"]

_TYPES = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE})
_RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
# Readers of weights that pruning skips but that 8 bits serve; any other table (positions, masks, windows) is kept exact.
_READERS = _RECURRENT | {"Gather", "MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum"}
_LARGEST = 127


@dataclass(frozen=True)
class Stored:
    """One weight as int8: the initializer that holds `values`, in the weight's own layout, and whether it has a scale per channel.

    `status` is "int8" where the layer computes with 8 bits, "int8 weights" where the weight is a float again when the model is loaded.
    """

    name: str
    values: NDArray[np.int8]
    per_channel: bool
    status: str = "int8 weights"


def kept_axes(graph: Graph, plan: Plan, per_channel: bool) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """The axes along which each weight that can be stored as int8 has scales of its own (none: one scale), and why others cannot."""
    axes: dict[str, tuple[int, ...]] = {}
    reasons: dict[str, str] = {}
    for weight, layers in plan.by_weight().items():
        # A neuron's weights share a scale; where a layout mixes neurons there is one for all.
        axis = layers[0].view.source_axis(0)
        axes[weight] = (0, 1) if layers[0].recurrent is not None else () if axis is None else (axis,)
    for row in plan.unranked:
        readers = _readers_inside(graph, row.weight) if row.op in BODIES else {row.op}
        if row.weight not in graph.initializers:
            reasons[row.weight] = f"it lives in a body of {row.op}, where its name is not its alone" if row.op in BODIES else row.reason
        elif not readers or readers - _READERS:
            reasons[row.weight] = f"a table that {row.op} reads; kept exact"
        else:
            axes[row.weight] = (0, 1) if readers & _RECURRENT else (len(row.shape) - 1,) if readers & {"MatMul", "Gemm"} else (0,)
    listed = {item.name for item in graph.inputs}
    for weight in list(axes):
        reason = _refusal(graph, weight) or ("it is an input of the model" if weight in listed else "")
        if reason:
            del axes[weight]
            reasons[weight] = reason
    return {weight: found if per_channel else () for weight, found in axes.items()}, reasons


def _readers_inside(graph: Graph, weight: str) -> set[str]:
    """Operators that read a tensor of the main graph within bodies."""
    open_, found = [body for node in graph.nodes for body in subgraphs(node)], set()
    while open_:
        body = open_.pop()
        found |= {node.op_type for node in body.node if weight in node.input}
        open_ += [inner for node in body.node for inner in subgraphs(node)]
    return found


def _refusal(graph: Graph, weight: str) -> str:
    item = graph.initializers[weight]
    if item.data_type not in _TYPES:
        return f"its values are of type {TensorProto.DataType.Name(item.data_type)}"
    if graph.is_output(weight):
        return "the weight itself is an output of the model"
    return "" if np.isfinite(graph.array(weight)).all() else "it holds values that are not finite"


def quantised(values: NDArray[Any], axes: Collection[int]) -> tuple[NDArray[np.int8], NDArray[Any]]:
    """values as int8 in -127 to 127, and the scales (of the type of `values`, same rank) that they are multiplied with.

    Each scale is the largest magnitude over all axes but `axes`, over 127; where all are 0 it is 1.
    """
    rest = tuple(axis for axis in range(values.ndim) if axis not in axes)
    largest = np.abs(values.astype(np.float64)).max(axis=rest, keepdims=True, initial=0.0)
    scale = (np.where(largest > 0, largest, _LARGEST) / _LARGEST).astype(values.dtype)
    scale = np.maximum(scale, np.finfo(values.dtype).tiny)
    whole = np.rint(values.astype(np.float64) / scale.astype(np.float64))
    return np.clip(whole, -_LARGEST, _LARGEST).astype(np.int8), scale


def store(model: onnx.ModelProto, axes: Mapping[str, tuple[int, ...]]) -> tuple[onnx.ModelProto, dict[str, Stored], dict[str, str]]:
    """Store the weights in `axes` as int8 wherever that takes fewer bytes; names of tensors stay, so no reader changes.

    Returns the new model, what was stored by weight, and why others were not.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    taken = {name for node in model.graph.node for name in (*node.input, *node.output)} | {item.name for item in model.graph.initializer}
    found: dict[str, Stored] = {}
    reasons: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    tensors: list[TensorProto] = []
    for item in model.graph.initializer:
        if item.name not in axes:
            tensors.append(item)
            continue
        values = array_of(item)
        small, scale = quantised(values, axes[item.name])
        prefix = f"q{len(found)}"
        while any(name.startswith(f"{prefix}/") for name in taken):
            prefix += "_"
        pieces = [tensor_of(small, f"{prefix}/w", item), numpy_helper.from_array(scale, f"{prefix}/s")]
        made = [
            helper.make_node("Cast", [f"{prefix}/w"], [f"{prefix}/f"], to=item.data_type),
            helper.make_node("Mul", [f"{prefix}/f", f"{prefix}/s"], [item.name]),
        ]
        size = sum(wire_size(piece) for piece in pieces) + sum(wire_size(node) for node in made)
        if size >= wire_size(item):
            reasons[item.name] = f"as int8 it would take {size} bytes, as it is {wire_size(item)}"
            tensors.append(item)
            continue
        if item.doc_string:
            pieces[0].doc_string = item.doc_string
        found[item.name] = Stored(pieces[0].name, small, scale.size > 1)
        tensors += pieces
        nodes += made
    graph = result.graph
    replace_all(graph.initializer, tensors)
    replace_all(graph.node, [*nodes, *model.graph.node])
    if found:
        # Before IR version 4 every initializer is listed as an input; from 4 on such a one could be replaced, and would not be folded.
        stored = {item.name for item in model.graph.initializer} if model.ir_version < 4 else set(found)
        result.ir_version = max(model.ir_version, 4)
        replace_all(graph.input, [value for value in model.graph.input if value.name not in stored])
    return result, found, reasons
