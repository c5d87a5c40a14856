"""Detours: heads join the batch, the last two axes change places, and heads come apart again, as exporters write k transposed.

The tensors between have no axis of heads, yet nothing happens to a head there: what comes out is what went in, transposed.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from relief_onnx.graph import Graph, attributes

__all__ = ["Detour", "find_detours"]


@dataclass(frozen=True)
class Detour:
    """Nodes `first` to `last` make [B, H, Y, X] of `source` [B, H, X, Y], by way of [B * H, X, Y]."""

    first: int
    last: int
    source: str


def find_detours(graph: Graph) -> list[Detour]:
    """Every detour whose sizes between follow the number of heads by themselves."""
    found = (_ending_at(graph, index) for index, node in enumerate(graph.nodes) if node.op_type == "Reshape")
    return [detour for detour in found if detour is not None]


def _only(graph: Graph, tensor: str, operator: str) -> onnx.NodeProto | None:
    """The node of that kind that makes a tensor which only one node reads."""
    if tensor not in graph.producer or len(graph.uses.get(tensor, ())) != 1 or graph.is_output(tensor):
        return None
    node = graph.nodes[graph.producer[tensor]]
    return node if node.op_type == operator and node.domain in ("", "ai.onnx") else None


def _ending_at(graph: Graph, index: int) -> Detour | None:
    last = graph.nodes[index]
    middle = _only(graph, last.input[0], "Transpose")
    first = _only(graph, middle.input[0], "Reshape") if middle is not None else None
    if middle is None or first is None or len(first.input) < 2 or tuple(attributes(middle).get("perm", ())) != (0, 2, 1):
        return None
    before, joined, after = (graph.dims(name) for name in (first.input[0], first.output[0], last.output[0]))
    target = graph.values(first.input[1])
    if before is None or joined is None or after is None or target is None or (len(before), len(joined)) != (4, 3):
        return None
    batch, heads, x, y = before
    follows = target[0].value == -1 and all(entry.value != -1 for entry in target[1:])
    fits = joined[1:] == (x, y) and after == (batch, heads, y, x) and joined[0].divided(heads) == batch
    return Detour(graph.producer[first.output[0]], index, first.input[0]) if follows and fits else None
