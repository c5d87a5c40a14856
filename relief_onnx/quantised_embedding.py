"""com.microsoft QEmbedLayerNormalization: embedding tables, scale and shift of a norm as integers with one scale each.

They become floats by a DequantizeLinear each, before the float EmbedLayerNormalization, which `fused` lays open.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from relief_onnx.graph import Graph
from relief_onnx.quantised_parts import Closed, Opened, before, only_such
from relief_onnx.quantised_rows import MICROSOFT

__all__ = ["closed", "opened", "refusal"]

# Slots of the integers (three tables, scale, shift); those of their scales and zero points come that much later.
_INTEGERS, _SCALE, _ZERO, _MASK = (2, 3, 4, 5, 6), 6, 11, 7
_LEAST = 10  # the first opset with DequantizeLinear


def _input(node: onnx.NodeProto, slot: int) -> str:
    return node.input[slot] if slot < len(node.input) else ""


def _parts(node: onnx.NodeProto) -> dict[int, tuple[int, int, int]]:
    """By slot of the integers that are there, the slots of integers, scale and zero point."""
    return {slot: (slot, slot + _SCALE, slot + _ZERO) for slot in _INTEGERS if _input(node, slot)}


def refusal(graph: Graph, index: int) -> str:
    """Why a node is not taken apart; empty where it is."""
    node = graph.nodes[index]
    given = {item.name for item in graph.model.graph.input} if graph.model.ir_version >= 4 else set()
    if graph.opset < _LEAST:
        return f"the file's opset is below {_LEAST}"
    for slots in _parts(node).values():
        names = tuple(_input(node, slot) for slot in slots)
        if any(name not in graph.initializers or name in given for name in names):
            return "its integers, scales or zero points are not stored"
        integers, factor, offset = (graph.array(name) for name in names)
        if integers.dtype not in (np.int8, np.uint8) or offset.dtype != integers.dtype:
            return "its tables hold no integers of 8 bits"
        if factor.dtype != np.float32 or factor.size != 1 or offset.size != 1 or not (factor > 0).all():
            return "its scales are not one positive float for each table"
        if not only_such(graph, names[0], node.op_type, slots, names):
            return "others read its tables too"
    return ""


def opened(graph: Graph, index: int) -> Opened:
    """What stands for a node."""
    node, key = graph.nodes[index], graph.names[index]
    inputs = [_input(node, slot) for slot in range(_MASK + 1)]
    nodes = []
    for slot, slots in _parts(node).items():
        inputs[slot] = f"{key}/floats/{slot}"
        nodes.append(helper.make_node("DequantizeLinear", [node.input[part] for part in slots], [inputs[slot]], name=inputs[slot]))
    while not inputs[-1]:
        inputs.pop()
    nodes.append(helper.make_node("EmbedLayerNormalization", inputs, node.output, name=key, domain=MICROSOFT))
    nodes[-1].attribute.extend(node.attribute)
    return Opened(key, tuple(nodes), {}, frozenset(item.output[0] for item in nodes[:-1]))


def closed(graph: Graph, index: int, source: Graph, original: onnx.NodeProto) -> Closed | None:
    """The node of the file for EmbedLayerNormalization node number `index`; None where its neighbours are others now."""
    node = graph.nodes[index]
    if node.op_type != "EmbedLayerNormalization" or node.domain != MICROSOFT or len(node.output) > len(original.output):
        return None
    names = [_input(node, slot) for slot in range(_MASK + 1)] + [""] * (max(_INTEGERS) + _ZERO - _MASK)
    for slot, slots in _parts(original).items():
        found = before(graph, names[slot], ("DequantizeLinear",))
        if found is None or len(found[0].input) != len(slots) or any(name not in graph.initializers for name in found[0].input):
            return None
        if graph.array(found[0].input[1]).size != 1:
            return None
        for part, name in zip(slots, found[0].input, strict=True):
            names[part] = name
    names = names[: len(original.input)]
    result = onnx.NodeProto.FromString(original.SerializeToString())
    result.input[:] = names
    result.output[: len(node.output)] = node.output
    return Closed(index, frozenset({index}), result, {})
