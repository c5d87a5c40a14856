"""Single nodes against onnxruntime: earlier versions of operators (ONNX's node tests have the latest), modes of Resize, fused operators."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from onnx import ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper

from relief_onnx.errors import ModelError
from relief_onnx.interpreter import Network
from relief_onnx.session import Session

MICROSOFT = "com.microsoft"


def values(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ints(*numbers: int) -> Any:
    return np.array(numbers, np.int64)


def one(number: float) -> Any:
    return np.array(number, np.float32)


def node_model(
    operator: str, opset: int, inputs: tuple[Any, ...], attributes: dict[str, Any], outputs: int = 1, constants: bool = True
) -> ModelProto:
    """One node. The first input is fed, the others are constants where `constants`; None leaves one out."""
    domain = MICROSOFT if operator.startswith(MICROSOFT) else ""
    names = ["" if value is None else f"x{place}" for place, value in enumerate(inputs)]
    node = helper.make_node(operator.rpartition(".")[2], names, [f"y{place}" for place in range(outputs)], domain=domain, **attributes)
    fixed = [numpy_helper.from_array(value, f"x{place}") for place, value in enumerate(inputs) if value is not None and place and constants]
    open_ones = inputs[:1] if constants else inputs
    graph = helper.make_graph(
        [node],
        operator.rpartition(".")[2],
        [
            helper.make_tensor_value_info(f"x{place}", helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for place, value in enumerate(open_ones)
            if value is not None
        ],
        [ValueInfoProto(name=f"y{place}") for place in range(outputs)],
        fixed,
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def check(
    operator: str, opset: int, inputs: tuple[Any, ...], attributes: dict[str, Any], outputs: int = 1, tolerance: float = 2e-5
) -> None:
    for constants in (True, False):
        model = node_model(operator, opset, inputs, attributes, outputs, constants)
        given = {f"x{place}": value for place, value in enumerate(inputs) if value is not None and (not place or not constants)}
        expected = Session(model, threads=1).run(given)
        network = Network(model)
        with torch.no_grad():
            found = [
                value.numpy() for value in network({name: torch.from_numpy(np.array(value)) for name, value in given.items()}).values()
            ]
        for a, b in zip(expected, found, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert np.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True), np.abs(a.astype(float) - b).max()


def in_groups(
    sizes: tuple[int, int, int, int, int], past: int = 0, lengths: tuple[int, ...] = (), turned: int = 16, **attributes: Any
) -> tuple[Any, ...]:
    """GroupQueryAttention. sizes: batch, tokens, heads, groups and size of a head; lengths: of the samples, less one."""
    batch, tokens, heads, groups, size = sizes
    inputs = [values(batch, tokens, count * size, seed=seed) for seed, count in enumerate((heads, groups, groups))]
    inputs += [values(batch, groups, past, size, seed=seed) if past else None for seed in (3, 4)]
    total = past + tokens
    inputs += [np.array(lengths or [total - 1] * batch, np.int32), np.array(total, np.int32)]
    if "do_rotary" in attributes:
        inputs += [wave(values(9, turned // 2)) for wave in (np.cos, np.sin)]
    return f"{MICROSOFT}.GroupQueryAttention", 17, tuple(inputs), {"num_heads": heads, "kv_num_heads": groups, **attributes}, 3


X = values(2, 4, 5, 6)
CASES: dict[str, tuple[Any, ...]] = {
    # operator, opset, inputs, attributes, outputs
    "softmax over all behind": ("Softmax", 11, (X,), {"axis": 2}),
    "softmax of axis 0": ("Softmax", 9, (X,), {"axis": 0}),
    "softmax from the end": ("Softmax", 11, (X,), {"axis": -1}),
    "logsoftmax": ("LogSoftmax", 7, (X,), {}),
    "hardmax": ("Hardmax", 11, (X,), {"axis": 1}),
    "clip by attributes": ("Clip", 7, (X,), {"min": -0.5, "max": 0.25}),
    "clip below": ("Clip", 11, (X, one(-0.1)), {}),
    "clip above": ("Clip", 12, (X, None, one(0.1)), {}),
    "slice by attributes": ("Slice", 9, (X,), {"axes": [1, 3], "starts": [1, -4], "ends": [3, 9223372036854775807]}),
    "slice by inputs": ("Slice", 10, (X, ints(1, -1), ints(3, -10), ints(1, 3), ints(1, -2)), {}),
    "pad by attributes": ("Pad", 7, (X,), {"mode": "reflect", "pads": [0, 0, 2, 1, 0, 0, 1, 3]}),
    "pad with a value": ("Pad", 10, (X,), {"pads": [0, 1, 0, 0, 0, 0, 0, 2], "value": 3.5}),
    "pad by inputs": ("Pad", 11, (X, ints(0, 0, -1, 1, 0, 0, 1, -2), one(2)), {}),
    "pad of axes": ("Pad", 19, (X, ints(2, 1, 3, 0), None, ints(3, 1)), {"mode": "wrap"}),
    "squeeze by attribute": ("Squeeze", 11, (values(1, 3, 1, 2),), {"axes": [0, -2]}),
    "squeeze by input": ("Squeeze", 13, (values(1, 3, 1, 2), ints(2)), {}),
    "squeeze all": ("Squeeze", 11, (values(1, 3, 1, 2),), {}),
    "unsqueeze by attribute": ("Unsqueeze", 11, (values(3, 2),), {"axes": [0, 3]}),
    "unsqueeze by input": ("Unsqueeze", 13, (values(3, 2), ints(-1, 0)), {}),
    "split by attribute": ("Split", 11, (X,), {"axis": -1, "split": [1, 2, 3]}, 3),
    "split evenly": ("Split", 7, (X,), {"axis": 1}, 2),
    "split by input": ("Split", 13, (X, ints(1, 3)), {"axis": 1}, 2),
    "split unevenly": ("Split", 18, (X,), {"axis": 2, "num_outputs": 2}, 2),
    "sum by attribute": ("ReduceSum", 11, (X,), {"axes": [1, -1], "keepdims": 0}),
    "sum by input": ("ReduceSum", 13, (X, ints(1, -1)), {"keepdims": 0}),
    "sum over none": ("ReduceSum", 13, (X, ints()), {"noop_with_empty_axes": 1}),
    "mean by attribute": ("ReduceMean", 7, (X,), {"axes": [2]}),
    "mean by input": ("ReduceMean", 18, (X, ints(2)), {}),
    "log of sums": ("ReduceLogSumExp", 13, (X,), {"axes": [1, 2]}),
    "upsample by attribute": ("Upsample", 7, (X,), {"mode": "nearest", "scales": [1.0, 1.0, 2.0, 3.0]}),
    "upsample by input": ("Upsample", 9, (X, np.array([1, 1, 2, 1.5], np.float32)), {"mode": "linear"}),
    "resize 10": ("Resize", 10, (X, np.array([1, 1, 0.6, 1.5], np.float32)), {"mode": "nearest"}),
    "resize 10 linear": ("Resize", 10, (X, np.array([1, 1, 2, 0.5], np.float32)), {"mode": "linear"}),
    "top k by attribute": ("TopK", 7, (X,), {"k": 3, "axis": 2}, 2),
    "top k by input": ("TopK", 10, (X, ints(2)), {}, 2),
    "smallest k": ("TopK", 11, (X, ints(2)), {"largest": 0, "axis": 1}, 2),
    "dropout 7": ("Dropout", 7, (X,), {"ratio": 0.3}),
    "dropout 12": ("Dropout", 12, (X, one(0.3)), {}, 2),
    "batch norm 7": ("BatchNormalization", 7, (X, *(values(4, seed=k) for k in (1, 2, 3)), np.abs(values(4))), {"momentum": 0.8}),
    "batch norm 9": ("BatchNormalization", 9, (X, *(values(4, seed=k) for k in (1, 2, 3)), np.abs(values(4))), {}),
    "batch norm 14": ("BatchNormalization", 14, (X, *(values(4, seed=k) for k in (1, 2, 3)), np.abs(values(4))), {}),
    "group norm 18": ("GroupNormalization", 18, (X, values(2), values(2, seed=1)), {"num_groups": 2}),
    "group norm 21": ("GroupNormalization", 21, (X, values(4), values(4, seed=1)), {"num_groups": 2}),
    "layer norm": ("LayerNormalization", 17, (X, values(5, 6), values(5, 6, seed=1)), {"axis": 2}),
    "prelu": ("PRelu", 7, (X, values(4, 1, 1)), {}),
    "gemm 7": ("Gemm", 7, (values(3, 4), values(5, 4), values(5)), {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    "gemm without bias": ("Gemm", 11, (values(4, 3), values(4, 5)), {"transA": 1}),
    "gemm with a matrix": ("Gemm", 13, (values(3, 4), values(4, 5), values(3, 1)), {}),
    "scatter": ("Scatter", 9, (values(3, 3), np.array([[1, 0, 2]], np.int64), values(1, 3)), {"axis": 0}),
    "scatter added": (
        "ScatterElements",
        16,
        (values(3, 3), np.array([[1, -1, 1]], np.int64), values(1, 3)),
        {"axis": 1, "reduction": "add"},
    ),
    "gather below 0": ("Gather", 11, (X, np.array([[-1, 0]], np.int64)), {"axis": 1}),
    "max pool 8": ("MaxPool", 8, (X,), {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1], "strides": [2, 1]}, 2),
    "max pool, ceil": ("MaxPool", 10, (X,), {"kernel_shape": [2, 3], "strides": [2, 2], "ceil_mode": 1, "dilations": [1, 2]}),
    "max pool, same": ("MaxPool", 12, (X,), {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_LOWER"}),
    "average pool 7": ("AveragePool", 7, (X,), {"kernel_shape": [3, 3], "pads": [1, 1, 0, 1], "strides": [2, 1]}),
    "average pool, counted": ("AveragePool", 10, (X,), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 0], "count_include_pad": 1}),
    "average pool, dilated": ("AveragePool", 19, (X,), {"kernel_shape": [2, 2], "dilations": [2, 3]}),
    "lp pool": ("LpPool", 11, (X,), {"kernel_shape": [2, 2], "p": 3, "strides": [2, 2]}),
    "conv, same": ("Conv", 11, (X, values(3, 4, 3, 2)), {"auto_pad": "SAME_UPPER", "strides": [2, 1]}),
    "conv, uneven pads": ("Conv", 7, (X, values(6, 2, 2, 2), values(6)), {"group": 2, "pads": [0, 1, 2, 0]}),
    "conv of a line": ("Conv", 11, (values(2, 4, 9), values(3, 4, 3)), {"dilations": [2], "pads": [2, 2]}),
    "conv of a volume": ("Conv", 11, (values(1, 2, 4, 5, 6), values(3, 2, 2, 2, 2)), {}),
    "conv transpose": (
        "ConvTranspose",
        11,
        (X, values(4, 3, 3, 3), values(3)),
        {"strides": [2, 2], "pads": [1, 0, 0, 1], "output_padding": [1, 0]},
    ),
    "conv transpose, shape": ("ConvTranspose", 11, (X, values(4, 3, 3, 3), values(3)), {"strides": [2, 2], "output_shape": [10, 13]}),
    "conv transpose, groups": ("ConvTranspose", 7, (X, values(4, 2, 3, 2)), {"group": 2, "dilations": [2, 1], "pads": [1, 1, 1, 1]}),
    "conv transpose, same": ("ConvTranspose", 11, (X, values(4, 3, 3, 3)), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    "lrn": ("LRN", 13, (X,), {"size": 3, "alpha": 0.1}),
    "one hot": ("OneHot", 11, (ints(0, 7, -2, 3), ints(5), np.array([0.5, 2], np.float32)), {"axis": 0}),
    "depth to space": ("DepthToSpace", 7, (X,), {"blocksize": 2}),
    "flatten": ("Flatten", 9, (X,), {"axis": 3}),
    "einsum": ("Einsum", 12, (values(2, 3, 4), values(2, 4, 5)), {"equation": "...ij,...jk->...ki"}),
    "cumulative sum": ("CumSum", 11, (X, np.array(-1)), {"exclusive": 1, "reverse": 1}),
    "argmax, last": ("ArgMax", 12, (np.round(X),), {"axis": 3, "select_last_index": 1, "keepdims": 0}),
    "dequantize per axis": (
        "DequantizeLinear",
        13,
        (np.arange(-6, 6, dtype=np.int8).reshape(3, 4), np.abs(values(3)), np.array([1, 0, -1], np.int8)),
        {"axis": 0},
    ),
    "fused gelu": (f"{MICROSOFT}.Gelu", 17, (X,), {}),
    "fast gelu": (f"{MICROSOFT}.FastGelu", 17, (X, values(6)), {}),
    "bias gelu": (f"{MICROSOFT}.BiasGelu", 17, (X, values(6)), {}),
    "quick gelu": (f"{MICROSOFT}.QuickGelu", 17, (X,), {"alpha": 1.5}),
    "fused matmul": (f"{MICROSOFT}.FusedMatMul", 17, (values(2, 3, 4), values(2, 5, 4)), {"alpha": 0.5, "transB": 1}),
    "fused conv": (
        f"{MICROSOFT}.FusedConv",
        17,
        (X, values(3, 4, 3, 3), values(3)),
        {"activation": "LeakyRelu", "activation_params": [0.2]},
    ),
    "fused gemm": (f"{MICROSOFT}.FusedGemm", 17, (values(3, 4), values(4, 5), values(5)), {"activation": "Relu"}),
    "skip layer norm": (
        f"{MICROSOFT}.SkipLayerNormalization",
        17,
        (values(2, 3, 8), values(2, 3, 8, seed=1), values(8), values(8, seed=2), values(8, seed=3)),
        {},
    ),
    "embedding": (
        f"{MICROSOFT}.EmbedLayerNormalization",
        17,
        (
            np.array([[1, 3, 0]], np.int32),
            np.array([[0, 1, 1]], np.int32),
            *(values(rows, 8, seed=rows) for rows in (5, 4, 2)),
            values(8),
            values(8, seed=9),
        ),
        {},
        2,
    ),
    "fused attention": (
        f"{MICROSOFT}.Attention",
        17,
        (values(2, 3, 8), values(8, 24, seed=1), values(24), np.array([3, 2], np.int32)),
        {"num_heads": 2},
    ),
    "causal fused attention": (
        f"{MICROSOFT}.Attention",
        17,
        (values(2, 3, 8), values(8, 24, seed=1), values(24)),
        {"num_heads": 4, "unidirectional": 1},
    ),
    "attention with a past": (
        f"{MICROSOFT}.MultiHeadAttention",
        17,
        (
            *(values(2, 3, 8, seed=seed) for seed in range(3)),
            values(24),
            None,
            None,
            values(2, 2, 4, 4, seed=5),
            values(2, 2, 4, 4, seed=6),
        ),
        {"num_heads": 2},
        3,
    ),
    "attention in groups": in_groups((2, 3, 4, 2, 8)),
    "attention in groups, samples of several lengths": in_groups((2, 1, 4, 2, 8), past=3, lengths=(3, 2), local_window_size=2),
    "attention in groups, softcap": in_groups((2, 3, 4, 2, 8), softcap=0.5),
    "attention in groups, rotary": in_groups((1, 2, 4, 1, 16), past=3, do_rotary=1),
    "attention in groups, a part of each head turned": in_groups((1, 2, 4, 2, 32), do_rotary=1, turned=16),
    "attention in groups, rotary by neighbours": in_groups((2, 3, 2, 1, 16), do_rotary=1, rotary_interleaved=1, scale=0.3),
    "embedding of integers": (
        f"{MICROSOFT}.QEmbedLayerNormalization",
        17,
        (
            np.array([[1, 3, 0]], np.int32),
            np.array([[0, 1, 1]], np.int32),
            *(np.random.default_rng(rows).integers(0, 255, (rows, 8)).astype(np.uint8) for rows in (5, 4, 2)),
            *(np.random.default_rng(seed).integers(0, 255, 8).astype(np.uint8) for seed in (8, 9)),
            np.array([[1, 1, 0]], np.int32),
            *(np.array(scale, np.float32) for scale in (0.02, 0.01, 0.03, 0.01, 0.005)),
            *(np.array(zero, np.uint8) for zero in (120, 130, 100, 7, 90)),
        ),
        {},
        2,
    ),
    "attention of heads": (
        f"{MICROSOFT}.MultiHeadAttention",
        17,
        (values(2, 3, 8), values(2, 5, 8, seed=1), values(2, 5, 8, seed=2), values(24)),
        {"num_heads": 2},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_single_nodes(case: str) -> None:
    check(*CASES[case])


SIZES = {"up": (9, 11), "down": (3, 4), "mixed": (4, 15)}
COORDINATES = ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric")


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("by", ["sizes", "scales"])
def test_resize_in_all_modes(coordinates: str, by: str) -> None:
    """Two spatial axes, up and down, by length or by scale."""
    for mode, size in itertools.product(("nearest", "linear", "cubic"), SIZES.values()):
        attributes = {"mode": mode, "coordinate_transformation_mode": coordinates}
        scales = np.array([1, 1, size[0] / 5, size[1] / 6], np.float32)
        target = (None, None, ints(2, 4, *size)) if by == "sizes" else (None, scales)
        roundings = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
        if coordinates == "half_pixel_symmetric":  # here some places are whole numbers up to the last bit, and floor and ceil see that bit
            roundings = roundings[:2]
        for rounding in roundings if mode == "nearest" else roundings[:1]:
            check("Resize", 19, (X, *target), attributes | ({"nearest_mode": rounding} if mode == "nearest" else {}))
        if mode == "cubic":
            check("Resize", 19, (X, *target), attributes | {"exclude_outside": 1, "cubic_coeff_a": -0.5})


@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_resize_with_antialiasing(mode: str) -> None:
    check("Resize", 19, (X, None, None, ints(2, 4, 3, 2)), {"mode": mode, "antialias": 1, "exclude_outside": 1})


def test_resize_of_a_part() -> None:
    roi = np.array([0, 0, 0.2, -0.1, 1, 1, 0.9, 1.3], np.float32)
    attributes = {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 7.0}
    check("Resize", 19, (X, roi, None, ints(2, 4, 6, 7)), attributes)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize(("operator", "gates", "states"), [("RNN", 1, 1), ("GRU", 3, 1), ("LSTM", 4, 2)])
@pytest.mark.parametrize("opset", [7, 14])
def test_recurrent_operators(operator: str, gates: int, states: int, direction: str, opset: int) -> None:
    """With biases, states at the start, and lengths of their own (only without those torch's own kernels can run); GRU in both forms."""
    ways, hidden, features = 2 if direction == "bidirectional" else 1, 3, 4
    inputs = [values(5, 2, features), values(ways, gates * hidden, features, seed=1), values(ways, gates * hidden, hidden, seed=2)]
    inputs += [values(ways, 2 * gates * hidden, seed=3), np.array([5, 3], np.int32)]
    inputs += [values(ways, 2, hidden, seed=4 + state) for state in range(states)]
    for more in ({}, {"linear_before_reset": 1}) if operator == "GRU" else ({},):
        check(operator, opset, tuple(inputs), {"hidden_size": hidden, "direction": direction, **more}, 1 + states)
        check(operator, opset, (*inputs[:4], None, *inputs[5:]), {"hidden_size": hidden, "direction": direction, **more}, 1 + states)
        check(operator, opset, tuple(inputs[:3]), {"hidden_size": hidden, "direction": direction, **more}, 1 + states)


def test_lstm_with_peepholes_and_other_activations() -> None:
    inputs = (values(5, 2, 4), values(1, 12, 4, seed=1), values(1, 12, 3, seed=2), values(1, 24), None, None, None, values(1, 9, seed=5))
    check("LSTM", 14, inputs, {"hidden_size": 3, "activations": ["HardSigmoid", "Softsign", "Relu"]}, 3)
    check("LSTM", 14, inputs[:4], {"hidden_size": 3, "clip": 0.4}, 3)


def test_what_a_fused_operator_asks_for_and_is_not_there_is_refused() -> None:
    inputs = (values(2, 3, 8), values(8, 24), values(24))
    with pytest.raises(ModelError, match=r"operator Attention of domain com.microsoft, opset 1, cannot be run in torch \(do_rotary\)"):
        Network(node_model(f"{MICROSOFT}.Attention", 17, inputs, {"num_heads": 2, "do_rotary": 1}))


def test_types_of_numbers_are_those_of_onnxruntime() -> None:
    for kind in (np.int32, np.int64):
        a, b = np.array([-7, 7, 5], kind), np.array([2, -2, 3], kind)
        for operator in ("Add", "Div", "Mod", "Mul", "Pow", "Max"):
            check(operator, 15, (a, np.abs(b) if operator == "Pow" else b), {})
    check("Cast", 13, (X,), {"to": TensorProto.INT32})
