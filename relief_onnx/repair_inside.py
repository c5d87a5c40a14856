"""Layers within bodies as equations: the pruned network runs the node with its bodies once more for each; mirrors tell what they meet.

The body runs as a whole, with the weights that are solved for already; the walk itself goes on when all layers of the node are done. The
original's weights do not change, so it runs the node once and then the mirrors, like any other nodes. Rows of both networks belong
together only where their bodies ran in the same rounds, which the numbers say that each run hands out. The mirror of a recurrent node has
the sequences of all runs as one batch, and is run by itself like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relief_onnx.graph import Graph
from relief_onnx.layers import Layer
from relief_onnx.nodes import runs_of
from relief_onnx.recurrent_equations import inputs_of
from relief_onnx.replay import Aside, Replay

__all__ = ["Inside", "Side"]


@dataclass
class _Met:
    """What a layer meets in the pruned network, where that took the way of the original. Also what the latter emits."""

    now: Aside
    then: Replay
    layer: Layer
    runs: str

    @property
    def batches(self) -> int:
        return self.now.batches

    def value(self, name: str, batch: int) -> NDArray[Any] | None:
        """A tensor of one batch; None where the body did not run, or not in the same rounds in both networks."""
        own = self.now if name == self.layer.input else self.then
        x, y = self.now.value(self.layer.input, batch), self.then.value(self.layer.output, batch)
        assert x is not None
        assert y is not None
        if not x.size or not y.size or len(x) != len(y):
            return None
        before, after = self.then.value(self.runs, batch), self.now.value(self.runs, batch)
        assert before is not None
        return own.value(name, batch) if np.array_equal(before, after) else None  # type: ignore[arg-type]


@dataclass
class Side:
    """One network at a recurrent node, on the batches in which both took the same way."""

    values: Aside | Replay
    chosen: tuple[int, ...]

    @property
    def batches(self) -> int:
        """How many these are."""
        return len(self.chosen)

    def value(self, name: str, batch: int) -> NDArray[Any] | None:
        """A tensor of one of them."""
        return self.values.value(name, self.chosen[batch])


class Inside:
    """The layers in the bodies of one node (by its number in `graph`). The walk over the pruned network stays before the node."""

    def __init__(self, original: Graph, graph: Graph, node: int, before: Replay, after: Replay, new: dict[str, NDArray[Any]]) -> None:
        self.node = node
        self._original, self._graph, self._before, self._after = original, graph, before, after
        after.advance(node, new)

    def met(self, layer: Layer, new: dict[str, NDArray[Any]]) -> _Met:
        """What a layer meets with the weights `new`, and what it should emit. Raises ModelError."""
        runs = runs_of(self._graph.nodes[layer.node])
        self._before.advance(self._original.producer[layer.output] + 1)
        return _Met(self._after.aside(layer.node, [layer.input, runs], new), self._before, layer, runs)

    def sides(self, layer: Layer, new: dict[str, NDArray[Any]]) -> tuple[Side, Side] | None:
        """The original and the pruned network with the weights `new` at a recurrent node; None where no batch goes one way in both."""
        runs, place = runs_of(self._graph.nodes[layer.node]), self._original.producer[layer.output]
        self._before.advance(place)
        then, now = self._before, self._after.aside(layer.node, [*inputs_of(self._graph, layer.node), runs], new)
        ways = ((then.value(runs, batch), now.value(runs, batch)) for batch in range(now.batches))
        same = [one is not None and one.size > 0 and np.array_equal(one, other) for one, other in ways if other is not None]
        chosen = tuple(np.flatnonzero(same).tolist())
        return (Side(then, chosen), Side(now, chosen)) if chosen else None
