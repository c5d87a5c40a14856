"""How operators move channels: pure functions from the pictures of a node's inputs to those of its outputs (see `ops`).

A picture has the tensor's rank, and size 1 on every axis that is not tracked. Entries are numbers that the functions only move:
units, indices, constants. Where several entries of the input end in one entry of the output, the result is `Together`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from relief_onnx.dims import Dim
from relief_onnx.graph import Graph, attributes

__all__ = ["NEW", "UNTRACKED", "Barrier", "Carry", "Picture", "Together", "cuts_of", "long_axes", "pad_places", "pads_of", "squeezed"]

Picture = NDArray[Any]
UNTRACKED = -1
NEW = -2  # an entry that comes from no input: a channel of zeros that Pad adds
ONE = Dim.of(1)


class Barrier(Exception):  # noqa: N818  (not an error: a refusal with its reason)
    """A node that cannot carry a picture; the message says why. Always caught by the walk over the graph.

    `axes`: it could if those axes of its first input were not tracked.
    """

    def __init__(self, why: str, axes: Sequence[int] = ()) -> None:
        super().__init__(why)
        self.axes = tuple(axes)


@dataclass(frozen=True)
class Together:
    """Alternatives [k, *shape]: entries of the input that one entry of the output holds together."""

    alternatives: Picture


Carry = Callable[[Graph, onnx.NodeProto, Sequence[Picture]], list[Picture | Together]]


def long_axes(picture: Picture) -> list[int]:
    """The tracked axes."""
    return [axis for axis, size in enumerate(picture.shape) if size > 1]


def equal(a: Picture, b: Picture) -> NDArray[np.bool_]:
    """Entry by entry, NaN equal to NaN."""
    same: NDArray[np.bool_] = a == b
    return same | (np.isnan(a) & np.isnan(b)) if a.dtype.kind == "f" else same


def squeezed(picture: Picture) -> Picture:
    """Size 1 again on every axis along which nothing changes."""
    for axis in long_axes(picture):
        first = picture.take([0], axis)
        if bool(np.all(equal(picture, first))):
            picture = first
    return picture


def dims_of(graph: Graph, name: str) -> tuple[Dim, ...]:
    dims = graph.dims(name)
    if dims is None:
        raise Barrier(f"the shape of {name} is not known")
    return dims


def _size(graph: Graph, name: str, axis: int) -> int:
    size = dims_of(graph, name)[axis].value
    if size is None:
        raise Barrier(f"the size of {name} along axis {axis} is not known")
    return size


def integers(graph: Graph, node: onnx.NodeProto, key: str, slot: int) -> tuple[int | None, ...] | None:
    """An attribute or, in later opsets, an input that lists integers; None for each that is not known, or where it is absent."""
    values = attributes(node)
    if key in values:
        found = values[key]
        return tuple(found) if isinstance(found, list | tuple) else (found,)
    if len(node.input) <= slot or not node.input[slot]:
        return None
    entries = graph.values(node.input[slot])
    if entries is None:
        raise Barrier(f"its {key} are computed at run time")
    return tuple(entry.value for entry in entries)


def _known(values: tuple[int | None, ...], what: str) -> tuple[int, ...]:
    if any(value is None for value in values):
        raise Barrier(f"its {what} are computed at run time")
    return tuple(value for value in values if value is not None)


def same(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture | Together]:
    """Nothing moves."""
    return [pictures[0]]


def spatial(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture | Together]:
    """Works inside each channel: axes from 2 on must not be tracked."""
    (picture,) = pictures
    inner = [axis for axis in long_axes(picture) if axis > 1]
    if inner:
        raise Barrier("it works over axes whose positions are tracked", inner)
    return [picture]


def transpose(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture | Together]:
    """Axes change places."""
    return [pictures[0].transpose(attributes(node).get("perm"))]


# -- axes that come and go ------------------------------------------------------------------------------------------------


def _axes(graph: Graph, node: onnx.NodeProto) -> tuple[int, ...] | None:
    found = integers(graph, node, "axes", 1)
    return None if found is None else _known(found, "axes")


def squeeze(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture | Together]:
    """Drops axes of size 1."""
    (picture,) = pictures
    axes = _axes(graph, node)
    if axes is None:
        axes = tuple(i for i, dim in enumerate(dims_of(graph, node.input[0])) if dim == ONE)
    return [np.squeeze(picture, tuple(axis % picture.ndim for axis in axes))]


def unsqueeze(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture | Together]:
    """Adds axes of size 1."""
    return [np.expand_dims(pictures[0], _axes(graph, node) or ())]


def reduced_axes(graph: Graph, node: onnx.NodeProto, rank: int) -> tuple[int, ...]:
    """The axes that a Reduce operator reduces, not negative."""
    axes = _axes(graph, node)
    if axes is None:
        axes = () if attributes(node).get("noop_with_empty_axes", 0) else tuple(range(rank))
    return tuple(axis % rank for axis in axes)


def reduce(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture | Together]:
    """Reduces axes that are not tracked."""
    (picture,) = pictures
    axes = reduced_axes(graph, node, picture.ndim)
    tracked = [axis for axis in axes if picture.shape[axis] > 1]
    if tracked:
        raise Barrier("it reduces over channels", tracked)
    return [picture if attributes(node).get("keepdims", 1) else np.squeeze(picture, axes)]


def argument(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture | Together]:
    """ArgMax, ArgMin: one axis, as an attribute."""
    (picture,) = pictures
    axis = attributes(node).get("axis", 0) % picture.ndim
    if picture.shape[axis] > 1:
        raise Barrier("it compares channels", [axis])
    return [picture if attributes(node).get("keepdims", 1) else np.squeeze(picture, axis)]


def along_axis(default: int) -> Carry:
    """Softmax and the like: the axis (before opset 13 all after it too) must not be tracked."""

    def carry(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture | Together]:
        picture = pictures[0]
        axis = attributes(node).get("axis", 1 if default == -1 and graph.opset < 13 else default) % picture.ndim
        seen = range(axis, picture.ndim) if graph.opset < 13 else (axis,)
        tracked = [i for i in seen if picture.shape[i] > 1]
        if tracked:
            raise Barrier("it looks at all channels together", tracked)
        return [picture] * len(node.output)

    return carry


def cumulative(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture | Together]:
    """CumSum: its axis is an input."""
    (picture,) = pictures
    axis = _known(integers(graph, node, "axis", 1) or (0,), "axis")[0] % picture.ndim
    if picture.shape[axis] > 1:
        raise Barrier("it adds channels up", [axis])
    return [picture]


# -- parts and copies -----------------------------------------------------------------------------------------------------


def concat(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture | Together]:
    """Along the tracked axis parts follow each other; along another one their channels are held together."""
    axis = attributes(node)["axis"] % pictures[0].ndim
    others = [max(picture.shape[i] for picture in pictures) for i in range(pictures[0].ndim)]
    if all(picture.shape[axis] == 1 for picture in pictures) and max(others) > 1:
        return [Together(np.stack([np.broadcast_to(picture, others) for picture in pictures]))]
    if max(others) == 1 and len({picture.item() for picture in pictures}) == 1:
        return [pictures[0]]
    parts = [
        np.broadcast_to(picture, (*others[:axis], _size(graph, name, axis), *others[axis + 1 :]))
        for name, picture in zip(node.input, pictures, strict=True)
    ]
    return [np.concatenate(parts, axis)]


def split(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture | Together]:
    """Parts of the tracked axis."""
    (picture,) = pictures
    axis = attributes(node).get("axis", 0) % picture.ndim
    if picture.shape[axis] == 1:
        return [picture] * len(node.output)
    sizes = [_size(graph, name, axis) for name in node.output]
    return list(np.split(picture, np.cumsum(sizes)[:-1], axis))


def cuts_of(graph: Graph, node: onnx.NodeProto, rank: int) -> dict[int, tuple[int | None, int | None, int | None, int]]:
    """What Slice takes, by axis: start, end, step (None where not known), and the place in the node's lists."""
    starts, ends = integers(graph, node, "starts", 1) or (), integers(graph, node, "ends", 2) or ()
    axes = integers(graph, node, "axes", 3)
    steps = integers(graph, node, "steps", 4)
    named = _known(axes, "axes") if axes is not None else tuple(range(len(starts)))
    return {axis % rank: (starts[place], ends[place], steps[place] if steps is not None else 1, place) for place, axis in enumerate(named)}


def slice_(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture | Together]:
    """A range of the tracked axis."""
    (picture,) = pictures
    tracked = long_axes(picture)
    if not tracked:
        return [picture]
    cuts = cuts_of(graph, node, picture.ndim)
    for axis, (start, end, step, _) in cuts.items():
        if axis not in tracked:
            continue
        if start is None or end is None or step is None:
            raise Barrier("which channels it takes is computed at run time", [axis])
        if step != 1 and len(cuts) > 1:
            raise Barrier("it takes every other channel and cuts other axes too", [axis])
        picture = picture[(slice(None),) * axis + (slice(start, end, step),)]
        if picture.shape[axis] == 0:
            raise Barrier("it takes nothing")
    return [picture]


def gather(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture | Together]:
    """Channels by number; a look-up along another axis (an embedding) leaves them alone."""
    (picture,) = pictures
    axis = attributes(node).get("axis", 0) % picture.ndim
    rank = len(dims_of(graph, node.input[1]))
    if picture.shape[axis] == 1:
        return [picture.reshape((*picture.shape[:axis], *(1,) * rank, *picture.shape[axis + 1 :]))]
    indices = graph.constant(node.input[1])
    if indices is None:
        known = graph.values(node.input[1])
        if known is None or any(entry.value is None for entry in known):
            raise Barrier("which channels it takes is computed at run time", [axis])
        indices = np.array([entry.value for entry in known], np.int64).reshape((-1,) * rank)
    return [picture.take(np.asarray(indices, np.int64), axis)]


def gather_nd(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture | Together]:
    """Picks along the leading axes (one token of each sample); the axes behind them stay."""
    (picture,) = pictures
    indices = dims_of(graph, node.input[1])
    depth = indices[-1].value
    if depth is None:
        raise Barrier("how many axes it picks along is not known")
    behind = attributes(node).get("batch_dims", 0) + depth
    tracked = [axis for axis in long_axes(picture) if axis < behind]
    if tracked:
        raise Barrier("it picks along a tracked axis", tracked)
    return [picture.reshape((*(1,) * (len(indices) - 1), *picture.shape[behind:]))]


def expand(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture | Together]:
    """Copies along axes of size 1."""
    (picture,) = pictures
    rank = len(dims_of(graph, node.output[0]))
    return [picture.reshape((1,) * (rank - picture.ndim) + picture.shape)]


def tile(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture | Together]:
    """Copies of whole axes."""
    (picture,) = pictures
    tracked = long_axes(picture)
    if not tracked:
        return [picture]
    repeats = integers(graph, node, "repeats", 1) or ()
    times = tuple(repeats[axis] if axis in tracked else 1 for axis in range(picture.ndim))
    return [np.tile(picture, _known(times, "repeats"))]


def pads_of(graph: Graph, node: onnx.NodeProto, rank: int) -> list[int | None]:
    """Pads in ONNX's order, all begins, then all ends; None where not known."""
    pads = integers(graph, node, "pads", 1)
    if pads is None:
        raise Barrier("it has no pads")
    axes = integers(graph, node, "axes", 3)
    if axes is None:
        return list(pads)
    full: list[int | None] = [0 for _ in range(2 * rank)]
    for place, entry in enumerate(pad_places(graph, node, rank)):
        full[entry] = pads[place]
    return full


def pad_places(graph: Graph, node: onnx.NodeProto, rank: int) -> list[int]:
    """For each entry of the node's own list of pads: where it stands in ONNX's order of all axes."""
    axes = integers(graph, node, "axes", 3)
    named = range(rank) if axes is None else [axis % rank for axis in _known(axes, "axes")]
    return [*named, *(axis + rank for axis in named)]


def pads_with_zeros(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a channel of zeros stays one under Pad: always where it repeats or mirrors values, else where its value is 0."""
    if attributes(node).get("mode", "constant") != "constant":
        return True
    fill = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(())
    return fill is not None and not fill.any() and attributes(node).get("value", 0.0) == 0


def pad(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture | Together]:
    """Zeros around the tracked axis are new channels; other numbers there stay."""
    (picture,) = pictures
    tracked = long_axes(picture)
    if not tracked:
        return [picture]
    pads = pads_of(graph, node, picture.ndim)
    widths = [(pads[axis], pads[axis + picture.ndim]) if axis in tracked else (0, 0) for axis in range(picture.ndim)]
    if not any(any(width) or None in width for width in widths):
        return [picture]
    known = [_known(width, "pads") for width in widths]
    if attributes(node).get("mode", "constant") != "constant" or any(width < 0 for pair in known for width in pair):
        raise Barrier("it pads channels, and not with a constant", tracked)
    return [np.pad(picture, known, constant_values=NEW if pads_with_zeros(graph, node) else UNTRACKED)]


def resize(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture | Together]:
    """Tracked axes must keep their size."""
    (picture,) = pictures
    before, after = graph.dims(node.input[0]), graph.dims(node.output[0])
    for axis in long_axes(picture):
        if before is None or after is None or before[axis] != after[axis] or axis == 0:
            raise Barrier("it resizes a tracked axis", [axis])
    return [picture]


def depth_to_space(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture | Together]:
    """Channels become pixels: the block x block channels of one pixel block go together."""
    (picture,) = spatial(graph, node, pictures)
    assert isinstance(picture, np.ndarray)
    values = attributes(node)
    block = values["blocksize"]
    if picture.shape[1] == 1:
        return [picture]
    apart = (
        picture.reshape(len(picture), block * block, -1, 1, 1).swapaxes(0, 1)
        if values.get("mode", "DCR") == "DCR"
        else picture.reshape(len(picture), -1, block * block, 1, 1).transpose(2, 0, 1, 3, 4)
    )
    return [Together(apart)]


def space_to_depth(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture | Together]:
    """Pixels become channels: every channel is there block x block times."""
    (picture,) = spatial(graph, node, pictures)
    assert isinstance(picture, np.ndarray)
    block = attributes(node)["blocksize"]
    return [np.tile(picture, (1, block * block, 1, 1)) if picture.shape[1] > 1 else picture]


def group_normalization(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture | Together]:
    """Statistics over each group of channels: whole groups go."""
    (picture,) = spatial(graph, node, pictures)
    assert isinstance(picture, np.ndarray)
    groups = attributes(node)["num_groups"]
    if picture.shape[1] == 1:
        return [picture]
    if groups == 1 or picture.shape[1] % groups:
        raise Barrier("it normalises over all channels", [1])
    places = picture.reshape(len(picture), groups, -1, *picture.shape[2:])
    return [Together(np.stack([np.repeat(places[:, :, i], places.shape[2], 1) for i in range(places.shape[2])]))]


def shape(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture | Together]:
    """Sizes are not channels; who reads them is looked at afterwards (see `sizes`)."""
    return [np.full(1, UNTRACKED, np.int64).astype(pictures[0].dtype)]
