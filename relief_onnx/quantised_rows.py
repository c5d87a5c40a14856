"""Operators that compute with integers, and the float operators that stand for them: tables, and how a node is taken apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from relief_onnx.graph import FLOATS, Graph, attributes
from relief_onnx.grids import RANGES, Grid, spread
from relief_onnx.nodes import STANDARD

__all__ = ["MICROSOFT", "Chain", "Claim", "Place", "chains", "is_quantising", "places"]

MICROSOFT = "com.microsoft"
_WEIGHTS = frozenset(RANGES) - {TensorProto.INT32}
_EIGHT = frozenset({TensorProto.INT8, TensorProto.UINT8})


@dataclass(frozen=True)
class Claim:
    """An input of a node, numbered, that reads a stored tensor of integers as the numbers of `grid`."""

    node: int
    slot: int
    grid: Grid


@dataclass(frozen=True)
class Chain:
    """Nodes that make floats of a stored tensor of integers; the result is `output`."""

    claim: Claim
    nodes: tuple[int, ...]
    output: str


@dataclass(frozen=True)
class Place:
    """A node that computes with integers, or a few of them, and what stands for it.

    operator: of the float node. inputs: what it reads, each as a tensor as it is, or as (integers, scale, zero point) that run through a
    DequantizeLinear, or as a claim. before: how the integers of a first input come from floats ("" or DynamicQuantizeLinear).
    result: (scale, zero point) of a QuantizeLinear behind it; none where floats come out. last: the node whose output it makes.
    slots: where the float inputs, or the three parts of one, stand in the inputs of the integer node. bias: the slot of its bias.
    """

    nodes: tuple[int, ...]
    last: int
    operator: str
    inputs: tuple[str | tuple[str, str, str] | Claim, ...]
    slots: tuple[tuple[int, ...], ...]
    attributes: Mapping[str, Any]
    result: tuple[str, str] | None = None
    bias: int | None = None
    added: int | None = None
    dynamic: bool = False
    own: Mapping[str, Any] = field(default_factory=dict)

    @property
    def claims(self) -> tuple[Claim, ...]:
        return tuple(item for item in self.inputs if isinstance(item, Claim))


def is_quantising(node: onnx.NodeProto, integers: frozenset[str]) -> bool:
    """Whether a node may belong to a chain or place: cheap, to leave models alone that have none. integers: stored tensors of them."""
    return node.op_type in _MARKS or (node.op_type == "Cast" and node.input[0] in integers)


# -- weights --------------------------------------------------------------------------------------------------------------


def _stored(graph: Graph, name: str, types: frozenset[int] = _WEIGHTS) -> NDArray[Any] | None:
    item = graph.initializers.get(name)
    return graph.array(name) if item is not None and item.data_type in types and item.dims else None


def _grid(
    graph: Graph, name: str, scale: str, zero: str, axis: int | None, block: int = 0, types: frozenset[int] = _WEIGHTS
) -> Grid | None:
    """What a stored tensor means by the constants `scale` and `zero`; None where it is not stored or they do not fit."""
    integers, factor = _stored(graph, name, types), graph.constant(scale)
    offset = graph.constant(zero) if zero else np.zeros((), np.int64)
    if integers is None or factor is None or offset is None or factor.dtype.kind != "f":
        return None
    if not np.all((factor > 0) | ((factor < 0) & bool(block))):  # of blocks onnxruntime writes negative ones
        return None
    wide = spread(factor, integers.shape, axis, block)
    shift = spread(offset.astype(np.int64), integers.shape, axis, block)
    if wide is None or shift is None:
        return None
    blocked = (axis % integers.ndim, block) if block and axis is not None else None
    return Grid(name, graph.initializers[name].data_type, integers, wide, shift, scale, zero, blocked)


def chains(graph: Graph) -> Iterator[Chain]:
    """[Clip,] DequantizeLinear, and Cast[, Sub], Mul, of stored integers."""
    for index, node in enumerate(graph.nodes):
        found = None
        if node.op_type == "DequantizeLinear" and node.domain in (*STANDARD, MICROSOFT):
            found = _dequantised(graph, index)
        elif node.op_type == "Cast" and node.domain in STANDARD and node.input[0] in graph.initializers:
            found = _multiplied(graph, index)
        if found is not None and not graph.is_output(found.output):
            yield found


def _dequantised(graph: Graph, index: int) -> Chain | None:
    """A DequantizeLinear; before it a Clip may say that fewer bits are used than there are."""
    node, values = graph.nodes[index], attributes(graph.nodes[index])
    name, block, bounds = node.input[0], values.get("block_size", 0), None
    nodes: tuple[int, ...] = (index,)
    clip = graph.producer.get(name)
    if clip is not None and graph.nodes[clip].op_type == "Clip" and _only(graph, name) is not None and not block:
        limits = [graph.constant(item) for item in graph.nodes[clip].input[1:]]
        if len(limits) != 2 or any(limit is None or limit.size != 1 for limit in limits):
            return None
        nodes, name = (clip, index), graph.nodes[clip].input[0]
        bounds = (int(limits[0].item()), int(limits[1].item())) if limits[0] is not None and limits[1] is not None else None
    grid = _grid(graph, name, node.input[1], _input(node, 2), values.get("axis", 1), block, frozenset(RANGES))
    if grid is None or values.get("output_dtype", 0) not in (0, helper.np_dtype_to_tensor_dtype(grid.scale.dtype)):
        return None
    if bounds is not None:
        grid = replace(grid, integers=np.clip(grid.integers, *bounds), bounds=bounds)
    return Chain(Claim(nodes[0], 0, grid), nodes, node.output[0])


def _multiplied(graph: Graph, index: int) -> Chain | None:
    """Cast[, Sub], Mul: each read by the next alone."""
    cast = graph.nodes[index]
    kind = attributes(cast)["to"]
    if kind not in FLOATS or _stored(graph, cast.input[0]) is None:
        return None
    nodes, zero = [index], ""
    while (use := _only(graph, graph.nodes[nodes[-1]].output[0])) is not None:
        node = graph.nodes[use[0]]
        other = node.input[1 - use[1]] if len(node.input) == 2 else ""
        if node.domain not in STANDARD or not other or graph.constant(other) is None:
            return None
        nodes.append(use[0])
        if node.op_type == "Sub" and use[1] == 0 and not zero:
            zero = other
            if bool((graph.array(other) % 1).any()) if other in graph.initializers else True:
                return None
            continue
        grid = _grid(graph, cast.input[0], other, zero, None) if node.op_type == "Mul" else None
        if grid is None or helper.np_dtype_to_tensor_dtype(grid.scale.dtype) != kind:
            return None
        return Chain(Claim(index, 0, grid), tuple(nodes), node.output[0])
    return None


def _only(graph: Graph, tensor: str) -> tuple[int, int] | None:
    """The only reader of a tensor as (node, slot); None where there are more, or it is captured or an output."""
    uses = graph.uses.get(tensor, [])
    return (uses[0].node, uses[0].slot) if len(uses) == 1 and uses[0].slot >= 0 and not graph.is_output(tensor) else None


# -- nodes whose scales are stored ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """inputs: slots of (integers, scale, zero point); result: slots of scale and zero point; bias: of int32; plain: passed as they are.

    own: attributes that the float operator does not have, and the only values they may have. axis: of the scales of input `slot`.
    """

    operator: str
    inputs: tuple[tuple[int, int, int], ...]
    result: tuple[int, int]
    bias: int | None = None
    plain: tuple[int, ...] = ()
    own: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    axis: Callable[[onnx.NodeProto, int], int] = lambda node, slot: 0


def _gemm_axis(node: onnx.NodeProto, slot: int) -> int:
    return 0 if attributes(node).get("transB", 0) else 1


_ONE, _TWO = ((0, 1, 2),), ((0, 1, 2), (3, 4, 5))
_FIRST = {"channels_last": (0,)}
_ROWS: Mapping[tuple[str, str], _Row] = {
    ("", "QLinearConv"): _Row("Conv", _TWO, (6, 7), 8),
    ("", "QLinearMatMul"): _Row("MatMul", _TWO, (6, 7), axis=lambda node, slot: -1 if slot == 3 else -2),
    (MICROSOFT, "QGemm"): _Row("Gemm", _TWO, (7, 8), 6, axis=_gemm_axis),
    (MICROSOFT, "QLinearAdd"): _Row("Add", _TWO, (6, 7)),
    (MICROSOFT, "QLinearMul"): _Row("Mul", _TWO, (6, 7)),
    (MICROSOFT, "QLinearSigmoid"): _Row("Sigmoid", _ONE, (3, 4)),
    (MICROSOFT, "QLinearLeakyRelu"): _Row("LeakyRelu", _ONE, (3, 4)),
    (MICROSOFT, "QLinearGlobalAveragePool"): _Row("GlobalAveragePool", _ONE, (3, 4), own=_FIRST),
    (MICROSOFT, "QLinearAveragePool"): _Row("AveragePool", _ONE, (3, 4), own=_FIRST),
    (MICROSOFT, "QLinearSoftmax"): _Row("Softmax", _ONE, (3, 4), own={"opset": tuple(range(13, 40))}),
    (MICROSOFT, "QLinearWhere"): _Row("Where", ((1, 2, 3), (4, 5, 6)), (7, 8), plain=(0,)),
    (MICROSOFT, "QLinearConcat"): _Row("Concat", (), (0, 1)),
}
_MARKS = {"DequantizeLinear", "MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"} | {op for _, op in _ROWS}


def _domain(node: onnx.NodeProto) -> str:
    return "" if node.domain in STANDARD else node.domain


def _input(node: onnx.NodeProto, slot: int) -> str:
    return node.input[slot] if slot < len(node.input) else ""


def _fixed(graph: Graph, node: onnx.NodeProto, index: int, row: _Row) -> Place | None:
    """A node whose scales are all stored."""
    values = attributes(node)
    if any(values.get(name, allowed[0]) not in allowed for name, allowed in row.own.items()):
        return None
    triples = row.inputs or tuple((slot, slot + 1, slot + 2) for slot in range(2, len(node.input), 3))
    inputs: list[str | tuple[str, str, str] | Claim] = [_input(node, slot) for slot in row.plain]
    slots: list[tuple[int, ...]] = [(slot,) for slot in row.plain]
    for triple in triples:
        name, scale, zero = (_input(node, slot) for slot in triple)
        if name in graph.initializers:
            grid = _grid(graph, name, scale, zero, row.axis(node, triple[0]))
            if grid is None:
                return None
            inputs.append(Claim(index, triple[0], grid))
        elif _is_one(graph, scale) and (not zero or _is_one(graph, zero)) and _narrow(graph, zero):
            inputs.append((name, scale, zero))
        else:
            return None
        slots.append(triple)
    scale, zero = (_input(node, slot) for slot in row.result)
    if scale and not (_is_one(graph, scale) and _narrow(graph, zero)):
        return None
    if row.bias is not None and _input(node, row.bias):
        grid = _bias_grid(graph, node, row, inputs, values)
        if grid is None:
            return None
        inputs.append(Claim(index, row.bias, grid))
        slots.append((row.bias,))
    return Place(
        (index,), index, row.operator, tuple(inputs), tuple(slots), {key: value for key, value in values.items() if key not in row.own},
        (scale, zero) if scale else None, row.bias, own={key: values[key] for key in row.own if key in values},
    )  # fmt: skip


def _is_one(graph: Graph, name: str) -> bool:
    value = graph.constant(name)
    return value is not None and value.size == 1


def _narrow(graph: Graph, zero: str) -> bool:
    """Whether QuantizeLinear and DequantizeLinear of the model's opset know the type of that zero point."""
    kind = np.uint8 if not zero else getattr(graph.constant(zero), "dtype", None)
    return kind in (np.uint8, np.int8) or (graph.opset >= 21 and kind in (np.uint16, np.int16))


def _bias_grid(graph: Graph, node: onnx.NodeProto, row: _Row, inputs: list[Any], values: Mapping[str, Any]) -> Grid | None:
    """A bias of int32 counts in units of the scale of the input times that of the weight."""
    assert row.bias is not None
    first, weight = inputs[0], inputs[1]
    if not isinstance(first, tuple) or not isinstance(weight, Claim):
        return None
    factor = graph.constant(first[1])
    integers = _stored(graph, node.input[row.bias], frozenset({TensorProto.INT32}))
    if factor is None or integers is None or weight.grid.scale.size not in (1, integers.size) or integers.ndim != 1:
        return None
    scale = (weight.grid.scale.reshape(-1) * factor.reshape(()) * np.float32(values.get("alpha", 1.0))).astype(weight.grid.scale.dtype)
    return Grid(node.input[row.bias], TensorProto.INT32, integers, scale, np.zeros(1, np.int64))


# -- nodes whose scales are measured when the model runs ------------------------------------------------------------------


def _meaning(graph: Graph, tensor: str) -> tuple[str, str] | None:
    """The scale and zero point of integers that run, as who makes or reads them says."""
    if tensor in graph.producer:
        node = graph.nodes[graph.producer[tensor]]
        if node.op_type == "DynamicQuantizeLinear":
            return (node.output[1], node.output[2]) if tensor == node.output[0] else None
        if node.op_type == "QuantizeLinear":
            return node.input[1], _input(node, 2)
    for use in graph.uses.get(tensor, ()):
        node = graph.nodes[use.node]
        if use.slot == 0 and node.op_type == "DequantizeLinear":
            return node.input[1], _input(node, 2)
        row = _ROWS.get((_domain(node), node.op_type))
        for value, scale, zero in row.inputs if row is not None else ():
            if use.slot == value:
                return _input(node, scale), _input(node, zero)
    return None


def _gathered(graph: Graph, node: onnx.NodeProto, index: int) -> Place | None:
    """Rows of a table of integers, which somebody behind it takes for floats."""
    meaning = _meaning(graph, node.output[0]) if node.input[0] in graph.initializers else None
    if meaning is None or not _is_one(graph, meaning[0]) or not _narrow(graph, meaning[1]):
        return None
    grid = _grid(graph, node.input[0], *meaning, None)
    if grid is None:
        return None
    return Place((index,), index, "Gather", (Claim(index, 0, grid), node.input[1]), ((0,), (1,)), attributes(node), meaning)


def _dynamic(graph: Graph, node: onnx.NodeProto, index: int) -> Place | None:
    """MatMulInteger or ConvInteger, Cast, Mul, of integers whose scale is known, most often from a DynamicQuantizeLinear."""
    meaning = _meaning(graph, node.input[0])
    if meaning is None or _input(node, 2) != meaning[1]:
        return None
    cast = _only(graph, node.output[0])
    product = _only(graph, graph.nodes[cast[0]].output[0]) if cast is not None and graph.nodes[cast[0]].op_type == "Cast" else None
    if cast is None or product is None or graph.nodes[product[0]].op_type != "Mul":
        return None
    scales = graph.nodes[product[0]].input[1 - product[1]]
    made = graph.producer.get(scales)
    if made is None or graph.nodes[made].op_type != "Mul" or _only(graph, scales) is None:
        return None
    pair = list(graph.nodes[made].input)
    if meaning[0] not in pair or pair[0] == pair[1]:
        return None
    scale = pair[1 - pair.index(meaning[0])]
    grid = _spread_out(graph, node, scale)
    if grid is None:
        return None
    run = (node.input[0], *meaning)
    operator = "Conv" if node.op_type == "ConvInteger" else "MatMul"
    return Place(
        (made, index, cast[0], product[0]), product[0], operator, (run, Claim(index, 1, grid)), ((0,), (1,)), attributes(node),
        dynamic=True,
    )  # fmt: skip


def _spread_out(graph: Graph, node: onnx.NodeProto, scale: str) -> Grid | None:
    """The grid of a weight whose scale multiplies the layer's output."""
    factor, integers, zero = graph.constant(scale), _stored(graph, node.input[1]), _input(node, 3)
    offset = graph.constant(zero) if zero else np.zeros((), np.int64)
    if factor is None or integers is None or offset is None or factor.dtype.kind != "f" or not np.all(factor > 0):
        return None
    # Of the output the channels are axis 1 of a convolution, else the last one.
    axis, place = (0, 1 - integers.ndim) if node.op_type == "ConvInteger" else (integers.ndim - 1, -1)
    if factor.size > 1 and (factor.ndim < -place or factor.shape[place] != factor.size):
        return None
    if node.op_type != "ConvInteger" and integers.ndim != 2:
        return None
    wide = spread(factor.reshape(-1), integers.shape, axis)
    shift = spread(offset.astype(np.int64), integers.shape, axis)
    if wide is None or shift is None:
        return None
    return Grid(node.input[1], graph.initializers[node.input[1]].data_type, integers, wide, shift, scale, zero)


def _float_product(graph: Graph, node: onnx.NodeProto, index: int) -> Place | None:
    """com.microsoft's DynamicQuantizeMatMul and MatMulIntegerToFloat: floats come out, with a float bias."""
    measured = node.op_type == "DynamicQuantizeMatMul"
    weight, scale, zero, bias = (1, 2, 3, 4) if measured else (1, 3, 5, 6)
    grid = _grid(graph, node.input[weight], _input(node, scale), _input(node, zero), -1)
    if grid is None or len(grid.shape) != 2 or (_input(node, bias) and _input(node, bias) not in graph.initializers):
        return None
    first: str | tuple[str, str, str] = node.input[0] if measured else (node.input[0], node.input[2], _input(node, 4))
    inputs: tuple[Any, ...] = (first, Claim(index, weight, grid), *((_input(node, bias),) if _input(node, bias) else ()))
    slots = ((0,) if measured else (0, 2, 4), (weight, scale, zero), *(((bias,),) if _input(node, bias) else ()))
    return Place((index,), index, "MatMul", inputs, slots, {}, added=bias, dynamic=measured)


def places(graph: Graph) -> Iterator[Place]:
    """Every node that computes with integers and can be taken apart."""
    for index, node in enumerate(graph.nodes):
        found, domain = None, _domain(node)
        if (domain, node.op_type) in _ROWS:
            found = _fixed(graph, node, index, _ROWS[domain, node.op_type])
        elif not domain and node.op_type in ("MatMulInteger", "ConvInteger"):
            found = _dynamic(graph, node, index)
        elif not domain and node.op_type == "Gather":
            found = _gathered(graph, node, index)
        elif domain == MICROSOFT and node.op_type in ("DynamicQuantizeMatMul", "MatMulIntegerToFloat"):
            found = _float_product(graph, node, index)
        if found is not None:
            yield found
