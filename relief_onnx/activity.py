"""How active a tensor is along the axes that relevance follows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relief_onnx.streaming import Job

__all__ = ["Activity"]

Doubles = NDArray[np.float64]


class Activity:
    """mean |x| along the kept axes, over the samples and all other axes: an array of the tensor's rank with 1 on those."""

    def __init__(self, axes: tuple[int, ...]) -> None:
        self._axes = axes
        self._sum: Any = 0.0
        self._count = 0.0

    def jobs(self, x: NDArray[np.float32], weight: float) -> Iterator[Job]:
        """One piece of work per batch."""
        yield partial(self._add, x, weight)

    def _add(self, x: NDArray[np.float32], weight: float) -> None:
        others = tuple(axis for axis in range(x.ndim) if axis not in self._axes)
        total = np.abs(x).sum(others, dtype=np.float64, keepdims=True)
        self._sum = self._sum + weight * total
        self._count += weight * x.size / max(total.size, 1)

    def mean(self) -> Doubles:
        """The result."""
        result: Doubles = np.asarray(self._sum / max(self._count, 1e-300))
        return result
