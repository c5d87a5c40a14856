"""MatMulNBits and DynamicQuantizeLSTM: taken apart, pruned and put together again."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders import Net
from laws import random_masks
from onnx import TensorProto, helper, numpy_helper
from test_quantised import masked_and_cut, operators, outputs, quiet, values

from relief_onnx import prune
from relief_onnx.graph import Graph
from relief_onnx.grids import Grid
from relief_onnx.layers import find
from relief_onnx.masks import Masks, applied, initializer_masks, insert
from relief_onnx.pack import unpack
from relief_onnx.prepared import Prepared, prepare
from relief_onnx.quantised_blocks import packed, unpacked
from relief_onnx.quantised_open import open_packed
from relief_onnx.surgery import apply_weights, operate

BLOCKS = [(4, True), (4, False), (8, True), (8, False)]


@functools.cache
def products() -> onnx.ModelProto:
    """Three products whose inner widths are whole blocks and whose input is none; the second weight has a block of zeros."""
    net = Net(5)
    x = net.input("n", 40)
    weights = [net.weight(40, 64), net.weight(64, 48), net.weight(48, 10)]
    net.initializers[weights[1]][16:32, 3] = 0
    for weight in weights:
        x = net.op("MatMul", x, weight)
        if weight != weights[-1]:
            x = net.op("Relu", net.op("Add", x, net.bias(net.initializers[weight].shape[1])))
    return net.model(x)


@functools.cache
def blocks(bits: int = 4, symmetric: bool = True) -> onnx.ModelProto:
    """The same as onnxruntime's MatMulNBitsQuantizer writes it, in blocks of 16; by its kernels, since it needs onnx_ir."""
    from onnxruntime.capi import _pybind_state as kernels

    model = onnx.ModelProto()
    model.CopyFrom(products())
    stored, nodes = values(model), list[onnx.NodeProto]()
    for node in model.graph.node:
        if node.op_type == "MatMul":
            weight, name = stored[node.input[1]], node.input[1]
            (inputs, rows), count = weight.shape, -(-weight.shape[0] // 16)
            data, scales = np.zeros((rows, count, 16 * bits // 8), np.uint8), np.zeros((rows, count), np.float32)
            zeros = np.zeros((rows, -(-count * bits // 8)), np.uint8)
            quantizer = getattr(kernels, f"quantize_matmul_{bits}bits")
            quantizer(data, np.pad(weight, ((0, count * 16 - inputs), (0, 0))), scales, zeros, 16, rows, inputs, symmetric)
            parts = {f"{name}_Q{bits}": data, f"{name}_scales": scales} | ({} if symmetric else {f"{name}_zero_points": zeros})
            model.graph.initializer.remove(next(item for item in model.graph.initializer if item.name == name))
            model.graph.initializer.extend(numpy_helper.from_array(array, part) for part, array in parts.items())
            how = {"K": inputs, "N": rows, "bits": bits, "block_size": 16}
            named = f"{node.name}_Q{bits}"
            node = helper.make_node("MatMulNBits", [node.input[0], *parts], node.output, name=named, domain="com.microsoft", **how)
        nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def feed(width: int = 40, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((32, width)).astype(np.float32)


def same_file(back: onnx.ModelProto, model: onnx.ModelProto) -> None:
    assert [node.SerializeToString() for node in back.graph.node] == [node.SerializeToString() for node in model.graph.node]
    assert [item.SerializeToString() for item in back.graph.initializer] == [item.SerializeToString() for item in model.graph.initializer]


def dequantised(model: onnx.ModelProto) -> dict[str, Any]:
    """Weights [N, K] of every MatMulNBits, by hand."""
    found, stored = {}, values(model)
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            how = {item.name: item.i for item in node.attribute}
            count = -(-how["K"] // how["block_size"])
            data = stored[node.input[1]].reshape(how["N"], -1)
            numbers = np.zeros((how["N"], count * how["block_size"]))
            zeros = np.full((how["N"], count), 2 ** (how["bits"] - 1))
            for row in range(how["N"]):
                for place in range(numbers.shape[1]):
                    byte = int(data[row, place * how["bits"] // 8])
                    numbers[row, place] = byte if how["bits"] == 8 else (byte >> 4) if place % 2 else (byte & 15)
                for block in range(count if len(node.input) > 3 else 0):
                    byte = int(stored[node.input[3]].reshape(how["N"], -1)[row, block * how["bits"] // 8])
                    zeros[row, block] = byte if how["bits"] == 8 else (byte >> 4) if block % 2 else (byte & 15)
            scales = stored[node.input[2]].reshape(how["N"], count)
            wide = (numbers - np.repeat(zeros, how["block_size"], 1)) * np.repeat(scales, how["block_size"], 1)
            found[node.input[1]] = wide[:, : how["K"]]
    return found


@pytest.mark.parametrize(("bits", "symmetric"), BLOCKS)
def test_blocks_are_scored_as_what_they_stand_for_and_come_back_bit_for_bit(bits: int, symmetric: bool) -> None:
    model = blocks(bits, symmetric)
    ready = prepare(model)
    assert not ready.plan.skipped
    wanted = dequantised(model)
    assert [layer.weight for layer in ready.plan.layers] == list(wanted)
    for layer in ready.plan.layers:
        assert np.allclose(layer.view.apply(ready.graph.array(layer.weight)), wanted[layer.weight], rtol=1e-6, atol=0)
    same_file(ready.restored(ready.graph.model), model)
    assert np.allclose(outputs(ready.graph.model, feed()), outputs(model, feed()), atol=1e-4)


@pytest.mark.parametrize(("bits", "symmetric"), BLOCKS)
def test_the_masked_model_computes_what_the_cut_one_does(bits: int, symmetric: bool) -> None:
    model = blocks(bits, symmetric)
    ready, smaller = prepare(model), 0
    for seed in range(6):
        masked, cut = block_masked_and_cut(ready, seed)
        onnx.checker.check_model(cut)
        assert operators(masked)["MatMulNBits"] == operators(cut)["MatMulNBits"] == 3
        assert set(operators(cut)) <= set(operators(model))
        assert np.abs(outputs(masked, feed()) - outputs(cut, feed())).max() <= 1e-5 * np.abs(outputs(masked, feed())).max()
        sizes = [how["K"] for how in named(cut)]
        assert sizes[0] == 40
        assert all(size % 16 == 0 for size in sizes[1:])
        assert sizes[1] <= 48
        smaller += sum(sizes) < 40 + 64 + 48
    assert smaller == 6


def block_masked_and_cut(ready: Prepared, seed: int) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """As `masked_and_cut`, where nothing makes or reads the second block of the first width."""
    masks = random_masks(ready.plan, np.random.default_rng(seed))
    first, second = (layer.weight for layer in ready.plan.layers[:2])
    masks.keep[first][16:32] = masks.bias_keep[first][16:32] = masks.keep[second][:, 16:32] = False
    flags = initializer_masks(ready.plan, masks)
    graph, ready = ready.settled(ready.graph, flags)
    operation = operate(apply_weights(graph.model, applied(graph, flags)))
    return ready.restored(insert(graph, flags)), ready.restored(operation.model, operation.kept)


def named(model: onnx.ModelProto) -> list[dict[str, int]]:
    return [{item.name: item.i for item in node.attribute} for node in model.graph.node if node.op_type == "MatMulNBits"]


def test_whole_blocks_of_channels_go() -> None:
    model = blocks()
    result = prune(model, [{model.graph.input[0].name: feed()}], granularity="channel", keep="60%", samples=32, threads=1, storage="dense")
    assert result.report["verification"]["masked_vs_output_max_rel"] < 1e-5
    sizes = [(how["K"], how["N"]) for how in named(result.model)]
    assert sizes[0][1] == sizes[1][0]
    assert sizes[1][1] == sizes[2][0]
    assert sum(k for k, _ in sizes) < 40 + 64 + 48
    assert result.report["output"]["bytes"] < result.report["input"]["bytes"]


def test_rounded_inputs_keep_what_has_its_part_in_their_range() -> None:
    model = onnx.ModelProto()
    model.CopyFrom(blocks(4, False))
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            node.attribute.append(helper.make_attribute("accuracy_level", 4))
    ready = prepare(model)
    same_file(ready.restored(ready.graph.model), model)
    for seed in range(4):
        masked, cut = block_masked_and_cut(ready, seed)
        assert operators(cut)["MatMulNBits"] == 3
        assert np.abs(outputs(masked, feed()) - outputs(cut, feed())).max() <= 1e-5 * np.abs(outputs(masked, feed())).max()


@pytest.mark.parametrize(("bits", "symmetric"), BLOCKS)
def test_pruned_like_the_float_model_and_zeros_are_zero_points(bits: int, symmetric: bool) -> None:
    model = blocks(bits, symmetric)
    choices: dict[str, Any] = {"granularity": "weight", "keep": "50%", "samples": 32, "threads": 1, "storage": "dense"}
    data = [{model.graph.input[0].name: feed()}]
    reference, result = prune(products(), data, **choices), prune(model, data, **choices)
    cosine, wanted = (next(iter(item.report["quality"]["agreement"].values()))["cosine"] for item in (reference, result))
    # Scores see the rounded weights: as many stay, and few others.
    assert cosine == pytest.approx(wanted, abs=1e-3 if bits == 4 else 4e-4)
    pairs = list(zip(reference.masks.keep.values(), result.masks.keep.values(), strict=True))
    assert sum(int(a.sum()) for a, _ in pairs) == sum(int(b.sum()) for _, b in pairs)
    assert all((a != b).mean() <= (0.05 if bits == 4 else 0.005) for a, b in pairs)
    assert result.report["verification"]["masked_vs_output_max_rel"] < 1e-6
    assert {row["status"] for row in result.report["layers"]} <= {"pruned", "kept"}
    before, after = dequantised(model), dequantised(unpack(result.model))
    compared = 0
    for name, keep in result.masks.keep.items():
        if after[name].shape == before[name].shape:
            compared += 1
            own = keep.reshape(before[name].shape)
            assert not after[name][~own].any()
            # A unit that nobody reads is 0 as a whole where its block stays.
            dead = own & ~after[name].any(axis=1, keepdims=True)
            assert np.array_equal(after[name][own & ~dead], before[name][own & ~dead])
            assert dead.mean() < 0.05
    assert compared


@pytest.mark.parametrize(("bits", "symmetric"), BLOCKS)
def test_repaired_values_are_rounded_to_their_blocks(bits: int, symmetric: bool) -> None:
    model = blocks(bits, symmetric)
    choices: dict[str, Any] = {"granularity": "weight", "keep": "50%", "threads": 1, "storage": "dense"}
    data = [{model.graph.input[0].name: feed(seed=3)} for _ in range(2)]
    result = prune(model, data, criterion="flow", repair="least-squares", samples=64, **choices)
    assert result.report["verification"]["masked_vs_output_max_rel"] < 1e-5
    before, after = dequantised(model), dequantised(result.model)
    assert any(before[name].shape == array.shape and not np.array_equal(before[name], array) for name, array in after.items())
    assert set(operators(result.model)) <= set(operators(model))


def test_what_is_not_understood_says_why() -> None:
    model = blocks()
    node = next(node for node in model.graph.node if node.op_type == "MatMulNBits")
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    place = next(number for number, other in enumerate(changed.graph.node) if other.name == node.name)
    changed.graph.initializer.append(numpy_helper.from_array(np.repeat(np.arange(3), 16).astype(np.int32), "groups"))
    changed.graph.node[place].input.extend(["", "groups"])
    skipped = prepare(changed).plan.skipped
    assert [(row.weight, "g_idx" in row.reason) for row in skipped] == [(name, True) for name in node.input[1:3]]
    assert len(prepare(changed).plan.layers) == 2


def test_a_bias_of_the_operator_goes_with_its_outputs() -> None:
    model = onnx.ModelProto()
    model.CopyFrom(blocks(4, False))
    names = {node.output[0]: node for node in model.graph.node}
    for node in [node for node in model.graph.node if node.op_type == "Add"]:
        product = names[node.input[0]]
        product.input.extend([""] * (5 - len(product.input)) + [node.input[1]])
        product.output[0] = node.output[0]
        model.graph.node.remove(node)
    ready = prepare(model)
    assert sum(layer.bias is not None for layer in ready.plan.layers) == 2
    same_file(ready.restored(ready.graph.model), model)
    for seed in range(3):
        masked, cut, _ = masked_and_cut(ready, seed)
        assert operators(cut) == operators(model)
        assert np.allclose(outputs(masked, feed()), outputs(cut, feed()), atol=1e-4)


def test_what_cannot_go_back_is_floats() -> None:
    model = blocks(4, False)
    found = open_packed(model)
    assert found is not None
    opened, close = found
    for node in [node for node in opened.graph.node if node.op_type == "Transpose"][:2]:
        node.op_type = "Identity"  # no neighbour that the operator can stand for
        del node.attribute[:]
        weight = next(other for other in opened.graph.node if other.output[0] == node.input[0])
        array = dequantised(model)[weight.input[0]]
        opened.graph.initializer.append(numpy_helper.from_array(np.eye(len(array), dtype=np.float32), f"{node.name}/one"))
        node.op_type = "Gemm"
        node.input[:] = [node.input[0], f"{node.name}/one"]
        node.attribute.append(helper.make_attribute("transA", 1))
    back = close(opened, {})
    onnx.checker.check_model(back, full_check=True)
    assert operators(back)["MatMulNBits"] == 1
    assert not any(node.op_type == "DequantizeLinear" or node.doc_string.startswith("relief") for node in back.graph.node)
    assert np.allclose(outputs(back, feed()), outputs(model, feed()), atol=1e-4)


def test_scales_of_blocks_grow_where_clipping_loses_more() -> None:
    rng = np.random.default_rng(0)
    integers = rng.integers(0, 16, (2, 20)).astype(np.uint8)
    scale = np.repeat(np.array([[-0.1, 0.2], [0.3, 0.1]], np.float32), (16, 4), 1)
    grid = Grid("w", TensorProto.UINT4, integers, scale, np.full((1, 1), 8), block=(1, 16))
    numbers = grid.floats()
    assert grid.fitted(numbers) is grid
    numbers[0, 17] = 4.2  # 7 steps of 0.2 are 1.4
    fitted = grid.fitted(numbers)
    assert np.allclose(fitted.scale[0, 16:], 4.2 / 7)
    assert np.array_equal(fitted.scale[0, :16], scale[0, :16])
    assert np.array_equal(fitted.scale[1], scale[1])
    assert fitted.nearest(numbers)[0, 17] == pytest.approx(4.2, rel=1e-6)
    numbers = grid.floats()
    numbers[0, 0] = 1.4  # 14 steps the other way: the scale is negative, so the end is 8 steps
    assert np.allclose(grid.fitted(numbers).scale[0, :16], -1.4 / 8)


def test_shared_zero_points_are_told_apart_when_they_must_be() -> None:
    model = onnx.ModelProto()
    model.CopyFrom(blocks(8, True))
    sizes = {node.input[1]: values(model)[node.input[2]].shape for node in model.graph.node if node.op_type == "MatMulNBits"}
    first, second = list(sizes)[:2]
    shared = np.full((64, 4), 128, np.uint8)
    model.graph.initializer.append(numpy_helper.from_array(shared[:, :3], "zeros"))
    other = np.full((48, 4), 128, np.uint8)
    assert other.size == shared[:, :3].size
    for node in model.graph.node:
        if node.op_type == "MatMulNBits" and node.input[1] in (first, second):
            node.input.append("zeros")
    ready = prepare(model)
    assert not ready.plan.skipped
    same_file(ready.restored(ready.graph.model), model)
    masked, cut = block_masked_and_cut(ready, 0)
    assert np.allclose(outputs(masked, feed()), outputs(cut, feed()), atol=1e-4)
    names = [node.input[3] for node in cut.graph.node if node.op_type == "MatMulNBits" and len(node.input) > 3]
    assert len(names) == len(set(names)) == 2
    assert {item.name for item in cut.graph.initializer} >= set(names)


def test_halves_of_bytes() -> None:
    integers = np.random.default_rng(0).integers(0, 16, (5, 7)).astype(np.uint8)
    data = packed(integers, 4)
    assert data.shape == (5, 4)
    assert data[0, 0] == integers[0, 0] + 16 * integers[0, 1]
    assert np.array_equal(unpacked(data, 4, 7), integers)
    assert np.array_equal(unpacked(packed(integers, 8), 8, 7), integers)


# -- DynamicQuantizeLSTM ----------------------------------------------------------------------------------------------------


def recurrent(directions: int = 1, opset: int = 17) -> onnx.ModelProto:
    """Two LSTMs, one behind the other, and a product."""
    net = Net(4, opset=opset)
    net.inputs.append(("x", ("n", 6, 12), TensorProto.FLOAT))
    x, width, how = net.op("Transpose", "x", perm=[1, 0, 2]), 12, {"direction": "bidirectional"} if directions == 2 else {}
    for _ in range(2):
        w, r = net.weight(directions, 32, width), net.weight(directions, 32, 8)
        bias = net.bias(directions, 64)
        x = net.op("LSTM", x, w, r, bias, outputs=3, hidden_size=8, **how)[0]
        x = net.op("Reshape", net.op("Transpose", x, perm=[0, 2, 1, 3]), net.ints(0, 0, -1))
        width = 8 * directions
    return net.model(net.op("MatMul", net.op("Transpose", x, perm=[1, 0, 2]), net.weight(width, 5)))


@functools.cache
def dynamic(directions: int, per_channel: bool, only: str | None = None, opset: int = 17) -> onnx.ModelProto:
    from onnxruntime import quantization as ort

    with tempfile.TemporaryDirectory() as folder, quiet():
        paths = Path(folder) / "a.onnx", Path(folder) / "b.onnx"
        onnx.save(recurrent(directions, opset), paths[0])
        ort.quantize_dynamic(*paths, per_channel=per_channel, op_types_to_quantize=[only] if only else None)
        model = onnx.load(paths[1])
    assert operators(model)["DynamicQuantizeLSTM"] == 2
    return model


def steps(seed: int = 0, count: int = 16) -> Any:
    return np.random.default_rng(seed).standard_normal((count, 6, 12)).astype(np.float32)


LSTMS = [(directions, per_channel) for directions in (1, 2) for per_channel in (False, True)]


@pytest.mark.parametrize(("directions", "per_channel"), LSTMS)
def test_a_quantised_lstm_comes_back_bit_for_bit(directions: int, per_channel: bool) -> None:
    model = dynamic(directions, per_channel)
    ready = prepare(model)
    assert len(ready.plan.layers) == len(find(Graph(recurrent(directions))).layers)
    same_file(ready.restored(ready.graph.model), model)
    # The operator rounds its states too, and float weights are those of the integers.
    assert np.abs(outputs(ready.graph.model, steps()) - outputs(model, steps())).max() < 0.03 * np.abs(outputs(model, steps())).max()
    wanted = Graph(recurrent(directions))
    for mine, other in zip(ready.plan.layers, find(wanted).layers, strict=True):
        have, want = mine.view.apply(ready.graph.array(mine.weight)), other.view.apply(wanted.array(other.weight))
        assert np.abs(have - want).max() < 0.02 * np.abs(want).max()


@pytest.mark.parametrize(("directions", "per_channel"), LSTMS)
def test_hidden_units_go_with_their_scales(directions: int, per_channel: bool) -> None:
    model = dynamic(directions, per_channel)
    ready, smaller = prepare(model), 0
    for seed in range(4):
        masked, cut, _ = masked_and_cut(ready, seed)
        onnx.checker.check_model(cut)
        assert operators(cut)["DynamicQuantizeLSTM"] == operators(masked)["DynamicQuantizeLSTM"] == 2
        assert np.abs(outputs(masked, steps()) - outputs(cut, steps())).max() <= 1e-5 * np.abs(outputs(masked, steps())).max()
        stored = values(cut)
        for node in cut.graph.node:
            if node.op_type == "DynamicQuantizeLSTM":
                assert stored[node.input[1]].dtype == np.int8
                rows = stored[node.input[1]].shape[2]
                smaller += rows < 32
                assert stored[node.input[8]].shape == stored[node.input[9]].shape == ((directions, rows) if per_channel else (directions,))
    result = prune(model, [{"x": steps()}], granularity="channel", keep="60%", round_to=2, samples=4, threads=1, storage="dense")
    sizes = [values(result.model)[node.input[1]].shape[2] for node in result.model.graph.node if node.op_type == "DynamicQuantizeLSTM"]
    assert len(sizes) == 2
    assert min(sizes) < 32
    assert result.report["verification"]["masked_vs_output_max_rel"] < 1e-5


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_a_quantised_lstm_of_opset_11(granularity: str) -> None:
    model = dynamic(1, False, opset=11)
    result = prune(model, [{"x": steps()}], granularity=granularity, keep="60%", round_to=2, samples=4, threads=1, storage="dense")
    rows = {row["weight"]: row["status"] for row in result.report["layers"]}
    assert [rows[node.input[slot]] for node in model.graph.node if node.op_type == "DynamicQuantizeLSTM" for slot in (1, 2)].count(
        "pruned"
    ) >= 3
    assert operators(result.model)["DynamicQuantizeLSTM"] == 2
    assert result.report["verification"]["masked_vs_output_max_rel"] < 1e-5


def with_output(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same, but for what it gives: all states of the last LSTM."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    name = [node.output[0] for node in model.graph.node if node.op_type == "DynamicQuantizeLSTM"][-1]
    del changed.graph.output[:]
    changed.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    return changed


def test_a_unit_that_nobody_reads_has_its_part_in_the_rounding_of_states() -> None:
    ready = prepare(dynamic(1, False, "LSTM"))
    r, after = (layer.weight for layer in ready.plan.layers[-2:])
    keep = {layer.weight: np.ones(layer.view.shape[:2], bool) for layer in ready.plan.layers}
    # The unit with the largest state, so that the range is its.
    states = np.abs(outputs(with_output(ready.original), steps()))
    unit = int(states.reshape(-1, 8).max(0).argmax())
    keep[r][:, unit] = keep[after][:, unit] = False
    masks = Masks(keep, {name: np.ones(len(flags), bool) for name, flags in keep.items()})
    flags = initializer_masks(ready.plan, masks)
    operation = operate(apply_weights(ready.graph.model, applied(ready.graph, flags)))
    masked, cut = ready.restored(insert(ready.graph, flags)), ready.restored(operation.model, operation.kept)
    assert np.array_equal(outputs(masked, steps()), outputs(cut, steps()))


@pytest.mark.parametrize("repair", ["none", "least-squares"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_weights_of_a_quantised_lstm_are_pruned(per_channel: bool, repair: str) -> None:
    model = dynamic(1, per_channel)
    choices: dict[str, Any] = {"granularity": "weight", "keep": "60%", "samples": 128, "threads": 1, "storage": "dense", "repair": repair}
    data = [{"x": steps(1, 128)}]
    reference, result = prune(recurrent(), data, **choices), prune(model, data, **choices)
    cosine, wanted = (next(iter(item.report["quality"]["agreement"].values()))["cosine"] for item in (result, reference))
    assert cosine == pytest.approx(wanted, abs=4e-4 if repair == "none" else 1e-4)
    pairs = zip(reference.masks.keep.values(), result.masks.keep.values(), strict=True)
    assert all((a != b).mean() <= 0.005 for a, b in pairs)
    assert result.report["verification"]["masked_vs_output_max_rel"] < 1e-5
    assert result.report["totals"]["kept_percent"] == reference.report["totals"]["kept_percent"]
    assert operators(result.model)["DynamicQuantizeLSTM"] == 2
