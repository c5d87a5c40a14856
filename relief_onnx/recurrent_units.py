"""Hidden units of LSTM, GRU and RNN nodes: what is coupled, which are always 0, and which are read.

A hidden unit is its rows of all gates in W, R, B and P, its column of R, its place in the first states, and its entry in every output.
Each direction has units of its own, of which as many go in each (`two_ways`). A unit is always 0 where its candidate gate hears nothing (no
weight, no bias) and it starts from 0: then it can go. Where its first state comes from elsewhere (an input of the model) it stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from relief_onnx.aside import array_of
from relief_onnx.coupling import Units, ZeroReader
from relief_onnx.graph import Graph, attributes
from relief_onnx.layers import Layer
from relief_onnx.moves import Barrier, long_axes
from relief_onnx.nodes import STANDARD, is_level, rounds_states
from relief_onnx.ops import row_of
from relief_onnx.recurrent_layers import Recurrent, own_half, whole_bias
from relief_onnx.recurrent_reads import cell_of
from relief_onnx.sources import Source, trace_constant

if TYPE_CHECKING:
    from relief_onnx.walk import Walk

__all__ = ["always_zero", "as_picture", "is_zero", "read_units", "stored_zeros", "tiled", "walk_recurrent"]

Flags = NDArray[np.bool_]
Values = NDArray[np.float64]

# The gate whose row decides what a unit becomes, in the order of the rows.
CANDIDATE: Mapping[str, int] = {"LSTM": 3, "GRU": 2, "RNN": 0}
# Operators that move states along axes or leave them as they are.
_MOVING = frozenset({
    "Cast", "Concat", "Dropout", "Flatten", "Gather", "Identity", "Reshape", "Shape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
})  # fmt: skip
# Operators that make zeros of zeros.
_SPREADING = frozenset({"Expand", "Slice", "Gather", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Cast", "Tile"})


def walk_recurrent(walk: Walk, index: int, node: onnx.NodeProto, layers: Mapping[str, Layer]) -> None:
    """Units of a recurrent node whose weights are layers, and the channels that W reads."""
    walk.rank_known([node.input[0]])
    graph, kind = walk.graph, layers["W"].recurrent
    assert kind is not None
    where = f"{node.op_type} node {graph.names[index]}"
    picture = walk.picture(node.input[0])
    others = [axis for axis in long_axes(picture) if axis != 2]
    if others:
        raise Barrier("it carries other axes than the one it reads", others)
    hidden = walk.units.fresh(kind.directions * kind.hidden).reshape(kind.directions, kind.hidden)
    if kind.directions > 1 and kind.hidden > 1:
        walk.ways.append(hidden)
    if rounds_states(node) or is_level(node):
        walk.unite(hidden, hidden[:1], where)
    rows, across = np.tile(hidden, kind.gates), 0 if kind.directions > 1 else None
    inputs = {
        "W": np.broadcast_to(picture.reshape(-1), layers["W"].in_per_group).copy(),
        "R": np.repeat(hidden, layers["R"].groups // kind.directions, 0).reshape(-1),
    }
    for slot, part in enumerate("WR", 1):
        layer, since = layers[part], len(walk.ties)
        source = trace_constant(graph, node.input[slot])
        assert isinstance(source, Source)
        why = f"{where}: its weight {layer.weight} reaches the node through a layout that mixes channels"
        walk.tie_view(source.name, source.view, 1, _lines(rows), why, True, across)
        columns = (inputs[part], None) if part == "W" else (_lines(hidden), across)
        walk.tie_view(source.name, source.view, 2, columns[0], why, True, columns[1])
        walk.used(source.name, {tie.axis for tie in walk.ties[since:]})
        walk.inputs[layer.key], walk.outputs[layer.key] = inputs[part], rows.reshape(-1)
    if kind.hidden == 1:
        walk.pin(hidden, f"{where} has one hidden unit")
    _tie_vectors(walk, index, node, kind, hidden, where)
    for slot in (5, 6):
        if len(node.input) > slot and node.input[slot]:
            _tie_state(walk, node.input[slot], hidden, where, cell_of(node).batch_first)
    for place, name in enumerate(node.output):
        if name:
            rank = 4 if place == 0 else 3
            if len(graph.shape(name) or (0,) * rank) != rank:
                raise Barrier(f"{name} has another number of axes than the standard says")
            walk.pictures[name] = as_picture(hidden, rank, cell_of(node).batch_first)
            if rounds_states(node) and kind.hidden > 1:
                walk.zero_readers.append(ZeroReader(index, ((name, rank - 1),)))


def _lines(units: Units) -> Units:
    """Units [directions, n] as a tie has them: of one direction [n]."""
    return units[0] if len(units) == 1 else units


def moves_whole(node: onnx.NodeProto) -> bool:
    """Whether a node leaves each entry of a state as it is, or makes another of it that is 0 where it is: units stay apart there."""
    row = row_of(node)
    return node.op_type in _MOVING or (row is not None and row.kind == "mix" and len(node.input) == 1)


def _tie_vectors(walk: Walk, index: int, node: onnx.NodeProto, kind: Recurrent, hidden: Units, where: str) -> None:
    """B, in halves or whole, and the peepholes P."""
    graph = walk.graph
    halves = [own_half(graph, index, part) for part in "WR"]
    names = [(half[0], kind.gates) for half in halves if half is not None]
    stored = {3: 2 * kind.gates, 7: 3}
    names += [
        (node.input[slot], count)
        for slot, count in stored.items()
        if len(node.input) > slot and node.input[slot] and not (slot == 3 and names)
    ]
    for name, count in names:
        source, since = trace_constant(graph, name), len(walk.ties)
        if not isinstance(source, Source):
            walk.pin(hidden, f"{where}: {name} is computed")
            continue
        across = 0 if kind.directions > 1 else None
        walk.tie_view(source.name, source.view, 1, _lines(np.tile(hidden, count)), f"{where}: {name} cannot be cut", True, across)
        walk.used(source.name, {tie.axis for tie in walk.ties[since:]})


def _tie_state(walk: Walk, name: str, hidden: Units, where: str, batch_first: bool) -> None:
    """A first state: stored, 0 everywhere, or what other units make."""
    graph = walk.graph
    walk.rank_known([name])
    source = trace_constant(graph, name)
    if isinstance(source, Source) and len(source.view.shape) == 3:
        since = len(walk.ties)
        across = (1 if batch_first else 0) if len(hidden) > 1 else None
        walk.tie_view(source.name, source.view, 2, _lines(hidden), f"{where}: {name} cannot be cut", True, across)
        walk.used(source.name, {tie.axis for tie in walk.ties[since:]})
        return
    own = walk.picture(name)
    if own.ndim == 3 and own.shape[2] == hidden.shape[1] > 1 and set(long_axes(own)) <= {2, 1 if batch_first else 0}:
        walk.unite(own.reshape(-1, hidden.shape[1]), hidden, where)  # of one row: that place of every direction
    elif not is_zero(graph, name):  # one that is goes with the first unit (see `edits`)
        walk.pin(hidden, f"{where}: its first state {name} is not made of units that can go ({_made_by(graph, name)})")


def _made_by(graph: Graph, name: str) -> str:
    """Where a first state comes from, in words."""
    while name in graph.producer and graph.nodes[graph.producer[name]].op_type in _MOVING - {"Concat"}:
        name = graph.nodes[graph.producer[name]].input[0]
    if name not in graph.producer:
        return f"it is input {name} of the model" if name not in graph.initializers else f"it is {name}, in a layout that cannot be cut"
    index = graph.producer[name]
    node = graph.nodes[index]
    others = ", whose branches may each need their shapes" if node.op_type == "If" else ""
    return f"{node.op_type} node {graph.names[index]} makes it{others}"


def is_zero(graph: Graph, name: str) -> bool:
    """Whether a tensor is 0 everywhere, whatever its size: zeros of some shape, moved about or spread."""
    while name not in graph.initializers:
        node = graph.nodes[graph.producer[name]] if name in graph.producer else None
        if node is None or node.domain not in STANDARD:
            return False
        if node.op_type == "ConstantOfShape":
            value = attributes(node).get("value")
            return value is None or not np.any(array_of(value))
        value = graph.constant(name)
        if value is not None:
            return not value.any()
        if node.op_type not in _SPREADING:
            return False
        name = node.input[0]
    return not graph.array(name).any()


def as_picture(per_direction: NDArray[Any], rank: int, batch_first: bool) -> NDArray[Any]:
    """Numbers [directions, hidden] along the axes of Y (rank 4) or of a state (rank 3)."""
    if rank == 4:
        return per_direction[None, None] if batch_first else per_direction[None, :, None]
    return per_direction[None] if batch_first else per_direction[:, None]


def always_zero(
    graph: Graph, index: int, layers: Mapping[str, Layer], weights: Mapping[int, NDArray[Any]], state_zeros: Callable[[str], Flags | None]
) -> Flags:
    """Which units are 0 at every step [directions, hidden]. state_zeros: of a first state, which start from 0 [directions, hidden]."""
    node, kind = graph.nodes[index], layers["W"].recurrent
    assert kind is not None
    cell, sizes = cell_of(node), (kind.directions, kind.gates, kind.hidden)
    biases = whole_bias(graph, index)
    zero = np.full((kind.directions, kind.hidden), cell.keeps_zero and biases is not None)
    if not zero.any() or biases is None:
        return zero
    place = CANDIDATE[node.op_type]
    for layer in layers.values():
        zero &= ~weights[layer.key].reshape(*sizes, -1)[:, place].any(-1)
    for half in biases:
        zero &= half.reshape(sizes)[:, place] == 0
    for slot in (5, 6):
        if len(node.input) > slot and node.input[slot]:
            found = state_zeros(node.input[slot])
            zero &= np.zeros_like(zero) if found is None else found
    return zero


def stored_zeros(graph: Graph, name: str, kind: Recurrent, batch_first: bool) -> Flags | None:
    """Which units a first state that is the same for every input starts from 0 [directions, hidden]; None where it is not."""
    source = trace_constant(graph, name)
    if is_zero(graph, name):
        return np.ones((kind.directions, kind.hidden), bool)
    if not isinstance(source, Source) or len(source.view.shape) != 3:
        return None
    value = source.view.apply(graph.array(source.name))
    return np.broadcast_to((value == 0).all(0 if batch_first else 1), (kind.directions, kind.hidden))


def read_units(layers: Mapping[str, Layer], weights: Mapping[int, NDArray[Any]], read: Flags) -> Flags:
    """Units [directions, hidden] that anybody reads, or that such units read round the loop. read: those read outside."""
    kind = layers["R"].recurrent
    assert kind is not None
    r = weights[layers["R"].key].reshape(kind.directions, kind.gates, kind.hidden, kind.hidden).any(1)
    while True:
        more = read | (r & read[:, :, None]).any(1)
        if np.array_equal(more, read):
            return read
        read = more


def tiled(units: Flags, layer: Layer) -> Flags:
    """Flags of units [directions, hidden] for each row of a layer [out]; none for rows of gates that are idle."""
    kind = layer.recurrent
    assert kind is not None
    works = ~np.isin(np.arange(kind.gates), kind.idle)
    rows: Flags = (units[:, None] & works[:, None]).reshape(-1)
    return rows
