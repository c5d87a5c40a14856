"""Repair of layers that add what is no bias of theirs: numbers made at run time or of other shapes, with Gemm's beta."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from builders import Net
from numpy.typing import NDArray

import relief_onnx
from relief_onnx.graph import Graph
from relief_onnx.layers import find
from relief_onnx.model import prepare
from relief_onnx.repair import repair
from relief_onnx.session import Session

ROWS = 32


def gemm(c: Callable[[Net, str], str], weight_first: bool = False, **values: Any) -> onnx.ModelProto:
    """A Gemm whose C is what that makes, of another layer's output or of nothing, and a layer behind it."""
    net = Net(seed=1)
    x = net.input(ROWS, 8)
    first = net.op("MatMul", x, net.weight(8, 6))
    added = c(net, first)
    if weight_first:
        y = net.op("Gemm", net.weight(6, 8), x, added, transB=1, **values)
        return net.model(net.op("MatMul", net.op("Transpose", y, perm=[1, 0]), net.weight(6, 3)))
    return net.model(net.op("MatMul", net.op("Gemm", x, net.weight(8, 6), added, **values), net.weight(6, 3)))


def conv() -> onnx.ModelProto:
    net = Net(seed=1)
    x = net.input(ROWS, 4, 5, 5)
    mean = net.op("MatMul", net.op("ReduceMean", x, axes=[0, 2, 3], keepdims=0), net.weight(4, 6))
    return net.model(net.op("Conv", net.op("Conv", x, net.weight(6, 4, 3, 3), mean), net.weight(3, 6, 1, 1)))


def mean(net: Net, first: str, axis: int, keep: int = 1) -> str:
    return str(net.op("ReduceMean", first, axes=[axis], keepdims=keep))


CASES: dict[str, Callable[[], onnx.ModelProto]] = {
    "as large as the output, beta": lambda: gemm(lambda net, first: first, beta=2.5),
    "a row": lambda: gemm(lambda net, first: mean(net, first, 0), beta=2.5),
    "a vector": lambda: gemm(lambda net, first: mean(net, first, 0, 0), beta=-1.5, alpha=0.5),
    "a column": lambda: gemm(lambda net, first: mean(net, first, 1)),
    "a scalar": lambda: gemm(lambda net, first: str(net.op("ReduceMean", first, keepdims=0)), beta=3.0),
    "made of weights alone": lambda: gemm(lambda net, first: str(net.op("Neg", net.bias(6)))),
    "stored, as large as the output": lambda: gemm(lambda net, first: net.bias(ROWS, 6), beta=2.0),
    "stored column": lambda: gemm(lambda net, first: net.bias(ROWS, 1)),
    "the weight first": lambda: gemm(lambda net, first: str(net.op("Transpose", first, perm=[1, 0])), weight_first=True, beta=2.0),
    "the weight first, a row": lambda: gemm(lambda net, first: net.bias(1, ROWS), weight_first=True),
    "a convolution's": conv,
}


def data(model: onnx.ModelProto, seed: int = 0) -> dict[str, NDArray[Any]]:
    item = model.graph.input[0]
    shape = [size.dim_value for size in item.type.tensor_type.shape.dim]
    return {item.name: (np.random.default_rng(seed).standard_normal(shape) + 0.5).astype(np.float32)}


@pytest.mark.parametrize("name", CASES)
def test_a_repair_of_what_lost_nothing_changes_nothing(name: str) -> None:
    model = prepare(CASES[name]())
    feed, weights = data(model), frozenset(layer.weight for layer in find(Graph(model)).layers)
    repaired, rows = repair(Graph(model), model, {}, weights, [feed], threads=1)
    assert not any(row.reason for row in rows)
    np.testing.assert_allclose(Session(repaired).run(feed)[0], Session(model).run(feed)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_repair_brings_the_outputs_closer(name: str) -> None:
    model = CASES[name]()
    feeds = [data(model, seed) for seed in range(8)]
    wanted, errors = Session(model).run(feeds[0])[0], list[float]()
    for method in ("none", "least-squares"):
        options: dict[str, Any] = {"criterion": "magnitude", "granularity": "weight", "keep": "70%", "storage": "dense", "threads": 1}
        result = relief_onnx.prune(model, feeds, repair=method, **options)
        errors.append(float(np.square(Session(result.model).run(feeds[0])[0] - wanted).mean()))
    assert errors[1] < 0.9 * errors[0]
