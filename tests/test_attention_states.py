"""Attention of onnxruntime that carries keys and values on: MultiHeadAttention with a past, GroupQueryAttention; integer embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from fused_cases import CASES, HEADS, C, Feed, Fused, T, dense, grouped, tokens
from onnx import TensorProto, helper
from test_quantised_attention import answers, in_integers, masked_and_cut, operators, same_file, samples

import relief_onnx
from relief_onnx.fused import lay_open
from relief_onnx.prepared import prepare
from relief_onnx.session import Session


def counts(model: onnx.ModelProto, operator: str) -> tuple[int, ...]:
    """Heads (and groups) of the only such node."""
    (node,) = (node for node in model.graph.node if node.op_type == operator)
    found = {item.name: item.i for item in node.attribute}
    return tuple(found[name] for name in ("num_heads", "kv_num_heads") if name in found)


def pruned(model: onnx.ModelProto, feed: Feed, **values: Any) -> Any:
    data = [{name: value[place : place + 1] for name, value in feed.items()} for place in range(6)]
    return relief_onnx.prune(model, data, granularity="channel", round_to=1, storage="dense", threads=1, **values)


@pytest.mark.parametrize(("name", "keep"), [
    ("groups", "45%"), ("groups, all", "45%"), ("groups, handed on", "45%"), ("groups, lengths in a column", "45%"),
    ("groups, packed", "25%"), ("groups, rotary", "35%"), ("groups, rotary in pairs", "20%"), ("groups, softcap", "45%"),
    ("groups, window", "45%"),
])  # fmt: skip
def test_whole_groups_go(name: str, keep: str) -> None:
    model, feed = CASES[name]()
    result = pruned(model, feed, keep=keep)
    before, after = (counts(item, "GroupQueryAttention") for item in (model, result.model))
    assert after[1] < before[1]
    assert after[0] * before[1] == after[1] * before[0]
    one, other = (Session(item, 1).run(feed)[0] for item in (result.masked, result.model))
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_heads_of_the_only_group_go() -> None:
    """Keys and values serve them all, so their channels stay."""
    model, feed = CASES["groups, one"]()
    result = pruned(model, feed, keep="20%")
    heads, groups = counts(result.model, "GroupQueryAttention")
    assert groups == 1
    assert heads < 4
    assert any("of two kinds of channels" in str(group["reason"]) for group in result.report["groups"])


def test_heads_with_a_past_go() -> None:
    model, feed = CASES["heads, past"]()
    assert counts(pruned(model, feed, keep="45%").model, "MultiHeadAttention")[0] < HEADS


def with_states(grouped_heads: bool, past: int = 2) -> tuple[onnx.ModelProto, Feed]:
    """A model whose keys and values of before are inputs, and of now outputs."""
    net = Fused(seed=4)
    heads, groups, size = (4, 2, 8) if grouped_heads else (HEADS, HEADS, C // HEADS)
    tokens_now = 1 if grouped_heads else T
    x = net.input("N", tokens_now, 7)
    feed: Feed = {x: net.rng.standard_normal((6, tokens_now, 7)).astype(np.float32)}
    for name in ("past_k", "past_v"):
        net.inputs.append((name, ("N", groups, past, size), TensorProto.FLOAT))
        feed[name] = net.rng.standard_normal((6, groups, past, size)).astype(np.float32)
    y = net.op("Relu", dense(net, x, 7, C))
    parts = [net.op("MatMul", y, net.weight(C, count * size)) for count in (heads, groups, groups)]
    if grouped_heads:
        net.inputs.append(("last", ("N",), TensorProto.INT32))
        feed["last"] = np.array([past, past - 1, past, past, past - 1, past], np.int32)
        total = net.constant(np.array(past + 1, np.int32), "total")
        out = net.ms("GroupQueryAttention", *parts, "past_k", "past_v", "last", total, outputs=3, num_heads=heads, kv_num_heads=groups)
    else:
        out = net.ms("MultiHeadAttention", *parts, "", "", "", "past_k", "past_v", outputs=3, num_heads=heads)
    return net.done((dense(net, out[0], heads * size, 3), 3), (out[1], 4), (out[2], 4)), feed


@pytest.mark.parametrize("grouped_heads", [False, True])
def test_laid_open_states_are_the_same(grouped_heads: bool) -> None:
    """Samples that have less of before than others are masked."""
    model, feed = with_states(grouped_heads)
    opened = lay_open(model)
    assert opened is not None
    lowered, restore = opened
    first, *states = Session(model, 1).run(feed)
    again, *laid = Session(lowered, 1).run(feed)
    np.testing.assert_allclose(first, again, atol=1e-5)
    full = np.flatnonzero(feed["last"] == 2) if grouped_heads else slice(None)
    for one, other in zip(states, laid, strict=True):
        np.testing.assert_allclose(one[full], other[full], atol=1e-5)
    assert restore(lowered, {}) == model


@pytest.mark.parametrize("grouped_heads", [False, True])
def test_states_of_the_model_keep_their_shapes(grouped_heads: bool) -> None:
    model, feed = with_states(grouped_heads)
    operator = "GroupQueryAttention" if grouped_heads else "MultiHeadAttention"
    result = pruned(model, feed, keep="60%")
    assert counts(result.model, operator) == counts(model, operator)
    assert Session(result.model, 1).signature() == Session(model, 1).signature()
    groups = [group for group in result.report["groups"] if "MatMul" in "".join(group["members"]) and group["pinned"]]
    assert any("input" in str(group["reason"]) or "output" in str(group["reason"]) for group in groups)
    data = [{name: value[place : place + 1] for name, value in feed.items()} for place in range(6)]
    weights = relief_onnx.prune(model, data, granularity="weight", keep="50%", threads=1)
    assert all(row["weights_kept"] < row["weights"] for row in weights.report["layers"])
    assert operators(weights.model)[operator] == 1


@pytest.mark.parametrize(("values", "reason"), [
    ({"local_window_size": 0}, "it has a window of nothing"),
    ({"smooth_softmax": 1}, "it has smooth_softmax"),
])  # fmt: skip
def test_forms_that_are_not_known_say_why(values: dict[str, Any], reason: str) -> None:
    """They stay closed: channels that they read stay, weights around them are pruned, and the reason is told."""
    model, feed = tokens(grouped(**values))()
    assert lay_open(model) is None
    result = pruned(model, feed, keep="70%")
    assert counts(result.model, "GroupQueryAttention") == counts(model, "GroupQueryAttention")
    found = {str(group["reason"]) for group in result.report["groups"]}
    assert any("GroupQueryAttention node" in item and reason in item for item in found), found


def test_what_onnxruntime_has_no_kernel_for_is_an_error() -> None:
    """Heads of five numbers."""
    model, feed = tokens(grouped(size=5))()
    with pytest.raises(relief_onnx.errors.ReliefError, match="head_size"):
        pruned(model, feed, keep="60%")


# -- integer embeddings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["embed", "embed, mask"])
def test_integer_embeddings_are_taken_apart_and_come_back(name: str) -> None:
    given, feed = CASES[name]()
    model = in_integers(given, extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT})
    ready = prepare(model)
    assert {layer.weight for layer in ready.plan.tables} == {f"table{number}_quantized" for number in (1, 2, 3)}
    same_file(ready.restored(ready.graph.model), model)
    masked, cut, _ = masked_and_cut(ready, 0)
    assert np.allclose(answers(masked, feed), answers(cut, feed), atol=1e-5)


def test_integer_tables_that_are_named_are_pruned() -> None:
    given, feed = CASES["embed"]()
    model = in_integers(given, extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT})
    result = relief_onnx.prune(model, samples(feed), keep="60%", threads=1, storage="dense", only="table")
    assert operators(result.model)["QEmbedLayerNormalization"] == 1
    zeros = {item.name: onnx.numpy_helper.to_array(item) for item in result.model.graph.initializer}
    rows = {row["weight"]: row for row in result.report["layers"]}
    for name in ("table1", "table2"):
        row = rows[f"{name}_quantized"]
        assert row["status"] == "pruned"
        assert (zeros[f"{name}_quantized"] != zeros[f"{name}_zero_point"]).sum() == row["weights_kept"] < row["weights"]


def test_integer_tables_of_a_form_that_is_not_known_stay() -> None:
    given, feed = CASES["embed"]()
    model = in_integers(given, extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT})
    (scale,) = (item for item in model.graph.initializer if item.name == "table1_scale")
    model.graph.input.append(helper.make_tensor_value_info(scale.name, scale.data_type, scale.dims))
    ready = prepare(model)
    reasons = [row.reason for row in ready.plan.unranked]
    assert any("its integers, scales or zero points are not stored" in reason for reason in reasons)
    del feed
