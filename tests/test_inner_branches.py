"""Branches within bodies that never run: they compute what they did, and what they share with others can be pruned all the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import nested_cases as nested
import numpy as np
import onnx
import onnxruntime
import pytest
from test_nested import shape_of, stored

import relief_onnx
from relief_onnx.control import settle
from relief_onnx.data import open_dataset
from relief_onnx.model import input_specs
from relief_onnx.prepared import prepare

# By the name of a place, by graph, what it stores.
Held = Mapping[str, Mapping[str, tuple[str, ...]]]

# A Loop whose body chooses by an input that is always low: the other branch reads the same weights, and a body within it does.
_LOOP = """net (float[5, N, 8] x, float low) => (float[5, N, 10] y) <int64 steps = {5}, int64 once = {1}> {
    j = Loop (steps, "") <body = each (int64 i, bool going) => (bool again, float[N, 10] o) {
        again = Identity(going)
        xi = Gather <axis = 0> (x, i)
        s = ReduceSum <keepdims = 0> (xi)
        c = Greater(s, low)
        o = If (c) <
            then_branch = one () => (float[N, 10] o_then) { p = MatMul(xi, wa)  q = Add(p, ba)  h = Tanh(q)  o_then = MatMul(h, ws) },
            else_branch = two () => (float[N, 10] o_else) {
                r = MatMul(xi, wa)
                o_scan = Loop (once, "") <body = three (int64 k, bool on) => (bool on_again, float[N, 10] t) {
                    on_again = Identity(on)
                    u = MatMul(r, ws)
                    t = Add(u, ba)
                }>
                o_else = ReduceSum <keepdims = 0> (o_scan, ends)
            }
        >
    }>
    y = Sigmoid(j)
}""".replace("int64 once = {1}", "int64 once = {1}, int64[1] ends = {0}")
PLAIN = """net (float[5, N, 8] x) => (float[5, N, 10] y) {
    p = MatMul(x, wa)  q = Add(p, ba)  h = Tanh(q)  z = MatMul(h, ws)  y = Sigmoid(z)
}"""
HELD: Held = {
    "net": {"net": ("wa", "ba", "ws")},
    "each": {"each": ("wa", "constant ba", "constant ws")},
    "both": {"net": ("ws",), "each": ("constant wa", "ba")},
}
held = pytest.mark.parametrize("place", HELD)


def cell(made: str, mark: str) -> str:
    """An LSTM over x, its gates in the order of PyTorch as they are stored."""
    text = []
    for part, source in (("w", "ih"), ("r", "hh"), ("v", "bi"), ("u", "bh")):
        text += [f"{part}{n}{mark} = Slice({source}, at{start}, at{end}, at0)" for n, start, end in ((0, 0, 1), (1, 1, 3), (2, 3, 4))]
        text.append(f"{part}{mark} = Concat <axis = 0> ({part}0{mark}, {part}2{mark}, {part}1{mark})")
    text.append(f"b{mark} = Concat <axis = 0> (v{mark}, u{mark})")
    text += [f"{part}{mark}_whole = Unsqueeze({part}{mark}, at0)" for part in "wrb"]
    whole = ", ".join(f"{part}{mark}_whole" for part in "wrb")
    return "  ".join([*text, f"{made} = LSTM <hidden_size = 5> (x, {whole})"])


_PLACES = ", ".join(f"int64[1] at{n} = {{{value}}}" for n, value in enumerate((0, 5, 15, 20)))
_PLACES = _PLACES.replace("at3", "at4").replace("at2", "at3")
SPEECH = f"""net (float[5, 3, 8] x, bool flag, float low) => (float[5, 1, 3, 5] y) <{_PLACES}> {{
    s = ReduceSum <keepdims = 0> (x)
    j = If (flag) <
        then_branch = one () => (float[5, 1, 3, 5] o_one) {{
            c = Greater(s, low)
            o_one = If (c) <
                then_branch = two () => (float[5, 1, 3, 5] o_two) {{ {cell("o_two", "_two")} }},
                else_branch = three () => (float[5, 1, 3, 5] o_three) {{ {cell("l", "_three")}  o_three = Neg(l) }}
            >
        }},
        else_branch = four () => (float[5, 1, 3, 5] o_four) {{
            m = MatMul(x, never)  n = Slice(m, at0, at1, two)  o_four = Unsqueeze(n, one)
        }}
    >
    y = Tanh(j)
}}""".replace("> {", ", int64[1] one = {1}, int64[1] two = {2}> {", 1)
SPEECH_PLAIN = f"net (float[5, 3, 8] x) => (float[5, 1, 3, 5] y) <{_PLACES}> {{ {cell('j', '')}  y = Tanh(j) }}"
SPEECH_HELD: Held = {
    "net": {"net": ("ih", "hh", "bi", "bh", "never")},
    "one": {"net": ("never",), "one": ("constant ih", "hh", "constant bi", "constant bh")},
}


def run(model: onnx.ModelProto, feed: Any) -> Any:
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, feed)[0]


def feeds(count: int = 6, **more: float) -> list[Any]:
    return [{"x": feed["x"], **{name: np.array(value, np.float32) for name, value in more.items()}} for feed in nested.feeds(count)]


def unrun(model: onnx.ModelProto) -> list[str]:
    return sorted(name for name in stored(model) if "unrun" in name)


@held
def test_nothing_pruned_nothing_changed(place: str) -> None:
    model = nested.Case(_LOOP, HELD[place], nested.unmet).model()
    data = feeds(low=-1000.0)
    opened = settle(prepare(model), open_dataset(data, input_specs(model)), samples=None, seed=0, threads=1)
    assert {layer.weight for layer in opened.plan.layers} == {"wa", "ws"}
    onnx.checker.check_model(opened.graph.model, full_check=True)
    for feed in (data[0], feeds(1, low=1000.0)[0]):
        np.testing.assert_allclose(run(opened.graph.model, feed), run(model, feed), rtol=1e-5, atol=1e-6)
    back = opened.restored(opened.graph.model)
    assert back.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


OPTIONS: dict[str, dict[str, Any]] = {
    "relief": {"criterion": "relief", "alpha": 0.8, "mean_shift": "off", "storage": "dense"},
    "flow": {"keep": "50%", "granularity": "weight"},
    "repaired": {"keep": "50%", "repair": "least-squares", "storage": "dense"},
}


@held
@pytest.mark.parametrize("options", OPTIONS)
def test_what_is_shared_with_a_body_that_never_ran(place: str, options: str) -> None:
    """The masks of the network without that body; it computes what it did, bit for bit."""
    model = nested.Case(_LOOP, HELD[place], nested.unmet).model()
    plain = nested.Case(PLAIN, {"net": ("wa", "ba", "ws")}, nested.unmet).model()
    found = relief_onnx.prune(model, feeds(low=-1000.0), **OPTIONS[options])
    rows = {row["weight"]: row for row in found.report["layers"]}
    assert rows["wa"]["status"] == rows["ws"]["status"] == "pruned"
    assert "never ran" in rows["wa/unrun"]["reason"]
    assert "never ran" in rows["ws/unrun"]["reason"]
    if options == "relief":  # the others rank over several layers by what reaches the output
        wanted = relief_onnx.prune(plain, feeds(), **OPTIONS[options])
        assert found.masks.keep.keys() == wanted.masks.keep.keys()
        for weight, keep in wanted.masks.keep.items():
            np.testing.assert_array_equal(found.masks.keep[weight], keep)
        assert unrun(found.model) == ["wa/unrun", "ws/unrun"]  # the bias is as it was
        other = feeds(1, low=-1000.0)[0]
        np.testing.assert_allclose(run(found.model, other), run(wanted.model, {"x": other["x"]}), rtol=1e-4, atol=1e-5)
    onnx.checker.check_model(found.model, full_check=True)
    for feed in feeds(3, low=1000.0):
        np.testing.assert_array_equal(run(found.model, feed), run(model, feed))


@held
def test_a_copy_goes_where_nothing_changed(place: str) -> None:
    model = nested.Case(_LOOP, HELD[place], nested.unmet).model()
    found = relief_onnx.prune(model, feeds(low=-1000.0), only="ws", **OPTIONS["relief"])
    assert unrun(found.model) == ["ws/unrun"]
    graph = shape_of(found.model)
    assert str(graph).replace("ws/unrun", "ws") == str(shape_of(model))


@pytest.mark.parametrize("place", SPEECH_HELD)
def test_gates_in_another_order_in_a_branch_that_the_data_choose(place: str) -> None:
    model = nested.Case(SPEECH, SPEECH_HELD[place], nested.unmet).model()
    plain = nested.Case(SPEECH_PLAIN, {"net": ("ih", "hh", "bi", "bh")}, nested.unmet).model()
    flagged = [feed | {"flag": np.array(n % 2 == 0)} for n, feed in enumerate(feeds(low=-1000.0))]
    found = relief_onnx.prune(model, flagged, **OPTIONS["relief"])
    wanted = relief_onnx.prune(plain, [{"x": feed["x"]} for feed in flagged[::2]], **OPTIONS["relief"])
    for weight in ("ih", "hh"):
        assert not wanted.masks.keep[weight].all()
        np.testing.assert_array_equal(found.masks.keep[weight], wanted.masks.keep[weight])
    assert found.report["layers"][0]["status"] == "pruned"
    onnx.checker.check_model(found.model, full_check=True)
    other = feeds(1, low=-1000.0)[0]
    result = run(found.model, other | {"flag": np.array(True)})
    np.testing.assert_allclose(result, run(wanted.model, {"x": other["x"]}), rtol=1e-4, atol=1e-5)
    for feed in feeds(3, low=1000.0):
        high = feed | {"flag": np.array(True)}
        np.testing.assert_array_equal(run(found.model, high), run(model, high))


@pytest.mark.parametrize("flags", [(True, False), (True,)])
@pytest.mark.parametrize("place", SPEECH_HELD)
def test_gates_that_lost_nothing_are_stored_as_they_were(place: str, flags: tuple[bool, ...]) -> None:
    """In a branch that the data choose, and in one that always runs: no second copy for the branch that never ran."""
    model = nested.Case(SPEECH, SPEECH_HELD[place], nested.unmet).model()
    data = [feed | {"flag": np.array(flags[n % len(flags)])} for n, feed in enumerate(feeds(low=-1000.0))]
    opened = settle(prepare(model), open_dataset(data, input_specs(model)), samples=None, seed=0, threads=1)
    assert {"ih", "hh"} <= {layer.weight for layer in opened.plan.layers}
    back = opened.restored(opened.graph.model)
    onnx.checker.check_model(back, full_check=True)
    assert sorted(stored(back)) == sorted(stored(model))
    assert back.ByteSize() <= model.ByteSize()
    for low in (-1000.0, 1000.0):
        feed = feeds(1, low=low)[0] | {"flag": np.array(True)}
        np.testing.assert_array_equal(run(back, feed), run(model, feed))


def test_gates_that_lost_nothing_beside_a_layer_that_did() -> None:
    model = nested.Case(SPEECH, SPEECH_HELD["net"], nested.unmet).model()
    flagged = [feed | {"flag": np.array(n % 2 == 0)} for n, feed in enumerate(feeds(low=-1000.0))]
    found = relief_onnx.prune(model, flagged, only="never", **OPTIONS["relief"])
    assert not found.masks.keep["never"].all()
    assert sorted(stored(found.model)) == sorted(stored(model))
    assert found.report["output"]["params"] == found.report["input"]["params"]


_RANKS = """net (float[N, 8] x, bool flag, bool deep) => (float[N, 4] y) <int64 two = {2}, int64[1] axis = {0}> {
    a = If (flag) <
        then_branch = one () => (float[D, E] a_one) { a_one = Tanh(x) },
        else_branch = two_axes () => (float[A, D, E] a_two) { t = Sigmoid(x)  a_two = Unsqueeze(t, axis) }
    >
    b = If (deep) <
        then_branch = three () => (float[A, D, E] b_three) {
            sizes = Shape(a)
            rank = Size(sizes)
            c = Equal(rank, two)
            b_three = If (c) <
                then_branch = four () => (float[A, D, E] b_four) { b_four = Unsqueeze(a, axis) },
                else_branch = five () => (float[A, D, E] b_five) { b_five = Identity(a) }
            >
        },
        else_branch = six () => (float[A, D, E] b_six) { b_six = Unsqueeze(x, axis) }
    >
    d = Squeeze(b, axis)
    h = MatMul(d, wa)
    y = MatMul(h, last)
}"""


def test_what_follows_from_a_branch_that_ran_is_no_signature() -> None:
    """The rank that the branch gives decides another If, which is not folded: with the other branch it goes another way."""
    model = nested.Case(_RANKS, {"net": ("wa", "last")}, nested.unmet).model()
    data = [{"x": feed["x"][0], "flag": np.array(True), "deep": np.array(True)} for feed in nested.feeds()]
    found = relief_onnx.prune(model, data, criterion="relief", alpha=0.8)
    assert run(found.model, data[0] | {"flag": np.array(False)}).shape == (3, 4)


def test_a_branch_within_a_body_that_the_signature_decides_goes() -> None:
    """Its If is replaced for good, and what the branch holds is pruned where it stands."""
    text = _LOOP.replace("c = Greater(s, low)", "sizes = Shape(xi)  rank = Size(sizes)  c = Equal(rank, rank_two)").replace(
        "int64 steps = {5}", "int64 steps = {5}, int64 rank_two = {2}"
    )
    text = text.replace("s = ReduceSum <keepdims = 0> (xi)\n", "").replace(", float low", "")
    model = nested.Case(text, HELD["each"], nested.unmet).model()
    found = relief_onnx.prune(model, feeds(), **OPTIONS["relief"])
    wanted = relief_onnx.prune(nested.Case(PLAIN, {"net": ("wa", "ba", "ws")}, nested.unmet).model(), feeds(), **OPTIONS["relief"])
    assert "If" not in str(shape_of(found.model))
    assert not unrun(found.model)
    for weight, keep in wanted.masks.keep.items():
        np.testing.assert_array_equal(found.masks.keep[weight], keep)


_INTEGERS = """
    NAME_q, NAME_s, NAME_z = DynamicQuantizeLinear(xi)
    NAME_i = MatMulInteger(NAME_q, wq, NAME_z)
    NAME_f = Cast <to = 1> (NAME_i)
    NAME_m = Mul(NAME_s, scale)
    NAME = Mul(NAME_f, NAME_m)"""
_CHOICE = f"""s = ReduceSum <keepdims = 0> (xi)
    c = Greater(s, low)
    o = If (c) <
        then_branch = one () => (float[N, 8] o_then) {{ {_INTEGERS.replace("NAME", "p")}  o_then = Tanh(p) }},
        else_branch = two () => (float[N, 8] o_else) {{ {_INTEGERS.replace("NAME", "r")}  o_else = Neg(r) }}
    >"""
_QUANTISED = {
    "Loop": f"""net (float[5, N, 8] x, float low) => (float[5, N, 8] y) <int64 steps = {{5}}> {{
        y = Loop (steps, "") <body = each (int64 i, bool going) => (bool again, float[N, 8] o) {{
            again = Identity(going)
            xi = Gather <axis = 0> (x, i)
            {_CHOICE}
        }}>
    }}""",
    "If": f"net (float[5, N, 8] x, float low) => (float[5, N, 8] y) {{ xi = Identity(x)  {_CHOICE}  y = Identity(o) }}".replace(
        "(float[N, 8]", "(float[5, N, 8]"
    ),
}


def quantised(operator: str) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {_QUANTISED[operator]}')
    rng = np.random.default_rng(0)
    integers, scale = rng.integers(-127, 128, (8, 8)).astype(np.int8), rng.uniform(0.01, 0.02, 8).astype(np.float32)
    model.graph.initializer.extend([onnx.numpy_helper.from_array(integers, "wq"), onnx.numpy_helper.from_array(scale, "scale")])
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.mark.parametrize("operator", _QUANTISED)
def test_integers_that_two_branches_share_which_run_stay_and_the_reason_says_so(operator: str) -> None:
    model = quantised(operator)
    data = [*feeds(low=-1000.0), *feeds(low=1000.0)]
    opened = settle(prepare(model), open_dataset(data, input_specs(model)), samples=None, seed=0, threads=1)
    reasons = {row.weight: row.reason for row in opened.plan.skipped}
    assert "integers that several bodies which run share" in reasons["wq"]


@pytest.mark.parametrize("operator", _QUANTISED)
def test_integers_that_a_branch_shares_which_never_ran(operator: str) -> None:
    """They are pruned like floats; that branch computes what it did, and has no copy where nothing changed."""
    model = quantised(operator)
    data = feeds(low=-1000.0)
    opened = settle(prepare(model), open_dataset(data, input_specs(model)), samples=None, seed=0, threads=1)
    assert sorted(stored(opened.restored(opened.graph.model))) == sorted(stored(model))
    found = relief_onnx.prune(model, data, keep="50%", storage="dense")
    rows = {row["weight"]: row for row in found.report["layers"]}
    assert rows["wq"]["status"] == "pruned"
    assert "never ran" in rows["wq/unrun"]["reason"]
    kept = next(onnx.numpy_helper.to_array(item) for item in found.model.graph.initializer if item.name == "wq")
    assert kept.dtype == np.int8
    assert np.count_nonzero(kept) == 32
    for feed in feeds(3, low=1000.0):
        np.testing.assert_array_equal(run(found.model, feed), run(model, feed))
    assert not np.array_equal(run(found.model, data[0]), run(model, data[0]))
