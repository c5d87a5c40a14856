"""Steps for random graphs: what transformers are made of."""

from __future__ import annotations

from typing import Any

import numpy as np
from builders import Net
from graph_pool import Pool, Shape, channels, maybe_bias, step

__all__ = ["layer_normalised", "reduced", "sizes_of"]


def reduced(net: Net, operator: str, x: str, *axes: int, keepdims: int = 1) -> str:
    """A Reduce operator with its axes where the opset has them."""
    late = net.opset >= (13 if operator == "ReduceSum" else 18)
    return str(net.op(operator, x, net.ints(*axes), keepdims=keepdims) if late else net.op(operator, x, axes=[*axes], keepdims=keepdims))


def sizes_of(net: Net, x: str, *entries: int | str) -> str:
    """A list of sizes as exporters write it: numbers as they are, "0" and the like read off that axis of x when the model runs."""
    parts = [
        net.ints(entry) if isinstance(entry, int) else net.op("Gather", net.op("Shape", x), net.ints(int(entry)), axis=0)
        for entry in entries
    ]
    return str(net.op("Concat", *parts, axis=0))


def dense(net: Net, rng: np.random.Generator, x: str, size: int, out: int) -> str:
    y = net.op("MatMul", x, net.weight(size, out))
    return str(net.op("Add", y, net.bias(out)) if rng.random() < 0.6 else y)


def layer_normalised(net: Net, rng: np.random.Generator, x: str, size: int, form: int) -> str:
    """Over the last axis: the operator where there is one, or spelled out with Pow or with Mul; a root mean square without its mean."""
    scale, shift = net.constant(rng.uniform(0.5, 1.5, size).astype(np.float32)), net.bias(size)
    if form == 0 and net.opset >= 17:
        return str(net.op("LayerNormalization", x, scale, *([shift] if rng.random() < 0.7 else []), axis=int(rng.choice([-1]))))
    centred = x if form == 3 else net.op("Sub", x, reduced(net, "ReduceMean", x, -1))
    square = net.op("Mul", centred, centred) if form == 2 else net.op("Pow", centred, net.constant(np.float32(2)))
    mean = reduced(net, "ReduceMean", square, -1)
    y = net.op("Div", centred, net.op("Sqrt", net.op("Add", mean, net.constant(np.float32(1e-2)))))
    y = net.op("Mul", y, scale)
    return str(y if form == 3 else net.op("Add", y, shift))


@step(3)
def layer_norm(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    pool.add(layer_normalised(net, rng, x, shape[-1], int(rng.integers(4))), *shape)


@step(2)
def layer_norm_of_rows(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    pool.add(layer_normalised(net, rng, x, shape[-1], int(rng.integers(4))), *shape)


@step(4)
def layer_norm_of_pixels(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    y = layer_normalised(net, rng, net.op("Transpose", x, perm=[0, 2, 3, 1]), shape[1], int(rng.integers(4)))
    pool.add(net.op("Transpose", y, perm=[0, 3, 1, 2]), *shape)


@step(3)
def transformer_norm(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """A block before whose layers the sum is normalised."""
    c, inner = shape[-1], channels(rng)
    y = layer_normalised(net, rng, x, c, int(rng.integers(4)))
    y = net.op("Tanh", dense(net, rng, y, c, inner))
    pool.add(net.op("Add", dense(net, rng, y, inner, c), x), *shape)


def _heads(net: Net, rng: np.random.Generator, x: str, shape: Shape, h: int, d: int, order: list[int]) -> str:
    """[N, T, H D] -> [N, H, T, D], or with D before T."""
    _n, t, _ = shape
    form = int(rng.integers(3))
    target = [net.ints(0, t, h, d), net.ints(0, 0, h, -1), sizes_of(net, x, "0", "1", h, d)][form]
    return str(net.op("Transpose", net.op("Reshape", x, target), perm=order))


def _softmax(net: Net, x: str) -> str:
    return str(net.op("Softmax", x, axis=3))


@step(3)
def attention(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """Several heads; queries, keys and values from three layers or from one."""
    n, t, c = shape
    h, d = int(rng.choice([1, 2, 3])), int(rng.choice([2, 3, 4]))
    inner = (n, t, h * d)
    if rng.random() < 0.4:
        parts = split_in(net, dense(net, rng, x, c, 3 * h * d), 2, h * d, h * d, h * d)
    else:
        parts = [dense(net, rng, x, c, h * d) for _ in range(3)]
    q, v = (_heads(net, rng, part, inner, h, d, [0, 2, 1, 3]) for part in (parts[0], parts[2]))
    k = _heads(net, rng, parts[1], inner, h, d, [0, 2, 3, 1])
    scores = net.op(str(rng.choice(["Mul", "Div"])), net.op("MatMul", q, k), net.constant(np.float32(0.7)))
    y = net.op("MatMul", _softmax(net, scores), v)
    y = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3]), net.ints(*([0, t, h * d] if rng.random() < 0.5 else [0, t, -1])))
    y = dense(net, rng, y, h * d, c)
    pool.add(net.op("Add", y, x) if rng.random() < 0.5 else y, *shape)


def split_in(net: Net, x: str, axis: int, *sizes: int) -> list[str]:
    found: Any = (
        net.op("Split", x, outputs=len(sizes), axis=axis, split=[*sizes])
        if net.opset < 13
        else net.op("Split", x, net.ints(*sizes), outputs=len(sizes), axis=axis)
    )
    return list(found)


@step(3)
def one_head(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """Attention without a Reshape: whole features of queries and keys."""
    n, t, c = shape
    d = int(rng.choice([2, 4]))
    q, k, v = (net.op("MatMul", x, net.weight(c, d)) for _ in range(3))
    scores = net.op("Softmax", net.op("MatMul", q, net.op("Transpose", k, perm=[0, 2, 1])), axis=2)
    pool.add(net.op("MatMul", net.op("MatMul", scores, v), net.weight(d, c)), n, t, c)


@step(3)
def grouped_queries(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """Fewer keys and values than queries: each is copied with Expand."""
    n, t, c = shape
    shared, times, d = 2, 2, int(rng.choice([2, 3]))
    heads = shared * times
    q = net.op("Transpose", net.op("Reshape", dense(net, rng, x, c, heads * d), net.ints(0, t, heads, d)), perm=[0, 2, 1, 3])
    found = []
    for _ in range(2):
        y = net.op("Transpose", net.op("Reshape", dense(net, rng, x, c, shared * d), net.ints(0, t, shared, d)), perm=[0, 2, 1, 3])
        y = net.op("Unsqueeze", y, axes=[2]) if net.opset < 13 else net.op("Unsqueeze", y, net.ints(2))
        y = net.op("Expand", y, net.ints(*([n, shared, times, t, d] if rng.random() < 0.5 else [1, 1, times, 1, 1])))
        found.append(net.op("Reshape", y, net.ints(-1, heads, t, d)))
    scores = net.op("MatMul", q, net.op("Transpose", found[0], perm=[0, 1, 3, 2]))
    y = net.op("Transpose", net.op("MatMul", _softmax(net, scores), found[1]), perm=[0, 2, 1, 3])
    pool.add(dense(net, rng, net.op("Reshape", y, net.ints(0, t, heads * d)), heads * d, c), *shape)


@step(3)
def gated_mlp(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    c, inner = shape[-1], channels(rng)
    if rng.random() < 0.5:
        gate, value = split_in(net, dense(net, rng, x, c, 2 * inner), 2, inner, inner)
    else:
        gate, value = (dense(net, rng, x, c, inner) for _ in range(2))
    y = net.op("Mul", net.op("Mul", gate, net.op("Sigmoid", gate)), value)
    y = dense(net, rng, y, inner, c)
    pool.add(net.op("Add", x, y) if rng.random() < 0.5 else y, *shape)


@step(3)
def einsum(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """Products of two activations in letters."""
    n, t, c = shape
    if net.opset < 12:
        return
    d = int(rng.choice([2, 3]))
    a, b = (dense(net, rng, x, c, d) for _ in range(2))
    form = int(rng.integers(4))
    if form == 0:
        pool.add(net.op("Einsum", a, b, equation="bid,bjd->bij"), n, t, t)
    elif form == 1:
        pool.add(net.op("Einsum", a, b, equation="nid,njd->nid"), n, t, d)
    elif form == 2:
        pool.add(net.op("Einsum", a, b, equation="b i d, b i d -> b i d"), n, t, d)
    else:
        pool.add(net.op("Einsum", a, b, equation="bid,bie->bde"), n, d, d)


@step(3)
def linear_attention(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """Keys times values first: products of two kinds of channels."""
    n, t, c = shape
    q, k, v = (net.op("Relu", dense(net, rng, x, c, d)) for d in (3, 3, 4))
    y = net.op("MatMul", q, net.op("MatMul", net.op("Transpose", k, perm=[0, 2, 1]), v))
    pool.add(net.op("MatMul", y, net.weight(4, c)), n, t, c)


@step(4)
def pixel_attention(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """Attention over pixels with 1x1 convolutions, channels first."""
    n, c, height, width = shape
    d = channels(rng)
    q, k, v = (net.op("Reshape", net.op("Conv", x, net.weight(d, c, 1, 1), *maybe_bias(net, rng, d)), net.ints(0, d, -1)) for _ in range(3))
    scores = net.op("Softmax", net.op("MatMul", net.op("Transpose", q, perm=[0, 2, 1]), k), axis=2)
    y = net.op("MatMul", v, net.op("Transpose", scores, perm=[0, 2, 1]))
    target = net.ints(0, d, height, width) if rng.random() < 0.5 else sizes_of(net, x, "0", d, "2", "3")
    pool.add(net.op("Reshape", y, target), n, d, height, width)


@step(4)
def channel_attention(net: Net, pool: Pool, rng: np.random.Generator, x: str, shape: Shape) -> None:
    """Channels that look at channels: rows of the scores are channels, their softmax sees the others."""
    _n, c, height, width = shape
    flat = net.op("Reshape", x, net.ints(0, c, -1))
    scores = net.op("Softmax", net.op("MatMul", flat, net.op("Transpose", flat, perm=[0, 2, 1])), axis=2)
    pool.add(net.op("Reshape", net.op("MatMul", scores, flat), net.ints(0, c, height, width)), *shape)
