"""The closed form of the convolution score (arXiv 2109.10795, section 3).

For sample n, input channel i and filter j, with a = |x_ni| and k = |K_ij|:

    || k * a ||_F^2  =  sum over pairs of kernel offsets (p, q) of  k_p k_q G_pq,     G_pq = sum over output positions of a_p a_q

where a_p is the image that offset p sees. G is computed once per sample and channel; every filter then costs one small product.
Everything in these sums is non-negative, so float32 loses nothing to cancellation.

Two ways to G, chosen by geometry:

* `Shifts`, for 3x3 kernels at stride 1, dilation 1, padding 1 (nearly all the work of real networks): G_pq depends on q - p alone, but
  for the border rows and columns. 29 distinct sums remain out of 45 pairs, and all but the border ones are dot products of the
  zero-padded image, laid out flat, with itself shifted.
* `Patches`, for anything else: unfold and multiply.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from relief_onnx.layers import Geometry

__all__ = ["PatchStatistics", "Shifts", "offset_sums", "output_positions", "padding", "patches", "statistics"]

Floats = NDArray[np.float32]


class PatchStatistics(Protocol):
    """What a kernel of one geometry needs to know of an image of one size."""

    def features(self, x: Floats) -> Floats:
        """From x [n, c, *space] to the distinct sums of a = |x| [n, c, S]."""
        ...

    def coefficients(self, k: Floats) -> Floats:
        """From k = |K| [..., *kernel] to [..., S], so that features @ coefficients = squared norm."""
        ...


def padding(geometry: Geometry, space: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """(begin, end) padding per spatial axis of an image, with auto_pad resolved. May be negative (cropping)."""
    rank = len(space)
    if geometry.auto_pad in ("SAME_UPPER", "SAME_LOWER") and not geometry.transposed:
        pads = []
        for size, kernel, stride, dilation in zip(space, geometry.kernel, geometry.strides, geometry.dilations, strict=True):
            total = max((-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
            small, large = total // 2, total - total // 2
            pads.append((small, large) if geometry.auto_pad == "SAME_UPPER" else (large, small))
        return tuple(pads)
    if geometry.auto_pad == "VALID" and not geometry.transposed:
        return ((0, 0),) * rank
    return tuple(zip(geometry.pads[:rank], geometry.pads[rank:], strict=True))


def _transposed_padding(geometry: Geometry, space: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Padding of the zero-stuffed image that turns a transposed convolution into a plain one with stride 1."""
    rank = len(space)
    extra = geometry.output_padding or (0,) * rank
    result = []
    for axis in range(rank):
        reach = geometry.dilations[axis] * (geometry.kernel[axis] - 1)
        full = geometry.strides[axis] * (space[axis] - 1) + extra[axis] + reach + 1
        begin, end = geometry.pads[axis], geometry.pads[rank + axis]
        if geometry.output_shape or geometry.auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            wanted = geometry.output_shape[-rank:][axis] if geometry.output_shape else space[axis] * geometry.strides[axis]
            total = full - wanted
            begin = total // 2 if geometry.auto_pad != "SAME_LOWER" else total - total // 2
            begin = begin if geometry.auto_pad == "SAME_UPPER" or geometry.auto_pad == "SAME_LOWER" else total - total // 2
            end = total - begin
        elif geometry.auto_pad == "VALID":
            begin = end = 0
        result.append((reach - begin, reach - end + extra[axis]))
    return tuple(result)


def output_positions(geometry: Geometry, space: tuple[int, ...]) -> int:
    """H_out x W_out (x ...) of the layer on an image of that size."""
    return int(np.prod(_Windows(geometry, space).out))


def offset_sums(geometry: Geometry, image: NDArray[np.float64]) -> NDArray[np.float64]:
    """image [C, *space] -> [C, *kernel]: the sum over output positions of the pixel that each offset of the kernel sees.

    Padding counts as 0.
    """
    windows = _Windows(geometry, image.shape[1:])
    padded = windows.padded(image[None])[0]
    sums = np.zeros((len(image), *geometry.kernel))
    for offset in np.ndindex(*geometry.kernel):
        starts = [place * dilation for place, dilation in zip(offset, windows.dilations, strict=True)]
        seen = (slice(a, a + size * step, step) for a, size, step in zip(starts, windows.out, windows.strides, strict=True))
        sums[(slice(None), *offset)] = padded[(slice(None), *seen)].reshape(len(image), -1).sum(1)
    return np.flip(sums, tuple(range(1, sums.ndim))) if geometry.transposed else sums


class _Windows:
    """A geometry on an image as plain sliding windows: stuffed and padded image, strides, dilations."""

    def __init__(self, geometry: Geometry, space: tuple[int, ...]) -> None:
        self.transposed = geometry.transposed
        if self.transposed:
            self.stuff, self.strides = geometry.strides, (1,) * len(space)
            self.pads = _transposed_padding(geometry, space)
        else:
            self.stuff, self.strides = (1,) * len(space), geometry.strides
            self.pads = padding(geometry, space)
        self.kernel, self.dilations = geometry.kernel, geometry.dilations
        self.size = tuple((size - 1) * gap + 1 for size, gap in zip(space, self.stuff, strict=True))
        padded = [size + begin + end for size, (begin, end) in zip(self.size, self.pads, strict=True)]
        reach = [dilation * (kernel - 1) + 1 for dilation, kernel in zip(self.dilations, self.kernel, strict=True)]
        self.out = tuple(max((size - need) // stride + 1, 0) for size, need, stride in zip(padded, reach, self.strides, strict=True))

    def padded(self, a: NDArray[Any]) -> NDArray[Any]:
        """The zero-stuffed, padded (or cropped) image [n, c, *padded]."""
        if any(gap > 1 for gap in self.stuff):
            stuffed = np.zeros((*a.shape[:2], *self.size), a.dtype)
            stuffed[(slice(None), slice(None), *(slice(None, None, gap) for gap in self.stuff))] = a
            a = stuffed
        crop = tuple(slice(max(-begin, 0), a.shape[2 + i] - max(-end, 0)) for i, (begin, end) in enumerate(self.pads))
        a = a[(slice(None), slice(None), *crop)]
        if all(begin <= 0 and end <= 0 for begin, end in self.pads):
            return a
        return np.pad(a, ((0, 0), (0, 0), *((max(begin, 0), max(end, 0)) for begin, end in self.pads)))

    def seen(self, a: NDArray[Any]) -> NDArray[Any]:
        """What each offset of the kernel sees at each output position: a view [n, c, *kernel, *out]."""
        return self.over(self.padded(a))

    def over(self, image: NDArray[Any]) -> NDArray[Any]:
        """The same of an image that is padded already."""
        steps = image.strides[2:]
        return np.lib.stride_tricks.as_strided(
            image,
            (*image.shape[:2], *self.kernel, *self.out),
            (
                *image.strides[:2],
                *(step * dilation for step, dilation in zip(steps, self.dilations, strict=True)),
                *(step * stride for step, stride in zip(steps, self.strides, strict=True)),
            ),
            writeable=False,
        )


def patches(geometry: Geometry, x: NDArray[Any], places: tuple[NDArray[np.intp], ...]) -> NDArray[Any]:
    """x [n, c, *space] -> [n, P, c, *kernel]: what each weight meets at P output positions, `places` holding P numbers per axis."""
    windows = _Windows(geometry, x.shape[2:])
    image = windows.padded(x)
    # The numbers of the entries that one sample needs: all samples are then taken from in one go.
    every: tuple[Any, ...] = (..., *places)
    numbers = windows.over(np.arange(math.prod(image.shape[1:])).reshape(1, *image.shape[1:]))[0][every]
    axes = tuple(range(1, numbers.ndim - 1))
    numbers = np.moveaxis(np.flip(numbers, axes) if geometry.transposed else numbers, -1, 0)
    found: NDArray[Any] = image.reshape(len(x), -1).take(numbers, 1)
    return found


class Patches:
    """G by unfolding: any kernel, stride, dilation, padding, any number of spatial axes, transposed too."""

    def __init__(self, geometry: Geometry, space: tuple[int, ...]) -> None:
        self._windows = _Windows(geometry, space)
        self._upper = np.triu_indices(geometry.positions)
        self._places = self._upper[0] * geometry.positions + self._upper[1]
        self._twice = np.where(self._upper[0] == self._upper[1], 1, 2).astype(np.float32)

    def features(self, x: Floats) -> Floats:
        w = self._windows
        n, c = x.shape[:2]
        unfolded = w.seen(np.abs(x)).reshape(n, c, int(np.prod(w.kernel)), int(np.prod(w.out)))
        gram = unfolded @ unfolded.swapaxes(-1, -2)
        result: Floats = gram.reshape(n, c, -1).take(self._places, -1)
        return result

    def coefficients(self, k: Floats) -> Floats:
        rank = len(self._windows.kernel)
        if self._windows.transposed:
            k = np.flip(k, tuple(range(-rank, 0)))
        flat = k.reshape(*k.shape[:-rank], -1)
        result: Floats = flat[..., self._upper[0]] * flat[..., self._upper[1]] * self._twice
        return result


_OFFSETS = tuple(product((-1, 0, 1), (-1, 0, 1)))


def _axis_case(p: int, q: int) -> tuple[int, int]:
    """(shift, border) of a pair of offsets on one axis; border -1 leaves the last row out, +1 the first, 0 none."""
    return q - p, (p if p == q else 0)


@lru_cache(maxsize=1)
def _shift_cases() -> tuple[dict[tuple[int, int, int, int], int], NDArray[np.intp]]:
    """The distinct sums of a 3x3 kernel, numbered, and the number that each of the 9 x 9 pairs needs."""
    numbers: dict[tuple[int, int, int, int], int] = {}
    table = np.zeros((9, 9), np.intp)
    for i, (py, px) in enumerate(_OFFSETS):
        for j, (qy, qx) in enumerate(_OFFSETS):
            (dy, by), (dx, bx) = _axis_case(py, qy), _axis_case(px, qx)
            if dy < 0 or (dy == 0 and dx < 0):
                dy, dx = -dy, -dx
            table[i, j] = numbers.setdefault((dy, dx, by, bx), len(numbers))
    return numbers, table


@dataclass(frozen=True)
class _Part:
    """A sum of products at one shift over one band of rows and one of columns: 0 the first, 1 the middle, 2 the last.

    A band matters only on an axis without a shift (there a border may be left out); on the other axis there is just band 1, the whole.
    """

    dy: int
    dx: int
    rows: int
    columns: int


_WITHOUT = {0: (0, 1, 2), 1: (1, 2), -1: (0, 1)}


@lru_cache(maxsize=1)
def _parts() -> tuple[tuple[_Part, ...], Floats]:
    """All parts, and the matrix [part, case] of ones that adds them up to the cases."""
    cases, _ = _shift_cases()
    found: dict[_Part, int] = {}
    pairs = []
    for (dy, dx, by, bx), number in cases.items():
        for rows, columns in product(_WITHOUT[by] if dy == 0 else (1,), _WITHOUT[bx] if dx == 0 else (1,)):
            pairs.append((found.setdefault(_Part(dy, dx, rows, columns), len(found)), number))
    matrix = np.zeros((len(found), len(cases)), np.float32)
    matrix[tuple(zip(*pairs, strict=True))] = 1
    return tuple(found), matrix


class Shifts:
    """G of a 3x3 kernel at stride 1 with padding 1, from the image's own shifted products. Needs 2 x 2 pixels or more."""

    def __init__(self, space: tuple[int, ...]) -> None:
        self._height, self._width = space
        # Rows end in two zeros, and the image in a row of them, so that a shift never meets a neighbour's pixels.
        self._pitch = self._width + 2
        self._cases, self._table = _shift_cases()

    def features(self, x: Floats) -> Floats:
        n, c, height, width = x.shape
        flat = np.empty((n, c, height * self._pitch + 2), np.float32)
        flat[..., -2:] = 0
        image = flat[..., :-2].reshape(n, c, height, self._pitch)
        image[..., width:] = 0
        np.abs(x, out=image[..., :width])
        left, right = (np.ascontiguousarray(image[..., column]) for column in (0, width - 1))
        parts, matrix = _parts()
        sums = np.empty((len(parts), n, c), np.float32)
        for part, total in zip(parts, sums, strict=True):
            if part.dx:
                self._sum(part, flat, self._pitch, total)
        # Shifts within a column need the border columns apart; nothing else reads them any more.
        image[..., 0] = image[..., width - 1] = 0
        columns = ((left, 1), (flat, self._pitch), (right, 1))
        for part, total in zip(parts, sums, strict=True):
            if not part.dx:
                view, pitch = columns[part.columns]
                self._sum(part, view, pitch, total)
        return (sums.reshape(len(parts), -1).T @ matrix).reshape(n, c, -1)

    def _sum(self, part: _Part, view: Floats, pitch: int, total: Floats) -> None:
        """Rows of each image in `view` times the same rows moved by (dy, dx), summed into `total` [n, c]."""
        last = self._height - 1
        top, end = ((0, 1), (1, last), (last, last + 1))[part.rows] if part.dy == 0 else (0, max(self._height - part.dy, 0))
        start, stop, shift = top * pitch, end * pitch, part.dy * pitch + part.dx
        np.vecdot(view[..., start:stop], view[..., start + shift : stop + shift], out=total)

    def coefficients(self, k: Floats) -> Floats:
        weights = np.ascontiguousarray(np.moveaxis(k.reshape(*k.shape[:-2], 9), -1, 0))
        result = np.zeros((len(self._cases), *weights.shape[1:]), np.float32)
        for i in range(9):
            for j in range(i, 9):
                product = weights[i] * weights[j]
                result[self._table[i, j]] += product if i == j else 2 * product
        return np.moveaxis(result, 0, -1)


def statistics(geometry: Geometry, space: tuple[int, ...]) -> PatchStatistics:
    """The cheaper way to G for that geometry on an image of that size."""
    ones, twos = (1, 1), (3, 3)
    plain = geometry.kernel == twos and geometry.strides == ones and geometry.dilations == ones and not geometry.transposed
    if plain and min(space) >= 2 and padding(geometry, space) == (ones, ones):
        return Shifts(space)
    return Patches(geometry, space)
