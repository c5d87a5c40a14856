"""Least-squares repair: its equations, the piecewise run that they come from, and what it does to models."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import onnx
import pytest
from architectures import ARCHITECTURES
from builders import Net
from helpers import CALIB, LENET, SAMPLES, digits, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from laws import assert_same_outputs
from numpy.typing import NDArray
from onnx import numpy_helper
from random_graphs import KINDS, STEPS, build
from test_compensate import NAMES, made
from test_flow import other_digits

import relief_onnx
from relief_onnx import solve as solving
from relief_onnx.errors import NothingPrunedError
from relief_onnx.graph import Graph
from relief_onnx.layers import find
from relief_onnx.model import prepare
from relief_onnx.replay import Replay
from relief_onnx.rows import POSITIONS, layer_rows
from relief_onnx.session import Session
from relief_onnx.solve import RIDGE, Target, solve

Array = NDArray[Any]
EXAMPLES = int(os.environ.get("RELIEF_ONNX_EXAMPLES", "300")) // 10


def arrays(model: onnx.ModelProto) -> dict[str, Array]:
    return {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}


# -- equations -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_the_layer(name: str) -> None:
    """Inputs times weights plus bias are the outputs, for every kind of layer."""
    model, x = made(name)
    graph = Graph(model)
    (layer,) = find(graph).layers
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    probe.graph.output.append(onnx.ValueInfoProto(name=layer.output))
    y = Session(probe).run({graph.inputs[0].name: x}, [layer.output])[0]
    inputs, outputs, other = layer_rows(layer, x, y, None, 40, 0, np.random.default_rng(0))
    weight = layer.view.apply(graph.array(layer.weight)).reshape(layer.groups, layer.out_channels // layer.groups, -1) * layer.scale
    bias = 0 if layer.bias is None else layer.bias.view.apply(graph.array(layer.bias.name)) * layer.bias.factor
    emitted = np.einsum("rgf,gof->rgo", inputs, weight).reshape(len(inputs), -1) + bias
    np.testing.assert_allclose(emitted, outputs, rtol=1e-4, atol=1e-4)
    assert len(inputs) > 1
    assert not other.any()


@pytest.mark.parametrize(
    ("budget", "enough", "rows"),
    [(10**6, 0, 2 * POSITIONS), (10**6, 150, 150), (10**6, 10**6, 2 * 100), (50, 10**6, 50), (50, 0, 50)],
    ids=["as many as always", "more, as these are few", "all there are", "no more than the budget", "nor by themselves"],
)
@pytest.mark.parametrize("kind", ["Conv", "MatMul"])
def test_positions_of_a_sample(kind: str, budget: int, enough: int, rows: int) -> None:
    net = Net()
    x = net.input(2, 3, 10, 10) if kind == "Conv" else net.input(2, 100, 3)
    weight = net.constant(net.rng.standard_normal((4, 3, 1, 1) if kind == "Conv" else (3, 4)).astype(np.float32))
    graph = Graph(net.model(net.op(kind, x, weight)))
    (layer,) = find(graph).layers
    given = np.zeros((2, 3, 10, 10) if kind == "Conv" else (2, 100, 3), np.float32)
    emitted = np.zeros((2, 4, 10, 10) if kind == "Conv" else (2, 100, 4), np.float32)
    found, _, _ = layer_rows(layer, given, emitted, None, budget, enough, np.random.default_rng(0))
    assert len(found) == rows


def system(seed: int = 0, rows: int = 200, features: int = 12, out: int = 5) -> tuple[Array, Array, Array, Array, Array]:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, features)) @ rng.standard_normal((features, features)) + 1).astype(np.float32)
    weight, bias = rng.standard_normal((out, features)), rng.standard_normal(out)
    wanted = (x @ rng.standard_normal((features, out)) + rng.standard_normal(out)).astype(np.float32)
    return x, wanted, weight, bias, rng.random((out, features)) < 0.5


def plain(wanted: Array, one_sided: bool = False) -> Target:
    return Target(wanted, np.zeros_like(wanted), np.ones(wanted.shape[1]), one_sided)


@pytest.mark.parametrize("free", [True, False])
def test_each_neuron_is_its_own_ridge_regression(free: bool) -> None:
    """Against a least-squares solver on the kept columns, with the ridge as further rows."""
    x, wanted, weight, bias, keep = system()
    keep[2] = False
    keep[3] = keep[4]
    found, offsets = solve(x, plain(wanted), weight, bias, keep, free)
    assert not found[~keep].any()
    mean = x.mean(0, dtype=np.float64) * free
    centred = x.astype(np.float64) - mean
    ridge = np.sqrt(RIDGE * np.square(centred).sum() / x.shape[1])
    for j, row in enumerate(keep):
        target = wanted[:, j] - (wanted[:, j].mean(dtype=np.float64) if free else bias[j])
        stacked = np.concatenate([centred[:, row], ridge * np.eye(row.sum())])
        expected = np.linalg.lstsq(stacked, np.concatenate([target, ridge * weight[j, row]]), rcond=None)[0]
        np.testing.assert_allclose(found[j, row], expected, rtol=1e-4, atol=1e-5)
        assert offsets[j] == pytest.approx(wanted[:, j].mean() - expected @ mean[row] if free else bias[j], rel=1e-4, abs=1e-4)


def test_few_rows_are_not_fitted_too_closely(monkeypatch: pytest.MonkeyPatch) -> None:
    """On rows that the solution has not seen, with a third more rows than inputs."""
    rng = np.random.default_rng(7)
    x = (rng.standard_normal((4000, 60)) @ rng.standard_normal((60, 60))).astype(np.float32)
    truth, keep = rng.standard_normal((8, 60)), rng.random((8, 60)) < 0.5
    wanted = np.maximum(x @ truth.T, 0).astype(np.float32) @ rng.standard_normal((8, 8)).astype(np.float32)
    seen, unseen = slice(0, 40), slice(40, None)

    def error(one_sided: bool) -> float:
        w, b = solve(x[seen], plain(wanted[seen], one_sided), 0.1 * truth, np.zeros(8), keep, True)
        y = x[unseen] @ w.T + b
        return float(np.square(plain(wanted[unseen], one_sided).of(y.astype(np.float32)) - y).mean())

    found = [error(False), error(True)]
    monkeypatch.setattr(solving, "FEW_ROWS", 0.0)
    assert found[0] < 0.8 * error(False)
    monkeypatch.setattr(solving, "ROUNDS_ROWS", 0)
    assert found[1] < 0.8 * error(True)


def test_blocks_end_near_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x, wanted, weight, bias, keep = system(1)
    whole = solve(x, plain(wanted), weight, bias, keep, True)
    monkeypatch.setattr(solving, "BLOCK", 5)
    monkeypatch.setattr(solving, "MOMENT_FEATURES", 0)  # so wide that X'X is not held as a whole
    parts = solve(x, plain(wanted), weight, bias, keep, True)
    start = np.where(keep, weight, 0)

    def error(w: Array, b: Array) -> float:
        return float(np.square(x @ w.T + b - wanted).sum())

    assert error(*whole) < error(*parts) < 0.5 * error(start, bias)
    monkeypatch.setattr(solving, "TURNS", 400)
    # The ridge holds each turn to the one before, so many turns leave it behind.
    assert error(*solve(x, plain(wanted), weight, bias, keep, True)) < 1.001 * error(*whole)


def test_inverses_in_several_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    x, wanted, weight, bias, keep = system(2)
    once = solve(x, plain(wanted), weight, bias, keep, True)
    monkeypatch.setattr(solving, "INVERSE_BYTES", 1)
    for first, second in zip(once, solve(x, plain(wanted), weight, bias, keep, True), strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-6)


def test_where_a_relu_follows_only_the_positive_part_is_met() -> None:
    x, wanted, weight, bias, keep = system(3, rows=2000, features=16)
    scale, shift = np.linspace(-2, 2.5, wanted.shape[1]), np.full_like(wanted, 0.3)

    def error(one_sided: bool) -> float:
        w, b = solve(x, Target(wanted, shift, scale, one_sided), weight, bias, keep, True)
        y = (x @ w.T + b) * scale + shift
        return float(np.square(np.maximum(y, 0) - np.maximum(wanted, 0)).sum())

    assert error(True) < 0.95 * error(False)


# -- the piecewise run -----------------------------------------------------------------------------------------------------------


def check_replay(model: onnx.ModelProto, feed: dict[str, Array], memory: int) -> None:
    """Stops before every node: what is there is what a run of the whole model has there."""
    graph = Graph(prepare(model))
    made_by = {name: i for i, node in enumerate(graph.nodes) for name in node.output if name in graph.uses or graph.is_output(name)}
    probe = onnx.ModelProto()
    probe.CopyFrom(graph.model)
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made_by if not graph.is_output(name))
    session = Session(probe, 1, optimize=False)
    expected = dict(zip(session.outputs, session.run(feed), strict=True))
    with Replay(graph, [feed], graph.outputs, threads=1, memory=memory) as replay:
        for stop in range(1, len(graph.nodes) + 1):
            replay.advance(stop)
            for name, maker in made_by.items():
                if maker < stop and (graph.is_output(name) or any(use.node >= stop for use in graph.uses[name])):
                    value = replay.value(name, 0)
                    assert value is not None
                    if np.issubdtype(value.dtype, np.floating):
                        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-4)
                    else:
                        assert np.array_equal(value, expected[name])
                elif maker < stop:
                    assert replay.value(name, 0) is None


@pytest.mark.parametrize("memory", [0, 1 << 20])
@pytest.mark.parametrize("name", ["transformer", "squeeze and excitation", "overlapping norms, sizes at run time"])
def test_a_run_in_pieces_is_a_run(name: str, memory: int) -> None:
    model, feed = ARCHITECTURES[name]()
    check_replay(model, feed, memory)


def test_bodies_of_control_flow_see_what_they_capture() -> None:
    net = Net(seed=0)
    x = net.input("N", 4)
    y = net.op("Relu", net.op("MatMul", x, net.weight(4, 4)))
    inner = onnx.helper.make_graph([onnx.helper.make_node("Add", [y, y], ["doubled"])], "b", [], [onnx.ValueInfoProto(name="doubled")])
    condition = net.op("Cast", net.op("ReduceMax", x, keepdims=0), to=onnx.TensorProto.BOOL)
    model = net.model(net.op("MatMul", net.op("If", condition, then_branch=inner, else_branch=inner), net.weight(4, 3)))
    check_replay(model, {x: np.ones((3, 4), np.float32)}, 0)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, len(STEPS) - 1), st.integers(0, 999)), min_size=1, max_size=10), st.sampled_from(KINDS))
def test_random_graphs_are_repaired(steps: list[tuple[int, int]], kind: str) -> None:
    model, feed = build(steps, 17, kind, True)
    options: dict[str, Any] = {"keep": "50%", "granularity": "weight", "storage": "dense", "threads": 1}
    try:
        result = relief_onnx.prune(model, [feed], repair="least-squares", **options)
    except NothingPrunedError:
        return
    for row in result.report["repair"]["layers"]:
        assert row["reason"] or np.isfinite(row["error_after"])
    assert all(np.isfinite(value).all() for value in arrays(result.model).values() if value.dtype == np.float32)


# -- models ----------------------------------------------------------------------------------------------------------------------


def test_an_input_that_stands_in_for_another_takes_over() -> None:
    """Two inputs are the same; what one of them loses the other gets, and nothing is lost."""
    net = Net(seed=2)
    x, a = net.input("N", 5), net.weight(5, 4)
    model = net.model(net.op("Add", net.op("MatMul", x, a), net.bias(4)))
    data = net.rng.standard_normal((200, 5)).astype(np.float32)
    data[:, 3] = data[:, 1]
    keep = {"keep": "80%", "granularity": "weight", "storage": "dense"}
    weight = arrays(model)[a].copy()
    weight[3] *= 1e-3
    model.graph.initializer[[item.name for item in model.graph.initializer].index(a)].CopyFrom(numpy_helper.from_array(weight, a))
    result = relief_onnx.prune(model, [{x: data}], repair="least-squares", **keep)
    assert not result.masks.keep[a][:, 3].any()
    assert_same_outputs(result.model, model, {x: data}, 2e-3)
    (row,) = result.report["repair"]["layers"]
    assert row["error_after"] < 0.2 * row["error_before"] < 1e-4


@pytest.mark.parametrize(
    ("name", "granularity"), [("lenet300", "weight"), ("lenet5", "channel+weight"), ("resnet8", "weight"), ("resnet8", "channel")]
)
def test_repaired_models_are_closer_to_the_original(name: str, granularity: str) -> None:
    """On digits that calibration has not seen; zeros stay, layers come closer."""
    model = onnx.load(str(SAMPLES / f"{name}.onnx"))
    feed, unseen = ({model.graph.input[0].name: x} for x in (digits(128), other_digits()))
    options: dict[str, Any] = {"granularity": granularity, "keep": "40%", "storage": "dense", "threads": 1}
    if granularity.startswith("channel"):
        options["round_to"] = 1
    wanted = Session(model).run(unseen)[0]
    errors = []
    for repair in ("none", "least-squares"):
        result = relief_onnx.prune(model, [feed], repair=repair, **options)
        errors.append(float(np.square(Session(result.model).run(unseen)[0] - wanted).mean()))
    assert errors[1] < 0.7 * errors[0], errors
    rows = result.report["repair"]["layers"]
    assert {row["node"] for row in rows} == {layer.name for layer in find(Graph(prepare(model))).layers}
    assert all(row["error_after"] <= row["error_before"] * 1.001 + 1e-9 for row in rows if not row["reason"]), rows
    for weight, layers in find(Graph(prepare(model))).by_weight().items():
        assert not layers[0].view.apply(arrays(result.masked)[weight])[~result.masks.keep[weight]].any()


def test_the_same_run_gives_the_same_bytes_and_the_batches_do_not_matter() -> None:
    model = onnx.load(str(LENET))
    name = model.graph.input[0].name
    x = digits(100)
    found = [
        relief_onnx.prune(model, feeds, repair="least-squares", granularity="weight", keep="20%").model.SerializeToString()
        for feeds in ([{name: x}], [{name: x}], [{name: part} for part in np.split(x, [3, 50])])
    ]
    assert found[0] == found[1] == found[2]


def test_half_precision_is_repaired() -> None:
    net = Net(seed=3)
    x = net.input("N", 8)
    weight = net.constant(net.rng.standard_normal((8, 6)).astype(np.float16))
    y = net.op("Cast", net.op("Relu", net.op("MatMul", net.op("Cast", x, to=10), weight)), to=1)
    model = net.model(net.op("MatMul", y, net.weight(6, 3)))
    result = relief_onnx.prune(model, [{x: net.rng.standard_normal((64, 8)).astype(np.float32)}], repair="least-squares", keep="50%")
    assert not any(row["reason"] for row in result.report["repair"]["layers"])
    assert {value.dtype.name for value in arrays(result.masked).values()} >= {"float16", "float32"}


def test_a_weight_that_several_nodes_read_says_so() -> None:
    net = Net(seed=3)
    x, w = net.input("N", 6), net.weight(6, 6)
    model = net.model(net.op("MatMul", net.op("Relu", net.op("MatMul", x, w)), w))
    result = relief_onnx.prune(model, [{x: net.rng.standard_normal((64, 6)).astype(np.float32)}], repair="least-squares", keep="50%")
    assert {row["reason"] for row in result.report["repair"]["layers"]} == {"several nodes read its weight"}


def test_the_command(tmp_path: Any) -> None:
    target, report = tmp_path / "out.onnx", tmp_path / "report.json"
    result = run("prune", LENET, "--data", CALIB, "-o", target, "--keep", "20%", "--repair", "least-squares", "--json", report)
    assert result.exit_code == 0, result.output
    assert '"method": "least-squares"' in report.read_text()


def test_what_is_computed_of_weights_alone_follows_new_weights() -> None:
    """A bias that is reshaped at the front of the graph, before any layer is repaired."""
    net = Net(0)
    x = net.input("n", 3, 6, 6)
    bias = net.bias(4)
    wide = net.op("Reshape", bias, net.ints(1, 4, 1, 1))
    first = net.op("Add", net.op("Conv", x, net.weight(4, 3, 3, 3)), wide)
    graph = Graph(net.model(net.op("Conv", first, net.weight(2, 4, 1, 1))))
    feed = {x: np.random.default_rng(0).standard_normal((2, 3, 6, 6)).astype(np.float32)}
    with Replay(graph, [feed], ()) as replay:
        replay.advance(1)
        replay.advance(3, {bias: np.full(4, 5.0, np.float32)})
        seen = replay.value(first, 0)
    with Replay(graph, [feed], ()) as replay:
        replay.advance(3)
        before = replay.value(first, 0)
    assert seen is not None
    assert before is not None
    np.testing.assert_allclose(seen - before, np.broadcast_to(5.0 - graph.array(bias)[:, None, None], seen.shape), rtol=1e-4)
