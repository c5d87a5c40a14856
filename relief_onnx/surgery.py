"""Cutting dead units out of a model: initializers get shorter, and whatever names a size is rewritten.

`operate` takes a model whose masked weights are already zero, finds what is provably dead (`liveness`) and removes it. What the model
computes does not change. Running it twice is the same as running it once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from relief_onnx.aside import array_of, tensor_of
from relief_onnx.branches import DeadBranch, drop_dead_branches
from relief_onnx.coupling import Coupling
from relief_onnx.datatypes import Kept
from relief_onnx.edits import Cut, edit_nodes, set_attribute, set_initializer, unused
from relief_onnx.graph import Graph, attributes, subgraphs
from relief_onnx.layers import LAYER_OPERATORS, Layer, Plan, find
from relief_onnx.liveness import Fold, Removal, find_dead
from relief_onnx.recurrent_layers import made
from relief_onnx.sources import VIEW_OPERATORS
from relief_onnx.states import NO_STATES, States
from relief_onnx.two_ways import chosen_columns, composed, crossed
from relief_onnx.views import View
from relief_onnx.walk import trace

__all__ = ["Operation", "apply_weights", "operate", "set_initializer"]


@dataclass(frozen=True)
class Operation:
    """A model after surgery. See `operate`."""

    model: onnx.ModelProto
    units_removed: int
    channels: Mapping[str, tuple[int, int]]
    surviving: Mapping[str, NDArray[np.bool_]]
    folded: tuple[str, ...]
    dead_branches: tuple[DeadBranch, ...] = ()
    dead_inputs: bool = False
    silenced: bool = False
    kept: Kept = field(default_factory=dict)


def operate(model: onnx.ModelProto, states: States = NO_STATES, *, units: bool = True) -> Operation:
    """Remove every provably dead unit and weight; without `units` weights alone, which leave zeros.

    `channels` maps a layer's name to its output channels before and after; `surviving` maps a weight to flags in the canonical
    layout [out, in per group, *kernel] of the input model: which single weights are left and not zero (of a shared weight, as its
    first reader sees it), and `kept` which of its rows and columns; `folded` names layers whose bias took over a constant;
    `dead_branches` are gone with all their nodes. states: inputs and outputs of the model that may get narrower; all others keep their
    shapes.
    """
    operation, kept = _operate_once(model, states, units)
    found = operation
    names = _names(model)
    while True:
        lighter, dead = drop_dead_branches(found.model) if found.dead_inputs else (found.model, ())
        if not (found.units_removed or dead or found.silenced):
            return replace(operation, kept=kept, channels={name: operation.channels[output] for name, output in names.items()})
        # A cut can loosen a coupling: of a grouped convolution with one channel left per group, each channel can go alone. A bias that
        # nobody reads and that is now 0 may be what a norm or a sum over channels was waiting for.
        found, now = _operate_once(lighter, states, units)
        operation, kept = _followed(replace(operation, dead_branches=(*operation.dead_branches, *dead)), kept, found, now)


def _names(model: onnx.ModelProto) -> dict[str, str]:
    """Outputs by the layer's name: nodes without a name of their own have their number in it, which changes with a cut."""
    graph = Graph(model)
    return {layer.name: made(graph.nodes[layer.node]) for layer in find(graph).layers}


def _followed(first: Operation, kept: Kept, second: Operation, now: Kept) -> tuple[Operation, Kept]:
    """Two operations, one after the other, in terms of the first one's model."""
    surviving, both = dict(first.surviving), dict(kept)
    stored = {item.name for item in second.model.graph.initializer}
    for weight, (rows, columns) in kept.items():
        if weight in now or weight not in stored:
            surviving[weight] = np.zeros_like(first.surviving[weight])
        if weight in now:
            surviving[weight][crossed(rows, columns)] = second.surviving[weight]
            both[weight] = (rows[now[weight][0]], composed(columns, now[weight][1]))
    left = {output for node in second.model.graph.node for output in node.output}
    channels = {
        output: (before, second.channels.get(output, (after, after if output in left else 0))[1])
        for output, (before, after) in first.channels.items()
    }
    folded = tuple(dict.fromkeys((*first.folded, *second.folded)))
    removed = first.units_removed + second.units_removed
    return Operation(second.model, removed, channels, surviving, folded, first.dead_branches), both


def _operate_once(model: onnx.ModelProto, states: States, units: bool) -> tuple[Operation, Kept]:
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = Graph(model)  # of the model before the cut; `result` is edited
    plan = find(graph)
    coupling = trace(graph, plan, states)
    removal = find_dead(graph, plan, coupling)
    if not units:
        removal = replace(removal, units=set(), folds=[])
    left = {layer.node: int((~_gone(coupling.outputs[layer.key], removal)).sum()) for layer in plan.layers}
    counts = {made(graph.nodes[layer.node]): (layer.out_channels, left[layer.node]) for layer in plan.layers}
    first = {weight: layers[0] for weight, layers in plan.by_weight().items()}
    surviving = {weight: _surviving(layer, coupling, removal) for weight, layer in first.items()}
    kept = {weight: _kept(layer, coupling, removal) for weight, layer in first.items()}
    silenced = _write_weights(result, graph, plan, removal)
    for fold in removal.folds:
        _fold(result, graph, fold, ~_gone(coupling.outputs[fold.layer.key], removal))
    for layer in plan.single().values():
        before, after = counts[graph.nodes[layer.node].output[0]]
        if layer.groups > 1 and layer.in_per_group == 1 and after < before:
            set_attribute(result.graph.node[layer.node], "group", after * layer.groups // layer.out_channels)
    if removal.units:
        _cut(result, graph, coupling, removal)
    folded = tuple(fold.layer.name for fold in removal.folds)
    return Operation(result, len(removal.units), counts, surviving, folded, dead_inputs=removal.dead_inputs, silenced=silenced), kept


def _kept(layer: Layer, coupling: Coupling, removal: Removal) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    rows = np.flatnonzero(~_gone(coupling.outputs[layer.key], removal))
    if layer.groups > 1 and layer.in_per_group == 1:
        return rows, np.arange(1)
    if layer.recurrent is not None and layer.recurrent.part == "R":
        kind = layer.recurrent
        read = coupling.inputs[layer.key].reshape(kind.directions, -1, kind.hidden)[:, 0]
        return rows, chosen_columns(~_gone(read, removal))
    return rows, np.flatnonzero(~_gone(coupling.inputs[layer.key][: layer.in_per_group], removal))


def _gone(units: NDArray[np.int64], removal: Removal) -> NDArray[np.bool_]:
    return np.isin(units, list(removal.units)) if removal.units else np.zeros(units.shape, bool)


def _surviving(layer: Layer, coupling: Coupling, removal: Removal) -> NDArray[np.bool_]:
    alive: NDArray[np.bool_] = removal.weights[layer.key] != 0
    alive[_gone(coupling.outputs[layer.key], removal)] = False
    inputs = _gone(coupling.inputs[layer.key], removal).reshape(layer.groups, -1)
    if layer.groups == 1 or layer.in_per_group > 1:
        alive[np.repeat(inputs, layer.out_channels // layer.groups, 0)] = False
    return alive


def apply_weights(model: onnx.ModelProto, arrays: Mapping[str, NDArray[Any]]) -> onnx.ModelProto:
    """A copy with those initializers replaced, in the graph and in the bodies of its nodes."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for item in _stored(result.graph):
        if item.name in arrays:
            tensor = tensor_of(np.ascontiguousarray(arrays[item.name]), item.name, item)
            tensor.doc_string = item.doc_string
            item.CopyFrom(tensor)
    return result


def _stored(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for body in subgraphs(node):
            yield from _stored(body)


def _write_weights(model: onnx.ModelProto, graph: Graph, plan: Plan, removal: Removal) -> bool:
    """Zeros where nobody reads; whether a bias changed."""
    changed = False
    for layer in plan.layers:
        weight = layer.view.invert(removal.weights[layer.key])
        if not np.array_equal(weight, graph.array(layer.weight)):
            set_initializer(model, layer.weight, weight)
        silenced = removal.silenced_biases.get(layer.key)
        if layer.bias is not None and not layer.bias.shared and silenced is not None and silenced.any():
            bias = layer.bias.view.apply(graph.array(layer.bias.name)).copy()
            if bias[silenced].any():
                bias[silenced] = 0
                set_initializer(model, layer.bias.name, layer.bias.view.invert(bias))
                changed = True
    return changed


def _fold(model: onnx.ModelProto, graph: Graph, fold: Fold, keep: NDArray[np.bool_]) -> None:
    """Add the constant to the layer's bias; a bias that is new has only the units in `keep` (an old one is cut later)."""
    layer = fold.layer
    if layer.bias is not None:
        current = next(item for item in model.graph.initializer if item.name == layer.bias.name)
        bias = layer.bias.view.apply(array_of(current))
        moved = (bias + fold.amount / layer.bias.factor).astype(bias.dtype)
        set_initializer(model, layer.bias.name, layer.bias.view.invert(moved))
        return
    node, slot = model.graph.node[layer.node], LAYER_OPERATORS[layer.op].bias_slot
    assert slot is not None
    name = unused(model, f"{layer.weight}/bias")
    dtype = graph.array(layer.weight).dtype
    shape = (-1, 1) if layer.output_axis == 0 else (-1,)
    beta = float(attributes(node).get("beta", 1.0)) if layer.op == "Gemm" else 1.0
    if beta == 0:
        set_attribute(node, "beta", 1.0)
        beta = 1.0
    set_initializer(model, name, (fold.amount[keep] / beta).astype(dtype).reshape(shape))
    inputs = [*node.input, *[""] * (slot + 1 - len(node.input))]
    inputs[slot] = name
    node.input[:] = inputs


def _cut(model: onnx.ModelProto, graph: Graph, coupling: Coupling, removal: Removal) -> None:
    before = _shapes(model)
    cut = Cut(model, graph, coupling, frozenset(removal.units))
    done = set()
    for tie in coupling.ties:
        if (tie.initializer, tie.axis) in done:
            continue
        done.add((tie.initializer, tie.axis))
        keep = cut.keep(tie.units)
        if not keep.all():
            current = next(item for item in model.graph.initializer if item.name == tie.initializer)
            set_initializer(model, tie.initializer, tie.taken(array_of(current), keep))
    sizes = {name: cut.sizes(name) for name in coupling.pictures}
    edit_nodes(cut)
    sizes |= _follow_views(cut, before)
    for info in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        dims = info.type.tensor_type.shape.dim
        for axis, size in sizes.get(info.name, {}).items():
            if axis < len(dims) and dims[axis].HasField("dim_value"):
                dims[axis].dim_value = size


Shapes = dict[str, tuple[int, ...]]


def _shapes(model: onnx.ModelProto) -> Shapes:
    return {item.name: tuple(item.dims) for item in model.graph.initializer}


def _follow_views(cut: Cut, before: Shapes) -> dict[str, dict[int, int]]:
    """New shapes of weights on their way through Transpose, Reshape and the like, by tensor.

    A Reshape that names an old size is rewritten.
    """
    model, graph = cut.model, cut.graph
    after = _shapes(model)
    constants = {graph.nodes[index].output[0] for index in cut.coupling.constants}
    for node in model.graph.node:
        if not node.output or node.output[0] not in constants:
            continue
        if node.op_type not in VIEW_OPERATORS or node.input[0] not in before:
            continue
        source, name = node.input[0], node.output[0]
        constant = graph.constant(node.input[1]) if len(node.input) > 1 and node.input[1] else None
        target = None if constant is None else tuple(int(size) for size in constant.reshape(-1))
        old = VIEW_OPERATORS[node.op_type](View.of(before[source]), attributes(node), target)
        if node.op_type == "Reshape" and after[source] != before[source]:
            axes = [old.source_axis(axis) for axis in range(len(old.shape))]
            new = tuple(size if axis is None else after[source][axis] for size, axis in zip(old.shape, axes, strict=True))
            node.input[1] = unused(model, f"{name}/shape")
            set_initializer(model, node.input[1], np.asarray(new, np.int64))
            target = new
        before[name] = old.shape
        after[name] = VIEW_OPERATORS[node.op_type](View.of(after[source]), attributes(node), target).shape
    return {name: dict(enumerate(shape)) for name, shape in after.items() if name in before and name not in graph.initializers}
