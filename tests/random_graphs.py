"""Random graphs for the law "mask = surgery": a list of steps, each of which adds to a pool of tensors what fits there."""

from __future__ import annotations

from typing import Any

import graph_attention  # noqa: F401  (its steps register themselves)
import graph_channels  # noqa: F401
import numpy as np
import onnx
from builders import Net
from graph_layers import conv, gemm
from graph_pool import BATCH, STEPS, Pool
from numpy.typing import NDArray

__all__ = ["KINDS", "STEPS", "build"]

KINDS = ("image", "rows", "tokens")
IR = {9: 3, 11: 6, 13: 7, 17: 8, 18: 8, 21: 9, 23: 10}


def _start(net: Net, pool: Pool, kind: str, dynamic: bool, rng: np.random.Generator) -> tuple[str, NDArray[Any]]:
    """The input, its value, and a first layer: a convolution, a dense layer, or a table of tokens with one of positions."""
    batch: int | str = "N" if dynamic else BATCH
    values = np.random.default_rng(5)
    if kind == "tokens":
        x, count, width = "tokens", 5, int(rng.choice([4, 6, 8]))
        net.inputs.append((x, (batch, count), onnx.TensorProto.INT64))
        y = net.op("Gather", net.weight(7, width), x, axis=0)
        pool.add(net.op("Add", y, net.weight(count, width)) if rng.random() < 0.5 else y, BATCH, count, width)
        return x, values.integers(0, 7, (BATCH, count))
    shape = (BATCH, 3, 6, 5) if kind == "image" else (BATCH, 6)
    x = net.input(batch, *shape[1:])
    pool.add(x, *shape)
    (conv if kind == "image" else gemm)(net, pool, rng)
    return x, values.standard_normal(shape).astype(np.float32)


def build(steps: list[tuple[int, int]], opset: int, kind: str, dynamic: bool) -> tuple[onnx.ModelProto, dict[str, NDArray[Any]]]:
    """A model from (step number, seed) pairs, ended by a layer, and a feed for it."""
    net = Net(seed=1, opset=opset, ir_version=IR[opset])
    pool = Pool(net)
    x, value = _start(net, pool, kind, dynamic, np.random.default_rng(steps[0][1]))
    for number, seed in steps:
        STEPS[number % len(STEPS)](net, pool, np.random.default_rng(seed))
    last, dims = list(pool.tensors.items())[-1]
    if len(dims) == 4:
        last = net.op("Conv", last, net.weight(3, dims[1], 1, 1), net.bias(3))
    elif len(dims) == 3:
        last = net.op("MatMul", last, net.weight(dims[2], 3))
    elif last == x:
        last = net.op("Identity", last)
    else:
        last = net.op("Gemm", last, net.weight(dims[1], 3), net.bias(3))
    net.ranks[last] = len(dims)
    return net.model(last), {x: value}
