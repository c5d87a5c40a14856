"""Embedding tables: dense layers whose inputs are one-hot, given as row numbers that are computed at run time.

In canonical layout a table is [dims, rows]. The activity of input i is the share f_i of all positions in the calibration data that use
row i, so the paper's score is |w_ij| f_i / S_j by every criterion; rows that were never used have the score 0. Tables count as layers
only where the user names them: by these scores all rows that the samples happened not to use would go.

Where a named table is cut, frequencies are smoothed first (Good and Turing): the chance that the next position needs a row that was not
seen is about the share of positions whose row was seen once; the unseen rows share it, and what was seen gives it up in proportion.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from relief_onnx.calibrate import Measurement
from relief_onnx.graph import Graph
from relief_onnx.layers import Layer
from relief_onnx.scoring import LayerScore, magnitudes
from relief_onnx.streaming import Job

__all__ = ["RowCounts", "TableMeasure", "smoothed", "table_score"]

Doubles = NDArray[np.float64]


class RowCounts:
    """How often each row of a table is used; memory is one number per row."""

    TOTALS: ClassVar[tuple[str, ...]] = ("counts",)

    def __init__(self, rows: int) -> None:
        self.counts: Doubles = np.zeros(rows)

    def jobs(self, x: NDArray[Any], weight: float) -> Iterator[Job]:
        yield lambda: self._add(x, weight)

    def _add(self, x: NDArray[Any], weight: float) -> None:
        places = x.astype(np.int64).reshape(-1)
        rows = len(self.counts)
        self.counts += weight * np.bincount(np.where(places < 0, places + rows, places), minlength=rows)


@dataclass(frozen=True)
class TableMeasure:
    """What tables listen to, and their scores afterwards; lookups of the same rows share a histogram."""

    graph: Graph
    lookups: tuple[Layer, ...]
    counts: Mapping[tuple[str, int], RowCounts]

    @staticmethod
    def of(graph: Graph, tables: Sequence[Layer]) -> TableMeasure:
        """For the lookups among the readers of tables."""
        lookups = tuple(layer for layer in tables if layer.is_table)
        return TableMeasure(graph, lookups, {key: RowCounts(key[1]) for key in dict.fromkeys(map(_key, lookups))})

    @property
    def measurements(self) -> list[Measurement]:
        """One per histogram."""
        return [Measurement(name, statistic) for (name, _), statistic in self.counts.items()]

    def scores(self, relevance: Mapping[str, Doubles]) -> dict[str, LayerScore]:
        """Scores after the pass, by layer name; `relevance` [dims] of the criterion flow, by layer name."""
        return {
            layer.name: table_score(self.graph, layer, self.counts[_key(layer)].counts, relevance.get(layer.name)) for layer in self.lookups
        }


def _key(layer: Layer) -> tuple[str, int]:
    return layer.input, layer.in_per_group


def table_score(graph: Graph, layer: Layer, counts: Doubles, relevance: Doubles | None, frequency: Doubles | None = None) -> LayerScore:
    """Scores |w_ij| f_i / S_j with f the share of `counts`, or `frequency` in its place."""
    share = counts / max(float(counts.sum()), 1e-300) if frequency is None else frequency
    score = magnitudes(graph, layer).astype(np.float64)
    score *= share
    total = score.sum(1, keepdims=True)
    score /= np.where(total > 0, total, 1.0)
    return LayerScore(layer.weight, layer.name, score, np.zeros(layer.out_channels), relevance, counts=counts)


def smoothed(counts: Doubles) -> Doubles:
    """Frequencies of rows in the data to come, from how often each was used; those of unseen rows are above 0, never above the mean."""
    seen, total = counts > 0, float(counts.sum())
    unseen = len(counts) - int(seen.sum())
    if total == 0 or unseen == 0:
        return np.full(len(counts), 1.0 / len(counts)) if total == 0 else counts / total
    mass = min((float((counts == 1).sum()) + 1.0) / (total + 1.0), unseen / len(counts))
    return np.where(seen, (1.0 - mass) * counts / total, mass / unseen)
