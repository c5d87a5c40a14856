"""One layer's equations: what its weights meet in the pruned network, what it should emit, and new weights for them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from relief_onnx.aims import Aim
from relief_onnx.graph import Graph
from relief_onnx.layers import Layer
from relief_onnx.ridge import few_rows
from relief_onnx.rows import ENOUGH_ROWS, Places, as_output, correspond, drawn, layer_rows
from relief_onnx.solve import MOMENT_FEATURES, SOLVE_FLOPS, Target, solve
from relief_onnx.worth import Appraisal

__all__ = ["Equations", "Source"]

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]
Flags = NDArray[np.bool_]
Initializers = Mapping[str, NDArray[Any]]

# Bytes of rows that one layer holds, and rows that tell its errors.
ROW_BYTES, JUDGED = 256 << 20, 4096
EVERY_ROW = slice(None)


class Source(Protocol):
    """Where activations come from, batch by batch."""

    @property
    def batches(self) -> int:
        """How many there are."""

    def value(self, name: str, batch: int) -> NDArray[Any] | None:
        """A tensor of one batch; None where it has no say."""


class Equations:
    """Rows of one layer, at some positions of all samples, and its weights as they were before.

    keep: by initializer, what stays; removed: units [out] that go as a whole, so they are left as they are. met: whether there are rows.
    solves: units that are solved for. whole: whether in every batch the rows of both networks correspond; those of others are left out.
    """

    met = whole = True

    def __init__(
        self, graph: Graph, layer: Layer, aim: Aim, keep: Flags | None, bias_keep: Flags | None, removed: Flags | None,
        before: Source, after: Source, seed: int,
    ) -> None:  # fmt: skip
        self._graph, self._layer, self._aim = graph, layer, aim
        weight = np.asarray(layer.view.apply(graph.array(layer.weight)), np.float64)
        self._weight = weight.reshape(layer.out_channels, -1) * layer.scale
        stays = np.ones((), bool) if keep is None else keep
        self._keep = layer.view.apply(np.broadcast_to(stays, layer.view.source)).reshape(layer.out_channels, -1)
        self.solves = np.ones(layer.out_channels, bool) if removed is None else ~removed
        self._free = layer.bias is not None and not layer.bias.shared and layer.bias.factor != 0
        self._bias = np.zeros(layer.out_channels)
        if layer.bias is not None:
            self._bias = np.asarray(layer.bias.view.apply(graph.array(layer.bias.name)), np.float64) * layer.bias.factor
            if bias_keep is not None:  # what the mask silenced stays silent
                self.solves &= layer.bias.view.apply(np.broadcast_to(bias_keep, layer.bias.view.source))
        self._seed, self._after = seed, after
        self._x, self._wanted, other = self._rows(before, after)
        self._shift = np.float32(aim.factor) * other + aim.shift.astype(np.float32)
        self.met = len(self._x) > 0

    def variance(self) -> Doubles:
        """Of what the weights as they were emit, per row [out]."""
        found = np.zeros(self._layer.out_channels)
        for x, units, _ in self._groups():
            found[units] = np.var(x @ self._weight[units].T.astype(np.float32), axis=0, dtype=np.float64)
        return found

    @property
    def inputs(self) -> int:
        """Of a neuron."""
        return int(self._weight.shape[1])

    @property
    def rows_per_input(self) -> float:
        """Rows for each input that neurons keep, on average."""
        return len(self._x) / max(float(self._keep[self.solves].sum(1).mean()) if self.solves.any() else 1.0, 1.0)

    def few(self, times: float = 1.0) -> bool:
        """Whether so many times the rows are so few that a larger ridge may do better on others, and one would be looked for."""
        return self.inputs <= MOMENT_FEATURES and few_rows(min(int(times * len(self._x)), self._most_rows), self._keep)

    def solved(self, flops: float = SOLVE_FLOPS, validated: bool = False) -> tuple[dict[str, NDArray[Any]], tuple[float, float]]:
        """New initializers, and the errors before and after as parts of the variance of the target. Empty where there is no solution.

        flops: about what that may take. validated: see `solve`.
        """
        if not self.met:
            return {}, (0.0, 0.0)
        old, weight, bias = self._weight * self._keep, self._weight * self._keep, self._bias.copy()
        for x, units, target in self._groups():
            weight[units], bias[units] = solve(
                x, target, old[units], bias[units], self._keep[units], self._free, flops=flops, validated=validated
            )  # fmt: skip
        return self.stored(weight, bias), (self._error(old, self._bias), self._error(weight, bias))

    def error(self, stored: Initializers) -> float:
        """With those initializers, as a part of the variance of the target."""
        return self._error(*self.present(stored))

    def trial(self, flops: float) -> tuple[dict[str, NDArray[Any]], Doubles]:
        """New initializers, the Relu behind the layer left out, and the mean squared error that rows are left with [out]."""
        weight, bias = self._weight.copy(), self._bias.copy()
        errors = np.zeros(len(weight))
        for x, units, target in self._groups():
            linear = replace(target, one_sided=False)
            weight[units], bias[units] = solve(x, linear, weight[units], bias[units], self._keep[units], self._free, flops=flops)
            y = x @ weight[units].T.astype(np.float32) + bias[units].astype(np.float32)
            errors[units] = np.square(linear.of(y) - y, dtype=np.float64).mean(0)
        return self.stored(weight, bias), errors

    def appraised(self, size: int, additions: bool, flops: float = math.inf) -> tuple[dict[str, NDArray[Any]], Appraisal]:
        """New initializers and what each run of `size` features is worth after the solve; the Relu behind the layer plays no part.

        flops: about what that may take.
        """
        weight, bias = self._weight.copy(), self._bias.copy()
        appraisal = Appraisal.empty(self._keep.shape, size, additions, flops)
        for x, units, target in self._groups():
            part = appraisal.part(len(units))
            linear = replace(target, one_sided=False)
            weight[units], bias[units] = solve(x, linear, weight[units], bias[units], self._keep[units], self._free, part)
            appraisal.worth[units] = part.worth / len(x)
        return self.stored(weight, bias), appraisal

    def _error(self, weight: Doubles, bias: Doubles) -> float:
        """On some of the rows, the same whatever the weights."""
        some = slice(None, None, -(-len(self._x) // JUDGED))
        total, error = float(self._wanted[some].var(0, dtype=np.float64)[self.solves].sum()) + 1e-30, 0.0
        for x, units, target in self._groups(some):
            y = x @ weight[units].T.astype(np.float32) + bias[units].astype(np.float32)
            error += float((np.square(target.of(y) - y, dtype=np.float64) * np.square(target.scale)).sum() / len(x))
        return error / total

    def _groups(self, rows: slice = EVERY_ROW) -> Iterator[tuple[NDArray[np.float32], NDArray[np.intp], Target]]:
        """Of those rows: inputs, units that are solved for and their targets, of each group of the layer; none where there are no rows."""
        if not self.met:
            return
        per_group = self._layer.out_channels // self._layer.groups
        for group in range(self._layer.groups):
            units = np.arange(group * per_group, (group + 1) * per_group)
            units = units[self.solves[units]]
            if len(units):
                wanted, shift = self._wanted[rows, units], self._shift[rows, units]
                yield self._x[rows, group], units, Target(wanted, shift, self._aim.scale[units], self._aim.one_sided)

    def present(self, stored: Initializers) -> tuple[Doubles, Doubles]:
        """Weights [out, features] and biases [out] that initializers mean: those of before where they are not among them."""
        layer, weight, bias = self._layer, self._weight * self._keep, self._bias
        if layer.weight in stored:
            weight = np.asarray(layer.view.apply(stored[layer.weight]), np.float64).reshape(weight.shape) * layer.scale
        if layer.bias is not None and layer.bias.name in stored:
            bias = np.asarray(layer.bias.view.apply(stored[layer.bias.name]), np.float64) * layer.bias.factor
        return weight, bias

    def left(self, stored: Initializers) -> tuple[Floats, Floats]:
        """Of a layer without groups [rows, out]: how far outputs are from where they should be, times the scale that follows, and 1 where
        that counts, else 0."""
        weight, bias = self.present(stored)
        y = self._x[:, 0] @ weight.T.astype(np.float32) + bias.astype(np.float32)
        scale, target = self._aim.scale.astype(np.float32), Target(self._wanted, self._shift, self._aim.scale, self._aim.one_sided)
        counts = self.solves & ((self._wanted > 0) | (y * scale + self._shift > 0) | (not self._aim.one_sided))
        return (target.of(y) - y) * scale * counts, counts.astype(np.float32)

    def moments(self) -> Doubles:
        """X'X of a layer without groups, with a feature that is always 1 as the last."""
        x = np.concatenate([self._x[:, 0], np.ones((len(self._x), 1), np.float32)], 1)
        return np.asarray(x.T @ x, np.float64)

    def stored(self, weight: Doubles, bias: Doubles) -> dict[str, NDArray[Any]]:
        """The initializers of weights and biases; empty where they are not finite."""
        layer, graph = self._layer, self._graph
        old = graph.array(layer.weight)
        canonical = np.where(self._keep, weight / layer.scale, 0.0).reshape(layer.view.shape)
        with np.errstate(over="ignore"):  # what is too large for half precision is refused below
            found = {layer.weight: layer.view.invert(canonical).astype(old.dtype)}
        if self._free and layer.bias is not None:
            stored = graph.array(layer.bias.name)
            found[layer.bias.name] = layer.bias.view.invert(bias / layer.bias.factor).astype(stored.dtype)
        return found if all(np.isfinite(value).all() for value in found.values()) else {}

    def places(self, x: NDArray[Any], y: NDArray[Any], batch: int) -> Places:
        """Which rows of a batch with that input and output are among the equations."""
        return drawn(self._layer, x, y, *self._chance(batch))

    def by_batch(self, rows: Floats) -> list[Floats]:
        """What is known of all rows, batch by batch."""
        return np.split(rows, self._ends[:-1])

    def _chance(self, batch: int) -> tuple[int, int, np.random.Generator]:
        """At most how many rows of a batch, how many are enough, and what draws them."""
        batches = max(self._after.batches, 1)
        enough = math.ceil(ENOUGH_ROWS * float(self._keep.sum(1).mean()) / batches)
        return self._most_rows // batches, enough, np.random.default_rng([self._seed, self._layer.node, batch])

    @property
    def _most_rows(self) -> int:
        """That the layer holds."""
        return max(ROW_BYTES // (4 * self._layer.groups * self.inputs), 64)

    def _rows(self, before: Source, after: Source) -> tuple[NDArray[np.float32], ...]:
        """Inputs [rows, groups, features], wanted [rows, out] and what the other branch adds [rows, out], all float32."""
        layer, name = self._layer, self._aim.other
        stored = self._graph.constant(name)
        collected: list[tuple[NDArray[Any], ...]] = []
        self._ends: list[int] = []
        for batch in range(after.batches):
            x, y = after.value(layer.input, batch), before.value(self._aim.tensor, batch)
            other = after.value(name, batch) if name and stored is None else stored
            if x is not None and y is not None and not correspond(layer, x, y):
                self.whole = False
            elif x is not None and y is not None:
                there = None if other is None else as_output(layer, other, y.shape)
                collected.append(layer_rows(layer, x, y, there, *self._chance(batch)))
            self._ends.append(sum(len(part[0]) for part in collected))
        if not collected:
            none = np.zeros((0, layer.out_channels), np.float32)
            return np.zeros((0, layer.groups, self._weight.shape[1]), np.float32), none, none
        return tuple(np.concatenate(parts) for parts in zip(*collected, strict=True))
