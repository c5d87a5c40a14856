"""Which axes of each tensor relevance is told apart along, and where a node's outputs have their entries from.

A *track* of a tensor is a shape of its rank: the size of every axis along which units are followed (channels, heads, features), 1 for
all others (batch, pixels, tokens), which are summed over. Layers begin tracks; the operator table says how they go on.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray

from relief_onnx.attending import attention_track
from relief_onnx.contractions import LABELS
from relief_onnx.graph import Graph
from relief_onnx.layers import Plan
from relief_onnx.moves import Barrier, Together, reduced_axes
from relief_onnx.nodes import handed_on
from relief_onnx.ops import OperatorRow, passing_row_of

__all__ = ["Moved", "Track", "Tracks", "follow", "labels_of", "moved"]

Track = tuple[int, ...]
Places = NDArray[np.int64]


@dataclass(frozen=True)
class Moved:
    """Where the entries of a node's outputs come from: per output alternatives [k, *track] of numbers into all its inputs' entries.

    Negative numbers come from nowhere. `names` are the data inputs, `shapes` what is followed of each: their entries are numbered in order.
    """

    names: tuple[str, ...]
    shapes: tuple[Track, ...]
    outputs: tuple[Places, ...]


@dataclass
class Tracks:
    """The track of every tensor; `dropped` are the nodes that could not follow all of them, with the reason.

    `moves`: what `moved` says of each node that moves entries, by its number.
    """

    of: dict[str, Track] = field(default_factory=dict)
    dropped: dict[int, str] = field(default_factory=dict)
    moves: dict[int, tuple[Moved, str]] = field(default_factory=dict)


def moved(graph: Graph, node: onnx.NodeProto, row: OperatorRow, tracks: Mapping[str, Track]) -> tuple[Moved, str]:
    """The entries of a node that carries pictures, and what stood in the way of following all of them. Raises Barrier."""
    assert row.carry is not None
    names = tuple(name for slot, name in enumerate(node.input) if name and (row.data is None or slot in row.data))
    unknown = next((name for name in names if graph.shape(name) is None), None)
    if unknown is not None:
        raise Barrier(f"the shape of {unknown} is not known")
    shapes = [tracks.get(name, (1,) * len(graph.shape(name) or ())) for name in names]
    why = ""
    while True:
        starts = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes)]).tolist()
        pictures = [np.arange(start, start + int(np.prod(shape))).reshape(shape) for start, shape in zip(starts, shapes, strict=False)]
        try:
            results = row.carry(graph, node, pictures)
        except Barrier as barrier:
            lighter = [tuple(1 if axis in barrier.axes else size for axis, size in enumerate(shape)) for shape in shapes]
            if lighter == shapes:
                raise
            shapes, why = lighter, str(barrier)
            continue
        alternatives = [result.alternatives if isinstance(result, Together) else result[None] for result in results]
        return Moved(names, tuple(shapes), tuple(np.asarray(item) for item in alternatives)), why


def labels_of(
    graph: Graph, node: onnx.NodeProto, tracks: Mapping[str, Track]
) -> tuple[list[tuple[Hashable, ...]], tuple[Hashable, ...], dict[Hashable, int]]:
    """A contraction's labels per input and of its output, and the sizes of those that are tracked."""
    labels, out = LABELS[node.op_type](graph, node)
    pairs = (pair for name, own in zip(node.input, labels, strict=False) for pair in zip(own, tracks.get(name, ()), strict=False))
    return [tuple(own) for own in labels], tuple(out), {label: size for label, size in pairs if size > 1}


def follow(graph: Graph, plan: Plan) -> Tracks:
    """Walk the graph once, forward."""
    found = Tracks()
    layers = plan.single()
    widths = {size for layer in plan.layers for size in (layer.out_channels, layer.groups * layer.in_per_group)}
    for index, node in enumerate(graph.nodes):
        for name in node.output:
            found.of[name] = _untracked(graph, name)
        row = passing_row_of(node)
        if index in layers:
            name, layer = node.output[0], layers[index]
            rank = len(found.of[name])
            found.of[name] = tuple(layer.out_channels if axis == layer.output_axis % max(rank, 1) else 1 for axis in range(rank))
        elif row is not None:
            try:
                _FOLLOW[row.flow](graph, index, node, row, found, widths)
            except Barrier as barrier:
                found.dropped[index] = str(barrier)
        for name, source in zip(node.output, handed_on(node), strict=False):
            own = found.of.get(source, ())
            found.of[name] = own if len(own) == len(found.of[name]) else found.of[name]
    return found


def _untracked(graph: Graph, name: str) -> Track:
    return (1,) * len(graph.shape(name) or ())


def _same(graph: Graph, index: int, node: onnx.NodeProto, row: OperatorRow, found: Tracks, widths: set[int]) -> None:
    """Every axis that is tracked in any input, aligned at the end as broadcasting does."""
    names = [name for slot, name in enumerate(node.input) if name and (row.data is None or slot in row.data)]
    for name in node.output:
        shape = graph.shape(name) if name else None
        if shape is None:
            continue
        tracked = [1] * len(shape)
        for other in names:
            own = found.of.get(other, ())
            for axis, size in enumerate(own, len(shape) - len(own)):
                if axis >= 0 and size > 1 and shape[axis] == size:
                    tracked[axis] = size
        found.of[name] = tuple(tracked)


def _moved(graph: Graph, index: int, node: onnx.NodeProto, row: OperatorRow, found: Tracks, widths: set[int]) -> None:
    for slot, name in enumerate(node.input):
        if name and name not in found.of and (row.data is None or slot in row.data) and graph.is_float(name):
            # A stored table (an embedding) is followed along axes that are as long as layers are wide.
            found.of[name] = tuple(size if isinstance(size, int) and size in widths else 1 for size in graph.shape(name) or ())
    result, why = found.moves[index] = moved(graph, node, row, found.of)
    for name, places in zip(node.output, result.outputs, strict=False):
        if name and len(places.shape) - 1 == len(found.of[name]):
            found.of[name] = tuple(places.shape[1:])
    if why:
        found.dropped[index] = why


def _reduced(graph: Graph, index: int, node: onnx.NodeProto, row: OperatorRow, found: Tracks, widths: set[int]) -> None:
    own = found.of.get(node.input[0], _untracked(graph, node.input[0]))
    axes = reduced_axes(graph, node, len(own))
    keeps = len(found.of[node.output[0]]) == len(own)
    left = tuple(1 if axis in axes else size for axis, size in enumerate(own))
    found.of[node.output[0]] = left if keeps else tuple(size for axis, size in enumerate(own) if axis not in axes)


def _contracted(graph: Graph, index: int, node: onnx.NodeProto, row: OperatorRow, found: Tracks, widths: set[int]) -> None:
    _, out, sizes = labels_of(graph, node, found.of)
    found.of[node.output[0]] = tuple(sizes.get(label, 1) for label in out)


def _recurrent(graph: Graph, index: int, node: onnx.NodeProto, row: OperatorRow, found: Tracks, widths: set[int]) -> None:
    """Y [steps, directions, batch, hidden] and the last states [directions, batch, hidden]; layout 1 puts the batch first."""
    for name in node.output:
        shape = graph.shape(name) if name else None
        if shape is not None and isinstance(shape[-1], int):
            rank, batch_first = len(shape), graph.nodes[index].attribute
            first = any(item.name == "layout" and item.i == 1 for item in batch_first)
            direction = (2 if rank == 4 else 1) if first else rank - 3
            sizes = [shape[axis] if axis in (direction, rank - 1) else 1 for axis in range(rank)]
            found.of[name] = tuple(size if isinstance(size, int) else 1 for size in sizes)


def _attended(graph: Graph, index: int, node: onnx.NodeProto, row: OperatorRow, found: Tracks, widths: set[int]) -> None:
    for name in node.output[:3]:
        if name:
            found.of[name] = attention_track(graph, node, name)


def _nothing(graph: Graph, index: int, node: onnx.NodeProto, row: OperatorRow, found: Tracks, widths: set[int]) -> None:
    """Outputs are not tracked."""


Follow = Callable[[Graph, int, onnx.NodeProto, OperatorRow, Tracks, set[int]], None]
_FOLLOW: Mapping[str, Follow] = {
    "through": _same, "join": _same, "select": _same, "product": _same, "move": _moved, "reduce": _reduced, "contract": _contracted,
    "sample": _same, "recurrent": _recurrent, "attend": _attended, "even": _nothing, "none": _nothing,
}  # fmt: skip
