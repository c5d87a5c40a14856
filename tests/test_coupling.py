"""What cannot be cut says why: the reason names the node and its operator."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from builders import Net
from onnx import TensorProto, helper, numpy_helper

from relief_onnx.graph import Graph
from relief_onnx.layers import find
from relief_onnx.walk import trace

C = 4


def layer_norm(net: Net, x: str) -> Any:
    y = net.op("Transpose", x, perm=[0, 2, 3, 1])
    return net.op("Transpose", net.op("LayerNormalization", y, net.bias(C)), perm=[0, 3, 1, 2])


def captured(net: Net, x: str) -> Any:
    """An If whose bodies read the layer's output from outside."""
    branches = {}
    for key, operator in (("then_branch", "Relu"), ("else_branch", "Neg")):
        out = helper.make_tensor_value_info(f"{key}_out", TensorProto.FLOAT, [2, C, 5, 5])
        branches[key] = helper.make_graph([helper.make_node(operator, [x], [out.name])], key, [], [out])
    return net.op("If", net.constant(np.asarray(True)), **branches)


def counted(net: Net, x: str) -> Any:
    return net.op("Mul", x, net.op("Cast", net.op("Size", x), to=1))


REFUSALS: dict[str, tuple[Callable[[Net, str], Any], str]] = {
    "Softmax": (lambda net, x: net.op("Softmax", x, axis=1), r"Softmax node Softmax_\d+: it looks at all channels together"),
    "LayerNormalization": (layer_norm, r"LayerNormalization node LayerNormalization_\d+: it looks at all channels together"),
    "unknown operator": (lambda net, x: net.op("LRN", x, size=3), r"LRN node LRN_\d+: it is not in the operator table"),
    "Slice": (
        lambda net, x: net.op("Slice", x, net.ints(0), net.ints(3), net.ints(1)),
        r"Slice node Slice_\d+: it is not in the operator table",
    ),
    "sum over channels": (
        lambda net, x: net.op("Mul", x, net.op("ReduceMax", x, axes=[1], keepdims=1)),
        r"ReduceMax node ReduceMax_\d+: it sums over channels",
    ),
    "padded channels": (
        lambda net, x: net.op("Pad", x, net.ints(0, 1, 0, 0, 0, 0, 0, 0)),
        r"Pad node Pad_\d+: it pads a tracked axis",
    ),
    "number of elements": (counted, r"Size node Size_\d+: it is not in the operator table"),
    "body": (captured, r"If node If_\d+|the body of a control flow node reads it"),
    "training": (
        lambda net, x: net.op(
            "BatchNormalization", x, *(net.constant(np.ones(C, np.float32)) for _ in range(4)), outputs=3, training_mode=1
        )[0],
        r"BatchNormalization node BatchNormalization_\d+: it is in training mode",
    ),
}


def pinned(build: Callable[[Net, str], Any]) -> tuple[set[int], dict[int, str]]:
    net = Net()
    x = net.input(2, 3, 5, 5)
    y = net.op("Conv", x, net.weight(C, 3, 3, 3), net.bias(C), pads=[1] * 4)
    z = build(net, y)
    model = net.model(net.op("GlobalMaxPool", net.op("Conv", z, net.weight(2, 3 if "slice" in z else 5 if "pad" in z else C, 1, 1))))
    graph = Graph(model)
    coupling = trace(graph, find(graph))
    return set(coupling.outputs[0].tolist()), coupling.pinned


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal_names_the_node_and_the_operator(name: str) -> None:
    build, pattern = REFUSALS[name]
    units, reasons = pinned(build)
    assert units <= set(reasons)
    for unit in units:
        assert re.search(pattern, reasons[unit]), reasons[unit]


def test_a_plain_chain_is_free() -> None:
    units, reasons = pinned(lambda net, x: net.op("Relu", x))
    assert len(units) == C
    assert not units & set(reasons)


def test_an_output_of_the_model_is_pinned() -> None:
    net = Net()
    model = net.model(net.op("Relu", net.op("Conv", net.input(2, 3, 5, 5), net.weight(C, 3, 1, 1))))
    graph = Graph(model)
    assert set(trace(graph, find(graph)).pinned.values()) == {"it is an output of the model"}


def test_a_residual_add_ties_channel_to_channel() -> None:
    net = Net()
    x = net.input(2, 3, 5, 5)
    a, b = (net.op("Conv", x, net.weight(C, 3, 1, 1)) for _ in range(2))
    model: onnx.ModelProto = net.model(net.op("Conv", net.op("Add", a, b), net.weight(2, C, 1, 1)))
    graph = Graph(model)
    coupling = trace(graph, find(graph))
    assert np.array_equal(coupling.outputs[0], coupling.outputs[1])
    assert len(set(coupling.outputs[0].tolist())) == C


def test_a_weight_that_is_computed_is_a_row_with_its_reason() -> None:
    weight = helper.make_node("ConstantOfShape", ["shape"], ["w"], value=numpy_helper.from_array(np.array([0.5], np.float32)))
    conv = helper.make_node("Conv", ["x", "w"], ["y"], name="conv")
    graph = helper.make_graph(
        [weight, conv],
        "computed",
        [helper.make_tensor_value_info("x", 1, [1, 2, 8, 8])],
        [helper.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(np.array([4, 2, 3, 3]), "shape")],
    )
    plan = find(Graph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)))
    assert not plan.layers
    (row,) = plan.skipped
    assert (row.node, row.weight, row.shape) == ("conv", "w", (4, 2, 3, 3))
    assert row.reason == "its weight is not stored in the file but computed by ConstantOfShape when the model runs"
