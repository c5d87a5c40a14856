"""A small model for every row of the operator table, and for each of the forms that a row has: layer -> operator -> layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from builders import Net
from graph_attention import layer_normalised, reduced, sizes_of
from numpy.typing import NDArray

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


def fit_shape(layer: str) -> tuple[int, ...]:
    return (C, 1, 1) if layer in IMAGES else (C,)


def fit(net: Net, layer: str, *values: float) -> str:
    """A constant with one entry per channel."""
    return net.constant(np.resize(np.asarray(values, np.float32), fit_shape(layer)))


Case = tuple[tuple[str, ...], int, Callable[[Net, str, str], Any]]


def unary(operator: str, opset: int = 17, before: str | None = None, **values: Any) -> Case:
    def build(net: Net, x: str, layer: str) -> str:
        return str(net.op(operator, net.op(before, x) if before else x, **values))

    return ALL, opset, build


def some_of(net: Net, x: str, rows: tuple[int, int] = (0, 0)) -> str:
    """The first sample, or some rows of it, changed."""
    first = net.op("Slice", x, net.ints(0), net.ints(1), net.ints(0))
    return str(net.op("Sin", net.op("Slice", first, net.ints(rows[0]), net.ints(rows[1]), net.ints(2)) if any(rows) else first))


def box_of(*places: int | tuple[int, int]) -> NDArray[np.int64]:
    """Indices of every entry of a box, one number for each axis: all places up to a number, or a range."""
    lines = [np.arange(*place) if isinstance(place, tuple) else np.arange(place) for place in places]
    return np.stack(np.meshgrid(*lines, indexing="ij"), -1)


def recurrent(operator: str, gates: int) -> Case:
    def build(net: Net, x: str, layer: str) -> tuple[str, int]:
        weights = net.weight(1, gates * 5, C), net.weight(1, gates * 5, 5)
        return net.op("Squeeze", net.op(operator, x, *weights, hidden_size=5, outputs=2)[0], net.ints(1)), 5

    return ("MatMul",), 17, build


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


def pooled(net: Net, x: str, operator: str) -> Any:
    return net.op("Add", x, reduced(net, operator, net.op("Exp", x) if "Log" in operator else x, 2, 3))


def rounded(net: Net, x: str, per_channel: bool, **domain: str) -> Any:
    """To int8 and back, with a scale and zero point for all channels or for each."""
    size: tuple[int, ...] = (C,) if per_channel else ()
    grid = net.constant(net.rng.uniform(0.02, 0.05, size).astype(np.float32)), net.constant(net.rng.integers(-3, 4, size).astype(np.int8))
    return net.op("DequantizeLinear", net.op("QuantizeLinear", x, *grid, **domain), *grid, **domain)


def places(net: Net) -> Any:
    """Where to sample, made of the model's input."""
    two = net.op("Slice", net.inputs[0][0], net.ints(0), net.ints(2), net.ints(1))
    return net.op("Transpose", net.op("Tanh", two), perm=[0, 2, 3, 1])


def boxes(net: Net) -> tuple[str, str]:
    return net.constant(np.array([[0, 0, 4, 4], [1, 2, 5, 5]], np.float32)), net.ints(0, 1)


def measured(net: Net, x: str) -> Any:
    """To uint8 and back, by the range that is there; a channel without weights and bias is 0."""
    return net.op("DequantizeLinear", *net.op("DynamicQuantizeLinear", net.op("Relu", x), outputs=3))


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
    "com.microsoft.Gelu": unary("Gelu", domain="com.microsoft"),
    "com.microsoft.FastGelu": unary("FastGelu", domain="com.microsoft"),
    "com.microsoft.QuickGelu": unary("QuickGelu", domain="com.microsoft"),
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
    "QuantizeLinear": any_layer(lambda net, x, layer: rounded(net, x, False)),
    "DequantizeLinear": image(lambda net, x: rounded(net, x, True)),
    "com.microsoft.QuantizeLinear": any_layer(lambda net, x, layer: rounded(net, x, False, domain="com.microsoft")),
    "com.microsoft.DequantizeLinear": image(lambda net, x: rounded(net, x, True, domain="com.microsoft")),
    "DynamicQuantizeLinear": any_layer(lambda net, x, layer: measured(net, x)),
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
        name: image(lambda net, x, name=name: pooled(net, x, name), opset=18)
        for name in ["ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceProd",
                     "ReduceLogSum", "ReduceLogSumExp"]
    },
    "Softmax": image(lambda net, x: net.op("Softmax", x, axis=3)),
    "LogSoftmax": image(lambda net, x: net.op("LogSoftmax", x, axis=-1)),
    "Resize": image(lambda net, x: net.op("Resize", x, "", net.constant(np.asarray([1, 1, 2, 2], np.float32)), mode="nearest")),
    "Upsample": image(lambda net, x: net.op("Upsample", x, net.constant(np.asarray([1, 1, 2, 2], np.float32))), opset=9),
    "GridSample": image(lambda net, x: net.op("GridSample", x, places(net), padding_mode="border")),
    "RoiAlign": image(lambda net, x: net.op("RoiAlign", x, *boxes(net), output_height=3, output_width=3)),
    "Pad": image(lambda net, x: net.op("Pad", x, net.ints(0, 0, 1, 1, 0, 0, 0, 1), net.constant(np.float32(0.5)))),
    "Shape": image(lambda net, x: net.op("Mul", x, net.op("Cast", net.op("Gather", net.op("Shape", x), net.ints(2), axis=0), to=1))),
}  # fmt: skip


MAX = 2**63 - 1


def chosen(net: Net, x: str, mask: str) -> Any:
    """Something that a truth value per entry decides."""
    return net.op("Mul", x, net.op("Cast", mask, to=1))


def compared(net: Net, x: str, operator: str) -> Any:
    return chosen(net, x, net.op(operator, net.op("Round", x), net.op("Round", net.op("Abs", x))))


def logical(net: Net, x: str, operator: str) -> Any:
    low = net.op("Less", x, net.constant(np.float32(0.5)))
    high = net.op("Greater", x, net.constant(np.float32(-0.2)))
    return chosen(net, x, net.op(operator, low) if operator == "Not" else net.op(operator, low, high))


def cut(net: Net, x: str, start: int, end: int, axis: int, *step: int) -> Any:
    if net.opset < 10:
        return net.op("Slice", x, starts=[start], ends=[end], axes=[axis])
    return net.op("Slice", x, net.ints(start), net.ints(end), net.ints(axis), *([net.ints(*step)] if step else []))


def taken(axis: int, *indices: Any) -> Callable[[Net, str], Any]:
    return lambda net, x: net.op("Gather", x, net.constant(np.asarray(indices[0] if len(indices) == 1 else indices, np.int64)), axis=axis)


def tokens_of(net: Net, x: str) -> Any:
    """[N, C, 6, 6] or [N, C, 3, 3] as tokens [N, T, C]."""
    return net.op("Transpose", net.op("Reshape", x, net.ints(0, C, -1)), perm=[0, 2, 1])


def dense(build: Callable[[Net, str], Any], opset: int = 17) -> Case:
    """Between two dense layers over tokens [N, 4, C]."""
    return ("MatMul",), opset, lambda net, x, layer: build(net, x)


def scaled(net: Net, x: str, operator: str, constants: int, **values: Any) -> Any:
    return net.op(operator, x, *(net.constant(net.rng.uniform(0.5, 1.5, C).astype(np.float32)) for _ in range(constants)), **values)


def group_normalised(net: Net, x: str, size: int) -> Any:
    values = [net.constant(net.rng.uniform(0.5, 1.5, size).astype(np.float32)) for _ in range(2)]
    return net.op("GroupNormalization", x, *values, num_groups=4, epsilon=1e-2)


def over_channels(net: Net, x: str, operator: str) -> Any:
    """A gate from all channels."""
    return net.op("Mul", x, net.op("Sigmoid", reduced(net, operator, x, -1)))


def self_product(net: Net, x: str) -> Any:
    """Attention without layers of its own: scores of tokens, of all channels, times the tokens."""
    scores = net.op("Softmax", net.op("MatMul", x, net.op("Transpose", net.op("Tanh", x), perm=[0, 2, 1])), axis=2)
    return net.op("MatMul", scores, x)


def einsum(equation: str, outer: str = "") -> Callable[[Net, str], Any]:
    def build(net: Net, x: str) -> Any:
        y = net.op("Einsum", x, net.op("Sigmoid", x), equation=equation)
        return net.op("Einsum", y, x, equation=outer) if outer else y

    return build


def expanded(net: Net, x: str, *target: int) -> Any:
    y = reduced(net, "ReduceMean", x, 2, 3)
    return net.op("Mul", x, net.op("Expand", y, net.ints(*target) if target else net.op("Shape", x)))


def padded(net: Net, x: str, before: int, after: int, form: str) -> tuple[Any, int]:
    pads = [0, before, 0, 0, 0, after, 0, 0]
    if form == "attribute":
        y = net.op("Pad", x, pads=pads)
    elif form == "axes":
        y = net.op("Pad", x, net.ints(before, after), "", net.ints(-3))
    else:
        y = net.op("Pad", x, net.ints(*pads))
    return y, before + C + after


def reshaped(*target: int | str) -> Callable[[Net, str], Any]:
    """There and back."""

    def build(net: Net, x: str) -> Any:
        where = net.ints(*(size for size in target if isinstance(size, int)))
        if any(isinstance(size, str) for size in target):
            where = sizes_of(net, x, *target)
        return net.op("Reshape", net.op("Relu", net.op("Reshape", x, where)), net.op("Shape", x))

    return build


def blocks(net: Net, x: str, mode: str) -> tuple[Any, int]:
    return net.op("DepthToSpace", x, blocksize=2, mode=mode), C // 4


def unblocked(net: Net, x: str) -> tuple[Any, int]:
    y = net.op("Resize", x, "", net.constant(np.asarray([1, 1, 2, 2], np.float32)), mode="nearest")
    return net.op("SpaceToDepth", y, blocksize=2), 4 * C


def along_pixels(net: Net, x: str, operator: str, **values: Any) -> Any:
    return net.op(operator, x, axis=3, **values)


def looked_up(net: Net, x: str) -> Any:
    """Rows of a table, by numbers that the model computes, added to what has the same channels."""
    return net.op("Add", x, net.op("Gather", net.weight(C, C), net.op("ArgMax", net.inputs[0][0], axis=2, keepdims=0), axis=0))


def nhwc(build: Callable[[Net, str], Any]) -> Callable[[Net, str], Any]:
    return lambda net, x: net.op("Transpose", build(net, net.op("Transpose", x, perm=[0, 2, 3, 1])), perm=[0, 3, 1, 2])


def resized(net: Net, x: str, by_channels: bool) -> Any:
    sizes = sizes_of(net, x, "0", 8, 8, "3") if by_channels else sizes_of(net, x, "0", 8, 8, C)
    return net.op("Resize", x, "", "", sizes, mode="nearest")


CASES |= {
    "Mod": any_layer(lambda net, x, layer: net.op("Mod", net.op("Add", x, fit(net, layer, 1, 2, -1)), net.op("Exp", x), fmod=1)),
    "Where": any_layer(lambda net, x, layer: net.op("Where", net.op("Greater", x, fit(net, layer, 0.1, 0, -1)), x, fit(net, layer, 2, 1))),
    "Where/two branches": any_layer(lambda net, x, layer: net.op("Where", net.op("Less", x, fit(net, layer, 0.3)), net.op("Tanh", x), x)),
    "Where/stored choice": any_layer(
        lambda net, x, layer: net.op("Where", net.constant(np.resize([True, False], fit_shape(layer))), x, net.op("Neg", x))
    ),
    **{
        name: any_layer(lambda net, x, layer, name=name: compared(net, x, name))
        for name in ["Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual"]
    },
    **{name: any_layer(lambda net, x, layer, name=name: logical(net, x, name)) for name in ["And", "Or", "Xor", "Not"]},
    "IsNaN": any_layer(lambda net, x, layer: chosen(net, x, net.op("Not", net.op("IsNaN", x)))),
    "IsInf": any_layer(lambda net, x, layer: chosen(net, x, net.op("IsInf", net.op("Reciprocal", net.op("Relu", x))))),
    "GroupNormalization": image(lambda net, x: group_normalised(net, x, C), opset=21),
    "GroupNormalization/scale per group": image(lambda net, x: group_normalised(net, x, 4), opset=18),
    "LayerNormalization": dense(lambda net, x: scaled(net, x, "LayerNormalization", 2, axis=-1)),
    "LayerNormalization/positive axis, no shift": dense(lambda net, x: scaled(net, x, "LayerNormalization", 1, axis=2)),
    "LayerNormalization/pixels": image(
        lambda net, x: net.op("LayerNormalization", x, net.constant(np.linspace(0.5, 1.5, 6, dtype=np.float32)), axis=-1)
    ),
    "LayerNormalization/channels last": image(nhwc(lambda net, x: scaled(net, x, "LayerNormalization", 2, axis=-1))),
    "RMSNormalization": dense(lambda net, x: scaled(net, x, "RMSNormalization", 1, axis=-1), opset=23),
    **{
        f"{name}/channels": dense(lambda net, x, name=name: over_channels(net, x, name), opset=opset)
        for name in ["ReduceMean", "ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare"]
        for opset in [13]
    },
    "ReduceMean/channels, opset 18": dense(lambda net, x: over_channels(net, x, "ReduceMean"), opset=18),
    **{
        f"ReduceMean/{what}, opset {opset}": dense(
            lambda net, x, form=form: layer_normalised(net, np.random.default_rng(0), x, C, form), opset=opset
        )
        for form, what in [(1, "variance with Pow"), (2, "variance with Mul"), (3, "mean square")]
        for opset in [13, 18]
    },
    "MatMul": dense(self_product),
    "Einsum": dense(einsum("btc,btc->btc")),
    "Einsum/attention": dense(einsum("bqc,bkc->bqk", "bqk,bkc->bqc")),
    "Einsum/sum over channels": dense(
        lambda net, x: net.op("Mul", x, net.op("Unsqueeze", net.op("Einsum", x, net.op("Tanh", x), equation="bij,bij->bi"), net.ints(2)))
    ),
    "Slice": image(lambda net, x: (cut(net, x, 1, C, 1), C - 1)),
    "Slice/negative ends": image(lambda net, x: (cut(net, x, -6, -1, -3), 5)),
    "Slice/to the end": image(lambda net, x: (cut(net, x, 3, MAX, 1), C - 3)),
    "Slice/step 2": image(lambda net, x: (cut(net, x, 1, MAX, 1, 2), C // 2)),
    "Slice/backwards": image(lambda net, x: (cut(net, x, -1, -MAX, 1, -1), C)),
    "Slice/attributes": image(lambda net, x: (cut(net, x, 2, -1, 1), C - 3), opset=9),
    "Slice/pixels": image(lambda net, x: cut(net, x, 0, MAX, 2, 2)),
    "Gather": image(lambda net, x: (taken(1, 3, 0, 5, 5, 1)(net, x), 5)),
    "Gather/negative": image(lambda net, x: (taken(1, -1, -3, 2, 0)(net, x), 4)),
    "Gather/two axes": image(
        lambda net, x: net.op("Reshape", taken(1, [0, 4, 1, 5], [2, 6, 3, 7])(net, x), net.ints(0, C, 6, 6))
    ),
    "Gather/one": image(lambda net, x: net.op("Mul", x, net.op("Unsqueeze", taken(1, 2)(net, x), net.ints(1)))),
    "Gather/look-up": dense(looked_up),
    "Gather/tokens": dense(lambda net, x: net.op("Add", x, net.op("Unsqueeze", taken(1, 0)(net, x), net.ints(1)))),
    "Expand": image(lambda net, x: expanded(net, x, 1, 1, 6, 6)),
    "Expand/whole target": image(lambda net, x: expanded(net, x, 1, C, 6, 6)),
    "Expand/target at run time": image(lambda net, x: expanded(net, x)),
    "Expand/one for all": image(
        lambda net, x: net.op("Add", x, net.op("Expand", reduced(net, "ReduceMax", net.inputs[0][0], 1, 2, 3), net.op("Shape", x)))
    ),
    "ConstantOfShape": image(lambda net, x: net.op("Add", x, net.op("ConstantOfShape", net.op("Shape", x)))),
    "ConstantOfShape/beside": image(
        lambda net, x: (net.op("Concat", x, net.op("ConstantOfShape", net.op("Shape", x)), axis=1), 2 * C)
    ),
    "Tile": image(lambda net, x: (net.op("Tile", x, net.ints(1, 2, 1, 1)), 2 * C)),
    "Tile/pixels": image(lambda net, x: net.op("Tile", x, net.ints(1, 1, 2, 1))),
    "DepthToSpace": image(lambda net, x: blocks(net, x, "DCR")),
    "DepthToSpace/CRD": image(lambda net, x: blocks(net, x, "CRD")),
    "SpaceToDepth": image(unblocked),
    "Pad/channels": image(lambda net, x: padded(net, x, 1, 2, "input")),
    "Pad/channels, attribute": image(lambda net, x: padded(net, x, 2, 1, "attribute"), opset=10),
    "GatherND": (("MatMul",), 17, lambda net, x, layer: net.op("GatherND", x, net.constant(np.asarray([[1], [0]])))),
    "ScatterND": (("MatMul",), 17, lambda net, x, layer: net.op("ScatterND", x, net.constant(np.asarray([[1]])), some_of(net, x))),
    "ScatterND/box": image(lambda net, x: net.op("ScatterND", x, net.constant(box_of((0, 1), C, (2, 4), 6)), some_of(net, x, (4, 6)))),
    "LSTM": recurrent("LSTM", 4),
    "GRU": recurrent("GRU", 3),
    "RNN": recurrent("RNN", 1),
    "Pad/channels, axes": image(lambda net, x: padded(net, x, 1, 1, "axes"), opset=18),
    "Pad/pixels, axes": image(lambda net, x: net.op("Pad", x, net.ints(1, 0), "", net.ints(2)), opset=18),
    "ArgMax": image(lambda net, x: net.op("Mul", x, net.op("Cast", net.op("ArgMax", x, axis=2, keepdims=1), to=1))),
    "ArgMin": image(lambda net, x: net.op("Mul", x, net.op("Cast", net.op("ArgMin", x, axis=-1, keepdims=1), to=1))),
    "Softmax/before opset 13": image(lambda net, x: along_pixels(net, x, "Softmax"), opset=11),
    "Hardmax": image(lambda net, x: along_pixels(net, x, "Hardmax")),
    "LpNormalization": image(lambda net, x: along_pixels(net, net.op("Exp", x), "LpNormalization")),
    "TopK": image(lambda net, x: net.op("TopK", x, net.ints(3), axis=2, outputs=2)[0]),
    "CumSum": image(lambda net, x: net.op("CumSum", x, net.constant(np.asarray(-1, np.int64)))),
    "Reshape/0 and -1": image(reshaped(0, C, -1)),
    "Reshape/0": image(reshaped(0, 0, -1)),
    "Reshape/split": image(reshaped(0, 4, -1, 6, 6)),
    "Reshape/sizes at run time": image(reshaped("0", "1", -1)),
    "Resize/sizes": image(lambda net, x: net.op("Resize", x, "", "", net.ints(2, C, 8, 8), mode="nearest")),
    "Resize/channels last": image(
        nhwc(lambda net, x: net.op("Resize", x, "", net.constant(np.asarray([1, 2, 2, 1], np.float32)), mode="nearest"))
    ),
    "Resize/channels last, sizes": image(nhwc(lambda net, x: resized(net, x, False))),
    "Resize/channels last, sizes at run time": image(nhwc(lambda net, x: resized(net, x, True))),
    "Split/equal parts": image(
        lambda net, x: net.op("Concat", *reversed(net.op("Split", x, outputs=4, num_outputs=4, axis=1)), axis=1), opset=18
    ),
    "Split/attribute": image(
        lambda net, x: net.op("Concat", *reversed(net.op("Split", x, outputs=2, split=[3, 5], axis=1)), axis=1), opset=11
    ),
}  # fmt: skip


Model = tuple[onnx.ModelProto, dict[str, NDArray[Any]]]


def sandwich(case: str, layer: str) -> Model:
    """layer -> operator -> layer."""
    shape, build_layer = LAYERS[layer]
    _, opset, build = CASES[case]
    net = Net(seed=len(case), opset=opset, ir_version=8 if opset < 20 else 10)
    x = net.input(*shape)
    middle = build(net, build_layer(net, x, int(shape[axis_of(layer)]), C), layer)
    middle, channels = middle if isinstance(middle, tuple) else (middle, C)
    out = build_layer(net, middle, channels, 4)
    feed = {x: net.rng.standard_normal([2 if size == "N" else size for size in shape]).astype(np.float32)}
    return net.model(out), feed
