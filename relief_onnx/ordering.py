"""Nodes in an order in which every tensor is made before it is read, as the standard asks for.

onnxruntime sorts nodes when it loads a file, so files that are not sorted run there; its own float16 converter writes such files.
"""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence
from itertools import chain

import onnx

from relief_onnx.nodes import captured, subgraphs

__all__ = ["sort_nodes"]


def sort_nodes(nodes: MutableSequence[onnx.NodeProto]) -> None:
    """Sort nodes in place, and those of their bodies; what is sorted, or goes in a circle, stays as it is."""
    for body in chain.from_iterable(map(subgraphs, nodes)):
        sort_nodes(body.node)
    maker = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    needs = [sorted({maker[name] for name in _read(node) if name in maker}) for node in nodes]
    if all(not own or own[-1] < index for index, own in enumerate(needs)):
        return
    order = _sorted(needs)
    if len(order) == len(nodes):
        copies = [onnx.NodeProto.FromString(nodes[index].SerializeToString()) for index in order]
        del nodes[:]
        nodes.extend(copies)


def _read(node: onnx.NodeProto) -> set[str]:
    return set(node.input).union(*map(captured, subgraphs(node)))


def _sorted(needs: Sequence[Sequence[int]]) -> list[int]:
    """Numbers in rising order, each behind those that it needs; without those in a circle and behind it."""
    order: dict[int, None] = {}
    for first in range(len(needs)):
        waiting, seen = [first], {first}
        while waiting:
            missing = [need for need in needs[waiting[-1]] if need not in order]
            if not missing:
                order[waiting.pop()] = None
            elif missing[0] in seen:
                return []  # a circle
            else:
                waiting.append(missing[0])
                seen.add(missing[0])
    return list(order)
