"""How active a tensor is along the axes that relevance follows, over all samples and within groups of like samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from relief_onnx.grouping import Grouping
from relief_onnx.streaming import Job, Moment

__all__ = ["Activity"]

Doubles = NDArray[np.float64]

# Of the positions (pixels, tokens) of one sample no more than about so many are looked at.
POSITIONS = 64
# Sums that are kept of one tensor and moment, all groups together; larger ones (pictures laid out flat for a norm) are not told apart.
LARGEST = 1 << 20


class Activity:
    """Means of x and x^2, or of |x|, along the kept axes, over the samples and all other axes: arrays of the tensor's rank.

    They are kept for each group of samples; what cannot be told apart by sample (an axis other than the first counts them) counts for
    every group alike. Very large ones are kept for all groups together.
    """

    TOTALS: ClassVar[tuple[str, ...]] = ("_sums", "_counts")

    def __init__(self, axes: tuple[int, ...], moments: tuple[Moment, ...], grouping: Grouping | None = None) -> None:
        self._axes, self._moments, self._grouping = axes, moments, grouping
        self._sums: dict[Moment, Any] = dict.fromkeys(moments, 0.0)  # [groups or 1, 1, *kept]
        self._counts: Any = 0.0  # [groups]

    def jobs(self, x: NDArray[np.float32], weight: float) -> Iterator[Job]:
        """One piece of work per batch."""
        yield partial(self.add, x, weight, None if self._grouping is None else self._grouping.current)

    def add(self, x: NDArray[Any], weight: float = 1.0, labels: NDArray[np.int64] | None = None) -> None:
        """Count a batch in; `labels` [samples] are the groups."""
        axes = tuple(axis % max(x.ndim, 1) for axis in self._axes)
        x = _thinned(x, axes)
        groups = 1 if self._grouping is None else self._grouping.groups
        apart = labels is not None and 0 not in axes and x.ndim > 0 and len(x) > 0 and len(x) % len(labels) == 0
        rows = np.repeat(labels, len(x) // len(labels)) if apart and labels is not None else None
        kept = math.prod(x.shape[axis] for axis in axes)
        told = rows is not None and 1 < groups <= LARGEST // max(kept, 1)
        others = tuple(axis for axis in range(x.ndim) if axis not in axes and x.shape[axis] != 1 and not (told and axis == 0))
        for moment in self._moments:
            total = _total(x, moment, others)
            self._put(moment, total, rows if told else None, groups, weight * (groups if rows is None else 1))
        number = weight * x.size / max(kept * (1 if rows is None else len(x)), 1)
        self._counts = self._counts + number * (np.bincount(rows, minlength=groups) if rows is not None else np.ones(groups))

    def _put(self, moment: Moment, total: NDArray[Any], rows: NDArray[np.int64] | None, groups: int, weight: float) -> None:
        """Add a batch's sums, of each sample apart where `rows` has their groups, to those of the groups, in place."""
        shape = (1, *total.shape[1:]) if rows is not None else total.shape
        if np.ndim(self._sums[moment]) == 0:
            self._sums[moment] = np.zeros((groups if groups * math.prod(shape) <= LARGEST else 1, *shape))
        sums = self._sums[moment]
        if rows is None:
            weight /= len(sums)
            sums += total if weight == 1 else weight * total
            return
        for group in np.unique(rows):
            sums[group] += weight * total[rows == group].sum(0, keepdims=True)

    @property
    def weights(self) -> Doubles:
        """The share of the samples that each group holds [groups]."""
        groups = 1 if self._grouping is None else self._grouping.groups
        shares: Doubles = np.broadcast_to(self._counts / max(float(np.sum(self._counts)), 1e-300), (groups,)).astype(np.float64)
        return shares

    def mean(self, moment: Moment, group: int | None = None) -> Doubles:
        """One of the means, of one group or of all, with 1 on the axes that are not kept; of an empty group that of all."""
        sums, counts = self._sums[moment], np.asarray(self._counts)
        if group is not None and counts.ndim and len(sums) == len(counts) and counts[group] > 0:
            one: Doubles = sums[group] / counts[group]
            return one
        every: Doubles = np.asarray(sums.sum(0) / max(counts.sum(), 1e-300)) if counts.ndim else np.zeros(())
        return every


def _total(x: NDArray[Any], moment: Moment, axes: tuple[int, ...]) -> NDArray[Any]:
    """The sum of x, |x| or x^2 over some axes, which stay with size 1; without axes there is nothing to add up in double precision."""
    if moment == "squares":
        with np.errstate(over="ignore"):
            total = _summed(np.square(x), axes)
        return total if np.isfinite(total.max(initial=0.0)) else _summed(np.square(x, dtype=np.float64), axes)
    return _summed(x if moment == "signed" else np.abs(x), axes)


def _summed(values: NDArray[Any], axes: tuple[int, ...]) -> NDArray[Any]:
    return np.asarray(values.sum(axes, dtype=np.float64, keepdims=True)) if axes else values


def _thinned(x: NDArray[Any], axes: tuple[int, ...]) -> NDArray[Any]:
    """Fewer positions: every k-th along the longest axis that is neither kept nor counts the samples, from the middle of the first k."""
    free = [axis for axis in range(1, x.ndim) if axis not in axes]
    step = -(-int(np.prod([x.shape[axis] for axis in free])) // POSITIONS)
    if step <= 1:
        return x
    longest = max(free, key=lambda axis: x.shape[axis])
    step = min(step, x.shape[longest])
    return x[tuple(slice((step - 1) // 2, None, step) if axis == longest else slice(None) for axis in range(x.ndim))]
