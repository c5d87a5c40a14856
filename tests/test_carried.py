"""Weights that loops carry as states that never change: the network is pruned like one whose bodies read them from outside."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper, parser

import relief_onnx
from relief_onnx.carried import uncarried
from relief_onnx.session import Session

SIZES = {"wa": (8, 8), "wb": (8, 8), "last": (8, 4)}
STATES = "int64 i, bool going, float[N, 8] h, float[8, 8] w"
BODY = f"<body = each ({STATES}) => (bool again, float[N, 8] o, float[8, 8] v)"
STEP = "again = Identity(going)  m = MatMul(h, w)  o = Tanh(m)"
PLAIN = """j = Loop (steps, "", x0) <body = each (int64 i, bool going, float[N, 8] h) => (bool again, float[N, 8] o) {
    again = Identity(going)  m = MatMul(h, wb)  o = Tanh(m) }>"""
AS_IT_IS = f"""j, left = Loop (steps, "", x0, wb) <body = each ({STATES}) => (bool again, float[N, 8] o, float[8, 8] w) {{ {STEP} }}>"""
INNER = """o, v = Loop (one, "", h, w)
    <body = inner (int64 k, bool on, float[N, 8] g, float[8, 8] u) => (bool more, float[N, 8] q, float[8, 8] u) {
    more = Identity(on)  m = MatMul(g, u)  q = Tanh(m) }>"""
CARRIED = {
    "as it is": AS_IT_IS,
    "through nodes": f"""j, left = Loop (steps, "", x0, wb) {BODY} {{ {STEP}  u = Identity(w)  v = Identity(u) }}>""",
    "of a Scan": """j, left = Scan <num_scan_inputs = 1,
        body = each (float[N, 8] h, float[8, 8] w, float a) => (float[N, 8] o, float[8, 8] w) { m = MatMul(h, w)  o = Tanh(m) }>
        (x0, wb, ticks)""",
    "of a loop within": f"""j, left = Loop (steps, "", x0, wb) <body = each ({STATES}) => (bool again, float[N, 8] o, float[8, 8] w) {{
        again = Identity(going)  {INNER} }}>""",
}
CHANGING = f"""j, left = Loop (steps, "", x0, wb) {BODY} {{ {STEP}  v = Tanh(w) }}>"""


def model(loop: str, end: str = "y = Identity(z)") -> onnx.ModelProto:
    found = parser.parse_model(f"""<ir_version: 8, opset_import: ["" : 17]>
    net (float[N, 8] x) => (float[N, 4] y) <int64 steps = {{3}}, int64 one = {{1}}, float[3] ticks = {{0, 0, 0}}> {{
        x0 = MatMul(x, wa)  {loop}  z = MatMul(j, last)  {end}
    }}""")
    rng = np.random.default_rng(0)
    for name, shape in SIZES.items():
        found.graph.initializer.append(numpy_helper.from_array((rng.standard_normal(shape) / 2).astype(np.float32), name))
    return found


def feeds() -> list[dict[str, NDArray[np.float32]]]:
    return [{"x": np.random.default_rng(seed).standard_normal((2, 8)).astype(np.float32)} for seed in range(16)]


@pytest.mark.parametrize("name", CARRIED)
def test_pruned_as_what_bodies_read_from_outside(name: str) -> None:
    results = [relief_onnx.prune(each, feeds(), keep="50%", storage="dense", threads=1) for each in (model(CARRIED[name]), model(PLAIN))]
    rows = [{row["weight"]: (row["status"], row["weights_kept"]) for row in result.report["layers"]} for result in results]
    assert rows[0] == rows[1]
    assert {status for status, _ in rows[0].values()} == {"pruned"}
    for feed in feeds():
        found, wanted = (Session(result.model).run(feed)[0] for result in results)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_what_the_loop_handed_on_is_still_there() -> None:
    carried = model(AS_IT_IS, "k = ReduceMean <keepdims = 0> (left)  y = Add(z, k)")
    for feed in feeds():
        np.testing.assert_array_equal(Session(uncarried(carried)).run(feed)[0], Session(carried).run(feed)[0])


@pytest.mark.parametrize("loop", [PLAIN, CHANGING])
def test_states_that_change_stay(loop: str) -> None:
    assert uncarried(given := model(loop)) is given
