"""The table of layer operators: where each keeps its weight, and how the weight lies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from relief_onnx.graph import Graph, attributes
from relief_onnx.plan import Bias, Geometry, Layer
from relief_onnx.recurrent_layers import describe, made, own_half
from relief_onnx.sources import Refusal
from relief_onnx.views import View

__all__ = ["LAYER_OPERATORS", "LayerRow", "embedding_table"]

Describe = Callable[[Graph, int, int, View], Layer | Refusal]


def _layer(graph: Graph, index: int, view: View, **fields: Any) -> Layer:
    node = graph.nodes[index]
    return Layer(index, graph.names[index], node.op_type, "", view, output=node.output[0], **fields)


def _geometry(values: Mapping[str, Any], kernel: tuple[int, ...], transposed: bool) -> Geometry:
    ones = (1,) * len(kernel)
    return Geometry(
        kernel,
        tuple(values.get("strides", ones)),
        tuple(values.get("dilations", ones)),
        tuple(values.get("pads", (0,) * 2 * len(kernel))),
        str(values.get("auto_pad", "NOTSET")),
        transposed,
        tuple(values.get("output_padding", ())),
        tuple(values.get("output_shape", ())),
    )


def _convolution(graph: Graph, index: int, slot: int, view: View) -> Layer | Refusal:
    """W [out, in / group, *kernel]."""
    if len(view.shape) < 3:
        return Refusal(f"its weight has {len(view.shape)} axes; a convolution needs at least 3")
    values = attributes(graph.nodes[index])
    geometry = _geometry(values, view.shape[2:], transposed=False)
    groups = values.get("group", 1)
    return _layer(
        graph, index, view, groups=groups, input=graph.nodes[index].input[0], input_axis=1, output_axis=1,
        geometry=geometry,
    )  # fmt: skip


def _transposed_convolution(graph: Graph, index: int, slot: int, view: View) -> Layer | Refusal:
    """W [in, out / group, *kernel]."""
    if len(view.shape) < 3:
        return Refusal(f"its weight has {len(view.shape)} axes; a transposed convolution needs at least 3")
    values = attributes(graph.nodes[index])
    groups = values.get("group", 1)
    total, out, *kernel = view.shape
    spatial = range(3, 3 + len(kernel))
    canonical = (
        view.reshape(groups, total // groups, out, *kernel).transpose(0, 2, 1, *spatial).reshape(groups * out, total // groups, *kernel)
        if groups > 1
        else view.transpose(1, 0, *(axis - 1 for axis in spatial))
    )
    return _layer(
        graph, index, canonical, groups=groups, input=graph.nodes[index].input[0], input_axis=1, output_axis=1,
        geometry=_geometry(values, tuple(kernel), transposed=True),
    )  # fmt: skip


def _gemm(graph: Graph, index: int, slot: int, view: View) -> Layer | Refusal:
    """Y = alpha A' B' + beta C, with the constant on either side."""
    values = attributes(graph.nodes[index])
    flip = (values.get("transA", 0), values.get("transB", 0))
    if len(view.shape) != 2:
        return Refusal(f"its weight has {len(view.shape)} axes; Gemm needs 2")
    # As B the weight is [in, out] unless transB; as A it is [out, in] unless transA.
    canonical = view.transpose(1, 0) if bool(flip[slot]) != (slot == 1) else view
    input_axis = (0 if flip[0] else 1) if slot == 1 else (1 if flip[1] else 0)
    return _layer(
        graph, index, canonical, groups=1, input=graph.nodes[index].input[1 - slot], input_axis=input_axis,
        output_axis=slot, scale=float(values.get("alpha", 1.0)),
    )  # fmt: skip


def _matmul(graph: Graph, index: int, slot: int, view: View) -> Layer | Refusal:
    """A constant matrix on the right [in, out] or on the left [out, in]; leading axes of size 1 are dropped."""
    if len(view.shape) < 2:
        return Refusal("its weight is a vector, so there is one output and nothing to rank")
    if any(size != 1 for size in view.shape[:-2]):
        return Refusal(f"its weight {list(view.shape)} is a batch of matrices")
    canonical = view.reshape(*view.shape[-2:])
    if slot == 1:
        canonical = canonical.transpose(1, 0)
    return _layer(
        graph, index, canonical, groups=1, input=graph.nodes[index].input[1 - slot],
        input_axis=-1 if slot == 1 else -2, output_axis=-1 if slot == 1 else -2,
    )  # fmt: skip


# Row numbers are measured as float32, which counts up to here.
_MOST_ROWS = 1 << 24
# How far cosines and sines of half precision are from a circle.
_ROUNDED = 1e-2


def embedding_table(graph: Graph, index: int, view: View) -> Layer | Refusal:
    """A table [rows, dims] whose rows are picked by numbers that are computed at run time, or [dims, rows] along axis 1."""
    node = graph.nodes[index]
    axis = attributes(node).get("axis", 0)
    if graph.constant(node.input[1]) is not None:
        return Refusal(f"Gather node {graph.names[index]} picks fixed entries of it")
    if len(view.shape) != 2:
        return Refusal(f"Gather node {graph.names[index]} picks from a table of {len(view.shape)} axes; an embedding table has 2")
    if view.shape[axis % 2] > _MOST_ROWS:
        return Refusal(f"its table has more than {_MOST_ROWS:,} rows")
    if _holds_angles(graph, node):
        return Refusal("it holds the cosines or sines of angles that tell tokens' places (rotary embedding), not connections between units")
    first = axis % 2 == 0
    return _layer(
        graph, index, view.transpose(1, 0) if first else view, groups=1, input=node.input[1], input_axis=0,
        output_axis=-1 if first else 0,
    )  # fmt: skip


def _holds_angles(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether another table is looked up at the same places, and in each entry the squares of the two add up to the same number."""
    table, uses = graph.constant(node.input[0]), graph.uses.get(node.input[1], ())
    beside = (graph.nodes[use.node] for use in uses if use.slot == 1 and graph.nodes[use.node].op_type == node.op_type)
    others = (graph.constant(other.input[0]) for other in beside if other.input[0] != node.input[0])
    # The first row of two that are something else gives them away, however long they are.
    return table is not None and any(
        other is not None and other.shape == table.shape and _on_a_circle(table[:1], other[:1]) and _on_a_circle(table, other)
        for other in others
    )


def _on_a_circle(a: NDArray[Any], b: NDArray[Any]) -> bool:
    squares = np.square(a.astype(np.float64)) + np.square(b.astype(np.float64))
    return bool(squares.size) and bool(squares.min() > 0) and bool(squares.max() <= (1 + _ROUNDED) * squares.min())


def _recurrent(graph: Graph, index: int, slot: int, view: View) -> Layer | Refusal:
    """W [directions, gates * hidden, features] or R [directions, gates * hidden, hidden]."""
    found = describe(graph, index, slot)
    if isinstance(found, Refusal):
        return found
    part, view = found
    node, name = graph.nodes[index], f"{graph.names[index]}/{found[0].part}"
    source = node.input[0] if slot == 1 else f"{made(node)}/R/reads"
    half = own_half(graph, index, part.part)
    stored = View.of((part.directions, view.shape[0] // part.directions)).reshape(-1)
    bias = None if half is None else Bias(half[0], stored, 1.0, index, half[1])
    return Layer(index, name, node.op_type, "", view, part.groups, source, -1, made(node), -1, bias=bias, recurrent=part)


@dataclass(frozen=True)
class LayerRow:
    """One layer operator: which inputs may hold the weight, how to read it, and where its own bias sits (None: it has none).

    `needs_weight`: input 1 is always a weight, never another activation.
    """

    slots: tuple[int, ...]
    describe: Describe
    bias_slot: int | None
    needs_weight: bool = False


LAYER_OPERATORS: Mapping[str, LayerRow] = {
    "Conv": LayerRow((1,), _convolution, 2, needs_weight=True),
    "ConvTranspose": LayerRow((1,), _transposed_convolution, 2, needs_weight=True),
    "Gemm": LayerRow((1, 0), _gemm, 2),
    "MatMul": LayerRow((1, 0), _matmul, None),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), LayerRow((1, 2), _recurrent, 3)),
}
