"""W and R of LSTM, GRU and RNN: scores against a loop that goes step by step, masks, biases in halves, hidden units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders import Net
from helpers import real_model
from laws import assert_same_outputs, check_mask_is_surgery, check_units_go
from numpy.typing import NDArray
from onnx import numpy_helper
from recurrent_naive import BATCH, GATES, TIME, Node, made, model

import relief_onnx
from relief_onnx.data import open_dataset
from relief_onnx.flow import DEFAULT_RULE
from relief_onnx.graph import Graph
from relief_onnx.layers import find
from relief_onnx.model import input_specs, prepare, share_again
from relief_onnx.pack import unpack
from relief_onnx.recurrent_equations import Loop
from relief_onnx.recurrent_reads import cell_of, steps_of
from relief_onnx.repair import repair, samples_of
from relief_onnx.replay import Replay
from relief_onnx.session import Session
from relief_onnx.walk import trace

Array = NDArray[Any]
KINDS = [("LSTM", False), ("GRU", False), ("GRU", True), ("RNN", False)]
WAYS = ["f", "b", "fb"]


def feed_of(node: Node, *, states: bool = False, lengths: bool = False, features: int | None = None) -> dict[str, Array]:
    rng = np.random.default_rng(3)
    feed: dict[str, Array] = {"x": rng.normal(size=(TIME, BATCH, features or node.w.shape[2])).astype(np.float32)}
    if states:
        for name in ("h0", "c0")[: 2 if node.op == "LSTM" else 1]:
            feed[name] = rng.normal(size=(len(node.directions), BATCH, node.hidden)).astype(np.float32) * 0.5
    if lengths:
        feed["lengths"] = np.array([6, 2, 5, 1], np.int32)
    return feed


def naive(node: Node, feed: dict[str, Array], stored: dict[str, Array]) -> tuple[Array, list[Any]]:
    zeros = np.zeros((len(node.directions), BATCH, node.hidden))
    h0, c0 = (np.broadcast_to(feed.get(name, stored.get(name, zeros)), zeros.shape).astype(float) for name in ("h0", "c0"))
    return node.run(feed["x"].astype(float), h0, c0, feed.get("lengths", np.full(BATCH, TIME)))


def row_scores(node: Node, seen: list[Any], measure: Any) -> dict[str, tuple[Array, Array, Array]]:
    """Of W and R: shares [out, in], of the bias [out], and what rows bring in. measure: of one weight and what it meets at all steps."""
    found = {}
    for part, weight, half in (("w", node.w, 0), ("r", node.r, 1)):
        bias = np.stack([np.split(own, 2)[half] for own in node.b])
        out = np.zeros((*weight.shape[:2], weight.shape[2] + 1))
        for d, row, i in np.ndindex(*weight.shape):
            met = np.array([x[i] if part == "w" else read[row // node.hidden][i] for way, x, read, _ in seen if way == d])
            out[d, row, i] = measure(weight[d, row, i], met)
        out[:, :, -1] = measure(bias, None)
        rows = out.reshape(-1, out.shape[2])
        shares = rows / rows.sum(1, keepdims=True)
        found[part] = shares[:, :-1], shares[:, -1], rows.sum(1)
    return found


MEASURES = {
    "relief": lambda w, x: np.abs(w) if x is None else np.abs(w * x).mean(),
    "relief-fast": lambda w, x: np.abs(w) if x is None else abs(w) * np.abs(x).mean(),
    "wanda": lambda w, x: np.abs(w) if x is None else abs(w) * np.sqrt(np.square(x).mean()),
    "magnitude": lambda w, x: np.abs(w),
    "flow": lambda w, x: 0 * w if x is None else w**2 * (x.var() + DEFAULT_RULE.constant * x.mean() ** 2),
}


@pytest.mark.parametrize("directions", WAYS)
@pytest.mark.parametrize(("op", "before_reset"), KINDS)
@pytest.mark.parametrize("variant", ["plain", "stored states", "given states and lengths", "last state only"])
def test_scores_are_those_of_the_loop(op: str, before_reset: bool, directions: str, variant: str) -> None:
    node = made(op, directions, before_reset)
    states = variant.split()[0] if "states" in variant else ""
    proto = model(node, states=states, lengths="lengths" in variant, outputs="h" if variant == "last state only" else "Y")
    feed = feed_of(node, states=states == "given", lengths="lengths" in variant)
    stored = {item.name: numpy_helper.to_array(item) for item in proto.graph.initializer}
    y, seen = naive(node, feed, stored)
    if variant == "plain":
        (real,) = Session(proto, 1).run(feed)
        np.testing.assert_allclose(real, y, atol=1e-5)  # the loop is what onnxruntime computes
    for criterion, measure in MEASURES.items():
        given = {item.weight: item for item in relief_onnx.score(proto, [feed], criterion=criterion).values()}
        for part, (shares, bias, _) in row_scores(node, seen, measure).items():
            np.testing.assert_allclose(given[part].score, shares, rtol=2e-5, atol=1e-7, err_msg=f"{criterion} {part}")
            np.testing.assert_allclose(given[part].bias_score, bias, rtol=2e-5, atol=1e-7, err_msg=f"{criterion} {part}")
            np.testing.assert_allclose(given[part].score.sum(1) + given[part].bias_score, 1.0, rtol=1e-9)


def check_flow(node: Node, known: Mapping[str, Any], given: Mapping[str, Any], works: NDArray[np.float64]) -> None:
    """Of each entry, against T = R + T P round the loop. known: see `row_scores`. works: 1 for each gate row that has a say, else 0."""
    directions = len(node.directions)
    sizes = (directions, len(works), node.hidden)
    parts = {part: (shares * totals[:, None]).reshape(*sizes, -1) * works[:, None, None] for part, (shares, _, totals) in known.items()}
    whole = sum(part.sum((1, 3)) for part in parts.values())
    for d in range(directions):
        loop = parts["r"][d].sum(0) / whole[d][:, None]
        t = np.linalg.solve(np.eye(node.hidden) - loop.T, np.full(node.hidden, 1 / (node.hidden * directions)))
        for part, own in parts.items():
            flow = given[part].flow.reshape(*sizes, -1)[d]
            np.testing.assert_allclose(flow, own[d] / whole[d][None, :, None] * t[None, :, None], rtol=1e-4)


@pytest.mark.parametrize("directions", WAYS)
@pytest.mark.parametrize(("op", "before_reset"), KINDS)
def test_flow_of_a_row_is_its_part_of_the_unit(op: str, before_reset: bool, directions: str) -> None:
    """T = R + T P round the loop; a unit's T is shared by its gate rows of W and of R in proportion to what they bring in."""
    node = made(op, directions, before_reset)
    feed = feed_of(node)
    _, seen = naive(node, feed, {})
    known = row_scores(node, seen, MEASURES["flow"])
    given = {item.weight: item for item in relief_onnx.score(model(node), [feed], criterion="flow").values()}
    check_flow(node, known, given, np.ones(GATES[op]))


@pytest.mark.parametrize("directions", WAYS)
def test_an_lstm_that_forgets_what_it_lets_in(directions: str) -> None:
    """With input_forget no row of the forget gate has any say: its flow is 0, and it goes without a change of the outputs."""
    node = replace(made("LSTM", directions), coupled=True)
    feed = feed_of(node)
    y, seen = naive(node, feed, {})
    np.testing.assert_allclose(Session(model(node), 1).run(feed)[0], y, atol=1e-5)
    for criterion in ("relief", "flow"):
        given = {item.weight: item for item in relief_onnx.score(model(node), [feed], criterion=criterion).values()}
        for part, (shares, _, _) in row_scores(node, seen, MEASURES[criterion]).items():
            np.testing.assert_allclose(given[part].score, shares, rtol=2e-5, atol=1e-7, err_msg=f"{criterion} {part}")
    check_flow(node, row_scores(node, seen, MEASURES["flow"]), given, np.array([1.0, 1.0, 0.0, 1.0]))
    check_mask_is_surgery(model(node, layers=True), feed_of(node, features=6), np.random.default_rng(0))
    result = relief_onnx.prune(model(node), [feed], criterion="relief", alpha=1.0, storage="dense")
    for item in result.model.graph.initializer:
        if item.name in ("w", "r"):
            rows = numpy_helper.to_array(item).reshape(len(directions), GATES["LSTM"], node.hidden, -1).any((0, 2, 3))
            assert rows.tolist() == [True, True, False, True]
    np.testing.assert_allclose(Session(result.model, 1).run(feed)[0], y, atol=1e-5)


def test_the_law_of_scores_can_fail() -> None:
    node = made("GRU", "f", False)
    feed = feed_of(node)
    _, seen = naive(node, feed, {})
    other = made("GRU", "f", True)  # here the candidate reads h, not r * h
    _, wrong = naive(other, feed, {})
    a, b = (row_scores(node, steps, MEASURES["relief"])["r"][0] for steps in (seen, wrong))
    assert np.abs(a - b).max() > 1e-3


@pytest.mark.parametrize("directions", WAYS)
def test_layout_1_reads_the_same(directions: str) -> None:
    """Onnxruntime runs layout 0 only, so what is read is compared without it."""
    node = made("LSTM", directions)
    x, lengths = feed_of(node)["x"].astype(float), np.array([6, 2, 5, 1])
    h0 = np.random.default_rng(0).normal(size=(len(directions), BATCH, node.hidden))
    y, seen = node.run(x, h0, 0 * h0, lengths)
    proto = model(node).graph.node[0]
    first = steps_of(cell_of(proto), x, y, h0, lengths)
    proto.attribute.append(onnx.helper.make_attribute("layout", 1))
    second = steps_of(cell_of(proto), x.swapaxes(0, 1), y.transpose(2, 0, 1, 3), h0.swapaxes(0, 1), lengths)
    for a, b in ((first.x, second.x), (first.h, second.h), (first.counts, second.counts)):
        np.testing.assert_array_equal(a, b)
    for d in range(len(directions)):
        wanted = np.array([read[0] for way, _, read, _ in seen if way == d])
        found = first.rows(first.h.reshape(BATCH, TIME, -1)).reshape(-1, len(directions), node.hidden)[:, d]
        assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, wanted.tolist()))


# -- biases in halves ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_halves_are_joined_again(bias: bool) -> None:
    proto = model(made("LSTM", "fb"), bias=bias)
    halves = prepare(proto)
    assert [layer.bias is not None for layer in find(Graph(halves)).layers] == [True, True]
    again = share_again(halves, proto)
    assert [list(node.input) for node in again.graph.node] == [list(node.input) for node in proto.graph.node]
    assert {item.name: item.SerializeToString() for item in again.graph.initializer} == {
        item.name: item.SerializeToString() for item in proto.graph.initializer
    }


def test_what_is_not_a_layer_says_why() -> None:
    node = made("LSTM")
    proto = model(node)
    proto.graph.node[0].input.extend(["", "", "", "p"])
    proto.graph.initializer.append(numpy_helper.from_array(np.ones((2, 12), np.float32), "p"))
    (row,) = find(Graph(prepare(proto))).skipped
    assert "peepholes" in row.reason


# -- masks and surgery ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("directions", WAYS)
@pytest.mark.parametrize(("op", "before_reset"), KINDS)
@pytest.mark.parametrize("states", ["", "stored", "given"])
@pytest.mark.parametrize("outputs", ["Y", "Yh", "h"])
def test_mask_is_surgery(op: str, before_reset: bool, directions: str, states: str, outputs: str) -> None:
    node = made(op, directions, before_reset)
    proto = model(node, states=states, outputs=outputs, layers=True, lengths=states == "given")
    feed = feed_of(node, states=states == "given", lengths=states == "given", features=6)
    for seed in range(4):
        check_mask_is_surgery(proto, feed, np.random.default_rng(seed))
    removed = [check_units_go(proto, feed, np.random.default_rng(seed)).units_removed for seed in range(4)]
    assert sum(removed) > 0


@pytest.mark.parametrize(("op", "before_reset"), KINDS)
@pytest.mark.parametrize("directions", ["f", "fb"])
def test_hidden_units_go(op: str, before_reset: bool, directions: str) -> None:
    node = made(op, directions, before_reset, hidden=8)
    proto, feed = model(node, layers=True, states="stored"), feed_of(node, features=6)
    found = relief_onnx.prune(proto, [feed], granularity="channel", keep="50%", round_to=1)
    loop = next(item for item in found.model.graph.node if item.name == "loop")
    size = next(item.i for item in loop.attribute if item.name == "hidden_size")
    assert size < 8
    shapes = {item.name: list(item.dims) for item in found.model.graph.initializer}
    rows = GATES[op] * size
    assert shapes["w"][:2] == [len(directions), rows]
    assert shapes["r"] == [len(directions), rows, size]
    assert shapes["b"] == [len(directions), 2 * rows]
    assert shapes["h0"][2] == shapes["last"][0] == size
    assert_same_outputs(found.masked, found.model, feed, 1e-5)


def test_states_from_outside_keep_their_units() -> None:
    graph = Graph(prepare(model(made("LSTM", hidden=8), layers=True, states="given")))
    plan = find(graph)
    coupling = trace(graph, plan)
    for layer in plan.layers[1:3]:
        assert all("first state h0" in coupling.pinned[unit] for unit in coupling.outputs[layer.key].tolist())


# -- repair --------------------------------------------------------------------------------------------------------------


def smooth_feeds(node: Node, count: int = 24, seed: int = 5) -> list[dict[str, Array]]:
    """Sequences that lie in few directions, as real ones do, so that what is left can make up for what goes."""
    rng = np.random.default_rng(seed)
    basis = np.random.default_rng(9).normal(size=(3, 6))
    noise = [rng.normal(size=(TIME, BATCH, 3)).cumsum(0) @ basis * 0.5 + 0.05 * rng.normal(size=(TIME, BATCH, 6)) for _ in range(count)]
    return [{"x": values.astype(np.float32)} for values in noise]


def error_of(first: onnx.ModelProto, second: onnx.ModelProto, feeds: list[dict[str, Array]]) -> float:
    runs = [np.concatenate([np.ravel(Session(item, 1).run(feed)[0]) for feed in feeds]) for item in (first, second)]
    return float(np.square(runs[0] - runs[1]).mean() / runs[0].var())


@pytest.mark.parametrize("criterion", ["flow", "flow-obs"])
@pytest.mark.parametrize("directions", ["f", "fb"])
@pytest.mark.parametrize(("op", "before_reset"), KINDS)
def test_repair_brings_samples_not_seen_closer(op: str, before_reset: bool, directions: str, criterion: str) -> None:
    node = made(op, directions, before_reset, hidden=6)
    proto, feeds = model(node, layers=True), smooth_feeds(node)
    seen, unseen = feeds[:16], feeds[16:]
    plain, repaired = (
        relief_onnx.prune(proto, seen, criterion=how, keep="60%", only="loop", repair=repair, granularity="weight")
        for how, repair in (("flow", "none"), (criterion, "least-squares"))
    )
    rows = {row["weight"]: row for row in repaired.report["repair"]["layers"]}
    assert set(rows) == {"w", "r"}
    assert all(row["error_after"] < row["error_before"] and not row["reason"] for row in rows.values())
    assert error_of(proto, repaired.model, unseen) < 0.8 * error_of(proto, plain.model, unseen)
    assert repaired.report["totals"]["kept_percent"] == plain.report["totals"]["kept_percent"]


def test_nothing_removed_is_nothing_changed() -> None:
    """With all weights kept the old ones solve the equations: the ridge pulls to them, and the inputs are the original's."""
    node = made("GRU", "fb", False)
    graph = Graph(prepare(model(node, layers=True)))
    feeds = samples_of(graph, open_dataset(smooth_feeds(node, 4), input_specs(graph.model)))
    masked, rows = repair(graph, graph.model, {}, frozenset("wr"), feeds)
    assert {row.layer.weight for row in rows} == {"w", "r"}
    assert all(row.before < 1e-8 and row.after < 1e-8 for row in rows)
    for item in masked.graph.initializer:
        np.testing.assert_allclose(numpy_helper.to_array(item), graph.array(item.name), atol=1e-4, err_msg=item.name)


def test_the_solution_is_the_ridge_regression_of_the_row() -> None:
    """One LSTM row by hand: x and h side by side, each in units of its own activity, kept columns only; one pass."""
    node = made("LSTM", "f", hidden=4)
    proto, feeds = model(node, layers=True), smooth_feeds(node, 8)
    graph = Graph(prepare(proto))
    plan = find(graph)
    w, r = plan.layers[1], plan.layers[2]
    rng = np.random.default_rng(0)
    flags = {layer.weight: rng.random((1, *layer.view.shape)) < 0.6 for layer in (w, r)}
    with Replay(graph, feeds, [w.input]) as before, Replay(graph, feeds, []) as after:
        for replay in (before, after):
            replay.advance(w.node - 1)
        loop = Loop(graph, graph, {"W": w, "R": r}, {"w", "r"}, flags, {}, before, after, 0, 1)
        found, appraisals = loop.appraised(additions=False)
        x = np.concatenate([before.value(w.input, n).swapaxes(0, 1).reshape(-1, 5) for n in range(8)])
    first = [feed["x"] @ graph.array("first") for feed in feeds]

    def states(weight: Array, loops: Array) -> Array:
        runs = [Node("LSTM", weight, loops, node.b).run(m.astype(float), *np.zeros((2, 1, BATCH, 4)), np.full(BATCH, TIME)) for m in first]
        return np.concatenate([np.concatenate([read[0][None] for _, _, read, _ in seen]) for _, seen in runs])

    masks = {name: flags[name].reshape(getattr(node, name).shape) for name in "wr"}
    h, now = states(node.w, node.r), states(node.w * masks["w"], node.r * masks["r"])
    row = 5
    wanted = x @ node.w[0, row] + h @ node.r[0, row] + node.b[0, row] + node.b[0, 16 + row]
    scales = [np.sqrt(np.square(part - part.mean(0)).mean()) for part in (x, now)]
    inputs = np.concatenate([x / scales[0], now / scales[1]], 1)
    keep = np.concatenate([masks["w"][0, row], masks["r"][0, row]])
    old = np.concatenate([node.w[0, row] * scales[0], node.r[0, row] * scales[1]])[keep]
    centred = inputs - inputs.mean(0)
    counts = sum(masks[name][0].sum(1).mean() for name in "wr")
    ridge = max(0.01, 0.3 * counts / len(x)) * np.trace(centred.T @ centred) / inputs.shape[1]
    a = centred[:, keep].T @ centred[:, keep] + ridge * np.eye(keep.sum())
    change = np.linalg.solve(a, centred[:, keep].T @ (wanted - wanted.mean() - centred[:, keep] @ old))
    solution = np.zeros(9)
    solution[keep] = old + change
    np.testing.assert_allclose(found.w[0, row], solution[:5] / scales[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.r[0, row], solution[5:] / scales[1], rtol=1e-4, atol=1e-5)
    worth = np.square(solution[keep]) / np.diagonal(np.linalg.inv(a)) / len(x)
    np.testing.assert_allclose(appraisals["W"].worth[row][keep[:5]], worth[: keep[:5].sum()], rtol=2e-4)
    np.testing.assert_allclose(appraisals["R"].worth[row][keep[5:]], worth[keep[:5].sum() :], rtol=2e-4)


# -- as exporters write it -----------------------------------------------------------------------------------------------


def exported(directions: str, start: str) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """Two LSTMs in a row as torch exports them, batch first outside, zeros for first states made in one of several ways."""
    net = Net(seed=4)
    number, hidden = len(directions), 8
    x = net.input("N", 5, 6)
    h = net.op("Transpose", net.op("MatMul", x, net.weight(6, 7)), perm=[1, 0, 2])
    how = {"direction": "bidirectional" if number == 2 else "forward", "hidden_size": hidden}
    batch = net.op("Unsqueeze", net.op("Gather", net.op("Shape", x), net.constant(np.array(0))), net.ints(0))
    size = net.op("Concat", net.ints(number), batch, net.ints(hidden), axis=0)
    for width in (7, number * hidden):
        zeros = {
            "ConstantOfShape": lambda: net.op("ConstantOfShape", size),
            "Expand": lambda: net.op("Expand", net.constant(np.zeros((1, 1, 1), np.float32)), size),
            "Slice": lambda: net.op(
                "Slice", net.op("ConstantOfShape", net.op("Concat", net.ints(2 * number), batch, net.ints(hidden), axis=0)),
                net.ints(0), net.ints(number), net.ints(0),
            ),
        }[start]()  # fmt: skip
        weights = net.weight(number, 4 * hidden, width), net.weight(number, 4 * hidden, hidden), net.bias(number, 8 * hidden)
        y = net.op("LSTM", h, *weights, "", zeros, zeros, outputs=3, **how)[0]
        h = (
            net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3]), net.ints(0, 0, -1))
            if number == 2
            else net.op("Squeeze", y, net.ints(1))
        )
    model = net.model(net.op("MatMul", net.op("Transpose", h, perm=[1, 0, 2]), net.weight(number * hidden, 3)))
    return model, {x: np.random.default_rng(2).normal(size=(3, 5, 6)).astype(np.float32)}


@pytest.mark.parametrize("start", ["ConstantOfShape", "Expand", "Slice"])
@pytest.mark.parametrize("directions", ["f", "fb"])
def test_exported_layers_get_narrower(directions: str, start: str) -> None:
    proto, feed = exported(directions, start)
    for seed in range(3):
        check_mask_is_surgery(proto, feed, np.random.default_rng(seed))
        assert check_units_go(proto, feed, np.random.default_rng(seed)).units_removed > 0
    found = relief_onnx.prune(proto, [feed] * 4, granularity="channel", keep="50%", round_to=2)
    sizes = [item.i for node in found.model.graph.node if node.op_type == "LSTM" for item in node.attribute if item.name == "hidden_size"]
    assert len(sizes) == 2
    assert min(sizes) < 8
    assert all(size % 2 == 0 for size in sizes)


# -- training, and a real model ------------------------------------------------------------------------------------------


def test_training_holds_the_masks() -> None:
    pytest.importorskip("torch")
    node = made("LSTM", "fb", hidden=6)
    found = relief_onnx.prune(
        model(node, layers=True), smooth_feeds(node, 8), criterion="flow", keep="60%", repair="distill", epochs=2, only="loop"
    )
    stored = {item.name: numpy_helper.to_array(item) for item in unpack(found.model).graph.initializer}
    for weight in "wr":
        keep = found.masks.keep[weight]
        assert not stored[weight].reshape(keep.shape)[~keep].any()
        assert np.abs(stored[weight] - getattr(node, weight)).reshape(keep.shape)[keep].max() > 1e-4, "nothing was trained"
    assert np.abs(stored["b"] - node.b).max() > 1e-4


def test_a_pattern_holds_in_each_row() -> None:
    node = made("GRU", "fb", True, features=8, hidden=8)
    found = relief_onnx.prune(model(node), [{"x": feed_of(node)["x"]}], pattern="2:4")
    for weight in "wr":
        assert (found.masks.keep[weight].reshape(2 * 24, 2, 4).sum(2) == 2).all()


def test_dtln_at_half_of_its_weights(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shape = np.exp(rng.normal(size=(8, 257)))  # a few spectra, mixed
    state = rng.uniform(-0.5, 0.5, (6, 2, 128, 2))
    feeds = [
        {
            "input_2": (rng.random(8) @ shape).reshape(1, 1, 257).astype(np.float32),
            "input_3": np.tensordot(rng.dirichlet(np.ones(6)), state, 1)[None].astype(np.float32),
        }
        for _ in range(64)
    ]
    path = real_model("dtln_1")
    target, masks = tmp_path / "half.onnx", tmp_path / "masks.npz"
    found = relief_onnx.prune(
        path, feeds[:48], criterion="flow", keep="50%", repair="least-squares", output=target, save_masks=masks, threads=1
    )
    rows = {row["weight"]: row for row in found.report["layers"]}
    assert {rows[name]["op"] for name in ("lstm_4_W", "lstm_4_R", "lstm_5_W", "lstm_5_R")} == {"LSTM"}
    assert {rows[name]["node"] for name in ("lstm_4_W", "lstm_4_R")} == {"lstm_4"}
    assert found.report["totals"]["kept_percent"] == pytest.approx(50, abs=1e-3)
    assert target.stat().st_size < 0.6 * path.stat().st_size
    assert np.load(masks)["lstm_4_R/keep"].shape == (512, 128)
    unseen = open_dataset(feeds[48:], input_specs(onnx.load(path)))
    agreement = relief_onnx.compare_models(onnx.load(path), onnx.load(target), unseen, threads=1).outputs
    assert min(item.cosine for item in agreement.values()) > 0.99
