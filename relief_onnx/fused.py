"""Nodes that onnxruntime's optimisers fused, and Einsum, laid open: plain operators in their place, and the node again after surgery.

`lay_open` is a pass (see `lowering`). The table of operators is in `fused_rows`. A node that its row cannot lay open stays as it is:
a barrier, for which `refusal` gives the reason.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from relief_onnx.bodies import replace_all
from relief_onnx.datatypes import Kept
from relief_onnx.edits import set_initializer
from relief_onnx.errors import ModelError
from relief_onnx.fused_place import Edited, Place, ordered
from relief_onnx.fused_rows import ROWS
from relief_onnx.graph import Graph
from relief_onnx.moves import Barrier
from relief_onnx.nodes import captured, subgraphs

__all__ = ["lay_open", "refusal"]

# Where onnxruntime keeps convolutions in the layout of one processor.
HARDWARE = "com.microsoft.nchwc"


def _key(node: onnx.NodeProto) -> tuple[str, str]:
    return node.domain, node.op_type


def refusal(graph: Graph, index: int) -> str:
    """Why a node that was fused cannot be laid open; empty where that is no matter."""
    if _key(graph.nodes[index]) not in ROWS:
        return ""
    try:
        ROWS[_key(graph.nodes[index])](Place(graph, index, set()))
    except Barrier as barrier:
        return str(barrier)
    return ""


def lay_open(model: onnx.ModelProto) -> tuple[onnx.ModelProto, _Restore] | None:
    """The model with standard operators for every fused node that the table knows, and the way back; None where there is none.

    Raises ModelError for a model in the layout of one processor.
    """
    hardware = next((node for node in model.graph.node if node.domain == HARDWARE), None)
    if hardware is not None:
        raise ModelError(
            f"node {hardware.name or hardware.output[0]} ({hardware.op_type} of domain {HARDWARE}) holds its weight in the layout of the "
            "processor on which onnxruntime optimised the model at level 'all'; prune the model from before that, "
            "or optimise it at level 'extended' or 'basic'"
        )
    if not any(_key(node) in ROWS for node in model.graph.node):
        return None
    graph = Graph(model)
    taken = {item.name for item in (*model.graph.initializer, *model.graph.input, *model.graph.output)}
    taken |= {name for node in graph.nodes for name in (*node.input, *node.output)} | set(graph.names)
    places: dict[int, Place] = {}
    for index, node in enumerate(graph.nodes):
        if _key(node) in ROWS:
            place = Place(graph, index, taken)
            try:
                ROWS[_key(node)](place)
            except Barrier:
                continue
            places[index] = place
    if not places:
        return None
    result = onnx.ModelProto()
    result.CopyFrom(model)
    nodes = [part for index, node in enumerate(graph.nodes) for part in (places[index].parts.values() if index in places else [node])]
    replace_all(result.graph.node, nodes)
    for place in places.values():
        for name, value in place.constants.items():
            set_initializer(result, name, value)
    _drop_unread(result, {name for place in places.values() for name in place.node.input})
    return result, _Restore(list(places.values()))


class _Restore:
    """Fused nodes again, in the places where the parts still say what one of them would."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = places

    def __call__(self, model: onnx.ModelProto, kept: Kept) -> onnx.ModelProto:
        """`model` is a lowered model after edits."""
        result = onnx.ModelProto()
        result.CopyFrom(model)
        index = Edited(result)
        gone: dict[int, list[onnx.NodeProto]] = {}
        for place in self.places:
            rewrite = place.restored(index)
            if rewrite is None:
                continue
            gone |= {id(node): [] for node in rewrite.gone}
            gone[id(rewrite.gone[0])] = list(rewrite.nodes)
            for name, value in rewrite.new.items():
                set_initializer(result, name, value)
        nodes = [new for node in index.nodes for new in gone.get(id(node), [node])]
        read = {name for node in index.nodes for name in node.input}
        replace_all(result.graph.node, ordered(nodes, _reads))
        _drop_unread(result, read | {name for place in self.places for name in place.constants})
        return result


def _reads(node: onnx.NodeProto) -> list[str]:
    return [*node.input, *(name for body in subgraphs(node) for name in captured(body))]


def _drop_unread(model: onnx.ModelProto, names: set[str]) -> None:
    """Stored tensors among `names` that nobody reads any more, and what the file says about tensors that are gone."""
    read = {name for node in model.graph.node for name in _reads(node)} | {item.name for item in model.graph.output}
    unread = {item.name for item in model.graph.initializer} & (names - read)
    for field in (model.graph.initializer, model.graph.input):  # old files list what is stored among the inputs
        for item in [item for item in field if item.name in unread]:
            field.remove(item)
    there = read | {name for node in model.graph.node for name in node.output}
    for info in [info for info in model.graph.value_info if info.name not in there]:
        model.graph.value_info.remove(info)
