"""How close a layer's new weights stay to the old ones: the ridge that does best on rows that it was not solved with.

Rows of one sample (tokens, time steps) are alike, so a few samples are less than their rows suggest: what fits them need not fit the next
ones. Where rows are few for a neuron's inputs, its equations are solved with most of the rows and judged on the others, all runs of rows in
turn, for several ridges (cross-validation; Stone 1974). What is best for a layer by itself need not be best for the network (a large ridge
takes variance away, which adds up), so `repair_choice` asks the outputs whether it is used at all.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from relief_onnx.gradients import rough_solution

__all__ = ["best_part", "few_rows"]

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Flags = NDArray[np.bool_]

# Rows for each kept input from which on there is nothing to choose, and rows with which there is.
ENOUGH_ROWS, LEAST_ROWS = 100, 32
# Ridges that are tried, as parts of the mean diagonal of X'X of all rows; each starts where the one before ended, as long as that helps.
PARTS = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
# Neurons that judge, and runs of rows that take turns: rows of one sample follow each other and should be on one side.
JUDGES, RUNS, FOLDS = 32, 8, 4
# Steps of conjugate gradients for each.
STEPS = 100


def few_rows(rows: int, keep: Flags) -> bool:
    """Whether so many rows leave a choice for neurons that keep those inputs [units, features]."""
    return LEAST_ROWS <= rows < ENOUGH_ROWS * float(keep.sum(1).mean())


def best_part(x: Floats, wanted: Floats, weight: Doubles, keep: Flags) -> float:
    """The ridge as a part of the mean diagonal of X'X, with which `weight` [units, features] is moved towards `wanted` [rows, units].

    x: [rows, features], both without their means. keep: [units, features].
    """
    units = np.unique(np.linspace(0, len(weight) - 1, min(JUDGES, len(weight))).astype(np.intp))
    own, kept = weight[units], keep[units]
    folds = [_moments(x, wanted, units, fold) for fold in range(FOLDS)]
    squares, pull = sum(own for own, _ in folds), sum(goal for _, goal in folds)
    size = float(np.trace(squares)) / x.shape[1]
    found, best = [own] * FOLDS, (math.inf, PARTS[0])
    for part in PARTS:
        error, ridge = 0.0, part * size + 1e-12
        for fold, (others, goal) in enumerate(folds):
            left = pull - goal - found[fold] @ (squares - others) - ridge * (found[fold] - own)
            found[fold] = found[fold] + rough_solution(squares - others, left, ridge, kept, STEPS)
            error += float(np.einsum("uf,uf->", found[fold], found[fold] @ others - 2 * goal))
        if not error < best[0]:
            break
        best = error, part
    return best[1]


def _moments(x: Floats, wanted: Floats, units: NDArray[np.intp], fold: int) -> tuple[Doubles, Doubles]:
    """X'X and X't of the runs of rows that are left out together."""
    bounds = np.linspace(0, len(x), RUNS + 1).astype(np.intp)
    squares, pull = np.zeros(2 * x.shape[1:]), np.zeros((len(units), x.shape[1]))
    for start, end in list(pairwise(bounds))[fold::FOLDS]:
        rows = x[start:end]
        squares += (rows.T @ rows).astype(np.float64)
        pull += (wanted[start:end][:, units].T @ rows).astype(np.float64)
    return squares, pull
