"""A small transformer encoder as exporters of sentence encoders write it, so that onnxruntime's optimisers find their patterns in it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
from builders import Net
from numpy.typing import NDArray

TOKENS, HIDDEN, HEADS, INNER, WORDS = 8, 16, 4, 32, 50


def _dense(net: Net, x: str, inputs: int, out: int) -> str:
    return str(net.op("Add", net.bias(out), net.op("MatMul", x, net.weight(inputs, out))))


def _normed(net: Net, x: str) -> str:
    scale = net.constant(net.rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32), "gamma")
    shift = net.constant(net.rng.uniform(-0.5, 0.5, HIDDEN).astype(np.float32), "beta")
    if net.opset >= 17:
        return str(net.op("LayerNormalization", x, scale, shift, axis=-1, epsilon=1e-5))
    centred = net.op("Sub", x, net.op("ReduceMean", x, axes=[-1]))
    square = net.op("ReduceMean", net.op("Pow", centred, net.constant(np.float32(2))), axes=[-1])
    deviation = net.op("Sqrt", net.op("Add", square, net.constant(np.float32(1e-5))))
    return str(net.op("Add", net.op("Mul", net.op("Div", centred, deviation), scale), shift))


def _heads(net: Net, x: str, order: list[int]) -> str:
    return str(net.op("Transpose", net.op("Reshape", x, net.ints(0, 0, HEADS, HIDDEN // HEADS)), perm=order))


def _attention(net: Net, x: str, mask: str) -> str:
    q, k, v = (_heads(net, _dense(net, x, HIDDEN, HIDDEN), order) for order in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]))
    scores = net.op("Div", net.op("MatMul", q, k), net.constant(np.float32(math.sqrt(HIDDEN / HEADS))))
    mixed = net.op("MatMul", net.op("Softmax", net.op("Add", scores, mask), axis=-1), v)
    together = net.op("Reshape", net.op("Transpose", mixed, perm=[0, 2, 1, 3]), net.ints(0, 0, HIDDEN))
    return _dense(net, together, HIDDEN, HIDDEN)


def _gelu(net: Net, x: str) -> str:
    part = net.op("Erf", net.op("Div", x, net.constant(np.float32(math.sqrt(2)))))
    return str(net.op("Mul", net.op("Mul", x, net.op("Add", part, net.constant(np.float32(1)))), net.constant(np.float32(0.5))))


def bert(blocks: int = 2, opset: int = 17, seed: int = 0) -> onnx.ModelProto:
    """ids, kinds and mask [N, T] to the mean of the last hidden states, through one more layer [N, 3]."""
    net = Net(seed=seed, opset=opset)
    net.inputs += [(name, ("N", TOKENS), onnx.TensorProto.INT64) for name in ("ids", "kinds", "mask")]
    x = net.op("Add", net.op("Gather", net.weight(WORDS, HIDDEN, prefix="table"), "ids", axis=0),
               net.op("Gather", net.weight(2, HIDDEN, prefix="table"), "kinds", axis=0))  # fmt: skip
    places = net.op("Gather", net.weight(TOKENS, HIDDEN, prefix="table"), net.constant(np.arange(TOKENS)[None], "places"), axis=0)
    x = _normed(net, net.op("Add", x, places))
    apart = net.op("Unsqueeze", net.op("Unsqueeze", "mask", *_axes(net, 1)), *_axes(net, 2)) if opset >= 13 else net.op(
        "Unsqueeze", net.op("Unsqueeze", "mask", axes=[1]), axes=[2])  # fmt: skip
    floats = net.op("Cast", apart, to=onnx.TensorProto.FLOAT)
    mask = net.op("Mul", net.op("Sub", net.constant(np.float32(1)), floats), net.constant(np.float32(-10000)))
    for _ in range(blocks):
        x = _normed(net, net.op("Add", _attention(net, x, mask), x))
        x = _normed(net, net.op("Add", _dense(net, _gelu(net, _dense(net, x, HIDDEN, INNER)), INNER, HIDDEN), x))
    last = net.op("ReduceMean", x, axes=[1], keepdims=0)
    net.ranks = {}
    return net.model(_dense(net, last, HIDDEN, 3))


def _axes(net: Net, axis: int) -> list[str]:
    return [net.ints(axis)]


def sentences(count: int = 64, seed: int = 1) -> dict[str, NDArray[Any]]:
    """Random tokens; a mask that ends somewhere."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(TOKENS) < rng.integers(3, TOKENS + 1, (count, 1))).astype(np.int64)
    return {"ids": rng.integers(0, WORDS, (count, TOKENS)), "kinds": rng.integers(0, 2, (count, TOKENS)), "mask": mask}
