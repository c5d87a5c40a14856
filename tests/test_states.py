"""States of LSTM, GRU and RNN that are inputs and outputs of the model get narrower with `allow_state_change`, and only then."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders import Net
from helpers import real_model, run
from numpy.typing import NDArray

import relief_onnx
from relief_onnx import state_changes
from relief_onnx.graph import Graph
from relief_onnx.layers import find
from relief_onnx.model import prepare
from relief_onnx.session import Session
from relief_onnx.states import find_states

Feed = dict[str, NDArray[Any]]
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
FORMS = ("direct", "squeezed", "transposed", "stacked", "one tensor", "reshaped", "both ways")
HIDDEN, BATCH, STEPS = 8, 3, 2
ASKED: dict[str, Any] = {"granularity": "channel", "keep": "50%", "round_to": 1, "repair": "none"}


def streaming(op: str, form: str, seed: int = 3) -> tuple[onnx.ModelProto, dict[str, str], list[Feed]]:
    """A model that takes `STEPS` steps at a time from given states; its output of each state input; samples."""
    net, rng = Net(seed=seed), np.random.default_rng(seed)
    layers, ways = (2 if form in ("stacked", "one tensor") else 1), (2 if form == "both ways" else 1)
    kinds = ["h", "c"][: 2 if op == "LSTM" else 1]
    x = net.input(STEPS, BATCH, 6)
    shape = {
        "squeezed": (BATCH, HIDDEN), "transposed": (BATCH, 1, HIDDEN), "stacked": (layers, BATCH, HIDDEN),
        "one tensor": (BATCH, layers, HIDDEN, len(kinds)), "reshaped": (BATCH, 1, 1, HIDDEN), "both ways": (2, BATCH, HIDDEN),
    }.get(form, (1, BATCH, HIDDEN))  # fmt: skip
    states = [net.input(*shape)] if form == "one tensor" else [net.input(*shape) for _ in kinds]

    def first(kind: int, layer: int) -> str:
        state = states[kind if form != "one tensor" else 0]
        if form == "squeezed":
            return net.op("Unsqueeze", state, net.ints(0))
        if form == "transposed":
            return net.op("Transpose", state, perm=[1, 0, 2])
        if form == "reshaped":
            return net.op("Reshape", state, net.ints(1, BATCH, HIDDEN))
        if form == "stacked":
            return net.op("Slice", state, net.ints(layer), net.ints(layer + 1), net.ints(0))
        if form == "one tensor":
            own = net.op("Squeeze", net.op("Slice", state, net.ints(kind), net.ints(kind + 1), net.ints(3)), net.ints(3))
            return net.op("Transpose", net.op("Slice", own, net.ints(layer), net.ints(layer + 1), net.ints(1)), perm=[1, 0, 2])
        return state

    def last(tensors: list[str]) -> str:
        if form in ("squeezed", "reshaped"):
            flat = net.op("Squeeze", tensors[0], net.ints(0))
            return flat if form == "squeezed" else net.op("Reshape", flat, net.ints(BATCH, 1, 1, HIDDEN))
        if form == "transposed":
            return net.op("Transpose", tensors[0], perm=[1, 0, 2])
        return net.op("Concat", *tensors, axis=0) if form == "stacked" else net.op("Identity", tensors[0])

    h, width, made = x, 6, []
    for layer in range(layers):
        rows = GATES[op] * HIDDEN
        weights = net.weight(ways, rows, width), net.weight(ways, rows, HIDDEN), net.bias(ways, 2 * rows)
        given = [first(kind, layer) for kind in range(len(kinds))]
        how: dict[str, Any] = {"direction": "bidirectional"} if ways == 2 else {}
        y, *found = net.op(op, h, *weights, "", *given, outputs=1 + len(kinds), hidden_size=HIDDEN, **how)
        made.append(found)
        width = ways * HIDDEN
        h = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3]), net.ints(STEPS, BATCH, width))
    out = net.op("MatMul", h, net.weight(width, 3))
    if form == "one tensor":
        parts = [
            net.op("Unsqueeze", net.op("Transpose", net.op("Concat", *(own[kind] for own in made), axis=0), perm=[1, 0, 2]), net.ints(3))
            for kind in range(len(kinds))
        ]
        ends = [net.op("Concat", *parts, axis=3)]
    else:
        ends = [last([own[kind] for own in made]) for kind in range(len(kinds))]
    shapes = {x: (STEPS, BATCH, 6), **dict.fromkeys(states, shape)}
    feeds = [{name: rng.normal(size=size).astype(np.float32) for name, size in shapes.items()} for _ in range(6)]
    return net.model(out, *ends), dict(zip(states, ends, strict=True)), feeds


def looped(model: onnx.ModelProto, pairs: dict[str, str], feed: Feed, chunks: list[NDArray[Any]]) -> list[NDArray[Any]]:
    """The first output of each chunk of x, every state fed back; at last the states."""
    session, feed, x = Session(model, 1), dict(feed), next(name for name in feed if name not in pairs)
    found = []
    for chunk in chunks:
        values = dict(zip(session.outputs, session.run({**feed, x: chunk}), strict=True))
        found.append(values[session.outputs[0]])
        feed |= {state: values[end] for state, end in pairs.items()}
    return [*found, *(feed[state] for state in pairs)]


def sizes(model: onnx.ModelProto) -> dict[str, list[int]]:
    ends = [*model.graph.input, *model.graph.output]
    return {info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim] for info in ends}


@pytest.mark.parametrize("op", GATES)
@pytest.mark.parametrize("form", FORMS)
def test_the_narrow_loop_is_the_masked_loop(op: str, form: str) -> None:
    model, pairs, feeds = streaming(op, form)
    found = relief_onnx.prune(model, feeds, allow_state_change=True, **ASKED)
    changes = {item["name"]: item for item in found.report["state_changes"]}
    assert set(changes) == {*pairs, *pairs.values()}
    before, after = sizes(model), sizes(found.model)
    for name, item in changes.items():
        assert set(item) == {"name", "kind", "before", "after", "axis", "kept"}
        assert item["kind"] == ("input" if name in pairs else "output")
        assert item["before"] == before[name]
        assert item["after"] == after[name]
        assert item["after"][item["axis"]] == len(item["kept"]) < HIDDEN
    for state, end in pairs.items():
        assert changes[state]["kept"] == changes[end]["kept"]
    assert {name for name in before if before[name] != after[name]} == set(changes)
    assert all(any(name in text for text in found.report["warnings"] if "got narrower" in text) for name in changes)
    # What is left runs in a loop on its own states, from any first states.
    rng = np.random.default_rng(0)
    chunks = [rng.normal(size=(STEPS, BATCH, 6)).astype(np.float32) for _ in range(5)]
    narrow = {
        name: np.take(value, changes[name]["kept"], changes[name]["axis"]) if name in pairs else value for name, value in feeds[0].items()
    }
    wide, small = looped(found.masked, pairs, feeds[0], chunks), looped(found.model, pairs, narrow, chunks)
    for a, b in zip(wide[: len(chunks)], small, strict=False):
        np.testing.assert_allclose(b, a, atol=1e-5)
    for name, a, b in zip(pairs, wide[len(chunks) :], small[len(chunks) :], strict=True):
        item = changes[name]
        np.testing.assert_allclose(b, np.take(a, item["kept"], item["axis"]), atol=1e-5)
        gone = np.delete(a, item["kept"], item["axis"])
        assert gone.size
        assert not gone.any()  # the masked model has 0 there, whatever it was fed
    left = {item.name for item in found.model.graph.initializer}
    assert not any("state_mask" in name for name in left)
    full = looped(model, pairs, feeds[0], chunks)
    assert max(float(np.abs(a - b).max()) for a, b in zip(full[: len(chunks)], small, strict=False)) > 1e-3  # something did go


@pytest.mark.parametrize("op", GATES)
@pytest.mark.parametrize("form", FORMS)
def test_without_the_option_states_stay(op: str, form: str) -> None:
    model, _, feeds = streaming(op, form)
    with pytest.raises(relief_onnx.NothingPrunedError) as caught:
        relief_onnx.prune(model, feeds, **ASKED)
    assert "output of the model" in str(caught.value) or "first state" in str(caught.value)


def test_only_states_of_recurrent_nodes_are_found() -> None:
    """Not what a layer makes of them, nor an input that meets them in sums."""
    net = Net(seed=1)
    x, h, other = net.input(STEPS, BATCH, 6), net.input(1, BATCH, HIDDEN), net.input(1, BATCH, HIDDEN)
    weights = net.weight(1, 3 * HIDDEN, 6), net.weight(1, 3 * HIDDEN, HIDDEN)
    y, end = net.op("GRU", x, *weights, "", "", net.op("Add", net.op("Identity", h), other), outputs=2, hidden_size=HIDDEN)
    dense, relu = net.op("MatMul", end, net.weight(HIDDEN, HIDDEN)), net.op("Relu", end)
    mixed = net.op("Concat", end, relu, axis=0)
    graph = Graph(prepare(net.model(dense, relu, mixed, end, y)))
    states = find_states(graph, find(graph))
    assert states.inputs == {}
    assert states.outputs == {end, y}


def test_a_state_that_something_else_needs_stays() -> None:
    net = Net(seed=1)
    x, h = net.input(STEPS, BATCH, 6), net.input(1, BATCH, HIDDEN)
    weights = net.weight(1, 3 * HIDDEN, 6), net.weight(1, 3 * HIDDEN, HIDDEN)
    y, end = net.op("GRU", x, *weights, "", "", h, outputs=2, hidden_size=HIDDEN)
    model = net.model(net.op("MatMul", y, net.weight(HIDDEN, 3)), end, net.op("Relu", end))
    feed = {x: np.ones((STEPS, BATCH, 6), np.float32), h: np.ones((1, BATCH, HIDDEN), np.float32)}
    with pytest.raises(relief_onnx.NothingPrunedError, match="output of the model"):
        relief_onnx.prune(model, [feed], allow_state_change=True, **ASKED)


@pytest.mark.parametrize("more", [{"granularity": "channel+connection"}, {"repair": "least-squares"}, {"granularity": "channel+weight"}])
def test_with_what_else_a_run_does(more: dict[str, Any]) -> None:
    model, pairs, feeds = streaming("LSTM", "stacked")
    found = relief_onnx.prune(model, feeds, allow_state_change=True, **{**ASKED, **more})
    assert {item["name"] for item in found.report["state_changes"]} == {*pairs, *pairs.values()}
    assert found.report["verification"]["masked_vs_output_max_rel"] < 1e-4


def test_command_and_recipe(tmp_path: Path) -> None:
    model, pairs, feeds = streaming("GRU", "direct")
    onnx.save(model, tmp_path / "m.onnx")
    np.savez(tmp_path / "a.npz", **feeds[0])
    (tmp_path / "r.toml").write_text("allow-state-change = true\ngranularity = 'channel'\nkeep = 50\nround-to = 1\n")
    run_of = (
        "prune",
        tmp_path / "m.onnx",
        "--data",
        tmp_path / "a.npz",
        "--force",
        "--json",
        tmp_path / "r.json",
        "-o",
        tmp_path / "out.onnx",
    )
    for options in (
        ("--allow-state-change", "--granularity", "channel", "--keep", "50%", "--round-to", "1"),
        ("--recipe", tmp_path / "r.toml"),
    ):
        result = run(*run_of, *options)
        assert result.exit_code == 0, result.output
        report = json.loads((tmp_path / "r.json").read_text())
        assert report["options"]["allow_state_change"] is True
        assert {item["name"] for item in report["state_changes"]} == {*pairs, *pairs.values()}
    result = run("compare", tmp_path / "m.onnx", tmp_path / "out.onnx", "--data", tmp_path / "a.npz")
    assert result.exit_code == 1
    assert "no data fits both, as after --allow-state-change" in " ".join(result.output.split())


def test_a_real_model_that_carries_its_states() -> None:
    """Two LSTMs whose h and c are slices of one input [1, 2, 128, 2], stacked again as one output."""
    rng = np.random.default_rng(0)
    feeds = [
        {
            "input_2": rng.random((1, 1, 257)).astype(np.float32),
            "input_3": rng.uniform(-0.5, 0.5, (1, 2, 128, 2)).astype(np.float32),
        }
        for _ in range(8)
    ]
    found = relief_onnx.prune(real_model("dtln_1"), feeds, granularity="channel", keep="60%", allow_state_change=True, threads=1)
    changes = {item["name"]: item for item in found.report["state_changes"]}
    assert set(changes) == {"input_3", "tf_op_layer_stack_2"}
    assert changes["input_3"]["kept"] == changes["tf_op_layer_stack_2"]["kept"]
    width = len(changes["input_3"]["kept"])
    assert width < 128
    assert width % 8 == 0
    pairs = {"input_3": "tf_op_layer_stack_2"}
    chunks = [rng.random((1, 1, 257)).astype(np.float32) for _ in range(5)]
    narrow = {**feeds[0], "input_3": feeds[0]["input_3"][:, :, changes["input_3"]["kept"]]}
    wide, small = looped(found.masked, pairs, feeds[0], chunks), looped(found.model, pairs, narrow, chunks)
    for a, b in zip(wide[:-1], small[:-1], strict=True):
        np.testing.assert_allclose(b, a, atol=1e-4)
    np.testing.assert_allclose(small[-1], wide[-1][:, :, changes["input_3"]["kept"]], atol=1e-4)


def test_a_whole_sequence_of_states_as_an_output() -> None:
    net = Net(seed=1)
    x = net.input(STEPS, BATCH, 6)
    y = net.op("GRU", x, net.weight(1, 3 * HIDDEN, 6), net.weight(1, 3 * HIDDEN, HIDDEN), hidden_size=HIDDEN)
    moved = net.op("Reshape", net.op("Transpose", y, perm=[2, 0, 1, 3]), net.ints(BATCH, STEPS, HIDDEN))
    model, feed = net.model(moved), {x: np.random.default_rng(0).normal(size=(STEPS, BATCH, 6)).astype(np.float32)}
    found = relief_onnx.prune(model, [feed], allow_state_change=True, **ASKED)
    (change,) = found.report["state_changes"]
    assert (change["name"], change["kind"], change["axis"], change["before"]) == (moved, "output", 2, [BATCH, STEPS, HIDDEN])
    (wide,), (small,) = (Session(item, 1).run(feed) for item in (found.masked, found.model))
    np.testing.assert_allclose(small, wide[:, :, change["kept"]], atol=1e-5)


def test_units_that_do_not_stay_0_keep_their_state() -> None:
    """With Sigmoid a unit without weights is 0.5."""
    net = Net(seed=1)
    x, h = net.input(STEPS, BATCH, 6), net.input(1, BATCH, HIDDEN)
    how = {"hidden_size": HIDDEN, "activations": ["Sigmoid"]}
    y, end = net.op("RNN", x, net.weight(1, HIDDEN, 6), net.weight(1, HIDDEN, HIDDEN), "", "", h, outputs=2, **how)
    model = net.model(net.op("MatMul", y, net.weight(HIDDEN, 3)), end)
    feed = {x: np.ones((STEPS, BATCH, 6), np.float32), h: np.ones((1, BATCH, HIDDEN), np.float32)}
    found = relief_onnx.prune(model, [feed], allow_state_change=True, **ASKED)
    assert found.report["state_changes"] == []
    assert sizes(found.model) == sizes(model)
    assert not any("state_mask" in item.name for item in (*found.model.graph.initializer, *found.masked.graph.initializer))


def test_the_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong places, or a change that nobody declared, are found before anything is written."""
    model, _, feeds = streaming("GRU", "direct")

    def shifted(*given: Any) -> Any:
        return tuple(replace(change, kept=tuple((place + 1) % HIDDEN for place in change.kept)) for change in changes(*given))

    changes = state_changes._changes
    monkeypatch.setattr(state_changes, "_changes", shifted)
    with pytest.raises(relief_onnx.VerificationError, match="differs from the masked one"):
        relief_onnx.prune(model, feeds, allow_state_change=True, **ASKED)
    monkeypatch.setattr(state_changes, "_changes", lambda *given: changes(*given)[:1])
    with pytest.raises(relief_onnx.VerificationError, match="inputs and outputs changed"):
        relief_onnx.prune(model, feeds, allow_state_change=True, **ASKED)
