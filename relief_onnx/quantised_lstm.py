"""com.microsoft DynamicQuantizeLSTM: an LSTM whose weights are integers and whose activations are rounded by the range that they have.

W [directions, features, 4 * hidden] and R [directions, hidden, 4 * hidden] go through Cast, Sub, Mul and Transpose to an LSTM of floats.
Its input goes through DynamicQuantizeLinear as in the operator; the states, which the operator rounds at each step, are not rounded.
A hidden unit that is not 0 has its part in that rounding, so it stays even where nobody reads it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from relief_onnx.graph import Graph, attributes
from relief_onnx.nodes import STANDARD, mark_rounded
from relief_onnx.quantised_parts import Closed, Opened, before, only_such, put

__all__ = ["closed", "opened", "refusal"]

# The slots of a weight, its scale and its zero point.
_PARTS = ((1, 8, 9), (2, 10, 11))
_TURN = [0, 2, 1]


def refusal(graph: Graph, index: int) -> str:
    """Why a node is not taken apart; empty where it is."""
    node = graph.nodes[index]
    if graph.opset < 11 or graph.model.ir_version < 4:
        return "the file's opset is below 11 or its IR version below 4"
    if len(node.input) < 12:
        return "its zero points are missing"
    for slots in _PARTS:
        weight, scale, zero = names = tuple(node.input[slot] for slot in slots)
        if any(name not in graph.initializers or name in {item.name for item in graph.model.graph.input} for name in names):
            return "its integers, scales or zero points are not stored"
        shape, sizes = graph.array(weight).shape, graph.array(scale).shape
        if graph.array(weight).dtype not in (np.int8, np.uint8) or len(shape) != 3:
            return "its weights are no integers in three axes"
        if sizes not in ((), (1,), (shape[0],), (shape[0], shape[2])) or graph.array(zero).shape != sizes:
            return "its scales and zero points are neither one for each direction nor one for each gate row"
        if graph.array(scale).dtype != np.float32 or not (graph.array(scale) > 0).all():
            return "its scales are not positive floats"
        if not only_such(graph, weight, node.op_type, slots, names):
            return "others read its weights too"
    return ""


def _wide(array: NDArray[Any], directions: int) -> NDArray[Any]:
    """Scales or zero points in the rank of a weight."""
    return array.reshape(directions, 1, -1) if array.ndim == 2 else array.reshape(-1, 1, 1)


def opened(graph: Graph, index: int) -> Opened:
    """What stands for a node."""
    node, key = graph.nodes[index], graph.names[index]
    tensors: dict[str, TensorProto] = {}
    parts = [f"{key}/{part}" for part in ("integers", "scale", "zero", "rounded")]
    nodes = [
        helper.make_node("DynamicQuantizeLinear", [node.input[0]], parts[:3], name=parts[0]),
        helper.make_node("DequantizeLinear", parts[:3], parts[3:], name=parts[3]),
    ]
    inputs, made = [parts[3]], {*parts}
    for letter, slots in zip("WR", _PARTS, strict=True):
        weight, scale, zero = (node.input[slot] for slot in slots)
        directions = graph.array(weight).shape[0]
        held = [f"{weight}/scale", f"{weight}/zero"]
        for name, array in zip(held, (graph.array(scale), graph.array(zero).astype(np.float32)), strict=True):
            tensors[name] = numpy_helper.from_array(_wide(array, directions), name)
        steps = [f"{key}/{letter}/{step}" for step in ("cast", "steps", "floats", "turned")]
        nodes += [
            helper.make_node("Cast", [weight], steps[:1], name=steps[0], to=TensorProto.FLOAT),
            helper.make_node("Sub", [steps[0], held[1]], steps[1:2], name=steps[1]),
            helper.make_node("Mul", [steps[1], held[0]], steps[2:3], name=steps[2]),
            helper.make_node("Transpose", steps[2:3], steps[3:], name=steps[3], perm=_TURN),
        ]
        inputs.append(steps[3])
        made |= {*steps}
    inputs += node.input[3:8]
    while not inputs[-1]:
        inputs.pop()
    nodes.append(helper.make_node("LSTM", inputs, node.output, name=key))
    nodes[-1].attribute.extend(node.attribute)
    mark_rounded(nodes[-1])
    return Opened(key, tuple(nodes), tensors, frozenset(made))


def closed(graph: Graph, index: int, source: Graph, original: onnx.NodeProto) -> Closed | None:
    """The node of the file for LSTM node number `index`; None where its neighbours are others now."""
    node = graph.nodes[index]
    if node.op_type != "LSTM" or node.domain not in STANDARD:
        return None
    first = before(graph, node.input[0], ("DequantizeLinear", "DynamicQuantizeLinear"))
    if first is None or first[0].input[1:] != first[1].output[1:] or first[0].name != f"{node.name}/rounded":
        return None
    tensors: dict[str, TensorProto] = {}
    names = [first[1].input[0], "", "", *node.input[3:8], *[""] * (8 - len(node.input)), *[""] * 4]
    for place, slots in enumerate(_PARTS, 1):
        path = before(graph, node.input[place], ("Transpose", "Mul", "Sub", "Cast"))
        if path is None or attributes(path[0]).get("perm") != _TURN:
            return None
        held = (path[3].input[0], path[1].input[1], path[2].input[1])
        if any(name not in graph.initializers for name in held):
            return None
        weight, scale, zero = (graph.array(name) for name in held)
        old, plain = [source.array(original.input[slot]) for slot in slots], original.input[slots[0]]
        if scale.shape not in ((1, 1, 1), (len(weight), 1, 1), (len(weight), 1, weight.shape[2])) or weight.dtype != old[0].dtype:
            return None
        shape = (len(weight), weight.shape[2]) if old[1].ndim == 2 else old[1].shape
        arrays = (weight, *(np.broadcast_to(item, _spread(item, weight, old[1].ndim)).reshape(shape) for item in (scale, zero)))
        for slot, array, was in zip(slots, arrays, old, strict=True):
            names[slot] = put(tensors, source, graph, original.input[slot], array.astype(was.dtype), plain, slots[0])
    result = onnx.NodeProto.FromString(original.SerializeToString())
    result.input[:] = names
    result.output[:] = node.output
    del result.attribute[:]
    result.attribute.extend(node.attribute)
    return Closed(index, frozenset({index}), result, tensors)


def _spread(held: NDArray[Any], weight: NDArray[Any], axes: int) -> tuple[int, int, int]:
    """The shape of scales for each gate row where the file has such ones, else their own."""
    return (len(weight), 1, weight.shape[2]) if axes == 2 else (held.shape[0], 1, 1)
