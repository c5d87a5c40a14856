"""Law: a masked model and the model that surgery makes of it compute the same; for every row of the operator table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from builders import Net
from laws import assert_same_outputs, check_mask_is_surgery, masked_and_cut

from relief_onnx.layers import LAYER_OPERATORS
from relief_onnx.ops import OPERATORS

C = 8
# A layer operator: the input's shape, and how to build it with `out` outputs on `inputs` inputs.
Build = Callable[[Net, str, int, int], str]
LAYERS: dict[str, tuple[tuple[int | str, ...], Build]] = {
    "Conv": (
        ("N", 3, 6, 6),
        lambda net, x, inputs, out: net.op("Conv", x, net.weight(out, inputs, 3, 3), net.bias(out), pads=[1, 1, 1, 1]),
    ),
    "ConvTranspose": (
        ("N", 3, 3, 3),
        lambda net, x, inputs, out: net.op("ConvTranspose", x, net.weight(inputs, out, 2, 2), net.bias(out), strides=[2, 2]),
    ),
    "Gemm": (("N", 5), lambda net, x, inputs, out: net.op("Gemm", x, net.weight(inputs, out), net.bias(out), alpha=0.5, beta=2.0)),
    "MatMul": (("N", 4, 5), lambda net, x, inputs, out: net.op("Add", net.op("MatMul", x, net.weight(inputs, out)), net.bias(out))),
}
IMAGES = ("Conv", "ConvTranspose")
ALL = tuple(LAYERS)


def axis_of(layer: str) -> int:
    return 1 if layer in ("Conv", "ConvTranspose", "Gemm") else 2


def fit(net: Net, layer: str, *values: float) -> str:
    """A constant with one entry per channel."""
    shape = (C, 1, 1) if layer in IMAGES else (C,)
    return net.constant(np.resize(np.asarray(values, np.float32), shape))


Case = tuple[tuple[str, ...], int, Callable[[Net, str, str], Any]]


def unary(operator: str, opset: int = 17, before: str | None = None, **values: Any) -> Case:
    def build(net: Net, x: str, layer: str) -> str:
        return str(net.op(operator, net.op(before, x) if before else x, **values))

    return ALL, opset, build


def image(build: Callable[[Net, str], Any], opset: int = 17) -> Case:
    return IMAGES, opset, lambda net, x, layer: build(net, x)


def any_layer(build: Callable[[Net, str, str], Any], opset: int = 17) -> Case:
    return ALL, opset, build


def normalised(net: Net, x: str, operator: str, constants: int) -> Any:
    values = [net.constant(net.rng.uniform(0.5, 1.5, C).astype(np.float32)) for _ in range(constants)]
    return net.op(operator, x, *values)


def both(net: Net, x: str, operator: str, layer: str) -> Any:
    """Two branches of one tensor that meet, one of them shifted by a constant per channel."""
    return net.op(operator, net.op("Sigmoid", net.op("Add", x, fit(net, layer, 1, 2, -1))), net.op("Sigmoid", x))


def reduced(net: Net, x: str, operator: str) -> Any:
    axes = net.op(operator, x, net.ints(2, 3), keepdims=1)
    return net.op("Add", x, axes)


SHUFFLE = (2, C // 2)
CASES: dict[str, Case] = {
    **{
        name: unary(name)
        for name in [
            "Elu", "Selu", "Celu", "Tanh", "Softsign", "HardSwish", "Erf", "Neg", "Floor", "Ceil", "Round", "Sign", "Sin", "Cos", "Atan",
            "Relu", "Sigmoid", "HardSigmoid", "Softplus", "Exp", "Abs", "Sinh", "Cosh", "Asinh", "Shrink", "ThresholdedRelu",
        ]
    },
    **{name: unary(name, before="Sigmoid") for name in ["Log", "Reciprocal", "Sqrt", "Asin", "Acos", "Tan", "Atanh"]},
    "LeakyRelu": unary("LeakyRelu", alpha=0.3),
    "Mish": unary("Mish", opset=18),
    "Gelu": unary("Gelu", opset=20),
    "Swish": unary("Swish", opset=24),
    "Acosh": any_layer(lambda net, x, layer: net.op("Acosh", net.op("Exp", net.op("Abs", x)))),
    "Clip": any_layer(lambda net, x, layer: net.op("Clip", x, net.constant(np.float32(-0.3)), net.constant(np.float32(0.4)))),
    "Cast": any_layer(lambda net, x, layer: net.op("Cast", net.op("Cast", x, to=11), to=1)),
    "Add": any_layer(lambda net, x, layer: both(net, x, "Add", layer)),
    "Sub": any_layer(lambda net, x, layer: both(net, x, "Sub", layer)),
    "Div": any_layer(lambda net, x, layer: both(net, x, "Div", layer)),
    "Pow": any_layer(lambda net, x, layer: both(net, x, "Pow", layer)),
    "Max": any_layer(lambda net, x, layer: both(net, x, "Max", layer)),
    "Min": any_layer(lambda net, x, layer: both(net, x, "Min", layer)),
    "Sum": any_layer(lambda net, x, layer: both(net, x, "Sum", layer)),
    "Mean": any_layer(lambda net, x, layer: both(net, x, "Mean", layer)),
    "Mul": any_layer(lambda net, x, layer: net.op("Mul", net.op("Mul", x, fit(net, layer, 2, 0, -1)), net.op("Sigmoid", x))),
    "PRelu": any_layer(lambda net, x, layer: net.op("PRelu", x, fit(net, layer, 0.1, 0.5, 0.0))),
    "BatchNormalization": (
        (*IMAGES, "Gemm"),
        17,
        lambda net, x, layer: normalised(net, x, "BatchNormalization", 4),
    ),
    "InstanceNormalization": image(lambda net, x: normalised(net, x, "InstanceNormalization", 2)),
    "Identity": unary("Identity"),
    "Dropout": unary("Dropout"),
    "MaxPool": image(lambda net, x: net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2], pads=[1, 1, 1, 1])),
    "AveragePool": image(lambda net, x: net.op("AveragePool", x, kernel_shape=[2, 2], pads=[1, 1, 1, 1], count_include_pad=1)),
    "LpPool": image(lambda net, x: net.op("LpPool", x, kernel_shape=[2, 2], p=2)),
    "GlobalAveragePool": image(lambda net, x: net.op("GlobalAveragePool", x)),
    "GlobalMaxPool": image(lambda net, x: net.op("GlobalMaxPool", x)),
    "GlobalLpPool": image(lambda net, x: net.op("GlobalLpPool", x)),
    "Transpose": image(lambda net, x: net.op("Transpose", net.op("Relu", net.op("Transpose", x, perm=[0, 2, 3, 1])), perm=[0, 3, 1, 2])),
    "Reshape": image(
        lambda net, x: net.op(
            "Reshape",
            net.op("Transpose", net.op("Reshape", x, net.ints(0, *SHUFFLE, 6, 6)), perm=[0, 2, 1, 3, 4]),
            net.ints(0, C, 6, 6),
        )
    ),
    "Flatten": image(
        lambda net, x: net.op(
            "Unsqueeze",
            net.op("Unsqueeze", net.op("Gemm", net.op("Flatten", x), net.weight(C * 36, C), net.bias(C)), net.ints(2)),
            net.ints(3),
        )
    ),
    "Squeeze": image(lambda net, x: net.op("Unsqueeze", net.op("Squeeze", net.op("GlobalMaxPool", x), net.ints(2, 3)), net.ints(2, 3))),
    "Unsqueeze": any_layer(lambda net, x, layer: net.op("Squeeze", net.op("Relu", net.op("Unsqueeze", x, net.ints(1))), net.ints(1))),
    "Concat": any_layer(
        lambda net, x, layer: net.op(
            "Add",
            *net.op("Split", net.op("Concat", net.op("Relu", x), x, axis=axis_of(layer)), net.ints(C, C), outputs=2, axis=axis_of(layer)),
        )
    ),
    "Split": any_layer(
        lambda net, x, layer: net.op(
            "Concat",
            *reversed(net.op("Split", x, net.ints(C // 4, C // 4, C // 2), outputs=3, axis=axis_of(layer))),
            axis=axis_of(layer),
        )
    ),
    **{
        name: image(lambda net, x, name=name: reduced(net, x, name), opset=18)
        for name in ["ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare"]
    },
    "Softmax": image(lambda net, x: net.op("Softmax", x, axis=3)),
    "LogSoftmax": image(lambda net, x: net.op("LogSoftmax", x, axis=-1)),
    "LayerNormalization": image(
        lambda net, x: net.op("LayerNormalization", x, net.constant(np.linspace(0.5, 1.5, 6, dtype=np.float32)), axis=-1)
    ),
    "Resize": image(lambda net, x: net.op("Resize", x, "", net.constant(np.asarray([1, 1, 2, 2], np.float32)), mode="nearest")),
    "Upsample": image(lambda net, x: net.op("Upsample", x, net.constant(np.asarray([1, 1, 2, 2], np.float32))), opset=9),
    "Pad": image(lambda net, x: net.op("Pad", x, net.ints(0, 0, 1, 1, 0, 0, 0, 1), net.constant(np.float32(0.5)))),
    "Shape": image(lambda net, x: net.op("Mul", x, net.op("Cast", net.op("Gather", net.op("Shape", x), net.ints(2), axis=0), to=1))),
}  # fmt: skip


def test_every_row_of_the_operator_table_has_a_case() -> None:
    assert set(CASES) == set(OPERATORS)
    assert set(LAYERS) == set(LAYER_OPERATORS)


def sandwich(operator: str, layer: str) -> tuple[Any, dict[str, Any]]:
    """layer -> operator -> layer."""
    shape, build_layer = LAYERS[layer]
    _, opset, build = CASES[operator]
    net = Net(seed=len(operator), opset=opset, ir_version=8 if opset < 20 else 10)
    x = net.input(*shape)
    inputs = int(shape[axis_of(layer)])
    middle = build(net, build_layer(net, x, inputs, C), layer)
    out = build_layer(net, middle, C, 4)
    feed = {x: net.rng.standard_normal([2 if size == "N" else size for size in shape]).astype(np.float32)}
    return net.model(out), feed


@pytest.mark.parametrize(("operator", "layer"), [(operator, layer) for operator, case in CASES.items() for layer in case[0]])
def test_mask_is_surgery(operator: str, layer: str) -> None:
    model, feed = sandwich(operator, layer)
    removed = 0
    for seed in range(3):
        removed += check_mask_is_surgery(model, feed, np.random.default_rng(seed)).units_removed
    assert removed > 0  # no case of the table is a barrier


def test_the_law_can_fail() -> None:
    model, feed = sandwich("Relu", "Conv")
    masked, operation = masked_and_cut(model, np.random.default_rng(0))
    name = next(item.name for item in operation.model.graph.initializer if len(item.dims) == 4)
    for item in operation.model.graph.initializer:
        if item.name == name:
            item.raw_data = bytes(np.frombuffer(item.raw_data, np.float32) * np.float32(1.001))
    with pytest.raises(AssertionError, match="differs by"):
        assert_same_outputs(masked, operation.model, feed, 1e-5)
