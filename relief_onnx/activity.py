"""How active a tensor is along the axes that relevance follows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relief_onnx.streaming import Job, Moment, sums_of

__all__ = ["Activity"]

Doubles = NDArray[np.float64]


class Activity:
    """Means of x and x^2, or of |x|, along the kept axes, over the samples and all other axes: arrays of the tensor's rank."""

    def __init__(self, axes: tuple[int, ...], moments: tuple[Moment, ...]) -> None:
        self._axes, self._moments = axes, moments
        self._sums: dict[Moment, Any] = dict.fromkeys(moments, 0.0)
        self._count = 0.0

    def jobs(self, x: NDArray[np.float32], weight: float) -> Iterator[Job]:
        """One piece of work per batch."""
        yield partial(self.add, x, weight)

    def add(self, x: NDArray[np.float32], weight: float = 1.0) -> None:
        """Count a batch in."""
        for moment in self._moments:
            total = sums_of(x, moment, tuple(axis for axis in range(x.ndim) if axis not in self._axes))
            self._sums[moment] = self._sums[moment] + weight * total
        self._count += weight * x.size / max(total.size, 1)

    def mean(self, moment: Moment) -> Doubles:
        """One of the means, with 1 on the axes that are not kept."""
        result: Doubles = np.asarray(self._sums[moment] / max(self._count, 1e-300))
        return result
