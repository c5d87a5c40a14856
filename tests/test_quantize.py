"""Quantising: zeros stay zeros, packed equals dense, agreement is high, names and metadata stay, refusals say why."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from builders import Net
from helpers import CALIB, LENET, ROOT, SAMPLES, digits, run
from onnx import TensorProto, helper, numpy_helper

from relief_onnx import prune, quantize, quantizer
from relief_onnx.errors import DataError, ModelError, NothingQuantizedError, OutputError, RecipeError, VerificationError
from relief_onnx.folding import fold_norms
from relief_onnx.int8 import quantised
from relief_onnx.pack import pack, packed_names, unpack
from relief_onnx.quantization import _Candidates, _check_zeros
from relief_onnx.session import Session
from relief_onnx.verify import verify_packed

MODELS = ROOT.parent / "shared" / "models"
NAMES = ("lenet300", "lenet5", "resnet8")
MODES = ("uint8", "int8", "none")


def sparse(model: onnx.ModelProto, zeros: float = 0.9) -> onnx.ModelProto:
    """The model with that share of every weight's smallest values set to 0, packed as `prune` packs."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    names = []
    for item in result.graph.initializer:
        values = numpy_helper.to_array(item)
        if values.ndim >= 2:
            cut = np.quantile(np.abs(values), zeros)
            item.CopyFrom(numpy_helper.from_array(np.where(np.abs(values) <= cut, 0, values).astype(values.dtype), item.name))
            names.append(item.name)
    return pack(result, names)[0]


@functools.cache
def sample(name: str) -> onnx.ModelProto:
    return onnx.load(SAMPLES / f"{name}.onnx")


@functools.cache
def result(name: str, activations: str, pruned: bool = True) -> Any:
    """A sample model, 90 % zeros, quantised on 48 digits."""
    model = sparse(sample(name)) if pruned else sample(name)
    return quantize(model, CALIB, samples=48, activations=activations, threads=1)


def outputs(model: onnx.ModelProto, save: Path | None = None, feed: Any = None) -> list[Any]:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    if save is not None:
        options.optimized_model_filepath = str(save)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: list[Any] = session.run(None, feed or {"image": digits()})
    return found


def size(model: onnx.ModelProto) -> int:
    return int(model.ByteSize())


# --- laws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros_and_packed_is_dense(name: str, activations: str) -> None:
    source, found = unpack(sparse(sample(name))), result(name, activations)
    rows = found.report["layers"]
    assert rows
    assert all(row["status"] == ("int8 weights" if activations == "none" else "int8") for row in rows)
    weights = {item.name: numpy_helper.to_array(item) for item in source.graph.initializer}
    for row in rows:
        zeros = int(np.sum(weights[row["weight"]] == 0))
        assert zeros == row["zeros"] <= row["zeros_after"], row
        assert row["zeros"] >= 0.85 * row["weights"]
        assert row["scale_per_channel"]
    np.testing.assert_array_equal(outputs(found.model)[0], outputs(found.dense)[0])
    assert found.report["verification"]["dense_vs_output_max_abs"] == 0.0
    assert packed_names(found.model)
    stored = {item.name: item for item in unpack(found.model).graph.initializer}
    assert {item.name: item.SerializeToString() for item in found.dense.graph.initializer} == {
        name: item.SerializeToString() for name, item in stored.items()
    }
    kept = sum(int(np.count_nonzero(numpy_helper.to_array(item))) for item in stored.values() if item.data_type == TensorProto.INT8)
    assert kept <= sum(int(np.count_nonzero(values)) for values in weights.values())


@pytest.mark.parametrize("activations", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_the_file_profits_from_zeros_and_from_int8(name: str, activations: str) -> None:
    found = result(name, activations)
    assert size(found.model) < size(sparse(sample(name)))  # the pruned floats, packed
    assert size(found.model) < size(found.dense)
    assert [row["bytes"] for row in found.report["stages"]][-2:] == [size(found.dense), size(found.model)]
    assert found.report["output"]["bytes"] == size(found.model)
    assert size(found.dense) < 0.5 * size(sample(name))


@pytest.mark.parametrize("activations", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_a_trained_model_keeps_its_answers(name: str, activations: str) -> None:
    found = result(name, activations, pruned=False)
    agreement = found.report["stages"][-1]["agreement"]["logits"]
    assert agreement["cosine"] > 0.998
    assert agreement["top1"] > 0.95
    a, b = outputs(sample(name))[0], outputs(found.model)[0]
    assert np.mean(a.argmax(-1) == b.argmax(-1)) > 0.95


def test_weights_alone_are_floats_again_when_the_model_is_loaded(tmp_path: Path) -> None:
    found = result("lenet5", "none")
    outputs(found.model, tmp_path / "loaded.onnx")
    loaded = onnx.load(tmp_path / "loaded.onnx")
    assert not {"Cast", "Mul", "DequantizeLinear", "ScatterND", "Gather"} & {node.op_type for node in loaded.graph.node}


def test_packed_weights_reach_the_int8_kernels(tmp_path: Path) -> None:
    found = result("resnet8", "uint8")
    kinds = []
    for model, name in ((found.model, "packed"), (found.dense, "dense")):
        outputs(model, tmp_path / f"{name}.onnx")
        kinds.append(Counter(node.op_type for node in onnx.load(tmp_path / f"{name}.onnx").graph.node))
    assert kinds[0] == kinds[1]
    assert kinds[0]["QLinearConv"] == 9
    assert not kinds[0]["Conv"] + kinds[0]["BatchNormalization"]


def test_every_value_is_within_half_a_step() -> None:
    values = np.random.default_rng(0).normal(size=(5, 4, 3)).astype(np.float32) * np.float32([[[1]], [[1e-3]], [[0]], [[50]], [[1]]])
    small, scale = quantised(values, (0,))
    assert scale.shape == (5, 1, 1)
    assert np.all(np.abs(small * scale - values) <= 0.501 * scale)
    assert small.min() >= -127
    assert not small[2].any()
    assert quantised(values, ())[1].size == 1
    half, steps = quantised(np.float16([[6e-8, 1.0]]), (0,))
    assert steps.dtype == np.float16
    assert half.tolist() == [[0, 127]]


# --- what stays -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", MODES)
def test_names_metadata_opset_and_signature_stay(activations: str) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(sample("lenet5"))
    model.doc_string, model.domain, model.model_version, model.producer_name = "about", "org.example", 7, "trainer"
    helper.set_model_props(model, {"license": "MIT", "classes": "0,1,2"})
    model.graph.doc_string = model.graph.node[0].doc_string = "kept"
    model.graph.node[1].name = ""
    found = quantize(model, CALIB, samples=16, activations=activations)
    for field in ("doc_string", "domain", "model_version", "producer_name", "opset_import", "metadata_props", "ir_version"):
        assert getattr(found.model, field) == getattr(model, field), field
    for field in ("name", "doc_string", "input", "output"):
        assert getattr(found.model.graph, field) == getattr(model.graph, field), field
    own = [node for node in found.model.graph.node if node.op_type == "Conv"]
    assert own[0].name == model.graph.node[0].name
    assert own[0].doc_string == "kept"
    onnx.checker.check_model(found.model, full_check=True)


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    written = []
    for seed in ("1", "2"):
        target = tmp_path / f"{seed}.onnx"
        code = f"import relief_onnx; relief_onnx.quantize({str(LENET)!r}, {str(CALIB)!r}, samples=16, output={str(target)!r})"
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": seed}, cwd=ROOT, timeout=120)
        written.append(target.read_bytes())
    assert written[0] == written[1]


# --- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["entropy", "percentile"])
def test_other_ways_to_find_the_ranges(method: str) -> None:
    found = quantize(sample("lenet5"), CALIB, samples=12, method=method)
    assert found.report["stages"][-1]["agreement"]["logits"]["cosine"] > 0.97
    assert found.report["options"]["method"] == method


def test_one_scale_for_a_weight() -> None:
    found = quantize(sample("lenet5"), CALIB, samples=12, per_channel=False)
    assert not any(row["scale_per_channel"] for row in found.report["layers"])


@pytest.mark.parametrize("activations", ["uint8", "none"])
def test_layers_can_be_left_alone(activations: str) -> None:
    found = quantize(sample("lenet5"), CALIB, samples=12, skip=r"^features\.0", activations=activations)
    first, *rest = found.report["layers"]
    assert (first["status"], first["reason"]) == ("float", "--skip ^features\\.0 names it")
    assert all(row["status"] != "float" for row in rest)
    found = quantize(sample("lenet5"), CALIB, samples=12, only=r"^features\.0", activations=activations)
    assert [row["status"] == "float" for row in found.report["layers"]] == [False, True, True, True, True]
    tensors = {item.name for item in found.model.graph.initializer}
    assert "classifier.0.weight" in tensors
    assert "features.0.weight" not in tensors


def test_dense_storage_and_the_original() -> None:
    found = quantize(sparse(sample("lenet5")), CALIB, samples=12, storage="dense", original=LENET)
    assert not packed_names(found.model)
    stages = found.report["stages"]
    assert [row["stage"] for row in stages] == ["original", "input", "weights int8", "weights and activations int8"]
    assert stages[0]["bytes"] == LENET.stat().st_size
    assert stages[0]["agreement"] is None
    assert stages[1]["agreement"]["logits"]["cosine"] < 1


# --- other graphs ---------------------------------------------------------------------------------------------------


def test_norms_are_folded_and_zeros_stay() -> None:
    model = unpack(sparse(sample("resnet8"), 0.5))
    folded, names = fold_norms(model)
    assert len(names) == 9
    assert not any(node.op_type == "BatchNormalization" for node in folded.graph.node)
    np.testing.assert_allclose(outputs(folded)[0], outputs(model)[0], rtol=1e-5, atol=2e-5)
    before = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    for item in folded.graph.initializer:
        values = numpy_helper.to_array(item)
        assert values.ndim < 2 or not values[before[item.name] == 0].any()
    assert fold_norms(folded) == (folded, ())


@pytest.mark.parametrize("shown", [False, True])
def test_norms_that_share_their_parameters_are_folded(shown: bool) -> None:
    """The shift serves as mean too, and may be an output."""
    net = Net()
    x = h = net.input("N", 3, 8, 8)
    gain, shift, variance = net.bias(8), net.bias(8), net.constant(np.linspace(0.5, 2, 8, dtype=np.float32))
    for inputs in (3, 8, 8):
        h = net.op("BatchNormalization", net.op("Conv", h, net.weight(8, inputs, 3, 3), pads=[1] * 4), gain, shift, shift, variance)
        h = net.op("Relu", h)
    net.ranks[h] = 4
    model = net.model(h, *([shift] if shown else []))
    folded, names = fold_norms(model)
    assert len(names) == 3
    assert (shift in {item.name for item in folded.graph.initializer}) == shown
    feed = {x: np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)}
    for before, after in zip(outputs(model, feed=feed), outputs(folded, feed=feed), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("opset", [9, 11, 12, 13, 21])
@pytest.mark.parametrize("activations", ["uint8", "none"])
def test_the_opset_stays(opset: int, activations: str) -> None:
    net = Net(opset=opset)
    x = net.input(1, 8)
    model = net.model(net.op("MatMul", net.op("Relu", net.op("MatMul", x, net.weight(8, 64))), net.weight(64, 64)))
    data = [{x: np.random.default_rng(i).normal(size=(1, 8)).astype(np.float32)} for i in range(8)]
    if opset == 9 and activations != "none":
        with pytest.raises(ModelError, match=r"opset 9 has no QuantizeLinear .* use --activations none"):
            quantize(model, data, activations=activations)
        return
    found = quantize(model, data, activations=activations)
    assert found.model.opset_import == model.opset_import
    assert any("no scales per channel" in text for text in found.report["warnings"]) == (opset < 13 and activations != "none")
    big = found.report["layers"][-1]
    assert big["scale_per_channel"] == (opset >= 13 or activations == "none")
    assert found.report["stages"][-1]["agreement"][model.graph.output[0].name]["cosine"] > 0.99


@pytest.mark.parametrize("storage", ["dense", "auto"])
@pytest.mark.parametrize("activations", ["uint8", "none"])
def test_files_that_list_initializers_as_inputs(storage: str, activations: str) -> None:
    """Prune leaves them so where it packs nothing; what quantize makes would be replaceable, and not for the kernels."""
    net = Net(opset=11, ir_version=3)
    x = net.input("N", 20)
    model = net.model(net.op("Gemm", net.op("Relu", net.op("Gemm", x, net.weight(20, 32), net.bias(32))), net.weight(32, 30), net.bias(30)))
    feed = {x: np.random.default_rng(0).standard_normal((64, 20)).astype(np.float32)}
    found = quantize(model, [feed], activations=activations, storage=storage, threads=1).model
    assert found.ir_version == 4
    assert [item.name for item in found.graph.input] == [x]
    pruned = prune(model, [feed], keep="60%", storage="dense", threads=1).model
    assert pruned.ir_version == 3
    assert [item.name for item in pruned.graph.input] == [item.name for item in model.graph.input]


def half_model() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array((rng.normal(size=(64, 64)) * (rng.random((64, 64)) < 0.2)).astype(np.float16), "w")
    nodes = [helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16), helper.make_node("MatMul", ["h", "w"], ["y"])]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["n", 64])], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_half_precision() -> None:
    data = [{"x": np.random.default_rng(i).normal(size=(2, 64)).astype(np.float32)} for i in range(4)]
    with pytest.raises(ModelError, match="half precision; use --activations none"):
        quantize(half_model(), data)
    found = quantize(half_model(), data, activations="none")
    assert found.report["layers"][0]["storage"] != "dense"
    assert found.report["stages"][-1]["agreement"]["y"]["cosine"] > 0.999


def test_recurrent_layers_get_int8_weights_beside_int8_layers() -> None:
    rng = np.random.default_rng(0)
    parts = {"w": (1, 128, 16), "r": (1, 128, 32), "m": (32, 32)}
    tensors = [numpy_helper.from_array(rng.normal(size=shape).astype(np.float32) * 0.2, name) for name, shape in parts.items()]
    nodes = [
        helper.make_node("LSTM", ["x", "w", "r"], ["", "h"], hidden_size=32),
        helper.make_node("Squeeze", ["h", "axes"], ["s"]),
        helper.make_node("MatMul", ["s", "m"], ["y"]),
    ]
    tensors.append(numpy_helper.from_array(np.array([0], np.int64), "axes"))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, "n", 16])]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32])], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    found = quantize(model, [{"x": rng.normal(size=(5, 3, 16)).astype(np.float32)} for _ in range(4)])
    assert {row["weight"]: row["status"] for row in found.report["layers"]} == {"m": "int8", "w": "int8 weights", "r": "int8 weights"}
    assert found.report["stages"][-1]["agreement"]["y"]["cosine"] > 0.999


@pytest.mark.parametrize("activations", ["uint8", "none"])
@pytest.mark.parametrize("place", ["outside", "in a branch that always runs"])
def test_recurrent_weights_whose_gates_a_file_moves(place: str, activations: str) -> None:
    """As PyTorch writes an LSTM where constants are not folded; they were kept exact, as tables that a Slice reads."""
    rng, gates = np.random.default_rng(0), ""
    for name in "wr":
        for gate, (start, end) in enumerate([(0, 32), (96, 128), (32, 96)]):  # input, output, forget and cell
            gates += f"{name}{gate} = Slice ({name}, at{start}, at{end}, first)\n"
        gates += f"{name}_all = Concat <axis = 0> ({name}0, {name}1, {name}2)\n"
        gates += f"{name}_one = Unsqueeze <axes = [0]> ({name}_all)\n"
    nodes = gates + "all, last = LSTM <hidden_size = 32> (x, w_one, r_one)\n"
    if place != "outside":
        nodes = f"""size = Shape (x)  count = Gather (size, two)  known = Equal (count, sixteen)
            last = If (known) <then_branch = yes () => (float[1, n, 32] t) {{ {nodes.replace("all, last", "all, t")} }},
            else_branch = no () => (float[1, n, 32] e) {{ e = ReduceSum <axes = [0], keepdims = 1> (x) }}>"""
    places = ", ".join(f"int64[1] at{place} = {{{place}}}" for place in (0, 32, 96, 128))
    model = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["" : 11]> net (float[5, n, 16] x) => (float[1, n, 32] y)
        <int64 two = {{2}}, int64 sixteen = {{16}}, int64[1] first = {{0}}, {places}> {{ {nodes} y = Tanh(last) }}""")
    for name, shape in {"w": (128, 16), "r": (128, 32)}.items():
        model.graph.initializer.append(numpy_helper.from_array(rng.normal(size=shape).astype(np.float32) * 0.2, name))
    data = [{"x": rng.normal(size=(5, 3, 16)).astype(np.float32)} for _ in range(4)]
    found = quantize(model, data, activations=activations, threads=1)
    assert [row["status"] for row in found.report["layers"]] == ["int8 weights", "int8 weights"]
    assert found.report["stages"][-1]["agreement"]["y"]["cosine"] > 0.999


def test_a_branch_reads_what_a_relu_left() -> None:
    """The quantiser drops a Relu behind 8 bits, whose range begins at 0; a branch that reads it got what is below 0 too."""
    net = Net()
    kept = net.op("Relu", net.op("Gemm", net.input("N", 20), net.weight(20, 32), net.bias(32)))
    branch = helper.make_graph([helper.make_node("Identity", [kept], ["same"])], "branch", [], [onnx.ValueInfoProto(name="same")])
    chosen = net.op(
        "If",
        net.op("Greater", net.op("ReduceSum", kept, keepdims=0), net.constant(np.float32(0))),
        then_branch=branch,
        else_branch=helper.make_graph([helper.make_node("Neg", [kept], ["other"])], "other", [], [onnx.ValueInfoProto(name="other")]),
    )
    model = net.model(chosen)
    feed = {"x1": np.random.default_rng(0).standard_normal((64, 20)).astype(np.float32)}
    report = quantize(model, [feed], threads=1).report
    assert {row["status"] for row in report["layers"]} == {"int8"}
    assert all(item["cosine"] > 0.999 for item in report["stages"][-1]["agreement"].values())


def test_layers_behind_onnxruntime_s_own_operators() -> None:
    """The quantiser did not know what a fused Gelu makes, and failed at the bias of the convolution behind."""
    net = Net()
    y = net.op("Gelu", net.op("Conv", net.input("N", 3, 8, 8), net.weight(8, 3, 3, 3), net.bias(8)))
    net.nodes[-1].domain = "com.microsoft"
    pooled = net.op("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2])
    model = net.model(net.op("Conv", pooled, net.weight(6, 8, 3, 3), net.bias(6)))
    feed = {"x1": np.random.default_rng(0).standard_normal((16, 3, 8, 8)).astype(np.float32)}
    report = quantize(model, [feed], threads=1).report
    assert [row["status"] for row in report["layers"]] == ["int8", "int8"]
    assert all(item["cosine"] > 0.999 for item in report["stages"][-1]["agreement"].values())


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
def test_transposed_convolutions_in_groups(bias: bool, per_channel: bool) -> None:
    """onnxruntime's quantiser fails where their bias has more numbers than their weight has scales."""
    net = Net()
    h = net.op("Relu", net.op("Conv", net.input("N", 4, 6, 6), net.weight(12, 4, 3, 3), pads=[1, 1, 1, 1]))
    weight = net.weight(12, 5, 3, 3)
    model = net.model(net.op("ConvTranspose", h, weight, *([net.bias(10)] if bias else []), group=2))
    feed = {"x1": np.random.default_rng(0).standard_normal((16, 4, 6, 6)).astype(np.float32)}
    found = quantize(model, [feed], per_channel=per_channel, threads=1)
    assert any(weight in note for note in found.report["warnings"]) == (bias and per_channel)
    wanted, given = (ort.InferenceSession(item.SerializeToString()).run(None, feed)[0] for item in (model, found.model))
    assert np.abs(wanted - given).max() < 0.05 * np.abs(wanted).max()


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
def test_a_weight_that_is_read_both_ways(turned: bool, per_channel: bool) -> None:
    """As in tied layers: scales of the neurons of one are those of the inputs of the other."""
    net = Net()
    x, weight = net.input("N", 20), net.weight(20, 32)
    h = net.op("Relu", net.op("MatMul", x, weight))
    back = net.op("MatMul", h, net.op("Transpose", weight, perm=[1, 0])) if turned else net.op("Gemm", h, weight, transB=1)
    model = net.model(net.op("MatMul", net.op("Tanh", back), net.weight(20, 30)))
    feed = {"x1": np.random.default_rng(0).standard_normal((64, 20)).astype(np.float32)}
    found = quantize(model, [feed], per_channel=per_channel, threads=1)
    assert any(f"{weight} is int8 as a weight only" in note for note in found.report["warnings"]) == per_channel
    assert found.report["stages"][-1]["agreement"][model.graph.output[0].name]["cosine"] > 0.999


@pytest.mark.parametrize("operator", ["Relu", "Clip"])
def test_an_output_in_front_of_a_relu_keeps_what_is_below_0(operator: str) -> None:
    net = Net()
    shown = net.op("Gemm", net.input("N", 20), net.weight(20, 32), net.bias(32))
    rest = [net.constant(np.float32(0)), net.constant(np.float32(6))] if operator == "Clip" else []
    model = net.model(shown, net.op("Gemm", net.op(operator, shown, *rest), net.weight(32, 8), net.bias(8)))
    feed = {"x1": np.random.default_rng(0).standard_normal((64, 20)).astype(np.float32)}
    report = quantize(model, [feed], threads=1).report
    assert {row["status"] for row in report["layers"] if row["op"] == "Gemm"} == {"int8"}
    assert all(item["cosine"] > 0.999 for item in report["stages"][-1]["agreement"].values())


@pytest.mark.parametrize("activations", ["uint8", "int8"])
def test_an_input_that_is_an_output_too_stays_as_it_is(activations: str) -> None:
    net = Net()
    x = net.input("N", 20)
    model = net.model(net.op("MatMul", x, net.weight(20, 32)), net.op("Identity", x))
    model.graph.output.append(model.graph.input[0])
    feed = {x: np.random.default_rng(0).standard_normal((64, 20)).astype(np.float32)}
    found = quantize(model, [feed], activations=activations, threads=1)
    assert [row["status"] for row in found.report["layers"]] == ["int8"]
    assert [item.name for item in found.model.graph.output] == [item.name for item in model.graph.output]
    assert np.array_equal(outputs(found.model, feed=feed)[2], feed[x])


@pytest.mark.parametrize("activations", MODES)
def test_a_quantised_model_is_refused(activations: str) -> None:
    with pytest.raises(NothingQuantizedError, match="already quantised"):
        quantize(result("lenet5", activations).model, CALIB)


def test_refusals_say_why(tmp_path: Path) -> None:
    with pytest.raises(NothingQuantizedError, match="--skip \\. names it") as caught:
        quantize(LENET, CALIB, samples=4, skip=".")
    assert len(caught.value.reasons) == 5
    for options, text in (
        ({"method": "guess"}, "method is 'guess'"),
        ({"activations": "int4"}, "int4"),
        ({"alpha": 0.5}, "no option 'alpha'"),
    ):
        with pytest.raises(RecipeError, match=text):
            quantize(LENET, CALIB, **options)
    with pytest.raises(DataError):
        quantize(LENET, tmp_path)
    target = tmp_path / "out.onnx"
    target.write_bytes(b"mine")
    with pytest.raises(OutputError, match="--force"):
        quantize(LENET, CALIB, output=target)
    assert target.read_bytes() == b"mine"


def test_the_checks_can_fail() -> None:
    found, source = result("lenet5", "uint8"), unpack(sparse(sample("lenet5")))
    changed = onnx.ModelProto()
    changed.CopyFrom(found.dense)
    values = next(item for item in changed.graph.initializer if item.data_type == TensorProto.INT8 and len(item.dims) == 4)
    values.CopyFrom(numpy_helper.from_array(np.flip(numpy_helper.to_array(values), 0).copy(), values.name))
    from relief_onnx.data import open_dataset
    from relief_onnx.graph import Graph
    from relief_onnx.int8 import Stored
    from relief_onnx.layers import find
    from relief_onnx.model import input_specs

    dataset = open_dataset(CALIB, input_specs(source))
    with pytest.raises(VerificationError, match="differs"):
        verify_packed(source, found.dense, changed, dataset, seed=0, threads=1)
    graph = Graph(source)
    weight = find(graph).layers[0].weight
    ones = Stored("q", np.ones(graph.array(weight).shape, np.int8), False)
    with pytest.raises(VerificationError, match="zeros of"):
        _check_zeros(graph, {weight: ones})
    assert _Candidates(graph, find(graph), {}, {}).axes == {}


# --- the command line -----------------------------------------------------------------------------------------------


def test_the_command_line(tmp_path: Path) -> None:
    model, report = tmp_path / "model.onnx", tmp_path / "report.json"
    model.write_bytes(sparse(sample("lenet5")).SerializeToString())
    few = ("--data", CALIB, "--samples", 16)
    first = run("quantize", model, *few, "--original", LENET, "--json", report)
    assert first.exit_code == 0, first.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.int8.onnx", "model.onnx", "report.json"]
    for word in ("weights and activations int8", "packed", "cosine", "5 of 5 weights are int8", "relief-onnx compare", "only 16 samples"):
        assert word in first.stdout
    document = json.loads(report.read_text())
    assert document["schema"] == "relief-onnx/quantize/1"
    assert set(document) >= {
        "input",
        "output",
        "stages",
        "layers",
        "verification",
        "timing",
        "warnings",
        "speed",
        "options",
        "data",
        "folded",
    }
    for side, path in (("input", model), ("output", tmp_path / "model.int8.onnx")):
        assert set(document[side]) == {"path", "sha256", "bytes", "params", "nonzero_params", "macs"}
        assert (document[side]["path"], document[side]["bytes"]) == (str(path), path.stat().st_size)
    assert document["input"]["params"] == document["output"]["params"]
    assert [row["stage"] for row in document["stages"]] == ["original", "input", "weights int8", "weights and activations int8", "packed"]

    again = run("quantize", model, *few)
    assert again.exit_code == 1
    assert "exists already" in again.stderr
    quiet = run("quantize", model, *few, "--force", "--quiet", "--activations", "none", "--per-tensor")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")
    twice = run("quantize", tmp_path / "model.int8.onnx", *few, "-o", tmp_path / "twice.onnx")
    assert twice.exit_code == 4
    assert "already quantised (it stores weights as 8 bit integers)" in twice.stderr
    assert not (tmp_path / "twice.onnx").exists()
    assert run("quantize", model, *few, "--method", "guess").exit_code == 2
    shown = run("quantize", model, *few, "--force", "--json", "-")
    assert json.loads(shown.stdout)["stages"]


# --- real models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "activations", "least"),
    [
        ("resnet20_cifar10_bn", (4, 3, 32, 32), "uint8", 0.999),
        ("qonnx_espcn_float", None, "uint8", 0.99),
        ("dtln_1", None, "uint8", 0.99),
        ("dtln_2", None, "none", 0.99),
    ],
)
def test_real_models(name: str, shape: tuple[int, ...] | None, activations: str, least: float) -> None:
    path = MODELS / f"{name}.onnx"
    if not path.exists():
        pytest.skip(f"the real models are not beside this project: shared/models/{name}.onnx")
    model, rng = onnx.load(path), np.random.default_rng(0)
    inputs = {item.name: [dim.dim_value or 1 for dim in item.type.tensor_type.shape.dim] for item in model.graph.input}
    feeds = [{key: rng.random(shape or own).astype(np.float32) for key, own in inputs.items()} for _ in range(6)]
    found = quantize(model, feeds, activations=activations)
    assert min(item["cosine"] for item in found.report["stages"][-1]["agreement"].values()) > least
    assert size(found.model) < 0.4 * path.stat().st_size
    assert found.report["verification"]["dense_vs_output_max_abs"] == 0.0
    assert any(row["status"] != "float" for row in found.report["layers"])


def three_axes(shape: tuple[int, ...] = (1, 10, 12)) -> tuple[onnx.ModelProto, list[dict[str, Any]]]:
    """A dense layer, and a product with a weight that has an axis of batches in front."""
    net = Net()
    x = net.input("N", 6, 10)
    y = net.op("MatMul", net.op("Relu", net.op("MatMul", x, net.weight(10, 10))), net.weight(*shape))
    return net.model(y), [{"x1": np.random.default_rng(0).standard_normal((48, 6, 10)).astype(np.float32)}]


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_weight_with_three_axes(per_channel: bool) -> None:
    """onnxruntime loads a product with scales per channel of such a weight, and fails when it runs."""
    model, data = three_axes()
    found = quantize(model, data, per_channel=per_channel, threads=1).report
    assert [row["status"] for row in found["layers"]] == ["int8", "int8 weights" if per_channel else "int8"]
    assert found["stages"][-1]["agreement"][model.graph.output[0].name]["cosine"] > 0.99
    told = f"{model.graph.initializer[1].name} is int8 as a weight only: not every onnxruntime has a kernel for"
    assert any(warning.startswith(told) for warning in found["warnings"]) is per_channel


def test_a_quantised_model_that_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of weights with three axes and scales per channel before onnxruntime 1.32."""

    class Failing(Session):
        def run(self, *_: Any, **__: Any) -> Any:
            raise DataError("no kernel")

    monkeypatch.setattr(quantizer, "Session", Failing)
    model, data = three_axes()
    with pytest.raises(
        ModelError, match=r"^onnxruntime's quantiser made a model that onnxruntime does not run \(no kernel\); .*--activations none"
    ):
        quantize(model, data, threads=1)


def test_outputs_that_are_all_inputs() -> None:
    net = Net()
    x = net.input("N", 6)
    net.op("Gemm", x, net.weight(6, 8))
    model, data = net.model(x), [{"x1": np.ones((8, 6), np.float32)}]
    with pytest.raises(ModelError, match=r"^every output of the model is one of its inputs, .*; use --activations none"):
        quantize(model, data, threads=1)
    assert [row["status"] for row in quantize(model, data, activations="none", threads=1).report["layers"]] == ["int8 weights"]


IN_BODIES = {
    "read from outside": """y = Loop (steps, "", x) <body = each (int64 i, bool going, float[N, 32] h) => (bool again, float[N, 32] o) {
        again = Identity(going)  m = MatMul(h, w)  o = Tanh(m) }>""",
    "carried": """y, left = Loop (steps, "", x, w)
        <body = each (int64 i, bool going, float[N, 32] h, float[32, 32] v) => (bool again, float[N, 32] o, float[32, 32] v) {
        again = Identity(going)  m = MatMul(h, v)  o = Tanh(m) }>""",
    "inside": """y = Loop (steps, "", x) <body = each (int64 i, bool going, float[N, 32] h) => (bool again, float[N, 32] o) {
        again = Identity(going)  m = MatMul(h, inner)  o = Tanh(m) }>""",
    "in a branch": """s = ReduceSum <keepdims = 0> (x)  c = Greater(s, zero)
        y = If (c) <then_branch = one () => (float[N, 32] t) { t = MatMul(x, inner) },
        else_branch = two () => (float[N, 32] e) { e = MatMul(x, w) }>""",
}  # fmt: skip


@pytest.mark.parametrize("activations", ["uint8", "none"])
@pytest.mark.parametrize("name", IN_BODIES)
def test_weights_in_bodies_are_int8_as_weights(name: str, activations: str) -> None:
    model = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["" : 17]>
    net (float[N, 32] x) => (float[N, 32] y) <int64 steps = {{3}}, float zero = {{0.0}}> {{ {IN_BODIES[name]} }}""")
    rng = np.random.default_rng(0)
    (body, *_) = (item.g for node in model.graph.node for item in node.attribute if item.type == onnx.AttributeProto.GRAPH)
    for graph, weight in ((model.graph, "w"), (body, "inner")):
        values = (rng.standard_normal((32, 32)) / 6 * (rng.random((32, 32)) < 0.5)).astype(np.float32)
        if re.search(rf"\b{weight}\b", IN_BODIES[name]):
            graph.initializer.append(numpy_helper.from_array(values, weight))
    feeds = [{"x": rng.standard_normal((2, 32)).astype(np.float32)} for _ in range(16)]
    found = quantize(model, feeds, activations=activations, storage="dense", threads=1)
    stored = [item for item in found.model.graph.initializer if item.data_type == TensorProto.INT8]
    assert len(stored) == (2 if name == "in a branch" else 1)
    assert min(item["cosine"] for item in found.report["stages"][-1]["agreement"].values()) > 0.999
