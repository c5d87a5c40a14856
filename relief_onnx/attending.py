"""How relevance passes the operator Attention, as it passes the products and the softmax that it stands for.

The context is a product of weights and V, which share R evenly; the weights' half goes on in equal parts to Q and K. V gets it channel by
channel, Q and K head by head, since a head's weights belong to all of its channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray

from relief_onnx.graph import Graph
from relief_onnx.moves import Barrier
from relief_onnx.nodes import attributes

__all__ = ["attended", "attention_track"]

Doubles = NDArray[np.float64]


def attention_track(graph: Graph, node: onnx.NodeProto, name: str) -> tuple[int, ...]:
    """The axes of one of the node's tensors that are told apart: channels of [batch, length, channels], else heads and their channels."""
    shape = graph.shape(name)
    if shape is None or len(shape) not in (3, 4):
        raise Barrier(f"the shape of {name} is not known")
    followed = (2,) if len(shape) == 3 else (1, 3)
    return tuple(size if isinstance(size, int) and axis in followed else 1 for axis, size in enumerate(shape))


def attended(graph: Graph, node: onnx.NodeProto, values: Sequence[Doubles | None], fed: set[str]) -> list[tuple[str, Doubles]]:
    """R of each input, from R of the outputs (context, present keys and values). Raises Barrier where sizes are not known."""
    q, k, v = (_heads(graph, node, slot) for slot in range(3))
    passed: list[tuple[str, Doubles]] = []
    if values[0] is not None:
        own = _per_head(values[0], q[0], v[1])
        own_by_key = own.reshape(k[0], -1, v[1]).sum(1)  # query heads that share keys and values
        totals, key_totals = own.sum(1, keepdims=True), own_by_key.sum(1, keepdims=True)
        parts = [
            (0, np.repeat(totals / q[1], q[1], 1), 0.25), (1, np.repeat(key_totals / k[1], k[1], 1), 0.25), (2, own_by_key, 0.5),
        ]  # fmt: skip
        lead = [part for part in parts if node.input[part[0]] in fed] or parts
        whole = sum(weight for _, _, weight in lead)
        passed += [(node.input[slot], _as_input(graph, node, slot, part * weight / whole)) for slot, part, weight in lead]
    for value, slot, sizes in zip(values[1:3], (1, 2), (k, v), strict=False):
        if value is not None:
            passed.append((node.input[slot], _as_input(graph, node, slot, _per_head(value, *sizes))))
    return passed


def _heads(graph: Graph, node: onnx.NodeProto, slot: int) -> tuple[int, int]:
    """(heads, channels of each) of Q, K or V."""
    shape = graph.shape(node.input[slot])
    if shape is not None and len(shape) == 4:
        number, size = shape[1], shape[3]
    else:
        number = attributes(node).get("q_num_heads" if slot == 0 else "kv_num_heads")
        total = shape[2] if shape is not None and len(shape) == 3 else None
        size = total // number if isinstance(total, int) and number else None
    if not isinstance(number, int) or not isinstance(size, int):
        raise Barrier(f"the heads of {node.input[slot]} are not known")
    return number, size


def _per_head(values: Doubles, heads: int, size: int) -> Doubles:
    """[heads, size] from R of a tensor, spread evenly where it was not told apart."""
    flat = values.reshape(-1)
    if flat.size == heads * size:
        return flat.reshape(heads, size)
    return np.full((heads, size), flat.sum() / (heads * size))


def _as_input(graph: Graph, node: onnx.NodeProto, slot: int, values: Doubles) -> Doubles:
    """[heads, size] along the tracked axes of an input."""
    rank = len(graph.shape(node.input[slot]) or ())
    return values.reshape(1, 1, -1) if rank == 3 else values[None, :, None, :]
