"""Weights that ConstantOfShape nodes make: scored, pruned, and nodes again where nothing was lost; onnx's light models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders import Net
from onnx import helper

import relief_onnx
from relief_onnx.model import input_specs
from relief_onnx.prepared import prepare
from relief_onnx.session import Session

LIGHT = sorted((Path(onnx.__file__).parent / "backend" / "test" / "data" / "light").glob("light_*.onnx"))
SMALL = ("light_squeezenet",)


def filled(net: Net, value: float, *shape: int) -> str:
    size = net.constant(np.array(shape, np.int64), "size")
    return str(net.op("ConstantOfShape", size, value=helper.make_tensor("v", onnx.TensorProto.FLOAT, [1], [value])))


def model(ir_version: int = 8) -> onnx.ModelProto:
    """Two dense layers whose weights and bias are filled, and one that is stored."""
    net = Net(ir_version=ir_version, opset=13 if ir_version > 3 else 9)
    x = net.input("N", 6)
    x = net.op("Relu", net.op("Gemm", x, filled(net, 0.25, 6, 8), filled(net, 0.5, 8)))
    x = net.op("Gemm", x, net.weight(8, 5), net.bias(5))
    return net.model(net.op("Gemm", x, filled(net, -0.5, 5, 3), filled(net, 0.0, 3)))


def samples() -> list[dict[str, Any]]:
    return [{"x1": np.random.default_rng(1).standard_normal((20, 6)).astype(np.float32)}]


def makers(found: onnx.ModelProto) -> int:
    return sum(node.op_type == "ConstantOfShape" for node in found.graph.node)


@pytest.mark.parametrize("ir_version", [3, 8])
def test_what_is_whole_is_filled_again(ir_version: int) -> None:
    """Only the stored weight is pruned: the fills come back as nodes, and nothing else changes."""
    first, (feed,) = model(ir_version), samples()
    ready = prepare(first)
    assert [layer.view.shape for layer in ready.plan.layers] == [(8, 6), (5, 8), (3, 5)]
    assert all(layer.bias is not None for layer in ready.plan.layers)
    stored = next(layer.weight for layer in ready.plan.layers if layer.weight.startswith("w"))
    result = relief_onnx.prune(first, [feed], keep="90%", criterion="magnitude", only=f"^{stored}$", mean_shift="off")
    assert makers(result.model) == 4
    onnx.checker.check_model(result.model, full_check=True)
    assert len(result.model.SerializeToString()) < 1.5 * len(first.SerializeToString())


@pytest.mark.parametrize("ir_version", [3, 8])
def test_what_lost_something_is_stored(ir_version: int) -> None:
    first, (feed,) = model(ir_version), samples()
    result = relief_onnx.prune(first, [feed], keep="60%", storage="dense", criterion="relief")
    rows = result.report["layers"]
    assert sum(row["weights_kept"] for row in rows) <= round(0.6 * (48 + 40 + 15))
    assert result.report["input"]["params"] == 48 + 8 + 40 + 5 + 15 + 3
    assert makers(result.model) < 4
    graph = prepare(result.model).graph
    for row in rows:
        assert row["weights_kept"] == np.count_nonzero(graph.array(row["weight"]))
    onnx.checker.check_model(result.model, full_check=True)


def test_a_narrower_fill_has_its_own_size() -> None:
    """Channels go: what is still one number everywhere is a node with a shorter size."""
    net = Net(opset=13)
    x = net.op("Relu", net.op("Gemm", net.input("N", 6), net.weight(6, 16), net.bias(16)))
    first = net.model(net.op("Gemm", x, filled(net, 0.5, 16, 3), filled(net, 0.1, 3)))
    feed = samples()[0]
    result = relief_onnx.prune(first, [feed], granularity="channel", keep="50%", round_to=1, storage="dense", mean_shift="off")
    assert result.report["units_removed"] > 0
    assert makers(result.model) == 2
    names = [item.name for item in first.graph.output]
    before, after = (Session(item, 1).run(feed, names, "x")[0] for item in (result.masked, result.model))
    np.testing.assert_allclose(before, after, rtol=1e-5, atol=1e-6)


def test_fills_of_no_layer_are_left_alone() -> None:
    net = Net(opset=13)
    y = net.op("Gemm", net.input("N", 6), net.weight(6, 4), net.bias(4))
    first = net.model(net.op("Add", y, filled(net, 0.5, 4)))
    assert makers(prepare(first).graph.model) == 1


@pytest.mark.skipif(not LIGHT, reason="this onnx package has no light models")
@pytest.mark.parametrize("path", LIGHT, ids=lambda path: path.stem)
def test_light_models_are_scored(path: Path) -> None:
    """At least 95 % of all parameters are weights that are ranked, and nothing is left alone."""
    ready = prepare(path)
    assert not ready.plan.skipped
    floats = sum(int(np.prod(item.dims)) for item in ready.graph.initializers.values() if item.data_type == onnx.TensorProto.FLOAT)
    assert sum(int(np.prod(layers[0].view.shape)) for layers in ready.plan.by_weight().values()) >= 0.95 * floats


@pytest.mark.skipif(not LIGHT, reason="this onnx package has no light models")
@pytest.mark.parametrize("path", [path for path in LIGHT if path.stem in SMALL], ids=lambda path: path.stem)
def test_light_models_are_pruned(path: Path) -> None:
    (spec,) = input_specs(onnx.load(path))
    feed = {spec.name: np.random.default_rng(0).random([int(size or 1) for size in spec.shape]).astype(np.float32)}
    result = relief_onnx.prune(path, [feed], keep="60%", criterion="relief-fast")
    totals = result.report["totals"]
    assert totals["weights_kept"] <= 0.6 * totals["weights"] + 1
    assert result.report["verification"]["masked_vs_output_max_rel"] < 1e-4
