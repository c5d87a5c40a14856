"""Ways to cut a model at a given share of its prunable weights, for the flow benchmark: flow itself, and opponents without weight updates.

All work on the same weights, those that `relief_onnx.layers.find` lists, at weight granularity; biases stay, nothing is repaired.
What a method kept is measured, never assumed: numbers that are not zero over all numbers, of those weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

import relief_onnx
from relief_onnx.graph import Graph
from relief_onnx.layers import Plan
from relief_onnx.masks import Masks, applied, initializer_masks, make_masks
from relief_onnx.prepared import prepare
from relief_onnx.scoring import Scores
from relief_onnx.surgery import apply_weights

__all__ = ["RULES", "Cut", "Subject", "alpha_for", "largest"]

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Cut:
    """A pruned model and the share of prunable weights that it really kept."""

    model: onnx.ModelProto
    kept: float


@dataclass(frozen=True)
class Subject:
    """A model to cut: `graph` has every weight as an initializer. `data` is an .npz of the model's inputs, `folder` is for scratch."""

    path: Path
    data: Path
    folder: Path
    threads: int = 0
    graph: Graph = field(init=False)
    plan: Plan = field(init=False)

    def __post_init__(self) -> None:
        ready = prepare(self.path)
        object.__setattr__(self, "graph", ready.graph)
        object.__setattr__(self, "plan", ready.plan)

    @cached_property
    def weights(self) -> dict[str, NDArray[np.floating]]:
        """The prunable weights by name, each once, as they are stored."""
        return {name: self.graph.array(name) for name in self.plan.by_weight()}

    @cached_property
    def prunable(self) -> int:
        """Numbers in them."""
        return sum(weight.size for weight in self.weights.values())

    def scores(self, criterion: str) -> Scores:
        """Scores of single weights, measured once."""
        if criterion not in self._scores:
            self._scores[criterion] = relief_onnx.score(
                self.path, self.data, criterion=criterion, granularity="weight", threads=self.threads
            )
        return self._scores[criterion]

    @cached_property
    def _scores(self) -> dict[str, Scores]:
        return {}

    @cached_property
    def reached(self) -> NDArray[np.float64]:
        """For every weight, the share of its neuron that larger ones carry, ascending: alpha keeps those below it. Criterion relief."""
        return np.sort(np.concatenate([_before(score.score, score.bias_score) for score in self.scores("relief").values()]))

    def cut(self, flags: Mapping[str, Flags]) -> Cut:
        """The model with zeros where the flags (broadcast against the weights) are False."""
        arrays = applied(self.graph, flags)
        model = apply_weights(self.graph.model, arrays)
        left = sum(int(np.count_nonzero(arrays.get(name, weight))) for name, weight in self.weights.items())
        return Cut(model, left / self.prunable)


def largest(values: NDArray[np.floating], share: float) -> Flags:
    """Flags of the largest `share` of all entries, rounded; ties go to the first."""
    flags = np.zeros(values.size, bool)
    flags[np.argsort(-values.reshape(-1), kind="stable")[: round(share * values.size)]] = True
    return flags.reshape(values.shape)


def magnitude_layer(subject: Subject, share: float) -> Cut:
    """The largest weights of each layer."""
    return subject.cut({name: largest(np.abs(weight), share) for name, weight in subject.weights.items()})


def magnitude_global(subject: Subject, share: float) -> Cut:
    """The largest weights of the whole network."""
    flat = np.concatenate([np.abs(weight, dtype=np.float32).reshape(-1) for weight in subject.weights.values()])
    parts = np.split(largest(flat, share), np.cumsum([weight.size for weight in subject.weights.values()])[:-1])
    return subject.cut({name: part.reshape(weight.shape) for (name, weight), part in zip(subject.weights.items(), parts, strict=True)})


def relief(subject: Subject, share: float) -> Cut:
    """The paper's rule with one alpha for all layers, chosen so that the share stays."""
    alpha = alpha_for(subject.reached, share)
    names = frozenset(subject.weights)
    return subject.cut(initializer_masks(subject.plan, make_masks(subject.plan, subject.scores("relief"), names, lambda _: alpha, False)))


def wanda_row(subject: Subject, share: float) -> Cut:
    """Wanda as its paper has it, with this project's statistics: of each output the same share of weights, by |w| times the input's norm.

    Beside onnxsim's, which falls back to magnitude where a MatMul reads more than two axes, as in every transformer.
    """
    readers = subject.plan.by_weight()
    first = {name: layers[0] for name, layers in readers.items()}
    keep = {name: _rows(subject.scores("wanda")[layer.name].score, share) for name, layer in first.items()}
    bias = {name: np.ones(layer.out_channels, bool) for name, layer in first.items()}
    return subject.cut(initializer_masks(subject.plan, Masks(keep, bias)))


def flow(subject: Subject, share: float) -> Cut:
    """The criterion under test, as a user calls it: measure, rank over the whole network, cut, verify."""
    result = relief_onnx.prune(
        subject.path, subject.data, criterion="flow", keep=f"{100 * share:.4g}%", granularity="weight", storage="dense",
        threads=subject.threads, work_dir=subject.folder / "flow",
    )  # fmt: skip
    flags = initializer_masks(subject.plan, result.masks)
    left = sum(int(np.count_nonzero(np.where(flags.get(name, True), weight, 0))) for name, weight in subject.weights.items())
    return Cut(result.model, left / subject.prunable)


RULES: dict[str, Callable[[Subject, float], Cut]] = {
    "flow": flow,
    "relief": relief,
    "magnitude-layer": magnitude_layer,
    "magnitude-global": magnitude_global,
    "wanda-row": wanda_row,
}


def alpha_for(reached: NDArray[np.float64], share: float) -> float:
    """The smallest alpha that keeps at least `share` of the weights, by bisection; `reached` ascending, a weight stays below alpha."""
    low, high = 0.0, 1.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        if np.searchsorted(reached, middle, "left") < round(share * len(reached)):
            low = middle
        else:
            high = middle
    return high


def forget(subject: Subject) -> None:
    """Remove what an earlier run measured: the library may have changed since."""
    shutil.rmtree(subject.folder / "flow", ignore_errors=True)


def _rows(scores: NDArray[np.float64], share: float) -> Flags:
    """The largest share of each output's entries."""
    rows = scores.reshape(len(scores), -1)
    keep = np.zeros(rows.shape, bool)
    order = np.argsort(-rows, axis=1, kind="stable")[:, : round(share * rows.shape[1])]
    np.put_along_axis(keep, order, True, 1)
    return keep.reshape(scores.shape)


def _before(score: NDArray[np.float64], bias: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each weight of a layer: the share that the larger entries of its row, bias included, carry; above 1 where the row is 0."""
    rows = np.concatenate([score.reshape(len(score), -1), bias[:, None]], 1)
    order = np.argsort(-rows, axis=1, kind="stable")
    running = np.cumsum(np.take_along_axis(rows, order, 1), 1)
    total = running[:, -1:]
    before = np.concatenate([np.zeros((len(rows), 1)), running[:, :-1]], 1) / np.where(total > 0, total, 1)
    found = np.empty_like(rows)
    np.put_along_axis(found, order, np.where(total > 0, before, 2.0), 1)
    return found[:, :-1].reshape(-1)
