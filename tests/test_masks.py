"""The paper's rule against a naive loop, and masks as Mul nodes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import pytest
from builders import Net
from hypothesis import given
from hypothesis import strategies as st
from laws import masked_and_cut
from numpy.typing import NDArray
from onnx import numpy_helper

import relief_onnx
from relief_onnx.graph import Graph
from relief_onnx.layers import find
from relief_onnx.masks import Masks, applied, initializer_masks, insert, keep_prefix, make_masks
from relief_onnx.scoring import LayerScore
from relief_onnx.session import Session

# Multiples of 1/64 add up without rounding, so that ties and sums that hit alpha exactly are decided alike.
rows = st.lists(st.integers(0, 8), min_size=1, max_size=12)
alphas = st.sampled_from([1 / 64, 0.125, 0.25, 0.5, 0.75, 0.875, 63 / 64, 1.0])


def naive(row: list[float], alpha: float) -> list[bool]:
    keep, total = [False] * len(row), 0.0
    for i in sorted(range(len(row)), key=lambda i: (-row[i], i)):
        if row[i] == 0 or (alpha < 1 and total >= alpha * math.fsum(row)):
            break
        keep[i], total = True, total + row[i]
    return keep


@given(st.lists(rows, min_size=1, max_size=4), alphas)
def test_keep_prefix(table: list[list[int]], alpha: float) -> None:
    width = min(len(row) for row in table)
    shares = np.asarray([row[:width] for row in table]) / 64
    assert keep_prefix(shares, alpha).tolist() == [naive(row, alpha) for row in shares.tolist()]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(0.01, 1.0))
def test_the_prefix_reaches_alpha_and_is_the_shortest(row: list[float], alpha: float) -> None:
    shares = np.asarray([row])
    keep = keep_prefix(shares, alpha)[0]
    total = sum(row)
    assert not total or shares[0, keep].sum() >= alpha * total * (1 - 1e-12)
    if keep.any() and alpha < 1:
        assert shares[0, keep].sum() - shares[0, keep].min() <= alpha * total * (1 + 1e-12)
        assert shares[0, ~keep].max(initial=0.0) <= shares[0, keep].min()


def test_alpha_one_removes_exact_zeros_only() -> None:
    assert keep_prefix(np.asarray([[0.5, 1e-300, 0.0, 0.5]]), 1.0).tolist() == [[True, True, False, True]]


def test_ties_remove_no_more_than_asked() -> None:
    assert keep_prefix(np.full((1, 4), 0.25), 0.5).tolist() == [[True, True, False, False]]


def tied() -> tuple[onnx.ModelProto, str]:
    """There and back with one weight [3, 5]: as [out, in] and as [in, out]."""
    net = Net()
    x = net.input("N", 5)
    weight = net.weight(3, 5)
    y = net.op("Gemm", x, weight, net.bias(3), transB=1)
    return net.model(net.op("Gemm", net.op("Relu", y), weight, net.bias(5))), weight


def test_a_shared_weight_keeps_what_any_reader_keeps() -> None:
    model, weight = tied()
    plan = find(Graph(model))
    rng = np.random.default_rng(0)
    table = [rng.random((3, 5)), rng.random((5, 3))]
    scores = {layer.name: LayerScore(weight, layer.name, item, np.zeros(len(item))) for layer, item in zip(plan.layers, table, strict=True)}
    masks = make_masks(plan, scores, frozenset([weight]), lambda layer: 0.5, True)
    wanted = np.asarray([naive(row, 0.5) for row in table[0].tolist()]) | np.asarray([naive(row, 0.5) for row in table[1].tolist()]).T
    assert np.array_equal(masks.keep[weight], wanted)
    assert not wanted.all()
    assert masks.bias_keep[weight].all()


@pytest.mark.parametrize("criterion", ["flow", "relief"])
@pytest.mark.parametrize("alpha", [0.3, 0.7])
def test_a_weight_that_two_nodes_read_in_two_layouts_is_pruned(alpha: float, criterion: str) -> None:
    model, weight = tied()
    x = np.random.default_rng(1).standard_normal((64, 5)).astype(np.float32)
    result = relief_onnx.prune(model, [{model.graph.input[0].name: x}], alpha=alpha, criterion=criterion, storage="dense")
    (row,) = result.report["layers"]
    (array,) = [numpy_helper.to_array(item) for item in result.model.graph.initializer if item.name == weight]
    assert row["weights_kept"] == row["connections_kept"] == np.count_nonzero(array) < 15


def small(opset: int, ir_version: int) -> tuple[onnx.ModelProto, NDArray[Any]]:
    net = Net(opset=opset, ir_version=ir_version)
    x = net.input(2, 3, 5, 5)
    y = net.op("Conv", x, net.weight(6, 3, 3, 3), net.bias(6))
    y = net.op("Conv", net.op("Relu", y), net.weight(4, 6, 1, 1), net.bias(4))
    return net.model(y), net.rng.standard_normal((2, 3, 5, 5)).astype(np.float32)


@pytest.mark.parametrize(("opset", "ir_version"), [(7, 3), (9, 3), (7, 4), (17, 8)])
def test_masks_are_visible_nodes_of_a_valid_model(opset: int, ir_version: int) -> None:
    model, x = small(opset, ir_version)
    graph = Graph(model)
    plan = find(graph)
    masks = {layer.weight: np.random.default_rng(1).random(layer.view.shape[:2]) < 0.5 for layer in plan.layers}
    flags = initializer_masks(plan, Masks(masks, {name: np.ones(len(keep), bool) for name, keep in masks.items()}))
    masked = insert(graph, flags)
    onnx.checker.check_model(masked, full_check=True)
    added = [node for node in masked.graph.node if node.op_type == "Mul"]
    assert [list(node.input) for node in added] == [[name, f"{name}/mask"] for name in masks]
    fed = {item.name for item in masked.graph.input}
    assert all((f"{name}/mask" in fed) == (ir_version < 4) for name in masks)
    before = onnx.ModelProto()
    before.CopyFrom(model)
    for item in before.graph.initializer:
        if item.name in masks:
            item.raw_data = applied(graph, flags)[item.name].tobytes()
    feed = {model.graph.input[0].name: x}
    assert np.array_equal(Session(masked).run(feed)[0], Session(before).run(feed)[0])


@pytest.mark.parametrize(("opset", "ir_version"), [(7, 3), (9, 3), (7, 4)])
def test_old_models_are_cut_too(opset: int, ir_version: int) -> None:
    model, x = small(opset, ir_version)
    masked, operation = masked_and_cut(model, np.random.default_rng(2))
    onnx.checker.check_model(operation.model, full_check=True)
    feed = {model.graph.input[0].name: x}
    np.testing.assert_allclose(Session(operation.model).run(feed)[0], Session(masked).run(feed)[0], rtol=1e-5, atol=1e-6)
    assert operation.units_removed
