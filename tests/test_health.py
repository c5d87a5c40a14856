"""What is said of a model that lost a layer, only of layers that counted before; and of outputs that hardly vary any more."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from builders import Net

import relief_onnx
from relief_onnx.data import open_dataset
from relief_onnx.health import check_health
from relief_onnx.model import input_specs
from relief_onnx.session import Session


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


def regression(batch: int | str, out: int = 1) -> onnx.ModelProto:
    """Numbers around 100 that vary by a few."""
    net = Net(seed=5)
    x = net.input(batch, 16)
    h = net.op("Relu", net.op("Gemm", x, net.weight(16, 32), net.bias(32)))
    return net.model(net.op("Gemm", h, net.weight(32, out), net.constant(np.full(out, 100, np.float32))))


@pytest.mark.parametrize("batch", ["N", 1])
def test_what_an_output_loses_of_what_it_varies(batch: int | str) -> None:
    """By definition, in batches of any size; the cosine of a constant with it is near 1."""
    model = regression(batch, 3)
    name = model.graph.input[0].name
    feeds = [{name: np.random.default_rng(seed).standard_normal((1, 16)).astype(np.float32)} for seed in range(50)]
    constant = onnx.ModelProto()
    constant.CopyFrom(model)
    for item in constant.graph.initializer:
        if list(item.dims) == [32, 3]:
            item.CopyFrom(onnx.numpy_helper.from_array(np.zeros((32, 3), np.float32), item.name))
    (found,) = relief_onnx.compare_models(model, constant, open_dataset(feeds, input_specs(model)), threads=1).outputs.values()
    y = np.concatenate([Session(model).run(feed)[0] for feed in feeds]).astype(np.float64)
    assert found.cosine > 0.99
    assert found.lost == pytest.approx(np.square(y - 100).sum() / np.square(y - y.mean(0)).sum(), rel=1e-5)


def test_a_large_mean_hides_nothing() -> None:
    model = regression("N")
    feeds = [{model.graph.input[0].name: np.random.default_rng(seed).standard_normal((4, 16)).astype(np.float32)} for seed in range(40)]
    told = {}
    for keep in ("5%", "90%"):
        result = relief_onnx.prune(model, feeds, granularity="weight", keep=keep, criterion="magnitude", mean_shift="off", threads=1)
        (agreement,) = result.report["quality"]["agreement"].values()
        assert agreement["cosine"] > 0.95
        told[keep] = any("of its variance over the samples" in text for text in result.report["warnings"])
    assert told == {"5%": True, "90%": False}
