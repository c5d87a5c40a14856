"""Normalisation over groups of channels, as one operator or as exporters write it: Reshape, InstanceNormalization, Reshape.

Whole groups of channels can go. Where groups of different sizes overlap (a U-Net that joins two widths) everything hangs together;
then single channels can go instead if zeros take their places just for the statistics (see `edits`).
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from relief_onnx.graph import Graph, attributes

__all__ = ["GroupNorm", "find_group_norms"]


@dataclass(frozen=True)
class GroupNorm:
    """Nodes `first` to `last` (one and the same for the operator) normalise `source` [N, C, ...] over groups of several channels."""

    first: int
    last: int
    source: str


def find_group_norms(graph: Graph) -> list[GroupNorm]:
    """Every normalisation whose groups have more than one channel."""
    found = []
    for index, node in enumerate(graph.nodes):
        if node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type == "InstanceNormalization":
            norm = _around(graph, node)
        elif node.op_type == "GroupNormalization":
            channels = _channels(graph, node.input[0])
            several = channels is not None and channels > attributes(node)["num_groups"]
            norm = GroupNorm(index, index, node.input[0]) if several else None
        else:
            continue
        if norm is not None:
            found.append(norm)
    return found


def _channels(graph: Graph, tensor: str) -> int | None:
    dims = graph.dims(tensor)
    return dims[1].value if dims is not None and len(dims) > 2 else None


def _around(graph: Graph, node: onnx.NodeProto) -> GroupNorm | None:
    """The Reshapes before and after, that split the channels into groups and put them together again."""
    output = node.output[0]
    uses = graph.uses.get(output, [])
    if node.input[0] not in graph.producer or len(uses) != 1 or uses[0].slot != 0 or graph.is_output(output):
        return None
    first, last = graph.producer[node.input[0]], uses[0].node
    before, after = graph.nodes[first], graph.nodes[last]
    if before.op_type != "Reshape" or after.op_type != "Reshape" or len(graph.uses[before.output[0]]) != 1 or len(after.input) < 2:
        return None
    source, inner, result = (graph.dims(name) for name in (before.input[0], before.output[0], after.output[0]))
    channels, groups = _channels(graph, before.input[0]), _channels(graph, before.output[0])
    if source is None or inner is None or source != result or channels is None or groups is None or inner[0] != source[0]:
        return None
    return GroupNorm(first, last, before.input[0]) if channels > groups and channels % groups == 0 else None
