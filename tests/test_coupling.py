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

import relief_onnx
from relief_onnx.graph import Graph
from relief_onnx.layers import find
from relief_onnx.walk import trace

C = 4


def captured(net: Net, x: str) -> Any:
    """An If whose bodies read the layer's output from outside."""
    branches = {}
    for key, operator in (("then_branch", "Relu"), ("else_branch", "Neg")):
        out = helper.make_tensor_value_info(f"{key}_out", TensorProto.FLOAT, [2, C, 5, 5])
        branches[key] = helper.make_graph([helper.make_node(operator, [x], [out.name])], key, [], [out])
    return net.op("If", net.constant(np.asarray(True)), **branches)


def taken_at_run_time(net: Net, x: str) -> Any:
    numbers = net.op("ArgMax", net.op("GlobalMaxPool", net.inputs[0][0]), axis=1, keepdims=0)
    numbers = net.op("Slice", net.op("Reshape", numbers, net.ints(-1)), net.ints(0), net.ints(1), net.ints(0))
    return net.op("Add", x, net.op("Gather", x, numbers, axis=1))


def over_several_axes(net: Net, x: str) -> Any:
    return net.op("LayerNormalization", x, net.bias(C, 5, 5), axis=1)


def untracked(net: Net, x: str) -> Any:
    """The sum with what no layer made: an input of the model with as many channels."""
    return net.op("Add", x, net.input(2, C, 5, 5))


def shown_weight(net: Net, x: str) -> Any:
    """A layer whose weight is an output of the model."""
    net.outputs.append(net.weight(C, C, 1, 1))
    return net.op("Conv", x, net.outputs[0])


REFUSALS: dict[str, tuple[Callable[[Net, str], Any], str]] = {
    "Softmax": (lambda net, x: net.op("Softmax", x, axis=1), r"Softmax node Softmax_\d+: it looks at all channels together"),
    "LogSoftmax": (lambda net, x: net.op("LogSoftmax", x, axis=1), r"LogSoftmax node LogSoftmax_\d+: it looks at all channels together"),
    "LayerNormalization over several axes": (
        over_several_axes,
        r"LayerNormalization node LayerNormalization_\d+: it looks at all channels together",
    ),
    "unknown operator": (lambda net, x: net.op("LRN", x, size=3), r"LRN node LRN_\d+: it is not in the operator table"),
    "weight that is an output": (shown_weight, r"Conv node Conv_\d+: the weight itself is an output of the model"),
    "largest of channels": (
        lambda net, x: net.op("Mul", x, net.op("ReduceMax", x, axes=[1], keepdims=1)),
        r"ReduceMax node ReduceMax_\d+: it reduces over channels",
    ),
    "number of the largest": (
        lambda net, x: net.op("Mul", x, net.op("Cast", net.op("ArgMax", x, axis=1), to=1)),
        r"ArgMax node ArgMax_\d+: it compares channels",
    ),
    "sum up to here": (
        lambda net, x: net.op("CumSum", x, net.constant(np.asarray(1, np.int64))),
        r"CumSum node CumSum_\d+: it adds channels up",
    ),
    "channels at run time": (taken_at_run_time, r"Gather node Gather_\d+: which channels it takes is computed at run time"),
    "reflected channels": (
        lambda net, x: net.op("Slice", net.op("Pad", x, net.ints(0, 1, 0, 0, 0, 0, 0, 0), mode="reflect"), net.ints(1), net.ints(C + 1),
                              net.ints(1)),
        r"Pad node Pad_\d+: it pads channels, and not with a constant",
    ),
    "one group": (
        lambda net, x: net.op("GroupNormalization", x, net.bias(C), net.bias(C), num_groups=1),
        r"GroupNormalization node GroupNormalization_\d+: it normalises over all channels",
    ),
    "one channel alone": (
        lambda net, x: net.op("Mul", x, net.op("Slice", x, net.ints(0), net.ints(1), net.ints(1))),
        r"Slice node Slice_\d+ takes it out alone",
    ),
    "untracked": (untracked, r"Add node Add_\d+: x\d+ and what it meets are not both tracked"),
    "products of two kinds of channels": (
        lambda net, x: net.op("Einsum", x, net.op("Tanh", x), equation="nchw,ndhw->ncd"),
        r"Einsum node Einsum_\d+: it makes products of two kinds of channels",
    ),
    "diagonal": (
        lambda net, x: net.op("Einsum", net.op("Reshape", x, net.ints(2, C, 25)), net.bias(C, C), equation="ncp,cc->ncp"),
        r"Einsum node Einsum_\d+: its equation takes a diagonal",
    ),
    "body": (captured, r"If node If_\d+|the body of a control flow node reads it"),
    "training": (
        lambda net, x: net.op(
            "BatchNormalization", x, *(net.constant(np.ones(C, np.float32)) for _ in range(4)), outputs=3, training_mode=1
        )[0],
        r"BatchNormalization node BatchNormalization_\d+: it is in training mode",
    ),
}  # fmt: skip


def pinned(name: str) -> tuple[set[int], dict[int, str]]:
    """The units of a convolution that something reads, and what is pinned and why."""
    build = REFUSALS[name][0] if name in REFUSALS else lambda net, x: net.op("Relu", x)
    net = Net(opset=21 if name == "one group" else 17, ir_version=9)
    y = net.op("Conv", net.input(2, 3, 5, 5), net.weight(C, 3, 3, 3), net.bias(C), pads=[1] * 4)
    z = build(net, y)
    if name in ("products of two kinds of channels", "diagonal"):
        z = net.op("Unsqueeze", z, net.ints(3))
    model = net.model(net.op("GlobalMaxPool", net.op("Conv", z, net.weight(2, C, 1, 1))))
    graph = Graph(model)
    coupling = trace(graph, find(graph))
    return set(coupling.outputs[0].tolist()), dict(coupling.pinned)


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal_names_the_node_and_the_operator(name: str) -> None:
    pattern = REFUSALS[name][1]
    units, reasons = pinned(name)
    assert units & set(reasons) if name == "one channel alone" else units <= set(reasons)
    for unit in units & set(reasons):
        assert re.search(pattern, reasons[unit]), reasons[unit]


def test_a_number_of_channels_that_is_computed_with_pins_nothing() -> None:
    net = Net()
    y = net.op("Conv", net.input(2, 3, 5, 5), net.weight(C, 3, 3, 3))
    y = net.op("Mul", y, net.op("Cast", net.op("Gather", net.op("Shape", y), net.ints(1), axis=0), to=1))
    graph = Graph(net.model(net.op("Conv", y, net.weight(2, C, 1, 1))))
    coupling = trace(graph, find(graph))
    assert not set(coupling.outputs[0].tolist()) & set(coupling.pinned)


def test_a_plain_chain_is_free() -> None:
    units, reasons = pinned("nothing")
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


def test_a_weight_that_nodes_compute() -> None:
    """From stored numbers alone, which `prune` computes once, or from what the model is given: that is where flow passes evenly."""
    net = Net()
    x, given = net.input("N", 3, 6, 6), net.input("M", 5)
    v = net.weight(4, 3, 3, 3)
    norm = net.op("ReduceL2", v, axes=[1, 2, 3])
    h = net.op("Conv", net.op("Conv", x, net.weight(3, 3, 1, 1)), net.op("Div", v, norm))
    kernel = net.op("Reshape", net.op("ReduceMean", net.op("Gemm", given, net.weight(5, 8)), axes=[0]), net.ints(2, 4, 1, 1))
    model = net.model(net.op("Conv", h, kernel))
    reasons = {row.node: row.reason for row in find(Graph(model)).skipped}
    first, second = (node.name for node in model.graph.node if node.op_type == "Conv" and node.input[1] not in net.initializers)
    reader = next(node for node in model.graph.node if v in node.input)
    made = f"{reader.op_type} node {reader.name} computes the weight of Conv node {first} from it; fold constants first"
    computed = "its weight is not stored in the file but computed by {} when the model runs"
    assert reasons == {reader.name: f"{made}, with onnxsim for example", second: computed.format("Reshape")}
    feed = {x: np.random.default_rng(0).standard_normal((8, 3, 6, 6)), given: np.random.default_rng(1).standard_normal((8, 5))}
    report = relief_onnx.prune(model, [{name: value.astype(np.float32) for name, value in feed.items()}], keep="60%").report
    assert {row["node"]: row["reason"] for row in report["flow"]["evenly"]} == {second: computed.format("Reshape")}
