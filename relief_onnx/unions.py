"""Numbers that can be united: equal numbers are one unit."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["UnionFind"]

Units = NDArray[np.int64]


class UnionFind:
    """Units as numbers from 0 on."""

    def __init__(self) -> None:
        self._parents: list[int] = []

    def fresh(self, count: int) -> Units:
        first = len(self._parents)
        self._parents.extend(range(first, first + count))
        return np.arange(first, first + count)

    def root(self, unit: int) -> int:
        while self._parents[unit] != unit:
            self._parents[unit] = self._parents[self._parents[unit]]
            unit = self._parents[unit]
        return unit

    def unite(self, a: int, b: int) -> None:
        self._parents[self.root(a)] = self.root(b)

    def canonical(self, units: Units) -> Units:
        """Equal numbers for united units."""
        found, places = np.unique(units, return_inverse=True)
        roots = np.array([self.root(unit) if unit >= 0 else unit for unit in found.tolist()], np.int64)
        return roots[places].reshape(units.shape)
