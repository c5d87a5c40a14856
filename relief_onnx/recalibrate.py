"""Statistics of BatchNormalization measured again: after weights are gone, what a layer emits has another mean and variance.

Node by node in graph order, each on what the nodes before it emit with their new statistics. Needs no labels, no gradients, no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from relief_onnx.dataset import Dataset
from relief_onnx.graph import Graph, attributes
from relief_onnx.replay import Replay

__all__ = ["normalisations", "recalibrate"]

# Samples that are looked at, and how many run at a time.
SAMPLES, BATCH = 1024, 32


def normalisations(graph: Graph) -> list[int]:
    """Numbers of the BatchNormalization nodes whose running statistics are initializers of their own."""
    found = []
    for number, node in enumerate(graph.nodes):
        if node.op_type != "BatchNormalization" or node.domain not in ("", "ai.onnx") or attributes(node).get("training_mode", 0):
            continue
        names = node.input[3:5]
        if all(name in graph.initializers and len(graph.uses[name]) == 1 for name in names) and attributes(node).get("spatial", 1):
            found.append(number)
    return found


def recalibrate(
    model: onnx.ModelProto, dataset: Dataset, *, samples: int | None = None, seed: int = 0, threads: int = 0,
    progress: Callable[[str, int, int | None], None] = lambda *_: None,
) -> dict[str, NDArray[Any]]:  # fmt: skip
    """New running means and variances by initializer, from at most SAMPLES samples. Raises DataError, ModelError."""
    graph = Graph(model)
    nodes = normalisations(graph)
    if not nodes:
        return {}
    limit = SAMPLES if samples is None else min(samples, SAMPLES)
    feeds = [batch.feed for batch in dataset.batches(BATCH, limit=limit, seed=seed)]
    new: dict[str, NDArray[Any]] = {}
    with Replay(graph, feeds, (), threads=threads) as walk:
        for done, number in enumerate(nodes):
            progress("recalibrate", done, len(nodes))
            walk.advance(number, new)
            node = graph.nodes[number]
            values = [value for batch in range(walk.batches) if (value := walk.value(node.input[0], batch)) is not None]
            for name, statistic in zip(node.input[3:5], _moments(values), strict=True):
                new[name] = statistic.astype(graph.array(name).dtype)
    return new


def _moments(values: list[NDArray[Any]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and variance of each channel (axis 1) over all batches."""
    axes = tuple(axis for axis in range(values[0].ndim) if axis != 1)
    count = sum(value.size // value.shape[1] for value in values)
    mean = sum(value.sum(axes, dtype=np.float64) for value in values) / count
    shape = [-1 if axis == 1 else 1 for axis in range(values[0].ndim)]
    centre = mean.reshape(shape)
    variance = sum(np.square(value - centre).sum(axes, dtype=np.float64) for value in values) / count
    return mean, variance
