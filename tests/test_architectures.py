"""Patterns of whole architectures, each as the smallest graph that has it: which channels can go, and what switching them off leaves.

A case builds a net from its input and returns the output and the stored tensors, with axis, whose every entry must be removable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
from builders import Net
from laws import assert_same_outputs, check_mask_is_surgery
from onnx import numpy_helper

from relief_onnx.channels import unit_masks
from relief_onnx.graph import Graph
from relief_onnx.layers import find
from relief_onnx.masks import Masks, applied, initializer_masks, insert
from relief_onnx.model import prepare
from relief_onnx.surgery import apply_weights, operate
from relief_onnx.walk import trace

Build = Callable[[Net, str], tuple[str, list[tuple[str, int]]]]


@dataclass(frozen=True)
class Case:
    build: Build
    shape: tuple[int | str, ...]
    opset: int = 17


def scalar(net: Net, value: float) -> Any:
    """A number in a Constant node, as exporters write it."""
    return net.op("Constant", value_float=value)


def whole(net: Net, value: int) -> Any:
    return net.op("Constant", value_ints=[value])


def scalar_int(net: Net, value: int) -> Any:
    return net.op("Constant", value_int=value)


def size(net: Net, x: str, axis: int) -> Any:
    return net.op("Gather", net.op("Shape", x), whole(net, axis), axis=0)


def rms_norm(net: Net, x: str) -> tuple[str, list[tuple[str, int]]]:
    """The mean of squares, decomposed; its exponent and epsilon are Constant nodes."""
    first, second = net.weight(6, 8), net.weight(8, 5)
    y = net.op("MatMul", x, first)
    mean = net.op("ReduceMean", net.op("Pow", y, scalar(net, 2.0)), axes=[-1])
    root = net.op("Sqrt", net.op("Add", mean, scalar(net, 1e-6)))
    z = net.op("Mul", net.op("Mul", y, net.op("Div", scalar(net, 1.0), root)), net.weight(8))
    return net.op("MatMul", z, second), [(first, 1), (second, 0)]


def gated(net: Net, x: str) -> tuple[str, list[tuple[str, int]]]:
    """chunk(2): where the halves end is computed in integers from the number of channels."""
    first, second = net.weight(6, 16), net.weight(8, 5)
    y = net.op("MatMul", x, first)
    half = net.op("Div", net.op("Add", size(net, y, 2), whole(net, 1)), whole(net, 2))
    ends = [net.op("Mul", half, whole(net, factor)) for factor in (1, 2)]
    a = net.op("Slice", y, whole(net, 0), ends[0], whole(net, 2))
    b = net.op("Slice", y, ends[0], ends[1], whole(net, 2))
    return net.op("MatMul", net.op("Mul", net.op("Sigmoid", a), b), second), [(first, 1), (second, 0)]


def heads(net: Net, x: str) -> tuple[str, list[tuple[str, int]]]:
    """Attention whose head size is computed from the width of the residual stream, and so is its temperature."""
    stem, out, values = net.weight(6, 8), net.weight(8, 5), net.weight(8, 8)
    y = net.op("MatMul", x, stem)
    batch, length, width = (size(net, y, axis) for axis in range(3))
    per_head = net.op("Div", width, whole(net, 2))
    split = net.op("Concat", batch, length, whole(net, 2), per_head, axis=0)
    q, k, v = (
        net.op("Transpose", net.op("Reshape", net.op("MatMul", y, weight), split), perm=[0, 2, 1, 3])
        for weight in (net.weight(8, 8), net.weight(8, 8), values)
    )
    logits = net.op("Div", net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2])), net.op("Cast", width, to=1))
    context = net.op("Transpose", net.op("MatMul", net.op("Softmax", logits, axis=-1), v), perm=[0, 2, 1, 3])
    z = net.op("MatMul", net.op("Reshape", context, net.op("Concat", batch, length, width, axis=0)), net.weight(8, 8))
    return net.op("MatMul", net.op("Add", y, z), out), [(stem, 1), (out, 0), (values, 0), (values, 1)]


def positions(net: Net, x: str) -> tuple[str, list[tuple[str, int]]]:
    """A learned table [1, T, C] is added before statistics over the channels."""
    stem, table, scale, out = net.weight(6, 8), net.weight(1, 3, 8), net.weight(8), net.weight(8, 5)
    y = net.op("Add", net.op("MatMul", x, stem), table)
    return net.op("MatMul", net.op("LayerNormalization", y, scale, net.bias(8)), out), [(stem, 1), (table, 2), (scale, 0), (out, 0)]


def masked_heads(net: Net, x: str) -> tuple[str, list[tuple[str, int]]]:
    """A stored mask is cut to the length at run time: afterwards that length has no name, while heads are joined again."""
    stem, out = net.weight(6, 8), net.weight(8, 5)
    y = net.op("Reshape", net.op("MatMul", x, stem), net.ints(0, 0, 2, 4))
    mask = net.op("Slice", net.constant(np.ones((1, 32, 1, 1), np.float32)), whole(net, 0), size(net, x, 1), whole(net, 1))
    joined = net.op("Concat", size(net, x, 0), size(net, x, 1), whole(net, 8), axis=0)
    return net.op("MatMul", net.op("Reshape", net.op("Mul", y, mask), joined), out), [(stem, 1), (out, 0)]


def spread_mask(net: Net, x: str) -> tuple[str, list[tuple[str, int]]]:
    """A mask of positions is copied along the channels, with their number as a constant."""
    stem, out = net.weight(6, 8), net.weight(8, 5)
    sizes = net.op("Concat", size(net, x, 0), size(net, x, 1), whole(net, 8), axis=0)
    mask = net.op("Expand", net.op("ReduceMax", x, axes=[2]), sizes)
    pooled = net.op("ReduceSum", net.op("Mul", net.op("MatMul", x, stem), mask), net.ints(1), keepdims=0)
    return net.op("MatMul", pooled, out), [(stem, 1), (out, 0)]


def mask_of_heads(net: Net, x: str) -> tuple[str, list[tuple[str, int]]]:
    """A mask of tokens, copied for every head as PyTorch writes `expand(-1, 3, -1, -1)`: the number of heads is no width of a layer."""
    values, out = net.weight(6, 12), net.weight(12, 5)
    bad = net.op("Less", net.op("ReduceMax", x, axes=[2], keepdims=0), scalar(net, 0.1))
    mask = net.op("Unsqueeze", net.op("Where", bad, scalar(net, -9.0), scalar(net, 0.0)), net.ints(1, 2))
    asked = net.op("Reshape", net.op("Concat", *(whole(net, size) for size in (-1, 3, -1, -1)), axis=0), whole(net, -1))
    ones = net.op("ConstantOfShape", net.op("Shape", asked), value=numpy_helper.from_array(np.ones(1, np.int64)))
    same = net.op("Equal", asked, net.op("Mul", ones, scalar_int(net, -1)))
    spread = net.op("Expand", mask, net.op("Where", same, ones, asked))
    q, k, v = (
        net.op("Transpose", net.op("Reshape", net.op("MatMul", x, weight), net.ints(0, 0, 3, 4)), perm=[0, 2, 1, 3])
        for weight in (net.weight(6, 12), net.weight(6, 12), values)
    )
    logits = net.op("Add", net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2])), spread)
    context = net.op("Transpose", net.op("MatMul", net.op("Softmax", logits, axis=-1), v), perm=[0, 2, 1, 3])
    return net.op("MatMul", net.op("Reshape", context, net.ints(0, 0, 12)), out), [(values, 1), (out, 0)]


def detour(net: Net, x: str) -> tuple[str, list[tuple[str, int]]]:
    """Attention where k is transposed with its heads joined to a batch of unknown size; heads are the units."""
    values, out = net.weight(6, 12), net.weight(12, 5)
    q, k, v = (
        net.op("Transpose", net.op("Reshape", net.op("MatMul", x, weight), net.ints(0, 0, 3, 4)), perm=[0, 2, 1, 3])
        for weight in (net.weight(6, 12), net.weight(6, 12), values)
    )
    sizes = net.op("Shape", k)
    length = net.op("Slice", sizes, whole(net, 2), whole(net, 3))
    joint = net.op("Concat", whole(net, -1), length, whole(net, 4), axis=0)
    apart = net.op("Concat", net.op("Slice", sizes, whole(net, 0), whole(net, 2)), whole(net, 4), length, axis=0)
    k = net.op("Reshape", net.op("Transpose", net.op("Reshape", k, joint), perm=[0, 2, 1]), apart)
    context = net.op("Transpose", net.op("MatMul", net.op("Softmax", net.op("MatMul", q, k), axis=-1), v), perm=[0, 2, 1, 3])
    return net.op("MatMul", net.op("Reshape", context, net.ints(0, 0, 12)), out), [(values, 1), (out, 0)]


def recurrent(net: Net, x: str) -> tuple[str, list[tuple[str, int]]]:
    """What an LSTM reads at each time step."""
    stem, weight = net.weight(6, 8), net.weight(1, 20, 8)
    y = net.op("Transpose", net.op("Relu", net.op("MatMul", x, stem)), perm=[1, 0, 2])
    states = net.op("LSTM", y, weight, net.weight(1, 20, 5), hidden_size=5, outputs=2)
    return net.op("MatMul", net.op("Squeeze", states[0], net.ints(1)), net.weight(5, 2)), [(stem, 1), (weight, 2)]


def picked_token(net: Net, x: str) -> tuple[str, list[tuple[str, int]]]:
    """One token of each sample, by GatherND."""
    stem, out = net.weight(6, 8), net.weight(8, 5)
    place = net.op("ArgMax", net.op("ReduceMax", x, axes=[2], keepdims=0), axis=1)
    picked = net.op("GatherND", net.op("MatMul", x, stem), place, batch_dims=1)
    return net.op("MatMul", picked, out), [(stem, 1), (out, 0)]


def spectrum(net: Net, x: str) -> tuple[str, list[tuple[str, int]]]:
    """A speech detector's front end: logarithms of magnitudes, without their mean over the frequencies."""
    a, b = net.weight(6, 7), net.weight(7, 2)
    sizes = net.op("Log", net.op("Add", net.op("Mul", net.op("Abs", net.op("MatMul", x, a)), scalar(net, 9.0)), scalar(net, 1.0)))
    centred = net.op("Sub", sizes, net.op("ReduceMean", sizes, axes=[-1], keepdims=1))
    return net.op("MatMul", centred, b), [(a, 1), (b, 0)]


def linear_attention(net: Net, x: str) -> tuple[str, list[tuple[str, int]]]:
    """A channel of ones beside the values counts how much attention there was."""
    values, out = net.weight(6, 8), net.weight(8, 5)
    v = net.op("Pad", net.op("MatMul", x, values), net.ints(0, 0, 0, 0, 0, 1), net.constant(np.float32(1.0)))
    context = net.op("MatMul", net.op("Softmax", net.op("MatMul", x, net.op("Transpose", x, perm=[0, 2, 1])), axis=-1), v)
    top = net.op("Slice", context, net.ints(0), net.ints(-1), net.ints(2))
    total = net.op("Slice", context, net.ints(-1), net.ints(2**31), net.ints(2))
    return net.op("MatMul", net.op("Div", top, total), out), [(values, 1), (out, 0)]


CASES: dict[str, Case] = {
    "root mean square": Case(rms_norm, ("N", 3, 6)),
    "gated": Case(gated, ("N", 3, 6)),
    "heads": Case(heads, ("N", "T", 6)),
    "positions": Case(positions, ("N", 3, 6)),
    "masked heads": Case(masked_heads, ("N", "T", 6)),
    "detour": Case(detour, ("N", "T", 6)),
    "recurrent": Case(recurrent, ("N", "T", 6)),
    "picked token": Case(picked_token, ("N", "T", 6)),
    "spectrum": Case(spectrum, ("N", 3, 6)),
    "linear attention": Case(linear_attention, ("N", "T", 6)),
    "spread mask": Case(spread_mask, ("N", "T", 6)),
    "mask of heads": Case(mask_of_heads, ("N", "T", 6)),
}


@pytest.mark.parametrize("name", CASES)
def test_channels_of(name: str) -> None:
    case = CASES[name]
    net = Net(opset=case.opset)
    output, removable = case.build(net, net.input(*case.shape))
    graph = Graph(prepare(net.model(output)))
    plan = find(graph)
    coupling = trace(graph, plan)
    rng = np.random.default_rng(0)
    units: set[int] = set()
    for tensor, axis in removable:
        lines = [tie.units.tolist() for tie in coupling.ties if (tie.initializer, tie.axis) == (tensor, axis)]
        assert lines, f"{tensor} along {axis} is not tied to any unit"
        assert not [coupling.pinned[unit] for unit in lines[0] if unit in coupling.pinned]
        units |= set(lines[0])
    drawn = sorted(units)
    off = frozenset(unit for unit in drawn if rng.random() < 0.4) - {drawn[0]} or {drawn[-1]}
    flags = initializer_masks(plan, unit_masks(graph, plan, coupling, frozenset(off), Masks({}, {})))
    operation = operate(apply_weights(graph.model, applied(graph, flags)))
    onnx.checker.check_model(operation.model, full_check=True)
    left = {item.name: tuple(item.dims) for item in operation.model.graph.initializer}
    for tie in coupling.ties:
        if (tie.initializer, tie.axis) in removable:
            assert left[tie.initializer][tie.axis] == int((~np.isin(tie.units, list(off))).sum()), tie.initializer
    for seed in range(3):
        feed = {graph.inputs[0].name: feed_of(case, seed)}
        assert_same_outputs(insert(graph, flags), operation.model, feed, 1e-5)
        check_mask_is_surgery(graph.model, feed, np.random.default_rng(seed))


def feed_of(case: Case, seed: int) -> Any:
    """Another batch and other lengths each time."""
    lengths = {name: 2 + seed + place for place, name in enumerate(sorted({name for name in case.shape if isinstance(name, str)}))}
    shape = [lengths[item] if isinstance(item, str) else item for item in case.shape]
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
