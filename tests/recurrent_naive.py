"""LSTM, GRU and RNN step by step in numpy, as the standard says it, and models with one such node: what the tests of them compare with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Array = NDArray[Any]
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
TIME, BATCH = 6, 4


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


@dataclass
class Node:
    """Arrays as the node stores them, all float64; `directions` of "f" and "b". coupled: an LSTM with input_forget."""

    op: str
    w: Array
    r: Array
    b: Array
    before_reset: bool = False
    directions: str = "f"
    coupled: bool = False

    @property
    def hidden(self) -> int:
        return int(self.r.shape[2])

    def run(self, x: Array, h0: Array, c0: Array, lengths: Array) -> tuple[Array, list[tuple[int, Array, list[Array], Array]]]:
        """Y [time, directions, batch, hidden], and of every step of every entry: direction, x, what the rows of each gate of R read,
        the sums of all gates [gates * hidden]."""
        time, batch, _ = x.shape
        y, seen = np.zeros((time, len(self.directions), batch, self.hidden)), []
        for d, way in enumerate(self.directions):
            for n in range(batch):
                h, c = h0[d, n], c0[d, n]
                steps = range(int(lengths[n]))
                for t in steps if way == "f" else reversed(steps):
                    h, c, read, sums = self.step(d, x[t, n], h, c)
                    seen.append((d, x[t, n], read, sums))
                    y[t, d, n] = h
        return y, seen

    def step(self, d: int, x: Array, h: Array, c: Array) -> tuple[Array, Array, list[Array], Array]:
        size = self.hidden
        w, r, (wb, rb) = self.w[d], self.r[d], np.split(self.b[d], 2)
        own, loop = w @ x + wb, r @ h + rb
        gates = [slice(g * size, (g + 1) * size) for g in range(GATES[self.op])]
        if self.op == "RNN":
            return np.tanh(own + loop), c, [h], own + loop
        if self.op == "LSTM":
            i, o, f = (sigmoid((own + loop)[gates[g]]) for g in range(3))
            c = (1 - i if self.coupled else f) * c + i * np.tanh((own + loop)[gates[3]])
            return o * np.tanh(c), c, [h] * 4, own + loop
        z, reset = (sigmoid((own + loop)[gates[g]]) for g in range(2))
        last = own[gates[2]] + (reset * loop[gates[2]] if self.before_reset else r[gates[2]] @ (reset * h) + rb[gates[2]])
        sums = np.concatenate([(own + loop)[: 2 * size], last])
        read = [h, h, h if self.before_reset else reset * h]
        return (1 - z) * np.tanh(last) + z * h, c, read, sums


def made(op: str, directions: str = "f", before_reset: bool = False, features: int = 5, hidden: int = 4, seed: int = 0) -> Node:
    rng = np.random.default_rng(seed)
    number, rows = len(directions), GATES[op] * hidden
    shapes = (number, rows, features), (number, rows, hidden), (number, 2 * rows)
    return Node(op, *(rng.normal(size=shape).astype(np.float32).astype(float) * 0.7 for shape in shapes), before_reset, directions)


def model(
    node: Node, *, states: str = "", lengths: bool = False, outputs: str = "Y", layers: bool = False, bias: bool = True
) -> onnx.ModelProto:
    """A model of that node alone, or between two MatMul (`layers`). states: "", "stored" or "given" (inputs of the model).

    outputs: of "Y", "h" and "c" those that the node has; with Y the output of the model is Y, otherwise the last state.
    """
    rng = np.random.default_rng(1)
    number, features = len(node.directions), node.w.shape[2]
    stored = {"w": node.w, "r": node.r, **({"b": node.b} if bias else {})}
    inputs = {"x": (1, [TIME, BATCH, 6 if layers else features])}  # open sizes would make samples of the first axis
    names = ["h0", *(["c0"] if node.op == "LSTM" else [])]
    if states == "stored":
        stored |= {name: rng.normal(size=(number, BATCH, node.hidden)) for name in names}
    elif states == "given":
        inputs |= {name: (1, [number, BATCH, node.hidden]) for name in names}
    if lengths:
        inputs["lengths"] = (onnx.TensorProto.INT32, [BATCH])
    read = ["x", "w", "r", "b" if bias else "", "lengths" if lengths else "", *(names if states else [])]
    nodes = []
    if layers:
        stored |= {"first": rng.normal(size=(6, features)), "last": rng.normal(size=(node.hidden, 3))}
        nodes.append(helper.make_node("MatMul", ["x", "first"], ["m"], name="before"))
        read[0] = "m"
    while not read[-1]:
        read.pop()
    how: dict[str, Any] = {
        "hidden_size": node.hidden,
        "direction": {"f": "forward", "b": "reverse", "fb": "bidirectional"}[node.directions],
    }
    if node.coupled:
        how["input_forget"] = 1
    if node.op == "GRU":
        how["linear_before_reset"] = int(node.before_reset)
    nodes.append(
        helper.make_node(
            node.op, read, [name if name in outputs else "" for name in "Yhc"[: 3 if node.op == "LSTM" else 2]], name="loop", **how
        )
    )
    result = "Y" if "Y" in outputs else "h" if "h" in outputs else "c"
    rank = 4 if result == "Y" else 3
    if layers:
        nodes.append(helper.make_node("MatMul", [result, "last"], ["out"], name="after"))
        result = "out"
    values = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in stored.items()]
    ends = [helper.make_tensor_value_info(name, *info) for name, info in inputs.items()]
    graph = helper.make_graph(nodes, "g", ends, [helper.make_tensor_value_info(result, 1, [None] * rank)], values)
    return onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
