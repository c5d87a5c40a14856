"""What rows of `quantised_open` share: what stands for a node, what it becomes again, and which names tensors of integers get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from relief_onnx.aside import tensor_of
from relief_onnx.edits import unused
from relief_onnx.graph import Graph

__all__ = ["Closed", "Opened", "before", "only_such", "put"]


@dataclass(frozen=True)
class Opened:
    """What stands for a node: `nodes`, of which the one named `key` computes, and initializers.

    made: tensors that the file does not have.
    """

    key: str
    nodes: tuple[onnx.NodeProto, ...]
    tensors: Mapping[str, TensorProto]
    made: frozenset[str]


@dataclass(frozen=True)
class Closed:
    """A node of the file again, in the place of node number `at`; `gone` are those that it stands for."""

    at: int
    gone: frozenset[int]
    node: onnx.NodeProto
    tensors: Mapping[str, TensorProto] = field(repr=False)


def only_such(graph: Graph, name: str, operator: str, slots: tuple[int, ...], with_it: tuple[str, ...]) -> bool:
    """Whether all who read a tensor are nodes of that operator that read it in the same slot, with the same `with_it` in `slots`."""
    for use in graph.uses.get(name, ()):
        node = graph.nodes[use.node]
        if use.slot < 0 or node.op_type != operator:
            return False
        if tuple(node.input[slot] if slot < len(node.input) else "" for slot in slots) != with_it:
            return False
    return not graph.is_output(name)


def before(graph: Graph, tensor: str, operators: tuple[str, ...]) -> tuple[onnx.NodeProto, ...] | None:
    """The nodes of those operators, from the last one back, that make a tensor by their first inputs; None where others do."""
    found: list[onnx.NodeProto] = []
    for operator in operators:
        if tensor not in graph.producer or graph.nodes[graph.producer[tensor]].op_type != operator:
            return None
        found.append(graph.nodes[graph.producer[tensor]])
        tensor = found[-1].input[0]
    return tuple(found)


def put(
    tensors: dict[str, TensorProto], source: Graph, graph: Graph, name: str, array: NDArray[np.generic], owner: str, slot: int
) -> str:  # fmt: skip
    """Store an array that the file holds as `name`: under that name where it is the same, or where only nodes that read the weight `owner`
    in input number `slot` read it, else under a new one. Returns the name."""
    held = source.initializers.get(name)
    if held is not None and source.array(name).dtype == array.dtype and np.array_equal(source.array(name), array):
        tensors[name] = held
        return name
    others = any(use.slot < 0 or owner not in source.nodes[use.node].input[slot : slot + 1] for use in source.uses.get(name, ()))
    target = unused(graph.model, f"{name}~{owner}") if others or source.is_output(name) else name
    tensors[target] = tensor_of(np.ascontiguousarray(array), target, held)
    if target == name and held is not None and held.doc_string:
        tensors[target].doc_string = held.doc_string
    return target
