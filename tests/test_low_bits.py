"""Weights of few bits as other tools write them: blocks, floats of 8 bits, 16 bit integers, floats that the file rounds by itself."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from builders import Net
from onnx import TensorProto, helper, numpy_helper
from test_quantised import operators, outputs, values
from test_quantised_packed import blocks, feed, products

import relief_onnx
from relief_onnx.errors import NothingQuantizedError
from relief_onnx.overview import overview
from relief_onnx.pack import pack, packed_names, unpack
from relief_onnx.prepared import prepare

SMALL = (TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2)


def layers(report: dict[str, Any]) -> dict[str, Any]:
    return {row["weight"]: row for row in report["layers"]}


def behind_nodes(opset: int, make: Any) -> onnx.ModelProto:
    """The three products with other nodes before their weights: make(name, array) -> (stored tensors, nodes, what is read)."""
    model = onnx.ModelProto()
    model.CopyFrom(products())
    model.opset_import[0].version, model.ir_version = opset, 10
    stored, nodes = values(model), list[onnx.NodeProto]()
    weights = [node.input[1] for node in model.graph.node if node.op_type == "MatMul"]
    for node in model.graph.node:
        for slot, name in enumerate(node.input):
            if name in weights:
                tensors, before, node.input[slot] = make(name, stored[name])
                kept = [item for item in model.graph.initializer if item.name != name]
                del model.graph.initializer[:]
                model.graph.initializer.extend([*kept, *tensors])
                nodes += before
        nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model, full_check=True)
    return model


def in_blocks(size: int = 16) -> onnx.ModelProto:
    """int4 in blocks of inputs that share a scale, where the inputs are whole blocks; else a scale for each neuron."""

    def make(name: str, array: Any) -> Any:
        inputs, rows = array.shape
        whole = inputs % size == 0
        parts = array.reshape(-1, size, rows) if whole else array[None]
        scale = (np.abs(parts).max(1) / 7 + 1e-6).astype(np.float32)
        integers = np.clip(np.rint(parts / scale[:, None]), -8, 7).reshape(inputs, rows).astype(ml_dtypes.int4)
        how = {"axis": 0, "block_size": size} if whole else {"axis": 1}
        tensors = [numpy_helper.from_array(integers, f"{name}/q"), numpy_helper.from_array(scale if whole else scale[0], f"{name}/s")]
        return tensors, [helper.make_node("DequantizeLinear", [f"{name}/q", f"{name}/s"], [f"{name}/f"], **how)], f"{name}/f"

    return behind_nodes(21, make)


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_blocks_go_as_a_whole(granularity: str) -> None:
    """Single inputs that went left a scale for every weight in the file, which grew."""
    model = in_blocks()
    result = relief_onnx.prune(model, [{"x1": feed()}], granularity=granularity, keep="30%", round_to=1, storage="dense")
    assert sum(len(item.raw_data) for item in result.model.graph.initializer if item.data_type == TensorProto.INT4) > 0
    found = [node for node in result.model.graph.node if node.op_type == "DequantizeLinear"]
    sizes = [item.i for node in found for item in node.attribute if item.name == "block_size"]
    assert sizes == [16, 16]
    stored = values(result.model)
    for node in found[1:]:
        assert stored[node.input[1]].shape[0] == -(-stored[node.input[0]].shape[0] // 16)
    assert len(outputs(result.model, feed(), optimize=False)) == 32
    assert np.allclose(outputs(result.model, feed(), optimize=False), outputs(result.masked, feed(), optimize=False), atol=1e-5)
    assert all(item.doc_string == "made by MatMul" for item in result.model.graph.node if item.op_type == "MatMul")


def rounded_by_the_file(low: int = -127, high: int = 127, clip: bool = True) -> onnx.ModelProto:
    """Float weights, QuantizeLinear, Clip to fewer bits, DequantizeLinear, as quantisation-aware training exports them."""

    def make(name: str, array: Any) -> Any:
        scale = (np.abs(array).max(0) / high).astype(np.float32)
        made = {"s": scale, "z": np.zeros(scale.shape, np.int8), "lo": np.int8(low), "hi": np.int8(high)}
        nodes = [helper.make_node("Constant", [], [f"{name}/{key}"], value=numpy_helper.from_array(item)) for key, item in made.items()]
        nodes.append(helper.make_node("QuantizeLinear", [name, f"{name}/s", f"{name}/z"], [f"{name}/q"], axis=1))
        last = f"{name}/q"
        if clip:
            nodes.append(helper.make_node("Clip", [last, f"{name}/lo", f"{name}/hi"], [f"{name}/c"]))
            last = f"{name}/c"
        nodes.append(helper.make_node("DequantizeLinear", [last, f"{name}/s", f"{name}/z"], [f"{name}/f"], axis=1))
        return [numpy_helper.from_array(array, name)], nodes, f"{name}/f"

    return behind_nodes(17, make)


@pytest.mark.parametrize(("low", "high", "clip"), [(-127, 127, False), (-127, 127, True), (-7, 7, True)])
@pytest.mark.parametrize("options", [{"granularity": "weight"}, {"granularity": "channel", "round_to": 1, "repair": "least-squares"}])
def test_weights_that_the_file_rounds(low: int, high: int, clip: bool, options: dict[str, Any]) -> None:
    model = rounded_by_the_file(low, high, clip)
    result = relief_onnx.prune(model, [{"x1": feed(seed=seed)} for seed in range(4)], keep="50%", storage="dense", **options)
    weights = [node.input[1].removesuffix("/f") for node in products().graph.node if node.op_type == "MatMul"]
    assert set(layers(result.report)) == set(weights)
    assert len(result.model.SerializeToString()) < 0.6 * len(model.SerializeToString())
    assert np.allclose(outputs(result.model, feed(), optimize=False), outputs(result.masked, feed(), optimize=False), atol=1e-5)
    before, after = operators(model), operators(result.model)
    assert after["DequantizeLinear"] == before["DequantizeLinear"]
    assert after["Clip"] == before["Clip"]
    for name in weights:
        stored = values(result.model)[name]
        if stored.dtype == np.int8:
            assert low <= stored.min() <= stored.max() <= high
    assert sum(values(result.model)[name].dtype == np.int8 for name in weights) >= 2


def test_what_nobody_changed_stays_floats_that_the_file_rounds() -> None:
    model = rounded_by_the_file()
    first = next(node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear")
    result = relief_onnx.prune(model, [{"x1": feed()}], granularity="weight", keep="85%", skip=f"^{first}$", storage="dense")
    assert operators(result.model)["QuantizeLinear"] == 1
    assert values(result.model)[first].tobytes() == values(model)[first].tobytes()


def in_small_floats(kind: int) -> onnx.ModelProto:
    dtype = helper.tensor_dtype_to_np_dtype(kind)

    def make(name: str, array: Any) -> Any:
        scale = np.float32(np.abs(array).max() / 400)
        stored = {"q": (array / scale).astype(dtype), "s": scale, "z": np.zeros((), dtype)}
        tensors = [numpy_helper.from_array(np.asarray(item), f"{name}/{key}") for key, item in stored.items()]
        return tensors, [helper.make_node("DequantizeLinear", [f"{name}/{key}" for key in "qsz"], [f"{name}/f"])], f"{name}/f"

    return behind_nodes(21, make)


@pytest.mark.parametrize("kind", SMALL)
def test_floats_of_8_bits(kind: int) -> None:
    """They had no row at all, and nothing was pruned."""
    model = in_small_floats(kind)
    ready = prepare(model)
    back = ready.restored(ready.graph.model)
    assert values(back).keys() == values(model).keys()
    assert all(values(back)[name].tobytes() == item.tobytes() for name, item in values(model).items())
    result = relief_onnx.prune(
        model, [{"x1": feed(seed=seed)} for seed in range(4)], granularity="weight", keep="50%", repair="least-squares", criterion="flow"
    )
    for name, row in layers(result.report).items():
        stored = values(result.model)[name]
        assert stored.dtype == helper.tensor_dtype_to_np_dtype(kind)
        assert row["weights_kept"] == int((stored.astype(np.float32) != 0).sum()) < row["weights"]
    assert np.allclose(outputs(result.model, feed()), outputs(result.masked, feed()), atol=1e-5)
    assert min(item["cosine"] for item in result.report["quality"]["agreement"].values()) > 0.9


@pytest.mark.parametrize("dtype", [np.int16, np.uint16])
def test_16_bit_integers_are_packed(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    zero = 300
    stored = np.where(rng.random((80, 80)) < 0.4, rng.integers(0, 2000, (80, 80)), zero).astype(dtype)
    net = Net(opset=21, ir_version=10)
    x = net.input("n", 80)
    name = net.constant(stored, "w")
    weight = net.op("DequantizeLinear", name, net.constant(np.float32(0.01)), net.constant(np.asarray(zero, dtype)))
    model = net.model(net.op("MatMul", x, weight))
    packed, (row,) = pack(model, [name])
    assert packed_names(packed) == (name,)
    assert row.packed_bytes < 0.6 * row.dense_bytes
    assert unpack(packed).SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)
    given = {x: rng.standard_normal((4, 80)).astype(np.float32)}
    assert np.array_equal(outputs(packed, given[x]), outputs(model, given[x]))


def test_integers_of_half_precision_whose_input_is_rounded() -> None:
    """What stood for a MatMulNBits of float16 with accuracy_level 4 did not load, and the user's model was blamed."""
    model = onnx.ModelProto()
    model.CopyFrom(blocks())
    for item in model.graph.initializer:
        if item.data_type == TensorProto.FLOAT:
            item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item).astype(np.float16), item.name))
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.elem_type = TensorProto.FLOAT16
    del model.graph.value_info[:]
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            node.attribute.append(helper.make_attribute("accuracy_level", 4))
    result = relief_onnx.prune(model, [{"x1": feed().astype(np.float16)}], granularity="weight", keep="50%", mean_shift="off")
    assert operators(result.model) == operators(model)
    assert all(row["weights_kept"] < row["weights"] for row in result.report["layers"])


def test_quantised_weights_alone_are_quantised_already() -> None:
    """Each weight had "a table that DequantizeLinear reads" as its reason."""
    with pytest.raises(NothingQuantizedError, match="already quantised"):
        relief_onnx.quantize(in_blocks(), [{"x1": feed()}], activations="none")


def test_attention_of_other_axes_under_the_integers_name() -> None:
    """onnxruntime's dynamic quantiser makes a QAttention of ONNX's Attention, which nothing can run: looking at the file is no crash."""
    net = Net(opset=23, ir_version=10)
    x = net.input(2, 3, 8)
    heads = [net.op("Reshape", net.op("MatMul", x, net.weight(8, 8)), net.ints(0, 0, 2, 4)) for _ in range(3)]
    turned = [net.op("Transpose", item, perm=[0, 2, 1, 3]) for item in heads]
    whole = [net.op("DynamicQuantizeLinear", item, outputs=3) for item in turned[:2]]
    inputs = [whole[0][0], whole[1][0], turned[2], whole[0][1], whole[1][1], "", whole[0][2], whole[1][2]]
    y = net.op("Transpose", net.op("QAttention", *inputs, domain="com.microsoft", num_heads=2), perm=[0, 2, 1, 3])
    net.ranks["matmul99"] = 3
    model = net.model(net.op("MatMul", net.op("Reshape", y, net.ints(0, 0, -1)), net.weight(8, 3)))
    assert len(overview(model)["layers"]) >= 4
