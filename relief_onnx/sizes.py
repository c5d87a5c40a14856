"""Who reads the size of a tracked axis. A size that ends where channels are counted again follows by itself; other uses see the old one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from relief_onnx.coupling import line_of
from relief_onnx.graph import Graph, attributes
from relief_onnx.moves import Barrier, cuts_of, long_axes

__all__ = ["SIZE_SLOTS", "read_sizes", "size_origin"]

Places = frozenset[int]  # entries of a list of sizes
Flow = Callable[[Graph, onnx.NodeProto, int, Places], Places | None]


def _length(graph: Graph, name: str) -> int | None:
    shape = graph.shape(name)
    if shape is None or len(shape) > 1:
        return None
    size = shape[0] if shape else 1
    return size if isinstance(size, int) else None


def _as_they_are(graph: Graph, node: onnx.NodeProto, slot: int, places: Places) -> Places | None:
    return places if slot == 0 else None


def _element_wise(graph: Graph, node: onnx.NodeProto, slot: int, places: Places) -> Places | None:
    """A list keeps its places; a single size reaches every entry."""
    here, there = _length(graph, node.input[slot]), _length(graph, node.output[0])
    if here is None or there is None:
        return None
    return places if here == there else frozenset(range(there))


def _gather(graph: Graph, node: onnx.NodeProto, slot: int, places: Places) -> Places | None:
    indices, length = graph.constant(node.input[1]), _length(graph, node.input[0])
    if slot != 0 or indices is None or length is None:
        return None
    return frozenset(place for place, index in enumerate(indices.reshape(-1)) if int(index) % length in places)


def _slice(graph: Graph, node: onnx.NodeProto, slot: int, places: Places) -> Places | None:
    length = _length(graph, node.input[0])
    if slot != 0 or length is None:
        return None
    try:
        start, end, step, _ = cuts_of(graph, node, 1)[0]
    except Barrier:
        return None
    if start is None or end is None or step is None:
        return None
    return frozenset(place for place, index in enumerate(range(length)[start:end:step]) if index in places)


def _concat(graph: Graph, node: onnx.NodeProto, slot: int, places: Places) -> Places | None:
    lengths = [_length(graph, name) for name in node.input[:slot]]
    if None in lengths:
        return None
    offset = sum(length or 0 for length in lengths)
    return frozenset(place + offset for place in places)


def _product(graph: Graph, node: onnx.NodeProto, slot: int, places: Places) -> Places | None:
    return frozenset({0}) if slot == 0 and places else (places if slot == 0 else None)


def _rows(names: str, flow: Flow) -> dict[str, Flow]:
    return dict.fromkeys(names.split(), flow)


# Where in its output a node puts sizes that it reads; None where it uses them up.
_FLOWS: Mapping[str, Flow] = {
    **_rows("Identity Cast Unsqueeze Squeeze Reshape", _as_they_are),
    **_rows("Add Sub Mul Div Mod Min Max Floor Ceil Neg Abs Where Equal Less Greater Not And Or", _element_wise),
    **_rows("Gather", _gather),
    **_rows("Slice", _slice),
    **_rows("Concat", _concat),
    **_rows("ReduceProd ReduceSum", _product),
}


def _slice_axis(graph: Graph, node: onnx.NodeProto, place: int) -> int | None:
    rank = len(graph.shape(node.input[0]) or ())
    try:
        return next((axis for axis, cut in cuts_of(graph, node, rank).items() if cut[3] == place), None)
    except Barrier:
        return None


def _own_axis(graph: Graph, node: onnx.NodeProto, place: int) -> int | None:
    return place


def _expanded_axis(graph: Graph, node: onnx.NodeProto, place: int) -> int | None:
    rank, length = len(graph.shape(node.output[0]) or ()), _length(graph, node.input[1])
    return None if length is None else place + rank - length


# Inputs that list sizes or places: which axis of the node's output an entry speaks of.
SIZE_SLOTS: Mapping[tuple[str, int], Callable[[Graph, onnx.NodeProto, int], int | None]] = {
    ("Reshape", 1): _own_axis,
    ("Expand", 1): _expanded_axis,
    ("ConstantOfShape", 0): _own_axis,
    ("Resize", 3): _own_axis,
    ("Slice", 1): _slice_axis,
    ("Slice", 2): _slice_axis,
}


def _flow(graph: Graph, node: onnx.NodeProto, slot: int, places: Places) -> Places | None:
    """Which entries of the node's output hold (or are computed from) those entries of input `slot`; None where it is another use."""
    flow = _FLOWS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    return flow(graph, node, slot, places) if flow is not None else None


# Operators that only move sizes.
_MOVING = ("Identity", "Cast", "Unsqueeze", "Squeeze", "Reshape", "Gather", "Slice", "Concat")


def size_origin(graph: Graph, tensor: str, place: int) -> tuple[str, int] | None:
    """The (tensor, axis) whose size that entry of a list is, where it was moved only and never computed with."""
    node = graph.nodes[graph.producer[tensor]] if tensor in graph.producer else None
    if node is None:
        return None
    if node.op_type == "Shape":
        values = attributes(node)
        rank = len(graph.shape(node.input[0]) or ())
        axes = range(rank)[values.get("start", 0) : values.get("end", rank)]
        return (node.input[0], axes[place]) if place < len(axes) else None
    if node.op_type == "Where":
        # expand(-1, ...) as exporters write it: where(sizes == -1, ones, sizes).
        chosen = (graph.values(node.input[0]) or ())[place : place + 1]
        return size_origin(graph, node.input[1 if chosen[0].value else 2], place) if chosen and chosen[0].value is not None else None
    for slot, name in enumerate(node.input) if node.op_type in _MOVING else ():
        for source in range(len(graph.values(name) or ())):
            if _flow(graph, node, slot, frozenset({source})) == frozenset({place}):
                return size_origin(graph, name, source)
    return None


def read_sizes(graph: Graph, pictures: Mapping[str, NDArray[Any]]) -> Iterator[tuple[str, int]]:
    """(tensor, axis) for every tracked axis whose size is used for something else than to count the same channels."""
    for node in graph.nodes:
        picture = pictures.get(node.input[0]) if node.op_type == "Shape" else None
        if picture is None or not long_axes(picture):
            continue
        values = attributes(node)
        axes = range(picture.ndim)[values.get("start", 0) : values.get("end", picture.ndim)]
        places = {axis: frozenset({axes.index(axis)}) for axis in long_axes(picture) if axis in axes}
        for axis, own in places.items():
            units = np.moveaxis(picture, axis, 0).reshape(picture.shape[axis], -1)[:, 0]
            if _escapes(graph, pictures, node.output[0], own, units):
                yield node.input[0], axis


def _escapes(graph: Graph, pictures: Mapping[str, NDArray[Any]], tensor: str, places: Places, units: NDArray[Any]) -> bool:
    """Whether a node uses the size of an axis with those units for something else than an axis that has them too."""
    if not places:
        return False
    if graph.is_output(tensor):
        return True
    for use in graph.uses.get(tensor, []):
        node = graph.nodes[use.node]
        axis_of = SIZE_SLOTS.get((node.op_type, use.slot)) if node.domain in ("", "ai.onnx") else None
        if axis_of is not None:
            if not all(_counts(pictures, node.output[0], axis_of(graph, node, place), units) for place in places):
                return True
            continue
        following = _flow(graph, node, use.slot, places) if use.slot >= 0 else None
        if following is None or _escapes(graph, pictures, node.output[0], following, units):
            return True
    return False


def _counts(pictures: Mapping[str, NDArray[Any]], tensor: str, axis: int | None, units: NDArray[Any]) -> bool:
    """Whether that axis of a tensor has those units."""
    counted = pictures.get(tensor, np.zeros(()))
    return axis is not None and axis < counted.ndim and counted.shape[axis] > 1 and bool(np.isin(units, line_of(counted, axis)).all())
