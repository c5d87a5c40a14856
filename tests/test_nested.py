"""Layers of bodies within bodies: scored with what they really meet, pruned in place, the file otherwise as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import nested_cases as nested
import numpy as np
import onnx
import onnxruntime
import pytest
from helpers import real_model
from numpy.typing import NDArray
from onnx import numpy_helper

import relief_onnx
from relief_onnx.control import settle
from relief_onnx.data import open_dataset
from relief_onnx.graph import Graph
from relief_onnx.model import input_specs
from relief_onnx.overview import overview
from relief_onnx.prepared import prepare
from relief_onnx.repair import repair, samples_of

names = pytest.mark.parametrize("name", nested.CASES)


def outputs(model: onnx.ModelProto, feed: Any) -> Any:
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, feed)[0]


def samples(model: onnx.ModelProto, count: int = 6) -> list[nested.Arrays]:
    inputs = {item.name for item in model.graph.input}
    return [{name: value for name, value in feed.items() if name in inputs} for feed in nested.feeds(count)]


def stored(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    """Every float tensor that a file holds, at any depth."""

    def walk(graph: onnx.GraphProto) -> Iterator[tuple[str, NDArray[Any]]]:
        yield from ((item.name, numpy_helper.to_array(item)) for item in graph.initializer)
        for node in graph.node:
            for item in node.attribute:
                if item.type == onnx.AttributeProto.TENSOR:
                    yield node.output[0], numpy_helper.to_array(item.t)
                elif item.type == onnx.AttributeProto.GRAPH:
                    yield from walk(item.g)

    return dict(walk(model.graph))


def shape_of(model: onnx.ModelProto) -> list[Any]:
    """Names and operators, at any depth."""

    def walk(graph: onnx.GraphProto) -> list[Any]:
        found: list[Any] = [[item.name for item in graph.input], [item.name for item in graph.output]]
        for node in graph.node:
            bodies = [walk(item.g) for item in node.attribute if item.type == onnx.AttributeProto.GRAPH]
            found.append((node.op_type, node.name, list(node.input), list(node.output), node.doc_string, bodies))
        return found

    return walk(model.graph)


@names
def test_nothing_pruned_nothing_changed(name: str) -> None:
    """Also: the working model is sound, computes the same, and has a layer for each weight that runs."""
    case = nested.CASES[name]
    model = case.model()
    data = samples(model)
    opened = settle(prepare(model), open_dataset(data, input_specs(model)), samples=None, seed=0, threads=1)
    assert {layer.weight for layer in opened.plan.layers} == case.weights - set(case.silent)
    onnx.checker.check_model(opened.graph.model, full_check=True)
    for feed in data:
        np.testing.assert_allclose(outputs(opened.graph.model, feed), outputs(model, feed), rtol=1e-5, atol=1e-6)
    back = opened.restored(opened.graph.model)
    assert back.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


@names
@pytest.mark.parametrize("criterion", ["relief", "wanda"])
def test_scores_are_of_what_weights_meet(name: str, criterion: str) -> None:
    case, given = nested.CASES[name], nested.weights()
    model = case.model()
    data = samples(model)
    met: dict[str, list[NDArray[Any]]] = {}
    for feed in data:
        for weight, rows in case.meets(feed, given):
            met.setdefault(weight, []).append(rows.reshape(-1, rows.shape[-1]))
    scores = relief_onnx.score(model, data, criterion=criterion)
    ready = settle(prepare(model), open_dataset(data, input_specs(model)), samples=None, seed=0, threads=1)
    by_weight = ready.plan.by_weight()
    assert met.keys() == by_weight.keys()
    for weight, layers in by_weight.items():
        x = np.concatenate(met[weight])
        magnitude = np.abs(given[weight] if weight in ("wg", "wl") else given[weight].T)
        size = np.abs(x).mean(0) if criterion == "relief" else np.sqrt(np.square(x).mean(0))
        wanted = magnitude * size
        found = np.mean([scores[layer.name].score.reshape(wanted.shape) for layer in layers], 0)
        if len(layers) > 1:
            continue  # each reader has rows of its own: see below
        bias = np.abs(given[case.bias[weight]]) if weight in case.bias else np.zeros(len(wanted))
        total = wanted.sum(1) + bias
        np.testing.assert_allclose(found, wanted / total[:, None], rtol=1e-4, atol=1e-6)
        sums = scores[layers[0].name].score.reshape(len(wanted), -1).sum(1) + scores[layers[0].name].bias_score
        np.testing.assert_allclose(sums, 1, rtol=1e-6)


def test_readers_of_one_weight_have_scores_of_their_own() -> None:
    case, given = nested.CASES["shared"], nested.weights()
    model = case.model()
    data = samples(model)
    scores = relief_onnx.score(model, data, criterion="relief")
    x = np.concatenate([feed["x"].reshape(-1, nested.X) for feed in data])
    chosen = np.concatenate([xi for feed in data for xi in feed["x"] if xi.sum() > 0])
    for layer, rows in (("node_main", x), ("node_direct", x), ("node_o_then", 2 * chosen)):
        wanted = np.abs(given["wa"].T) * np.abs(rows).mean(0)
        np.testing.assert_allclose(scores[layer].score, wanted / wanted.sum(1, keepdims=True), rtol=1e-4)


OPTIONS: dict[str, dict[str, Any]] = {
    "relief": {"criterion": "relief", "alpha": 0.8, "mean_shift": "off", "storage": "dense"},
    "flow": {"keep": "60%", "storage": "dense"},
    "packed": {"keep": "60%", "granularity": "weight"},
    "channels": {"keep": "70%", "granularity": "channel+weight", "round_to": 1, "storage": "dense"},
}


@names
@pytest.mark.parametrize("options", OPTIONS)
def test_pruned_in_place(name: str, options: str) -> None:
    """The file keeps its names and nodes at every depth; zeros are where the masks say; what never ran is as it was, and listed."""
    case = nested.CASES[name]
    model = case.model()
    data = samples(model)
    found = relief_onnx.prune(model, data, **OPTIONS[options])
    rows = {row["weight"]: row for row in found.report["layers"]}
    assert set(rows) == case.weights
    before, after = stored(model), stored(found.model)
    for weight in case.silent:
        assert rows[weight]["status"] == "skipped"
        assert "never ran" in rows[weight]["reason"]
        np.testing.assert_array_equal(after[weight], before[weight])
    assert {rows[weight]["status"] for weight in case.weights - set(case.silent)} <= {"pruned", "kept"}
    assert any(rows[weight]["status"] == "pruned" for weight in case.weights - {"last"})
    if options == "relief":
        assert shape_of(found.model) == shape_of(model)
        for weight, keep in found.masks.keep.items():
            mask = keep if weight in ("wg", "wl") else keep.T
            np.testing.assert_array_equal(after[weight], before[weight] * mask)
    onnx.checker.check_model(found.model, full_check=True)
    outputs(found.model, data[0])
    for field in ("input", "output"):
        assert [item.name for item in getattr(found.model.graph, field)] == [item.name for item in getattr(model.graph, field)]


@names
def test_inspect_knows_no_data(name: str) -> None:
    rows = {row["weight"]: row for row in overview(nested.CASES[name].model())["skipped"]}
    assert all("depends on the data" in row["reason"] for weight, row in rows.items() if weight not in ("last",))


@pytest.mark.parametrize("granularity", ["connection", "weight"])
def test_a_convolution_in_a_branch_within_a_loop(granularity: str) -> None:
    case, given = nested.windowed(False), nested.weights()
    model = case.model()
    data = samples(model)
    met = np.concatenate([rows for feed in data for weight, rows in case.meets(feed, given) if weight == "k"])
    scores = relief_onnx.score(model, data, criterion="relief", granularity=granularity)["node_v"]
    reached = np.abs(given["k"][:, 0]) * np.abs(met).mean(0).mean(0)  # [filters, taps]
    bias = np.abs(given["kb"]) * np.sqrt(met.shape[1]) if granularity == "connection" else np.abs(given["kb"])
    if granularity == "connection":
        reached = np.sqrt(np.square(np.einsum("npt,ot->nop", np.abs(met), np.abs(given["k"][:, 0]))).sum(-1)).mean(0)[:, None]
    total = reached.sum(1) + bias
    np.testing.assert_allclose(scores.score.reshape(reached.shape), reached / total[:, None], rtol=1e-4)
    np.testing.assert_allclose(scores.score.reshape(len(total), -1).sum(1) + scores.bias_score, 1, rtol=1e-6)
    found = relief_onnx.prune(model, data, criterion="relief", alpha=0.8, granularity=granularity, mean_shift="off")
    assert {row["weight"]: row["status"] for row in found.report["layers"]} == {
        "k": "pruned" if granularity == "weight" else "kept", "wb": "pruned", "last": "pruned",
    }  # fmt: skip


def test_images_of_another_size_in_every_run() -> None:
    """Convolutions stay, with a reason; products beside them are scored all the same."""
    model = nested.windowed(True).model()
    found = relief_onnx.prune(model, samples(model), criterion="relief", alpha=0.8)
    rows = {row["weight"]: row for row in found.report["layers"]}
    assert rows["wb"]["status"] == "pruned"
    assert rows["k"]["reason"].startswith("it lives inside the then_branch of If node node_o_in inside the body of Loop node node_j")
    np.testing.assert_array_equal(stored(found.model)["k"], nested.weights()["k"])


@names
@pytest.mark.parametrize("options", [{"criterion": "flow"}, {"criterion": "relief", "mean_shift": "off"}, {}])
def test_repaired_in_place(name: str, options: dict[str, Any]) -> None:
    """Every layer of its own is solved for; the outputs on the calibration samples are closer than without."""
    case = nested.CASES[name]
    model = case.model()
    data = [{key: value[:, :1] if key == "x" else value for key, value in feed.items()} for feed in samples(model, 48)]
    common = {"granularity": "weight", "keep": "50%", "storage": "dense", **options}
    plain = relief_onnx.prune(model, data, **common)
    found = relief_onnx.prune(model, data, repair="least-squares", **common)
    rows = {row["weight"]: row for row in found.report["repair"]["layers"]}
    for weight in case.weights - set(case.silent):
        if name == "shared" and weight in ("wa", "last"):
            assert rows[weight]["reason"] == "several nodes read its weight"
        else:
            assert not rows[weight]["reason"], weight
            assert rows[weight]["error_after"] <= rows[weight]["error_before"] + 1e-9
    wanted = [outputs(model, feed) for feed in data]
    errors = [
        sum(np.square(outputs(made, feed) - own).sum() for feed, own in zip(data, wanted, strict=True))
        for made in (plain.model, found.model)
    ]
    assert errors[1] < errors[0] or name == "shared"
    before, after = stored(model), stored(found.model)
    for weight in case.silent:
        np.testing.assert_array_equal(after[weight], before[weight])
    for weight, keep in found.masks.keep.items():
        mask = (keep if weight in ("wg", "wl") else keep.T).reshape(after[weight].shape)
        assert not after[weight][~mask].any()
    assert shape_of(found.model) == shape_of(model) or options != {"criterion": "relief", "mean_shift": "off"}


def bodied_and_plain(operator: str) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Two layers in a body and one behind it, and the same network without control flow."""
    step = "p = MatMul(xi, wa) q = Add(p, ba) h = Tanh(q) o = MatMul(h, ws)"
    each = {
        "Loop": f'j = Loop (steps, "") <body = each (int64 i, bool going) => (bool again, float[N, 10] o) {{'
        f"again = Identity(going) xi = Gather <axis = 0> (x, i) {step} }}>",
        "Scan": f"j = Scan <num_scan_inputs = 1, body = each (float[N, 8] xi) => (float[N, 10] o) {{ {step} }}> (x)",
        "Loop once": f'j = Loop (one, "") <body = each (int64 i, bool going) => (bool again, float[5, N, 10] o) {{'
        f"again = Identity(going) xi = Identity(x) {step} }}> j_flat = Squeeze(j, zero)",
    }[operator]
    text = (
        "net (float[5, N, 8] x) => (float[5, N, 4] y) <int64 steps = {5}, int64 one = {1}, int64[1] zero = {0}>"
        "{ STEPS  y = MatMul(j, last) }"
    )
    if operator == "Loop once":
        text = text.replace("MatMul(j, last)", "MatMul(j_flat, last)")
    bodied = nested.Case(text.replace("STEPS", each), {"net": ("last",), "each": ("wa", "constant ba", "constant ws")}, nested.unmet)
    flat = "net (float[5, N, 8] x) => (float[5, N, 4] y) { STEPS  y = MatMul(j, last) }"
    flat = flat.replace("STEPS", step.replace("xi", "x").replace("o =", "j ="))
    return bodied.model(), nested.Case(flat, {"net": ("last", "wa", "ba", "ws")}, nested.unmet).model()


@pytest.mark.parametrize("operator", ["Loop", "Loop once", "Scan"])
def test_repair_is_that_of_the_network_without_a_body(operator: str) -> None:
    """Inputs from the pruned network as repaired so far, targets from the original: the same equations in the same order."""
    data = [{"x": feed["x"]} for feed in nested.feeds(10)]
    options = {"criterion": "relief", "alpha": 0.7, "repair": "least-squares", "storage": "dense", "mean_shift": "off"}
    found, wanted = (relief_onnx.prune(model, data, **options) for model in bodied_and_plain(operator))
    before, after = stored(wanted.model), stored(found.model)
    for weight in ("wa", "ba", "ws", "last"):
        np.testing.assert_allclose(after[weight], before[weight], rtol=1e-6, atol=1e-7)
    assert not np.allclose(after["ws"], nested.weights()["ws"] * found.masks.keep["ws"].T, atol=1e-3)


def test_batches_that_take_another_way_once_pruned_have_no_say() -> None:
    """The branch depends on what is pruned; where no batch takes the same way in both networks the layer keeps its weights."""
    case = nested.CASES["If in Loop"]
    model = case.model()
    data = samples(model)
    ready = settle(prepare(model), open_dataset(data, input_specs(model)), samples=None, seed=0, threads=1)
    graph = ready.graph
    turned = onnx.ModelProto()
    turned.CopyFrom(graph.model)
    body = next(
        item.g
        for node in turned.graph.node
        if node.output[0] == "j" or "j" in node.output
        for item in node.attribute
        if item.name == "body"
    )
    next(node for node in body.node if node.op_type == "Greater").op_type = "Less"
    weights = frozenset(layer.weight for layer in ready.plan.layers)
    feeds = samples_of(Graph(turned), open_dataset(data, input_specs(model)))
    _, rows = repair(graph, turned, {}, weights, feeds)
    reasons = {row.layer.weight: row.reason for row in rows}
    assert reasons["wa"] == reasons["wb"] == "its body runs in other rounds once pruned"
    assert not reasons["last"]


def test_a_speech_detector_at_both_rates() -> None:
    """Both networks of the file in one run, the LSTMs among them."""
    path = real_model("silero_vad_v6")
    rng = np.random.default_rng(0)
    sizes = [(576, 16000), (288, 8000)] * 3
    data = [
        {
            "input": rng.normal(0, 0.1, (1, size)).astype(np.float32), "state": rng.normal(0, 0.3, (2, 1, 128)).astype(np.float32),
            "sr": np.array(rate, np.int64),
        }
        for size, rate in sizes
    ]  # fmt: skip
    found = relief_onnx.prune(path, data, keep="50%", granularity="weight", repair="least-squares", criterion="flow")
    rows = found.report["layers"]
    assert [row["status"] for row in rows] == ["pruned"] * 16
    assert [row["op"] for row in rows if row["op"] != "Conv"] == ["LSTM"] * 4
    repaired = found.report["repair"]["layers"]
    assert len(repaired) == 16
    assert all(not row["reason"] and row["error_after"] <= row["error_before"] for row in repaired)
    assert found.report["output"]["bytes"] < found.report["input"]["bytes"]
