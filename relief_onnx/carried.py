"""Weights that a loop hands from round to round as they are, as TensorFlow's converter writes them: its while loops have no other way to
what stands outside. The body reads them from the graph around it instead, where weights that bodies share are looked for. To quantise
them, weights that bodies store themselves are brought out likewise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import onnx
from onnx import helper

from relief_onnx.bodies import keep_only, replace_all
from relief_onnx.lifting import rename_in
from relief_onnx.nodes import STANDARD, captured, every_node, subgraphs

__all__ = ["uncarried", "with_weights_outside"]

# Where states begin, and since which opset they are the same inside as outside: inputs of node and body, results of the body.
_STATES: Mapping[str, tuple[int, int, int]] = {"Loop": (2, 1, 1), "Scan": (0, 0, 9)}


def uncarried(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which bodies read states that never change from outside; the model where there are none."""
    if not any(_unchanging(model, node) for node in every_node(model.graph)):
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    _rewrite(result, result.graph)
    return result


def with_weights_outside(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which the graph around bodies stores their weights (two axes or more); the model where they have none.

    No name of a body may hide one of outside (see `shadows`). What several bodies call by one name stays.
    """
    bodies = [body for node in every_node(model.graph) for body in subgraphs(node)]
    held = Counter(item.name for graph in (model.graph, *bodies) for item in graph.initializer)
    held.update(name for graph in bodies for node in graph.node for name in node.output)
    inside = {item.name for body in bodies for item in body.initializer if len(item.dims) > 1 and held[item.name] == 1}
    if not inside or model.ir_version < 4:
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for node in every_node(result.graph):
        for body in subgraphs(node):
            result.graph.initializer.extend(item for item in body.initializer if item.name in inside)
            keep_only(body.initializer, lambda item: item.name not in inside)
            keep_only(body.input, lambda item: item.name not in inside)
    return result


def _unchanging(model: onnx.ModelProto, node: onnx.NodeProto) -> list[int]:
    """Inputs of a Loop or Scan that are such states."""
    if node.op_type not in _STATES or node.domain not in STANDARD:
        return []
    first, results, since = _STATES[node.op_type]
    if any(item.version < since for item in model.opset_import if item.domain in STANDARD):
        return []
    (body,) = subgraphs(node)
    made = {item.output[0]: item.input[0] for item in body.node if item.op_type == "Identity" and item.domain in STANDARD}
    ends = [item.name for item in body.output]
    scanned = sum(item.i for item in node.attribute if item.name == "num_scan_inputs")
    found = []
    for slot in range(first, len(node.input) - scanned):
        state, end = body.input[slot].name, ends[slot - first + results]
        while end != state and end in made:
            end = made[end]
        if end == state and node.input[slot] and ends.count(state) <= (ends[slot - first + results] == state):
            found.append(slot)
    left = [name for number, name in enumerate(node.output) if name and number + first not in found]
    return found if left else []


def _rewrite(model: onnx.ModelProto, graph: onnx.GraphProto) -> None:
    """Outer loops first: what an inner one is given may be a state of the outer one."""
    nodes = []
    for node in graph.node:
        for slot in reversed(_unchanging(model, node)):
            given, handed = _read_outside(node, slot)
            if handed and _is_read(graph, handed):
                nodes.append(helper.make_node("Identity", [given], [handed], name=f"{node.name}/{handed}"))
        for body in subgraphs(node):
            _rewrite(model, body)
        nodes.append(node)
    if len(nodes) > len(graph.node):
        replace_all(graph.node, nodes)


def _read_outside(node: onnx.NodeProto, slot: int) -> tuple[str, str]:
    """What the body reads now, and what the node had handed out for it; empty where it had not."""
    (body,) = subgraphs(node)
    first, results, _ = _STATES[node.op_type]
    given, state = node.input[slot], body.input[slot].name
    del node.input[slot], body.input[slot], body.output[slot - first + results]
    keep_only(body.value_info, lambda item: item.name != state)
    rename_in(body, {state: given})
    return given, node.output.pop(slot - first) if slot - first < len(node.output) else ""


def _is_read(graph: onnx.GraphProto, name: str) -> bool:
    inside = (captured(body) for node in graph.node for body in subgraphs(node))
    read = {item for node in graph.node for item in node.input} | {item.name for item in graph.output}
    return name in read.union(*inside)
