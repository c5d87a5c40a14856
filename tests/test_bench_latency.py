"""The latency benchmark's own arithmetic: half the MACs is found, and ratios of interleaved runs are right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import Net
from helpers import ROOT

from benchmarks import latency


class Machine:
    """Runs that take a known time, on a clock of its own."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, ""

    def clock(self) -> float:
        return self.now

    def run(self, name: str, seconds: float) -> None:
        self.calls += name
        self.now += seconds


def test_interleaved_ratios() -> None:
    machine = Machine()
    timing = latency.interleaved(lambda: machine.run("a", 3.0), lambda: machine.run("b", 2.0), rounds=4, repeat=2, clock=machine.clock)
    assert machine.calls == "aabb" + "bbaa" + "aabb" + "bbaa"
    assert timing.before == [3.0] * 4
    assert timing.after == [2.0] * 4
    assert timing.row() == {"ms_before": 3000.0, "ms_after": 2000.0, "speedup": 1.5, "p10": 1.5, "p90": 1.5}


def test_a_disturbed_round_does_not_move_the_median() -> None:
    machine = Machine()
    pauses = iter([1.0] * 8 + [50.0] + [1.0] * 31)
    timing = latency.interleaved(
        lambda: machine.run("a", 4.0 * next(pauses)), lambda: machine.run("b", 2.0 * next(pauses)), rounds=20, clock=machine.clock
    )
    assert timing.row()["speedup"] == 2.0
    assert timing.row()["p90"] == 2.0
    assert max(timing.ratios) == 100.0


def test_a_machine_that_slows_down_slows_both() -> None:
    machine = Machine()
    timing = latency.interleaved(
        lambda: machine.run("a", 3.0 * (1 + machine.now / 1e6)),
        lambda: machine.run("b", 2.0 * (1 + machine.now / 1e6)),
        50,
        clock=machine.clock,
    )
    assert timing.row()["speedup"] == pytest.approx(1.5, abs=1e-3)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_bisection_on_a_formula(power: float) -> None:
    seen: list[float] = []

    def share(alpha: float) -> float:
        seen.append(alpha)
        return float(alpha**power)

    assert share(latency.bisect(share)) == pytest.approx(0.5, abs=0.01)
    assert len(seen) <= 10


def test_bisection_on_steps_takes_the_nearest() -> None:
    steps = lambda alpha: 0.2 if alpha < 0.4 else (0.56 if alpha < 0.9 else 1.0)
    assert steps(latency.bisect(steps)) == 0.56


def small_net(path: Path) -> None:
    net = Net()
    x = net.input("batch", 3, 12, 12)
    for inputs, outputs in ((3, 32), (32, 64), (64, 64)):
        x = net.op("Relu", net.op("Conv", x, net.weight(outputs, inputs, 3, 3), net.bias(outputs), pads=[1, 1, 1, 1]))
    x = net.op("Flatten", net.op("GlobalAveragePool", x))
    net.outputs.append(net.op("Gemm", x, net.weight(64, 10)))
    onnx.save(net.model(), path)


def test_a_small_net_is_halved(tmp_path: Path) -> None:
    path = tmp_path / "small.onnx"
    small_net(path)
    rng = np.random.default_rng(0)
    name = onnx.load(path).graph.input[0].name
    alpha, result = latency.halve(path, [{name: rng.standard_normal((4, 3, 12, 12)).astype(np.float32)}], round_to=2)
    before, after = result.report["input"]["macs"], result.report["output"]["macs"]
    assert 0 < alpha < 1
    assert after / before == pytest.approx(0.5, abs=0.03)
    feed = {name: np.ones((1, 3, 12, 12), np.float32)}
    assert latency.optimised(result.model)["Gemm"] == 1
    assert "Conv" in " ".join(latency.profile(result.model, feed, runs=1))
    assert sum(latency.widths(result.model).values()) == 3


@pytest.mark.parametrize(("build", "size"), [(latency.mobilenet, 32), (lambda path, size: latency.unet(path, 8, size), 32)])
def test_the_built_models_run(build: object, size: int, tmp_path: Path) -> None:
    path = tmp_path / "built.onnx"
    build(path, size=size)  # type: ignore[operator]
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    (output,) = latency.session(model, 1).run(None, {"input": np.random.default_rng(0).standard_normal((2, 3, size, size), np.float32)})
    assert np.isfinite(output).all()
    assert 1e-3 < output.std() < 1e3


def test_make_has_the_target() -> None:
    assert "bench-latency:" in (ROOT / "Makefile").read_text()
