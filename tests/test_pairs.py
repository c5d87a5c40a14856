"""Layers that lost units, fitted together with what reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from builders import Net
from helpers import SAMPLES, digits
from numpy.typing import NDArray
from test_compensate import NAMES, made
from test_flow import other_digits

import relief_onnx
from relief_onnx import pairs, repair
from relief_onnx.aims import aim_of
from relief_onnx.graph import Graph
from relief_onnx.layers import find
from relief_onnx.rows import drawn, inputs_at, outputs_at, spread, touched
from relief_onnx.session import Session
from relief_onnx.surgery import apply_weights

Array = NDArray[Any]


def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer by itself, as if there were no pairs."""
    monkeypatch.setattr(repair, "pairs_of", lambda *_: {})


@pytest.mark.parametrize("name", NAMES)
def test_spread_is_the_transpose(name: str) -> None:
    """<spread(rows), x> = <rows, inputs_at(x)>, for every kind of layer without groups."""
    model, x = made(name)
    graph = Graph(model)
    (layer,) = find(graph).layers
    if layer.groups > 1:  # no part of a pair
        return
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    probe.graph.output.append(onnx.ValueInfoProto(name=layer.output))
    y = Session(probe).run({graph.inputs[0].name: x}, [layer.output])[0]
    rng = np.random.default_rng(1)
    places = drawn(layer, x, y, 40, 0, rng)
    met = inputs_at(layer, x, places)[:, 0]
    rows = rng.standard_normal(met.shape).astype(np.float32)
    back = spread(layer, rows, x.shape, places)
    assert back.shape == x.shape
    assert float(np.vdot(back, x)) == pytest.approx(float(np.vdot(rows, met)), rel=1e-4, abs=1e-3)
    everywhere = touched(layer, y)
    assert float(np.square(outputs_at(layer, y, everywhere)).sum()) == pytest.approx(float(np.square(y).sum()), rel=1e-4)


def dense(net: Net, scale: bool) -> tuple[str, str]:
    x = net.input("N", 4)
    weights = [net.constant(net.rng.uniform(0.3, 1, shape).astype(np.float32), "w") for shape in ((4, 2), (2, 1))]
    h = net.op("Gemm", x, weights[0], net.constant(np.full(2, 9, np.float32)))
    return net.op("Gemm", net.op("Relu", h), weights[1], net.bias(1)), weights[0]


def convolutions(net: Net, scale: bool) -> tuple[str, str]:
    x = net.input("N", 3, 6, 6)
    weights = [net.constant(net.rng.uniform(0.1, 0.3, shape).astype(np.float32), "w") for shape in ((2, 3, 3, 3), (1, 2, 1, 1))]
    h = net.op("Conv", x, weights[0], net.constant(np.full(2, 9, np.float32)), pads=[1, 1, 1, 1])
    if scale:
        values = [net.constant(np.array(value, np.float32)) for value in ((0.5, 2.0), (1, 1), (1, -1), (0.7, 1.5))]
        h = net.op("BatchNormalization", h, *values)
    return net.op("Conv", net.op("Relu", h), weights[1], net.bias(1)), weights[0]


def solved(model: onnx.ModelProto, weight: str, feed: dict[str, Array]) -> onnx.ModelProto:
    """Without the first unit of the first layer, both layers solved for."""
    graph = Graph(model)
    layers = find(graph).layers
    gone = np.array([True, False])
    stays = layers[0].view.invert(np.broadcast_to(~gone.reshape(-1, *(1,) * (len(layers[0].view.shape) - 1)), layers[0].view.shape))
    read = np.broadcast_to((~gone).reshape(1, -1, *(1,) * (len(layers[1].view.shape) - 2)), layers[1].view.shape)
    assert layers[0].bias is not None
    flags = {weight: stays, layers[0].bias.name: ~gone, layers[1].weight: layers[1].view.invert(read)}
    masked = apply_weights(model, {name: np.where(keep, graph.array(name), 0).astype(np.float32) for name, keep in flags.items()})
    return repair.repair(graph, masked, flags, frozenset({weight, layers[1].weight}), [feed], removed={weight: gone}, threads=1)[0]


@pytest.mark.parametrize(("build", "scale"), [(dense, False), (convolutions, False), (convolutions, True)])
def test_one_unit_does_the_work_of_two(build: Callable[[Net, bool], tuple[str, str]], scale: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no Relu is shut one unit can emit what two did together; the reader alone cannot make it do so."""
    net = Net(seed=5)
    out, weight = build(net, scale)
    model = net.model(out)
    (name, shape, _) = net.inputs[0]
    feed = {name: net.rng.standard_normal([400 if isinstance(size, str) else size for size in shape]).astype(np.float32)}
    wanted = Session(model).run(feed)[0]

    def error() -> float:
        return float(np.square(Session(solved(model, weight, feed)).run(feed)[0] - wanted).mean() / wanted.var())

    together = error()
    apart(monkeypatch)
    assert together < 0.02 * error()


@pytest.mark.parametrize("build", [dense, convolutions])
def test_where_every_relu_is_shut_nothing_moves(build: Callable[[Net, bool], tuple[str, str]]) -> None:
    net = Net(seed=5)
    out, weight = build(net, False)
    for name, value in net.initializers.items():
        net.initializers[name] = np.where(value == 9, np.float32(-99), value)
    model = net.model(out)
    (name, shape, _) = net.inputs[0]
    feed = {name: net.rng.standard_normal([400 if isinstance(size, str) else size for size in shape]).astype(np.float32)}
    repaired = solved(model, weight, feed)
    assert np.array_equal(Session(repaired).run(feed)[0], Session(model).run(feed)[0])


def test_outputs_come_closer_on_digits_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = onnx.load(str(SAMPLES / "resnet8.onnx"))
    feed, unseen = ({model.graph.input[0].name: x} for x in (digits(256), other_digits()))
    wanted = Session(model).run(unseen)[0]

    def error() -> float:
        options: dict[str, Any] = {"granularity": "channel", "keep": "40%", "round_to": 1, "criterion": "flow", "threads": 1}
        pruned = relief_onnx.prune(model, [feed], repair="least-squares", **options).model
        return float(np.square(Session(pruned).run(unseen)[0] - wanted).mean())

    together = error()
    apart(monkeypatch)
    assert together < error()


def found(model: onnx.ModelProto, removed: bool = True) -> dict[str, pairs.Pair]:
    """The pairs of a model whose first units all go."""
    graph = Graph(model)
    layers = find(graph).layers
    aims = {layer.name: aim_of(graph, graph, layer) for layer in layers}
    gone = {layer.weight: np.arange(layer.out_channels) < int(removed) for layer in layers}
    return pairs.pairs_of(graph, graph, layers, aims, gone)


def test_what_is_a_pair() -> None:
    net = Net()
    x = net.input("N", 4)
    h = net.op("Relu", net.op("Gemm", x, net.weight(4, 3), net.bias(3)))
    y = net.op("Gemm", h, net.weight(3, 2), net.bias(2))
    assert len(found(net.model(y))) == 1
    assert not found(net.model(y), removed=False)
    assert not found(net.model(y, h)), "the user sees what the first emits"
    net.op("Neg", h)
    net.outputs.append(net.nodes[-1].output[0])
    assert not found(net.model(y)), "another node reads it too"


@pytest.mark.parametrize("between", [(), ("Sigmoid",), ("Relu", "Neg")])
def test_only_a_relu_is_between(between: tuple[str, ...]) -> None:
    net = Net()
    h = net.op("Gemm", net.input("N", 4), net.weight(4, 3), net.bias(3))
    for operator in between:
        h = net.op(operator, h)
    assert not found(net.model(net.op("Gemm", h, net.weight(3, 2), net.bias(2))))
