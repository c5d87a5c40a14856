"""Two layers fitted together: one that lost units, and the only layer that reads what is left of them through a Relu.

Solved for one after the other, the first goes on as it did, and only the second makes up for what is gone. But what the units that are left
emit may change, too, where that brings the second layer's output closer to where it should be. For the squared error of that output, with
R what is missing there, W2 the second layer's weights, x the first one's inputs and m = 1 where the Relu is open, a step of the first is

    D = (G + damping)^-1 [sum over positions of (m * W2' R) x'] (X'X + ridge)^-1,     G = W2' W2, summed over the taps of the kernel

(Gauss-Newton with the curvature as a product of two factors; Martens and Grosse 2015), as far as the error falls along it, which is a
quotient of two sums as long as no Relu turns. The step is taken if it leaves less of the error; then the second
layer is solved for again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relief_onnx.aims import Aim
from relief_onnx.equations import Equations, Source
from relief_onnx.graph import Graph
from relief_onnx.layers import Layer
from relief_onnx.replay import Aside, Replay
from relief_onnx.rows import Places, inputs_at, outputs_at, spread, touched

__all__ = ["Pair", "pairs_of"]

Doubles = NDArray[np.float64]
Flags = NDArray[np.bool_]
Initializers = Mapping[str, NDArray[Any]]
Fixed = tuple[Flags | None, Flags | None, Flags | None]

# One batch in so many makes the step: what the others add is less than what they cost, and so is what a second step adds.
EVERY = 2
# Added to G and X'X, as parts of their mean diagonals.
DAMPING, RIDGE = 0.5, 0.01
# Rows for each input of a neuron below which rows would be fitted and not the layers; inputs of which X'X is not inverted any more.
LEAST_ROWS, MOST_INPUTS = 10, 6144


@dataclass(frozen=True)
class Pair:
    """A layer and its reader. own: what the layer emits up to the Relu; aim: where the reader's output is judged."""

    layer: Layer
    own: Aim
    reader: Layer
    aim: Aim

    def fitted(
        self, graph: Graph, equations: Equations, before: Source, after: Replay, new: Initializers, fixed: Fixed, seed: int
    ) -> dict[str, NDArray[Any]]:
        """New initializers of the layer, which is solved for by itself in `new`; the reader's are not among them, it comes next.

        before, after: both networks; the latter waits at the layer. fixed: of the reader, as `Equations` has it. Raises ModelError.
        """
        if not equations.whole or equations.rows_per_input < LEAST_ROWS or equations.inputs > MOST_INPUTS:
            return {}
        met = _Met(self, before, after, new)
        reading = Equations(graph, self.reader, self.aim, *fixed, before, met, seed)
        if not reading.whole or reading.rows_per_input < LEAST_ROWS:
            return {}
        solution, (_, error) = reading.solved()
        moved = self._moved(equations, reading, met, new, solution) if solution else {}
        if not moved:
            return {}
        again = Equations(graph, self.reader, self.aim, *fixed, before, _Met(self, before, after, {**new, **moved}), seed)
        return moved if again.error(solution) < error else {}

    def _moved(
        self, equations: Equations, reading: Equations, met: _Met, now: Initializers, solution: Initializers
    ) -> dict[str, NDArray[Any]]:
        """The layer after one step; empty where it cannot be stored."""
        kernel = reading.present(solution)[0] * self.aim.scale[:, None]
        left, counts = reading.left(solution)
        gradient = met.gradient(reading, left @ kernel.astype(np.float32))
        taps = kernel.reshape(len(kernel), self.reader.in_per_group, -1) * self.own.scale[:, None]
        factor = _damped(np.einsum("ock,odk->cd", taps, taps), DAMPING)
        step = np.linalg.solve(factor, np.linalg.solve(_damped(equations.moments(), RIDGE), gradient.T).T)
        step[~equations.solves] = 0.0  # what the mask silenced stays silent
        weight, bias = equations.present(now)
        whole = equations.stored(weight + step[:, :-1], bias + step[:, -1])
        if not whole:
            return {}
        change = met.change(reading, {**now, **whole}) @ kernel.T.astype(np.float32)
        length = float(np.sum(left * change, dtype=np.float64)) / (float(np.sum(np.square(change * counts), dtype=np.float64)) + 1e-300)
        return equations.stored(weight + length * step[:, :-1], bias + length * step[:, -1])


class _Met:
    """What the reader meets with some weights of the layer, and what that means for the layer."""

    def __init__(self, pair: Pair, before: Source, after: Replay, weights: Initializers) -> None:
        self._pair, self._before, self._after = pair, before, after
        self._own = self._aside(weights)
        self.batches = -(-after.batches // EVERY)

    def value(self, name: str, batch: int) -> NDArray[Any] | None:
        """A tensor of one batch."""
        found = self._after.value(name, batch)
        return self._own.value(name, batch) if found is None else found

    def gradient(self, reading: Equations, pulls: NDArray[np.float32]) -> Doubles:
        """Of the layer's weights and bias [out, features + 1], from that of what the reader meets [rows, features]."""
        layer, reader = self._pair.layer, self._pair.reader
        found = np.zeros((layer.out_channels, 1 + int(np.prod(layer.view.shape[1:]))))
        for batch, rows in enumerate(reading.by_batch(pulls)):
            h = self._there(reader.input, batch)
            pulled = spread(reader, rows, h.shape, self._places(reading, batch)) * self._open(batch)
            places = touched(layer, pulled)
            x = inputs_at(layer, self._there(layer.input, batch), places)[:, 0]
            x = np.concatenate([x, np.ones((len(x), 1), np.float32)], 1)
            found += outputs_at(layer, pulled, places).T @ x
        return found * self._pair.own.scale[:, None]

    def change(self, reading: Equations, weights: Initializers) -> NDArray[np.float32]:
        """By how much other weights of the layer change what the reader meets, as long as no Relu turns [rows, features]."""
        reader, tensor = self._pair.reader, self._pair.own.tensor
        ahead = self._aside(weights)
        found = []
        for batch in range(self.batches):
            there = ahead.value(tensor, batch)
            assert there is not None
            change = (there - self._there(tensor, batch)) * self._open(batch)
            found.append(inputs_at(reader, change, self._places(reading, batch))[:, 0])
        return np.concatenate(found)

    def _aside(self, weights: Initializers) -> Aside:
        pair = self._pair
        return self._after.aside(pair.reader.node, [name for name in (pair.own.tensor, pair.reader.input, pair.aim.other) if name], weights)

    def _there(self, name: str, batch: int) -> NDArray[Any]:
        found = self.value(name, batch)
        assert found is not None
        return found

    def _open(self, batch: int) -> Flags:
        """Where the Relu lets through what it is given."""
        opened: Flags = self._there(self._pair.reader.input, batch) == self._there(self._pair.own.tensor, batch)
        return opened

    def _places(self, reading: Equations, batch: int) -> Places:
        wanted = self._before.value(self._pair.aim.tensor, batch)
        assert wanted is not None
        return reading.places(self._there(self._pair.reader.input, batch), wanted, batch)


def _damped(moments: Doubles, part: float) -> Doubles:
    return moments + (part * float(np.trace(moments)) / len(moments) + 1e-12) * np.eye(len(moments))


def pairs_of(
    original: Graph, graph: Graph, layers: Sequence[Layer], aims: Mapping[str, Aim], removed: Mapping[str, Flags]
) -> dict[str, Pair]:
    """Of the layers that are solved for in that order: those that lost units, by name, with the next one, which alone reads them."""
    found = {}
    for layer, reader in pairwise(layers):
        own = aims.get(layer.name)
        if own is None or not own.one_sided or own.other or not removed.get(layer.weight, np.zeros(1, bool)).any():
            continue
        if _alike(layer, reader) and own.tensor in original.uses and _is_read_alone(original, own.tensor, reader):
            found[layer.name] = Pair(layer, own, reader, aims[reader.name])
    return found


def _alike(layer: Layer, reader: Layer) -> bool:
    """Whether both are of a kind that steps can be made for."""
    plain = all(one.groups == 1 and one.recurrent is None and one.inside is None for one in (layer, reader))
    return plain and layer.is_convolution == reader.is_convolution and layer.out_channels == reader.in_per_group


def _is_read_alone(graph: Graph, tensor: str, reader: Layer) -> bool:
    """Whether the Relu behind a tensor is for that layer only."""
    uses = graph.uses[tensor]
    if len(uses) != 1 or graph.is_output(tensor):
        return False
    output = graph.nodes[uses[0].node].output[0]
    return output == reader.input and len(graph.uses[output]) == 1 and not graph.is_output(output)
