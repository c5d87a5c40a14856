"""Control flow within control flow: small networks, where their weights are held, and what each weight really meets, in numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper, parser

Arrays = dict[str, NDArray[Any]]
STEPS, X, HIDDEN, OUT, UNITS = 5, 8, 10, 4, 5
SHAPES: Mapping[str, tuple[int, ...]] = {
    "wa": (X, HIDDEN), "ba": (HIDDEN,), "wb": (X, HIDDEN), "ws": (HIDDEN, HIDDEN), "wx": (X, HIDDEN), "wg": (HIDDEN, X), "bg": (HIDDEN,),
    "wl": (HIDDEN, X), "k": (6, 1, 3), "kb": (6,), "last": (HIDDEN, OUT), "never": (X, HIDDEN),
    "ih": (4 * UNITS, X), "hh": (4 * UNITS, UNITS), "bi": (4 * UNITS,), "bh": (4 * UNITS,),
}  # fmt: skip


def weights() -> Arrays:
    rng = np.random.default_rng(0)
    return {name: rng.normal(0, 1 / np.sqrt(shape[0]), shape).astype(np.float32) for name, shape in SHAPES.items()}


def feeds(count: int = 6) -> list[Arrays]:
    """Samples x [5, 3, 8], some of them mostly positive, and a flag that takes turns."""
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(0.1 * (n % 3), 1, (STEPS, 3, X)).astype(np.float32), "flag": np.array(n % 2 == 0)} for n in range(count)]


@dataclass
class Case:
    """text: of the graph, from x (and flag) to y. held: by graph, what it stores; "constant" in front of a name: as a Constant node.

    meets: for one feed, (weight, rows that it meets) as often as it meets any. silent: weights that never run.
    """

    text: str
    held: Mapping[str, tuple[str, ...]]
    meets: Callable[[Arrays, Arrays], Iterator[tuple[str, NDArray[Any]]]]
    bias: Mapping[str, str] = field(default_factory=dict)
    silent: tuple[str, ...] = ()
    opset: int = 17

    @property
    def weights(self) -> set[str]:
        """Names of all weights."""
        found = {name.removeprefix("constant ") for names in self.held.values() for name in names}
        return {name for name in found if len(SHAPES[name]) > 1}

    def model(self) -> onnx.ModelProto:
        """The network."""
        made = parser.parse_model(f'<ir_version: 8, opset_import: ["" : {self.opset}]> {self.text}')
        given, rest = weights(), dict(self.held)
        pending = [made.graph]
        while pending:
            graph = pending.pop()
            for name in reversed(rest.pop(graph.name, ())):
                plain = name.removeprefix("constant ")
                tensor = numpy_helper.from_array(given[plain], plain)
                if plain == name:
                    graph.initializer.append(tensor)
                else:
                    graph.node.insert(0, onnx.helper.make_node("Constant", [], [plain], value=tensor, name=f"make_{plain}"))
            for node in graph.node:
                node.name = node.name or f"node_{node.output[0]}"
                pending += [item.g for item in node.attribute if item.type == onnx.AttributeProto.GRAPH]
        assert not rest
        onnx.checker.check_model(made, full_check=True)
        return made


def relu(x: NDArray[Any]) -> NDArray[Any]:
    found: NDArray[Any] = np.maximum(x, 0)
    return found


def unmet(feed: Arrays, w: Arrays) -> Iterator[tuple[str, NDArray[Any]]]:
    """For networks of which nobody asks what they meet."""
    yield from ()


# -- what each network meets --------------------------------------------------------------------------------------------------


def _chosen(feed: Arrays, w: Arrays) -> Iterator[tuple[str, NDArray[Any]]]:
    """An If within a Loop or Scan: by the sum of each step."""
    for xi in feed["x"]:
        yield ("wa", xi) if xi.sum() > 0 else ("wb", xi)
        yield "last", relu(xi @ w["wa"] + w["ba"]) if xi.sum() > 0 else xi @ w["wb"]


IF = """
    c = Greater(s, zero)
    o = If (c) <
        then_branch = one () => (float[N, 10] o_then) { p = MatMul(xi, wa)  q = Add(p, ba)  o_then = Relu(q) },
        else_branch = two () => (float[N, 10] o_else) { o_else = MatMul(xi, wb) }
    >"""
_LOOP = """net (float[5, N, 8] x) => (float[5, N, 4] y) <int64 steps = {5}, float zero = {0.0}> {{
    j = Loop (steps, "") <body = each (int64 i, bool going) => (bool again, float[N, 10] o) {{
        again = Identity(going)
        xi = Gather <axis = 0> (x, i)
        s = ReduceSum <keepdims = 0> (xi)
        {inner}
    }}>
    y = MatMul(j, last)
}}"""


def _within_loop(inner: str) -> str:
    return _LOOP.replace("{{", "{").replace("}}", "}").replace("{inner}", inner)


_SCAN = """net (float[5, N, 8] x) => (float[5, N, 4] y) <float zero = {0.0}> {
    turned = Transpose <perm = [1, 0, 2]> (x)
    j = Scan <num_scan_inputs = 1, scan_input_axes = [1], scan_input_directions = [1], scan_output_axes = [-2],
        scan_output_directions = [1], body = each (float[N, 8] xi) => (float[N, 10] o) { s = ReduceSum <keepdims = 0> (xi) INNER }> (turned)
    back = Transpose <perm = [1, 0, 2]> (j)
    y = MatMul(back, last)
}"""


def _twice(feed: Arrays, w: Arrays) -> Iterator[tuple[str, NDArray[Any]]]:
    """A Loop of i + 1 rounds within a Loop, with a state: what is handed out has another size in each round."""
    for i, xi in enumerate(feed["x"]):
        state = np.zeros((len(xi), HIDDEN), np.float32)
        for _ in range(i + 1):
            yield "ws", state
            yield "wx", xi
            state = np.tanh(state @ w["ws"] + xi @ w["wx"])
        yield "last", state


_TWICE = """net (float[5, N, 8] x) => (float[5, N, 4] y) <
    int64 steps = {5}, int64 one = {1}, int64[1] ends = {1}, float[1, 10] nought = {NOUGHT}> {
    j = Loop (steps, "") <body = each (int64 i, bool going) => (bool again, float[N, 10] o) {
        again = Identity(going)
        xi = Gather <axis = 0> (x, i)
        rounds = Add(i, one)
        size = ReduceSum <keepdims = 1> (xi, ends)
        start = Mul(size, nought)
        o = Loop (rounds, "", start) <body = inner (int64 r, bool on, float[N, 10] state) => (bool on_again, float[N, 10] next) {
            on_again = Identity(on)
            a = MatMul(state, ws)
            b = MatMul(xi, wx)
            sum = Add(a, b)
            next = Tanh(sum)
        }>
    }>
    y = MatMul(j, last)
}""".replace("NOUGHT", ", ".join(["0.0"] * HIDDEN))


def _flagged(feed: Arrays, w: Arrays) -> Iterator[tuple[str, NDArray[Any]]]:
    """A Scan within one branch and a product within the other, by a flag; a Gemm with a weight [out, in], and one on the left."""
    found = []
    for xi in feed["x"]:
        if not feed["flag"]:
            yield "never", xi
            found.append(xi @ w["never"])
            continue
        yield "wg", xi
        rows = relu(xi @ w["wg"].T + w["bg"])
        yield "wl", xi
        found.append(rows + (w["wl"] @ xi.T).T)
    yield "last", np.stack(found)


_FLAGGED = """net (float[5, N, 8] x, bool flag) => (float[5, N, 4] y) {
    j = If (flag) <
        then_branch = one () => (float[5, N, 10] o_then) {
            o_then = Scan <num_scan_inputs = 1, body = each (float[N, 8] xi) => (float[N, 10] o) {
                p = Gemm <transB = 1> (xi, wg, bg)
                r = Relu(p)
                t = Transpose <perm = [1, 0]> (xi)
                l = MatMul(wl, t)
                lt = Transpose <perm = [1, 0]> (l)
                o = Add(r, lt)
            }> (x)
        },
        else_branch = two () => (float[5, N, 10] o_else) { o_else = MatMul(x, never) }
    >
    y = MatMul(j, last)
}"""


def _shared(feed: Arrays, w: Arrays) -> Iterator[tuple[str, NDArray[Any]]]:
    """One weight in the main graph, in a Loop and in a branch within it; the other branch has layers of its own."""
    x = feed["x"]
    yield "wa", x
    for xi in x:
        yield "wa", xi
        yield ("wa", 2 * xi) if xi.sum() > 0 else ("wb", xi)
        more = 2 * xi @ w["wa"] if xi.sum() > 0 else xi @ w["wb"]
        yield "last", xi @ w["wa"] + more
    yield "last", x @ w["wa"]


_SHARED = _within_loop("""
        direct = MatMul(xi, wa)
        c = Greater(s, zero)
        extra = If (c) <
            then_branch = one () => (float[N, 10] o_then) { twice = Add(xi, xi)  o_then = MatMul(twice, wa) },
            else_branch = two () => (float[N, 10] o_else) { o_else = MatMul(xi, wb) }
        >
        o = Add(direct, extra)""").replace("    y = MatMul(j, last)\n", """    main = MatMul(x, wa)
    of_main = MatMul(main, last)
    of_loop = MatMul(j, last)
    y = Add(of_main, of_loop)
""")  # fmt: skip


def _silent(feed: Arrays, w: Arrays) -> Iterator[tuple[str, NDArray[Any]]]:
    for xi in feed["x"]:
        yield "wa", xi
        yield "last", relu(xi @ w["wa"] + w["ba"])


def _deep(feed: Arrays, w: Arrays) -> Iterator[tuple[str, NDArray[Any]]]:
    """A Scan over samples within a branch within a Loop within a branch."""
    if not feed["flag"]:
        yield "never", feed["x"]
        yield "last", feed["x"] @ w["never"]
        return
    for xi in feed["x"]:
        yield ("wa", xi) if xi.sum() > 0 else ("wb", xi)
        yield "last", xi @ w["wa"] if xi.sum() > 0 else xi @ w["wb"]


_DEEP = """net (float[5, N, 8] x, bool flag) => (float[5, N, 4] y) <float zero = {0.0}> {
    j = If (flag) <
        then_branch = one () => (float[5, N, 10] o_then) {
            n = Constant <value_int = 5> ()
            o_then = Loop (n, "") <body = each (int64 i, bool going) => (bool again, float[N, 10] o) {
                again = Identity(going)
                xi = Gather <axis = 0> (x, i)
                s = ReduceSum <keepdims = 0> (xi)
                c = Greater(s, zero)
                o = If (c) <
                    then_branch = three () => (float[N, 10] o_three) {
                        o_three = Scan <num_scan_inputs = 1, body = rows (float[8] v) => (float[10] z) { z = MatMul(v, wa) }> (xi)
                    },
                    else_branch = four () => (float[N, 10] o_four) { o_four = MatMul(xi, wb) }
                >
            }>
        },
        else_branch = two () => (float[5, N, 10] o_else) { o_else = MatMul(x, never) }
    >
    y = MatMul(j, last)
}"""


def _windows(feed: Arrays, w: Arrays, growing: bool) -> Iterator[tuple[str, NDArray[Any]]]:
    """Convolutions of three taps without padding: what each tap meets (of windows that stay as large), in a branch within a Loop."""
    for i, xi in enumerate(feed["x"]):
        part = xi[:, : i + 4] if growing else xi
        windows = np.stack([part[:, tap : tap + part.shape[1] - 2] for tap in range(3)], -1)  # [N, places, taps]
        made = np.einsum("npt,ot->nop", windows, w["k"][:, 0]) + w["kb"][:, None]
        if xi.sum() > 0:
            yield "k", windows
            yield "wb", np.broadcast_to(made.mean(-1).mean(1, keepdims=True), (len(xi), X))
        else:
            yield "wb", np.zeros((len(xi), X), np.float32)


_WINDOWS = _within_loop("""
        c = Greater(s, zero)
        %s
        o_in = If (c) <
            then_branch = one () => (float[N, 8] o_then) {
                u = Unsqueeze(part, axis)
                v = Conv(u, k, kb)
                m = ReduceMean <axes = [1, 2], keepdims = 1> (v)
                n = Squeeze(m, axis)
                o_then = Expand(n, wide)
            },
            else_branch = two () => (float[N, 8] o_else) { o_else = Mul(xi, zero) }
        >
        o = MatMul(o_in, wb)""").replace(
    "float zero = {0.0}",
    "float zero = {0.0}, int64[1] axis = {1}, int64[1] four = {4}, int64[1] none = {0}, int64[2] wide = {1, 8}",
)


def windowed(growing: bool) -> Case:
    """growing: the windows of each round are of a larger part of the step."""
    part = "end = Add(four, i)  part = Slice(xi, none, end, axis)" if growing else "part = Identity(xi)"
    return Case(_WINDOWS % part, {"net": ("last",), "one": ("k", "kb"), "each": ("constant wb",)}, partial(_windows, growing=growing))


CASES: Mapping[str, Case] = {
    "If in Loop": Case(_within_loop(IF), {"net": ("last",), "one": ("wa", "ba"), "two": ("constant wb",)}, _chosen, {"wa": "ba"}),
    "If in Loop, opset 12": Case(
        _within_loop(IF), {"net": ("last", "wb"), "each": ("constant wa",), "one": ("constant ba",)}, _chosen, {"wa": "ba"}, opset=12
    ),
    "If in Scan, turned": Case(
        _SCAN.replace("INNER", IF), {"net": ("last", "ba"), "each": ("constant wa", "wb")}, _chosen, {"wa": "ba"}
    ),
    "Loop in Loop": Case(_TWICE, {"net": ("last", "wx"), "inner": ("ws",)}, _twice),
    "Loop in Loop, held outside": Case(_TWICE, {"net": ("last",), "each": ("constant wx", "constant ws")}, _twice),
    "Scan in If": Case(
        _FLAGGED, {"net": ("last",), "one": ("wg",), "each": ("constant bg", "constant wl"), "two": ("never",)}, _flagged, {"wg": "bg"}
    ),
    "shared": Case(_SHARED, {"net": ("last", "wa"), "two": ("wb",)}, _shared),
    "never": Case(
        _within_loop(IF.replace("(s, zero)", "(s, low)")).replace("float zero = {0.0}", "float low = {-1000.0}"),
        {"net": ("last",), "one": ("wa", "ba"), "two": ("wb",)}, _silent, {"wa": "ba"}, ("wb",),
    ),
    "Scan in If in Loop in If": Case(
        _DEEP, {"net": ("last",), "two": ("never",), "rows": ("wa",), "four": ("constant wb",)}, _deep
    ),
}  # fmt: skip
