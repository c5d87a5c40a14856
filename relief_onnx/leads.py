"""Which tensors layers lead to, and which of these layers no relevance reaches: what they make only chooses among what others make."""

from __future__ import annotations

from collections.abc import Collection

from relief_onnx.graph import Graph
from relief_onnx.layers import Plan
from relief_onnx.ops import passing_row_of

__all__ = ["led_to", "starved", "working"]


def working(plan: Plan) -> set[int]:
    """The nodes that are layers, or hold some."""
    return {layer.node if layer.inside is None else layer.inside for layer in plan.layers}


def led_to(graph: Graph, nodes: Collection[int]) -> set[str]:
    """Tensors that some of the nodes lead to; sizes do not count."""
    found: set[str] = set()
    for index, node in enumerate(graph.nodes):
        row = passing_row_of(node)
        if row is not None and row.flow == "none":
            continue
        if index in nodes or any(name in found for name in graph.read_by(index)):
            found.update(name for name in node.output if name)
    return found


def starved(graph: Graph, plan: Plan, reached: Collection[str]) -> set[str]:
    """Tensors that a layer leads to of whose outputs relevance reached none. reached: all tensors that it did reach."""
    return led_to(graph, {index for index in working(plan) if not any(name in reached for name in graph.nodes[index].output)})
