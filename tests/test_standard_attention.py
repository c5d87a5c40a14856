"""ONNX's own Attention and RotaryEmbedding: laid open they compute the same, and whole heads go where nothing else says no."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from fused_cases import CASES, HEADS, C, Feed, Fused, T, dense
from interpreter_cases import node_cases
from onnx import TensorProto, helper
from test_attention_states import pruned

import relief_onnx
from relief_onnx.errors import DataError, ModelError
from relief_onnx.fused import lay_open, refusal
from relief_onnx.graph import Graph
from relief_onnx.session import Session

NODES = [
    name for name, case in node_cases().items()
    if [node.op_type for node in case.model.graph.node] in (["Attention"], ["RotaryEmbedding"])
]  # fmt: skip
NAMES = sorted(name for name in CASES if name.startswith(("standard", "rotary")))


@pytest.mark.parametrize("name", NODES)
def test_onnx_node_tests_laid_open(name: str) -> None:
    """Of ONNX's own cases all that onnxruntime runs; the node comes back as it was."""
    case = node_cases()[name]
    ((inputs, _),) = case.data_sets
    feed = {item.name: np.asarray(value) for item, value in zip(case.model.graph.input, inputs, strict=True)}
    try:
        wanted = Session(case.model, 1).run(feed)
    except (DataError, ModelError) as error:
        pytest.skip(f"this onnxruntime has no kernel: {error}")
    opened = lay_open(case.model)
    if opened is None:
        hands_on = len(case.model.graph.node[0].output) > 3
        what = "hands on its scores" if hands_on else "has a window"
        assert refusal(Graph(case.model), 0) == f"it {what}, which is not known here"
        assert hands_on or "window" in name
        return
    lowered, restore = opened
    assert not {"Attention", "RotaryEmbedding"} & {node.op_type for node in lowered.graph.node}
    for one, other in zip(wanted, Session(lowered, 1).run(feed), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3 if one.dtype == np.float16 else 2e-6)
    assert restore(lowered, {}) == case.model


@pytest.mark.parametrize("opset", [23, 24])
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("never", [None, -np.inf, np.finfo(np.float32).min])
def test_queries_that_may_see_nothing(never: float | None, causal: int, opset: int) -> None:
    """They get 0, whether the mask is of flags, of -inf or of the least number."""
    net = Fused(seed=1, opset=opset, ir_version=10)
    parts = [net.input(2, HEADS, T, 4) for _ in range(3)]
    seen = net.rng.random((T, T)) < 0.6
    seen[2] = False
    mask = seen if never is None else np.where(seen, 0, np.float32(never))
    net.inputs.append(("mask", (T, T), TensorProto.BOOL if never is None else TensorProto.FLOAT))
    model = net.done((net.op("Attention", *parts, "mask", is_causal=causal), 4))
    feed: Feed = {name: net.rng.standard_normal((2, HEADS, T, 4)).astype(np.float32) for name in parts} | {"mask": mask}
    opened = lay_open(model)
    assert opened is not None
    (wanted,), (found,) = Session(model, 1).run(feed), Session(opened[0], 1).run(feed)
    assert not wanted[:, :, 2].any()
    np.testing.assert_allclose(wanted, found, atol=1e-6)


def heads_of(model: onnx.ModelProto) -> tuple[int, int]:
    """Heads of queries, and of keys and values, of the only Attention."""
    (node,) = (node for node in model.graph.node if node.op_type == "Attention")
    graph, values = Graph(model), {item.name: item.i for item in node.attribute}
    shapes = [graph.shape(name) or () for name in node.input[:2]]
    found = [size if isinstance(size, int) else 0 for size in ((shape[1]) for shape in shapes)]
    return (values["q_num_heads"], values["kv_num_heads"]) if len(shapes[0]) == 3 else (found[0], found[1])


@pytest.mark.parametrize("name", [name for name in NAMES if "past" not in name])
def test_whole_heads_go(name: str) -> None:
    """With the node itself in the file, and nothing around it but what was there."""
    model, feed = CASES[name]()
    result = pruned(model, feed, keep="20%")
    (heads, groups), (left, kept) = heads_of(model), heads_of(result.model)
    assert left < heads
    assert kept < groups or groups == 1
    assert left % kept == 0
    turned = [item.i for node in result.model.graph.node if node.op_type == "RotaryEmbedding" for item in node.attribute
              if item.name == "num_heads"]  # fmt: skip
    assert turned in ([], [left, kept])
    assert sorted(node.op_type for node in result.model.graph.node) == sorted(node.op_type for node in model.graph.node)
    assert Session(result.model, 1).signature() == Session(model, 1).signature()
    onnx.checker.check_model(result.model, full_check=True)
    one, other = (Session(item, 1).run(feed)[0] for item in (result.masked, result.model))
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_narrower_heads_keep_their_scale() -> None:
    """Heads that join a batch of any size cannot go; entries of all of them can, and the scores are those of before."""
    model, feed = CASES["joined heads"]()
    result = pruned(model, feed, keep="50%")
    (node,) = (node for node in result.model.graph.node if node.op_type == "Attention")
    _, heads, _, width = Graph(result.model).shape(node.input[0]) or ()
    assert heads == HEADS
    assert isinstance(width, int)
    assert width < 4
    assert {item.name: helper.get_attribute_value(item) for item in node.attribute}["scale"] == pytest.approx(0.5)
    one, other = (Session(item, 1).run(feed)[0] for item in (result.masked, result.model))
    np.testing.assert_allclose(one, other, atol=1e-5)


def with_states() -> tuple[onnx.ModelProto, Feed]:
    """A decoder step: keys and values of before are inputs of the model, and of now outputs."""
    net = Fused(seed=4, opset=23)
    x = net.input("N", 1, 7)
    feed: Feed = {x: net.rng.standard_normal((6, 1, 7)).astype(np.float32)}
    for name in ("past_k", "past_v"):
        net.inputs.append((name, ("N", 2, 3, 4), TensorProto.FLOAT))
        feed[name] = net.rng.standard_normal((6, 2, 3, 4)).astype(np.float32)
    y = net.op("Relu", dense(net, x, 7, C))
    parts = [dense(net, y, C, count * 4) for count in (4, 2, 2)]
    y = net.op("Attention", *parts, "", "past_k", "past_v", outputs=3, q_num_heads=4, kv_num_heads=2, is_causal=1)
    return net.done((dense(net, y[0], 16, 3), 3), (y[1], 4), (y[2], 4)), feed


def test_states_of_the_model_keep_their_shapes() -> None:
    model, feed = with_states()
    result = pruned(model, feed, keep="70%")
    assert heads_of(result.model) == (4, 2)
    assert result.report["totals"]["kept_percent"] < 75
    assert Session(result.model, 1).signature() == Session(model, 1).signature()
    reasons = {str(group["reason"]) for group in result.report["groups"] if group["pinned"]}
    assert any("past_k" in reason or "an output of the model" in reason for reason in reasons)
    for one, other in zip(Session(result.masked, 1).run(feed), Session(result.model, 1).run(feed), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_scores_that_are_handed_on_say_why() -> None:
    net = Fused(seed=4, opset=23)
    x = net.input("N", T, C)
    y = net.op("Attention", *(dense(net, x, C, C) for _ in range(3)), outputs=4, q_num_heads=HEADS, kv_num_heads=HEADS)
    model, feed = net.done((dense(net, y[0], C, 3), 3), (y[3], 4)), {x: net.rng.standard_normal((6, T, C)).astype(np.float32)}
    with pytest.raises(relief_onnx.errors.NothingPrunedError) as error:
        pruned(model, feed, keep="60%")
    assert any("it hands on its scores" in reason for _, reason in error.value.reasons)


@pytest.mark.parametrize(
    "name", ["standard, groups", "standard, four axes", "rotary, halves", "rotary, given, four axes", "groups, softcap"]
)
def test_repaired(name: str) -> None:
    """Least squares behind heads that went, and steps of torch through the node itself, come closer to the original."""
    model, feed = CASES[name]()
    wanted = Session(model, 1).run(feed)[0]
    errors = []
    for values in ({}, {"repair": "least-squares"}, {"repair": "distill", "epochs": 30, "batch": 2, "validation": 0.0}):
        result = pruned(model, feed, keep="20%", criterion="flow", **values)
        errors.append(float(np.square(Session(result.model, 1).run(feed)[0] - wanted).sum()))
    assert max(errors[1:]) < errors[0]
