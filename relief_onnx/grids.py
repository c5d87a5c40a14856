"""Stored integers as the numbers that they stand for: (integer - zero point) * scale, and the way back. Floats of 8 bits count as such.

A float that was not changed comes back as the integer that it was. One that was changed goes to the nearest of the numbers that the
integers can hold, by the scale that is there; where clipping at the ends would lose more than a coarser scale does, the scale is a new one.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from relief_onnx.nodes import attributes

__all__ = ["RANGES", "Grid", "carried", "spread"]

Array = NDArray[Any]

# The least and the largest number of each type of integers, and of floats of 8 bits, that weights and biases are stored as.
RANGES: dict[int, tuple[int, int]] = {
    TensorProto.INT8: (-128, 127), TensorProto.UINT8: (0, 255), TensorProto.INT16: (-32768, 32767), TensorProto.UINT16: (0, 65535),
    TensorProto.INT32: (-(2**31), 2**31 - 1), TensorProto.INT4: (-8, 7), TensorProto.UINT4: (0, 15),
    TensorProto.FLOAT8E4M3FN: (-448, 448), TensorProto.FLOAT8E4M3FNUZ: (-240, 240),
    TensorProto.FLOAT8E5M2: (-57344, 57344), TensorProto.FLOAT8E5M2FNUZ: (-57344, 57344),
}  # fmt: skip
_SMALL_FLOATS = frozenset(kind for kind in RANGES if TensorProto.DataType.Name(kind).startswith("FLOAT8"))
_BLOCK = 1 << 20


def spread(values: Array, shape: tuple[int, ...], axis: int | None, block: int = 0) -> Array | None:
    """A scale or zero point in the rank of a tensor of that `shape`: one number, one for each place along `axis` (None: broadcast from the
    last axis on), or one for each `block` of places; None where that does not fit."""
    rank = len(shape)
    if values.size == 1:
        return values.reshape((1,) * rank)
    if block:
        if values.ndim != rank or axis is None:
            return None
        wide = np.repeat(values, block, axis)[tuple(slice(size) if place == axis else slice(None) for place, size in enumerate(shape))]
        return wide if wide.shape == shape else None
    if axis is not None:
        fits = values.ndim == 1 and -rank <= axis < rank and values.size == shape[axis]
        return values.reshape([-1 if place == axis % rank else 1 for place in range(rank)]) if fits else None
    if values.ndim > rank or any(size not in (1, whole) for size, whole in zip(values.shape[::-1], shape[::-1], strict=False)):
        return None
    return values.reshape((1,) * (rank - values.ndim) + values.shape)


def carried(node: onnx.NodeProto, x: Array, scale: Array, zero: Array | None) -> Array | None:
    """What a QuantizeLinear or DequantizeLinear makes of an array that has all places of its axis; None where the types have no range."""
    values = attributes(node)
    kind = values.get("output_dtype", 0) or (TensorProto.UINT8 if zero is None else helper.np_dtype_to_tensor_dtype(zero.dtype))
    wide = spread(scale, x.shape, values.get("axis", 1), values.get("block_size", 0))
    shift = spread(np.zeros((), np.uint8) if zero is None else zero, x.shape, values.get("axis", 1), values.get("block_size", 0))
    if wide is None or shift is None:
        return None
    if node.op_type == "DequantizeLinear":
        return np.asarray((_plain(x) - _plain(shift)).astype(wide.dtype) * wide)
    if kind not in RANGES:
        return None
    return np.asarray(np.clip(_whole(x.astype(wide.dtype) / wide, kind) + _plain(shift), *RANGES[kind]))


def _plain(stored: Array) -> Array:
    """Stored numbers in a type to compute with."""
    return stored.astype(np.int64 if stored.dtype.kind in "iu" else np.float64)


def _whole(values: Array, kind: int) -> Array:
    """The nearest numbers that a type has, zero point aside; of floats within its range."""
    if kind not in _SMALL_FLOATS:
        return np.asarray(np.rint(values))
    small = np.clip(values, *RANGES[kind]).astype(helper.tensor_dtype_to_np_dtype(kind))
    return np.asarray(small.astype(values.dtype))


@dataclass(frozen=True)
class Grid:
    """What the integers of initializer `name` stand for. `scale` and `zero` have its rank, with size 1 where places share one.

    scales, zeros: the initializers that hold them in the file ("" where the operator implies them).
    block: (axis, places) where blocks of places along an axis share a scale; `scale` is then as long as the tensor there.
    lowest: of a grid that was cut, whether the whole one has the lowest integer of its type.
    bounds: the least and the largest integer, where the file says so.
    """

    name: str
    type: int
    integers: Array = field(repr=False)
    scale: Array = field(repr=False)
    zero: Array = field(repr=False)
    scales: str = ""
    zeros: str = ""
    block: tuple[int, int] | None = None
    fresh: bool = False
    lowest: bool | None = None
    bounds: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor in the file."""
        return self.integers.shape

    @property
    def limits(self) -> tuple[Array, Array]:
        """The least and the largest integer minus the zero point; symmetric where the file keeps to that."""
        low, high = self.bounds or RANGES[self.type]
        if self.bounds is None and self.type not in _SMALL_FLOATS and low < 0 and not self.zero.any() and not self._has_lowest:
            low += 1
        return low - self.zero, high - self.zero

    @property
    def _has_lowest(self) -> bool:
        return bool((self.integers == RANGES[self.type][0]).any()) if self.lowest is None else self.lowest

    def floats(self) -> Array:
        """What the integers stand for, in the type of the scale."""
        return self._numbers(_plain(self.integers) - self.zero)

    def _numbers(self, steps: Array) -> Array:
        numbers: Array = steps.astype(self.scale.dtype) * self.scale
        return numbers

    def alike(self, other: Grid) -> bool:
        """Whether two readers see the same numbers."""
        return np.array_equal(self.scale, other.scale) and np.array_equal(self.zero, other.zero)

    def steps(self, values: Array) -> Array:
        """The nearest whole numbers of scales within the limits."""
        low, high = self.limits
        with np.errstate(divide="ignore", invalid="ignore"):
            exact = np.nan_to_num(values.astype(np.float64) / self.scale.astype(np.float64))
        nearest: Array = np.clip(_whole(exact, self.type), low, high)
        return nearest if self.type in _SMALL_FLOATS else nearest.astype(np.int64)

    def nearest(self, values: Array) -> Array:
        """Those of the numbers that the file can hold which are nearest to `values`; what it holds already stays as it is."""
        near = self._numbers(self.steps(values)).astype(values.dtype)
        return np.where(values == self.floats().astype(values.dtype), values, near) if values.shape == self.shape else near

    def stored(self, values: Array) -> Array:
        """The integers for `values`; where these are unchanged, those of the file."""
        found = self.steps(values) + self.zero
        if values.shape == self.shape:
            found = np.where(values == self.floats().astype(values.dtype), _plain(self.integers), found)
        return found.astype(self.integers.dtype)

    def fitted(self, values: Array) -> Grid:
        """The same grid, but for new scales where values lie outside and clipping them loses more, in squares, than coarser scales do."""
        low, high = self.limits
        scale = self.scale.astype(np.float64)
        wide = values.astype(np.float64)
        over = np.maximum(wide / np.where(high > 0, high * scale, np.inf), wide / np.where(low < 0, low * scale, -np.inf))
        if not bool((over > 1.0 + 1e-6).any()):
            return self
        needed = np.maximum(self._together(np.maximum, over), 1.0)
        new = replace(self, scale=(scale * needed).astype(self.scale.dtype))
        lost = [self._together(np.add, (self._at(grid, wide) - wide) ** 2) for grid in (self, new)]
        better = (needed > 1.0) & (lost[1] < lost[0])
        return replace(self, scale=np.where(better, new.scale, self.scale)) if bool(better.any()) else self

    def _together(self, how: np.ufunc, values: Array) -> Array:
        """Values of all places that share a scale, put together; in the shape of the scale."""
        own = tuple(axis for axis, size in enumerate(self.scale.shape) if size == 1)
        found: Array = how.reduce(values, axis=own, keepdims=True) if own else values
        if self.block is not None and self.block[0] not in own:
            axis, block = self.block
            size = values.shape[axis]
            found = np.repeat(how.reduceat(found, np.arange(0, size, block), axis), block, axis).take(np.arange(size), axis)
        return found

    @staticmethod
    def _at(grid: Grid, values: Array) -> Array:
        numbers: Array = grid._numbers(grid.steps(values)).astype(np.float64)
        return numbers

    def cut(self, values: Array, kept: dict[int, NDArray[np.intp]]) -> Grid | None:
        """The grid of what is left of the tensor: `values` now. kept: by axis, the places that are left, where that is known.

        Elsewhere the scale of each place is the first one that its values fit. None where no scales are found.
        """
        if values.shape == self.shape:
            return self
        places = {axis: kept.get(axis) for axis, (now, before) in enumerate(zip(values.shape, self.shape, strict=True)) if now != before}
        if len(values.shape) != len(self.shape):
            return None
        grid = self
        for axis, known in places.items():
            if known is not None and len(known) == values.shape[axis] and (not len(known) or known[-1] < self.shape[axis]):
                grid = grid._taken(axis, known)
        unknown = [axis for axis in places if grid.shape[axis] != values.shape[axis]]
        own = [axis for axis in unknown if grid.scale.shape[axis] > 1 or grid.zero.shape[axis] > 1]
        for axis in unknown:
            if axis not in own:
                grid = grid._taken(axis, np.arange(values.shape[axis]))  # any: all places share their scales
        found = grid._matched(own[0], values) if len(own) == 1 else None
        return grid if not own else None if found is None else grid._taken(own[0], found)

    def _taken(self, axis: int, places: NDArray[np.intp]) -> Grid:
        block = self.block
        if block is not None and block[0] == axis:
            # What is left of blocks is one grid only where whole blocks went.
            starts = places[:: block[1]] // block[1]
            whole = np.concatenate([np.arange(start * block[1], min((start + 1) * block[1], self.shape[axis])) for start in starts])
            if not np.array_equal(whole, places):
                block = (axis, 1)
        return replace(
            self, integers=self.integers.take(places, axis), block=block, lowest=self._has_lowest,
            scale=self.scale.take(places, axis) if self.scale.shape[axis] > 1 else self.scale,
            zero=self.zero.take(places, axis) if self.zero.shape[axis] > 1 else self.zero,
        )  # fmt: skip

    def _matched(self, axis: int, values: Array) -> NDArray[np.intp] | None:
        """For each place that is left the first old one, in order, whose scale its values are multiples of."""
        found: list[int] = []
        place = 0
        for number in range(values.shape[axis]):
            own = values.take([number], axis)
            while place < self.shape[axis]:
                candidate = self._taken(axis, np.array([place], np.intp))
                place += 1
                if np.array_equal(candidate._numbers(candidate.steps(own)).astype(own.dtype), own):
                    found.append(place - 1)
                    break
            else:
                return None
        return np.array(found, np.intp)
