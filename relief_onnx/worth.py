"""What each weight is worth to its neuron once the others make up for it: exact second-order terms of the layer's squared error.

With A = X'X + lambda over a neuron's kept inputs S and w its least-squares solution: without weight i the error grows by
w_i^2 / [A_SS^-1]_ii (OBS; Hassibi and Stork 1993), and with a weight o that is not there it falls by
r_o^2 / (A_oo - A_oS A_SS^-1 A_So), r = X'(t - X w). For kernels that stay or go as a whole the scalars become blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Appraisal"]

Doubles = NDArray[np.float64]
Places = NDArray[np.intp]

# What is nearly a combination of the kept inputs would divide by next to nothing: the least part of its own variance that counts as new.
NEW_PART = 0.02


@dataclass
class Appraisal:
    """Worths of one layer, in squared error per row: of what is kept its loss, of what is not its gain (0 where not asked for).

    worth: [out, features / size]. size: features that stay or go together.
    """

    worth: Doubles
    size: int
    additions: bool

    @classmethod
    def empty(cls, shape: tuple[int, ...], size: int, additions: bool) -> Appraisal:
        """Nothing known yet of a layer [out, features]."""
        return cls(np.zeros((shape[0], shape[1] // size)), size, additions)

    def part(self, units: int) -> Appraisal:
        """The same for some units of the layer."""
        return Appraisal.empty((units, self.worth.shape[1] * self.size), self.size, self.additions)

    def judge(
        self, unit: int, start: int, moments: Doubles, ridge: float, places: Places, inverse: Doubles, w: Doubles, pull: Doubles
    ) -> None:
        """One unit's block of features that begins at `start`.

        moments: X'X [block, block] without the ridge. places: kept features of the block; inverse: of their equations. w: the block's
        solution, pull: X'(t - Xw), both [block].
        """
        size, first = self.size, start // self.size
        inside = self.worth[unit, first : first + len(moments) // size]
        inside[places[::size] // size] = _losses(inverse, w[places], size)
        others = np.setdiff1d(np.arange(len(moments)), places, assume_unique=True)
        if self.additions and len(others):
            inside[others[::size] // size] = _gains(moments, ridge, places, inverse, others, pull[others], size)


def _losses(inverse: Doubles, w: Doubles, size: int) -> Doubles:
    if size == 1:
        return np.asarray(np.square(w) / np.diagonal(inverse))
    count = len(w) // size
    own = np.arange(count)
    blocks = inverse.reshape(count, size, count, size)[own, :, own, :]
    grouped = w.reshape(count, size)
    return np.asarray(np.einsum("kc,kc->k", grouped, np.linalg.solve(blocks, grouped[..., None])[..., 0]))


def _gains(moments: Doubles, ridge: float, places: Places, inverse: Doubles, others: Places, pull: Doubles, size: int) -> Doubles:
    across = moments[np.ix_(places, others)]
    explained = inverse @ across
    if size == 1:
        own = moments[others, others] + ridge
        return np.asarray(np.square(pull) / np.maximum(own - np.einsum("so,so->o", across, explained), NEW_PART * own))
    count = len(others) // size
    rows = others.reshape(count, size)
    own = moments[rows[:, :, None], rows[:, None, :]]
    shape = (len(places), count, size)
    left = own - np.einsum("skc,skd->kcd", across.reshape(shape), explained.reshape(shape))
    least = NEW_PART * np.einsum("kcc->k", own) / size + ridge
    left += least[:, None, None] * np.eye(size)
    grouped = pull.reshape(count, size)
    return np.asarray(np.einsum("kc,kc->k", grouped, np.linalg.solve(left, grouped[..., None])[..., 0]))
