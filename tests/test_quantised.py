"""Models that come quantised: laid open, pruned and written back as integers."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders import Net
from helpers import CALIB, SAMPLES, digits, real_model, run
from laws import random_masks
from onnx import TensorProto, helper, numpy_helper

from relief_onnx import prune, quantize, score
from relief_onnx.datatypes import Kept
from relief_onnx.graph import Graph
from relief_onnx.grids import Grid, spread
from relief_onnx.layers import find
from relief_onnx.lowering import lower
from relief_onnx.masks import applied, initializer_masks, insert
from relief_onnx.measure import measure
from relief_onnx.pack import packed_names, unpack
from relief_onnx.prepared import Prepared, prepare
from relief_onnx.session import Session
from relief_onnx.surgery import apply_weights, operate

FORMS = ("QDQ", "QOperator", "dynamic")
NAMES = ("lenet5", "resnet8", "products")
INTEGERS = {TensorProto.INT8, TensorProto.UINT8, TensorProto.INT32}


class _Digits:
    """onnxruntime's CalibrationDataReader over the sample digits."""

    def __init__(self) -> None:
        self._left = [{"image": digits(32)}]

    def get_next(self) -> Any:
        return self._left.pop() if self._left else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """onnxruntime's quantiser prints, logs and warns."""
    root = logging.getLogger()
    before, root.handlers = root.handlers, [logging.NullHandler()]
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    root.handlers = before


@functools.cache
def floats(name: str) -> onnx.ModelProto:
    return products() if name == "products" else onnx.load(SAMPLES / f"{name}.onnx")


def products() -> onnx.ModelProto:
    """Matrix products with biases behind them, a table of positions, Sigmoid, LeakyRelu, Concat and Softmax."""
    net = Net(3)
    net.inputs.append(("image", ("n", 1, 28, 28), TensorProto.FLOAT))
    first = net.op("Sigmoid", net.op("Add", net.op("MatMul", net.op("Flatten", "image"), net.weight(784, 24)), net.bias(24)))
    second = net.op("LeakyRelu", net.op("Add", net.op("MatMul", first, net.weight(24, 16)), net.bias(16)), alpha=0.1)
    return net.model(net.op("Softmax", net.op("MatMul", net.op("Concat", first, second, axis=1), net.weight(40, 10)), axis=-1))


@functools.cache
def quantised(name: str, form: str, per_channel: bool = True, kind: str = "QInt8") -> onnx.ModelProto:
    """A sample model as onnxruntime's own quantiser writes it."""
    from onnxruntime import quantization as ort

    with tempfile.TemporaryDirectory() as folder, quiet():
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(floats(name), source)
        integer = getattr(ort.QuantType, kind)
        if form == "dynamic":
            ort.quantize_dynamic(source, target, per_channel=per_channel, weight_type=integer)
        else:
            contrib = form == "QDQ of com.microsoft"
            ort.quantize_static(
                source, target, _Digits(), quant_format=getattr(ort.QuantFormat, form.split()[0]), per_channel=per_channel,
                activation_type=ort.QuantType.QUInt16 if contrib else integer, weight_type=integer,
                extra_options={"UseQDQContribOps": contrib},
            )  # fmt: skip
        return onnx.load(target)


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def values(model: onnx.ModelProto) -> dict[str, Any]:
    return {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}


def outputs(model: onnx.ModelProto, feed: Any = None, optimize: bool = True) -> Any:
    name = next(item.name for item in model.graph.input if item.name not in values(model))
    return Session(model, 1, optimize=optimize).run({name: digits(16) if feed is None else feed})[0]


def masked_and_cut(ready: Prepared, seed: int) -> tuple[onnx.ModelProto, onnx.ModelProto, Kept]:
    """Both in the form of the file, under random masks."""
    flags = initializer_masks(ready.plan, random_masks(ready.plan, np.random.default_rng(seed)))
    graph, ready = ready.settled(ready.graph, flags)
    operation = operate(apply_weights(graph.model, applied(graph, flags)))
    return ready.restored(insert(graph, flags)), ready.restored(operation.model, operation.kept), operation.kept


# -- what onnxruntime's quantiser writes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_what_was_not_changed_comes_back_bit_for_bit(name: str, form: str, per_channel: bool) -> None:
    model = quantised(name, form, per_channel)
    ready = prepare(model)
    assert len(ready.plan.layers) == len(find(Graph(floats(name))).layers)
    assert not any(item.data_type in INTEGERS for item in ready.graph.initializers.values() if item.dims)
    back = ready.restored(ready.graph.model)
    assert operators(back) == operators(model)
    assert {item.name: item.SerializeToString() for item in back.graph.initializer} == {
        item.name: item.SerializeToString() for item in model.graph.initializer
    }
    assert np.array_equal(outputs(back), outputs(model))
    assert back.metadata_props == model.metadata_props
    assert back.opset_import == model.opset_import


@pytest.mark.parametrize("kind", ["QInt8", "QUInt8"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_the_masked_model_computes_what_the_cut_one_does(name: str, form: str, kind: str) -> None:
    ready = prepare(quantised(name, form, kind == "QInt8", kind))
    before = operators(ready.original)
    for seed in range(2):
        masked, cut, kept = masked_and_cut(ready, seed)
        onnx.checker.check_model(cut, full_check=True)
        assert np.abs(outputs(masked) - outputs(cut)).max() <= 1e-5 * np.abs(outputs(masked)).max()
        # A bias that is new is an integer with its DequantizeLinear, or an Add behind a product.
        assert set(operators(cut)) <= set(before)
        assert set(operators(cut) - before) <= {"DequantizeLinear", "Add"}
        # As many scales as there are channels left.
        sizes = {item.name: item.dims for item in cut.graph.initializer}
        for weight, (rows, _) in kept.items():
            assert len(rows) in sizes[weight]
        assert len(cut.SerializeToString()) < len(ready.original.SerializeToString())


@pytest.mark.parametrize(("name", "form"), [*(("lenet5", form) for form in FORMS), ("resnet8", "QOperator")])
def test_pruned_like_the_float_model_and_zero_is_the_zero_point(name: str, form: str) -> None:
    choices: dict[str, Any] = {"granularity": "weight", "keep": "50%", "samples": 48, "threads": 1}
    reference = prune(floats(name), CALIB, **choices).report
    model = quantised(name, form)
    result = prune(model, CALIB, **choices)
    cosine, wanted = (next(iter(report["quality"]["agreement"].values()))["cosine"] for report in (result.report, reference))
    assert cosine > wanted - 0.01
    assert result.report["verification"]["masked_vs_output_max_rel"] < 1e-6
    assert result.report["output"]["bytes"] < 0.9 * result.report["input"]["bytes"]
    assert {row["status"] for row in result.report["layers"]} <= {"pruned", "kept"}
    assert result.report["totals"]["kept_percent"] == pytest.approx(50, abs=0.01)
    dense, ready = unpack(result.model), prepare(model)
    assert packed_names(result.model)
    grids = ready.lowered.restores[0].grids if ready.lowered is not None else {}  # type: ignore[attr-defined]
    for weight, keep in result.masks.keep.items():
        stored = values(dense)[weight]
        if stored.shape == values(model)[weight].shape:
            layer = ready.plan.by_weight()[weight][0]
            gone = ~layer.view.invert(keep)
            assert np.array_equal(stored[gone], np.broadcast_to(grids[weight].zero, stored.shape)[gone])
            assert np.array_equal(stored[~gone], values(model)[weight][~gone])


@pytest.mark.parametrize("form", FORMS)
def test_repaired_values_are_rounded_to_scales_that_hold_them(form: str) -> None:
    model = quantised("lenet5", form)
    result = prune(
        model, CALIB, granularity="weight", keep="30%", criterion="flow", repair="least-squares", samples=64, threads=1, storage="dense"
    )
    before, after = values(model), values(result.model)
    changed = [name for name in before if name.endswith("weight_quantized") and not np.array_equal(before[name], after.get(name))]
    assert changed
    assert all(after[name].dtype == before[name].dtype for name in changed)
    assert next(iter(result.report["quality"]["agreement"].values()))["cosine"] > 0.99
    assert set(operators(result.model)) <= set(operators(model))


@pytest.mark.parametrize("granularity", ["connection", "channel", "channel+connection", "channel+weight"])
@pytest.mark.parametrize("form", [*FORMS, "QDQ of com.microsoft"])
def test_every_granularity(form: str, granularity: str) -> None:
    model = quantised("resnet8", form)
    result = prune(model, CALIB, granularity=granularity, keep="55%", samples=16, threads=1, storage="dense")
    assert set(operators(result.model)) <= set(operators(model))
    # Sums in another order rarely fall on another step of 8 bits, but do on neighbours among those of 16.
    assert result.report["verification"]["masked_vs_output_max_rel"] < (1e-5 if form in FORMS else 8 / 65535)
    if granularity == "channel":
        assert result.report["output"]["macs"] < 0.7 * result.report["input"]["macs"]
        assert result.report["output"]["bytes"] < 0.8 * result.report["input"]["bytes"]


@pytest.mark.parametrize("criterion", ["relief", "relief-fast", "magnitude", "wanda"])
def test_every_local_criterion(criterion: str) -> None:
    model = quantised("lenet5", "QOperator")
    result = prune(model, CALIB, criterion=criterion, samples=32, threads=1, storage="dense")
    assert 0 < result.report["totals"]["kept_percent"] < 100
    assert set(operators(result.model)) <= set(operators(model))


@pytest.mark.parametrize("form", ["QOperator", "dynamic"])
def test_training_brings_integers_back(form: str) -> None:
    pytest.importorskip("torch")
    model = quantised("lenet5", form)
    result = prune(
        model, CALIB, granularity="weight", keep="40%", repair="distill", epochs=1, batch=16, samples=16, threads=1, storage="dense"
    )
    before, after = values(model), values(result.model)
    assert all(after[name].dtype == array.dtype for name, array in before.items() if name in after)
    assert any(name.endswith("weight_quantized") and not np.array_equal(array, after.get(name)) for name, array in before.items())
    assert set(operators(result.model)) <= set(operators(model))


def test_inspect_compare_and_masks_name_the_stored_integers(tmp_path: Path) -> None:
    path, target = tmp_path / "int8.onnx", tmp_path / "out.onnx"
    onnx.save(quantised("lenet5", "QOperator"), path)
    shown = run("inspect", path)
    assert shown.exit_code == 0
    assert "features.0.weight_quantized" in shown.output
    done = run("prune", path, "--data", CALIB, "--samples", 32, "-o", target, "--save-masks", tmp_path / "masks.npz")
    assert done.exit_code == 0
    with np.load(tmp_path / "masks.npz") as masks:
        assert "features.0.weight_quantized/keep" in masks.files
    compared = run("compare", path, target, "--data", CALIB, "--samples", 32)
    assert compared.exit_code == 0
    assert "MACs" in compared.output


# -- weights that nodes make floats -----------------------------------------------------------------------------------------


def stored_as(form: str, opset: int = 21, seed: int = 0) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Two layers whose weights are integers that nodes make floats, and the same with float initializers."""
    rng = np.random.default_rng(seed)
    pair = []
    made = [_integers(form, (20, 16), rng), _integers(form, (16, 12), rng)]
    for whole in (True, False):
        net = Net(seed, opset=opset, ir_version=10)
        x = net.input("n", 20)
        for integers, scale, zero, floating in made:
            net.initializers |= {}
            if whole:
                name = net.constant(integers, "q")
                weight = _decoded(net, form, name, scale, zero)
            else:
                weight = net.constant(floating, "q")
            x = net.op("Relu", net.op("Add", net.op("MatMul", x, weight), net.constant(np.full(floating.shape[1], 0.1, np.float32), "b")))
        pair.append(net.model(x))
    return pair[0], pair[1]


def _integers(form: str, shape: tuple[int, int], rng: np.random.Generator) -> tuple[Any, Any, Any, Any]:
    signed = not form.endswith("uint8")
    integers = rng.integers(-127 if signed else 0, 127 if signed else 255, shape).astype(np.int8 if signed else np.uint8)
    sizes = {"tensor": (), "channel": (shape[1],), "input": (shape[0], 1), "block": (shape[0] // 4, shape[1])}
    scale = rng.uniform(0.001, 0.01, sizes[form.split("-")[1]]).astype(np.float32)
    zero = np.zeros(scale.shape, integers.dtype) if signed else rng.integers(100, 150, scale.shape).astype(np.uint8)
    wide = np.repeat(scale, 4, 0) if "block" in form else scale
    shift = np.repeat(zero, 4, 0) if "block" in form else zero
    return integers, scale, zero, (integers.astype(np.float32) - shift.astype(np.float32)) * wide


def _decoded(net: Net, form: str, name: str, scale: Any, zero: Any) -> str:
    if form.startswith("dequantize"):
        values: dict[str, Any] = {"axis": 0, "block_size": 4} if "block" in form else {"axis": 1} if scale.ndim else {}
        return str(net.op("DequantizeLinear", name, net.constant(scale, "s"), net.constant(zero, "z"), **values))
    cast = net.op("Cast", name, to=TensorProto.FLOAT)
    if zero.any():
        cast = net.op("Sub", cast, net.constant(zero.astype(np.float32), "z"))
    return str(net.op("Mul", cast, net.constant(scale, "s")))


CHAINS = (
    "cast-tensor-int8", "cast-channel-int8", "cast-input-int8", "cast-channel-uint8", "dequantize-tensor-int8", "dequantize-channel-int8",
    "dequantize-channel-uint8", "dequantize-block-int8",
)  # fmt: skip


@pytest.mark.parametrize("form", CHAINS)
def test_scores_are_those_of_the_numbers_that_integers_stand_for(form: str) -> None:
    integers, reference = stored_as(form)
    feeds = [{integers.graph.input[0].name: np.random.default_rng(1).standard_normal((40, 20)).astype(np.float32)}]
    found, wanted = (list(score(model, feeds, samples=40).values()) for model in (integers, reference))
    assert len(found) == len(wanted) == 2
    assert [item.weight for item in found] == [item.name for item in integers.graph.initializer if item.name.startswith("q")]
    for one, other in zip(found, wanted, strict=True):
        assert np.allclose(one.score, other.score, rtol=1e-5)
        assert one.relevance is not None
        assert other.relevance is not None
        assert np.allclose(one.relevance, other.relevance, rtol=1e-4)


@pytest.mark.parametrize("form", CHAINS)
def test_stored_weights_are_cut_with_their_scales(form: str) -> None:
    model, _ = stored_as(form)
    ready = prepare(model)
    assert not [node for node in ready.graph.nodes if node.op_type in ("Cast", "DequantizeLinear")]
    back = ready.restored(ready.graph.model)
    assert operators(back) == operators(model)
    assert all(np.array_equal(array, values(model)[name]) for name, array in values(back).items())
    x = np.random.default_rng(2).standard_normal((8, 20)).astype(np.float32)
    for seed in range(3):
        masked, cut, _ = masked_and_cut(ready, seed)
        onnx.checker.check_model(cut, full_check=True)
        # Optimised, onnxruntime rounds activations between a DequantizeLinear and a MatMul.
        assert np.allclose(outputs(masked, x, optimize=False), outputs(cut, x, optimize=False), atol=1e-5)
        assert operators(cut) == operators(model)
        stored = [item for item in cut.graph.initializer if item.name.startswith("q")]
        assert {item.data_type for item in stored} == {model.graph.initializer[0].data_type}


def test_a_small_file_that_grows_says_why() -> None:
    """Biases that are new take more bytes than a few zeros among bytes save."""
    net = Net()
    x = net.input("N", 32)
    h = net.op("Relu", net.op("MatMul", x, net.weight(32, 48)))
    model = net.model(net.op("MatMul", h, net.weight(48, 10)))
    feed = {x: np.random.default_rng(0).standard_normal((256, 32)).astype(np.float32)}
    small = quantize(model, [feed], threads=1).model
    grown, off = (prune(small, [feed], keep="95%", mean_shift=shift, threads=1).report for shift in ("on", "off"))
    assert grown["output"]["bytes"] > grown["input"]["bytes"] >= off["output"]["bytes"]
    said = f"the file grew from {grown['input']['bytes']:,} to {grown['output']['bytes']:,} bytes: a layer without a bias has one now"
    assert any(warning.startswith(said) for warning in grown["warnings"])
    assert not any("grew" in warning for warning in off["warnings"])
    packed = prune(model, [feed], keep="30%", mean_shift="off", threads=1).model
    dense = prune(packed, [feed], keep="20%", mean_shift="off", storage="dense", threads=1).report
    assert any("grew" in warning and "(--storage dense)" in warning for warning in dense["warnings"])


def test_our_own_int8_weights_are_pruned_and_packed() -> None:
    model = quantize(floats("lenet5"), CALIB, activations="none", samples=32, threads=1).model
    result = prune(model, CALIB, granularity="weight", keep="20%", samples=48, threads=1)
    assert result.report["totals"]["kept_percent"] == pytest.approx(20, abs=0.01)
    assert result.report["output"]["bytes"] < 0.6 * result.report["input"]["bytes"]
    names = packed_names(result.model)
    assert names
    assert all(values(unpack(result.model))[name].dtype == np.int8 for name in names)
    assert {row["storage"] for row in result.report["layers"]} - {"dense"}


@pytest.mark.parametrize("form", FORMS)
def test_weights_whose_zero_is_another_byte_are_packed(form: str) -> None:
    model = quantised("lenet5", form, False, "QUInt8")
    choices: dict[str, Any] = {"granularity": "weight", "keep": "20%", "samples": 32, "threads": 1}
    packed, dense = (prune(model, CALIB, storage=storage, **choices).model for storage in ("auto", "dense"))
    assert packed_names(packed)
    assert len(packed.SerializeToString()) < 0.7 * len(dense.SerializeToString())
    assert values(unpack(packed)).keys() == values(dense).keys()
    assert all(np.array_equal(array, values(dense)[name]) for name, array in values(unpack(packed)).items())
    assert np.array_equal(outputs(packed), outputs(dense))


def test_what_others_read_too_stays_and_says_why() -> None:
    model, _ = stored_as("dequantize-channel-int8")
    name = model.graph.initializer[0].name
    model.graph.node.append(helper.make_node("Shape", [name], ["size"]))
    model.graph.output.append(helper.make_tensor_value_info("size", TensorProto.INT64, [2]))
    ready = prepare(model)
    assert [row.weight for row in ready.plan.skipped] == [name]
    assert len(ready.plan.layers) == 1


def test_models_without_integers_are_left_alone() -> None:
    model = floats("lenet5")
    assert lower(model).restores == ()
    assert lower(model).model is model


def test_equal_integers_that_mean_different_numbers_get_a_copy_each() -> None:
    net = Net(opset=13)
    x = net.input("n", 8)
    shared = net.constant(np.random.default_rng(0).integers(-127, 127, (8, 8)).astype(np.int8), "q")
    for scale in (0.01, 0.02):
        x = net.op("MatMul", x, net.op("DequantizeLinear", shared, net.constant(np.float32(scale), "s")))
    model = net.model(x)
    ready = prepare(model)
    assert len(ready.plan.by_weight()) == 2
    back = ready.restored(ready.graph.model)
    assert len(back.graph.initializer) == len(model.graph.initializer)
    feed = np.ones((2, 8), np.float32)
    assert np.array_equal(outputs(back, feed), outputs(model, feed))
    assert np.allclose(outputs(ready.graph.model, feed), outputs(model, feed))


def test_old_files_list_their_initializers_as_inputs() -> None:
    net = Net(opset=10, ir_version=3)
    x = net.input("n", 8)
    for size in (12, 6):
        integers = net.constant(net.rng.integers(-127, 127, (12 if size == 6 else 8, size)).astype(np.int8), "q")
        weight = net.op("DequantizeLinear", integers, net.constant(np.float32(0.01), "s"))
        x = net.op("Relu", net.op("Gemm", x, weight, net.bias(size)))
    ready = prepare(net.model(x))
    for seed in range(3):
        masked, cut, _ = masked_and_cut(ready, seed)
        assert {item.name for item in cut.graph.initializer} == {item.name for item in cut.graph.input[1:]}
        onnx.checker.check_model(cut, full_check=True)
        feed = np.random.default_rng(seed).standard_normal((4, 8)).astype(np.float32)
        assert np.allclose(outputs(masked, feed), outputs(cut, feed), atol=1e-5)


@pytest.mark.parametrize("kind", ["QInt8", "QUInt8"])
def test_a_table_of_integers_is_floats_that_gather_reads(kind: str) -> None:
    from onnxruntime import quantization as ort

    net = Net(opset=17)
    net.inputs.append(("ids", ("n", 6), TensorProto.INT64))
    x = net.op("Gather", net.weight(30, 16), "ids")
    x = net.op("Add", x, net.op("MatMul", net.op("Tanh", net.op("MatMul", x, net.weight(16, 20))), net.weight(20, 16)))
    with tempfile.TemporaryDirectory() as folder, quiet():
        onnx.save(net.model(x), Path(folder) / "a.onnx")
        ort.quantize_dynamic(Path(folder) / "a.onnx", Path(folder) / "b.onnx", weight_type=getattr(ort.QuantType, kind))
        model = onnx.load(Path(folder) / "b.onnx")
    ready = prepare(model)
    assert ready.graph.is_float(next(node.input[0] for node in ready.graph.nodes if node.op_type == "Gather"))
    back = ready.restored(ready.graph.model)
    assert operators(back) == operators(model)
    assert all(np.array_equal(array, values(model)[name]) for name, array in values(back).items())
    feed = np.arange(12).reshape(2, 6)
    masked, cut, _ = masked_and_cut(ready, 0)
    assert np.allclose(outputs(masked, feed), outputs(cut, feed), atol=1e-5)
    assert np.allclose(outputs(ready.graph.model, feed), outputs(model, feed), atol=1e-5)


# -- grids ------------------------------------------------------------------------------------------------------------------


def test_values_that_no_longer_fit_get_the_scale_that_loses_less() -> None:
    integers = np.array([[127, -50], [100, 90]], np.int8)
    grid = Grid("w", TensorProto.INT8, integers, np.array([[0.1, 0.01]], np.float32), np.zeros((1, 1), np.int64))
    values = grid.floats()
    assert grid.fitted(values) is grid
    assert np.array_equal(grid.stored(values), integers)
    values[0, 0] *= 2  # far outside: clipping loses 12.7 of 25.4
    fitted = grid.fitted(values)
    assert fitted.scale[0, 0] == pytest.approx(0.2)
    assert fitted.scale[0, 1] == grid.scale[0, 1]
    assert np.abs(fitted.nearest(values) - values).max() <= fitted.scale.max() / 2
    assert np.array_equal(fitted.stored(fitted.nearest(values))[:, 1], integers[:, 1])
    slightly = grid.floats()
    slightly[0, 0] *= 1.0005
    slightly = np.concatenate([slightly, np.tile(grid.floats()[1:], (500, 1))])
    many = Grid("w", TensorProto.INT8, np.concatenate([integers, np.tile(integers[1:], (500, 1))]), grid.scale, grid.zero)
    assert many.fitted(slightly) is many  # a coarser scale would move 500 others


def test_a_grid_follows_cuts_by_place_or_by_what_its_numbers_are() -> None:
    rng = np.random.default_rng(0)
    integers = rng.integers(-127, 127, (6, 9)).astype(np.int8)
    scale = rng.uniform(0.01, 0.1, (1, 9)).astype(np.float32)
    grid = Grid("w", TensorProto.INT8, integers, scale, np.zeros((1, 1), np.int64))
    left = np.array([0, 2, 3, 7])
    for kept in ({1: left}, {}):
        found = grid.cut(grid.floats()[:4, left], kept)
        assert found is not None
        assert np.array_equal(found.scale, scale[:, left])
        assert np.array_equal(found.stored(grid.floats()[:4, left]), integers[:4, left])
    assert grid.cut(rng.standard_normal((6, 5)).astype(np.float32), {}) is None


def test_a_cut_grid_has_the_limits_of_the_whole() -> None:
    """The lowest integer may have gone with its channel, and be the nearest to what is left all the same."""
    integers = np.array([[-128, 3], [5, 7]], np.int8)
    grid = Grid("w", TensorProto.INT8, integers, np.full((1, 1), 0.5, np.float32), np.zeros((1, 1), np.int64))
    values = np.array([[-64.0, 1.0], [-64.0, 3.5]], np.float32)
    assert grid.stored(values).tolist() == [[-128, 2], [-128, 7]]
    cut = grid.cut(values[1:], {0: np.array([1], np.intp)})
    assert cut is not None
    assert cut.stored(values[1:]).tolist() == [[-128, 7]]
    assert replace(grid, integers=integers[1:]).stored(values[1:]).tolist() == [[-127, 7]]  # a file that keeps to symmetry


def test_scales_are_spread_over_a_tensor() -> None:
    assert spread(np.float32(3), (2, 3), 1).shape == (1, 1)  # type: ignore[union-attr, arg-type]
    assert spread(np.ones(3), (2, 3), 1).shape == (1, 3)  # type: ignore[union-attr]
    assert spread(np.ones(3), (2, 3), 0) is None
    assert spread(np.ones((2, 2)), (4, 3), None) is None
    assert spread(np.arange(4.0).reshape(2, 2), (4, 2), 0, 2)[:, 0].tolist() == [0, 0, 2, 2]  # type: ignore[index]


# -- a real model -----------------------------------------------------------------------------------------------------------


def test_every_matrix_of_a_real_int8_encoder_is_scored() -> None:
    model = onnx.load(real_model("minilm_l6_int8"))
    ready = prepare(model)
    assert sum(int(np.prod(layer.view.shape)) for layer in ready.plan.layers) >= 10_616_832
    assert not any(item.data_type == TensorProto.INT8 for item in ready.graph.initializers.values())
    assert measure(ready.counted).params > 22_500_000
    back = ready.restored(ready.graph.model)
    assert operators(back) == operators(model)
    assert all(np.array_equal(array, values(model)[name]) for name, array in values(back).items())


# -- biases that the first dynamic quantisers rounded -----------------------------------------------------------------------


def with_rounded_biases(model: onnx.ModelProto) -> onnx.ModelProto:
    """Integer biases in the sums of integers, made of the floats when the model runs, where today's files add the floats behind them."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    made = {node.output[0]: node for node in model.graph.node}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes.append(node)
        wide = made.get(node.input[1]) if node.op_type == "Add" else None
        if wide is None or wide.op_type != "Reshape":
            continue
        scaled = made[node.input[0]]
        cast, scales, output = made[scaled.input[0]], made[scaled.input[1]], node.output[0]
        gone = {item.output[0] for item in (node, scaled, cast, wide)}
        nodes = [item for item in nodes if item.output[0] not in gone]
        steps = [f"{output}/{step}" for step in ("scales", "steps", "floor", "whole", "wide", "sum", "float")]
        nodes += [
            helper.make_node("Mul", scales.input, steps[:1]),
            helper.make_node("Div", [wide.input[0], steps[0]], steps[1:2]),
            helper.make_node("Floor", steps[1:2], steps[2:3]),
            helper.make_node("Cast", steps[2:3], steps[3:4], to=TensorProto.INT32),
            helper.make_node("Reshape", [steps[3], wide.input[1]], steps[4:5]),
            helper.make_node("Add", [cast.input[0], steps[4]], steps[5:6]),
            helper.make_node("Cast", steps[5:6], steps[6:], to=TensorProto.FLOAT),
            helper.make_node("Mul", [steps[6], scaled.input[1]], [output]),
        ]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del result.graph.node[:]
    result.graph.node.extend(copies)
    return result


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_biases_that_are_rounded_when_the_model_runs(granularity: str) -> None:
    model = quantised("lenet5", "dynamic", False)
    old = with_rounded_biases(model)
    assert operators(old)["Floor"] == 2
    # What rounds is less than a step of the sums.
    assert np.abs(outputs(old) - outputs(model)).max() < 0.01 * np.abs(outputs(model)).max()
    results = [
        prune(each, [{"image": digits(32)}], granularity=granularity, keep="60%", storage="dense", threads=1) for each in (old, model)
    ]
    assert results[0].masks.keep.keys() == results[1].masks.keep.keys()
    for name, keep in results[1].masks.keep.items():
        assert (results[0].masks.keep[name] != keep).mean() < 0.01
    assert operators(results[0].model)["ConvInteger"] == 2
    assert operators(results[0].model)["Floor"] == 0
    assert results[0].report["verification"]["masked_vs_output_max_rel"] < 1e-5
    assert not [item for item in values(results[0].model) if item not in Graph(results[0].model).uses]
