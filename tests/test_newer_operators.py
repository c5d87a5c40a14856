"""Newer operators (opset 18 to 26): relevance passes them whole, and channels either go or have a reason; run in onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from builders import Net
from onnx import TensorProto, helper

import relief_onnx
from relief_onnx.errors import ModelError, NothingPrunedError
from relief_onnx.session import Session

T, C = 5, 8


def dense(net: Net, x: str, inputs: int = C, out: int = C) -> str:
    return str(net.op("Add", net.op("MatMul", x, net.weight(inputs, out)), net.bias(out)))


def attention(net: Net, x: str, kv: int = 2, four: bool = False) -> str:
    q, k, v = dense(net, x), dense(net, x, C, 4 * kv), dense(net, x, C, 4 * kv)
    if not four:
        return str(net.op("Attention", q, k, v, q_num_heads=2, kv_num_heads=kv))
    parts = [net.op("Transpose", net.op("Reshape", item, net.ints(0, T, -1, 4)), perm=[0, 2, 1, 3]) for item in (q, k, v)]
    y = net.op("Transpose", net.op("Attention", *parts), perm=[0, 2, 1, 3])
    return str(net.op("Reshape", y, net.ints(0, T, C)))


def rotary(net: Net, x: str) -> str:
    places = net.constant(np.arange(T)[None].repeat(2, 0))
    angles = net.rng.uniform(0, 3, (T, 2)).astype(np.float32)
    return str(net.op("RotaryEmbedding", dense(net, x), net.constant(np.cos(angles)), net.constant(np.sin(angles)), places, num_heads=2))


def scattered(net: Net, x: str) -> str:
    cache = net.op("Relu", dense(net, x))
    return str(net.op("TensorScatter", net.op("Unsqueeze", cache, net.ints(1)), net.op("Unsqueeze", dense(net, x), net.ints(1))))


def scatter_elements(net: Net, x: str) -> str:
    index = net.constant(np.zeros((2, 1, C), np.int64))
    update = net.op("Slice", dense(net, x), net.ints(0), net.ints(1), net.ints(1))
    return str(net.op("ScatterElements", dense(net, x), index, update, axis=1))


Build = Callable[[Net, str], str]
CASES: dict[str, tuple[int, Build]] = {
    "Attention": (23, attention),
    "Attention with shared keys": (23, lambda net, x: attention(net, x, kv=1)),
    "Attention of four axes": (23, lambda net, x: attention(net, x, four=True)),
    "RMSNormalization": (23, lambda net, x: net.op("RMSNormalization", dense(net, x), net.weight(C))),
    "RotaryEmbedding": (23, rotary),
    "Swish": (24, lambda net, x: net.op("Swish", dense(net, x))),
    "Gelu": (20, lambda net, x: net.op("Gelu", dense(net, x))),
    "TensorScatter": (24, scattered),
    "GroupNormalization": (21, lambda net, x: net.op("GroupNormalization", dense(net, x), net.weight(T), net.bias(T), num_groups=1)),
    "Mish": (18, lambda net, x: net.op("Mish", dense(net, x))),
    "CenterCropPad": (18, lambda net, x: net.op("CenterCropPad", dense(net, x), net.ints(T), axes=[1])),
    "ScatterElements": (18, scatter_elements),
    "Trilu": (18, lambda net, x: net.op("Trilu", dense(net, x))),
    "LRN": (18, lambda net, x: net.op("Squeeze", net.op("LRN", net.op("Unsqueeze", dense(net, x), net.ints(3)), size=3), net.ints(3))),
    "CastLike": (19, lambda net, x: net.op("CastLike", dense(net, x), net.constant(np.float32(1)))),
    "GatherElements": (18, lambda net, x: net.op("GatherElements", dense(net, x), net.constant(np.zeros((2, T, C), np.int64)), axis=1)),
}


def made(name: str) -> tuple[onnx.ModelProto, dict[str, Any]]:
    opset, build = CASES[name]
    net = Net(seed=3, opset=opset, ir_version=10)
    x = net.input(2, T, C)
    y = build(net, x)
    if name == "TensorScatter":
        y = net.op("Squeeze", y, net.ints(1))
    model = net.model(dense(net, y, C, 3))
    feed = {x: net.rng.standard_normal((2, T, C)).astype(np.float32)}
    try:
        Session(model, 1).run(feed)
    except ModelError as error:
        pytest.skip(f"this onnxruntime has no kernel: {error}")
    return model, feed


def batches(feed: dict[str, Any]) -> list[dict[str, Any]]:
    return [{name: np.roll(value, shift, 1) * (1 + shift) for name, value in feed.items()} for shift in range(6)]


@pytest.mark.parametrize("name", CASES)
def test_relevance_passes_whole(name: str) -> None:
    """What the last layer's inputs carry comes back to the layers before it, all of it, and nothing is passed on evenly."""
    model, feed = made(name)
    result = relief_onnx.prune(model, batches(feed), keep="60%")
    assert result.report["flow"]["evenly"] == []
    relevance = [row["relevance"] for row in result.report["layers"] if "relevance" in row]
    assert relevance[-1] == pytest.approx(1)
    assert sum(relevance[:-1]) == pytest.approx(1, rel=1e-6)
    assert all(value > 0 for value in relevance)


def test_a_part_that_is_written_into_a_tensor() -> None:
    """Of other sizes than the tensor: relevance is passed on evenly, all of it, and the node is listed."""
    net = Net(seed=3, opset=18, ir_version=10)
    x = net.input(2, T, C)
    whole = net.op("Transpose", dense(net, x), perm=[2, 0, 1])
    part = net.op("Transpose", dense(net, x, C, 3), perm=[2, 0, 1])
    written = net.op("ScatterND", whole, net.constant(np.array([[1], [4], [6]])), part)
    model = net.model(dense(net, net.op("Transpose", written, perm=[1, 2, 0]), C, 3))
    feed = {x: net.rng.standard_normal((2, T, C)).astype(np.float32)}
    result = relief_onnx.prune(model, batches(feed), keep="60%")
    assert [row["op"] for row in result.report["flow"]["evenly"]] == ["ScatterND"]
    relevance = [row["relevance"] for row in result.report["layers"]]
    assert sum(relevance[:-1]) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_pruned_or_a_reason(name: str, granularity: str) -> None:
    model, feed = made(name)
    reasons: tuple[tuple[str, str], ...] = ()
    try:
        result = relief_onnx.prune(model, batches(feed), keep="60%", granularity=granularity, round_to=1)
    except NothingPrunedError as error:
        reasons = error.reasons
    if reasons:
        assert granularity == "channel"
        assert any(name.split()[0] in reason for _, reason in reasons)
        return
    assert result.report["totals"]["kept_percent"] < 99.9


@pytest.mark.parametrize("kv", [1, 2])
def test_attention_is_like_what_it_stands_for(kv: int) -> None:
    """R of the layers that make Q, K and V is that in the same network written with MatMul and Softmax, or near it."""
    net = Net(seed=3, opset=23, ir_version=10)
    x = net.input(2, T, C)
    q, k, v = dense(net, x), dense(net, x, C, 4 * kv), dense(net, x, C, 4 * kv)
    parts = [net.op("Transpose", net.op("Reshape", item, net.ints(0, T, -1, 4)), perm=[0, 2, 1, 3]) for item in (q, k, v)]
    scores = net.op("Mul", net.op("MatMul", parts[0], net.op("Transpose", parts[1], perm=[0, 1, 3, 2])), net.constant(np.float32(0.5)))
    context = net.op("MatMul", net.op("Softmax", scores, axis=-1), parts[2])
    plain = net.model(dense(net, net.op("Reshape", net.op("Transpose", context, perm=[0, 2, 1, 3]), net.ints(0, T, C)), C, 3))
    fused, feed = made("Attention" if kv == 2 else "Attention with shared keys")
    both = []
    for model in (plain, fused):
        found = relief_onnx.score(model, batches(feed), criterion="flow")
        both.append([score.relevance for score in found.values()][:3])
    for one, other in zip(*both, strict=True):
        assert one is not None
        assert other is not None
        assert other.sum() == pytest.approx(one.sum(), rel=1e-6)
    np.testing.assert_allclose(both[0][2], both[1][2], rtol=1e-6)


def test_a_sum_with_a_tensor_of_unknown_rank_passes_relevance_on_evenly() -> None:
    """What com.microsoft Inverse makes has no size that is known."""
    net = Net(2)
    x = net.op("MatMul", net.input("n", 4, 4), net.weight(4, 4))
    x = net.op("Add", net.op("Inverse", x, domain="com.microsoft"), x)
    model = net.model(net.op("MatMul", x, net.weight(4, 3)))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info(model.graph.output[0].name, TensorProto.FLOAT, ["n", 4, 3]))
    if all(item.domain != "com.microsoft" for item in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    feed = {model.graph.input[0].name: np.random.default_rng(0).standard_normal((8, 4, 4)).astype(np.float32)}
    result = relief_onnx.prune(model, [feed], keep="60%", threads=1, storage="dense")
    assert "Add" in {row["op"] for row in result.report["flow"]["evenly"]}


@pytest.mark.parametrize("name", CASES)
def test_repaired(name: str) -> None:
    """Piece by piece, too, and closer to the original than before."""
    model, feed = made(name)
    errors = []
    for repair in ("none", "least-squares"):
        result = relief_onnx.prune(model, batches(feed), keep="60%", granularity="weight", repair=repair, criterion="flow", threads=1)
        kept = Session(result.model)
        errors.append(sum(float(np.square(kept.run(own)[0] - Session(model).run(own)[0]).sum()) for own in batches(feed)))
    assert errors[1] < errors[0]
