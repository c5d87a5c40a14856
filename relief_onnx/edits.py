"""What a cut changes in nodes: sizes and places that a node names, and statistics that still count channels of zeros.

A table from operator to edit. Initializers that are tied to units are cut before (see `surgery`); edits only follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from relief_onnx.aside import tensor_of
from relief_onnx.contractions import centred
from relief_onnx.coupling import Coupling, Units, ZeroReader, line_of
from relief_onnx.graph import Graph, attributes
from relief_onnx.groupnorms import GroupNorm
from relief_onnx.moves import cuts_of, long_axes, pad_places, pads_of
from relief_onnx.scatters import fewer_places
from relief_onnx.sizes import read_sizes, size_origin

__all__ = ["Cut", "edit_nodes", "set_attribute", "set_initializer", "unused"]

Flags = NDArray[np.bool_]


def set_initializer(model: onnx.ModelProto, name: str, array: NDArray[Any]) -> None:
    """Replace an initializer's value, or add it; the entry in graph.input that old files (IR 3) need follows."""
    existing = next((item for item in model.graph.initializer if item.name == name), None)
    tensor = tensor_of(np.asarray(array, order="C"), name, existing)  # a number stays a number
    if existing is None:
        model.graph.initializer.append(tensor)
        if model.ir_version < 4:
            model.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    else:
        tensor.doc_string = existing.doc_string
        existing.CopyFrom(tensor)
    for info in (*model.graph.input, *model.graph.value_info):  # some exporters describe what is stored too
        if info.name == name:
            shape = info.type.tensor_type.shape
            for dim, size in zip(shape.dim, array.shape, strict=False):
                dim.dim_value = size


def unused(model: onnx.ModelProto, name: str) -> str:
    """That name, or one like it that no tensor has."""
    taken = {item.name for item in model.graph.initializer} | {out for node in model.graph.node for out in node.output}
    while name in taken:
        name += "_"
    return name


def set_attribute(node: onnx.NodeProto, name: str, value: Any) -> None:
    """Set an attribute; None removes it."""
    for item in list(node.attribute):
        if item.name == name:
            node.attribute.remove(item)
    if value is not None:
        node.attribute.append(helper.make_attribute(name, value))


@dataclass
class Cut:
    """A cut in progress: `graph` describes the model before it, `model` is edited. New nodes wait in `before` and `after`."""

    model: onnx.ModelProto
    graph: Graph
    coupling: Coupling
    units: frozenset[int]
    before: dict[int, list[onnx.NodeProto]] = field(default_factory=dict)
    after: dict[int, list[onnx.NodeProto]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._gone = np.array(sorted(self.units), np.int64)
        self._made: set[str] = set()
        self.frozen = {found for found in read_sizes(self.graph, self.coupling.pictures) if self.kept(*found) is not None}

    def keep(self, units: Units) -> Flags:
        """Which of those units stay."""
        return ~np.isin(units, self._gone)

    def kept(self, tensor: str, axis: int) -> Flags | None:
        """Which entries of a tracked axis stay; None where nothing goes along it.

        Where each direction of a recurrent node has units of its own, those of the first: as many stay in each.
        """
        picture = self.coupling.pictures.get(tensor)
        if picture is None or picture.shape[axis] == 1 or axis != long_axes(picture)[-1]:
            return None
        flags = self.keep(line_of(picture, axis))
        return None if flags.all() else flags

    def sizes(self, tensor: str) -> dict[int, int]:
        """New sizes of the axes of a tensor that get shorter."""
        picture = self.coupling.pictures.get(tensor)
        found = {axis: self.kept(tensor, axis) for axis in range(picture.ndim)} if picture is not None else {}
        return {axis: int(flags.sum()) for axis, flags in found.items() if flags is not None}

    def constant(self, name: str, array: NDArray[Any]) -> str:
        """A new initializer; returns its name."""
        name = self.name(name)
        set_initializer(self.model, name, array)
        return name

    def name(self, wanted: str) -> str:
        """That name, or one like it that no tensor has, those of new nodes among them."""
        name = unused(self.model, wanted)
        while name in self._made:
            name = unused(self.model, f"{name}_")
        self._made.add(name)
        return name

    def node(
        self, place: dict[int, list[onnx.NodeProto]], index: int, operator: str, inputs: Sequence[str], output: str, **values: Any
    ) -> str:
        """A new node beside node `index`; returns its output."""
        output = self.name(output)
        place.setdefault(index, []).append(helper.make_node(operator, list(inputs), [output], name=output, **values))
        return output


Edit = Callable[[Cut, int, onnx.NodeProto], None]


def edit_nodes(cut: Cut) -> None:
    """Edit every node that names sizes or counts channels, then put the new nodes in place."""
    readers = {reader.node: reader for reader in cut.coupling.zero_readers}
    for index, node in enumerate(cut.model.graph.node):
        if index in cut.coupling.restored:
            _restore(cut, node, cut.coupling.restored[index])
        elif node.domain in ("", "ai.onnx") and index not in cut.coupling.barriers:
            if node.op_type in _EDITS:
                _EDITS[node.op_type](cut, index, node)
            if node.op_type in _COUNTING and index in readers:
                _COUNTING[node.op_type](cut, index, node, readers[index])
    if cut.before or cut.after:
        nodes: list[onnx.NodeProto] = []
        for index, node in enumerate(cut.model.graph.node):
            nodes += [*cut.before.get(index, []), onnx.NodeProto.FromString(node.SerializeToString()), *cut.after.get(index, [])]
        del cut.model.graph.node[:]
        cut.model.graph.node.extend(nodes)


# -- sizes ----------------------------------------------------------------------------------------------------------------


def _follows(cut: Cut, tensor: str, place: int, size: int) -> bool:
    """Whether that entry of a list of sizes is read off a tensor that gets the same size."""
    found = size_origin(cut.graph, tensor, place)
    if found is None or found in cut.frozen:
        return False
    return cut.sizes(found[0]).get(found[1], (cut.graph.shape(found[0]) or ())[found[1]]) == size


def _retarget(cut: Cut, index: int, node: onnx.NodeProto, slot: int, wanted: Mapping[int, int], keep: Sequence[int] = ()) -> None:
    """Write sizes into entries of a list that a node reads; entries with a value in `keep` (-1, say) have their own meaning."""
    name = node.input[slot]
    values = cut.graph.values(name) or ()
    known = {place: values[place].value if place < len(values) else None for place in wanted}
    constant = cut.graph.constant(name)
    todo = {
        place: size
        for place, size in wanted.items()
        if known[place] not in keep and (known[place] != size if constant is not None else not _follows(cut, name, place, size))
    }
    if not todo:
        return
    if constant is not None:
        changed = constant.copy()
        changed.reshape(-1)[list(todo)] = list(todo.values())
        node.input[slot] = cut.constant(f"{node.output[0]}/sizes", changed)
        return
    # The rest of the list is computed at run time: entry * mask + size.
    length = (cut.graph.shape(name) or (0,))[0]
    mask, add = np.ones(int(length or 0), np.int64), np.zeros(int(length or 0), np.int64)
    for place, size in todo.items():
        mask[place], add[place] = 0, size
    part = cut.node(cut.before, index, "Mul", [name, cut.constant(f"{node.output[0]}/sizes/mask", mask)], f"{node.output[0]}/sizes/rest")
    node.input[slot] = cut.node(
        cut.before, index, "Add", [part, cut.constant(f"{node.output[0]}/sizes/cut", add)], f"{node.output[0]}/sizes"
    )


def _edit_target(slot: int, keep: Sequence[int] = ()) -> Edit:
    def edit(cut: Cut, index: int, node: onnx.NodeProto) -> None:
        wanted = cut.sizes(node.output[0])
        if not wanted or len(node.input) <= slot or not node.input[slot]:
            return
        _retarget(cut, index, node, slot, wanted, keep)

    return edit


def _edit_shape(cut: Cut, index: int, node: onnx.NodeProto) -> None:
    """Where a size is computed with, all that follows sees the old one: what counts channels is written afresh in its own place."""
    sizes, values = cut.graph.shape(node.input[0]) or (), attributes(node)
    axes = range(len(sizes))[values.get("start", 0) : values.get("end", len(sizes))]
    old = np.array([sizes[axis] if (node.input[0], axis) in cut.frozen else 0 for axis in axes], np.int64)
    if not old.any():
        return
    output = node.output[0]
    node.output[0] = cut.name(f"{output}/left")
    mask = cut.constant(f"{output}/mask", (old == 0).astype(np.int64))
    part = cut.node(cut.after, index, "Mul", [node.output[0], mask], f"{output}/rest")
    cut.after[index].append(helper.make_node("Add", [part, cut.constant(f"{output}/old", old)], [output], name=f"{output}/counted"))


def _edit_split(cut: Cut, index: int, node: onnx.NodeProto) -> None:
    axis = attributes(node).get("axis", 0) % len(cut.graph.shape(node.input[0]) or (0,))
    if cut.kept(node.input[0], axis) is None:
        return
    parts = [cut.sizes(name).get(axis, (cut.graph.shape(name) or ())[axis]) for name in node.output]
    set_attribute(node, "split", parts if cut.graph.opset < 13 else None)
    set_attribute(node, "num_outputs", None)
    if cut.graph.opset >= 13:
        node.input[:] = [node.input[0], cut.constant(f"{node.output[0]}/split", np.asarray(parts, np.int64))]


def _edit_slice(cut: Cut, index: int, node: onnx.NodeProto) -> None:
    rank = len(cut.graph.shape(node.input[0]) or ())
    found = {axis: item for axis, item in cuts_of(cut.graph, node, rank).items() if cut.kept(node.input[0], axis) is not None}
    for axis, (start, end, step, _) in found.items():
        flags = cut.kept(node.input[0], axis)
        assert flags is not None
        taken = np.arange(len(flags))[start:end:step]
        if step != 1:
            places = (np.cumsum(flags) - 1)[taken[flags[taken]]]
            _become_gather(cut, node, axis, places)
            return
    bounds: tuple[dict[int, int], dict[int, int]] = ({}, {})
    for axis, (start, end, step, place) in found.items():
        flags = cut.kept(node.input[0], axis)
        assert flags is not None
        taken = np.arange(len(flags))[start:end:step]
        bounds[0][place] = int(flags[: taken[0]].sum())
        bounds[1][place] = bounds[0][place] + int(flags[taken].sum())
    if cut.graph.opset < 10:
        for key, entries in zip(("starts", "ends"), bounds, strict=True):
            values = list(attributes(node)[key])
            for place, value in entries.items():
                values[place] = value
            set_attribute(node, key, values)
        return
    for slot, entries in enumerate(bounds, 1):
        if entries:
            _retarget(cut, index, node, slot, entries)


def _become_gather(cut: Cut, node: onnx.NodeProto, axis: int, places: NDArray[np.int64]) -> None:
    """What is left of every other channel is no longer a regular step."""
    node.op_type = "Gather"
    node.input[:] = [node.input[0], cut.constant(f"{node.output[0]}/channels", places.astype(np.int64))]
    for name in ("starts", "ends", "axes", "steps"):
        set_attribute(node, name, None)
    set_attribute(node, "axis", axis)


def _edit_gather(cut: Cut, index: int, node: onnx.NodeProto) -> None:
    axis = attributes(node).get("axis", 0) % len(cut.graph.shape(node.input[0]) or (0,))
    flags = cut.kept(node.input[0], axis)
    if flags is None:
        return
    indices = cut.graph.constant(node.input[1])
    if indices is None:
        entries = cut.graph.values(node.input[1]) or ()
        indices = np.array([entry.value for entry in entries], np.int64).reshape([-1] * len(cut.graph.shape(node.input[1]) or ()))
    places = indices % len(flags)
    left = (np.cumsum(flags) - 1)[places]
    if indices.ndim:
        stays = flags[places]
        box = [stays.any(tuple(other for other in range(indices.ndim) if other != i)) for i in range(indices.ndim)]
        left = left[np.ix_(*box)]
    node.input[1] = cut.constant(f"{node.output[0]}/channels", np.asarray(left, np.int64))


def _edit_pad(cut: Cut, index: int, node: onnx.NodeProto) -> None:
    rank = len(cut.graph.shape(node.input[0]) or ())
    wanted: dict[int, int] = {}
    pads = pads_of(cut.graph, node, rank) if cut.sizes(node.output[0]) else []
    for axis in cut.sizes(node.output[0]):
        flags, begin = cut.kept(node.output[0], axis), pads[axis]
        assert flags is not None
        begin, end = begin or 0, pads[axis + rank] or 0
        wanted[axis], wanted[axis + rank] = int(flags[:begin].sum()), int(flags[len(flags) - end :].sum())
    changed = {place: size for place, size in wanted.items() if size != pads[place]}
    if changed and "pads" in attributes(node):
        set_attribute(node, "pads", [changed.get(place, size or 0) for place, size in enumerate(pads)])
    elif changed:
        places = pad_places(cut.graph, node, rank)
        _retarget(cut, index, node, 1, {places.index(place): size for place, size in changed.items()})


def _edit_scatter(cut: Cut, index: int, node: onnx.NodeProto) -> None:
    for axis in cut.sizes(node.output[0]):
        flags = cut.kept(node.output[0], axis)
        left = fewer_places(cut.graph, node, axis, flags) if flags is not None else None
        if left is not None:
            node.input[1] = cut.constant(f"{node.output[0]}/places", left)


def _edit_groups(cut: Cut, index: int, node: onnx.NodeProto) -> None:
    flags = cut.kept(node.input[0], 1)
    if flags is not None:
        groups = attributes(node)["num_groups"]
        set_attribute(node, "num_groups", groups * int(flags.sum()) // len(flags))


def _edit_hidden_size(cut: Cut, index: int, node: onnx.NodeProto) -> None:
    """The size, and first states that are computed zeros of the old size: without them the node starts from 0 too."""
    made = next(name for name in node.output if name)
    flags = cut.kept(made, len(cut.coupling.pictures[made].shape) - 1)
    if flags is None:
        return
    set_attribute(node, "hidden_size", int(flags.sum()))
    for slot in (5, 6):
        name = node.input[slot] if slot < len(node.input) else ""
        if name in cut.graph.producer and cut.coupling.pictures[name].size == 1:
            node.input[slot] = ""


_EDITS: Mapping[str, Edit] = {
    "Shape": _edit_shape,
    "Split": _edit_split,
    "Reshape": _edit_target(1, keep=(-1, 0)),
    "Expand": _edit_target(1),
    "ConstantOfShape": _edit_target(0),
    "Resize": _edit_target(3),
    "Slice": _edit_slice,
    "Gather": _edit_gather,
    "Pad": _edit_pad,
    "ScatterND": _edit_scatter,
    "GroupNormalization": _edit_groups,
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _edit_hidden_size),
}

# -- statistics that count channels ---------------------------------------------------------------------------------------


def _reader_keep(cut: Cut, reader: ZeroReader) -> Flags | None:
    tensor, axis = reader.factors[0]
    return cut.kept(tensor, axis)


def _scalar(cut: Cut, like: str, name: str, value: float) -> str:
    dtype = helper.tensor_dtype_to_np_dtype(cut.graph.types[like][0])
    return cut.constant(name, np.asarray(value, dtype))


def _count_mean(cut: Cut, index: int, node: onnx.NodeProto, reader: ZeroReader) -> None:
    """mean over C channels of which only C' are left, the others 0: C'/C of the new mean; of a variance, (1 - C'/C) mean^2 comes on top."""
    flags = _reader_keep(cut, reader)
    if flags is None:
        return
    output, share = node.output[0], float(flags.mean())
    inner = centred(cut.graph, node)
    node.output[0] = cut.name(f"{output}/left")
    factor = _scalar(cut, output, f"{output}/share", share)
    if inner is None or reader.factors[0][0] != inner.tensor:
        cut.after.setdefault(index, []).append(helper.make_node("Mul", [node.output[0], factor], [output], name=f"{output}/counted"))
        return
    part = cut.node(cut.after, index, "Mul", [node.output[0], factor], f"{output}/part")
    square = cut.node(cut.after, index, "Mul", [inner.mean, inner.mean], f"{output}/mean_square")
    rest = cut.node(cut.after, index, "Mul", [square, _scalar(cut, output, f"{output}/rest", 1 - share)], f"{output}/zeros")
    cut.after[index].append(helper.make_node("Add", [part, rest], [output], name=f"{output}/counted"))


def _count_norm(cut: Cut, index: int, node: onnx.NodeProto, reader: ZeroReader) -> None:
    """The channels of zeros come back just for the statistics: Pad, normalise, Slice."""
    flags = _reader_keep(cut, reader)
    if flags is None:
        return
    tensor, axis = reader.factors[0]
    output, left, gone = node.output[0], int(flags.sum()), int((~flags).sum())
    pads = np.zeros(2 * (axis + 1), np.int64)
    pads[-1] = gone
    node.input[0] = cut.node(cut.before, index, "Pad", [tensor, cut.constant(f"{output}/pads", pads)], f"{output}/padded")
    for slot, name in enumerate(node.input[1:], 1):
        rank = len(cut.graph.shape(name) or ()) if name else 0
        if rank:
            more = cut.constant(f"{name}/pads", np.array([*[0] * (2 * rank - 1), gone], np.int64))
            node.input[slot] = cut.node(cut.before, index, "Pad", [name, more], f"{output}/{'scale' if slot == 1 else 'shift'}")
    node.output[0] = cut.name(f"{output}/whole")
    bounds = [
        cut.constant(f"{output}/{what}", np.array([value], np.int64)) for what, value in (("start", 0), ("end", left), ("axis", axis))
    ]
    cut.after.setdefault(index, []).append(helper.make_node("Slice", [node.output[0], *bounds], [output], name=f"{output}/left"))


def _restore(cut: Cut, node: onnx.NodeProto, norm: GroupNorm) -> None:
    """Zeros take the places of the channels that are gone, just for the statistics over groups: Pad, Gather, normalise, Gather."""
    flags = cut.kept(norm.source, 1)
    if flags is None:
        return
    last = cut.model.graph.node[norm.last]
    output, left = last.output[0], int(flags.sum())
    pads = [0] * (2 * len(cut.graph.shape(norm.source) or ()))
    pads[len(pads) // 2 + 1] = 1
    given: dict[str, Any] = {"pads": pads} if cut.graph.opset < 11 else {}
    amounts = [] if given else [cut.constant(f"{output}/pads", np.array(pads, np.int64))]
    padded = cut.node(cut.before, norm.first, "Pad", [norm.source, *amounts], f"{output}/padded", **given)
    places = cut.constant(f"{output}/places", np.where(flags, np.cumsum(flags) - 1, left).astype(np.int64))
    node.input[0] = cut.node(cut.before, norm.first, "Gather", [padded, places], f"{output}/restored", axis=1)
    if norm.last == norm.first:
        for slot, name in enumerate(node.input[1:], 1):
            if cut.graph.shape(name) == (len(flags),):
                node.input[slot] = cut.constant(f"{output}/{'scale' if slot == 1 else 'shift'}", cut.graph.array(name))
    else:
        _retarget(cut, norm.last, last, 1, {1: len(flags)})
    last.output[0] = cut.name(f"{output}/whole")
    kept = cut.constant(f"{output}/kept", np.flatnonzero(flags).astype(np.int64))
    cut.after.setdefault(norm.last, []).append(helper.make_node("Gather", [last.output[0], kept], [output], name=f"{output}/left", axis=1))


_COUNTING: Mapping[str, Callable[[Cut, int, onnx.NodeProto, ZeroReader], None]] = {
    "ReduceMean": _count_mean,
    "LayerNormalization": _count_norm,
    "RMSNormalization": _count_norm,
    "SimplifiedLayerNormalization": _count_norm,
}
