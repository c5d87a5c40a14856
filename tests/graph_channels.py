"""Steps for random graphs: channels that are cut out, copied, padded, counted and added up."""

from __future__ import annotations

import numpy as np
from builders import Net
from graph_attention import reduced, sizes_of, split_in
from graph_pool import Pool, Shape, channels, maybe_bias, step

MAX = 2**63 - 1


def _slice(net: Net, x: str, axis: int, start: int, end: int, step_: int = 1) -> str:
    if net.opset < 10:
        return str(net.op("Slice", x, starts=[start], ends=[end], axes=[axis]))
    steps = [net.ints(step_)] if step_ != 1 else []
    return str(net.op("Slice", x, net.ints(start), net.ints(end), net.ints(axis), *steps))


@step(None)
def sliced(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    axis = 1 if len(shape) != 3 or rng.random() < 0.3 else 2
    size = shape[axis]
    if size < 2:
        return
    start = int(rng.integers(0, size - 1))
    forms = [(start, MAX, 1), (0, size - start, 1), (-size + start, size, 1), (0, -1, 1), (0, size, 2), (1, MAX, 2), (-1, -size - 1, -1)]
    begin, end, jump = forms[rng.integers(4 if net.opset < 10 else len(forms))]
    left = len(range(size)[slice(begin, end if jump > 0 else None, jump)])
    pool.add(_slice(net, x, axis, begin, end, jump), *shape[:axis], left, *shape[axis + 1 :])


@step(4)
def halves(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """Two slices, one of which has a layer of its own, put together again."""
    _n, c, _h, _w = shape
    if c < 2:
        return
    middle = c // 2
    a, b = _slice(net, x, 1, 0, middle), _slice(net, x, 1, middle, MAX)
    a = str(net.op("Conv", a, net.weight(middle, middle, 1, 1), *maybe_bias(net, rng, middle)))
    pool.add(net.op("Concat", b, a, axis=1), *shape)


@step(4)
def cropped(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """Several axes at once."""
    n, c, h, w = shape
    if c > 1 and w > 1 and net.opset >= 10:
        y = net.op("Slice", x, net.ints(1, 0), net.ints(MAX, -1), net.ints(1, -1))
        pool.add(y, n, c - 1, h, w - 1)


@step(None)
def gathered(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    axis = len(shape) - 1 if len(shape) == 3 and rng.random() < 0.6 else 1
    size = shape[axis]
    form = int(rng.integers(4))
    if form == 0:
        indices = rng.integers(0, size, int(rng.integers(2, 6)))
    elif form == 1:
        indices = np.arange(size)[::-1]
    elif form == 2 and net.opset >= 11:
        indices = rng.integers(-size, size, int(rng.integers(2, 6)))
    else:
        indices = rng.permutation(size)[: max(size // 2, 1)]
    pool.add(net.op("Gather", x, net.ints(*indices.tolist()), axis=axis), *shape[:axis], len(indices), *shape[axis + 1 :])


@step(4)
def gathered_more(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """One channel alone, or channels in two axes."""
    n, c, h, w = shape
    if rng.random() < 0.4:
        pool.add(net.op("Gather", x, net.constant(np.asarray(int(rng.integers(c)), np.int64)), axis=1), n, h, w)
    elif c % 2 == 0:
        y = net.op("Gather", x, net.constant(np.arange(c, dtype=np.int64).reshape(2, -1)), axis=1)
        y = net.op("Transpose", y, perm=[0, 2, 1, 3, 4]) if rng.random() < 0.5 else net.op("Relu", y)
        pool.add(net.op("Reshape", y, net.ints(0, c, h, w)), *shape)


def padded(net: Net, x: str, pads: list[int], axes: tuple[int, ...] = ()) -> str:
    if net.opset < 11:
        return str(net.op("Pad", x, pads=pads))
    if axes and net.opset >= 18:
        return str(net.op("Pad", x, net.ints(*pads), "", net.ints(*axes)))
    return str(net.op("Pad", x, net.ints(*pads)))


@step(4)
def pad_channels(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    n, c, h, w = shape
    a, b = (int(size) for size in rng.integers(0, 3, 2))
    y = padded(net, x, [a, b], (1,)) if net.opset >= 18 and rng.random() < 0.5 else padded(net, x, [0, a, 0, 0, 0, b, 0, 0])
    pool.add(y, n, a + c + b, h, w)


@step(4)
def option_a(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """A residual block that halves the size; its shortcut takes every other pixel and pads channels."""
    n, c, h, w = shape
    if min(h, w) < 2 or net.opset < 10 or c > 12:
        return
    short = net.op("Slice", x, net.ints(0, 0), net.ints(MAX, MAX), net.ints(2, 3), net.ints(2, 2))
    short = padded(net, short, [0, c // 2, 0, 0, 0, c - c // 2, 0, 0])
    y = net.op("Conv", x, net.weight(2 * c, c, 3, 3), *maybe_bias(net, rng, 2 * c), pads=[1] * 4, strides=[2, 2])
    pool.add(net.op("Relu", net.op("Add", y, short)), n, 2 * c, -(-h // 2), -(-w // 2))


@step(4)
def tiled(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    n, c, h, w = shape
    if c <= 8:
        times = int(rng.choice([1, 2]))
        pool.add(net.op("Tile", x, net.ints(1, times, 1, 2 if w == 1 else 1)), n, c * times, h, 2 if w == 1 else w)


@step(4)
def expanded(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """One number per channel, copied over pixels; the target known, or read off another tensor."""
    n, c, h, w = shape
    y = reduced(net, "ReduceMean", x, 2, 3)
    target = net.ints(*([n, c, h, w] if rng.random() < 0.5 else [1, 1, h, w])) if rng.random() < 0.6 else net.op("Shape", x)
    pool.add(net.op("Expand", y, target), *shape)


@step(4)
def grown(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """One channel, copied over as many as another tensor has."""
    y = reduced(net, str(rng.choice(["ReduceMean", "ReduceMax"])), x, 1)
    y = net.op("Expand", y, net.op("Shape", x))
    pool.add(net.op("Add", x, y), *shape)


@step(4)
def zeros(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """As zeros_like is exported, put beside or onto what it is like."""
    y = net.op("ConstantOfShape", net.op("Shape", x))
    if rng.random() < 0.6:
        pool.add(net.op("Add", x, y), *shape)
    elif shape[1] <= 8:
        pool.add(net.op("Concat", x, y, axis=1), shape[0], 2 * shape[1], *shape[2:])


@step(4)
def depth_to_space(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    n, c, h, w = shape
    out = channels(rng)
    if h > 4:
        return
    y = net.op("Conv", x, net.weight(out * 4, c, 1, 1), *maybe_bias(net, rng, out * 4))
    mode = {"mode": str(rng.choice(["DCR", "CRD"]))} if net.opset >= 11 else {}
    if rng.random() < 0.7:
        y = net.op("DepthToSpace", y, blocksize=2, **mode)
    else:
        y = net.op("Transpose", net.op("Reshape", y, net.ints(0, out, 2, 2, h, w)), perm=[0, 1, 4, 2, 5, 3])
        y = net.op("Reshape", y, net.ints(0, out, 2 * h, 2 * w))
    pool.add(y, n, out, 2 * h, 2 * w)


@step(4)
def space_to_depth(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    n, c, h, w = shape
    if h % 2 or w % 2 or c > 6:
        return
    if rng.random() < 0.6:
        y = net.op("SpaceToDepth", x, blocksize=2)
    else:
        y = net.op("Transpose", net.op("Reshape", x, net.ints(0, c, h // 2, 2, w // 2, 2)), perm=[0, 3, 5, 1, 2, 4])
        y = net.op("Reshape", y, net.ints(0, 4 * c, h // 2, w // 2))
    pool.add(y, n, 4 * c, h // 2, w // 2)


@step(4)
def focus(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """Four strided slices beside each other."""
    n, c, h, w = shape
    if h % 2 or w % 2 or c > 6 or net.opset < 10:
        return
    parts = [
        net.op("Slice", x, net.ints(a, b), net.ints(MAX, MAX), net.ints(2, 3), net.ints(2, 2)) for a, b in ((0, 0), (1, 0), (0, 1), (1, 1))
    ]
    pool.add(net.op("Concat", *parts, axis=1), n, 4 * c, h // 2, w // 2)


@step(4)
def group_norm(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """The operator, or as exporters write it: Reshape, InstanceNormalization, Reshape, scale and shift."""
    _n, c, h, w = shape
    fits = [groups for groups in (2, 3, 4) if c % groups == 0 and c > groups]
    if not fits:
        return
    groups = int(rng.choice(fits))
    if net.opset >= 21 and rng.random() < 0.5:  # the checker refuses that of opset 18 to 20
        values = [net.constant(rng.uniform(0.5, 1.5, c).astype(np.float32)) for _ in range(2)]
        pool.add(net.op("GroupNormalization", x, *values, num_groups=groups, epsilon=1e-2), *shape)
        return
    y = net.op("Reshape", x, net.ints(0, groups, -1))
    ones, none = net.constant(np.ones(groups, np.float32)), net.constant(np.zeros(groups, np.float32))
    y = net.op("InstanceNormalization", y, ones, none, epsilon=1e-2)
    y = net.op("Reshape", y, net.op("Shape", x) if rng.random() < 0.6 else net.ints(0, c, h, w))
    pool.add(net.op("Add", net.op("Mul", y, net.bias(c, 1, 1)), net.bias(c, 1, 1)), *shape)


@step(None)
def channel_sum(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """A reduction over channels, as a gate."""
    operator = str(rng.choice(["ReduceMax", "ReduceMean", "ReduceMean", "ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare"]))
    y = reduced(net, operator, x, len(shape) - 1 if len(shape) == 3 else 1)
    pool.add(net.op("Mul", x, net.op("Sigmoid", y)), *shape)


@step(4)
def spatial_attention(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """Mean and norm over channels, one map of them."""
    maps = net.op("Concat", reduced(net, "ReduceMean", x, 1), reduced(net, "ReduceL2", x, 1), axis=1)
    y = net.op("Sigmoid", net.op("Conv", maps, net.weight(1, 2, 3, 3), pads=[1] * 4))
    pool.add(net.op("Mul", x, y), *shape)


@step(4)
def unit_length(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """Divided by the norm over channels."""
    y = net.op("Add", reduced(net, "ReduceL2", x, 1), net.constant(np.float32(0.5)))
    pool.add(net.op("Div", x, y), *shape)


@step(None)
def where(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    if net.opset < 11:
        return
    other = pool.pick(rng, like=shape)
    form = int(rng.integers(3))
    mask = net.op("Greater", x, net.constant(np.float32(0.1)))
    value = net.bias(*([1] * (len(shape) - 1))) if form == 0 or other is None else other[0]
    if form == 2:
        mask = net.constant(rng.random((shape[1], *[1] * (len(shape) - 2))) < 0.5)
    pool.add(net.op("Where", mask, *([x, value] if rng.random() < 0.5 else [value, x])), *shape)


@step(None)
def compared(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    other = pool.pick(rng, like=shape)
    if other is not None and net.opset >= 9:
        less = net.op(str(rng.choice(["Less", "Greater"])), x, other[0])
        less = net.op("Not", less) if rng.random() < 0.3 else less
        pool.add(net.op("Mul", x, net.op("Cast", less, to=1)), *shape)


@step(4)
def runtime_reshape(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """There and back, with sizes that are read off the tensor."""
    n, c, h, w = shape
    form = int(rng.integers(4))
    if form == 0:
        y = net.op("Reshape", x, sizes_of(net, x, "0", "1", -1))
        pool.add(net.op("Reshape", net.op("Relu", y), net.op("Shape", x)), *shape)
    elif form == 1:
        y = net.op("Reshape", net.op("Transpose", x, perm=[0, 2, 3, 1]), sizes_of(net, x, "0", -1, "1"))
        pool.add(y, n, h * w, c)
    elif form == 2 and c % 2 == 0:
        half = net.op("Div", net.op("Gather", net.op("Shape", x), net.ints(1), axis=0), net.ints(2))
        y = net.op("Reshape", x, net.op("Concat", net.ints(0, 2), half, net.ints(h, w), axis=0))
        pool.add(net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3, 4]), net.ints(0, c, h, w)), *shape)
    elif form == 3 and c * h * w <= 300:
        sizes = net.op("Shape", x)
        total = net.op("Mul", net.op("Gather", sizes, net.ints(2), axis=0), net.op("Gather", sizes, net.ints(3), axis=0))
        total = net.op("Mul", net.op("Gather", sizes, net.ints(1), axis=0), total)
        pool.add(net.op("Reshape", x, net.op("Concat", net.ints(-1), total, axis=0)), n, c * h * w)


@step(4)
def counted(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """Divided by the number of channels or of pixels."""
    axis = int(rng.choice([1, 2, 3]))
    size = net.op("Cast", net.op("Gather", net.op("Shape", x), net.ints(axis), axis=0), to=1)
    pool.add(net.op("Div", x, size), *shape)


@step(4)
def sized_slice(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """As chunk(2, 1) was exported: the middle is computed from the number of channels."""
    n, c, h, w = shape
    if c % 2 or net.opset < 10:
        return
    half = net.op("Div", net.op("Gather", net.op("Shape", x), net.ints(1), axis=0), net.ints(2))
    a = net.op("Slice", x, net.ints(0), half, net.ints(1))
    b = net.op("Slice", x, half, net.op("Mul", half, net.ints(2)), net.ints(1))
    pool.add(net.op("Mul", a, net.op("Sigmoid", b)), n, c // 2, h, w)


@step(4)
def nhwc_resize(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    n, c, h, w = shape
    if h > 4 or net.opset < 13:
        return
    y = net.op("Transpose", x, perm=[0, 2, 3, 1])
    form = int(rng.integers(3))
    if form == 0:
        y = net.op("Resize", y, "", net.constant(np.asarray([1, 2, 2, 1], np.float32)), mode="nearest")
    elif form == 1:
        y = net.op("Resize", y, "", "", net.ints(n, 2 * h, 2 * w, c), mode="nearest")
    else:
        y = net.op("Resize", y, "", "", sizes_of(net, y, "0", 2 * h, 2 * w, "3"), mode="nearest")
    pool.add(net.op("Transpose", y, perm=[0, 3, 1, 2]), n, c, 2 * h, 2 * w)


@step(4)
def resized_like(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """To the size of another tensor, as exporters write interpolate."""
    n, c, _h, _w = shape
    other = pool.pick(rng, 4)
    if other is None or net.opset < 13:
        return
    target = net.op("Concat", _slice(net, net.op("Shape", x), 0, 0, 2), _slice(net, net.op("Shape", other[0]), 0, 2, 4), axis=0)
    pool.add(net.op("Resize", x, "", "", target, mode="nearest"), n, c, *other[1][2:])


@step(4)
def window(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """Operators along pixels."""
    form = int(rng.integers(4))
    if form == 0:
        y = net.op("CumSum", x, net.constant(np.asarray(3, np.int64))) if net.opset >= 11 else net.op("Relu", x)
    elif form == 1 and net.opset >= 11:
        y = net.op("TopK", x, net.ints(shape[3]), axis=3, outputs=2)[0]
    elif form == 2:
        y = net.op("LpNormalization", net.op("Exp", x), axis=3)
    else:
        y = net.op("Mul", x, net.op("Cast", net.op("ArgMax", x, axis=2, keepdims=1), to=1))
    pool.add(y, *shape)


@step(None)
def embedded(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """Rows of a table, looked up with numbers that the model computes, added to what has those channels."""
    if len(shape) != 3:
        return
    _n, _t, c = shape
    numbers = net.op("ArgMax", x, axis=2, keepdims=0)
    table = net.weight(c, c)
    pool.add(net.op("Add", x, net.op("Gather", table, numbers, axis=0)), *shape)


@step(3)
def positions(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """A stored row per token, whole, or the first rows of a longer table."""
    _n, t, c = shape
    form = int(rng.integers(3))
    if form == 0:
        y = net.weight(1, t, c)
    elif form == 1:
        y = _slice(net, net.weight(1, t + 3, c), 1, 0, t)
    else:
        y = net.op("Gather", net.weight(t + 2, c), net.ints(*range(t)), axis=0)
    pool.add(net.op("Add", x, y), *shape)


@step(3)
def class_token(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """A stored token before the others."""
    n, t, c = shape
    y = net.op("Expand", net.weight(1, 1, c), net.ints(n, 1, c) if rng.random() < 0.5 else sizes_of(net, x, "0", 1, "2"))
    pool.add(net.op("Concat", y, x, axis=1), n, t + 1, c)


@step(3)
def pooled_tokens(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    n, _t, c = shape
    form = int(rng.integers(3))
    if form == 0:
        pool.add(net.op("Gather", x, net.constant(np.asarray(0, np.int64)), axis=1), n, c)
    elif form == 1:
        pool.add(reduced(net, str(rng.choice(["ReduceMean", "ReduceMax"])), x, 1, keepdims=0), n, c)
    else:
        pool.add(_slice(net, x, 1, 0, 1), n, 1, c)


@step(4)
def partial(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """A part of the channels is convolved, the rest goes on as it is."""
    _n, c, _h, _w = shape
    if c >= 3:
        a, b = split_in(net, x, 1, c // 3, c - c // 3)
        a = net.op("Conv", a, net.weight(c // 3, c // 3, 3, 3), *maybe_bias(net, rng, c // 3), pads=[1] * 4)
        pool.add(net.op("Concat", a, b, axis=1), *shape)
