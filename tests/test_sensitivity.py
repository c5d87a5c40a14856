"""Layers weighed by what their errors do to the outputs: the factors themselves, and what they are for."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from builders import Net
from helpers import real_model
from numpy.typing import NDArray

import relief_onnx
from relief_onnx import obs
from relief_onnx.graph import Graph
from relief_onnx.layers import Plan, find
from relief_onnx.model import prepare
from relief_onnx.sensitivity import RANGE, Trials, factors
from relief_onnx.session import Session

Array = NDArray[Any]


def two_branches(gains: tuple[float, float]) -> onnx.ModelProto:
    """y = gains[0] A x + gains[1] B x."""
    net = Net(seed=2)
    x = net.input("N", 24)
    terms = [net.op("Mul", net.op("MatMul", x, net.weight(24, 8)), net.constant(np.float32(gain))) for gain in gains]
    return net.model(net.op("Add", *terms))


def planned(model: onnx.ModelProto) -> tuple[Graph, Plan]:
    graph = Graph(prepare(model))
    return graph, find(graph)


@pytest.mark.parametrize("gains", [(1.0, 0.1), (0.03, 1.0), (1.0, 1e-6)])
def test_a_factor_is_what_the_outputs_lose_over_what_was_foreseen(gains: tuple[float, float]) -> None:
    """Errors of the same size are foreseen in both branches; the outputs see each times the square of its gain."""
    graph, plan = planned(two_branches(gains))
    x = np.random.default_rng(0).standard_normal((64, 24)).astype(np.float32)
    trials = Trials()
    lost = []
    for layer in plan.layers:
        old = graph.array(layer.weight)
        new = old * 0.9
        error = np.square(x @ (old - new)).mean(0)
        lost.append(float(error.sum()))
        trials.add(layer, {layer.weight: new.astype(np.float32)}, error, np.ones(8))
    found = factors(graph.model, trials, [{graph.model.graph.input[0].name: x}], 1)
    first, second = (found[layer.weight] for layer in plan.layers)
    assert first * second == pytest.approx(1, rel=1e-4)
    assert first / second == pytest.approx(min(max((gains[0] / gains[1]) ** 2, RANGE**-2), RANGE**2), rel=1e-4)


def test_what_loses_nothing_in_its_trial_has_no_factor() -> None:
    graph, plan = planned(two_branches((1.0, 1.0)))
    trials = Trials()
    first, second = plan.layers
    trials.add(first, {first.weight: graph.array(first.weight)}, np.zeros(8), np.ones(8))
    trials.add(second, {second.weight: graph.array(second.weight) * np.float32(0.5)}, np.ones(8), np.ones(8))
    feed = {graph.model.graph.input[0].name: np.random.default_rng(0).standard_normal((8, 24)).astype(np.float32)}
    assert factors(graph.model, trials, [feed], 1) == {second.weight: pytest.approx(1)}


def relative_error(original: onnx.ModelProto, pruned: onnx.ModelProto, feeds: list[dict[str, Array]]) -> float:
    """Of the outputs, as a part of their squares, the mean over outputs."""
    first, second = Session(original, 1), Session(pruned, 1)
    pairs = [list(zip(first.run(feed), second.run(feed), strict=True)) for feed in feeds]
    by_output = [np.array([(np.square(a - b).sum(), np.square(a).sum()) for a, b in each]).sum(0) for each in zip(*pairs, strict=True)]
    return float(np.mean([error / total for error, total in by_output]))


def test_a_stage_that_hides_errors_gets_fewer_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate that is mostly open: its sums vary more than what it lets through."""
    net = Net(seed=5)
    x = net.input("N", 64)
    open_gate = net.op("Sigmoid", net.op("Add", net.op("MatMul", x, net.weight(64, 96)), net.constant(np.full(96, 4.0, np.float32))))
    hidden = net.op("Mul", net.op("MatMul", x, net.weight(64, 96)), open_gate)
    model = net.model(net.op("MatMul", hidden, net.weight(96, 16)))
    rng = np.random.default_rng(3)
    mixing = rng.standard_normal((64, 64)) / 8
    name = model.graph.input[0].name
    calibration, unseen = ({name: (rng.standard_normal((rows, 64)) @ mixing).astype(np.float32)} for rows in (384, 128))
    options: dict[str, Any] = {"granularity": "weight", "keep": "40%", "repair": "least-squares", "storage": "dense", "threads": 1}
    found, obs_powers = {}, obs.POWERS
    for powers in (obs_powers, (0.0,)):
        monkeypatch.setattr(obs, "POWERS", powers)
        result = relief_onnx.prune(model, [calibration], **options)
        found[powers] = relative_error(model, result.model, [unseen])
        errors = result.report["flow"]["choice"]["power_errors"]
        assert list(errors) == [f"{power:g}" for power in powers]
    assert found[obs_powers] < 0.8 * found[(0.0,)]


def test_layers_of_a_real_recurrent_network_are_weighed(monkeypatch: pytest.MonkeyPatch) -> None:
    """DTLN's second half: an encoder, two LSTM steps as products, a mask and a decoder; gates hide most of what their sums lose."""
    path = real_model("dtln_2")
    model = onnx.load(str(path))
    sound, state = (item.name for item in model.graph.input)
    rng, session = np.random.default_rng(0), Session(model, 1)
    feeds: list[dict[str, Array]] = []
    memory = np.zeros((1, 2, 128, 2), np.float32)
    for _ in range(128):  # tones, and the states that they leave
        times = np.arange(512) / 16000 + rng.random()
        tones = sum(rng.random() * np.sin(2 * np.pi * rng.uniform(80, 2000) * times) for _ in range(4))
        feeds.append({sound: (0.1 * tones + 0.01 * rng.standard_normal(512)).astype(np.float32).reshape(1, 1, 512), state: memory})
        memory = session.run(feeds[-1])[1]
    options: dict[str, Any] = {"granularity": "weight", "keep": "48%", "repair": "least-squares", "storage": "dense", "threads": 1}
    monkeypatch.setattr(obs, "JUDGES", 40)
    result = relief_onnx.prune(path, feeds, **options)
    choice = result.report["flow"]["choice"]
    assert choice["power"] > 0
    assert choice["power_errors"][f"{choice['power']:g}"] < 0.9 * choice["power_errors"]["0"]
