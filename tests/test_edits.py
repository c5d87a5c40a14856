"""What a cut changes in nodes: the least that is needed, and nothing where sizes follow by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from architectures import conv
from builders import Net
from graph_attention import sizes_of
from laws import assert_same_outputs
from onnx import numpy_helper

from relief_onnx.channels import unit_masks
from relief_onnx.edits import set_initializer
from relief_onnx.graph import Graph
from relief_onnx.layers import find
from relief_onnx.masks import Masks, applied, initializer_masks, insert
from relief_onnx.model import prepare
from relief_onnx.sizes import size_origin, sizes_behind
from relief_onnx.surgery import apply_weights, operate
from relief_onnx.walk import trace

C, S = 8, 6
Build = Callable[[Net, str], Any]


def without(build: Build, *channels: int) -> onnx.ModelProto:
    """Conv -> build -> Conv after those channels of the first one are switched off and cut; checked against the masked model."""
    net = Net(seed=1, opset=18)
    x = net.input("N", 3, S, S)
    middle = build(net, conv(net, x, 3, C))
    middle, width = middle if isinstance(middle, tuple) else (middle, C)
    graph = Graph(prepare(net.model(conv(net, middle, width, 4))))
    plan = find(graph)
    coupling = trace(graph, plan)
    gone = frozenset(coupling.outputs[plan.layers[0].node][list(channels)].tolist())
    assert not gone & set(coupling.pinned)
    flags = initializer_masks(plan, unit_masks(graph, plan, coupling, gone, Masks({}, {})))
    operation = operate(apply_weights(graph.model, applied(graph, flags)))
    feed = {x: net.rng.standard_normal((2, 3, S, S)).astype(np.float32)}
    assert_same_outputs(insert(graph, flags), operation.model, feed, 1e-5)
    assert operation.channels[plan.layers[0].name][1] <= C - len(channels)
    return operation.model


def inputs_of(model: onnx.ModelProto, operator: str) -> list[Any]:
    """The constant inputs of the only such node, as lists."""
    stored = {item.name: numpy_helper.to_array(item).tolist() for item in model.graph.initializer}
    (node,) = [node for node in model.graph.node if node.op_type == operator]
    return [stored[name] for name in node.input if name in stored]


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def cut(net: Net, x: str, start: int, end: int, *step: int) -> tuple[Any, int]:
    steps = [net.ints(*step)] if step else []
    return net.op("Slice", x, net.ints(start), net.ints(end), net.ints(1), *steps), len(range(C)[start : end : step[0] if step else 1])


@pytest.mark.parametrize(
    ("build", "operator", "expected"),
    [
        (lambda net, x: cut(net, x, 2, -1), "Slice", [[0], [4], [1]]),
        (lambda net, x: (net.op("Gather", x, net.ints(7, -8, 3, 1), axis=1), 4), "Gather", [[1, 0]]),
        (lambda net, x: (net.op("Pad", x, net.ints(0, 1, 0, 0, 0, 2, 0, 0)), C + 3), "Pad", [[0, 0, 0, 0, 0, 0, 0, 0]]),
        (lambda net, x: (net.op("Tile", x, net.ints(1, 2, 1, 1)), 2 * C), "Tile", [[1, 2, 1, 1]]),
        (lambda net, x: net.op("Concat", *net.op("Split", x, net.ints(2, 6), outputs=2, axis=1), axis=1), "Split", [[1, 5]]),
    ],
)  # fmt: skip
def test_places_follow(build: Build, operator: str, expected: list[Any]) -> None:
    """Channels that nobody takes go as well, so the places are among those that are left."""
    assert inputs_of(without(build, 1, 3), operator) == expected


def test_a_step_becomes_a_list_where_it_is_no_longer_regular() -> None:
    model = without(lambda net, x: cut(net, x, 0, C, 2), 1, 2)
    assert "Slice" not in operators(model)
    assert len(inputs_of(model, "Gather")[0]) == 3


def test_sizes_that_are_read_off_the_tensor_need_no_edit() -> None:
    def build(net: Net, x: str) -> Any:
        y = net.op("Relu", net.op("Reshape", x, sizes_of(net, x, "0", "1", -1)))
        return net.op("Reshape", y, net.op("Shape", x))

    model = without(build, 1, 2)
    assert "Add" not in operators(model)
    assert "Mul" not in operators(model)


def test_a_computed_size_that_would_change_is_written_though_its_axis_stays() -> None:
    """[2, C / 2] where one of the halves goes whole: C / 2 is computed from C, which is now half as large."""

    def build(net: Net, x: str) -> Any:
        half = net.op("Div", net.op("Gather", net.op("Shape", x), net.ints(1), axis=0), net.ints(2))
        y = net.op("Reshape", x, net.op("Concat", net.ints(0, 2), half, net.ints(S, S), axis=0))
        y = net.op("GroupNormalization", net.op("Reshape", y, net.ints(0, C, S, S)), net.bias(2), net.bias(2), num_groups=2)
        z = net.op("Reshape", y, net.op("Concat", net.ints(0, 2), half, net.ints(S, S), axis=0))
        return net.op("Reshape", net.op("Relu", z), net.ints(0, C, S, S))

    model = without(build, 0, 1, 2, 3)
    layer = next(layer for layer in find(Graph(model)).layers if layer.input == "x1")
    assert layer.out_channels == C // 2


def test_where_a_size_comes_from() -> None:
    net = Net()
    x = net.input("N", C, S, S)
    y = net.op("Reshape", x, sizes_of(net, x, "0", "1", -1))
    half = net.op("Div", net.op("Gather", net.op("Shape", x), net.ints(1), axis=0), net.ints(2))
    z = net.op("Reshape", y, net.op("Concat", net.ints(0), half, net.ints(2, -1), axis=0))
    graph = Graph(net.model(z))
    first, second = (node.input[1] for node in graph.nodes if node.op_type == "Reshape")
    assert [size_origin(graph, first, place) for place in range(3)] == [(x, 0), (x, 1), None]
    assert size_origin(graph, second, 1) is None
    assert [sizes_behind(graph, second, place) for place in range(4)] == [set(), {(x, 1)}, set(), set()]


def test_a_number_stays_a_number() -> None:
    model = onnx.ModelProto()
    set_initializer(model, "a", np.asarray(3))
    assert list(model.graph.initializer[0].dims) == []
