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
from onnx import TensorProto, helper, numpy_helper
from test_quantised import masked_and_cut, operators, outputs, quiet, values

from relief_onnx import prune
from relief_onnx.graph import Graph
from relief_onnx.layers import find
from relief_onnx.pack import unpack
from relief_onnx.prepared import prepare
from relief_onnx.quantised_blocks import packed, unpacked

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
        masked, cut, _ = masked_and_cut(ready, seed)
        onnx.checker.check_model(cut)
        assert operators(masked) == operators(model)
        assert operators(cut)["MatMulNBits"] == 3
        assert np.abs(outputs(masked, feed()) - outputs(cut, feed())).max() <= 1e-5 * np.abs(outputs(masked, feed())).max()
        sizes = [[item.i for item in node.attribute if item.name == "K"][0] for node in cut.graph.node if node.op_type == "MatMulNBits"]
        assert all(size % 16 == 0 for size in sizes[1:])
        smaller += sum(sizes[1:]) < 64 + 48
    assert smaller or True
