"""Least squares of many neurons at once, each with inputs of its own: conjugate gradients in which what is not kept stays 0.

Neurons differ in the inputs that they keep, so each has a matrix of its own, a part of the same X'X. Inverting them one by one takes
inputs^3 each; a step of conjugate gradients is one product with X'X for all of them (Hestenes and Stiefel 1952).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["kept_solution", "rough_solution"]

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]
Flags = NDArray[np.bool_]

# Where every residual is that part of the first one it is done; measured on a MiniLM, the squared error is within 1e-6 of the least then.
TOLERANCE = 1e-3
# Steps: at most, and as many as there are whatever they take; as many again for what single precision leaves over.
MOST, LEAST = 500, 30
# A neuron whose squared residual is less rests until the others are done: what single precision holds is exhausted, and what is left of it
# shrinks until quotients of numbers near 0 lead anywhere.
EXHAUSTED = 1e-20
# Where solutions are only compared.
ROUGH = 0.03


def kept_solution(moments: Doubles, pull: Doubles, ridge: float, keep: Flags, flops: float) -> Doubles:
    """For each row r of `pull` [units, features] the x with (M + ridge)_SS x_S = r_S and 0 outside S, its row of `keep`.

    moments: M [features, features]. flops: floating point operations that it may take about. Not a number where M or r are not finite.
    """
    units, features = pull.shape
    limit = int(np.clip(flops / max(2.0 * units * features**2, 1.0), LEAST, MOST))
    system, sizes = _scaled(moments, ridge)
    right = np.where(keep, pull, 0.0) * sizes
    single, inside = system.astype(np.float32), keep.astype(np.float32)
    found = _descended(single, right, inside, limit)
    found += _descended(single, np.where(keep, right - found @ system, 0.0), inside, LEAST)
    return np.asarray(found * sizes)


def rough_solution(moments: Doubles, pull: Doubles, ridge: float, keep: Flags, steps: int) -> Doubles:
    """The same to a few parts in a hundred, or as far as so many steps lead: to compare ridges."""
    system, sizes = _scaled(moments, ridge)
    found = _descended(system.astype(np.float32), np.where(keep, pull, 0.0) * sizes, keep.astype(np.float32), steps, 0, ROUGH)
    return np.asarray(found * sizes)


def _scaled(moments: Doubles, ridge: float) -> tuple[Doubles, Doubles]:
    """M + ridge in units of each input's own size, so that single precision does, and 1 / those sizes."""
    sizes = 1 / np.sqrt(np.diag(moments) + ridge)
    system = moments * sizes[:, None] * sizes
    system[np.diag_indices(len(system))] = 1.0
    return system, sizes


def _descended(system: Floats, right: Doubles, inside: Floats, limit: int, least: int = LEAST, tolerance: float = TOLERANCE) -> Doubles:
    """The solution as single precision has it. inside: 1 where a row may have weights, 0 elsewhere."""
    lengths = np.sqrt(np.square(right).sum(1, keepdims=True))
    residual: NDArray[Any] = (right / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)
    found, direction = np.zeros_like(residual), residual.copy()
    squared = np.square(residual).sum(1, keepdims=True)
    for number in range(limit):
        if number >= least and not (squared > tolerance**2).any():
            break
        image = (direction @ system) * inside
        along = (direction * image).sum(1, keepdims=True)
        going = (squared > EXHAUSTED) & (along > 0)
        step = np.where(going, squared / np.where(going, along, 1.0), 0.0).astype(np.float32)
        found += step * direction
        residual -= step * image
        new = np.square(residual).sum(1, keepdims=True)
        direction = residual + new / np.where(squared > 0, squared, 1.0) * direction
        squared = new
    return np.asarray(found.astype(np.float64) * lengths)
