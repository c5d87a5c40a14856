"""Comparing two models takes memory that is bounded, whatever the size of their activations."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from builders import Net

from relief_onnx import compare, footprint
from relief_onnx import model as files
from relief_onnx.compare import compare_models
from relief_onnx.data import open_dataset
from relief_onnx.dataset import Batch
from relief_onnx.footprint import COPIES, RUN_BYTES, bytes_alive, samples_at_once

CHANNELS, SIDE, FLOAT = 6, 32, 4


def u_net() -> onnx.ModelProto:
    """One skip connection: its tensor is alive from its convolution to the Add. Height and width are open."""
    net = Net()
    x, stored = net.input("N", 1, "H", "W"), net.constant(np.full((500, 500), 0.5, np.float32))
    skip = net.op("Relu", net.op("Conv", x, net.weight(CHANNELS, 1, 1, 1)))
    inner = net.op("MaxPool", skip, kernel_shape=[2, 2], strides=[2, 2])
    y = net.op("Add", skip, net.op("ConvTranspose", inner, net.weight(CHANNELS, CHANNELS, 2, 2), strides=[2, 2]))
    scale = net.op("ReduceMean", stored, axes=[0, 1], keepdims=0)  # depends on no input: large, but made once
    return net.model(net.op("Mul", net.op("Conv", y, net.weight(1, CHANNELS, 1, 1)), scale))


def batch(samples: int) -> Batch:
    return Batch({"x1": np.zeros((samples, 1, SIDE, SIDE), np.float32)}, samples, 1.0, None, "")


@pytest.mark.parametrize("samples", [1, 3])
def test_what_is_alive_at_the_same_time(samples: int) -> None:
    """At the Add three tensors of full size: both terms and the sum. Model outputs once more for each copy."""
    pixels = samples * SIDE * SIDE * FLOAT
    assert bytes_alive(u_net(), batch(samples)) == 3 * CHANNELS * pixels + COPIES * pixels


def test_few_samples_at_a_time_where_activations_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    model, each = u_net(), bytes_alive(u_net(), batch(1))
    assert samples_at_once(model, batch(1), 8) == 8
    assert samples_at_once(model, batch(1), 10**6) == RUN_BYTES // each
    assert samples_at_once(model, batch(4), 10**6) == RUN_BYTES // each
    monkeypatch.setattr(footprint, "RUN_BYTES", each - 1)
    assert samples_at_once(model, batch(1), 8) == 1


def test_results_do_not_hang_on_how_many_samples_run_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = u_net(), u_net()
    other.graph.initializer[-1].CopyFrom(
        onnx.numpy_helper.from_array(np.ones((1, CHANNELS, 1, 1), np.float32), model.graph.initializer[-1].name)
    )
    data = np.random.default_rng(0).standard_normal((20, 1, SIDE, SIDE)).astype(np.float32)
    dataset = open_dataset([{"x1": data}], files.input_specs(model))
    ran: list[int] = []
    whole = compare.Session.run

    def run(self: compare.Session, feed: Any, *rest: Any) -> list[Any]:
        ran.append(len(feed["x1"]))
        return whole(self, feed, *rest)

    monkeypatch.setattr(compare.Session, "run", run)
    first = compare_models(model, other, dataset, threads=1)
    assert ran == [20, 20]
    monkeypatch.setattr(footprint, "RUN_BYTES", 6 * bytes_alive(model, batch(1)))
    second = compare_models(model, other, dataset, threads=1)
    assert ran[2:] == [6, 6, 6, 6, 6, 6, 2, 2]
    (a,), (b,) = first.outputs.values(), second.outputs.values()
    assert a.cosine < 0.99
    assert (b.cosine, b.sqnr_db, b.max_abs, b.peak) == pytest.approx((a.cosine, a.sqnr_db, a.max_abs, a.peak), rel=1e-5)
    assert second.samples == first.samples == 20
