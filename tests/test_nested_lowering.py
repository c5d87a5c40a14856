"""Quantised and fused nodes within bodies within bodies: pruned as in the main graph, written back in their own form."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from fused_cases import CASES as FUSED
from helpers import digits
from onnx import TensorProto, helper, numpy_helper
from test_quantised import quantised
from test_quantised_packed import blocks, dynamic
from test_quantised_packed import feed as block_feed
from test_quantised_packed import steps as lstm_steps

import relief_onnx
from relief_onnx.control import settle
from relief_onnx.data import open_dataset
from relief_onnx.model import input_specs
from relief_onnx.prepared import prepare

Feed = dict[str, Any]


def wrapped(model: onnx.ModelProto, captured: bool | str) -> onnx.ModelProto:
    """The whole network in a branch within a Loop of one round.

    captured: its tensors stay in the main graph, "made": with the nodes that need nothing else.
    """
    inside, before = onnx.GraphProto(name="one"), list[onnx.NodeProto]()
    known = {item.name for item in model.graph.initializer} if captured == "made" else set[str]()
    for node in model.graph.node:
        stays = known.issuperset(node.input)
        (before if stays else inside.node).append(node)
        known.update(node.output if stays else ())
    outside = [] if captured else model.graph.initializer
    inside.initializer.extend(outside)
    names = [info.name for info in model.graph.output]
    ranks = [len(info.type.tensor_type.shape.dim) for info in model.graph.output]
    inside.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank) for name, rank in zip(names, ranks, strict=True)
    )
    zeros = [numpy_helper.from_array(np.zeros([1] * rank, np.float32)) for rank in ranks]
    nothing = helper.make_graph(
        [helper.make_node("Constant", [], [f"{name}/no"], value=value) for name, value in zip(names, zeros, strict=True)], "two", [],
        [helper.make_tensor_value_info(f"{name}/no", TensorProto.FLOAT, [None] * rank) for name, rank in zip(names, ranks, strict=True)],
    )  # fmt: skip
    choice = helper.make_node("If", ["flag"], [f"{name}/if" for name in names], name="choice", then_branch=inside, else_branch=nothing)
    body = helper.make_graph(
        [helper.make_node("Identity", ["going"], ["again"]), choice], "each",
        [helper.make_tensor_value_info("round", TensorProto.INT64, []), helper.make_tensor_value_info("going", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("again", TensorProto.BOOL, [])]
        + [helper.make_tensor_value_info(f"{name}/if", TensorProto.FLOAT, [None] * rank) for name, rank in zip(names, ranks, strict=True)],
    )  # fmt: skip
    loop = helper.make_node("Loop", ["rounds", ""], [f"{name}/all" for name in names], name="loop", body=body)
    ends = [helper.make_node("Gather", [f"{name}/all", "nought"], [f"{name}/out"], axis=0) for name in names]
    numbers = [numpy_helper.from_array(np.array(1), "rounds"), numpy_helper.from_array(np.array(0), "nought")]
    stored = [*(model.graph.initializer if captured else ()), *numbers]
    taken = {item.name for item in model.graph.initializer}
    inputs = [info for info in model.graph.input if info.name not in taken]
    graph = helper.make_graph(
        [*before, loop, *ends], "net", [*inputs, helper.make_tensor_value_info("flag", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info(f"{name}/out", TensorProto.FLOAT, [None] * rank) for name, rank in zip(names, ranks, strict=True)],
        stored,
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=model.opset_import)
    made.ir_version = model.ir_version
    onnxruntime.InferenceSession(made.SerializeToString())
    return made


def cast() -> tuple[onnx.ModelProto, Feed]:
    """Two layers of int8 weights behind Cast and Mul, the first with a scale for each neuron."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> net (float[N, 12] x) => (float[N, 4] y) {
            w1_f = Cast <to = 1> (w1)  w1_n = Mul (w1_f, s1)  h = MatMul (x, w1_n)  t = Tanh (h)
            w2_f = Cast <to = 1> (w2)  w2_n = Mul (w2_f, s2)  y = MatMul (t, w2_n)
        }"""
    )
    stored = {
        "w1": rng.integers(-127, 128, (12, 8)).astype(np.int8), "s1": rng.uniform(0.003, 0.01, 8).astype(np.float32),
        "w2": rng.integers(-127, 128, (8, 4)).astype(np.int8), "s2": np.float32(0.01),
    }  # fmt: skip
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items())
    return model, {"x": rng.normal(size=(8, 12)).astype(np.float32)}


MODELS: dict[str, Any] = {
    "Cast and Mul": cast,
    "QDQ": lambda: (quantised("products", "QDQ"), {"image": digits(8)}),
    "QOperator": lambda: (quantised("products", "QOperator"), {"image": digits(8)}),
    "dynamic": lambda: (quantised("products", "dynamic"), {"image": digits(8)}),
    "QDQ of images": lambda: (quantised("lenet5", "QDQ"), {"image": digits(8)}),
    "QLinear of images": lambda: (quantised("lenet5", "QOperator"), {"image": digits(8)}),
    "MatMulNBits": lambda: _with(blocks(), block_feed()),
    "DynamicQuantizeLSTM": lambda: _with(dynamic(1, True), lstm_steps()),
    **{f"fused {name}": FUSED[name] for name in ("conv relu", "gemm", "skip, bias", "attention", "bias gelu")},
}


def _with(model: onnx.ModelProto, values: Any) -> tuple[onnx.ModelProto, Feed]:
    taken = {item.name for item in model.graph.initializer}
    name = next(item.name for item in model.graph.input if item.name not in taken)
    return model, values if isinstance(values, dict) else {name: values}


def operators(graph: onnx.GraphProto) -> list[str]:
    found = []
    for node in graph.node:
        found.append(node.op_type)
        for item in node.attribute:
            if item.type == onnx.AttributeProto.GRAPH:
                found += operators(item.g)
    return sorted(found)


def tensors(graph: onnx.GraphProto) -> dict[str, bytes]:
    found = {item.name: numpy_helper.to_array(item).tobytes() for item in graph.initializer}
    for node in graph.node:
        for item in node.attribute:
            if item.type == onnx.AttributeProto.GRAPH:
                found |= tensors(item.g)
    return found


def feeds(feed: Feed) -> tuple[list[Feed], list[Feed]]:
    """Samples for the plain network, and for the wrapped one with some for which it does not run."""
    count = len(next(iter(feed.values())))
    plain = [{name: value[i : i + 1] for name, value in feed.items()} for i in range(count)]
    return plain, [{**one, "flag": np.array(flag)} for one in plain for flag in ((True, False) if one is plain[0] else (True,))]


FORMS = [(name, captured) for name in MODELS for captured in (False, True)]
# Floats that nodes in the main graph make, captured.
FORMS += [("Cast and Mul", "made"), ("QDQ", "made"), ("QDQ of images", "made")]


@pytest.mark.parametrize(("name", "captured"), FORMS)
def test_nothing_pruned_nothing_changed(name: str, captured: bool | str) -> None:
    model, feed = MODELS[name]()
    made = wrapped(model, captured)
    data = feeds(feed)[1]
    opened = settle(prepare(made), open_dataset(data, input_specs(made)), samples=None, seed=0, threads=1)
    assert {layer.weight for layer in opened.plan.layers} == {layer.weight for layer in prepare(model).plan.layers}
    back = opened.restored(opened.graph.model)
    assert operators(back.graph) == operators(made.graph)
    assert tensors(back.graph) == tensors(made.graph)
    for one in data[:3]:
        wanted = onnxruntime.InferenceSession(made.SerializeToString()).run(None, one)
        for a, b in zip(wanted, onnxruntime.InferenceSession(back.SerializeToString()).run(None, one), strict=True):
            np.testing.assert_array_equal(a, b)


# Share of the masks that may differ, and the largest difference of outputs as a part of the largest output. Masks are the same, and so are
# outputs up to the order of sums; but what rounds activations may round one of them the other way where onnxruntime optimises a body less
# than a main graph, and with it turn a score near the cut.
ROUNDED = {"dynamic": (0.001, 0.01), "QDQ of images": (0.004, 0.03), "QLinear of images": (0.004, 0.03)}


@pytest.mark.parametrize(("name", "captured"), FORMS)
def test_pruned_as_in_the_main_graph(name: str, captured: bool | str) -> None:
    model, feed = MODELS[name]()
    turned, apart = ROUNDED.get(name, (0.0, 1e-6))
    plain, data = feeds(feed)
    options = {"criterion": "relief", "alpha": 0.7, "granularity": "weight", "mean_shift": "off", "storage": "dense", "threads": 1}
    found, wanted = relief_onnx.prune(wrapped(model, captured), data, **options), relief_onnx.prune(model, plain, **options)
    assert found.masks.keep.keys() == wanted.masks.keep.keys()
    for weight, keep in wanted.masks.keep.items():
        assert (found.masks.keep[weight] != keep).mean() <= turned, weight
        assert not keep.all()
    assert operators(found.model.graph) == operators(wrapped(model, captured).graph)
    made = [
        onnxruntime.InferenceSession(one.SerializeToString()).run(None, feed)
        for one, feed in ((found.model, data[0]), (wanted.model, plain[0]))
    ]
    for a, b in zip(*made, strict=True):
        assert np.abs(a - b).max() <= apart * np.abs(b).max()


def recurrent(operator: str, direction: str, lengths: bool = False) -> tuple[onnx.ModelProto, Feed]:
    """One recurrent node with a bias and first states, from x [4, N, 7] to its last state and all of them."""
    rng = np.random.default_rng(0)
    both, gates = 1 + (direction == "bidirectional"), {"LSTM": 4, "GRU": 3, "RNN": 1}[operator]
    stored = {
        "W": rng.normal(0, 0.5, (both, gates * 6, 7)), "R": rng.normal(0, 0.5, (both, gates * 6, 6)),
        "B": rng.normal(0, 0.5, (both, gates * 12)),
        "start": rng.normal(0, 0.5, (7, 6)),
    }  # fmt: skip
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], axes=[0], keepdims=0),
        helper.make_node("MatMul", ["m", "start"], ["s"], name="start_of"),
        helper.make_node("Unsqueeze", ["s", "nought_axis"], ["h1"]), helper.make_node("Concat", ["h1"] * both, ["h0"], axis=0),
        helper.make_node(
            operator, ["x", "W", "R", "B", "lengths" if lengths else "", "h0"], ["Y", "Y_h"], name="rec", hidden_size=6,
            direction=direction,
        ),
    ]  # fmt: skip
    tensors = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in stored.items()]
    tensors.append(numpy_helper.from_array(np.array([0]), "nought_axis"))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, "N", 7])]
    inputs += [helper.make_tensor_value_info("lengths", TensorProto.INT32, ["N"])] if lengths else []
    ends = [
        helper.make_tensor_value_info("Y", TensorProto.FLOAT, [None] * 4),
        helper.make_tensor_value_info("Y_h", TensorProto.FLOAT, [None] * 3),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "net", inputs, ends, tensors), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    feed = {"x": rng.normal(0.3, 1, (4, 6, 7)).astype(np.float32)}
    return model, feed | ({"lengths": np.array([1, 4, 3, 2, 4, 1], np.int32)} if lengths else {})


KINDS = [("LSTM", "forward", False), ("GRU", "bidirectional", False), ("RNN", "reverse", False), ("LSTM", "bidirectional", True)]


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_recurrent_nodes(kind: tuple[str, str, bool], captured: bool) -> None:
    """Their scores are those of the network without control flow; nothing else changes."""
    model, feed = recurrent(*kind)
    made = wrapped(model, captured)
    data = [{**feed, "flag": np.array(flag)} for flag in (True, False)]
    opened = settle(prepare(made), open_dataset(data, input_specs(made)), samples=None, seed=0, threads=1)
    back = opened.restored(opened.graph.model)
    assert operators(back.graph) == operators(made.graph)
    assert tensors(back.graph) == tensors(made.graph)
    found, wanted = (relief_onnx.score(one, given, criterion="relief", threads=1) for one, given in ((made, data), (model, [feed])))
    for part in ("rec/W", "rec/R", "start_of"):
        np.testing.assert_allclose(found[part].score, wanted[part].score, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(found[part].bias_score, wanted[part].bias_score, rtol=1e-4, atol=1e-7)
    for options in ({"criterion": "relief", "alpha": 0.7}, {"keep": "50%", "repair": "least-squares", "granularity": "channel+weight"}):
        pruned = relief_onnx.prune(made, data, threads=1, **options)
        rows = {row["weight"]: row for row in pruned.report["layers"]}
        assert rows["W"]["status"] == rows["R"]["status"] == "pruned"
        if "repair" in options:
            repaired = {row["weight"]: row for row in pruned.report["repair"]["layers"]}
            for weight in "WR":
                assert not repaired[weight]["reason"]
                assert repaired[weight]["error_after"] < repaired[weight]["error_before"]


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("more", [{"repair": "least-squares"}, {"bias": "prune"}], ids=["repair", "bias"])
def test_biases_of_recurrent_nodes_are_as_without_control_flow(kind: tuple[str, str, bool], captured: bool, more: dict[str, Any]) -> None:
    """W, R and both halves of B, solved for or removed."""
    model, feed = recurrent(*kind)
    made = wrapped(model, captured)
    data = [{**feed, "flag": np.array(flag)} for flag in (True, False)]
    options = {"criterion": "relief", "alpha": 0.7, "mean_shift": "off", "storage": "dense", "threads": 1, **more}
    found, wanted = (relief_onnx.prune(one, given, **options) for one, given in ((made, data), (model, [feed])))
    ours, theirs = tensors(found.model.graph), tensors(wanted.model.graph)
    for name in "WRB":
        np.testing.assert_allclose(np.frombuffer(ours[name], "f4"), np.frombuffer(theirs[name], "f4"), rtol=1e-5, atol=1e-6)
    assert theirs["B"] != tensors(model.graph)["B"]


@pytest.mark.parametrize("shared", ["B", "WR"])
def test_what_recurrent_nodes_of_both_branches_share_stays(shared: str) -> None:
    """A bias, or weights without one: the file holds them once, and says why they are as they were."""
    rng = np.random.default_rng(0)
    sizes = {"W": (1, 24, 7), "R": (1, 24, 6), "B": (1, 48)}
    own = [name for name in ("WRB" if shared == "B" else "WR") if name not in shared]

    def stored(name: str, wanted: str) -> TensorProto:
        return numpy_helper.from_array(rng.normal(0, 0.5, sizes[name]).astype(np.float32), wanted)

    def branch(side: str) -> onnx.GraphProto:
        names = [name if name in shared else f"{name}_{side}" for name in ("WRB" if shared == "B" else "WR")]
        node = helper.make_node("LSTM", ["x", *names], ["", f"h_{side}"], name=f"rec_{side}", hidden_size=6)
        ends = [helper.make_tensor_value_info(f"h_{side}", TensorProto.FLOAT, [1, None, 6])]
        return helper.make_graph([node], side, [], ends, [stored(name, f"{name}_{side}") for name in own])

    choice = helper.make_node("If", ["flag"], ["h"], name="choice", then_branch=branch("one"), else_branch=branch("two"))
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, "N", 7]),
        helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
    ]
    ends = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, None, 5])]
    last = numpy_helper.from_array(rng.normal(0, 0.5, (6, 5)).astype(np.float32), "last")
    held = [last, *(stored(name, name) for name in shared)]
    graph = helper.make_graph([choice, helper.make_node("MatMul", ["h", "last"], ["y"], name="end")], "net", inputs, ends, held)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data = [{"x": rng.normal(0.3, 1, (4, 6, 7)).astype(np.float32), "flag": np.array(number % 2 == 0)} for number in range(16)]
    found = relief_onnx.prune(made, data, keep="50%", granularity="weight", repair="least-squares", storage="dense", threads=1)
    onnx.checker.check_model(found.model, full_check=True)
    after, before = tensors(found.model.graph), tensors(made.graph)
    reasons = {row["node"]: row["reason"] for row in found.report["mean_shift"]["left"]}
    rows = found.report["repair"]["layers"]
    if shared == "B":
        assert after["B"] == before["B"]
        assert reasons.keys() == {"rec_one/W", "rec_one/R", "rec_two/W", "rec_two/R"}
        assert set(reasons.values()) == {"several nodes read its bias"}
        assert not any(row["reason"] for row in rows)
    else:
        assert after.keys() - before.keys() == {"last/bias", "W/bias"}  # of the branch that comes first
        assert {row["reason"] for row in rows if row["weight"] in "WR"} == {"several nodes read its weight"}
        assert reasons["rec_one/W"] == "it runs inside a body of control flow and has no stored bias of its own"


def test_a_recurrent_node_over_many_rounds() -> None:
    """Chunks of a sequence with a state that goes round: as the whole sequence at once."""
    model = recurrent("GRU", "forward")[0]
    x = np.random.default_rng(4).normal(0.3, 1, (3, 4, 6, 7)).astype(np.float32)
    inputs = [
        helper.make_tensor_value_info("i", TensorProto.INT64, []), helper.make_tensor_value_info("on", TensorProto.BOOL, []),
        helper.make_tensor_value_info("h", TensorProto.FLOAT, [1, "N", 6]),
    ]  # fmt: skip
    nodes = [
        helper.make_node("Identity", ["on"], ["more"]), helper.make_node("Gather", ["x", "i"], ["xi"], axis=0),
        helper.make_node("GRU", ["xi", "W", "R", "B", "", "h"], ["Y", "h_next"], name="rec", hidden_size=6),
    ]  # fmt: skip
    ends = [
        helper.make_tensor_value_info("more", TensorProto.BOOL, []),
        helper.make_tensor_value_info("h_next", TensorProto.FLOAT, [1, "N", 6]),
    ]
    held = [item for item in model.graph.initializer if item.name in "WRB"]
    body = helper.make_graph(nodes, "each", inputs, ends, held)
    graph = helper.make_graph(
        [helper.make_node("Loop", ["rounds", "", "h0"], ["last"], name="loop", body=body)], "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 4, "N", 7]),
         helper.make_tensor_value_info("h0", TensorProto.FLOAT, [1, "N", 6])],
        [helper.make_tensor_value_info("last", TensorProto.FLOAT, [1, "N", 6])], [numpy_helper.from_array(np.array(3), "rounds")],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    h0 = np.random.default_rng(5).normal(0, 0.5, (1, 6, 6)).astype(np.float32)
    del model.graph.node[:4]
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 12
    model.graph.input.append(helper.make_tensor_value_info("h0", TensorProto.FLOAT, [1, "N", 6]))
    found = relief_onnx.score(made, [{"x": x, "h0": h0}], criterion="relief", threads=1)
    wanted = relief_onnx.score(model, [{"x": x.reshape(12, 6, 7), "h0": h0}], criterion="relief", threads=1)
    for part in ("rec/W", "rec/R"):
        np.testing.assert_allclose(found[part].score, wanted[part].score, rtol=1e-4, atol=1e-7)
