"""Steps for random graphs: layers, activations, blocks and layouts."""

from __future__ import annotations

from typing import Any

import numpy as np
from builders import Net
from graph_pool import STEPS, Pool, Shape, channels, conv_weight, maybe_bias, step


@step(4)
def conv(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    n, c, h, w = shape
    out, kernel = channels(rng), int(rng.choice([1, 3]))
    pad = int(rng.choice([0, 1])) if kernel == 3 else 0
    if min(h, w) + 2 * pad < kernel:
        return
    stride = int(rng.choice([1, 1, 2]))
    groups = int(rng.choice([g for g in (1, 1, 2, 3) if c % g == 0 and out % g == 0]))
    weight = conv_weight(net, rng, out, c // groups, kernel, kernel)
    y = net.op("Conv", x, weight, *maybe_bias(net, rng, out), pads=[pad] * 4, strides=[stride] * 2, group=groups)
    pool.add(y, n, out, (h + 2 * pad - kernel) // stride + 1, (w + 2 * pad - kernel) // stride + 1)


STEPS += [conv, conv]


@step(4)
def depthwise(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    n, c, h, w = shape
    times = int(rng.choice([1, 1, 2]))
    y = net.op("Conv", x, net.weight(c * times, 1, 3, 3), *maybe_bias(net, rng, c * times), pads=[1] * 4, group=c)
    pool.add(y, n, c * times, h, w)


@step(4)
def conv_transpose(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    n, c, h, w = shape
    groups = int(rng.choice([g for g in (1, 2) if c % g == 0]))
    out = int(rng.choice([2, 4])) * groups
    if h > 8:
        return
    y = net.op("ConvTranspose", x, net.weight(c, out // groups, 2, 2), *maybe_bias(net, rng, out), strides=[2, 2], group=groups)
    pool.add(y, n, out, 2 * h, 2 * w)


@step(4)
def shared_conv(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    n, c, h, w = shape
    out = channels(rng)
    weight, bias = net.weight(out, c, 1, 1), net.bias(out)
    twin = pool.pick(rng, 4, shape)
    for name in {x: None, twin[0] if twin else x: None}:
        pool.add(net.op("Conv", name, weight, bias), n, out, h, w)


@step(4)
def norm(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    values = [net.constant(rng.uniform(0.5, 1.5, shape[1]).astype(np.float32)) for _ in range(4)]
    whole = rng.random() < 0.85
    pool.add(net.op("BatchNormalization", x, *values) if whole else net.op("InstanceNormalization", x, *values[:2]), *shape)


@step(None)
def activation(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    names = ["Relu", "Relu", "LeakyRelu", "Sigmoid", "Tanh", "Softplus", "Abs", "Neg", "Identity", "HardSigmoid", "Erf", "Elu"]
    pool.add(net.op(str(rng.choice(names)), x), *shape)


@step(None)
def swish(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    pool.add(net.op("Mul", x, net.op("Sigmoid", x)), *shape)


@step(4)
def prelu(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    size = shape[1] if rng.random() < 0.7 else 1
    pool.add(net.op("PRelu", x, net.constant(rng.uniform(0.1, 0.5, (size, 1, 1)).astype(np.float32))), *shape)


@step(4)
def pool_window(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    n, c, h, w = shape
    if min(h, w) >= 2:
        y = net.op(str(rng.choice(["MaxPool", "AveragePool"])), x, kernel_shape=[2, 2], strides=[2, 2])
        pool.add(y, n, c, h // 2, w // 2)


@step(4)
def global_pool(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    pool.add(net.op(str(rng.choice(["GlobalAveragePool", "GlobalMaxPool"])), x), *shape[:2], 1, 1)


@step(None)
def concat(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    axis = int(rng.integers(1, len(shape))) if rng.random() < 0.3 else 1
    fits = [
        (name, other)
        for name, other in pool.tensors.items()
        if len(other) == len(shape) and all(a == b for i, (a, b) in enumerate(zip(shape, other, strict=True)) if i != axis)
    ]
    other, dims = fits[rng.integers(len(fits))]
    total = shape[axis] + dims[axis]
    if total <= 32:
        order = [x, other] if rng.random() < 0.5 else [other, x]
        pool.add(
            net.op("Concat", *order, axis=axis - (len(shape) if net.opset >= 11 and rng.random() < 0.3 else 0)),
            *shape[:axis],
            total,
            *shape[axis + 1 :],
        )


@step(None)
def split(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    if len(shape) < 2 or shape[1] < 2:
        return
    first = int(rng.integers(1, shape[1]))
    sizes = (first, shape[1] - first)
    given: dict[str, Any] = {"split": list(sizes)} if net.opset < 13 else {}
    inputs = [x] if net.opset < 13 else [x, net.ints(*sizes)]
    for name, size in zip(net.op("Split", *inputs, outputs=2, axis=1, **given), sizes, strict=True):
        pool.add(name, shape[0], size, *shape[2:])


@step(None)
def even_split(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    if len(shape) < 2 or shape[1] % 2:
        return
    given = {"num_outputs": 2} if net.opset >= 18 else {}
    for name in net.op("Split", x, outputs=2, axis=1, **given):
        pool.add(name, shape[0], shape[1] // 2, *shape[2:])


@step(None)
def residual(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    other = pool.pick(rng, like=shape, but=x)
    if other is not None:
        pool.add(net.op(str(rng.choice(["Add", "Add", "Add", "Mul", "Sub", "Max"])), x, other[0]), *shape)


STEPS += [residual, residual]


@step(4)
def block(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """A residual block, its shortcut the identity."""
    c = shape[1]
    inner = channels(rng)
    y = net.op("Relu", net.op("Conv", x, net.weight(inner, c, 3, 3), *maybe_bias(net, rng, inner), pads=[1] * 4))
    y = net.op("Conv", y, net.weight(c, inner, 1, 1), *maybe_bias(net, rng, c))
    pool.add(net.op("Relu", net.op("Add", y, x)), *shape)


@step(4)
def gate(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """Squeeze and excitation."""
    c = shape[1]
    y = net.op("Relu", net.op("Conv", net.op("GlobalAveragePool", x), net.weight(2, c, 1, 1), net.bias(2)))
    y = net.op("Sigmoid", net.op("Conv", y, net.weight(c, 2, 1, 1), net.bias(c)))
    pool.add(net.op("Mul", x, y), *shape)


@step(None)
def constant(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """A constant that broadcasts: a scalar, one per channel, one per position, or of another rank."""
    dims = [size if rng.random() < 0.5 else 1 for size in shape[1:]]
    if rng.random() < 0.3:
        dims = [1, *dims]
    while dims and rng.random() < 0.2:
        dims = dims[1:]
    pool.add(
        net.op(str(rng.choice(["Add", "Mul", "Sub"])), *([x, net.bias(*dims)] if rng.random() < 0.7 else [net.bias(*dims), x])), *shape
    )


@step(4)
def nhwc(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """Work in the other layout: a dense layer per pixel."""
    n, c, h, w = shape
    y, out = net.op("Transpose", x, perm=[0, 2, 3, 1]), channels(rng)
    y = net.op("MatMul", y, net.weight(c, out))
    y = net.op("Add", y, net.bias(out)) if rng.random() < 0.7 else y
    pool.add(net.op("Transpose", y, perm=[0, 3, 1, 2]), n, out, h, w)


@step(4)
def shuffle(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    _, c, h, w = shape
    if c % 2 == 0:
        y = net.op("Transpose", net.op("Reshape", x, net.ints(0, 2, c // 2, h, w)), perm=[0, 2, 1, 3, 4])
        pool.add(net.op("Reshape", y, net.ints(*([0, -1, h, w] if rng.random() < 0.5 else [0, c, h, w]))), *shape)


@step(4)
def flatten(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    n, total = shape[0], int(np.prod(shape[1:]))
    forms = [lambda: net.op("Flatten", x), lambda: net.op("Reshape", x, net.ints(0, -1)), lambda: net.op("Reshape", x, net.ints(-1, total))]
    if total <= 300:
        pool.add(forms[rng.integers(3)](), n, total)


@step(4)
def tokens(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    n, c, h, w = shape
    y = net.op("Reshape", x, net.ints(*([0, c, -1] if rng.random() < 0.5 else [0, 0, -1])))
    if rng.random() < 0.7:
        pool.add(net.op("Transpose", y, perm=[0, 2, 1]), n, h * w, c)
    else:
        pool.add(y, n, c, h * w)


@step(2)
def gemm(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    out, flip = channels(rng), int(rng.integers(2))
    weight = net.weight(*((out, shape[1]) if flip else (shape[1], out)))
    bias = maybe_bias(net, rng, out)
    if not bias and (net.opset < 11 or rng.random() < 0.2):  # C is required before opset 11
        bias = [net.bias(1)]
    scale = {"alpha": 0.5, "beta": 2.0} if rng.random() < 0.3 else {}
    pool.add(net.op("Gemm", x, weight, *bias, transB=flip, **scale), shape[0], out)


STEPS += [gemm, gemm]


@step(None)
def matmul(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    if len(shape) not in (2, 3):
        return
    out = channels(rng)
    y = net.op("MatMul", x, net.weight(shape[-1], out))
    pool.add(net.op("Add", y, net.bias(out)) if rng.random() < 0.6 else y, *shape[:-1], out)


@step(3)
def left_matmul(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    out = channels(rng)
    pool.add(net.op("MatMul", net.weight(out, shape[1]), x), shape[0], out, shape[2])


@step(None)
def softmax(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    pool.add(net.op("Softmax", x, axis=int(rng.integers(1, len(shape)))), *shape)


@step(4)
def reduce(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    keep = int(rng.integers(2))
    operator = str(rng.choice(["ReduceMean", "ReduceMax"]))
    y = net.op(operator, x, axes=[2, 3], keepdims=keep) if net.opset < 18 else net.op(operator, x, net.ints(2, 3), keepdims=keep)
    pool.add(y, *shape[:2], *((1, 1) if keep else ()))


@step(4)
def squeeze(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    if shape[2:] == (1, 1):
        pool.add(net.op("Squeeze", x, axes=[2, 3]) if net.opset < 13 else net.op("Squeeze", x, net.ints(2, 3)), *shape[:2])


@step(2)
def unsqueeze(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    pool.add(net.op("Unsqueeze", x, axes=[2, 3]) if net.opset < 13 else net.op("Unsqueeze", x, net.ints(-1, -2)), *shape, 1, 1)


@step(4)
def pad(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    n, c, h, w = shape
    pads = [0, 0, 1, 0, 0, int(rng.random() < 0.1), 0, 1]
    y = net.op("Pad", x, pads=pads, value=0.5) if net.opset < 11 else net.op("Pad", x, net.ints(*pads), net.constant(np.float32(0.5)))
    pool.add(y, n, c + pads[5], h + 1, w + 1)


@step(4)
def resize(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    n, c, h, w = shape
    scales = net.constant(np.asarray([1, 1, 2, 2], np.float32))
    if h <= 4 and net.opset >= 11:
        pool.add(net.op("Resize", x, net.constant(np.zeros(0, np.float32)), scales, mode="nearest"), n, c, 2 * h, 2 * w)
    elif h <= 4:
        pool.add(net.op("Upsample", x, scales, mode="nearest"), n, c, 2 * h, 2 * w)


@step(4)
def odd_conv(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """Dilation, auto_pad, or a kernel that is not square."""
    n, c, h, w = shape
    out = channels(rng)
    forms: list[tuple[tuple[int, int], dict[str, Any], tuple[int, int]]] = [
        ((3, 3), {"dilations": [2, 2], "pads": [2] * 4}, (h, w)),
        ((3, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, (-(-h // 2), -(-w // 2))),
        ((1, 3), {"pads": [0, 0, 0, 2]}, (h, w)),
        ((1, 1), {"auto_pad": "VALID"}, (h, w)),
        ((1, 1), {"pads": [1, 0, 0, 0]}, (h + 1, w)),
    ]
    kernel, values, space = forms[rng.integers(len(forms))]
    pool.add(net.op("Conv", x, net.weight(out, c, *kernel), *maybe_bias(net, rng, out), **values), n, out, *space)


@step(3)
def conv1d(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    n, c, t = shape
    out = channels(rng)
    pool.add(net.op("Conv", x, net.weight(out, c, 3), *maybe_bias(net, rng, out), pads=[1, 1]), n, out, t)


@step(3)
def untoken(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """[N, T, C] -> [N, C, T, 1], or its rows as a batch [N T, C]."""
    n, t, c = shape
    if rng.random() < 0.6:
        y = net.op("Transpose", x, perm=[0, 2, 1])
        pool.add(net.op("Reshape", y, net.ints(0, 0, -1, 1)), n, c, t, 1)
    else:
        out = channels(rng)
        rows = net.op("Gemm", net.op("Reshape", x, net.ints(-1, c)), net.weight(c, out), net.bias(out))
        pool.add(net.op("Reshape", rows, net.ints(-1, t, out)), n, t, out)


@step(3)
def heads(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """Channels split into heads and put together again in another order of axes."""
    _, t, c = shape
    if c % 2 == 0:
        y = net.op("Transpose", net.op("Reshape", x, net.ints(0, t, 2, c // 2)), perm=[0, 2, 1, 3])
        y = net.op("Relu", y)
        pool.add(net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3]), net.ints(0, t, c)), *shape)


@step(4)
def odd_transpose(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    order = [0, *(1 + rng.permutation(3)).tolist()]
    pool.add(net.op("Transpose", x, perm=order), *(shape[i] for i in order))


@step(4)
def odd_reshape(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """Merges or splits axes without regard to channels."""
    n, c, h, w = shape
    forms = [((0, c * h, w), (n, c * h, w)), ((0, w, -1), (n, w, c * h)), ((0, h, c, w), (n, h, c, w)), ((0, 1, c, -1), (n, 1, c, h * w))]
    target, result = forms[rng.integers(len(forms))]
    pool.add(net.op("Reshape", x, net.ints(*target)), *result)


@step(4)
def dynamic_reshape(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """As exporters write view(x.size(0), -1)."""
    batch = net.op("Gather", net.op("Shape", x), net.ints(0), axis=0)
    target = net.op("Concat", batch, net.ints(int(np.prod(shape[1:]))) if rng.random() < 0.5 else net.ints(-1), axis=0)
    if np.prod(shape[1:]) <= 300:
        pool.add(net.op("Reshape", x, target), shape[0], int(np.prod(shape[1:])))


@step(2)
def left_gemm(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """The constant on the left, a batch that is known: Y = W X' + C."""
    out = channels(rng)
    y = net.op("Gemm", net.weight(out, shape[1]), x, net.bias(out, 1), transB=1)
    pool.add(net.op("Transpose", y, perm=[1, 0]), shape[0], out)


@step(2)
def tied_gemm(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """There and back with one weight, as autoencoders do."""
    out = channels(rng)
    weight = net.weight(out, shape[1])
    y = net.op("Gemm", x, weight, net.bias(out), transB=1)
    pool.add(net.op("Gemm", net.op("Relu", y), weight, net.bias(shape[1])), *shape)


@step(None)
def branches(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """A tensor that meets another of its own channels through a broadcast of another rank."""
    if len(shape) == 4:
        y = net.op("GlobalAveragePool", x)
        y = net.op("Squeeze", y, axes=[0]) if net.opset < 13 and shape[0] == 1 else y
        pool.add(net.op(str(rng.choice(["Add", "Mul", "Sub", "Div"])), x, net.op("Exp", net.op("Tanh", y))), *shape)


@step(None)
def also_an_output(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    if x not in net.outputs and x != "x1":
        net.outputs.append(x)
