"""Branches that died: an activation that is the same whatever the input is taken out together with everything that only made it.

A residual block whose last layer lost all its weights adds a constant. Where that is 0 the Add goes and the shortcut goes straight on;
where it is another number it becomes an initializer. What the model computes does not change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from relief_onnx.constants import Constants, Routes
from relief_onnx.coupling import Coupling
from relief_onnx.edits import set_initializer, unused
from relief_onnx.graph import Graph
from relief_onnx.layers import find
from relief_onnx.nodes import captured, home_of, subgraphs
from relief_onnx.ops import row_of
from relief_onnx.walk import trace

__all__ = ["DeadBranch", "dead_inputs", "drop_dead_branches"]

# What leaves the other input as it is, by operator and input.
_NEUTRAL: Mapping[tuple[str, int], float] = {
    ("Add", 0): 0.0, ("Add", 1): 0.0, ("Sub", 1): 0.0, ("Mul", 0): 1.0, ("Mul", 1): 1.0, ("Div", 1): 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class DeadBranch:
    """A branch that is gone: the node where it came in, the tensor that was constant, and the nodes that went."""

    join: str
    tensor: str
    nodes: tuple[str, ...]


def drop_dead_branches(model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[DeadBranch, ...]]:
    """Take out every constant input of an element-wise node, and what only led to it."""
    graph = Graph(model)
    plan = find(graph)
    coupling = trace(graph, plan)
    constants = Constants(graph, plan, coupling, Routes(graph, coupling))
    constants.compute()
    result = onnx.ModelProto()
    result.CopyFrom(model)
    dead = []
    for index, slot, values in dead_inputs(graph, coupling, constants):
        tensor, output = graph.nodes[index].input[slot], graph.nodes[index].output[0]
        node = next((item for item in result.graph.node if output in item.output), None)
        if node is None or node.op_type != graph.nodes[index].op_type:
            continue  # it went with another branch
        before = {item.output[0]: item.name or item.op_type for item in result.graph.node if item.output}
        neutral = _NEUTRAL.get((node.op_type, slot))
        if neutral is not None and bool((values == neutral).all()) and len(node.input) == 2:
            _bypass(result, node, node.input[1 - slot])
        else:
            dtype = helper.tensor_dtype_to_np_dtype(graph.types[tensor][0])
            name = unused(result, f"{tensor}/constant")
            set_initializer(result, name, values.astype(dtype))
            node.input[slot] = name
        _sweep(result)
        left = {item.output[0] for item in result.graph.node if item.output}
        gone = tuple(name for output, name in before.items() if output not in left)
        dead.append(DeadBranch(graph.names[index], tensor, gone))
    return result, tuple(dead)


def dead_inputs(graph: Graph, coupling: Coupling, constants: Constants) -> list[tuple[int, int, NDArray[np.float64]]]:
    """(node, input, its value) for each element-wise node that another input, not constant, gives its full shape."""
    found = []
    for index, node in enumerate(graph.nodes):
        row = row_of(node)
        if row is None or row.kind != "mix" or row.data is not None or index in coupling.barriers or index in coupling.constants:
            continue
        dims = graph.dims(node.output[0])
        for slot, name in enumerate(node.input):
            values = constants.values.get(name)
            if values is None or name in graph.initializers or not graph.is_float(name) or not bool(np.isfinite(values).all()):
                continue
            others = [other for place, other in enumerate(node.input) if place != slot and other and other != name]
            alive = [other for other in others if other not in graph.initializers and graph.dims(other) == dims]
            if dims is not None and any(not np.isfinite(constants.values.get(other, np.full(1, np.nan))).all() for other in alive):
                found.append((index, slot, values))
                break
    return found


def _bypass(model: onnx.ModelProto, node: onnx.NodeProto, source: str) -> None:
    """Readers of the node read `source` instead; an output of the model keeps its name."""
    output = node.output[0]
    inside = {name for other in model.graph.node for body in subgraphs(other) for name in captured(body)}
    if output in inside or any(item.name == output for item in model.graph.output):
        node.op_type = "Identity"
        node.input[:] = [source]
        del node.attribute[:]
        return
    for other in model.graph.node:
        for slot, name in enumerate(other.input):
            if name == output:
                other.input[slot] = source
    model.graph.node.remove(node)


def _sweep(model: onnx.ModelProto) -> None:
    """Remove nodes that no output needs, and what only they read."""
    read_before = {name for node in model.graph.node for name in node.input}
    needed = {item.name for item in model.graph.output}
    kept = []
    for node in reversed(model.graph.node):
        if needed & set(node.output) or home_of(node):
            kept.append(onnx.NodeProto.FromString(node.SerializeToString()))
            needed |= set(node.input) | {name for body in subgraphs(node) for name in captured(body)}
    if len(kept) == len(model.graph.node):
        return
    del model.graph.node[:]
    model.graph.node.extend(reversed(kept))
    stored = {item.name for item in model.graph.initializer}
    orphans = (read_before & stored) - needed
    made = {name for node in model.graph.node for name in node.output}
    for field in (model.graph.initializer, model.graph.input):
        for item in [item for item in field if item.name in orphans]:
            field.remove(item)
    for info in [info for info in model.graph.value_info if info.name not in made and info.name not in needed]:
        model.graph.value_info.remove(info)
