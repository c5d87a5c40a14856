"""How the walk carries units through each kind of operator (see `ops`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx
from numpy.typing import NDArray

from relief_onnx.contractions import LABELS, centred
from relief_onnx.coupling import Tie, Units, ZeroReader, line_of
from relief_onnx.graph import attributes
from relief_onnx.moves import NEW, UNTRACKED, Barrier, Picture, Together, long_axes
from relief_onnx.ops import OperatorRow
from relief_onnx.sizes import size_origin
from relief_onnx.sources import Source, trace_constant

if TYPE_CHECKING:
    from relief_onnx.walk import Walk

__all__ = ["KINDS"]

Flags = NDArray[np.bool_]


def _mix(walk: Walk, index: int, node: onnx.NodeProto, row: OperatorRow) -> None:
    data = [name for i, name in enumerate(node.input) if name and (row.data is None or i in row.data)]
    running = [name for name in data if not walk.is_constant(name)]
    walk.rank_known([*running, *node.output[:1]])
    rank = len(walk.graph.shape(node.output[0]) or ())
    result = _lifted(walk, running[0], rank)
    for place, name in enumerate(running[1:], 1):
        why = f"{node.op_type} node {walk.graph.names[index]}: {name} and what it meets are not both tracked"
        result = _meet(walk, result, running[:place], _lifted(walk, name, rank), name, why)
    where = walk.graph.names[index]
    result = _brought(walk, node, [name for name in data if name not in running], running, result)
    if len(long_axes(result)) > 1 and len(running) < len(data):
        result = _one_axis(walk, result, "a constant meets it")
    for slot, name in enumerate(node.input):
        if name in data and name not in running:
            walk.tie_constant(name, result, where, slot in row.zeroable)
    walk.pictures[node.output[0]] = result


def _brought(walk: Walk, node: onnx.NodeProto, constants: Sequence[str], running: Sequence[str], result: Units) -> Units:
    """Constants with an axis that no activation has (a scale times one number per sample) bring its channels in: fresh units.

    Whole numbers and conditions (places of tokens, masks) are no channels.
    """
    if node.output[0] in walk.graph.types and not walk.graph.is_float(node.output[0]):
        return result
    dims = walk.graph.shape(node.output[0]) or ()
    new = [
        axis
        for axis, size in enumerate(dims)
        if isinstance(size, int) and size > 1 and all(_is_one(walk, name, axis, len(dims)) for name in running)
    ]
    if not constants or len(new) != 1 or result.size > 1:
        return result
    size = dims[new[0]]
    assert isinstance(size, int)
    return walk.units.fresh(size).reshape([-1 if axis == new[0] else 1 for axis in range(len(dims))])


def _one_axis(walk: Walk, picture: Units, why: str) -> Units:
    """Hold units together along all tracked axes but the first."""
    for axis in long_axes(picture)[1:]:
        first = picture.take([0], axis)
        walk.unite(picture, first, why)
        picture = first
    return picture


def _lifted(walk: Walk, name: str, rank: int) -> Units:
    picture = walk.picture(name)
    return picture.reshape((1,) * (rank - picture.ndim) + picture.shape)


def _is_one(walk: Walk, name: str, axis: int, rank: int) -> bool:
    """Whether a tensor that is broadcast to `rank` axes is truly 1 long there, not long and untracked."""
    shape = walk.graph.shape(name) or ()
    place = axis - (rank - len(shape))
    return place < 0 or shape[place] == 1


def _meet(walk: Walk, a: Units, names: Sequence[str], b: Units, name: str, why: str) -> Units:
    """Unite two pictures. An axis of size 1 in a picture is either truly 1 long, or long and untracked: then the other is pinned."""
    for axis in range(a.ndim):
        if a.shape[axis] > 1 and b.shape[axis] == 1 and not _is_one(walk, name, axis, a.ndim):
            walk.pin(a, why)
        if b.shape[axis] > 1 and a.shape[axis] == 1 and not all(_is_one(walk, other, axis, a.ndim) for other in names):
            walk.pin(b, why)
    long_a, long_b = set(long_axes(a)), set(long_axes(b))
    if not (long_a <= long_b or long_b <= long_a):
        walk.pin(a, why)
        walk.pin(b, why)
        return np.full((1,) * a.ndim, UNTRACKED, np.int64)
    larger, smaller = (a, b) if long_a >= long_b else (b, a)
    if not long_axes(smaller):
        return larger
    if long_axes(larger)[0] not in long_axes(smaller):
        # Copied over all heads (angles by which they are turned): it stays, and heads stay whole.
        walk.pin(smaller, f"{why.split(': ')[0]}: it is the same for all heads")
        return _one_axis(walk, larger, why)
    walk.unite(a, b, why)
    return larger


def _affine(walk: Walk, index: int, node: onnx.NodeProto, row: OperatorRow) -> None:
    walk.rank_known([node.input[0]])
    if attributes(node).get("training_mode", 0):
        raise Barrier("it is in training mode, so it sees the whole batch")
    picture = walk.picture(node.input[0])
    others = [axis for axis in long_axes(picture) if axis != 1]
    if others:
        raise Barrier("its channel axis is not the tracked one", others)
    where, result = walk.graph.names[index], picture
    if row.carry is not None and index not in walk.restored:
        result = _accepted(walk, row.carry(walk.graph, node, [picture])[0], f"{node.op_type} node {where}")
    for slot, name in enumerate(node.input[1:], 1):
        entries = (walk.graph.shape(name) or (0,))[0]
        line = result.reshape(-1)
        if isinstance(entries, int) and 0 < entries < line.size:
            if index in walk.restored:
                continue  # a number per group, and all groups stay
            line = line[:: line.size // entries]  # before opset 21 GroupNormalization has one scale per group of channels
        walk.tie_constant(name, line, where, slot in row.zeroable)
    walk.pictures[node.output[0]] = result


def _norm(walk: Walk, index: int, node: onnx.NodeProto, row: OperatorRow) -> None:
    """Statistics over the last axis: a channel of zeros can go if it still counts (see `edits`)."""
    walk.rank_known([node.input[0]])
    picture = walk.picture(node.input[0])
    axis = attributes(node).get("axis", -1) % picture.ndim
    seen = [i for i in long_axes(picture) if i >= axis]
    if seen and (len(seen) < len(long_axes(picture)) or seen != [picture.ndim - 1] or axis != picture.ndim - 1 or len(node.output) > 1):
        raise Barrier("it looks at all channels together", seen)
    where = walk.graph.names[index]
    for slot, name in enumerate(node.input[1:], 1):
        if name:
            walk.tie_constant(name, picture, where, slot in row.zeroable)
    if seen:
        walk.zero_readers.append(ZeroReader(index, ((node.input[0], seen[0]),)))
    walk.pictures[node.output[0]] = picture


def _sum(walk: Walk, index: int, node: onnx.NodeProto, row: OperatorRow) -> None:
    """A sum over the only tracked axis leaves nothing tracked."""
    try:
        _carry(walk, index, node, row)
        return
    except Barrier as barrier:
        picture = walk.picture(node.input[0])
        if not barrier.axes or set(barrier.axes) != set(long_axes(picture)) or len(barrier.axes) > 1:
            raise
        # The variance of what has its mean taken out: a channel of zeros counts with the mean's square (see `edits`).
        inner = centred(walk.graph, node)
        tensor = inner.tensor if inner is not None and inner.tensor in walk.pictures else node.input[0]
        walk.zero_readers.append(ZeroReader(index, ((tensor, barrier.axes[0]),)))
        walk.untracked(node.output[0])


def _quantise(walk: Walk, index: int, node: onnx.NodeProto, row: OperatorRow) -> None:
    """Places keep their channels; scales and zero points for each place along an axis are tied to it."""
    walk.rank_known([node.input[0], *node.output])
    picture, where, values = walk.picture(node.input[0]), walk.graph.names[index], attributes(node)
    for name in node.input[1:]:
        shape = walk.graph.shape(name) if name else ()
        if shape is None or len(shape) > 1:
            raise Barrier(f"the shape of {name} is not known" if shape is None else "blocks share its scales", long_axes(picture))
        if shape not in ((), (1,)):
            axis = values.get("axis", 1) % picture.ndim
            walk.tie_constant(name, line_of(picture, axis), where, False)
    walk.pictures[node.output[0]] = picture


def _range(walk: Walk, index: int, node: onnx.NodeProto, row: OperatorRow) -> None:
    """A channel of zeros changes no range that holds 0."""
    walk.rank_known([node.input[0]])
    picture = walk.picture(node.input[0])
    walk.zero_readers.extend(ZeroReader(index, ((node.input[0], axis),)) for axis in long_axes(picture))
    walk.pictures[node.output[0]] = picture
    for name in node.output[1:]:
        walk.untracked(name)


def _recurrent(walk: Walk, index: int, node: onnx.NodeProto, row: OperatorRow) -> None:
    """Features of each time step are read by one weight [directions, gates, features]; its states see them all."""
    walk.rank_known([node.input[0]])
    picture, where = walk.picture(node.input[0]), f"{node.op_type} node {walk.graph.names[index]}"
    others = [axis for axis in long_axes(picture) if axis != 2]
    if others:
        raise Barrier("it carries other axes than the one it reads", others)
    source = trace_constant(walk.graph, node.input[1])
    if not isinstance(source, Source) or len(source.view.shape) != 3:
        raise Barrier("its weight is computed")
    since = len(walk.ties)
    if picture.size > 1:
        walk.tie_view(source.name, source.view, 2, picture.reshape(-1), f"{where}: {source.name} cannot be cut", True)
        walk.zero_readers.append(ZeroReader(index, ((node.input[0], 2),)))
    walk.used(source.name, {tie.axis for tie in walk.ties[since:]})
    for name in node.output:
        if name:
            walk.untracked(name)


def _contract(walk: Walk, index: int, node: onnx.NodeProto, row: OperatorRow) -> None:
    """Sums of products: equal labels meet; what is summed over may go where one factor is 0."""
    names = [name for name in node.input if name]
    walk.rank_known([*names, *node.output])
    labels, out = LABELS[node.op_type](walk.graph, node)
    why = f"{node.op_type} node {walk.graph.names[index]}"
    for name, own in zip(names, labels, strict=True):
        _one_label(walk, name, own, labels, out, why)
    lines: dict[object, Units] = {}
    for label in dict.fromkeys(label for own in labels for label in own):
        places = [(name, own.index(label)) for name, own in zip(names, labels, strict=True) if label in own]
        tracked = [(name, axis) for name, axis in places if walk.picture(name).shape[axis] > 1]
        if not tracked:
            continue
        line = line_of(walk.picture(tracked[0][0]), tracked[0][1])
        for name, axis in places:
            if (name, axis) in tracked:
                walk.unite(line_of(walk.picture(name), axis), line, why)
            elif (walk.graph.shape(name) or ())[axis] != 1 or label not in out:
                walk.pin(line, f"{why}: {name} and what it meets are not both tracked")
        if label in out:
            lines[label] = line
        else:
            walk.zero_readers.append(ZeroReader(index, tuple(tracked)))
    if len(lines) > 1:
        # Heads that share their other factor last, and what is the same for all of them stays.
        lasting = [label for label in lines if all(label in own for own in labels)][:1]
        for label, line in lines.items():
            if label not in lasting:
                walk.pin(line, f"{why}: it makes products of two kinds of channels")
        lines = {label: lines[label] for label in lasting}
    result = np.full((1,) * len(out), UNTRACKED, np.int64)
    for label, line in lines.items():
        result = line.reshape([-1 if item == label else 1 for item in out])
    walk.pictures[node.output[0]] = result


def _one_label(walk: Walk, name: str, own: Sequence[object], labels: Sequence[Sequence[object]], out: Sequence[object], why: str) -> None:
    """Keep one tracked axis of a factor: one that all share and that lasts (heads), else the first."""
    tracked = long_axes(walk.picture(name))
    if len(tracked) > 1:
        lasting = [axis for axis in tracked if own[axis] in out and all(own[axis] in other for other in labels)]
        kept = (lasting or tracked)[0]
        walk.collapse(name, [axis for axis in tracked if axis != kept], why)


def _carry(walk: Walk, index: int, node: onnx.NodeProto, row: OperatorRow) -> None:
    assert row.carry is not None
    names = [name for i, name in enumerate(node.input) if name and (row.data is None or i in row.data)]
    for name in names:
        if walk.is_constant(name) and name not in walk.sources:
            _emit(walk, name, node)
    walk.rank_known(names)
    where = f"{node.op_type} node {walk.graph.names[index]}"
    results = row.carry(walk.graph, node, [walk.picture(name) for name in names])
    for name in names:
        source = trace_constant(walk.graph, name) if name in walk.sources else None
        if isinstance(source, Source):
            walk.used(source.name, {walk.emitted[name]})
    tracked = any(long_axes(walk.picture(name)) for name in names)
    for name, result in zip(node.output, results, strict=False):
        if name:
            walk.pictures[name] = picture = _accepted(walk, result, where)
            if tracked and picture.size == 1 and picture.item() >= 0:
                walk.pin(picture, f"{where} takes it out alone")
    for name in node.output[len(results) :]:
        walk.untracked(name)


def _grow(walk: Walk, index: int, node: onnx.NodeProto, row: OperatorRow) -> None:
    """An axis that gets its length from the channels of another tensor follows them."""
    walk.rank_known(node.output[:1])
    if row.carry is not None:
        _carry(walk, index, node, row)
    else:
        walk.untracked(node.output[0])
    picture = walk.pictures[node.output[0]]
    dims, list_of_sizes = walk.graph.shape(node.output[0]) or (), node.input[-1]
    offset = len(dims) - len(walk.graph.values(list_of_sizes) or ())
    for axis in range(max(offset, 0), len(dims)):
        found = size_origin(walk.graph, list_of_sizes, axis - offset) if picture.size == 1 and picture.size != dims[axis] else None
        if found is not None and walk.picture(found[0]).ndim > found[1] and walk.picture(found[0]).shape[found[1]] == dims[axis]:
            line = line_of(walk.picture(found[0]), found[1])
            walk.pictures[node.output[0]] = line.reshape([-1 if i == axis else 1 for i in range(len(dims))])
            return
    # Copies along one axis as long as layers have channels (a mask that is spread over them): any of them can go.
    grown = [axis for axis, size in enumerate(dims) if isinstance(size, int) and size > 1 and _is_one(walk, node.input[0], axis, len(dims))]
    if row.carry is not None and picture.size == 1 and len(grown) == 1 and dims[grown[0]] in walk.widths:
        units = walk.units.fresh(int(dims[grown[0]] or 0))
        walk.pictures[node.output[0]] = units.reshape([-1 if i == grown[0] else 1 for i in range(len(dims))])


def _accepted(walk: Walk, result: Picture | Together, where: str) -> Units:
    """A picture with units held together where they must be, and fresh ones where there is something new."""
    alternatives = result.alternatives if isinstance(result, Together) else result[None]
    for other in alternatives[1:]:
        walk.unite(alternatives[0], other, f"{where}: it meets something that is not tracked")
    picture: Units = np.array(alternatives.max(0))
    new: Flags = picture == NEW
    picture[new] = walk.units.fresh(int(new.sum()))
    return picture


def _emit(walk: Walk, name: str, node: onnx.NodeProto) -> None:
    """A stored tensor that takes the place of an activation: the entries of one long axis are units."""
    source = trace_constant(walk.graph, name)
    if not isinstance(source, Source) or not walk.graph.is_float(source.name) or 0 in source.view.shape:
        return  # what is empty emits nothing
    tracked = [axis for axis, size in enumerate(source.view.shape) if size > 1]
    tracked.sort(key=lambda axis: source.view.shape[axis] in walk.widths)  # of several axes, one as long as layers have channels
    axis = source.view.source_axis(tracked[-1]) if tracked else None
    if axis is None:
        return
    units = walk.units.fresh(source.view.shape[tracked[-1]])
    shape = [1] * len(source.view.shape)
    shape[tracked[-1]] = -1
    walk.pictures[name] = units.reshape(shape)
    walk.sources[name], walk.emitted[name] = source.view, axis
    walk.ties.append(Tie(source.name, axis, units))
    walk.hold_blocks(node, source.view, {tracked[-1]: units})


KINDS: Mapping[str, Callable[[Walk, int, onnx.NodeProto, OperatorRow], None]] = {
    "mix": _mix,
    "affine": _affine,
    "norm": _norm,
    "sum": _sum,
    "recurrent": _recurrent,
    "contract": _contract,
    "carry": _carry,
    "grow": _grow,
    "quantise": _quantise,
    "range": _range,
}
