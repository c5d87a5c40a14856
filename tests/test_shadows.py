"""Names in bodies that hide a tensor of the graphs around: the network is pruned like one in which every tensor has a name of its own."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

import relief_onnx
from relief_onnx.session import Session
from relief_onnx.shadows import unshadowed

# Of a Loop with an If inside, the names of: the state, the body's weight, what the body makes first, the branch's weight.
NAMES = {
    "input hides a weight": ("last", "wb", "p", "wt"),
    "input hides an input": ("x", "wb", "p", "wt"),
    "initializer hides a weight": ("state", "wa", "p", "wt"),
    "node hides a weight": ("state", "wb", "last", "wt"),
    "node hides an activation": ("state", "wb", "x0", "wt"),
    "at every depth": ("last", "wa", "x0", "wa"),
    "one body hides another's": ("state", "wb", "p", "wb"),
}
PLAIN = ("state", "wb", "p", "wt")


def model(names: tuple[str, str, str, str]) -> onnx.ModelProto:
    state, weight, made, inner = names
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    net (float[N, 8] x) => (float[N, 4] y) <int64 steps = {{3}}, float zero = {{0.0}}> {{
        x0 = MatMul(x, wa)
        j = Loop (steps, "", x0) <body = each (int64 i, bool going, float[N, 8] {state}) => (bool again, float[N, 8] o) {{
            again = Identity(going)
            {made} = MatMul({state}, {weight})
            s = ReduceSum <keepdims = 0> ({made})
            c = Greater(s, zero)
            h = If (c) <then_branch = one () => (float[N, 8] t) {{ t = MatMul({made}, {inner}) }},
                else_branch = two () => (float[N, 8] e) {{ e = Neg({made}) }}>
            o = Tanh(h)
        }}>
        y = MatMul(j, last)
    }}"""
    found = parser.parse_model(text)
    rng = np.random.default_rng(0)

    def store(graph: onnx.GraphProto, name: str, *shape: int) -> None:
        graph.initializer.append(numpy_helper.from_array((rng.standard_normal(shape) / 2).astype(np.float32), name))

    store(found.graph, "wa", 8, 8)
    store(found.graph, "last", 8, 4)
    body = found.graph.node[1].attribute[0].g
    store(body, weight, 8, 8)
    store(body.node[4].attribute[0].g, inner, 8, 8)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_pruned_as_under_names_of_their_own(name: str) -> None:
    feeds = [{"x": np.random.default_rng(seed).standard_normal((1, 8)).astype(np.float32)} for seed in range(16)]
    hiding, plain = model(NAMES[name]), model(PLAIN)
    results = [relief_onnx.prune(each, feeds, keep="50%", storage="dense", threads=1) for each in (hiding, plain)]
    kept = [[row["weights_kept"] for row in result.report["layers"]] for result in results]
    assert kept[0] == kept[1]
    assert len(kept[0]) == 4
    for feed in feeds:
        found, wanted = (Session(result.model).run(feed)[0] for result in results)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_where_nothing_is_hidden_nothing_changes() -> None:
    plain = model(PLAIN)
    assert unshadowed(plain) is plain
