"""States that are caches, packed, or twice as wide as a node get narrower with `allow_state_change`, and only then."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from builders import Net
from helpers import real_model
from laws import Feed
from numpy.typing import NDArray
from surgery_cases import box_of
from test_states import looped

import relief_onnx
from benchmarks import speech
from relief_onnx.caches import find_all_states
from relief_onnx.graph import Graph
from relief_onnx.layers import find
from relief_onnx.model import prepare

ASKED: dict[str, Any] = {"granularity": "channel", "keep": "50%", "round_to": 1, "repair": "none", "threads": 1}
CHANNELS, WIDTH, HIDDEN, BATCH = 8, 5, 6, 2
Streaming = tuple[onnx.ModelProto, dict[str, str], list[Feed]]


def finished(net: Net, x: str, out: str, pairs: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> Streaming:
    rng = np.random.default_rng(5)
    feeds = [{name: rng.normal(size=size).astype(np.float32) for name, size in shapes.items()} for _ in range(6)]
    return net.model(out, *pairs.values()), pairs, feeds


def cached(form: str) -> Streaming:
    """Two convolutions over time, one frame at a time, with the frames before in caches [batch, channels, frames, width]."""
    net = Net(seed=7)
    x = net.input(1, 3, 1, WIDTH)
    old = {"slice": 2, "longer": 4}.get(form, 2)
    shape = (1, CHANNELS, old, WIDTH) if form in ("slice", "longer") else (2, 1, CHANNELS, 2 * old, WIDTH)
    if form == "last axis":
        shape = (1, old, WIDTH, CHANNELS)
    cache = net.input(*shape)

    def frames(new: str, before: str) -> tuple[str, str]:
        joined = net.op("Concat", before, new, axis=2)
        return joined, net.op("Slice", joined, net.ints(1), net.ints(1 << 30), net.ints(2))

    first = net.op("PRelu", net.op("Conv", x, net.weight(CHANNELS, 3, 1, 1), net.bias(CHANNELS)), net.constant(np.array([0.2], np.float32)))
    end: str
    if form in ("slice", "longer", "last axis"):
        own = net.op("Transpose", cache, perm=[0, 3, 1, 2]) if form == "last axis" else cache
        seen, end = frames(first, own)
        end = net.op("Transpose", end, perm=[0, 2, 3, 1]) if form == "last axis" else end
        h = net.op("Conv", seen, net.weight(CHANNELS, 1, old + 1, 3), net.bias(CHANNELS), group=CHANNELS, pads=[0, 1, 0, 1])
    else:
        # Half of the frames for each of two convolutions, for each of two stages; written back entry by entry, or as a whole.
        now, h = cache, first
        for stage in range(2):
            part = net.op("Gather", now, net.constant(np.array(stage)), axis=0)
            for half in range(2):
                bounds = net.ints(half * old), net.ints((half + 1) * old), net.ints(2)
                seen, left = frames(h, net.op("Slice", part, *bounds))
                h = net.op(
                    "Relu", net.op("Conv", seen, net.weight(CHANNELS, 1, old + 1, 3), net.bias(CHANNELS), group=CHANNELS, pads=[0, 1, 0, 1])
                )
                box = box_of(1, CHANNELS, (half * old, (half + 1) * old), WIDTH)
                part = net.op("ScatterND", part, net.constant(box), left)
            if stage == 0:
                h = net.op("Conv", net.op("Conv", h, net.weight(4, CHANNELS, 1, 1)), net.weight(CHANNELS, 4, 1, 1))
            now = net.op("ScatterND", now, net.constant(np.array([[stage]])), net.op("Unsqueeze", part, net.ints(0)))
        end = now
    out = net.op("Conv", h, net.weight(2, CHANNELS, 1, 1))
    return finished(net, x, out, {cache: end}, {x: (1, 3, 1, WIDTH), cache: shape})


def packed(form: str) -> Streaming:
    """Recurrent nodes whose states stand side by side along one axis of one tensor."""
    net, both = Net(seed=8), form == "both directions"
    x = net.input(1, BATCH, 4)
    shape = (BATCH, 2 * HIDDEN) if form != "stacked" else (2, BATCH, HIDDEN)
    state = net.input(*shape)
    if form in ("h and c", "stacked"):
        split = {"axis": 1 if form == "h and c" else 0, "outputs": 2}
        parts = net.op("Split", state, net.ints(*[HIDDEN if form == "h and c" else 1] * 2), **split)
        h, c = (net.op("Unsqueeze", part, net.ints(0)) for part in parts) if form == "h and c" else parts
        weights = net.weight(1, 4 * HIDDEN, 4), net.weight(1, 4 * HIDDEN, HIDDEN), net.bias(1, 8 * HIDDEN)
        y, *last = net.op("LSTM", x, *weights, "", h, c, outputs=3, hidden_size=HIDDEN)
        end = net.op("Concat", *last, axis=2 if form == "h and c" else 0)
        end = net.op("Squeeze", end, net.ints(0)) if form == "h and c" else end
        out = net.op("MatMul", net.op("Squeeze", y, net.ints(1)), net.weight(HIDDEN, 3))
    elif form == "two nodes":  # each hears half of the features, as in grouped recurrent layers
        halves = [net.op("Slice", state, net.ints(k * HIDDEN), net.ints((k + 1) * HIDDEN), net.ints(1)) for k in range(2)]
        made = []
        for k, half in enumerate(halves):
            heard = net.op("Slice", x, net.ints(2 * k), net.ints(2 * k + 2), net.ints(2))
            weights = net.weight(1, 3 * HIDDEN, 2), net.weight(1, 3 * HIDDEN, HIDDEN)
            made.append(net.op("GRU", heard, *weights, "", "", net.op("Unsqueeze", half, net.ints(0)), outputs=2, hidden_size=HIDDEN))
        y = net.op("Concat", *(net.op("Squeeze", own[0], net.ints(1)) for own in made), axis=2)
        end = net.op("Squeeze", net.op("Concat", *(own[1] for own in made), axis=2), net.ints(0))
        out = net.op("MatMul", y, net.weight(2 * HIDDEN, 3))
    else:
        assert both
        h = net.op("Transpose", net.op("Reshape", state, net.ints(BATCH, 2, HIDDEN)), perm=[1, 0, 2])
        weights = net.weight(2, 3 * HIDDEN, 4), net.weight(2, 3 * HIDDEN, HIDDEN), net.bias(2, 6 * HIDDEN)
        y, last = net.op("GRU", x, *weights, "", h, outputs=2, hidden_size=HIDDEN, direction="bidirectional")
        end = net.op("Reshape", net.op("Transpose", last, perm=[1, 0, 2]), net.ints(BATCH, 2 * HIDDEN))
        y = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3]), net.ints(1, BATCH, 2 * HIDDEN))
        out = net.op("MatMul", y, net.weight(2 * HIDDEN, 3))
    return finished(net, x, out, {state: end}, {x: (1, BATCH, 4), state: shape})


CASES = {
    **{form: (cached, form) for form in ("slice", "longer", "last axis", "written back")},
    **{form: (packed, form) for form in ("h and c", "stacked", "two nodes", "both directions")},
}


def check_loop(found: relief_onnx.Result, pairs: dict[str, str], feed: Feed, chunks: list[NDArray[Any]], tolerance: float) -> None:
    """The narrow model on its own states is the masked one on its own, from any first states."""
    changes = {item["name"]: item for item in found.report["state_changes"]}
    declared = {
        info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        for info in (*found.model.graph.input, *found.model.graph.output)
    }
    for state, end in pairs.items():
        assert (state in changes) == (end in changes)
        if state in changes:
            assert changes[state]["kept"] == changes[end]["kept"]
            assert changes[state]["axis"] == changes[end]["axis"]
            assert changes[state]["after"] == changes[end]["after"] == declared[state]
            assert declared[end] in (declared[state], [0] * len(declared[state]))  # open sizes stay open
    narrow = {
        name: np.take(value, changes[name]["kept"], changes[name]["axis"]) if name in changes else value for name, value in feed.items()
    }
    wide, small = looped(found.masked, pairs, feed, chunks), looped(found.model, pairs, narrow, chunks)
    for a, b in zip(wide[: len(chunks)], small, strict=False):
        np.testing.assert_allclose(b, a, atol=tolerance)
    for name, a, b in zip(pairs, wide[len(chunks) :], small[len(chunks) :], strict=True):
        if name in changes:
            item = changes[name]
            np.testing.assert_allclose(b, np.take(a, item["kept"], item["axis"]), atol=tolerance)
            assert not np.delete(a, item["kept"], item["axis"]).any()
        else:
            np.testing.assert_allclose(b, a, atol=tolerance)
    assert not any("state_mask" in item.name for item in found.model.graph.initializer)


@pytest.mark.parametrize("case", CASES)
def test_the_narrow_loop_is_the_masked_loop(case: str) -> None:
    build, form = CASES[case]
    model, pairs, feeds = build(form)
    found = relief_onnx.prune(model, feeds, allow_state_change=True, **ASKED)
    assert {item["name"] for item in found.report["state_changes"]} == {*pairs, *pairs.values()}
    rng = np.random.default_rng(0)
    x = next(name for name in feeds[0] if name not in pairs)
    check_loop(found, pairs, feeds[0], [rng.normal(size=feeds[0][x].shape).astype(np.float32) for _ in range(6)], 1e-5)
    full = looped(model, pairs, feeds[0], [feeds[0][x]])
    assert np.abs(full[0] - looped(found.masked, pairs, feeds[0], [feeds[0][x]])[0]).max() > 1e-3  # something did go


@pytest.mark.parametrize("case", CASES)
def test_without_the_option_states_stay(case: str) -> None:
    build, form = CASES[case]
    model, _, feeds = build(form)
    before = {info.name: info.type for info in (*model.graph.input, *model.graph.output)}
    if form != "written back":
        with pytest.raises(relief_onnx.NothingPrunedError, match=r"first state|not tracked"):
            relief_onnx.prune(model, feeds, **ASKED)
        return
    found = relief_onnx.prune(model, feeds, **ASKED)
    assert found.report["state_changes"] == []
    assert {info.name: info.type for info in (*found.model.graph.input, *found.model.graph.output)} == before
    held = [group["reason"] for group in found.report["groups"] if group["pinned"]]
    assert any("not tracked" in reason for reason in held), held


def test_only_what_is_handed_on_is_a_cache() -> None:
    """Not an input that an output is computed from, nor one that another shape is made of, nor one whose channels something else needs."""
    net = Net(seed=1)
    plain, shape, needed = (net.input(1, CHANNELS, 2, WIDTH) for _ in range(3))
    new = net.op("Conv", plain, net.weight(CHANNELS, CHANNELS, 1, 1))
    longer = net.op("Concat", shape, new, axis=2)
    kept = net.op("Slice", net.op("Concat", needed, new, axis=2), net.ints(2), net.ints(4), net.ints(2))
    scaled = net.op("Softmax", needed, axis=1)
    graph = Graph(prepare(net.model(new, longer, kept, scaled)))
    states = find_all_states(graph, find(graph))
    assert states.inputs == {}
    assert states.outputs == frozenset()


def test_a_real_model_with_caches() -> None:
    """GTCRN: two stages of three convolutions each share one cache, twelve GRUs another, four (two side by side) a third."""
    kind, model = speech.MODELS["gtcrn"], onnx.load(real_model("gtcrn"))
    feeds = speech.frames(model, kind, 12)
    found = relief_onnx.prune(model, feeds, criterion="flow", allow_state_change=True, **{**ASKED, "keep": "60%"})
    changes = {item["name"]: item for item in found.report["state_changes"]}
    assert {"conv_cache", "conv_cache_out"} <= changes.keys()
    assert changes["conv_cache"]["axis"] == 2
    pairs = {name: end for name, (end, _) in kind.states.items()}
    check_loop(found, pairs, feeds[0], [feed[kind.sound] for feed in feeds[1:7]], 1e-4)
    whole = relief_onnx.prune(model, feeds[:2], criterion="flow", **{**ASKED, "keep": "60%"})
    assert whole.report["state_changes"] == []
    assert whole.report["output"]["macs"] > found.report["output"]["macs"]
