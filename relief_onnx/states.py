"""State inputs and outputs of recurrent nodes that may lose hidden units: which they are, and masks for them while a cut is made.

An input is a state where it is moved (and nothing else) to where an LSTM, GRU or RNN takes its first state; an output is one where it is
moved from such nodes' outputs alone. In the masked model a state input is multiplied by 0 where its unit goes, so that the unit is 0
from the first step on whatever the caller feeds; surgery then cuts the mask with the input, and what is left of it are ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper

from relief_onnx.aside import array_of
from relief_onnx.coupling import Coupling
from relief_onnx.edits import set_initializer, unused
from relief_onnx.graph import FLOATS, Graph
from relief_onnx.layers import Plan, find
from relief_onnx.nodes import STANDARD
from relief_onnx.recurrent import initial_states
from relief_onnx.recurrent_reads import cell_of

__all__ = ["NO_STATES", "States", "find_states", "masked_states", "origins", "without_masks"]

_MOVES = frozenset({
    "Identity", "Transpose", "Squeeze", "Unsqueeze", "Reshape", "Slice", "Split", "Gather", "Concat", "Cast", "Expand", "ScatterND",
})  # fmt: skip
_MASK = "/state_mask"


@dataclass(frozen=True)
class States:
    """Inputs (name -> the axis of hidden units) and outputs of the model that may get narrower."""

    inputs: Mapping[str, int] = field(default_factory=dict)
    outputs: frozenset[str] = frozenset()


NO_STATES = States()


def find_states(graph: Graph, plan: Plan) -> States:
    """The state inputs and outputs of recurrent nodes.

    An input's axis is its last that is as long as the node has hidden units; where none is, the last that is several times as long (both
    directions, h and c, or several nodes side by side).
    """
    given = {info.name for info in graph.inputs if graph.types.get(info.name, (0, None))[0] in FLOATS} - set(graph.outputs)
    inputs: dict[str, int] = {}
    made: set[str] = set()
    for index, layers in plan.recurrent().items():
        kind = layers["R"].recurrent
        assert kind is not None
        made |= {name for name in graph.nodes[index].output if name}
        for state in initial_states(graph.nodes[index]):
            for name in origins(graph, state, frozenset()) & given:
                sizes = [(axis, size) for axis, size in enumerate(graph.shape(name) or ()) if isinstance(size, int) and size]
                axes = [axis for axis, size in sizes if size == kind.hidden] or [axis for axis, size in sizes if size % kind.hidden == 0]
                if axes and kind.hidden > 1:
                    inputs.setdefault(name, axes[-1])
    ends = made | set(inputs)
    return States(inputs, frozenset(name for name in graph.outputs if origins(graph, name, frozenset(made)) <= ends))


def origins(graph: Graph, name: str, stop: frozenset[str]) -> set[str]:
    """The tensors that `name` is moved from; those in `stop` count as origins."""
    found, todo, seen = set(), [name], set()
    while todo:
        tensor = todo.pop()
        node = graph.nodes[graph.producer[tensor]] if tensor in graph.producer and tensor not in stop else None
        if node is None or node.domain not in STANDARD or node.op_type not in _MOVES:
            found.add(tensor)
        elif tensor not in seen:
            seen.add(tensor)
            todo += node.input if node.op_type == "Concat" else node.input[: 3 if node.op_type == "ScatterND" else 1 : 2]
    return found


def masked_states(model: onnx.ModelProto, arrays: Graph, coupling: Coupling, states: States) -> onnx.ModelProto:
    """`model` with 0 in its state inputs where a unit has no weight left. arrays: the masked weights that `coupling` names."""
    masks = {}
    gone = _without_weights(arrays, coupling)
    for name, axis in states.inputs.items():
        picture = coupling.pictures[name]
        if picture.shape[axis] > 1:
            keep = ~np.isin(coupling.line(name, axis), list(gone))
            if not keep.all():
                masks[name] = keep.reshape([-1 if place == axis else 1 for place in range(picture.ndim)])
    if not masks:
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    nodes, renamed = [], {}
    kinds = {info.name: info.type.tensor_type.elem_type for info in model.graph.input}
    for name, keep in masks.items():
        mask, renamed[name] = unused(model, f"{name}{_MASK}"), unused(model, f"{name}/state")
        set_initializer(result, mask, keep.astype(helper.tensor_dtype_to_np_dtype(kinds[name])))
        nodes.append(helper.make_node("Mul", [name, mask], [renamed[name]], name=renamed[name]))
    _rename(result, renamed)
    old = [onnx.NodeProto.FromString(node.SerializeToString()) for node in result.graph.node]
    del result.graph.node[:]
    result.graph.node.extend([*nodes, *old])
    return result


def _without_weights(arrays: Graph, coupling: Coupling) -> set[int]:
    """Units that can go and have nothing but zeros wherever something is stored for them."""
    found: set[int] = set()
    alive: set[int] = set(coupling.pinned)
    for index, layers in find(arrays).recurrent().items():
        if not cell_of(arrays.nodes[index]).keeps_zero:  # such a unit would not stay 0
            alive |= set(coupling.outputs[layers["R"].key].tolist())
    for tie in coupling.ties:
        if tie.zeroable and arrays.is_float(tie.initializer):
            holds = tie.holding(arrays.array(tie.initializer) != 0)
            found |= set(tie.units.reshape(-1).tolist())
            alive |= set(tie.units[holds].tolist())
    return found - alive


def without_masks(model: onnx.ModelProto, states: States) -> onnx.ModelProto:
    """`model` after surgery, without the masks of states that are all ones."""
    ones = {
        item.name for item in model.graph.initializer if _MASK in item.name and bool((array_of(item) == 1).all())
    }  # fmt: skip
    nodes = [
        node for node in model.graph.node
        if node.op_type == "Mul" and node.input[0] in states.inputs and node.input[1] in ones
    ]  # fmt: skip
    if not nodes:
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for node in nodes:
        result.graph.node.remove(node)
        _rename(result, {node.output[0]: node.input[0]})
    gone = {name for node in nodes for name in (node.input[1], node.output[0])}
    for items in (result.graph.initializer, result.graph.input, result.graph.value_info):
        for item in [item for item in items if item.name in gone]:
            items.remove(item)
    return result


def _rename(model: onnx.ModelProto, names: Mapping[str, str]) -> None:
    for node in model.graph.node:
        for slot, name in enumerate(node.input):
            node.input[slot] = names.get(name, name)
