"""What each weight is worth to its neuron once the others make up for it: exact second-order terms of the layer's squared error.

With A = X'X + lambda over a neuron's kept inputs S and w its least-squares solution: without weight i the error grows by
w_i^2 / [A_SS^-1]_ii (OBS; Hassibi and Stork 1993), and with a weight o that is not there it falls by
r_o^2 / (A_oo - A_oS A_SS^-1 A_So), r = X'(t - X w). For kernels that stay or go as a whole the scalars become blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Appraisal"]

Doubles = NDArray[np.float64]
Reals = NDArray[np.floating[Any]]
Places = NDArray[np.intp]

# What is nearly a combination of the kept inputs would divide by next to nothing: the least part of its own variance that counts as new.
NEW_PART = 0.02
# Of what is not kept the most promising are looked at: so many for each kept one, and at least so many. The others gain 0.
TRIED, LEAST_TRIED = 0.5, 32


@dataclass
class Appraisal:
    """Worths of one layer, in squared error per row: of what is kept its loss, of what is not its gain (0 where not asked for).

    worth: [out, features / size]. size: features that stay or go together. flops: about what it may take, see `solve.operations`.
    """

    worth: Doubles
    size: int
    additions: bool
    flops: float = math.inf

    @classmethod
    def empty(cls, shape: tuple[int, ...], size: int, additions: bool, flops: float = math.inf) -> Appraisal:
        """Nothing known yet of a layer [out, features]."""
        return cls(np.zeros((shape[0], shape[1] // size)), size, additions, flops)

    def part(self, units: int) -> Appraisal:
        """The same for some units of the layer."""
        share = units / max(len(self.worth), 1)
        return Appraisal.empty((units, self.worth.shape[1] * self.size), self.size, self.additions, self.flops * share)

    def judge(self, unit: int, start: int, moments: Reals, ridge: float, places: Places, root: Reals, w: Doubles, pull: Doubles) -> None:
        """One unit's block of features that begins at `start`.

        moments: X'X [block, block] without the ridge. places: kept features of the block; root: inverse root of their equations.
        w: the block's solution, pull: X'(t - Xw), both [block].
        """
        size, first = self.size, start // self.size
        inside = self.worth[unit, first : first + len(moments) // size]
        inside[places[::size] // size] = _losses(root, w[places], size)
        if self.additions and len(places) < len(moments):
            others = np.delete(np.arange(len(moments)), places)
            others = _promising(moments, others, pull, size, max(LEAST_TRIED, round(TRIED * len(places) / size)))
            inside[others[::size] // size] = _gains(moments, ridge, places, root, others, pull[others], size)


def _promising(moments: Reals, others: Places, pull: Doubles, size: int, limit: int) -> Places:
    """Those that would gain most if the kept inputs explained nothing of them."""
    if len(others) <= limit * size:
        return others
    alone = np.square(pull[others]).reshape(-1, size).sum(1) / np.maximum(moments[others, others].reshape(-1, size).sum(1), 1e-30)
    return np.asarray(others.reshape(-1, size)[np.argpartition(-alone, limit)[:limit]].reshape(-1))


def _losses(root: Reals, w: Doubles, size: int) -> Doubles:
    if size == 1:
        return np.asarray(np.square(w) / np.einsum("ri,ri->i", root, root))
    count = len(w) // size
    columns = root.astype(np.float64).reshape(len(w), count, size).transpose(1, 2, 0)
    blocks = columns @ columns.transpose(0, 2, 1)
    grouped = w.reshape(count, size)
    return np.asarray(np.einsum("kc,kc->k", grouped, np.linalg.solve(blocks, grouped[..., None])[..., 0]))


def _gains(moments: Reals, ridge: float, places: Places, root: Reals, others: Places, pull: Doubles, size: int) -> Doubles:
    explained = root @ moments.take(places, 0).take(others, 1)
    if size == 1:
        own = moments[others, others] + ridge
        return np.asarray(np.square(pull) / np.maximum(own - np.einsum("so,so->o", explained, explained), NEW_PART * own))
    count = len(others) // size
    rows = others.reshape(count, size)
    own = moments[rows[:, :, None], rows[:, None, :]].astype(np.float64)
    parts = explained.reshape(len(places), count, size).transpose(1, 2, 0)
    left = own - parts @ parts.transpose(0, 2, 1)
    least = NEW_PART * np.einsum("kcc->k", own) / size + ridge
    left += least[:, None, None] * np.eye(size)
    grouped = pull.reshape(count, size)
    return np.asarray(np.einsum("kc,kc->k", grouped, np.linalg.solve(left, grouped[..., None])[..., 0]))
