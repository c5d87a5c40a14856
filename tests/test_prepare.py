"""What a model looks like while we work on it: one vector per reader, local functions inlined; and what the file gets back."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
from builders import Net
from onnx import helper, numpy_helper

import relief_onnx
from relief_onnx.model import hoist, prepare, share_again
from relief_onnx.session import Session


def two_norms() -> tuple[onnx.ModelProto, str, str]:
    """Two branches whose norms share one vector of scales."""
    net = Net()
    x = net.input("N", 3, 6, 6)
    scale, shift = net.constant(np.linspace(0.5, 1.5, 8, dtype=np.float32)), net.bias(8)
    branches = [net.op("Conv", x, net.weight(8, 3, 3, 3), net.bias(8)) for _ in range(2)]
    first, second = (net.op("InstanceNormalization", branch, scale, shift) for branch in branches)
    y = net.op("Concat", first, net.op("Relu", second), axis=1)
    return net.model(net.op("Conv", y, net.weight(4, 16, 1, 1))), x, scale


def names(model: onnx.ModelProto) -> set[str]:
    return {item.name for item in model.graph.initializer}


def test_a_shared_vector_has_a_copy_per_reader_and_is_shared_again() -> None:
    model, _, scale = two_norms()
    prepared = prepare(model)
    assert f"{scale}/1" in names(prepared)
    assert names(share_again(prepared, model)) == names(model)
    assert names(hoist(model)) == names(model)


def test_a_copy_that_was_cut_stays() -> None:
    model, _, scale = two_norms()
    prepared = prepare(model)
    copy = next(item for item in prepared.graph.initializer if item.name == f"{scale}/1")
    copy.CopyFrom(numpy_helper.from_array(np.ones(5, np.float32), copy.name))
    assert f"{scale}/1" in names(share_again(prepared, model))


def test_branches_with_one_vector_are_pruned_apart() -> None:
    model, x, _ = two_norms()
    data = [{x: np.random.default_rng(seed).random((2, 3, 6, 6), np.float32)} for seed in range(2)]
    report = relief_onnx.prune(model, data, granularity="channel", alpha=0.6, round_to=1).report
    groups = [row for row in report["groups"] if row["readers"]]
    assert [row["units"] for row in groups] == [8, 8]
    assert all(row["units_kept"] < 8 for row in groups)
    assert report["input"]["params"] == sum(int(np.prod(item.dims)) for item in model.graph.initializer)


def test_local_functions_are_inlined() -> None:
    body = [
        helper.make_node("Conv", ["a", "w", "b"], ["c"], name="inner"),
        helper.make_node("Relu", ["c"], ["d"]),
    ]
    function = helper.make_function("local", "Block", ["a", "w", "b"], ["d"], body, [helper.make_opsetid("", 17)])
    net = Net()
    x = net.input("N", 3, 6, 6)
    weights = [(net.weight(8, 3, 3, 3), net.bias(8)), (net.weight(4, 8, 3, 3), net.bias(4))]
    y = x
    for number, (weight, bias) in enumerate(weights):
        net.nodes.append(helper.make_node("Block", [y, weight, bias], [f"y{number}"], domain="local"))
        y = f"y{number}"
    tensors = [numpy_helper.from_array(value, name) for name, value in net.initializers.items()]
    inputs, outputs = (helper.make_tensor_value_info(name, 1, ["N", size, None, None]) for name, size in ((x, 3), (y, 4)))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    graph = helper.make_graph(net.nodes, "net", [inputs], [outputs], tensors)
    plain = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=8)
    feed = {x: np.random.default_rng(0).random((2, 3, 6, 6), np.float32)}
    result = relief_onnx.prune(plain, [feed, feed], granularity="channel", alpha=0.6, round_to=1)
    assert result.report["groups"][0]["units_kept"] < 8
    assert not result.model.functions
    assert Session(result.model, 1).run(feed)[0].shape == (2, 4, 2, 2)


def test_what_working_sessions_return_holds_no_more_than_itself() -> None:
    """Small outputs of eight sessions that each make 256 MB on the way: held, they must not hold that."""
    nodes = [helper.make_node("Tile", ["x", "times"], ["large"]), helper.make_node("ReduceMax", ["large"], ["y"], axes=[0])]
    stored = [numpy_helper.from_array(np.array([1 << 14, 1]), "times")]
    info = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 1 << 12]) for name in "xy"]
    model = helper.make_model(
        helper.make_graph(nodes, "g", info[:1], info[1:], stored), opset_imports=[helper.make_opsetid("", 13)], ir_version=8
    )
    feed = {"x": np.ones((1, 1 << 12), np.float32)}
    before = _resident()
    held = [Session(model, 1, working=True).run(feed)[0] for _ in range(8)]
    assert _resident() - before < 3 * (256 << 20)
    assert all((value == 1).all() for value in held)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
