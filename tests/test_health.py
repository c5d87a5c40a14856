"""What is said of a model that lost a layer: only of layers that counted before."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from builders import Net

import relief_onnx
from relief_onnx.health import check_health


def layers(net: Net, shown: bool) -> onnx.ModelProto:
    """Three dense layers; the third reads the first, the second is read by an output or by nobody."""
    h = net.op("Relu", net.op("Gemm", net.input("N", 12), net.weight(12, 16), net.bias(16)))
    aside = net.op("Gemm", h, net.weight(16, 24))
    return net.model(net.op("Gemm", h, net.weight(16, 4)), *([aside] if shown else []))


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_a_layer_that_nobody_reads_is_no_loss(granularity: str) -> None:
    feed = {"x1": np.random.default_rng(0).standard_normal((128, 12)).astype(np.float32)}
    report = relief_onnx.prune(layers(Net(), shown=False), [feed], alpha=1.0, granularity=granularity, threads=1).report
    assert [row["weights_kept"] for row in report["layers"]] == [192, 0, 64]
    assert report["health"]["collapsed_layers"] == []
    assert not any("function" in warning for warning in report["warnings"])


@pytest.mark.parametrize("shown", [False, True])
def test_a_layer_that_counted_is(shown: bool) -> None:
    before = layers(Net(), shown)
    after = onnx.ModelProto()
    after.CopyFrom(before)
    wide = next(item for item in after.graph.initializer if list(item.dims) == [16, 24])
    wide.raw_data = bytes(len(wide.raw_data))
    health = check_health(before, after, ())
    name = before.graph.node[2].name
    assert health.collapsed == ((name,) if shown else ())
    assert any(f"hardly anything is left of layer {name};" in item for item in health.warnings("keep more")) == shown
