"""R of every unit: a slow float64 solution of the same equations agrees with the walk, and nothing is lost on the way."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from architectures import ARCHITECTURES
from builders import Net
from helpers import SAMPLES
from numpy.typing import NDArray
from onnx import TensorProto, helper
from random_graphs import KINDS, STEPS, build

import relief_onnx
from relief_onnx import relevance
from relief_onnx.flow import DEFAULT_RULE, passed_evenly
from relief_onnx.graph import Graph
from relief_onnx.layers import find
from relief_onnx.model import prepare
from relief_onnx.recurrent import recurrent_shares
from relief_onnx.relevance import Ask, Relevance, propagate
from relief_onnx.session import Session
from relief_onnx.tracks import follow

Array = NDArray[Any]
Feed = dict[str, Array]
RTOL = 1e-6
# A batch is summed in float32, so a variance has fewer digits where the mean is several times the deviation, as after Relu and in states.
FEWER_DIGITS = {"residual convolutions": 1e-5, "squeeze and excitation": 1e-5, "GRU": 1e-5, "LSTM": 2e-5}


# -- the oracle: one equation per unit, R = (what outputs give) + sum over its readers of R(reader) * share -----------------------


def activity(x: Array, *axes: int) -> Array:
    """Variance, and a thousandth of the squared mean, over all axes but those."""
    others = tuple(axis for axis in range(x.ndim) if axis not in [a % x.ndim for a in axes])
    return np.asarray(x.var(others) + DEFAULT_RULE.constant * np.square(x.mean(others)))


def variation(x: Array, *axes: int) -> Array:
    """Activity in units of the mean square."""
    others = tuple(axis for axis in range(x.ndim) if axis not in [a % x.ndim for a in axes])
    return np.asarray(activity(x, *axes) / np.square(x).mean(others))


class Oracle:
    """Groups of units with a matrix [readers, read] of shares for each edge; solved at once as dense linear equations."""

    def __init__(self, model: onnx.ModelProto, feed: Feed) -> None:
        everything = onnx.ModelProto()
        everything.CopyFrom(model)
        known = {item.name for item in model.graph.output}
        names = [name for node in model.graph.node for name in node.output if name]
        everything.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
        values = Session(everything, 1).run(feed, names)
        self.values = {name: np.asarray(value, np.float64) for name, value in zip(names, values, strict=True)}
        self.values |= {name: np.asarray(value, np.float64) for name, value in feed.items()}
        graph = Graph(model)
        self.values |= {name: graph.array(name).astype(np.float64) for name in graph.initializers}
        self._sizes: dict[str, int] = {}
        self._edges: list[tuple[str, str, Array]] = []
        self._given: dict[str, Array] = {}
        self.shares: dict[str, Array] = {}

    def output(self, name: str, size: int, weight: float = 1.0) -> None:
        self._sizes[name] = size
        self._given[name] = np.full(size, weight / size)

    def edge(self, reader: str, read: str, matrix: Array) -> None:
        assert self._sizes.setdefault(reader, matrix.shape[0]) == matrix.shape[0]
        assert self._sizes.setdefault(read, matrix.shape[1]) == matrix.shape[1]
        self._edges.append((reader, read, matrix))

    def dense(self, reader: str, read: str, weight: str, transposed: bool = False) -> None:
        """A layer over the last axis: w_ji^2 Act(x_i), as a share of the row; weight [in, out], or [out, in] where transposed."""
        w = self.values[weight] if transposed else self.values[weight].T
        self.layer(reader, read, weight, np.square(w) * activity(self.values[read], -1))

    def conv(self, reader: str, read: str, weight: str, pad: int) -> None:
        """A convolution of stride 1: each weight meets the pixel at its offset, zeros of the padding among them."""
        w, x = self.values[weight], np.pad(self.values[read], [(0, 0), (0, 0), (pad, pad), (pad, pad)])
        size = [x.shape[2] - w.shape[2] + 1, x.shape[3] - w.shape[3] + 1]
        met = np.zeros(w.shape)
        for j, i, a, b in np.ndindex(*w.shape):
            seen = x[:, i, a : a + size[0], b : b + size[1]]
            met[j, i, a, b] = w[j, i, a, b] ** 2 * (seen.var() + DEFAULT_RULE.constant * seen.mean() ** 2)
        self.layer(reader, read, weight, met.sum((2, 3)))

    def layer(self, reader: str, read: str, weight: str, parts: Array) -> None:
        self.shares[weight] = parts / parts.sum(1, keepdims=True)
        self.edge(reader, read, self.shares[weight])

    def same(self, reader: str, read: str, size: int) -> None:
        self.edge(reader, read, np.eye(size))

    def split(self, reader: str, reads: dict[str, Array]) -> None:
        """Each unit is shared by those numbers, which need not sum to 1."""
        total = sum(reads.values())
        for name, part in reads.items():
            self.edge(reader, name, np.diag(part / total))

    def solve(self) -> dict[str, Array]:
        starts = dict(zip(self._sizes, np.cumsum([0, *self._sizes.values()]).tolist(), strict=False))
        place = {name: slice(starts[name], starts[name] + size) for name, size in self._sizes.items()}
        total = sum(self._sizes.values())
        passes, given = np.zeros((total, total)), np.zeros(total)
        for reader, read, matrix in self._edges:
            passes[place[reader], place[read]] += matrix
        for name, values in self._given.items():
            given[place[name]] += values
        found = np.linalg.solve(np.eye(total) - passes.T, given)
        return {name: found[place[name]] for name in self._sizes}


Case = tuple[onnx.ModelProto, Feed, Oracle, dict[str, str]]  # with the units that each weight makes


def finished(net: Net, *outputs: str, samples: int = 7) -> tuple[onnx.ModelProto, Feed, Oracle]:
    """So few samples that they are one group (see `grouping`)."""
    model = net.model(*outputs)
    feed = {}
    for name, shape, kind in net.inputs:
        sizes = [samples if isinstance(size, str) else size for size in shape]
        feed[name] = net.rng.integers(0, 7, sizes) if kind == TensorProto.INT64 else net.rng.standard_normal(sizes).astype(np.float32)
    return model, feed, Oracle(model, feed)


def perceptron() -> Case:
    net = Net(seed=1)
    x, a, b = net.input("N", 5), net.weight(6, 5), net.weight(3, 6)
    h = net.op("Gemm", x, a, net.bias(6), transB=1)
    r = net.op("Relu", h)
    y = net.op("Gemm", r, b, net.bias(3), transB=1)
    model, feed, oracle = finished(net, y)
    oracle.output(y, 3)
    oracle.dense(y, r, b, True)
    oracle.same(r, h, 6)
    oracle.dense(h, x, a, True)
    return model, feed, oracle, {a: h, b: y}


def residual() -> Case:
    net = Net(seed=2)
    x, a, b, c = net.input("N", 2, 5, 5), net.weight(4, 2, 3, 3), net.weight(4, 4, 3, 3), net.weight(3, 4)
    h = net.op("Conv", x, a, net.bias(4), pads=[1] * 4)
    r = net.op("Relu", h)
    g = net.op("Conv", r, b, net.bias(4), pads=[1] * 4)
    s = net.op("Add", g, r)
    p = net.op("Flatten", net.op("GlobalAveragePool", s))
    y = net.op("Gemm", p, c, net.bias(3), transB=1)
    model, feed, oracle = finished(net, y)
    oracle.output(y, 3)
    oracle.dense(y, p, c, True)
    oracle.same(p, s, 4)
    oracle.split(s, {name: activity(oracle.values[name], 1) for name in (g, r)})
    oracle.conv(g, r, b, 1)
    oracle.same(r, h, 4)
    oracle.conv(h, x, a, 1)
    return model, feed, oracle, {a: h, b: g, c: y}


def parts() -> Case:
    """Split in a 2 and a 4, one through a layer, joined again the other way round."""
    net = Net(seed=3)
    x, a, b, c = net.input("N", 5), net.weight(5, 6), net.weight(2, 3), net.weight(7, 3)
    h = net.op("MatMul", x, a)
    left, right = net.op("Split", h, net.ints(2, 4), outputs=2, axis=1)
    m = net.op("MatMul", left, b)
    j = net.op("Concat", right, m, axis=1)
    y = net.op("MatMul", j, c)
    model, feed, oracle = finished(net, y)
    oracle.output(y, 3)
    oracle.dense(y, j, c)
    oracle.edge(j, right, np.eye(7)[:, :4])
    oracle.edge(j, m, np.eye(7)[:, 4:])
    oracle.dense(m, left, b)
    oracle.edge(left, h, np.eye(6)[:2])
    oracle.edge(right, h, np.eye(6)[2:])
    oracle.dense(h, x, a)
    return model, feed, oracle, {a: h, b: m, c: y}


def squeezed() -> Case:
    """Squeeze and excitation: the gate and what it gates share by how much each of them varies."""
    net = Net(seed=4)
    x, a, b, c = net.input("N", 2, 4, 4), net.weight(3, 2, 3, 3), net.weight(3, 3, 1, 1), net.weight(2, 3, 1, 1)
    h = net.op("Conv", x, a, net.bias(3), pads=[1] * 4)
    mean = net.op("ReduceMean", h, axes=[2, 3], keepdims=1)
    e = net.op("Conv", mean, b, net.bias(3))
    gate = net.op("Sigmoid", e)
    p = net.op("Mul", h, gate)
    y = net.op("Conv", p, c, net.bias(2))
    model, feed, oracle = finished(net, y)
    oracle.output(y, 2)
    oracle.conv(y, p, c, 0)
    oracle.split(p, {name: variation(oracle.values[name], 1) for name in (h, gate)})
    oracle.same(gate, e, 3)
    oracle.conv(e, mean, b, 0)
    oracle.same(mean, h, 3)
    oracle.conv(h, x, a, 1)
    return model, feed, oracle, {a: h, b: e, c: y}


def attention() -> Case:
    """Two heads of three: scores pass on to queries and keys, their product with the values to both, evenly."""
    net = Net(seed=5)
    tokens, width, heads, size = 4, 5, 2, 3
    x = net.input("N", tokens, width)
    weights = [net.weight(width, heads * size) for _ in range(3)]
    projected = [net.op("MatMul", x, weight) for weight in weights]
    parts_ = [net.op("Reshape", part, net.ints(0, 0, heads, size)) for part in projected]
    q, v = (net.op("Transpose", parts_[i], perm=[0, 2, 1, 3]) for i in (0, 2))
    k = net.op("Transpose", parts_[1], perm=[0, 2, 3, 1])
    scores = net.op("MatMul", q, k)
    soft = net.op("Softmax", net.op("Mul", scores, net.constant(np.float32(size**-0.5))), axis=-1)
    mixed = net.op("MatMul", soft, v)
    joined = net.op("Reshape", net.op("Transpose", mixed, perm=[0, 2, 1, 3]), net.ints(0, 0, heads * size))
    last = net.weight(heads * size, width)
    o = net.op("MatMul", joined, last)
    y = net.op("Add", o, x)
    model, feed, oracle = finished(net, y)
    oracle.output(y, width)
    oracle.same(y, o, width)  # no layer leads to the input itself, so the branch with layers gets all
    oracle.dense(o, joined, last)
    oracle.same(joined, mixed, heads * size)
    per_head = np.kron(np.eye(heads), np.ones((size, 1)))  # [heads * size, heads]
    oracle.edge(mixed, soft, per_head / 2)
    oracle.edge(mixed, v, np.eye(heads * size) / 2)
    oracle.same(soft, scores, heads)
    products = activity(oracle.values[q], 1, 3) * activity(oracle.values[k], 1, 2)  # [heads, size]
    shares = products / products.sum(1, keepdims=True)
    spread = np.zeros((heads, heads * size))
    for head in range(heads):
        spread[head, head * size : (head + 1) * size] = shares[head]
    oracle.edge(scores, q, spread / 2)
    oracle.edge(scores, k, spread / 2)
    for part, name, weight in zip((q, k, v), projected, weights, strict=True):
        oracle.same(part, name, heads * size)
        oracle.dense(name, x, weight)
    return model, feed, oracle, {**dict(zip(weights, projected, strict=True)), last: o}


def centred() -> Case:
    """x - mean(x) over the channels: what goes to the mean comes back by activity."""
    net = Net(seed=6)
    x, a, b = net.input("N", 5), net.weight(5, 6), net.weight(6, 3)
    h = net.op("MatMul", x, a)
    mean = net.op("ReduceMean", h, axes=[1], keepdims=1)
    d = net.op("Sub", h, mean)
    y = net.op("MatMul", d, b)
    model, feed, oracle = finished(net, y)
    oracle.output(y, 3)
    oracle.dense(y, d, b)
    own, common = activity(oracle.values[h], 1), float(activity(oracle.values[mean]))
    oracle.edge(d, h, np.diag(own / (own + common)))
    oracle.edge(d, mean, (common / (own + common))[:, None])
    oracle.edge(mean, h, own[None] / own.sum())
    oracle.dense(h, x, a)
    return model, feed, oracle, {a: h, b: y}


def two_outputs(first: float = 3.0, second: float = 1.0) -> Case:
    net = Net(seed=7)
    x, a, b, c = net.input("N", 5), net.weight(5, 6), net.weight(6, 3), net.weight(6, 2)
    h = net.op("MatMul", x, a)
    y, z = net.op("MatMul", h, b), net.op("MatMul", h, c)
    model, feed, oracle = finished(net, y, z)
    for name, size, weight in ((y, 3, first), (z, 2, second)):
        oracle.output(name, size, weight / (first + second))
    oracle.dense(y, h, b)
    oracle.dense(z, h, c)
    oracle.dense(h, x, a)
    return model, feed, oracle, {a: h, b: y, c: z}


def recurrent(operator: str, gates: int, outputs: int) -> Case:
    """A layer, a recurrent layer that is read over all steps, a layer. The loop is one more edge, from the units to themselves."""
    net = Net(seed=8)
    steps, width, hidden = 4, 5, 3
    x, a, c = net.input(steps, "N", width), net.weight(width, 6), net.weight(hidden, 2)
    w, r, b = net.weight(1, gates * hidden, 6), net.weight(1, gates * hidden, hidden), net.bias(1, 2 * gates * hidden)
    h = net.op("MatMul", x, a)
    how = {"linear_before_reset": 1} if operator == "GRU" else {}  # else candidates read the state times the reset gate
    states = net.op(operator, h, w, r, b, hidden_size=hidden, outputs=outputs, **how)[0]
    flat = net.op("Squeeze", states, net.ints(1))
    y = net.op("MatMul", flat, c)
    model, feed, oracle = finished(net, y)
    oracle.output(y, 2)
    oracle.dense(y, flat, c)
    oracle.same(flat, states, hidden)
    gated = [np.square(oracle.values[name][0]).reshape(gates, hidden, -1).sum(0) for name in (w, r)]
    last = np.concatenate([np.zeros_like(oracle.values[states][:1]), oracle.values[states][:-1]])
    inputs, loop = gated[0] * activity(oracle.values[h], 2), gated[1] * activity(last, 3)
    total = inputs.sum(1, keepdims=True) + loop.sum(1, keepdims=True)
    oracle.edge(states, h, inputs / total)
    oracle.edge(states, states, loop / total)
    oracle.dense(h, x, a)
    return model, feed, oracle, {a: h, c: y}


CASES: dict[str, Callable[[], Case]] = {
    "layers": perceptron,
    "residual convolutions": residual,
    "split and concat": parts,
    "squeeze and excitation": squeezed,
    "attention": attention,
    "centred": centred,
    "two outputs": two_outputs,
    "LSTM": lambda: recurrent("LSTM", 4, 3),
    "GRU": lambda: recurrent("GRU", 3, 2),
    "RNN": lambda: recurrent("RNN", 1, 2),
}


# W and R of the recurrent layers: tests/test_recurrent.py looks at these.
LOOPS = {operator: {"w4", "w5"} for operator in ("LSTM", "GRU", "RNN")}


def weights_of(name: str, model: onnx.ModelProto) -> list[str]:
    return [f"{model.graph.output[0].name}=3"] if name == "two outputs" else []


@pytest.mark.parametrize("name", CASES)
def test_the_walk_solves_the_equations(name: str) -> None:
    model, feed, oracle, made = CASES[name]()
    found = {item.weight: item for item in relief_onnx.score(model, [feed], output_weight=weights_of(name, model)).values()}
    assert set(found) - LOOPS.get(name, set()) == set(made)
    wanted, rtol = oracle.solve(), FEWER_DIGITS.get(name, RTOL)
    for weight, units in made.items():
        score, r = found[weight], found[weight].relevance
        assert r is not None
        np.testing.assert_allclose(score.score, oracle.shares[weight], rtol=rtol, err_msg=weight)
        np.testing.assert_allclose(r, wanted[units], rtol=rtol, err_msg=weight)
        np.testing.assert_allclose(score.flow, oracle.shares[weight] * wanted[units][:, None], rtol=2 * rtol, err_msg=weight)
    first = found[next(iter(made))].relevance
    assert first is not None
    assert np.ptp(first) > 1e-3 * first.max(), "all the same: nothing was tested"


def test_an_output_without_weight_gives_nothing() -> None:
    model, feed, _, made = two_outputs()
    first, second = (item.name for item in model.graph.output)
    only = {item.weight: item for item in relief_onnx.score(model, [feed], output_weight=[f"{second}=0"]).values()}
    wanted = two_outputs(1.0, 0.0)[2].solve()
    for weight, units in made.items():
        np.testing.assert_allclose(only[weight].relevance, wanted[units], rtol=RTOL, atol=1e-300)
        assert (only[weight].flow.sum() == 0) == (units == second)
    assert first != second


# -- nothing is lost ---------------------------------------------------------------------------------------------------------


def walked(model: onnx.ModelProto, seed: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Graph, Relevance, dict[int, tuple[float, float]]]:
    """The walk with random activities and shares; of every node that is no layer (R of its outputs, what it passed on)."""
    graph = Graph(prepare(model))
    plan, log = find(graph), {}

    def random(ask: Ask) -> Array:
        shape = graph.shape(ask[0]) or ()
        sizes = [size if axis in ask[1] and isinstance(size, int) else 1 for axis, size in enumerate(shape)]
        return np.random.default_rng([seed, zlib.crc32(repr(ask).encode())]).random(sizes)

    rng, shares = np.random.default_rng(seed), {}
    for layer in plan.layers:
        rows = rng.random(layer.view.shape[:2])
        shares[layer.name] = rows / rows.sum(1, keepdims=True)
    real = relevance._passed

    def noted(walk: Any, index: int, values: Any, adds: Any) -> Any:
        passed = real(walk, index, values, adds)
        log[index] = (sum(float(own.sum()) for own in values if own is not None), sum(float(own.sum()) for _, own in passed))
        return passed

    monkeypatch.setattr(relevance, "_passed", noted)
    found = propagate(graph, plan, follow(graph, plan), random, random, shares, {})
    monkeypatch.setattr(relevance, "_passed", real)
    return graph, found, log


def check_conserved(model: onnx.ModelProto, seed: int, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Every node gives what it got, so all of 1 reaches what nobody makes. Returns operators in which R may end, and did.

    Zeros that a Pad writes come from nowhere (measured, their activity is 0, so that joins give them nothing); a ConstantOfShape has no
    inputs but a size.
    """
    graph, found, log = walked(model, seed, monkeypatch)
    made = {name for node in graph.nodes for name in node.output}
    arrived = sum(float(values.sum()) for name, values in found.tensors.items() if name not in made)
    lost = {}
    for index, (got, gave) in log.items():
        if abs(got - gave) > 1e-9:
            assert graph.nodes[index].op_type in ("Pad", "ConstantOfShape"), f"{graph.nodes[index].op_type} got {got} and gave {gave}"
            assert gave < got
            lost[index] = got - gave
    assert abs(arrived + sum(lost.values()) - 1) <= 1e-9
    assert all((values >= 0).all() for values in found.tensors.values())
    return {graph.nodes[index].op_type for index in lost}


@pytest.mark.parametrize("name", [*ARCHITECTURES, "lenet5", "lenet300", "resnet8"])
def test_relevance_is_conserved(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ARCHITECTURES[name]()[0] if name in ARCHITECTURES else onnx.load(str(SAMPLES / f"{name}.onnx"))
    assert check_conserved(model, 1, monkeypatch) == ({"Pad"} if name == "padded shortcut" else set())


@pytest.mark.parametrize("seed", range(60))
def test_relevance_is_conserved_on_random_graphs(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    steps = [(int(number), int(rng.integers(999))) for number in rng.integers(0, len(STEPS), 9)]
    model, _ = build(steps, int(rng.choice([9, 11, 13, 17, 18, 21])), KINDS[seed % 3], bool(rng.random() < 0.5))
    check_conserved(model, seed, monkeypatch)


@pytest.mark.parametrize("name", CASES)
def test_relevance_of_the_known_cases_is_conserved(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of recurrent layers too: what leaves their loop is what entered, and biases take no part of it."""
    assert check_conserved(CASES[name]()[0], 2, monkeypatch) == set()


def test_measured_zeros_of_a_pad_get_nothing() -> None:
    """With measured activity the zeros that a shortcut of type A brings in take no share, so all of R is in the first layer."""
    model, feed = ARCHITECTURES["padded shortcut"]()
    scores = list(relief_onnx.score(model, [feed]).values())
    first = scores[0].relevance
    assert first is not None
    assert first.sum() == pytest.approx(1.0, rel=1e-9)


# -- what nobody described ---------------------------------------------------------------------------------------------------


def chosen_boxes(net: Net) -> str:
    """Rows that NonMaxSuppression picks; its numbers and the rows come from layers."""
    x = net.input(1, 6, 4)
    boxes, scores = net.op("MatMul", x, net.weight(4, 4)), net.op("MatMul", x, net.weight(4, 2))
    best = net.op("Transpose", scores, perm=[0, 2, 1])
    return str(net.op("NonMaxSuppression", boxes, best, net.ints(3)))


def in_an_if(net: Net) -> str:
    x = net.input(2, 5)
    h = net.op("MatMul", x, net.weight(5, 4))
    condition = net.op("Greater", net.op("ReduceSum", h, keepdims=0), net.constant(np.float32(0)))
    bodies = {}
    for branch, operator in (("then_branch", "Relu"), ("else_branch", "Neg")):
        node = helper.make_node(operator, [h], [f"{branch}_y"])
        bodies[branch] = helper.make_graph([node], branch, [], [helper.make_tensor_value_info(f"{branch}_y", TensorProto.FLOAT, [2, 4])])
    return str(net.op("MatMul", net.op("If", condition, **bodies), net.weight(4, 3)))


def picked_channel(net: Net) -> str:
    """Which channel is read is only known when it runs."""
    x = net.input("N", 5)
    net.inputs.append(("which", (2,), TensorProto.INT64))
    return str(net.op("MatMul", net.op("Gather", net.op("MatMul", x, net.weight(5, 6)), "which", axis=1), net.weight(2, 3)))


def outside_the_table(net: Net) -> str:
    """An operator that the table does not have."""
    x = net.input("N", 2, 4, 4)
    y = net.op("Conv", x, net.weight(4, 2, 1, 1))
    return str(net.op("MatMul", net.op("Det", y), net.weight(4, 3)))


EVENLY = {
    "NonMaxSuppression": chosen_boxes,
    "If": in_an_if,
    "Gather": picked_channel,
    "Det": outside_the_table,
}


@pytest.mark.parametrize("name", EVENLY)
def test_what_is_passed_on_evenly_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(seed=9)
    model = net.model(EVENLY[name](net))
    graph = Graph(prepare(model))
    found = [item for item in passed_evenly(graph, find(graph)) if item.op == name]
    assert [item.reason for item in found] != []
    assert all(len(item.reason) > 10 for item in found)
    check_conserved(model, 3, monkeypatch)


@pytest.mark.parametrize("operator", ["LRN", "Hardmax"])
def test_what_no_layer_leads_to_is_not_named(operator: str) -> None:
    net = Net(seed=9)
    x = net.input("N", 2, 4, 4)
    y = net.op(operator, x, **({"size": 3} if operator == "LRN" else {}))
    graph = Graph(prepare(net.model(net.op("Conv", y, net.weight(3, 2, 1, 1)))))
    assert passed_evenly(graph, find(graph)) == ()


@pytest.mark.parametrize("squared", [True, False])
def test_a_recurrent_layer_that_hears_nothing_still_passes_everything_on(squared: bool) -> None:
    """Without activity in x all goes round the loop; the equations must have a solution all the same."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((1, 12, 4)), "r": rng.standard_normal((1, 12, 3))}
    node = helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=3)
    inputs, outputs = (helper.make_tensor_value_info(name, 1, None) for name in ("x", "y"))
    stored = [onnx.numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    graph = Graph(helper.make_model(helper.make_graph([node], "g", [inputs], [outputs], stored)))
    for states in (np.ones(3), np.zeros(3)):
        shares = recurrent_shares(graph, node, np.zeros(4), states, squared)
        assert shares is not None
        around = np.linalg.solve(np.eye(3) - shares.loop[0].T, np.ones(3))
        np.testing.assert_allclose((around @ shares.input[0]).sum(), 3.0, rtol=1e-9)


@pytest.mark.parametrize("sampled", ["features", "the input"])
def test_what_says_where_samples_are_taken_has_as_much_as_they(sampled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(seed=9)
    x = net.input("N", 3, 6, 6)
    features = net.op("Conv", x, net.weight(4, 3, 1, 1)) if sampled == "features" else x
    places = net.op("Transpose", net.op("Tanh", net.op("Conv", x, net.weight(2, 3, 1, 1))), perm=[0, 2, 3, 1])
    model = net.model(net.op("GridSample", features, places))
    check_conserved(model, 3, monkeypatch)
    scores = relief_onnx.score(model, [{x: np.random.default_rng(0).standard_normal((8, 3, 6, 6)).astype(np.float32)}])
    found = [float(np.sum(score.relevance)) for score in scores.values() if score.relevance is not None]
    np.testing.assert_allclose(found, [0.5, 0.5] if sampled == "features" else [1.0])


CHOOSING = {
    "TopK": "v, i = TopK <axis = 1> (s, k)  i3 = Unsqueeze (i, two)  ie = Expand (i3, size)  c = GatherElements <axis = 1> (f, ie)",
    "ArgMax": "i = ArgMax <axis = 1, keepdims = 1> (s)  i3 = Unsqueeze (i, two)  c = GatherND <batch_dims = 1> (f, i3)",
    "Where": "b = Greater (s, nought)  b3 = Unsqueeze (b, two)  c = Where (b3, f, nought)",
}


def choosing(way: str, more: str = "y = MatMul (m, wo)") -> onnx.ModelProto:
    """Rows of f [N, 10, 6] that scores s [N, 10] choose."""
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]> net (float[N, 10, 8] x) => (float[N, 4] y) {{
            h = MatMul (x, ws)  t = Tanh (h)  s3 = MatMul (t, wv)  s = Squeeze (s3, two)  f = MatMul (x, wf)
            {CHOOSING[way]}  m = ReduceMean <axes = [1], keepdims = 0> (c)  {more}
        }}"""
    )
    rng = np.random.default_rng(0)
    floats = {"ws": (8, 6), "wv": (6, 1), "wf": (8, 6), "wo": (6, 4)}
    stored = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in floats.items()} | {"nought": np.float32(0)}
    stored |= {"k": np.array([3]), "two": np.array([2]), "size": np.array([1, 1, 6])}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items())
    return model


def rows_to_choose_from() -> dict[str, Any]:
    return {"x": np.random.default_rng(1).standard_normal((64, 10, 8)).astype(np.float32)}


@pytest.mark.parametrize("way", CHOOSING)
def test_what_only_chooses_has_as_much_as_what_it_chooses_from(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = choosing(way)
    check_conserved(model, 3, monkeypatch)
    found = relief_onnx.prune(model, [rows_to_choose_from()], keep="70%", granularity="weight", threads=1)
    rows = {row["weight"]: row for row in found.report["layers"]}
    np.testing.assert_allclose([rows[name]["relevance"] for name in ("ws", "wv", "wf", "wo")], [0.5, 0.5, 0.5, 1.0])
    assert rows["ws"]["weights_kept"] >= 0.4 * rows["ws"]["weights"]
    assert ["only chooses" in row["reason"] for row in found.report["flow"]["evenly"]] == [True]
    # 0.76, 0.42 and 0.94 where the layers that choose went first.
    assert found.report["quality"]["agreement"]["y"]["cosine"] > {"TopK": 0.95, "ArgMax": 0.8, "Where": 0.96}[way]


def test_what_chooses_and_counts_too_gets_nothing_for_its_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = choosing("Where", "l = MatMul (m, wo)  total = ReduceMean <axes = [1], keepdims = 1> (s)  y = Add (l, total)")
    check_conserved(model, 3, monkeypatch)
    graph = Graph(prepare(model))
    assert passed_evenly(graph, find(graph)) == ()
