"""Operators that sum products: which axes of their inputs meet, and what the mean taken out of a tensor was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx

from relief_onnx.graph import Graph, attributes
from relief_onnx.moves import Barrier, dims_of, reduced_axes

__all__ = ["LABELS", "Centred", "centred"]

Labels = tuple[list[tuple[Any, ...]], tuple[Any, ...]]


def matmul_labels(graph: Graph, node: onnx.NodeProto) -> Labels:
    """A label per axis of each input and of the output: equal labels meet, those missing in the output are summed over."""
    a, b = (len(dims_of(graph, name)) for name in node.input[:2])
    batch = tuple(range(-max(a, b), -2))
    left = (*batch[len(batch) - max(a - 2, 0) :], *(("m", "k") if a > 1 else ("k",)))
    right = (*batch[len(batch) - max(b - 2, 0) :], *(("k", "n") if b > 1 else ("k",)))
    return [left, right], (*batch, *(("m",) if a > 1 else ()), *(("n",) if b > 1 else ()))


def einsum_labels(graph: Graph, node: onnx.NodeProto) -> Labels:
    """As the equation says."""
    equation = attributes(node)["equation"].replace(" ", "")
    if "." in equation:
        raise Barrier("its equation has an ellipsis")
    left, arrow, right = equation.partition("->")
    inputs = [tuple(term) for term in left.split(",")]
    if not arrow:
        letters = [letter for term in inputs for letter in term]
        right = "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    if any(len(set(term)) < len(term) for term in inputs):
        raise Barrier("its equation takes a diagonal")
    return inputs, tuple(right)


LABELS: Mapping[str, Callable[[Graph, onnx.NodeProto], Labels]] = {"MatMul": matmul_labels, "Einsum": einsum_labels}


@dataclass(frozen=True)
class Centred:
    """What a mean of squares was computed from: `tensor` minus its own `mean`."""

    tensor: str
    mean: str


def _made_by(graph: Graph, name: str, operator: str) -> onnx.NodeProto | None:
    node = graph.nodes[graph.producer[name]] if name in graph.producer else None
    return node if node is not None and node.op_type == operator else None


def centred(graph: Graph, node: onnx.NodeProto) -> Centred | None:
    """The pattern of a variance: mean((x - mean(x))^2) over the same axes; None where `node` is not the outer mean of one."""
    if node.op_type != "ReduceMean":
        return None
    square, product = _made_by(graph, node.input[0], "Pow"), _made_by(graph, node.input[0], "Mul")
    if square is not None:
        exponent = graph.constant(square.input[1])
        base = square.input[0] if exponent is not None and exponent.size == 1 and exponent.item() == 2 else None
    else:
        base = product.input[0] if product is not None and product.input[0] == product.input[1] else None
    difference = _made_by(graph, base, "Sub") if base is not None else None
    mean = _made_by(graph, difference.input[1], "ReduceMean") if difference is not None else None
    if difference is None or mean is None or mean.input[0] != difference.input[0]:
        return None
    rank = len(dims_of(graph, node.input[0]))
    same_axes = reduced_axes(graph, mean, rank) == reduced_axes(graph, node, rank)
    keeps = all(attributes(item).get("keepdims", 1) for item in (mean, node))
    return Centred(mean.input[0], mean.output[0]) if same_axes and keeps else None
