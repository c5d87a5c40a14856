"""Weights in branches: pruned as without control flow, where the branch runs; the rest of the file stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import control_cases as cases
import numpy as np
import onnx
import onnxruntime
import pytest
from helpers import real_model
from onnx import numpy_helper

import relief_onnx
from relief_onnx.control import settle
from relief_onnx.data import open_dataset
from relief_onnx.lifting import body_of, lift, sink
from relief_onnx.model import input_specs
from relief_onnx.overview import overview
from relief_onnx.pack import packed_names, unpack
from relief_onnx.prepared import prepare
from relief_onnx.scoring import write_scores

OPTIONS: dict[str, dict[str, Any]] = {
    "flow": {"keep": "50%"},
    "relief": {"criterion": "relief", "alpha": 0.9},
    "weight, dense": {"keep": "40%", "storage": "dense"},
    "least squares": {"keep": "50%", "repair": "least-squares", "criterion": "flow"},
}


def outputs(model: onnx.ModelProto, feed: Any) -> list[Any]:
    return list(onnxruntime.InferenceSession(model.SerializeToString()).run(None, feed))


def the_if(model: onnx.ModelProto) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == "If")


@pytest.mark.parametrize("storage", ["initializer", "constant", "captured"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_as_without_control_flow(storage: str, nested: bool, options: str) -> None:
    given = cases.weights()
    model = cases.branched(given, storage, nested=nested, swapped=nested)
    data = cases.samples()
    found = relief_onnx.prune(model, data, **OPTIONS[options])
    wanted = relief_onnx.prune(cases.plain(given), data, **OPTIONS[options])
    assert set(found.masks.keep) == set(wanted.masks.keep) == {"w1", "w2", "w3", "w4"}
    for weight, keep in wanted.masks.keep.items():
        np.testing.assert_array_equal(found.masks.keep[weight], keep)
    assert any(not keep.all() for keep in wanted.masks.keep.values())
    other = cases.samples(seed=5)[0]
    np.testing.assert_allclose(outputs(found.model, other)[0], outputs(wanted.model, other)[0], rtol=1e-4, atol=1e-5)
    # The other branch and the condition are as they were.
    name = "then_branch" if nested else "else_branch"
    assert body_of(the_if(found.model), name) == body_of(the_if(model), name)
    assert the_if(found.model).doc_string == "which way"
    assert the_if(found.model).input == the_if(model).input
    assert not {"k1", "j_then"} & {name for node in found.model.graph.node for name in node.output}


@pytest.mark.parametrize("storage", ["initializer", "constant", "captured"])
@pytest.mark.parametrize("taken", ["then_branch", "else_branch"])
def test_there_and_back(storage: str, taken: str) -> None:
    model = cases.branched(cases.weights(), storage)
    lifted, record = lift(model, "j", taken)
    onnx.checker.check_model(lifted, full_check=True)
    feed = cases.samples()[0]
    np.testing.assert_array_equal(outputs(lifted, feed)[0], outputs(model, feed)[0])
    back = sink(lifted, record)
    assert back.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


@pytest.mark.parametrize("storage", ["initializer", "constant", "captured"])
def test_nothing_pruned_nothing_changed(storage: str) -> None:
    model = cases.branched(cases.weights(), storage, nested=True)
    ready = prepare(model)
    opened = settle(ready, open_dataset(cases.samples(), input_specs(model)), samples=None, seed=0, threads=1)
    assert {layer.weight for layer in opened.plan.layers} == {"w1", "w2", "w3", "w4"}
    back = opened.restored(opened.graph.model)
    feed = cases.samples()[0]
    np.testing.assert_array_equal(outputs(back, feed)[0], outputs(model, feed)[0])
    assert sorted(str(item) for item in back.graph.initializer) == sorted(str(item) for item in model.graph.initializer)
    assert [node.output for node in back.graph.node] == [node.output for node in model.graph.node]


def test_channels_inside_a_branch() -> None:
    given = cases.weights()
    model = cases.branched(given, "constant")
    found = relief_onnx.prune(model, cases.samples(), granularity="channel", keep="60%", round_to=1, storage="dense")
    kept = {row["weight"]: row for row in found.report["layers"]}
    assert kept["w2"]["channels"][1] < cases.INNER or kept["w1"]["channels"][1] < cases.HIDDEN
    assert kept["w3"]["channels"] == [cases.JOINT, cases.JOINT]  # the other branch makes them too
    branch = body_of(the_if(found.model), "then_branch")
    shapes = {node.output[0]: tuple(node.attribute[0].t.dims) for node in branch.node if node.op_type == "Constant"}
    assert shapes["w2"] == (kept["w1"]["channels"][1], kept["w2"]["channels"][1])
    # The branch that never ran computes what it did.
    session = onnxruntime.InferenceSession(_turned(found.model).SerializeToString())
    feed = cases.samples(seed=9)[0]
    np.testing.assert_allclose(session.run(None, feed)[0], _other(given, found.model, feed["x"]), rtol=1e-4, atol=1e-5)


def _turned(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the condition turned round."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    node = next(node for node in result.graph.node if node.op_type in ("Greater", "Less"))
    node.op_type = "Less" if node.op_type == "Greater" else "Greater"
    return result


def _other(given: cases.Arrays, model: onnx.ModelProto, x: Any) -> Any:
    last = next(numpy_helper.to_array(item) for item in model.graph.initializer if item.name == "w4")
    return np.maximum(x @ given["v"], 0) @ last


def test_a_weight_that_the_other_branch_reads_too() -> None:
    given = cases.weights()
    model = cases.branched(given, "captured")
    other = body_of(the_if(model), "else_branch")
    del other.node[:], other.initializer[:]
    other.node.extend([cases.node("MatMul", "x w1", "o1"), cases.node("MatMul", "o1 w2", "o2"), cases.node("MatMul", "o2 w3", "j_else")])
    onnx.checker.check_model(model, full_check=True)
    found = relief_onnx.prune(model, cases.samples(), keep="50%", storage="dense", mean_shift="off")
    assert found.masks.keep["w2"].mean() < 1
    assert found.masks.keep["w1"].mean() < 1
    feed = cases.samples(seed=9)[0]
    before = feed["x"] @ given["w1"] @ given["w2"] @ given["w3"]
    last = next(numpy_helper.to_array(item) for item in found.model.graph.initializer if item.name == "w4")
    np.testing.assert_allclose(outputs(_turned(found.model), feed)[0], np.maximum(before, 0) @ last, rtol=1e-4, atol=1e-5)
    rows = {row["weight"]: row for row in found.report["layers"]}
    assert rows["w2"]["status"] == "pruned"
    assert "never ran" in rows["w2/unrun"]["reason"]


def test_names_that_both_branches_have() -> None:
    given = cases.weights()
    model = cases.branched(given, "constant")
    other = body_of(the_if(model), "else_branch")
    other.initializer[0].name = "w2"
    other.node[0].input[1] = "w2"
    other.node[0].output[0] = other.output[0].name = "k1"
    onnx.checker.check_model(model, full_check=True)
    found = relief_onnx.prune(model, cases.samples(), keep="50%", mean_shift="off")
    assert {row["weight"]: row["status"] for row in found.report["layers"]}["choice/w2"] == "pruned"
    wanted = relief_onnx.prune(cases.plain(given), cases.samples(), keep="50%", mean_shift="off")
    np.testing.assert_array_equal(found.masks.keep["choice/w2"], wanted.masks.keep["w2"])
    assert body_of(the_if(found.model), "else_branch") == other
    feed = cases.samples(seed=9)[0]
    np.testing.assert_allclose(outputs(found.model, feed)[0], outputs(wanted.model, feed)[0], rtol=1e-4, atol=1e-5)


def test_what_never_ran_is_listed() -> None:
    found = relief_onnx.prune(cases.branched(cases.weights(), kind="never"), cases.samples(), keep="50%")
    rows = {row["weight"]: row for row in found.report["layers"]}
    assert rows["v"]["status"] in ("pruned", "kept")
    for weight in ("w2", "w3"):
        assert rows[weight]["reason"] == "it lives inside the then_branch of If node choice, which never ran on the calibration data"
    assert "branches" in found.report["timing"]
    assert "branches" not in relief_onnx.prune(cases.plain(cases.weights()), cases.samples(), keep="50%").report["timing"]


def test_old_files() -> None:
    """Below IR version 4 every initializer is an input of the model."""
    model = cases.branched(cases.weights(), "captured")
    other = body_of(the_if(model), "else_branch")
    model.graph.initializer.extend(other.initializer)
    del other.initializer[:]
    model.ir_version = 3
    model.graph.input.extend(cases.value(item.name, *item.dims) for item in model.graph.initializer)
    onnx.checker.check_model(model, full_check=True)
    rows = {row["weight"]: row for row in relief_onnx.prune(model, cases.samples(), keep="50%").report["layers"]}
    assert rows["w2"]["reason"].endswith("which is not looked into below IR version 4")
    assert rows["w1"]["status"] == "pruned"


def test_a_condition_on_the_size_of_the_batch() -> None:
    """One by one the samples take one branch, in batches the other: none is moved."""
    model = cases.branched(cases.weights())
    for node in model.graph.node:
        if node.output[0] == "a":
            node.op_type = "Shape"
        if node.output[0] == "s":
            node.CopyFrom(cases.node("Gather", "a zero", "s", axis=0))
        if node.output[0] == "edge":
            node.attribute[0].t.CopyFrom(numpy_helper.from_array(np.int64(1)))
    onnx.checker.check_model(model, full_check=True)
    opened = settle(prepare(model), open_dataset(cases.samples(), input_specs(model)), samples=None, seed=0, threads=1)
    assert {layer.weight for layer in opened.plan.layers if layer.inside is not None} == {"v"}
    rows = {row["weight"]: row for row in relief_onnx.prune(model, cases.samples(), keep="50%").report["layers"]}
    assert rows["v"]["status"] == "pruned"
    assert rows["w2"]["reason"].endswith("and no layer that can be pruned reads it there on samples one by one")


def test_inspect_knows_no_data() -> None:
    rows = {row["weight"]: row for row in overview(cases.branched(cases.weights()))["skipped"]}
    assert rows["w2"]["reason"].endswith("whether it can be pruned depends on the data, which have not run")
    captured = {row["weight"]: row for row in overview(cases.branched(cases.weights(), "captured"))["skipped"]}
    assert "depends on the data" in captured["w2"]["reason"]


def test_one_branch_for_good() -> None:
    """Where the model's signature decides, the other branch goes, and no data are needed to know it."""
    model = cases.branched(cases.weights(), "captured")
    for node in model.graph.node:
        if node.output[0] == "a":
            node.op_type = "Shape"
        if node.output[0] == "s":
            node.op_type = "Size"
            del node.attribute[:]
        if node.output[0] == "edge":
            node.attribute[0].t.CopyFrom(numpy_helper.from_array(np.int64(1)))
    onnx.checker.check_model(model, full_check=True)
    assert {row["weight"] for row in overview(model)["layers"]} == {"w1", "w2", "w3", "w4"}
    found = relief_onnx.prune(model, cases.samples(), keep="50%")
    wanted = relief_onnx.prune(cases.plain(cases.weights()), cases.samples(), keep="50%")
    assert all(np.array_equal(found.masks.keep[name], keep) for name, keep in wanted.masks.keep.items())
    assert not [node for node in found.model.graph.node if node.op_type == "If"]


def test_onnxruntime_folds_what_rebuilds_a_packed_weight(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    given = cases.weights() | {"w2": rng.normal(0, 1, (cases.HIDDEN, 600)).astype(np.float32), "b2": np.zeros(600, np.float32)}
    given["w3"] = rng.normal(0, 1, (600, cases.JOINT)).astype(np.float32)
    found = relief_onnx.prune(cases.branched(given, "constant"), cases.samples(), granularity="weight", keep="20%")
    rows = {row["weight"]: row for row in found.report["layers"]}
    assert rows["w2"]["storage"] != "dense"
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(found.model.SerializeToString(), options)
    left = onnx.load(tmp_path / "optimised.onnx")
    operators = {node.op_type for node in left.graph.node}
    assert not operators & {"ScatterND", "ScatterElements", "Scatter", "NonZero", "BitShift", "CumSum", "OneHot"}, operators
    assert "w2" in {item.name for item in left.graph.initializer}
    # It is unpacked where it is pruned again, and the branch reads it all the same.
    again = relief_onnx.prune(found.model, cases.samples(), granularity="weight", keep="10%")
    assert {row["weight"]: row for row in again.report["layers"]}["w2"]["status"] == "pruned"


def test_each_branch_with_data_of_its_own() -> None:
    rng = np.random.default_rng(0)
    given = cases.weights() | {"w2": rng.normal(0, 1, (cases.HIDDEN, 600)).astype(np.float32), "b2": np.zeros(600, np.float32)}
    given["w3"] = rng.normal(0, 1, (600, cases.JOINT)).astype(np.float32)
    first = relief_onnx.prune(cases.branched(given, "constant"), cases.samples(), granularity="weight", keep="20%")
    feed = cases.samples(seed=9)[0]
    second = relief_onnx.prune(_turned(first.model), cases.samples(), granularity="weight", keep="50%", only="^v$")
    # What the first run packed is packed again, though its branch did not run, and computes what it did.
    assert {"w2", "w3"} <= set(packed_names(first.model)) & set(packed_names(second.model))
    assert {row["weight"]: row for row in second.report["layers"]}["v"]["status"] == "pruned"
    np.testing.assert_array_equal(outputs(_turned(second.model), feed)[0], outputs(first.model, feed)[0])


@pytest.mark.parametrize("storage", ["constant", "captured"])
def test_training(storage: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    model = cases.branched(cases.weights(), storage, nested=True, swapped=True)
    onnx.save(cases.branched(cases.weights(seed=3), storage, nested=True, swapped=True), tmp_path / "first.onnx")
    training = {"repair": "distill", "epochs": 2, "batch": 32, "keep": "50%", "iterations": 2}
    for more in ({}, {"rewind": str(tmp_path / "first.onnx")}):
        found = relief_onnx.prune(model, cases.samples(128), **training, **more)
        rows = {row["weight"]: row for row in found.report["layers"]}
        assert rows["w2"]["status"] == "pruned"
        assert body_of(the_if(found.model), "then_branch") == body_of(the_if(model), "then_branch")
        again = relief_onnx.retrain(found.model, cases.samples(128), teacher=model, epochs=1, batch=32, validation=0)
        before, after = (_all_weights(item) for item in (unpack(found.model), unpack(again.model)))
        assert (before["w2"] != 0).tolist() == (after["w2"] != 0).tolist()
        assert (before["w2"] != after["w2"]).any()


def _all_weights(model: onnx.ModelProto) -> dict[str, Any]:
    """Of the main graph and of all bodies."""
    found = {}
    pending = [model.graph]
    while pending:
        graph = pending.pop()
        found |= {item.name: numpy_helper.to_array(item) for item in graph.initializer}
        held = [node for node in graph.node if node.op_type == "Constant"]
        found |= {node.output[0]: numpy_helper.to_array(node.attribute[0].t) for node in held}
        pending += [item.g for node in graph.node for item in node.attribute if item.type == onnx.AttributeProto.GRAPH]
    return found


def test_scores_from_a_file(tmp_path: Path) -> None:
    model = cases.branched(cases.weights(), "constant")
    write_scores(relief_onnx.score(model, cases.samples()), tmp_path / "scores.npz")
    found = relief_onnx.prune(model, cases.samples(), scores=tmp_path / "scores.npz", keep="50%")
    wanted = relief_onnx.prune(model, cases.samples(), keep="50%")
    assert found.model == wanted.model
    assert {"w2/score", "w3/flow"} <= set(np.load(tmp_path / "scores.npz").files)


def gates(read_twice: bool = False) -> onnx.ModelProto:
    """A Gemm whose weight is stored with its parts in another order, as PyTorch stores the gates of an LSTM."""
    given = cases.weights()
    rows = given["w1"].T.copy()
    stored = {"weight": np.concatenate([rows[8:], rows[:8]]), "b1": given["b1"], "zero": np.array([0]), "four": np.array([4])}
    stored |= {"end": np.array([12]), "w4": np.random.default_rng(1).normal(0, 1, (cases.HIDDEN, cases.OUT)).astype(np.float32)}
    nodes = [
        cases.node("Slice", "weight zero four zero", "last"), cases.node("Slice", "weight four end zero", "first"),
        cases.node("Concat", "first last", "whole", axis=0), cases.node("Gemm", "x whole b1", "h", transB=1),
        cases.node("MatMul", "h w4", "y"),
    ]  # fmt: skip
    if read_twice:
        nodes[3:3] = [cases.node("Gemm", "x weight", "unread", transB=1)]
    return cases.model(nodes, stored)


def test_weights_stored_in_another_order() -> None:
    model = gates()
    found = relief_onnx.prune(model, cases.samples(), keep="50%", storage="dense", mean_shift="off")
    assert set(found.masks.keep) == {"weight", "w4"}
    assert not {"Slice", "Concat"} & {node.op_type for node in found.model.graph.node}
    assert found.masks.keep["weight"].mean() < 1
    assert {layer["weight"] for layer in overview(gates(read_twice=True))["layers"]} == {"w4"}
    np.testing.assert_array_equal(outputs(prepare(model).graph.model, cases.samples()[0])[0], outputs(model, cases.samples()[0])[0])


@pytest.mark.parametrize("name", ["silero_vad_op18_ifless", "silero_vad_v6", "silero_vad_16k_op15"])
def test_speech_detectors(name: str) -> None:
    path = real_model(name)
    rng = np.random.default_rng(0)
    feeds = [
        {
            "input": rng.normal(0, 0.1, (1, 576)).astype(np.float32),
            "state": rng.normal(0, 0.3, (2, 1, 128)).astype(np.float32),
            "sr": np.array(16000, np.int64),
        }
        for _ in range(8)
    ]
    found = relief_onnx.prune(path, feeds, keep="60%")
    rows = found.report["layers"]
    convolutions = [row for row in rows if row["op"] == "Conv"]
    assert len(convolutions) == 6
    assert all(row["status"] in ("pruned", "kept") for row in convolutions)
    others = [row["reason"] for row in rows if row["status"] == "skipped" and row["op"] == "If"]
    assert all("never ran on the calibration data" in reason for reason in others)
    # At the other rate nothing changed, bit for bit.
    feed = feeds[0] | {"input": feeds[0]["input"][:, :288], "sr": np.array(8000, np.int64)}
    if name != "silero_vad_16k_op15":
        for before, after in zip(outputs(onnx.load(path), feed), outputs(found.model, feed), strict=True):
            np.testing.assert_array_equal(before, after)
