"""A layer as equations: what its weights meet and what it should emit, at some positions of some samples."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from relief_onnx.gram import patches
from relief_onnx.layers import Layer

__all__ = [
    "ENOUGH_ROWS", "POSITIONS", "Places", "as_output", "correspond", "drawn", "inputs_at", "layer_rows", "outputs_at", "spread", "touched",
]  # fmt: skip

# Of a convolution the places in its output, axis by axis, the same in all samples of a batch; of a dense layer rows of the whole batch.
Places = tuple[NDArray[np.intp], ...]
Floats = NDArray[np.float32]

# Positions of a sample (pixels, tokens, time steps) that are looked at, and rows for each kept input up to which there are more of them.
POSITIONS, ENOUGH_ROWS = 32, 200


def layer_rows(
    layer: Layer, x: NDArray[Any], y: NDArray[Any], other: NDArray[Any] | None, budget: int, enough: int, rng: np.random.Generator
) -> tuple[NDArray[Any], ...]:
    """One batch as rows: inputs [rows, groups, features], outputs `y` and `other` (0 where there is none) [rows, out], all float32.

    x is the layer's input; y and other have the shape of its output. At most about `budget` rows, chosen at random, and no more than
    POSITIONS of each sample unless those are less than `enough`. Features are in the order of the canonical weight.
    """
    places = drawn(layer, x, y, budget, enough, rng)
    wanted = outputs_at(layer, y, places)
    return inputs_at(layer, x, places), wanted, np.zeros_like(wanted) if other is None else outputs_at(layer, other, places)


def drawn(layer: Layer, x: NDArray[Any], y: NDArray[Any], budget: int, enough: int, rng: np.random.Generator) -> Places:
    """Places by chance, as many as `layer_rows` says."""
    if layer.geometry is not None:
        space = y.shape[2:]
        size = int(np.prod(space))
        number = min(size, max(POSITIONS, -(-enough // len(x))), max(budget // len(x), 1))
        return np.unravel_index(np.sort(rng.permutation(size)[:number]), space)
    size = x.size // layer.in_per_group
    number = min(size, max(budget, 1), max(POSITIONS * len(x), enough) if layer.input_axis else size)
    return (np.sort(rng.permutation(size)[:number]),)


def correspond(layer: Layer, x: NDArray[Any], y: NDArray[Any]) -> bool:
    """Whether the layer makes as many rows of x as y has. Of two networks that choose rows themselves (of experts, boxes) it may not."""
    if layer.geometry is not None:
        return len(x) == len(y)
    return x.size // layer.in_per_group == y.size // layer.out_channels


def inputs_at(layer: Layer, x: NDArray[Any], places: Places) -> Floats:
    """What the weights meet there [rows, groups, features]."""
    x = np.asarray(x, np.float32)
    if layer.geometry is not None:
        return patches(layer.geometry, x, places).reshape(len(x) * len(places[0]), layer.groups, int(np.prod(layer.view.shape[1:])))
    return np.moveaxis(x, layer.input_axis, -1).reshape(-1, layer.in_per_group)[places][:, None]


def outputs_at(layer: Layer, y: NDArray[Any], places: Places) -> Floats:
    """What the layer emits there [rows, out]."""
    y = np.asarray(y, np.float32)
    if layer.geometry is not None:
        every: tuple[Any, ...] = (..., *places)
        found: Floats = np.moveaxis(y[every], 1, -1).reshape(-1, layer.out_channels)
    else:
        found = np.moveaxis(y, layer.output_axis, -1).reshape(-1, layer.out_channels)[places]
    return found


def as_output(layer: Layer, value: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """What a layer's node adds to its output, of that shape; a vector that a convolution adds has a number for each channel."""
    if layer.geometry is not None and value.ndim == 1:
        value = value.reshape(-1, *(1,) * (len(shape) - 2))
    return np.broadcast_to(value, shape)


def spread(layer: Layer, rows: Floats, shape: tuple[int, ...], places: Places) -> Floats:
    """The transpose of `inputs_at`, of a layer without groups: rows [rows, features] added up in a tensor of its input's shape."""
    if layer.geometry is None:
        moved = [size for axis, size in enumerate(shape) if axis != layer.input_axis % len(shape)]
        flat = np.zeros((int(np.prod(moved)), layer.in_per_group), np.float32)
        flat[places] = rows
        return np.moveaxis(flat.reshape(*moved, -1), -1, layer.input_axis)
    # Each entry has a number, 0 is the padding: what an offset of the kernel sees are different entries, place by place.
    numbers = 1 + np.arange(int(np.prod(shape[1:]))).reshape(1, *shape[1:])
    seen = patches(layer.geometry, numbers, places).reshape(len(places[0]), shape[1], -1)
    given = rows.reshape(shape[0], *seen.shape)
    found = np.zeros((shape[0], 1 + numbers.size), np.float32)
    for offset in range(seen.shape[2]):
        found[:, seen[:, :, offset]] += given[..., offset]
    return found[:, 1:].reshape(shape)


def touched(layer: Layer, y: NDArray[Any]) -> Places:
    """The places where what has the shape of the layer's output is not 0, in any sample and unit."""
    if layer.geometry is not None:
        return np.nonzero(y.any((0, 1)))
    return np.nonzero(np.moveaxis(y, layer.output_axis, -1).reshape(-1, layer.out_channels).any(1))
