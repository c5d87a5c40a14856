"""Weights that a file computes from stored numbers: normalised, standardised, scaled, or sums of several."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from builders import Net

import relief_onnx
from relief_onnx.overview import overview
from relief_onnx.prepared import prepare
from relief_onnx.session import Session

Build = Callable[[Net], str]


def number(net: Net, value: float) -> str:
    return net.constant(np.float32(value))


def normalised(net: Net) -> str:
    """Weight norm, as PyTorch writes it where constants are not folded."""
    v, g = net.weight(8, 4, 3, 3), net.weight(8, 1, 1, 1)
    return str(net.op("Mul", v, net.op("Div", g, net.op("ReduceL2", v, axes=[1, 2, 3], keepdims=1))))


def standardised(net: Net) -> str:
    """With mean and deviation written out."""
    w = net.weight(8, 4, 3, 3)
    left = net.op("Sub", w, net.op("ReduceMean", w, axes=[1, 2, 3], keepdims=1))
    spread = net.op("ReduceMean", net.op("Mul", left, left), axes=[1, 2, 3], keepdims=1)
    return str(net.op("Div", left, net.op("Sqrt", net.op("Add", spread, number(net, 1e-5)))))


def as_a_batch(net: Net) -> str:
    """As timm writes it: a norm over the weight as if it were a batch."""
    w = net.weight(8, 4, 3, 3)
    flat = net.op("Reshape", w, net.ints(1, 8, -1))
    scaled = net.op("InstanceNormalization", flat, net.constant(np.ones(8, np.float32)), net.constant(np.zeros(8, np.float32)))
    return str(net.op("Reshape", scaled, net.ints(8, 4, 3, 3)))


def folded(net: Net) -> str:
    """A norm's scale moved into the weight by nodes of the graph."""
    gamma, variance = net.weight(8), net.constant(net.rng.uniform(0.5, 1.5, 8).astype(np.float32))
    factor = net.op("Div", gamma, net.op("Sqrt", net.op("Add", variance, number(net, 1e-3))))
    return str(net.op("Mul", net.weight(8, 4, 3, 3), net.op("Reshape", factor, net.ints(8, 1, 1, 1))))


def adapted(net: Net) -> str:
    """A stored weight plus a product of two thin ones."""
    thin = net.op("MatMul", net.weight(8, 2), net.weight(2, 36))
    return str(net.op("Add", net.weight(8, 4, 3, 3), net.op("Reshape", net.op("Mul", thin, number(net, 0.5)), net.ints(8, 4, 3, 3))))


def scaled(net: Net) -> str:
    return str(net.op("Mul", net.weight(8, 4, 3, 3), number(net, 0.3)))


CASES: dict[str, Build] = {
    "normalised": normalised, "standardised": standardised, "as a batch": as_a_batch, "folded": folded, "adapted": adapted,
    "scaled": scaled,
}  # fmt: skip


def model(build: Build) -> onnx.ModelProto:
    """A convolution with that weight, and a dense layer with a stored one."""
    net = Net(seed=1)
    x = net.op("Relu", net.op("Conv", net.input("N", 4, 6, 6), build(net), net.bias(8)))
    y = net.op(
        "Gemm", net.op("Flatten", net.op("GlobalAveragePool", x)), net.constant(net.rng.normal(size=(8, 3)).astype(np.float32), "last")
    )
    return net.model(y)


def samples(count: int = 24) -> list[dict[str, Any]]:
    return [{"x1": np.random.default_rng(2).standard_normal((count, 4, 6, 6)).astype(np.float32)}]


@pytest.mark.parametrize("options", [{"granularity": "weight", "repair": "least-squares"}, {"granularity": "channel", "round_to": 1}])
@pytest.mark.parametrize("case", CASES)
def test_they_are_pruned_as_what_the_layer_reads(case: str, options: dict[str, Any]) -> None:
    given = model(CASES[case])
    ready = prepare(given)
    assert [layer.view.shape for layer in ready.plan.layers] == [(8, 4, 3, 3), (3, 8)]
    np.testing.assert_allclose(Session(ready.graph.model).run(samples()[0])[0], Session(given).run(samples()[0])[0], rtol=1e-5, atol=1e-6)
    report = relief_onnx.prune(given, samples(), keep="60%", threads=1, **options).report
    assert {row["status"] for row in report["layers"]} <= {"pruned", "kept"}
    assert report["layers"][0]["weights"] == 288
    assert report["layers"][0]["weights_kept"] < 288
    (agreement,) = report["quality"]["agreement"].values()
    assert agreement["cosine"] > 0.9


@pytest.mark.parametrize("case", CASES)
def test_where_nothing_was_lost_the_file_computes_them_still(case: str) -> None:
    given = model(CASES[case])
    result = relief_onnx.prune(given, samples(), keep="90%", only="^last", mean_shift="off", storage="dense", threads=1)
    assert [node.op_type for node in result.model.graph.node] == [node.op_type for node in given.graph.node]


def test_what_another_node_reads_too_stays_and_says_why() -> None:
    given = model(scaled)
    name = given.graph.node[0].input[0]
    given.graph.node.append(onnx.helper.make_node("ReduceSum", [name], ["sum"], keepdims=0))
    given.graph.output.append(onnx.helper.make_tensor_value_info("sum", onnx.TensorProto.FLOAT, []))
    found = overview(given)
    assert [row["op"] for row in found["layers"]] == ["Gemm"]
    (row,) = [row for row in found["skipped"] if row["weight"] == name]
    assert re.fullmatch(r"Mul node \S+ computes the weight of Conv node \S+ from it; fold constants first, .*", row["reason"])


def joint() -> onnx.ModelProto:
    """Two projections stored as one, taken apart by the width of the input, as PyTorch writes attention to another sequence."""
    net = Net(seed=1)
    x = net.input("N", 5, 6)
    weight, zero = net.weight(12, 6), net.ints(0)
    width = net.op("Unsqueeze", net.op("Gather", net.op("Shape", x), net.constant(np.int64(2))), zero)
    bounds = [zero, width, net.op("Mul", width, net.ints(2))]
    parts = [net.op("Slice", weight, *ends, zero) for ends in (bounds[:2], bounds[1:])]
    a, b = (net.op("Relu", net.op("MatMul", x, net.op("Transpose", part, perm=[1, 0]))) for part in parts)
    last = net.constant(net.rng.normal(size=(12, 3)).astype(np.float32), "last")
    return net.model(net.op("MatMul", net.op("Concat", a, b, axis=-1), last))


@pytest.mark.parametrize(
    "options", [{"granularity": "weight"}, {"granularity": "weight", "only": "^last"}, {"granularity": "channel", "round_to": 1}]
)
def test_parts_that_are_cut_by_sizes_are_layers(options: dict[str, Any]) -> None:
    feed = {"x1": np.random.default_rng(2).standard_normal((24, 5, 6)).astype(np.float32)}
    given = joint()
    assert [layer.view.shape for layer in prepare(given).plan.layers] == [(6, 6), (6, 6), (3, 12)]
    report = relief_onnx.prune(given, [feed], keep="60%", threads=1, **options).report
    assert report["totals"]["weights"] == 108
    assert report["quality"]["agreement"][given.graph.output[0].name]["cosine"] > 0.9
