"""Weights in bodies that run many times, or now and then: measured over all runs, pruned in place."""

from __future__ import annotations

from typing import Any

import control_cases as cases
import loop_cases as loops
import numpy as np
import onnx
import onnxruntime
import pytest

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
        assert "inside a body" in reasons["w2"]
        assert not reasons["w1"]


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
