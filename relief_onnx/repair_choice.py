"""Repair with the ridge that does best on samples that it has not seen: one rule for all layers, or chosen layer by layer (`ridge`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from relief_onnx.contest import Contest, best, draw
from relief_onnx.dataset import Dataset
from relief_onnx.graph import Graph
from relief_onnx.repair import SAMPLES, Repaired, batch_of, few_rows_share, repair, samples_of

__all__ = ["repaired"]

Flags = NDArray[np.bool_]

RULE, VALIDATED = "rule", "validated"
# Samples for the contest: to repair with, and every third batch to judge. Both have the same mask, so a small difference counts.
DRAWN, MARGIN = 288, 0.03
# The share of the weights in layers with few rows below which there is no contest: a convolutional network's last layer alone is no reason.
LEAST_FEW = 0.1


def repaired(
    original: Graph, masked: onnx.ModelProto, flags: Mapping[str, Flags], weights: frozenset[str], dataset: Dataset,
    *, removed: Mapping[str, Flags] | None = None, samples: int | None = None, seed: int = 0, threads: int = 0,
    progress: Callable[[str, int, int | None], None] = lambda *_: None,
) -> tuple[onnx.ModelProto, tuple[Repaired, ...], Contest | None]:  # fmt: skip
    """As `repair`, and how the ridge was decided: None where rows are plenty in nearly every layer, or samples too few to judge.

    Raises DataError, ModelError.
    """
    limit = SAMPLES if samples is None else min(samples, SAMPLES)
    graph = Graph(masked)
    feeds, drawn = samples_of(graph, dataset, limit, seed), draw(dataset, min(limit, DRAWN), seed, batch_of(graph))

    def on(
        batches: Sequence[Mapping[str, NDArray[Any]]], validated: bool, jointly: bool = True
    ) -> tuple[onnx.ModelProto, tuple[Repaired, ...]]:
        return repair(
            original, masked, flags, weights, batches, removed=removed, seed=seed, threads=threads, validated=validated, jointly=jointly,
            progress=progress,
        )  # fmt: skip

    if not drawn.judged or few_rows_share(original, masked, flags, weights, feeds, removed=removed, seed=seed, threads=threads) < LEAST_FEW:
        return *on(feeds, False), None
    # Layer by layer, which is cheaper: pairs are fitted by a ridge of their own.
    makers = {name: partial(lambda own: on(drawn.fit, own, jointly=False)[0], name == VALIDATED) for name in (RULE, VALIDATED)}
    contest = best(original.model, makers, drawn, threads, MARGIN)
    return *on(feeds, contest.winner == VALIDATED), contest
