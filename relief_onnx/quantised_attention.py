"""com.microsoft QAttention: attention whose packed projection is integers, on activations that are integers too.

Input [batch, tokens, in] and weight [in, 3 * hidden] become floats by a DequantizeLinear each, before the float Attention, which `fused`
lays open. The operator has one width for the heads of queries, keys and values, and no scale of its own for their products. Where a cut
left other widths (of a single head), queries and keys are filled up with zero points to the width of the values, and the weight's scales
and the biases of queries carry the scale; where values are narrower than queries, the float Attention stays.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from relief_onnx.graph import Graph, attributes
from relief_onnx.quantised_parts import Closed, Opened, before, only_such, put
from relief_onnx.quantised_rows import MICROSOFT

__all__ = ["closed", "opened", "refusal"]

# Slots of the weight, its scale and its zero point; the float Attention has only the first of them.
_PARTS = (1, 4, 7)
_SCALE, _MASK, _INPUT_ZERO, _PAST = 3, 5, 6, 8
_PER_COLUMN = 13  # from this opset on DequantizeLinear has scales per column
_LEAST = 11


def _input(node: onnx.NodeProto, slot: int) -> str:
    return node.input[slot] if slot < len(node.input) else ""


def refusal(graph: Graph, index: int) -> str:
    """Why a node is not taken apart; empty where it is."""
    node = graph.nodes[index]
    weight = _input(node, _PARTS[0])
    names = tuple(_input(node, slot) for slot in _PARTS)
    if graph.opset < _LEAST:
        return f"the file's opset is below {_LEAST}"
    given = {item.name for item in graph.model.graph.input} if graph.model.ir_version >= 4 else set()
    if any(name not in graph.initializers or name in given for name in names):
        return "its integers, scales or zero points are not stored"
    if not _input(node, 2):
        return "its bias is missing"
    array, factor, offset = (graph.array(name) for name in names)
    if array.dtype not in (np.int8, np.uint8) or array.ndim != 2 or array.shape[1] % 3:
        return "its weight is no matrix of integers for queries, keys and values"
    if factor.dtype != np.float32 or not (factor > 0).all():
        return "its scales are not positive floats"
    if factor.shape not in ((), (1,), array.shape[1:]) or offset.shape != factor.shape or offset.dtype != array.dtype:
        return "its scales and zero points are neither one nor one for each column"
    if factor.size > 1 and graph.opset < _PER_COLUMN:
        return f"scales for each column need opset {_PER_COLUMN}"
    if not only_such(graph, weight, node.op_type, _PARTS, names):
        return "others read its weight too"
    return ""


def opened(graph: Graph, index: int) -> Opened:
    """What stands for a node."""
    node, key = graph.nodes[index], graph.names[index]
    rounded, floats = f"{key}/rounded", f"{key}/floats"
    numbers = [node.input[0], node.input[_SCALE], *([_input(node, _INPUT_ZERO)] if _input(node, _INPUT_ZERO) else [])]
    axis: dict[str, Any] = {"axis": 1} if graph.array(node.input[_PARTS[1]]).size > 1 else {}
    inputs = [rounded, floats, node.input[2], _input(node, _MASK), _input(node, _PAST)]
    while not inputs[-1]:
        inputs.pop()
    nodes = (
        helper.make_node("DequantizeLinear", numbers, [rounded], name=rounded),
        helper.make_node("DequantizeLinear", [node.input[slot] for slot in _PARTS], [floats], name=floats, **axis),
        helper.make_node("Attention", inputs, node.output, name=key, domain=MICROSOFT),
    )
    nodes[-1].attribute.extend(node.attribute)
    return Opened(key, nodes, {}, frozenset({rounded, floats}))


def closed(graph: Graph, index: int, source: Graph, original: onnx.NodeProto) -> Closed | None:
    """The node of the file for Attention node number `index`; None where its neighbours are others now."""
    node = graph.nodes[index]
    if node.op_type != "Attention" or node.domain != MICROSOFT or _input(node, 5):
        return None
    first, second = (before(graph, name, ("DequantizeLinear",)) for name in node.input[:2])
    if first is None or second is None or first[0].name != f"{node.name}/rounded" or not _input(node, 2):
        return None
    held = [*second[0].input, ""][:3]
    if any(name not in graph.initializers for name in held):
        return None
    names = [first[0].input[0], held[0], node.input[2], first[0].input[1], held[1], _input(node, 3), _input(first[0], 2), held[2]]
    names.append(_input(node, 4))
    tensors: dict[str, TensorProto] = {}
    values = attributes(node)
    if {"qkv_hidden_sizes", "scale"} & set(values):
        # One part per slot of the node of the file: weight, bias, scale, zero point.
        arrays = _evened(graph, [held[0], node.input[2], *held[1:]], values)
        if arrays is None:
            return None
        for slot, array in zip((_PARTS[0], 2, *_PARTS[1:]), arrays, strict=True):
            names[slot] = put(tensors, source, graph, original.input[slot], array, original.input[1], 1)
    while not names[-1] and len(names) > len(original.input):
        names.pop()
    result = onnx.NodeProto.FromString(original.SerializeToString())
    result.input[:] = names
    result.output[:] = node.output
    del result.attribute[:]
    result.attribute.extend(item for item in node.attribute if item.name not in ("qkv_hidden_sizes", "scale"))
    return Closed(index, frozenset({index}), result, tensors)


def _evened(graph: Graph, held: list[str], values: dict[str, Any]) -> list[NDArray[Any]] | None:
    """Weight, bias, scale and zero point of heads that are all as wide as those of the values, whose products have the scale that such
    heads have; None where one of them is computed or queries are wider."""
    if any(name not in graph.initializers for name in held):
        return None
    weight, bias, scale, zero = (graph.array(name) for name in held)
    heads, columns = int(values["num_heads"]), weight.shape[1]
    sizes = [int(size) for size in values.get("qkv_hidden_sizes", [columns // 3] * 3)]
    widths = [size // heads for size in sizes]
    wide = widths[2]
    if max(widths) > wide:
        return None
    factor = float(values.get("scale", 0.0)) * math.sqrt(wide) or math.sqrt(wide / widths[0])
    # For each new column the old one; -1: none.
    places = np.concatenate([
        np.pad(np.arange(size).reshape(heads, -1) + start, ((0, 0), (0, wide - width)), constant_values=-1).reshape(-1)
        for size, width, start in zip(sizes, widths, np.cumsum([0, *sizes[:2]]), strict=True)
    ])  # fmt: skip
    empty = places < 0
    factors = np.where(np.arange(len(places)) < heads * wide, factor, 1.0).astype(np.float32)
    spread_scale, spread_zero = (np.broadcast_to(item.reshape(-1), (columns,))[places] for item in (scale, zero))
    integers = np.where(empty, spread_zero, weight[:, places]).astype(weight.dtype)
    biases = np.where(empty, 0, bias[places]).astype(bias.dtype) * factors.astype(bias.dtype)
    if factor == 1.0 and scale.size == 1:
        return [integers, biases, scale, zero]
    return [integers, biases, spread_scale * factors, spread_zero]
