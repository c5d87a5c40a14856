"""Weights in bodies that run many times, or now and then: measured over all runs, pruned in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import control_cases as cases
import loop_cases as loops
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

import relief_onnx
from relief_onnx.control import settle
from relief_onnx.data import open_dataset
from relief_onnx.model import input_specs
from relief_onnx.overview import overview
from relief_onnx.prepared import prepare

OPTIONS: dict[str, dict[str, Any]] = {
    "relief": {"criterion": "relief", "alpha": 0.9},
    "wanda": {"criterion": "wanda", "alpha": 0.9, "storage": "dense"},
    "biases": {"criterion": "relief", "alpha": 0.9, "bias": "prune"},
}
BODIES = [(operator, storage) for operator in ("Scan", "Loop") for storage in ("initializer", "constant", "captured")]


def outputs(model: onnx.ModelProto, feed: Any) -> list[Any]:
    return list(onnxruntime.InferenceSession(model.SerializeToString()).run(None, feed))


def with_body(model: onnx.ModelProto) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name in ("again", "choice"))


@pytest.mark.parametrize(("operator", "storage"), BODIES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("gemm", [False, True])
def test_as_without_control_flow(operator: str, storage: str, options: str, gemm: bool) -> None:
    given = cases.weights()
    model = loops.looped(given, operator, storage, gemm)
    found = relief_onnx.prune(model, loops.samples(), mean_shift="off", **OPTIONS[options])
    wanted = relief_onnx.prune(loops.plain(given), loops.samples(), mean_shift="off", **OPTIONS[options])
    assert set(found.masks.keep) == set(wanted.masks.keep) == {"w1", "w2", "w3", "w4"}
    for weight, keep in wanted.masks.keep.items():
        np.testing.assert_array_equal(found.masks.keep[weight], keep)
    assert not found.masks.keep["w2"].all()
    other = loops.samples(seed=5)[0]
    np.testing.assert_allclose(outputs(found.model, other)[0], outputs(wanted.model, other)[0], rtol=1e-4, atol=1e-5)
    node, before = with_body(found.model), with_body(model)
    assert list(node.output) == list(before.output)
    assert node.doc_string == before.doc_string
    assert [item.output[0] for item in found.model.graph.node[-2:]] == ["jr", "y"]


@pytest.mark.parametrize(("operator", "storage"), BODIES)
def test_nothing_pruned_nothing_changed(operator: str, storage: str) -> None:
    model = loops.looped(cases.weights(), operator, storage)
    ready = prepare(model)
    opened = settle(ready, open_dataset(loops.samples(), input_specs(model)), samples=None, seed=0, threads=1)
    assert {layer.weight for layer in opened.plan.layers} == {"w1", "w2", "w3", "w4"}
    assert {layer.name for layer in opened.plan.layers} == {"node_h1", "node_k1", "node_j_then", "node_y"}
    onnx.checker.check_model(opened.graph.model, full_check=True)
    feed = loops.samples()[0]
    np.testing.assert_array_equal(outputs(opened.graph.model, feed)[0], outputs(model, feed)[0])
    back = opened.restored(opened.graph.model)
    assert back.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


@pytest.mark.parametrize("options", [{}, {"repair": "least-squares"}, {"granularity": "channel+weight"}, {"granularity": "weight"}])
@pytest.mark.parametrize("operator", ["Scan", "Loop"])
def test_flow(operator: str, options: dict[str, Any]) -> None:
    """Verified inside `prune`; R of what is in the body is what the node carries."""
    found = relief_onnx.prune(loops.looped(cases.weights(), operator, "constant"), loops.samples(), keep="50%", **options)
    rows = {row["weight"]: row for row in found.report["layers"]}
    assert rows["w2"]["relevance"] == pytest.approx(1)
    assert rows["w3"]["relevance"] == pytest.approx(1)
    assert {row["status"] for row in rows.values()} <= {"pruned", "kept"}
    assert rows["w2"]["channels"] == [cases.INNER, cases.INNER]
    assert found.report["quality"]["agreement"]["y"]["cosine"] > 0.8
    if "repair" in options:
        reasons = {row["weight"]: row["reason"] for row in found.report["repair"]["layers"]}
        assert not any(reasons.values())


def test_a_body_that_never_runs() -> None:
    model = loops.looped(cases.weights(), "Loop", "initializer")
    next(item for item in model.graph.initializer if item.name == "steps").raw_data = np.int64(0).tobytes()
    del model.graph.node[-2:]
    model.graph.node.append(cases.node("MatMul", "h_all w5", "y"))
    w5 = np.random.default_rng(0).normal(0, 1, (cases.HIDDEN, cases.OUT)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(w5, "w5"))
    model.graph.output.append(cases.value("j", None, "N", cases.JOINT))
    found = relief_onnx.prune(model, loops.samples(), keep="50%", output_weight=(("y", 1.0), ("j", 0.0)))
    rows = {row["weight"]: row for row in found.report["layers"]}
    assert rows["w2"]["reason"] == "it lives inside the body of Loop node again, which never ran on the calibration data"
    assert "depends on the data" in {row["weight"]: row for row in overview(model)["skipped"]}["w2"]["reason"]


def flagged(given: cases.Arrays, storage: str) -> onnx.ModelProto:
    """The condition is an input of the model."""
    model = cases.branched(given, storage)
    kept = [node for node in model.graph.node if node.output[0] not in ("zero", "edge", "a", "s", "c")]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    model.graph.input.append(cases.value("c", kind=onnx.TensorProto.BOOL))
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.mark.parametrize("storage", ["initializer", "constant", "captured"])
def test_both_branches_run(storage: str) -> None:
    """Statistics of a branch are those of the samples for which it runs."""
    given = cases.weights()
    rng = np.random.default_rng(3)
    feeds = [{"x": rng.normal(0, 1, (16, cases.X)).astype(np.float32) * (1 + (n % 2)), "c": np.array(n % 2 == 0)} for n in range(8)]
    options = {"criterion": "relief", "alpha": 0.9, "mean_shift": "off"}
    found = relief_onnx.prune(flagged(given, storage), feeds, **options)
    ran = [{"x": feed["x"]} for feed in feeds if feed["c"]]
    wanted = relief_onnx.prune(cases.plain(given), ran, **options)
    rows = {row["weight"]: row for row in found.report["layers"]}
    assert rows["v"]["status"] == "pruned"
    for weight in ("w2", "w3"):
        np.testing.assert_array_equal(found.masks.keep[weight], wanted.masks.keep[weight])
        assert rows[weight]["status"] == "pruned"
    relief_onnx.prune(flagged(given, storage), feeds, keep="50%", repair="least-squares")


def test_a_late_sample_that_takes_the_other_branch_is_noticed() -> None:
    given = cases.weights()
    feeds = [{"x": cases.samples(4, n)[0]["x"], "c": np.array(n != 19)} for n in range(20)]
    model = flagged(given, "initializer")
    ready = prepare(model)
    every = settle(ready, open_dataset(feeds, input_specs(model)), samples=None, seed=0, threads=1)
    assert {layer.weight for layer in every.plan.layers} == {"w1", "w2", "w3", "w4", "v"}
    few = settle(ready, open_dataset(feeds[:19], input_specs(model)), samples=None, seed=0, threads=1)
    assert {layer.weight for layer in few.plan.layers} == {"w1", "w2", "w3", "w4"}


def convolved(looped: bool) -> onnx.ModelProto:
    """A convolution and a product with a transposed weight and with the weight on the left, at every step of x [5, N, 8]."""
    rng = np.random.default_rng(0)
    stored = {
        "k": rng.normal(0, 1, (6, 1, 3)).astype(np.float32), "kb": rng.normal(0, 1, 6).astype(np.float32),
        "left": rng.normal(0, 1, (7, 6)).astype(np.float32), "t": rng.normal(0, 1, (cases.OUT, 8)).astype(np.float32),
        "one": np.array([1]), "ends": np.array([2]),
    }  # fmt: skip
    step = [
        cases.node("Unsqueeze", "h one", "u"), cases.node("Conv", "u k kb", "conv", pads=[1, 1]), cases.node("Relu", "conv", "r"),
        cases.node("MatMul", "left r", "l"), cases.node("Transpose", "t", "tt", perm=[1, 0]), cases.node("MatMul", "l tt", "m"),
        cases.node("ReduceSum", "m one", "out", keepdims=0),
    ]  # fmt: skip
    if looped:
        body = helper.make_graph(step, "body", [cases.value("h", "N", 8)], [cases.value("out", "N", cases.OUT)])
        return loops.model([helper.make_node("Scan", ["x"], ["y"], name="again", body=body, num_scan_inputs=1)], stored)
    start = cases.node("Reshape", "x rows", "h")
    step[-1].output[0] = "flat"
    end = cases.node("Reshape", "flat back", "y")
    sizes = {"rows": np.array([-1, 8]), "back": np.array([loops.STEPS, -1, cases.OUT])}
    return loops.model([start, *step, end], stored | sizes)


@pytest.mark.parametrize("granularity", ["connection", "weight"])
@pytest.mark.parametrize("criterion", ["relief", "wanda"])
def test_other_layers(granularity: str, criterion: str) -> None:
    options = {"criterion": criterion, "alpha": 0.8, "mean_shift": "off", "granularity": granularity}
    found = relief_onnx.prune(convolved(True), loops.samples(), **options)
    wanted = relief_onnx.prune(convolved(False), loops.samples(), **options)
    assert set(found.masks.keep) == set(wanted.masks.keep) == {"k", "left", "t"}
    for weight, keep in wanted.masks.keep.items():
        np.testing.assert_array_equal(found.masks.keep[weight], keep)
    assert found.report["input"]["macs"] == wanted.report["input"]["macs"]
    feed = loops.samples(seed=5)[0]
    np.testing.assert_allclose(outputs(found.model, feed)[0], outputs(wanted.model, feed)[0], rtol=1e-4, atol=1e-5)
    relief_onnx.prune(convolved(True), loops.samples(), keep="50%", granularity=granularity)


def test_a_state_that_goes_round() -> None:
    """R of a recurrent network in a Loop: both weights are pruned, and the first one's mean goes into the bias that only it has."""
    rng = np.random.default_rng(0)
    stored = {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in (("wx", (8, 10)), ("wh", (10, 10)), ("wo", (10, 4)))}
    step = [
        cases.node("Gather", "x i", "xi", axis=0), cases.node("Gemm", "xi wx b", "a"), cases.node("MatMul", "s wh", "c"),
        cases.node("Add", "a c", "d"), cases.node("Tanh", "d", "s_next"), cases.node("Identity", "going", "again"),
        cases.node("Identity", "s_next", "row"),
    ]  # fmt: skip
    inputs = [cases.value("i", kind=onnx.TensorProto.INT64), cases.value("going", kind=onnx.TensorProto.BOOL), cases.value("s", None, 10)]
    outs = [cases.value("again", kind=onnx.TensorProto.BOOL), cases.value("s_next", None, 10), cases.value("row", None, 10)]
    body = helper.make_graph(step, "body", inputs, outs)
    nodes = [
        cases.node("Gather", "x zero", "x0", axis=0), cases.node("MatMul", "x0 wz", "z"),
        helper.make_node("Loop", ["steps", "", "z"], ["last", "rows"], name="again", body=body), cases.node("MatMul", "rows wo", "y"),
    ]  # fmt: skip
    more = {"b": rng.normal(0, 1, 10).astype(np.float32), "wz": np.zeros((8, 10), np.float32) + 0.1, "zero": np.array(0)}
    model = loops.model(nodes, stored | more | {"steps": np.array(loops.STEPS)})
    found = relief_onnx.prune(model, loops.samples(), keep="75%")
    rows = {row["weight"]: row for row in found.report["layers"]}
    assert all(rows[weight]["status"] == "pruned" for weight in ("wx", "wh", "wo"))
    assert found.report["quality"]["agreement"]["y"]["cosine"] > 0.8
    assert "node_a" in found.report["mean_shift"]["moved"]
    left = {row["node"]: row["reason"] for row in found.report["mean_shift"]["left"]}
    assert "no stored bias" in left["node_c"]


def test_bodies_in_bodies() -> None:
    """A Loop in a branch that runs is measured, and so is a branch in a Loop; the other is left, with the reason."""
    given = cases.weights()
    inner = loops.looped(given, "Scan", "constant")
    scan = with_body(inner)
    wrap = helper.make_graph([scan], "then", [], [cases.value("j", loops.STEPS, "N", cases.JOINT)])
    other = helper.make_graph(
        [cases.node("MatMul", "x v", "j_else")], "else", [], [cases.value("j_else", loops.STEPS, "N", cases.JOINT)],
        [onnx.numpy_helper.from_array(given["v"], "v")],
    )  # fmt: skip
    choice = helper.make_node("If", ["c"], ["j_if"], name="choice", then_branch=wrap, else_branch=other)
    nodes = [node for node in inner.graph.node if node.name != "again"]
    nodes[-2].input[0] = "j_if"
    nodes[3:3] = [cases.node("ReduceMax", "x", "m", keepdims=0), cases.node("Greater", "m low", "c"), choice]
    stored = {item.name: onnx.numpy_helper.to_array(item) for item in inner.graph.initializer} | {"low": np.array(-100, np.float32)}
    model = loops.model(nodes, stored)
    options = {"criterion": "relief", "alpha": 0.9, "mean_shift": "off"}
    found = relief_onnx.prune(model, loops.samples(), **options)
    wanted = relief_onnx.prune(loops.plain(given), loops.samples(), **options)
    for weight, keep in wanted.masks.keep.items():
        np.testing.assert_array_equal(found.masks.keep[weight], keep)
    assert with_body(found.model).name == "choice"
    body = helper.make_graph(
        [helper.make_node("If", ["flag"], ["o"], name="in_loop", then_branch=_branch("wa"), else_branch=_branch("wb"))], "body",
        [cases.value("h", "N", 8)], [cases.value("o", "N", 4)],
    )  # fmt: skip
    turned = loops.model(
        [
            cases.node("ReduceMax", "x", "m", keepdims=0), cases.node("Greater", "m low", "flag"),
            helper.make_node("Scan", ["x"], ["q"], name="again", body=body, num_scan_inputs=1), cases.node("MatMul", "q last", "y"),
        ],
        {"low": np.array(-100, np.float32), "last": np.eye(4, dtype=np.float32) + 0.1},
    )  # fmt: skip
    rows = {row["weight"]: row for row in relief_onnx.prune(turned, loops.samples(), keep="60%").report["layers"]}
    assert rows["wa"]["status"] == "pruned"
    where = "it lives inside the else_branch of If node in_loop inside the body of Scan node again"
    assert rows["wb"]["reason"] == f"{where}, which never ran on the calibration data"


def _branch(name: str) -> onnx.GraphProto:
    weight = np.random.default_rng(0).normal(0, 1, (8, 4)).astype(np.float32)
    made = cases.node("MatMul", f"h {name}", f"o_{name}")
    return helper.make_graph([made], name, [], [cases.value(f"o_{name}", "N", 4)], [onnx.numpy_helper.from_array(weight, name)])


@pytest.mark.parametrize("operator", ["Scan", "Loop"])
def test_onnxruntime_folds_what_rebuilds_a_packed_weight(operator: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    given = cases.weights() | {"w2": rng.normal(0, 1, (cases.HIDDEN, 600)).astype(np.float32), "b2": np.zeros(600, np.float32)}
    given["w3"] = rng.normal(0, 1, (600, cases.JOINT)).astype(np.float32)
    found = relief_onnx.prune(loops.looped(given, operator, "constant"), loops.samples(), granularity="weight", keep="20%")
    assert {row["weight"]: row for row in found.report["layers"]}["w2"]["storage"] != "dense"
    assert found.report["output"]["bytes"] < found.report["input"]["bytes"]
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(found.model.SerializeToString(), options)
    left = onnx.load(tmp_path / "optimised.onnx")
    assert len(left.graph.node) <= 8, [node.op_type for node in left.graph.node]
    assert "w2" in {item.name for item in left.graph.initializer}


def test_channels_within_a_body_stay_and_the_reason_says_what_can_go() -> None:
    model = loops.looped(cases.weights(), "Loop", "initializer", False)
    found = relief_onnx.prune(model, loops.samples(), granularity="channel+weight", keep="60%", round_to=1)
    told = {group["reason"] for group in found.report["groups"]} | {row["reason"] for row in found.report["layers"]}
    assert any("inside Loop node again, where whole channels stay" in reason for reason in told if reason), told


@pytest.mark.parametrize(("operator", "opset"), [("Scan", 8), ("Scan", 10), ("Loop", 10)])
def test_files_of_an_early_opset(operator: str, opset: int) -> None:
    """A Scan of opset 8 has a batch and takes the lengths of its sequences."""
    rng = np.random.default_rng(0)
    batch, first = ((2,), [""]) if opset == 8 else ((), [])
    own = [cases.node("MatMul", "i w", "p"), cases.node("Add", "p s", "s_out"), cases.node("Identity", "s_out", "o")]
    given, made, stored = [cases.value("s", 6), cases.value("i", 8)], [cases.value("s_out", 6), cases.value("o", 6)], {"w": (8, 6)}
    if operator == "Loop":
        own = [helper.make_node("Gather", ["xx", "n"], ["i"], axis=0), cases.node("Identity", "go", "again"), *own]
        given = [cases.value("n", kind=onnx.TensorProto.INT64), cases.value("go", kind=onnx.TensorProto.BOOL), given[0]]
        made = [cases.value("again", kind=onnx.TensorProto.BOOL), *made]
    tensors = [onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name) for name, shape in stored.items()]
    body = helper.make_graph(own, "body", given, made, tensors)
    inputs = ["steps", "", "start"] if operator == "Loop" else [*first, "start", "xx"]
    count = {} if operator == "Loop" else {"num_scan_inputs": 1}
    nodes = [
        cases.node("MatMul", "x w1", "xx"),
        helper.make_node(operator, inputs, ["end", "all"], name="again", body=body, **count),
        cases.node("MatMul", "all w4", "y"),
    ]
    held = {"w1": rng.standard_normal((8, 8)), "w4": rng.standard_normal((6, 3)), "start": np.zeros((*batch, 6))}
    main = [onnx.numpy_helper.from_array(value.astype(np.float32), name) for name, value in held.items()]
    main += [onnx.numpy_helper.from_array(np.int64(5), "steps")] if operator == "Loop" else []
    graph = helper.make_graph(nodes, "net", [cases.value("x", *batch, 5, 8)], [cases.value("y", *batch, 5, 3)], main)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=4)
    onnx.checker.check_model(model)
    data = [{"x": rng.standard_normal((*batch, 5, 8)).astype(np.float32)} for _ in range(8)]
    rows = {row["weight"]: row for row in relief_onnx.prune(model, data, keep="50%").report["layers"]}
    assert (rows["w1"]["status"], rows["w"]["status"]) == ("pruned", "skipped")
    advice = f"not looked into at opset {opset}: export the model at opset 11 or later"
    assert rows["w"]["reason"] == f"it lives inside the body of {operator} node again, which is {advice}"
    assert rows["w"]["reason"] in {row["reason"] for row in overview(model)["skipped"]}
