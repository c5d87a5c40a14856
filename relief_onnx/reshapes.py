"""Where channels go in a Reshape or Flatten whose sizes are numbers, symbols or products of both."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import onnx

from relief_onnx.dims import Dim
from relief_onnx.graph import Graph
from relief_onnx.moves import Barrier, Picture, Together, dims_of, squeezed
from relief_onnx.nodes import STANDARD

__all__ = ["heads_of", "reshape"]

ONE = Dim.of(1)


@dataclass(frozen=True)
class _Block:
    """Pieces of axes before and after a reshape that hold the same elements: (axis, size) in order."""

    before: tuple[tuple[int, Dim], ...]
    after: tuple[tuple[int, Dim], ...]


Axes = list[tuple[int, Dim]]


def heads_of(graph: Graph, widths: Collection[int]) -> set[int]:
    """Into how many parts of one size a Reshape takes one of the widths apart, as attention does."""
    found = set()
    for node in graph.nodes:
        if node.op_type == "Reshape" and node.domain in STANDARD:
            whole, parts = (graph.shape(name) or () for name in (node.input[0], node.output[0]))
            pairs = ((count, size) for count, size in pairwise(parts) if isinstance(count, int) and isinstance(size, int))
            found |= {count for count, size in pairs if count * size in whole and count * size in widths}
    return found


def _blocks(before: Sequence[Dim], after: Sequence[Dim]) -> list[_Block]:
    """The finest blocks that a reshape keeps apart, outer first. What cannot be compared between those at both ends is one block."""
    left = [(axis, dim) for axis, dim in enumerate(before) if dim != ONE]
    right = [(axis, dim) for axis, dim in enumerate(after) if dim != ONE]
    outer, left, right = _matched(left, right)
    inner, left, right = _matched(left[::-1], right[::-1])
    if bool(left) != bool(right):
        raise Barrier("its sizes before and after are not both known")
    middle = [_Block(tuple(left[::-1]), tuple(right[::-1]))] if left else []
    return [*outer, *middle, *(_Block(block.before[::-1], block.after[::-1]) for block in reversed(inner))]


def _matched(left: Axes, right: Axes) -> tuple[list[_Block], Axes, Axes]:
    """Blocks as far as sizes can be compared, and what is left over."""
    blocks = []
    while left and right:
        (i, a), (j, b) = left[0], right[0]
        if (rest := b.divided(a)) is not None:
            blocks.append(_Block(((i, a),), ((j, a),)))
            left, right = left[1:], [(j, rest), *right[1:]] if rest != ONE else right[1:]
        elif (rest := a.divided(b)) is not None:
            blocks.append(_Block(((i, b),), ((j, b),)))
            left, right = [(i, rest), *left[1:]] if rest != ONE else left[1:], right[1:]
        elif (block := _uneven(left, right)) is not None:
            blocks.append(block)
            left, right = left[len(block.before) :], right[len(block.after) :]
        else:
            break
    return blocks, left, right


def _uneven(left: Axes, right: Axes) -> _Block | None:
    """The shortest runs of axes with equal products, such as [6, 4] and [8, 3]; None where a size is not known."""
    i = j = 1
    while True:
        a, b = (int(np.prod([dim.value or 0 for _, dim in run])) for run in (left[:i], right[:j]))
        if a == 0 or b == 0 or (a != b and (i if a < b else j) >= len(left if a < b else right)):
            return None
        if a == b:
            return _Block(tuple(left[:i]), tuple(right[:j]))
        i, j = (i + 1, j) if a < b else (i, j + 1)


def reshape(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture | Together]:
    """Reshape and Flatten: tracked axes are split and joined; what joins an axis of unknown size is held together."""
    (picture,) = pictures
    before, after = dims_of(graph, node.input[0]), dims_of(graph, node.output[0])
    if picture.size == 1:
        return [picture.reshape((1,) * len(after))]
    blocks = _blocks(before, after)
    # One axis per piece, 1 long where nothing is tracked.
    lengths = [dim.value if picture.shape[axis] > 1 else 1 for block in blocks for axis, dim in block.before]
    if any(length is None for length in lengths):
        raise Barrier("the size of a tracked axis is not known")
    pieces = picture.reshape([length or 1 for length in lengths])
    for place, block in reversed(list(enumerate(blocks))):
        start = sum(len(item.before) for item in blocks[:place])
        stop = start + len(block.before)
        if (len(block.before), len(block.after)) != (1, 1):
            if max(pieces.shape[start:stop]) > 1 and any(dim.value is None for _, dim in (*block.before, *block.after)):
                raise Barrier("it mixes a tracked axis with one of unknown size")
            sizes = [(dim.value or 1) if max(pieces.shape[start:stop]) > 1 else 1 for _, dim in block.before]
            shape = [dim.value or 1 for _, dim in block.after] if max(sizes) > 1 else [1] * len(block.after)
            full = np.broadcast_to(pieces, (*pieces.shape[:start], *sizes, *pieces.shape[stop:]))
            pieces = squeezed(full.reshape(*pieces.shape[:start], *shape, *pieces.shape[stop:]))
    return [_joined(pieces, [piece for block in blocks for piece in block.after], len(after))]


def _joined(pieces: Picture, owners: Sequence[tuple[int, Dim]], rank: int) -> Picture | Together:
    """Pieces back to axes. A tracked piece that shares its axis with one of unknown size is held together."""
    unknown = {axis for axis, dim in owners if dim.value is None}
    loose = [place for place, (axis, _) in enumerate(owners) if axis in unknown and pieces.shape[place] > 1]
    firm = [place for place in range(len(owners)) if place not in loose]
    if loose and all(pieces.shape[place] == 1 for place in firm):
        raise Barrier("it joins the tracked axis with one of unknown size")
    shape, full = [1] * rank, []
    for place in firm:
        axis, dim = owners[place]
        tracked = any(pieces.shape[other] > 1 for other in firm if owners[other][0] == axis)
        full.append((dim.value or 1) if tracked else 1)
        shape[axis] *= full[-1]
    moved = pieces.transpose(*loose, *firm)
    stacked = np.broadcast_to(moved, (*moved.shape[: len(loose)], *full)).reshape(-1, *shape)
    return Together(stacked) if loose else squeezed(stacked[0])
