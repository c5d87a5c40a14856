"""The weights that `flow-obs` ranks together: which of them stay, and what each is worth."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from relief_onnx.cut import FLOOR, Floor
from relief_onnx.layers import Layer
from relief_onnx.masks import Masks
from relief_onnx.patterns import keep_pattern

__all__ = ["EXCHANGED", "FLOOR_OF_BUDGET", "Pool"]

Doubles = NDArray[np.float64]
Flags = NDArray[np.bool_]

# What about each step leaves, and the part of the weights that a round of exchange may exchange.
STEP, EXCHANGED = 0.5, 0.05
# The least share of a layer that stays: FLOOR, or that part of the share of the whole where it is less; and this part of what flow leaves.
FLOOR_OF_BUDGET, FLOOR_OF_FLOW = 0.25, 0.5
# What one weight is worth holds while the others are there: in one step no layer falls further than to this part of what all fall to.
TRUST = 0.6


class Pool:
    """Weights that share a number: one ranking of all their mask entries, laid end to end, each a single weight or a whole kernel."""

    def __init__(self, layers: Sequence[Layer], masks: Masks, allowed: Masks, removed: Mapping[str, Flags]) -> None:
        self.layers = list(layers)
        self.shapes = [masks.keep[layer.weight].shape for layer in layers]
        sizes = [int(np.prod(shape)) for shape in self.shapes]
        ends = np.cumsum([0, *sizes])
        self._slices = [slice(int(start), int(end)) for start, end in itertools.pairwise(ends)]
        costs = [int(np.prod(layer.view.shape)) // size for layer, size in zip(layers, sizes, strict=True)]
        self._cost = np.repeat(costs, sizes).astype(np.int64)
        self._place = np.repeat(np.arange(len(layers)), sizes)
        self._allowed = np.concatenate([np.zeros(0, bool), *(_allowed(layer, masks, allowed, removed).reshape(-1) for layer in layers)])
        self.keep = self._allowed.copy()
        self.worth = np.zeros(len(self.keep))
        self.budget = sum(int(masks.keep[layer.weight].sum()) * cost for layer, cost in zip(layers, costs, strict=True))
        self._total = int(self._cost[self._allowed].sum())
        share = min(FLOOR, FLOOR_OF_BUDGET * self.budget / max(self._total, 1))
        present = np.bincount(self._place, self._allowed, len(layers))
        of_flow = np.array([int(masks.keep[layer.weight].sum()) for layer in layers], np.float64)
        self._least = np.minimum(np.ceil(np.maximum(share * present, FLOOR_OF_FLOW * of_flow)), present).astype(np.int64)
        self._costs = costs

    @property
    def steps(self) -> int:
        """Geometric steps from what is allowed to the budget."""
        return math.ceil(math.log(self.budget / self._total) / math.log(STEP) - 1e-9) if 0 < self.budget < self._total else 0

    def cost(self, place: int) -> int:
        """Weights per entry of a layer's mask."""
        return self._costs[place]

    def mask(self, place: int) -> Flags:
        """What stays of a layer's weight now."""
        return self.keep[self._slices[place]].reshape(self.shapes[place])

    def learn(self, place: int, worth: Doubles) -> None:
        """What the entries of a layer are worth, per weight."""
        self.worth[self._slices[place]] = worth.reshape(-1) / self._costs[place]

    def scaled(self, factors: Sequence[float]) -> Pool:
        """Another pool with the same flags, in which each layer is worth so much more or less."""
        other = copy.copy(self)
        other.worth = self.worth * np.asarray(factors, np.float64)[self._place]
        return other

    def cut(self, part: float) -> list[Floor]:
        """Down to the budget, or `part` of the way there in the logarithm."""
        left = self.budget if part >= 1 else round(self._total * (self.budget / self._total) ** part)
        order = self._ranking(self.keep, -self.worth)
        least = self._floors(left)
        ranked = np.bincount(self._place[order[np.cumsum(self._cost[order]) <= left]], minlength=len(self.layers))
        saved = _rank_within(self._place[order]) < least[self._place[order]]  # the floors, first of all
        rest = np.cumsum(np.where(saved, 0, self._cost[order])) <= left - int(self._cost[order][saved].sum())
        self.keep = np.zeros_like(self.keep)
        self.keep[order[saved | rest]] = True
        short = np.flatnonzero(ranked < self._least)
        return [Floor(self.layers[place].weight, int(ranked[place]), int(self._least[place])) for place in short]

    def _floors(self, left: int) -> NDArray[np.int64]:
        """Of each layer how many entries stay in a step that leaves `left` weights."""
        present = np.bincount(self._place[self.keep], minlength=len(self.layers))
        costs = np.array(self._costs)
        least = np.maximum(self._least, np.ceil(TRUST * left / max(int((costs * present).sum()), 1) * present).astype(np.int64))
        chosen: NDArray[np.int64] = least if int((costs * least).sum()) <= left else self._least
        return chosen

    def cut_pattern(self, n: int, m: int, part: float) -> None:
        """At most n of every m consecutive inputs, or as many as `part` of the way there in the logarithm; inputs that go do not count."""
        count = n if part >= 1 else math.ceil(m * (n / m) ** part)
        for where, shape in zip(self._slices, self.shapes, strict=True):
            if shape[1] >= m:
                worth = np.where(self.keep[where], self.worth[where], -1.0).reshape(shape)
                read = np.moveaxis(self._allowed[where].reshape(shape), 1, 0).reshape(shape[1], -1).any(1)
                best = np.zeros(shape, bool)
                best[:, read] = keep_pattern(worth[:, read], count, m)
                self.keep[where] &= best.reshape(-1)

    def bury(self, surviving: Mapping[str, Flags]) -> None:
        """Let go of what no output depends on any more. surviving: single weights [out, in per group, *kernel] by weight."""
        for layer, where, shape in zip(self.layers, self._slices, self.shapes, strict=True):
            left = np.any(surviving[layer.weight].reshape(*shape, -1), axis=-1).reshape(shape[0], -1)
            self.keep[where] &= left.reshape(-1)
            # A unit that lost everything does not come back: perhaps nobody reads it.
            self._allowed[where] &= np.broadcast_to(left.any(1)[:, None], left.shape).reshape(-1)

    def exchange(self) -> int:
        """Fill up to the budget, then put back what is worth more than what is dropped for it, at most EXCHANGED of the budget.

        How many weights came back.
        """
        falling = self._ranking(self._allowed & ~self.keep, -self.worth)
        rising = self._ranking(self.keep, self.worth)
        room = self.budget - int(self._cost[rising].sum())
        spare = np.bincount(self._place[rising], minlength=len(self.layers)) - self._least  # no layer falls below its floor
        rising = rising[_rank_within(self._place[rising]) < spare[self._place[rising]]]
        added, dropped = np.cumsum(self._cost[falling]), np.cumsum(self._cost[rising])
        needed = np.searchsorted(dropped, added - room) + (added > room)  # how many go for the first ones that come
        possible = (added - room <= EXCHANGED * self.budget) & (needed <= len(rising))
        level = np.concatenate([[0.0], self.worth[rising]])[np.minimum(needed, len(rising))]
        better = possible & (self.worth[falling] > level)
        count = len(better) if better.all() else int(np.argmin(better))
        if count:
            self.keep[falling[:count]] = True
            self.keep[rising[: needed[count - 1]]] = False
        return int(added[count - 1]) if count else 0

    def _ranking(self, chosen: Flags, key: Doubles) -> NDArray[np.intp]:
        places = np.flatnonzero(chosen)
        return places[np.argsort(key[places], kind="stable")]


def _allowed(layer: Layer, masks: Masks, allowed: Masks, removed: Mapping[str, Flags]) -> Flags:
    """Which entries of a layer's mask may stay."""
    found = np.broadcast_to(allowed.keep[layer.weight], masks.keep[layer.weight].shape).copy()
    if layer.weight in removed:
        found[removed[layer.weight]] = False
    return found


def _rank_within(places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of each entry how many of the same place come before it."""
    order = np.argsort(places, kind="stable")
    ranks = np.empty(len(places), np.int64)
    ranks[order] = np.arange(len(places)) - np.searchsorted(places[order], places[order])
    return ranks
