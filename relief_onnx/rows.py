"""A layer as equations: what its weights meet and what it should emit, at some positions of some samples."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from relief_onnx.gram import patches
from relief_onnx.layers import Layer

__all__ = ["POSITIONS", "layer_rows"]

# Positions of a sample (pixels, tokens, time steps) that are looked at.
POSITIONS = 32


def layer_rows(
    layer: Layer, x: NDArray[Any], y: NDArray[Any], other: NDArray[Any] | None, budget: int, rng: np.random.Generator
) -> tuple[NDArray[Any], ...]:
    """One batch as rows: inputs [rows, groups, features], outputs `y` and `other` (0 where there is none) [rows, out], all float32.

    x is the layer's input; y and other have the shape of its output. At most about `budget` rows, chosen at random, and no more than
    POSITIONS of each sample. Features are in the order of the canonical weight.
    """
    pick = _of_convolution if layer.geometry is not None else _of_dense
    return pick(layer, x, y, other, budget, rng)


def _of_convolution(
    layer: Layer, x: NDArray[Any], y: NDArray[Any], other: NDArray[Any] | None, budget: int, rng: np.random.Generator
) -> tuple[NDArray[Any], ...]:
    """Rows of a convolution at some output positions, the same of all samples of a batch."""
    assert layer.geometry is not None
    space = y.shape[2:]
    size = int(np.prod(space))
    number = min(size, POSITIONS, max(budget // len(x), 1))
    places = np.unravel_index(np.sort(rng.permutation(size)[:number]), space)
    rows = patches(layer.geometry, np.asarray(x, np.float32), places).reshape(len(x) * number, layer.groups, -1)
    emitted = [_at(part, places, layer.out_channels) for part in (y, other)]
    return rows, emitted[0], emitted[1] if other is not None else np.zeros_like(emitted[0])


def _at(y: NDArray[Any] | None, places: tuple[NDArray[np.intp], ...], units: int) -> NDArray[Any]:
    if y is None:
        return np.zeros((0, units), np.float32)
    every: tuple[Any, ...] = (..., *places)
    values: NDArray[Any] = np.moveaxis(np.asarray(y, np.float32)[every], 1, -1).reshape(-1, units)
    return values


def _of_dense(
    layer: Layer, x: NDArray[Any], y: NDArray[Any], other: NDArray[Any] | None, budget: int, rng: np.random.Generator
) -> tuple[NDArray[Any], ...]:
    """Rows of a dense layer: samples, tokens, time steps."""
    flat = np.moveaxis(np.asarray(x, np.float32), layer.input_axis, -1).reshape(-1, layer.in_per_group)
    emitted = [
        np.moveaxis(np.asarray(part, np.float32), layer.output_axis, -1).reshape(-1, layer.out_channels) if part is not None else None
        for part in (y, other)
    ]
    number = min(len(flat), max(budget, 1), POSITIONS * len(x) if layer.input_axis else len(flat))
    chosen = np.sort(rng.permutation(len(flat))[:number])
    wanted = emitted[0]
    assert wanted is not None
    added = emitted[1][chosen] if emitted[1] is not None else np.zeros_like(wanted[chosen])
    return flat[chosen][:, None], wanted[chosen], added
