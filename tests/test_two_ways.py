"""Bidirectional recurrent nodes: each direction loses units of its own, as many as the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from builders import Net
from laws import Feed, check_mask_is_surgery, check_units_go

import relief_onnx
from relief_onnx import decide
from relief_onnx.coupling import Tie
from relief_onnx.graph import Graph
from relief_onnx.layers import find
from relief_onnx.model import prepare
from relief_onnx.session import Session
from relief_onnx.two_ways import balanced, chosen_columns, composed, crossed, paired
from relief_onnx.walk import trace

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
HIDDEN, STEPS, BATCH = 8, 4, 3
# How what a node makes is read: first those where units stay apart, then those where the same places must go.
APART = ("joined", "last states", "split", "activated", "stacked", "handed on", "stored states", "two linears")
TOGETHER = ("added", "interleaved", "by place", "to an output", "heads", "part")


def model(op: str, form: str, seed: int = 1, spread: float = 0.0) -> tuple[onnx.ModelProto, Feed]:
    """spread: how much units differ in what they give on, as standard deviation of a logarithm."""
    net, rng = Net(seed=seed), np.random.default_rng(seed)
    rows, x = GATES[op] * HIDDEN, net.input(STEPS, BATCH, 6)

    def node(source: str, width: int, *states: str, outputs: int = 3 if op == "LSTM" else 2) -> list[str]:
        how: dict[str, Any] = {"direction": "bidirectional", "hidden_size": HIDDEN}
        if op == "GRU" and form == "stacked":
            how["linear_before_reset"] = 1
        more = [net.weight(2, 3 * HIDDEN)] if op == "LSTM" and form == "joined" else []
        given = ["", *(states or ("", "")[: 2 if op == "LSTM" else 1]), *([""] if more and not states else [])][: 3 if op == "LSTM" else 2]
        inputs = [source, net.weight(2, rows, width), net.weight(2, rows, HIDDEN), net.bias(2, 2 * rows), *given, *more]
        while not inputs[-1]:
            inputs.pop()
        made = net.op(op, *inputs, outputs=outputs, **how)
        return [made] if outputs == 1 else made

    def dense(source: str, width: int) -> str:
        gains = np.exp(spread * rng.normal(size=(width, 1))).astype(np.float32)
        weight = net.constant((rng.normal(size=(width, 3)) * gains).astype(np.float32))
        return net.op("MatMul", source, weight)

    def flat(y: str) -> str:
        return net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3]), net.ints(STEPS, BATCH, 2 * HIDDEN))

    stored: list[str] = []
    if form == "stored states":
        stored = [net.constant(rng.normal(size=(2, BATCH, HIDDEN)).astype(np.float32)) for _ in range(2 if op == "LSTM" else 1)]
    y, *last = node(x, 6, *stored)
    if form in ("joined", "stored states"):
        outputs = [dense(flat(y), 2 * HIDDEN)]
    elif form == "last states":
        parts = [
            net.op("Squeeze", net.op("Slice", state, net.ints(k), net.ints(k + 1), net.ints(0)), net.ints(0))
            for state in last
            for k in (1, 0)
        ]
        outputs = [dense(net.op("Concat", *parts, axis=1), 2 * HIDDEN * len(last))]
    elif form == "split":
        there, back = net.op("Split", y, net.ints(1, 1), axis=1, outputs=2)
        outputs = [dense(net.op("Concat", *(net.op("Squeeze", own, net.ints(1)) for own in (there, back)), axis=2), 2 * HIDDEN)]
    elif form == "activated":
        outputs = [dense(flat(net.op("Relu", y)), 2 * HIDDEN)]
    elif form == "stacked":
        outputs = [dense(flat(node(flat(y), 2 * HIDDEN, outputs=1)[0]), 2 * HIDDEN)]
    elif form == "handed on":  # last states are the first ones of another node
        outputs = [dense(flat(node(x, 6, *last, outputs=1)[0]), 2 * HIDDEN)]
    elif form == "two linears":
        outputs = [net.op("Add", dense(flat(y), 2 * HIDDEN), dense(net.op("Tanh", flat(y)), 2 * HIDDEN))]
    elif form == "added":
        outputs = [dense(net.op("ReduceSum", y, net.ints(1), keepdims=0), HIDDEN)]
    elif form == "interleaved":
        mixed = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 3, 1]), net.ints(STEPS, BATCH, 2 * HIDDEN))
        outputs = [dense(mixed, 2 * HIDDEN)]
    elif form == "by place":
        outputs = [dense(net.op("Mul", y, net.weight(HIDDEN)), HIDDEN)]
    elif form == "to an output":
        outputs = [dense(flat(y), 2 * HIDDEN), net.op("Identity", last[0])]
    elif form == "heads":
        parts = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3]), net.ints(STEPS, BATCH, 2, 2, HIDDEN // 2))
        outputs = [dense(net.op("Reshape", parts, net.ints(STEPS, BATCH, 2 * HIDDEN)), 2 * HIDDEN)]
    else:
        upper = net.op("Slice", y, net.ints(2), net.ints(HIDDEN), net.ints(3))
        outputs = [net.op("Add", dense(flat(y), 2 * HIDDEN), net.op("ReduceSum", dense(upper, HIDDEN - 2), net.ints(1), keepdims=0))]
    return net.model(*outputs), {x: rng.normal(size=(STEPS, BATCH, 6)).astype(np.float32)}


def hidden_sizes(proto: onnx.ModelProto) -> list[int]:
    return [item.i for node in proto.graph.node if node.op_type in GATES for item in node.attribute if item.name == "hidden_size"]


@pytest.mark.parametrize("op", GATES)
@pytest.mark.parametrize("form", [*APART, *TOGETHER])
def test_mask_is_surgery(op: str, form: str) -> None:
    proto, feed = model(op, form)
    graph = Graph(prepare(proto))
    coupling = trace(graph, find(graph))
    (rows, *_) = coupling.ways
    if form in APART:
        assert len(np.unique(rows)) == 2 * HIDDEN
    else:
        assert (rows[0] == rows[1])[2 if form == "part" else 0 :].all()
    removed = []
    for seed in range(4):
        check_mask_is_surgery(proto, feed, np.random.default_rng(seed))
        operation = check_units_go(proto, feed, np.random.default_rng(seed), all_go=form != "part")
        removed.append(operation.units_removed)
        assert (max(hidden_sizes(operation.model)) < HIDDEN) == (operation.units_removed > 0)
    assert sum(item > 0 for item in removed) >= (0 if form == "to an output" else 3)


@pytest.mark.parametrize("op", GATES)
@pytest.mark.parametrize("form", APART)
def test_other_places_of_each_direction_go(op: str, form: str) -> None:
    proto, feed = model(op, form, spread=1.5)
    found = relief_onnx.prune(proto, [feed] * 3, granularity="channel", keep="50%", round_to=1, repair="none")
    assert max(hidden_sizes(found.model)) < HIDDEN
    # Columns of R are zeros where a unit went, in the rows of its own direction.
    r = next(node.input[2] for node in found.masked.graph.node if node.op_type in GATES)
    masks = [mask for name, mask in found.masks.keep.items() if name == r or r.startswith(name)]
    kept = masks[0].reshape(2, -1, HIDDEN).any(1)
    assert kept.sum(1).tolist() == [hidden_sizes(found.model)[0]] * 2
    (wide,), (small,) = (Session(item, 1).run(feed) for item in (found.masked, found.model))
    np.testing.assert_allclose(small, wide, atol=1e-5)


def test_the_choice_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many units left, the error is smaller than where both directions lose the same places."""
    ratios = []
    for seed in range(8):
        proto, _ = model("GRU", "joined", seed=seed, spread=1.0)
        rng = np.random.default_rng(seed)
        feeds = [{proto.graph.input[0].name: rng.normal(size=(STEPS, BATCH, 6)).astype(np.float32)} for _ in range(16)]
        asked: dict[str, Any] = {"granularity": "channel", "keep": "55%", "round_to": 1, "repair": "none"}
        errors, sizes = [], []
        for rule in (paired, lambda coupling, values: paired(coupling)):
            monkeypatch.setattr(decide, "paired", rule)
            found = relief_onnx.prune(proto, feeds, **asked)
            a, b = (np.stack([Session(item, 1).run(feed)[0] for feed in feeds]) for item in (proto, found.model))
            errors.append(float(np.square(a - b).mean() / a.var()))
            sizes.append(hidden_sizes(found.model))
        assert sizes[0] == sizes[1]
        ratios.append(errors[0] / errors[1])
    assert np.median(ratios) < 0.8
    assert sum(ratio < 1 for ratio in ratios) >= 6


def test_pinned_units_are_paired_first() -> None:
    net = Net(seed=1)
    x = net.input(STEPS, BATCH, 6)
    y = net.op("GRU", x, net.weight(2, 24, 6), net.weight(2, 24, HIDDEN), direction="bidirectional", hidden_size=HIDDEN)
    there = net.op("Squeeze", net.op("Slice", y, net.ints(0), net.ints(1), net.ints(1)), net.ints(1))
    joined = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3]), net.ints(STEPS, BATCH, 2 * HIDDEN))
    some = net.op("Slice", there, net.ints(5), net.ints(HIDDEN), net.ints(2))
    graph = Graph(prepare(net.model(net.op("MatMul", joined, net.weight(2 * HIDDEN, 3)), some)))
    coupling = trace(graph, find(graph))
    (rows,) = coupling.ways
    assert [unit in coupling.pinned for unit in rows[0].tolist()] == [False] * 5 + [True] * 3
    assert not any(unit in coupling.pinned for unit in rows[1].tolist())
    values = {unit: float(number) for number, unit in enumerate(rows.reshape(-1).tolist())}
    found = paired(coupling, values)
    (both,) = found.ways
    np.testing.assert_array_equal(np.sort(both[0]), np.sort(both[1]))
    # The three that must stay take the best three of the other direction with them; the best that can go are partners.
    assert {both[0, place] for place in (5, 6, 7)} == {both[1, place] for place in (5, 6, 7)}
    assert [both[0, place] for place in range(5)] == [both[1, place] for place in range(5)]
    assert {unit for unit in both.reshape(-1).tolist() if unit in found.pinned} == {both[0, place] for place in (5, 6, 7)}


def test_as_many_in_each_direction() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        ways = [rng.permutation(24)[:16].reshape(2, 8) for _ in range(2)]
        units = {unit for unit in range(24) if rng.random() < 0.5}
        left = balanced(units, ways, {})
        assert left <= units
        for rows in ways:
            counts = np.isin(rows, list(left)).sum(1)
            assert counts[0] == counts[1]
        assert balanced(left, ways, {}) == left
    assert balanced({0, 1, 8}, [np.arange(16).reshape(2, 8)], {0: 5, 1: 2}) == {0, 8}


def test_rows_and_columns_of_a_weight() -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(2, 6, 4))
    tie = Tie("r", 2, np.arange(8).reshape(2, 4), across=0)
    first, second = np.array([[1, 1, 0, 1], [0, 1, 1, 1]], bool), np.array([[1, 0, 1], [1, 1, 0]], bool)
    once = tie.taken(weight, first)
    twice = tie.taken(once, second)
    columns = composed(chosen_columns(first), chosen_columns(second))
    np.testing.assert_array_equal(weight.reshape(12, 4)[crossed(np.arange(12), columns)], twice.reshape(12, 2))
    np.testing.assert_array_equal(tie.spread(first, 3)[:, 0], first)
    np.testing.assert_array_equal(tie.holding(weight * tie.spread(first, 3) != 0), first)
    turned = Tie("r", 0, np.arange(8).reshape(2, 4), across=1)
    np.testing.assert_array_equal(turned.taken(weight.transpose(2, 0, 1), first), once.transpose(2, 0, 1))
    np.testing.assert_array_equal(turned.holding((weight * tie.spread(first, 3)).transpose(2, 0, 1) != 0), first)
    plain = np.array([0, 2])
    np.testing.assert_array_equal(composed(chosen_columns(first), plain), [[0, 3], [1, 3]])
    np.testing.assert_array_equal(composed(np.array([1, 3, 4]), plain), [1, 4])


@pytest.mark.parametrize("scales", ["one", "rows"])
def test_weights_that_come_as_integers(scales: str) -> None:
    """Scales for each row hold for both directions, so there the same places go, and what is left are integers still."""
    net, rng = Net(seed=3), np.random.default_rng(3)
    x = net.input(STEPS, BATCH, 6)

    def stored(width: int) -> str:
        weight = rng.integers(-127, 128, (2, 3 * HIDDEN, width)).astype(np.int8)
        scale = np.float32(0.005) if scales == "one" else rng.uniform(0.002, 0.01, 3 * HIDDEN).astype(np.float32)
        zero = np.zeros_like(scale, np.int8)
        return net.op("DequantizeLinear", net.constant(weight), net.constant(scale), net.constant(zero), axis=1)

    w, r = stored(6), stored(HIDDEN)
    y = net.op("GRU", x, w, r, direction="bidirectional", hidden_size=HIDDEN)
    flat = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3]), net.ints(STEPS, BATCH, 2 * HIDDEN))
    gains = np.exp(rng.normal(size=(2 * HIDDEN, 1))) * rng.normal(size=(2 * HIDDEN, 3))
    proto = net.model(net.op("MatMul", flat, net.constant(gains.astype(np.float32))))
    feed = {x: rng.normal(size=(STEPS, BATCH, 6)).astype(np.float32)}
    found = relief_onnx.prune(proto, [feed] * 3, granularity="channel", keep="50%", round_to=1, repair="none")
    assert max(hidden_sizes(found.model)) < HIDDEN
    (wide,), (small,) = (Session(item, 1).run(feed) for item in (found.masked, found.model))
    np.testing.assert_allclose(small, wide, atol=1e-5)
    integers = [item.name for item in found.model.graph.initializer if item.data_type == onnx.TensorProto.INT8 and len(item.dims) == 3]
    assert len(integers) == 2
    rows = found.masks.keep[integers[1]].reshape(2, -1, HIDDEN).any(1)
    assert (rows[0] == rows[1]).all() == (scales == "rows")
    for first, second in zip(proto.graph.node, found.model.graph.node, strict=False):
        assert first.doc_string == second.doc_string
