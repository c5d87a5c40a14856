"""Groups of samples that the model answers alike: what matters for some of them may not matter for others (docs/flow.md).

A sample's group is the signs of its outputs along their first principal components, which are found on a few samples beforehand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FIT_SAMPLES", "Grouping"]

Doubles = NDArray[np.float64]

# Samples that the components are found on.
FIT_SAMPLES = 64
# Numbers per output that describe a sample; longer outputs are averaged in so many parts.
PARTS = 64


class Grouping:
    """The rule that sorts samples into 2^bits groups; one group where too few samples or outputs tell them apart.

    `current` [samples] are the groups of the batch at hand, set by `look`.
    """

    def __init__(self, outputs: Sequence[str], batches: Iterable[tuple[Mapping[str, Any], int]], bits: int) -> None:
        """outputs: names; batches: (their values, number of samples) of the samples that the rule is made from."""
        self.outputs = tuple(outputs)
        self.current: NDArray[np.int64] = np.zeros(0, np.int64)
        self._lengths: dict[str, int] = {}
        rows = [self._describe(values, count) for values, count in batches]
        self.outputs = tuple(name for name in outputs if self._lengths.get(name))  # sequences and scalars describe no sample
        known = np.concatenate(rows) if rows else np.zeros((0, 0))
        self._center = known.mean(0) if len(known) else np.zeros(0)
        self._scale = np.maximum(known.std(0), 1e-12) if len(known) else np.zeros(0)
        # Every output counts alike, whatever its unit and length.
        bits = min(bits, int(np.log2(max(len(known), 1) / 4)) if len(known) >= 8 else 0)
        self._axes = np.zeros((0, known.shape[1]))
        if bits and known.shape[1]:
            _, sizes, axes = np.linalg.svd((known - self._center) / self._block_scale(known), full_matrices=False)
            self._axes = axes[: min(bits, int((sizes > 1e-6 * max(sizes.max(initial=0.0), 1e-300)).sum()))]
        self._middle = np.median(self._project(known), 0) if len(self._axes) else np.zeros(0)

    def _block_scale(self, known: Doubles) -> Doubles:
        """One scale per output: the root of the summed variance of its numbers."""
        scales, start = np.ones(known.shape[1]), 0
        for length in self._lengths.values():
            block = slice(start, start + length)
            scales[block] = max(float(np.sqrt(known[:, block].var(0).sum())), 1e-12)
            start += length
        self._scale = scales
        return scales

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return 1 << len(self._axes)

    def look(self, values: Mapping[str, Any], count: int) -> None:
        """Sort the samples of a batch by its outputs."""
        if not len(self._axes):
            self.current = np.zeros(count, np.int64)
            return
        above = self._project(self._describe(values, count)) > self._middle
        self.current = np.asarray(above @ (1 << np.arange(len(self._axes))), np.int64)

    def _project(self, described: Doubles) -> Doubles:
        result: Doubles = ((described - self._center) / self._scale) @ self._axes.T
        return result

    def _describe(self, values: Mapping[str, Any], count: int) -> Doubles:
        """Numbers [samples, all outputs]; an output whose first axis does not count the samples is left out."""
        parts = []
        for name in self.outputs:
            value = values.get(name)
            fits = (
                isinstance(value, np.ndarray) and value.ndim > 0 and len(value) == count and value.dtype.kind in "fiub" and value.size > 0
            )
            if name not in self._lengths:
                self._lengths[name] = min(int(value[0].size), PARTS) if fits and value is not None else 0
            length = self._lengths[name]
            parts.append(_shortened(value, count, length) if fits and value is not None and length else np.zeros((count, length)))
        return np.concatenate(parts, 1) if parts else np.zeros((count, 0))


def _shortened(value: NDArray[Any], count: int, length: int) -> Doubles:
    """[samples, length] from [samples, ...]: means of consecutive parts; zeros where there are too few numbers."""
    flat = np.nan_to_num(value.reshape(count, -1).astype(np.float64), posinf=0.0, neginf=0.0)
    if flat.shape[1] < length:
        return np.pad(flat, ((0, 0), (0, length - flat.shape[1])))
    edges = np.linspace(0, flat.shape[1], length, endpoint=False).astype(int)
    sizes = np.diff([*edges.tolist(), flat.shape[1]])
    means: Doubles = np.add.reduceat(flat, edges, axis=1) / sizes
    return means
