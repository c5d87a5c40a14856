"""com.microsoft MatMulNBits: weights of 4 or 8 bits in blocks of inputs that share a scale and a zero point.

B [N, blocks, bytes], scales [N * blocks] and zero points [N * packed blocks] become integers [N, K] behind a DequantizeLinear with
blocks along K, a Transpose and a MatMul; a bias becomes an Add. Outputs go one by one; inputs go by whole blocks, so that what is left
has the same blocks (`nodes.mark_blocks`). With accuracy_level 4 kernels round their input in blocks: a DynamicQuantizeLinear, one range
for the whole input, stands for that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from relief_onnx.aside import tensor_of
from relief_onnx.graph import Graph, attributes
from relief_onnx.nodes import STANDARD, mark_blocks
from relief_onnx.quantised_parts import Closed, Opened, before, only_such, put
from relief_onnx.quantised_rows import MICROSOFT

__all__ = ["closed", "opened", "packed", "refusal", "unpacked"]

_TYPES = {4: TensorProto.UINT4, 8: TensorProto.UINT8}


def unpacked(data: NDArray[np.uint8], bits: int, size: int) -> NDArray[np.uint8]:
    """Integers [rows, size] of bytes [rows, n]; of 4 bits the lower half of a byte is first."""
    if bits == 8:
        return data[:, :size]
    return np.stack([data & 15, data >> 4], axis=-1).reshape(len(data), -1)[:, :size]


def packed(integers: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The bytes of integers [rows, size]; what is missing of the last byte is 0."""
    if bits == 8:
        return integers
    even = np.pad(integers, ((0, 0), (0, integers.shape[1] % 2)))
    return (even[:, ::2] | (even[:, 1::2] << 4)).astype(np.uint8)


def _rounds(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether kernels may round the activations to 8 bits by the range that they have; DynamicQuantizeLinear takes float32 alone."""
    single = graph.initializers[node.input[2]].data_type == TensorProto.FLOAT
    return single and int(attributes(node).get("accuracy_level", 0)) == 4


def _input(node: onnx.NodeProto, slot: int) -> str:
    return node.input[slot] if slot < len(node.input) else ""


def _sizes(node: onnx.NodeProto) -> tuple[int, int, int, int, int]:
    """N, K, bits, places of a block, blocks of a row."""
    values = attributes(node)
    inputs, block = values["K"], values["block_size"]
    return values["N"], inputs, values.get("bits", 4), block, -(-inputs // block)


def refusal(graph: Graph, index: int) -> str:
    """Why a node is not taken apart; empty where it is."""
    node = graph.nodes[index]
    rows, _, bits, block, blocks = _sizes(node)
    weight, scales, zeros = node.input[1], node.input[2], _input(node, 3)
    stored = [name for name in (weight, scales, zeros) if name]
    if _input(node, 4):
        return "its inputs are put into groups in another order (g_idx)"
    if bits not in _TYPES:
        return f"its integers have {bits} bits; 4 and 8 are understood"
    if graph.opset < 13 or graph.model.ir_version < 4:
        return "the file's opset is below 13 or its IR version below 4"
    if any(name not in graph.initializers or name in {item.name for item in graph.model.graph.input} for name in stored):
        return "its integers, scales or zero points are not stored"
    if graph.array(scales).dtype.kind != "f" or not np.isfinite(graph.array(scales)).all():
        return "its scales are no floats that are known"
    per_row = -(-blocks * bits // 8)
    if graph.array(weight).dtype != np.uint8 or graph.array(weight).size != rows * blocks * (block * bits // 8):
        return "its integers do not have the size that it names"
    if graph.array(scales).size != rows * blocks:
        return "its scales do not have the size that it names"
    if zeros and (graph.array(zeros).dtype != np.uint8 or graph.array(zeros).size != rows * per_row):
        return "its zero points are not packed integers"
    if not only_such(graph, weight, node.op_type, (2, 3, 4), (scales, zeros, "")):
        return "others read its weight too, for other numbers"
    if _input(node, 5) and _input(node, 5) not in graph.initializers:
        return "its bias is computed"
    return ""


def _numbers(graph: Graph, node: onnx.NodeProto) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[np.uint8]]:
    """Integers [N, K], scales and zero points [N, blocks]; no scale is 0."""
    rows, inputs, bits, block, blocks = _sizes(node)
    integers = unpacked(graph.array(node.input[1]).reshape(rows, -1), bits, blocks * block)
    scales = graph.array(node.input[2]).reshape(rows, blocks)
    zeros = np.full((rows, blocks), 1 << (bits - 1), np.uint8)
    if _input(node, 3):
        zeros = unpacked(graph.array(node.input[3]).reshape(rows, -1), bits, blocks)
    empty = scales == 0
    if empty.any():
        # Blocks of zeros: zero points with some scale mean the same, and have room for other numbers.
        some = np.median(np.abs(scales[~empty])) if not empty.all() else 1.0
        scales = np.where(empty, some, scales).astype(scales.dtype)
        integers = np.where(np.repeat(empty, block, 1), np.repeat(zeros, block, 1), integers)
    return integers[:, :inputs], scales, zeros


def _tensor(name: str, array: NDArray[np.uint8], bits: int, source: TensorProto | None = None) -> TensorProto:
    return tensor_of(array.astype(helper.tensor_dtype_to_np_dtype(_TYPES[bits])), name, source)


def opened(graph: Graph, index: int) -> Opened:
    """What stands for a node."""
    node, key = graph.nodes[index], graph.names[index]
    _, _, bits, block, _ = _sizes(node)
    weight, output = node.input[1], node.output[0]
    scale, zero, floats, turned = f"{weight}/scale", f"{weight}/zero", f"{key}/floats", f"{key}/turned"
    integers, scales, zeros = _numbers(graph, node)
    tensors = {
        weight: _tensor(weight, integers, bits, graph.initializers.get(weight)),
        scale: numpy_helper.from_array(np.ascontiguousarray(scales), scale),
        zero: _tensor(zero, zeros, bits),
    }
    bias = _input(node, 5)
    product = f"{output}/product" if bias else output
    rounded = [f"{key}/{part}" for part in ("integers", "factor", "offset", "rounded")] if _rounds(graph, node) else []
    nodes = [
        helper.make_node("DequantizeLinear", [weight, scale, zero], [floats], name=floats, domain=MICROSOFT, axis=1, block_size=block),
        helper.make_node("Transpose", [floats], [turned], name=turned, perm=[1, 0]),
        helper.make_node("MatMul", [rounded[3] if rounded else node.input[0], turned], [product], name=key),
    ]
    mark_blocks(nodes[2], 1, block)
    if rounded:
        nodes[:0] = [
            helper.make_node("DynamicQuantizeLinear", [node.input[0]], rounded[:3], name=rounded[0]),
            helper.make_node("DequantizeLinear", rounded[:3], rounded[3:], name=rounded[3]),
        ]
    if bias:
        nodes.append(helper.make_node("Add", [product, bias], [output], name=f"{key}/bias"))
    return Opened(key, tuple(nodes), tensors, frozenset({floats, turned, *rounded, *([product] if bias else [])}))


def closed(graph: Graph, index: int, source: Graph, original: onnx.NodeProto) -> Closed | None:
    """The node of the file for MatMul node number `index`; None where its neighbours are others now."""
    node = graph.nodes[index]
    path = before(graph, node.input[1], ("Transpose", "DequantizeLinear")) if node.op_type == "MatMul" else None
    if path is None or node.domain not in STANDARD:
        return None
    first = node.input[0]
    if _rounds(source, original):
        own = before(graph, first, ("DequantizeLinear", "DynamicQuantizeLinear"))
        if own is None or own[0].name != f"{node.name}/rounded" or own[0].input[1:] != own[1].output[1:]:
            return None
        first = own[1].input[0]
    _, _, bits, block, _ = _sizes(original)
    weight, scale, zero = path[1].input
    values = attributes(path[1])
    if any(name not in graph.initializers for name in path[1].input) or values.get("block_size", 0) != block:
        return None
    integers, scales, zeros = (graph.array(name) for name in (weight, scale, zero))
    tensors: dict[str, TensorProto] = {}
    names = [first, *original.input[1:3], _input(original, 3), "", ""]
    numbers = _numbers(source, original)
    if not all(_same(old, new) for old, new in zip(numbers, (integers, scales, zeros), strict=True)):
        rows, inputs = integers.shape
        blocks = scales.shape[1]
        wide = np.repeat(zeros.astype(np.uint8), block, 1)
        wide[:, :inputs] = integers.astype(np.uint8)
        stored, flat = packed(wide, bits).reshape(rows, blocks, -1), source.array(original.input[2]).ndim == 1
        names[1] = put(tensors, source, graph, original.input[1], stored, original.input[1], 1)
        names[2] = put(tensors, source, graph, original.input[2], scales.reshape(-1) if flat else scales, original.input[1], 1)
        if names[3]:
            held = packed(zeros.astype(np.uint8), bits)
            flat = source.array(names[3]).ndim == 1
            names[3] = put(tensors, source, graph, names[3], held.reshape(-1) if flat else held, original.input[1], 1)
    else:
        tensors |= {name: source.initializers[name] for name in names[1:4] if name}
    at, output = index, node.output[0]
    if _input(original, 5):
        uses = graph.uses.get(output, [])
        after = graph.nodes[uses[0].node] if len(uses) == 1 and uses[0].slot == 0 else None
        ours = after is not None and after.name == f"{node.name}/bias" and after.op_type == "Add" and after.input[1] in graph.initializers
        if ours and after is not None and graph.array(after.input[1]).shape == (integers.shape[0],):
            names[5], at, output = after.input[1], uses[0].node, after.output[0]
    result = onnx.NodeProto.FromString(original.SerializeToString())
    while not names[-1]:
        names.pop()
    result.input[:] = names
    result.output[:] = [output]
    for item in result.attribute:
        item.i = {"N": integers.shape[0], "K": integers.shape[1]}.get(item.name, item.i)
    return Closed(at, frozenset({index, at}), result, tensors)


def _same(old: NDArray[Any], new: NDArray[Any]) -> bool:
    return old.shape == new.shape and np.array_equal(old, new.astype(old.dtype))
