"""Small models with the structures that real networks are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from builders import Net
from graph_attention import layer_normalised, reduced, sizes_of
from numpy.typing import NDArray

Model = tuple[onnx.ModelProto, dict[str, NDArray[Any]]]
MAX = 2**63 - 1
T, C = 5, 8  # tokens, channels


def conv(net: Net, x: str, inputs: int, out: int, kernel: int = 3, stride: int = 1, **values: Any) -> str:
    pads = [kernel // 2] * 4
    return str(net.op("Conv", x, net.weight(out, inputs, kernel, kernel), net.bias(out), pads=pads, strides=[stride] * 2, **values))


def dense(net: Net, x: str, inputs: int, out: int) -> str:
    return str(net.op("Add", net.op("MatMul", x, net.weight(inputs, out)), net.bias(out)))


def image(build: Callable[[Net, str], str], opset: int = 17) -> Callable[[], Model]:
    """From 3 channels of 8 x 8 pixels."""

    def make() -> Model:
        net = Net(seed=3, opset=opset, ir_version=9 if opset > 18 else 8)
        x = net.input("N", 3, 8, 8)
        return net.model(build(net, x)), {x: net.rng.standard_normal((2, 3, 8, 8)).astype(np.float32)}

    return make


def text(build: Callable[[Net, str], str], opset: int = 17, positions: bool = True) -> Callable[[], Model]:
    """From T numbers of tokens, through a table of 11 and a table of positions."""

    def make() -> Model:
        net = Net(seed=4, opset=opset)
        net.inputs.append(("tokens", ("N", T), onnx.TensorProto.INT64))
        x = net.op("Gather", net.weight(11, C, prefix="table"), "tokens", axis=0)
        x = net.op("Add", x, net.weight(T, C, prefix="position")) if positions else x
        return net.model(build(net, x)), {"tokens": net.rng.integers(0, 11, (2, T))}

    return make


def heads(net: Net, x: str, count: int, size: int, order: list[int]) -> str:
    return str(net.op("Transpose", net.op("Reshape", x, net.ints(0, 0, count, size)), perm=order))


def mixed(net: Net, q: str, k: str, v: str, count: int, size: int) -> str:
    """Softmax(q k) v, heads put side by side again; k is [N, H, D, T]."""
    scores = net.op("Softmax", net.op("Mul", net.op("MatMul", q, k), net.constant(np.float32(size**-0.5))), axis=-1)
    y = net.op("Transpose", net.op("MatMul", scores, v), perm=[0, 2, 1, 3])
    return str(net.op("Reshape", y, net.ints(0, T, count * size)))


def attention(net: Net, x: str, fused: bool, count: int = 4, size: int = 3) -> str:
    inner = count * size
    if fused:
        parts = net.op("Split", dense(net, x, C, 3 * inner), net.ints(inner, inner, inner), outputs=3, axis=-1)
    else:
        parts = [dense(net, x, C, inner) for _ in range(3)]
    q, v = (heads(net, part, count, size, [0, 2, 1, 3]) for part in (parts[0], parts[2]))
    return dense(net, mixed(net, q, heads(net, parts[1], count, size, [0, 2, 3, 1]), v, count, size), inner, C)


def fused_in_five_axes(net: Net, x: str) -> str:
    """As timm exports it: [N, T, 3, H, D], queries, keys and values taken with Gather."""
    y = net.op("Reshape", dense(net, x, C, 36), net.ints(0, T, 3, 4, 3))
    y = net.op("Transpose", y, perm=[2, 0, 3, 1, 4])
    q, k, v = (net.op("Gather", y, net.constant(np.asarray(i, np.int64)), axis=0) for i in range(3))
    return dense(net, dense(net, mixed(net, q, net.op("Transpose", k, perm=[0, 1, 3, 2]), v, 4, 3), 12, C), C, 3)


def grouped_queries(net: Net, x: str) -> str:
    """Four heads of queries on two of keys and values."""
    q = heads(net, dense(net, x, C, 12), 4, 3, [0, 2, 1, 3])
    found = []
    for _ in range(2):
        y = net.op("Unsqueeze", heads(net, dense(net, x, C, 6), 2, 3, [0, 2, 1, 3]), net.ints(2))
        y = net.op("Expand", y, net.ints(1, 1, 2, 1, 1))
        found.append(net.op("Reshape", y, net.ints(0, 4, T, 3)))
    return dense(net, mixed(net, q, net.op("Transpose", found[0], perm=[0, 1, 3, 2]), found[1], 4, 3), 12, C)


def gated(net: Net, x: str, fused: bool = True) -> str:
    if fused:
        gate, value = net.op("Split", dense(net, x, C, 12), net.ints(6, 6), outputs=2, axis=-1)
    else:
        gate, value = dense(net, x, C, 6), dense(net, x, C, 6)
    return dense(net, net.op("Mul", net.op("Mul", gate, net.op("Sigmoid", gate)), value), 6, C)


def transformer(net: Net, x: str, form: int) -> str:
    """Two blocks; norms before their layers, one at the end."""
    rng = np.random.default_rng(0)
    for _ in range(2):
        x = str(net.op("Add", x, attention(net, layer_normalised(net, rng, x, C, form), form == 1)))
        x = str(net.op("Add", x, gated(net, layer_normalised(net, rng, x, C, form), form == 2)))
    return dense(net, layer_normalised(net, rng, x, C, form), C, 3)


def shuffled(net: Net, x: str) -> str:
    """Grouped convolutions with their channels shuffled between."""
    y = conv(net, net.op("Relu", conv(net, x, 3, 8)), 4, 8, group=2)
    y = net.op("Reshape", net.op("Transpose", net.op("Reshape", y, net.ints(0, 2, 4, 8, 8)), perm=[0, 2, 1, 3, 4]), net.ints(0, 8, 8, 8))
    return conv(net, conv(net, y, 4, 8, group=2), 8, 3)


def squeezed(net: Net, x: str) -> str:
    """Squeeze and excitation inside a residual block."""
    x = str(net.op("Relu", conv(net, x, 3, 8)))
    y = conv(net, net.op("Relu", conv(net, x, 8, 8)), 8, 8)
    gate = net.op("Sigmoid", conv(net, net.op("Relu", conv(net, reduced(net, "ReduceMean", y, 2, 3), 8, 4, 1)), 4, 8, 1))
    return conv(net, net.op("Add", net.op("Mul", y, gate), x), 8, 3)


def padded_shortcut(net: Net, x: str) -> str:
    """Option A of residual networks: every other pixel, and channels of zeros on both sides."""
    x = str(net.op("Relu", conv(net, x, 3, 4)))
    short = net.op("Slice", x, net.ints(0, 0), net.ints(MAX, MAX), net.ints(2, 3), net.ints(2, 2))
    short = net.op("Pad", short, net.ints(0, 2, 0, 0, 0, 2, 0, 0))
    y = conv(net, net.op("Relu", conv(net, x, 4, 6, stride=2)), 6, 8)
    return conv(net, net.op("Relu", net.op("Add", y, short)), 8, 3)


def pixel_shuffle(net: Net, x: str) -> str:
    y = conv(net, x, 3, 16)
    y = net.op("Transpose", net.op("Reshape", y, net.ints(0, 4, 2, 2, 8, 8)), perm=[0, 1, 4, 2, 5, 3])
    return conv(net, net.op("Reshape", y, net.ints(0, 4, 16, 16)), 4, 3)


def transposed(net: Net, x: str, groups: int, per_group: int) -> str:
    """A transposed convolution with groups; with one channel in each, a depthwise one."""
    y = net.op("Relu", conv(net, x, 3, 8))
    out = groups * per_group
    y = net.op("ConvTranspose", y, net.weight(8, per_group, 2, 2), net.bias(out), strides=[2, 2], group=groups)
    return conv(net, net.op("Relu", y), out, 3)


def group_norm(net: Net, x: str, at_run_time: bool) -> str:
    """As exporters write it: Reshape, InstanceNormalization, Reshape."""
    x = conv(net, x, 3, 8)
    y = net.op("Reshape", x, net.ints(0, 4, -1))
    y = net.op("InstanceNormalization", y, net.constant(np.ones(4, np.float32)), net.constant(np.zeros(4, np.float32)))
    y = net.op("Reshape", y, net.op("Shape", x) if at_run_time else net.ints(0, 8, 8, 8))
    y = net.op("Relu", net.op("Add", net.op("Mul", y, net.bias(8, 1, 1)), net.bias(8, 1, 1)))
    return conv(net, y, 8, 3)


def overlapping_norms(net: Net, x: str, form: str) -> str:
    """A small U-Net: norms over 4 groups of 8, of 12 and, where two widths are joined, of 20 channels, so that groups overlap."""

    def norm(y: str, size: int) -> str:
        if form == "operator":
            return str(net.op("Relu", net.op("GroupNormalization", y, net.bias(size), net.bias(size), num_groups=4)))
        sizes = net.op("Shape", y) if form == "at run time" else net.ints(0, size, 8, 8)
        inner = net.op("Reshape", y, net.ints(0, 4, -1))
        inner = net.op("InstanceNormalization", inner, ones, zeros)
        y = net.op("Mul", net.op("Reshape", inner, sizes), net.bias(size, 1, 1))
        return str(net.op("Relu", net.op("Add", y, net.bias(size, 1, 1))))

    # One vector of ones for all norms, as exporters that share equal numbers write it.
    ones, zeros = net.constant(np.ones(4, np.float32)), net.constant(np.zeros(4, np.float32))
    a = conv(net, norm(conv(net, x, 3, 8), 8), 8, 8)
    b = conv(net, norm(a, 8), 8, 12)
    c = conv(net, norm(b, 12), 12, 12)
    return conv(net, norm(str(net.op("Concat", a, c, axis=1)), 20), 20, 3)


def channels_last(net: Net, x: str) -> str:
    """A resized branch and a skip connection, all with channels last."""
    x = str(net.op("Transpose", net.op("Relu", conv(net, x, 3, 8)), perm=[0, 2, 3, 1]))
    small = net.op("Resize", x, "", net.constant(np.asarray([1, 0.5, 0.5, 1], np.float32)), mode="nearest")
    big = net.op("Resize", dense(net, small, 8, 8), "", "", sizes_of(net, x, "0", "1", "2", 8), mode="nearest")
    return dense(net, net.op("Concat", big, x, axis=-1), 16, 3)


def halves(net: Net, x: str) -> str:
    """A cross-stage block: half of the channels go through layers, all parts meet in a Concat."""
    y = net.op("Relu", conv(net, x, 3, 8))
    a, b = net.op("Slice", y, net.ints(0), net.ints(4), net.ints(1)), net.op("Slice", y, net.ints(4), net.ints(MAX), net.ints(1))
    c = net.op("Add", conv(net, net.op("Relu", conv(net, b, 4, 4)), 4, 4), b)
    return conv(net, net.op("Concat", a, b, c, axis=1), 12, 3)


def vision_transformer(net: Net, x: str) -> str:
    """Patches, a class token, positions, one block, the class token read."""
    y = net.op("Conv", x, net.weight(C, 3, 4, 4), net.bias(C), strides=[4, 4])
    y = net.op("Transpose", net.op("Reshape", y, net.ints(0, C, -1)), perm=[0, 2, 1])
    token = net.op("Expand", net.weight(1, 1, C, prefix="class"), sizes_of(net, x, "0", 1, 1))
    y = net.op("Add", net.op("Concat", token, y, axis=1), net.weight(1, T, C, prefix="position"))
    rng = np.random.default_rng(0)
    y = net.op("Add", y, attention(net, layer_normalised(net, rng, y, C, 0), True))
    y = net.op("Gather", layer_normalised(net, rng, y, C, 0), net.constant(np.asarray(0, np.int64)), axis=1)
    return str(net.op("Gemm", y, net.weight(C, 3), net.bias(3)))


ARCHITECTURES: dict[str, Callable[[], Model]] = {
    "attention, three layers": text(lambda net, x: dense(net, attention(net, x, False), C, 3)),
    "attention, one layer": text(lambda net, x: dense(net, attention(net, x, True), C, 3)),
    "attention, one layer, five axes": text(fused_in_five_axes),
    "attention, grouped queries": text(lambda net, x: dense(net, grouped_queries(net, x), C, 3)),
    "gated layers": text(lambda net, x: dense(net, gated(net, x), C, 3)),
    "transformer": text(lambda net, x: transformer(net, x, 0)),
    "transformer, norms with Pow": text(lambda net, x: transformer(net, x, 1), opset=13),
    "transformer, norms with Mul": text(lambda net, x: transformer(net, x, 2), opset=18),
    "transformer, mean squares": text(lambda net, x: transformer(net, x, 3), positions=False),
    "vision transformer": image(vision_transformer),
    "shuffle": image(shuffled),
    "squeeze and excitation": image(squeezed),
    "padded shortcut": image(padded_shortcut),
    "pixel shuffle": image(pixel_shuffle),
    "transposed, two groups": image(lambda net, x: transposed(net, x, 2, 3)),
    "transposed, four groups": image(lambda net, x: transposed(net, x, 4, 2)),
    "transposed, depthwise": image(lambda net, x: transposed(net, x, 8, 1)),
    "transposed, depthwise, doubled": image(lambda net, x: transposed(net, x, 8, 2)),
    "group norm": image(lambda net, x: group_norm(net, x, False)),
    "group norm, sizes at run time": image(lambda net, x: group_norm(net, x, True), opset=21),
    "overlapping norms": image(lambda net, x: overlapping_norms(net, x, "operator"), opset=21),
    "overlapping norms, in pieces": image(lambda net, x: overlapping_norms(net, x, "in pieces")),
    "overlapping norms, sizes at run time": image(lambda net, x: overlapping_norms(net, x, "at run time")),
    "channels last": image(channels_last),
    "halves": image(halves),
}
