"""flow-obs: flow's mask, chosen again by what is lost after repair.

Flow says how many weights stay and what each unit means to the outputs (R). From the dense network the masks shrink in geometric steps;
between two steps every layer is solved for again (as in `repair`), and each weight is worth what its neuron's squared error would grow by
without it once the others make up for it (see `worth`), as a part of the neuron's variance, times R^EXPONENT: one ranking over the network.
When the number is reached, the least of what stays is exchanged for the best of what went, as long as that is worth more.
Where there are enough samples flow's own mask and this one are both repaired, and the better one on samples set aside is taken (`contest`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from relief_onnx.contest import Contest, best, draw
from relief_onnx.cut import FLOOR, Floor
from relief_onnx.dataset import Dataset
from relief_onnx.effort import Effort, plan_effort
from relief_onnx.equations import Equations
from relief_onnx.graph import Graph
from relief_onnx.layers import Layer, Plan
from relief_onnx.masks import Masks, applied, initializer_masks
from relief_onnx.patterns import keep_pattern
from relief_onnx.repair import Visit, refusal, sweep
from relief_onnx.surgery import apply_weights, operate

__all__ = ["EXCHANGED", "FLOOR_OF_BUDGET", "Improved", "Pool", "improve"]

Doubles = NDArray[np.float64]
Flags = NDArray[np.bool_]
Feed = Mapping[str, NDArray[Any]]

# Samples that the choice looks at; what about each step leaves; rounds of exchange, and the part of the weights that each may exchange.
SAMPLES, STEP, ROUNDS, EXCHANGED = 512, 0.5, 3, 0.05
# The least share of a layer that stays: FLOOR, or that part of the share of the whole where it is less; and this part of what flow leaves.
FLOOR_OF_BUDGET, FLOOR_OF_FLOW = 0.25, 0.5
# What one weight is worth holds while the others are there: in one step no layer falls further than to this part of what all fall to.
TRUST = 0.6
# Samples that there are for choosing and judging together.
DRAWN = 768
# As in flow's own ranking.
EXPONENT = 0.75


@dataclass(frozen=True)
class Improved:
    """Masks of the same number of weights, the floors that acted, and how many weights were exchanged in each round.

    contest: between flow's masks and those chosen again; None where there were too few samples. effort: what it took.
    """

    masks: Masks
    floors: tuple[Floor, ...]
    exchanged: tuple[int, ...]
    contest: Contest | None
    effort: Effort

    @property
    def taken(self) -> str:
        """Whose masks these are."""
        return "flow-obs" if self.contest is None else self.contest.winner

    def document(self) -> dict[str, Any]:
        """What the report says of the choice."""
        contest, effort = self.contest, self.effort
        errors = {} if contest is None else {name: error if math.isfinite(error) else None for name, error in contest.errors.items()}
        return {
            "taken": self.taken,
            "errors": errors,
            "samples": 0 if contest is None else contest.samples,
            "operations": effort.flops,
            "operations_unbounded": effort.wanted,
            "rounds": effort.rounds,
            "left": list(effort.left),
        }


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
        """At most n of every m consecutive inputs, or as many as `part` of the way there in the logarithm."""
        count = n if part >= 1 else math.ceil(m * (n / m) ** part)
        for where, shape in zip(self._slices, self.shapes, strict=True):
            if shape[1] >= m:
                worth = np.where(self.keep[where], self.worth[where], -1.0).reshape(shape)
                self.keep[where] &= keep_pattern(worth, count, m).reshape(-1)

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


def _surviving(graph: Graph, flags: Mapping[str, Flags]) -> Mapping[str, Flags]:
    """What is left of each weight when units that are dead under the masks are gone."""
    return operate(apply_weights(graph.model, applied(graph, flags))).surviving


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


def improve(
    original: Graph, graph: Graph, plan: Plan, masks: Masks, allowed: Masks, grouped: Sequence[Sequence[str]],
    relevance: Mapping[str, Doubles], weights: frozenset[str], dataset: Dataset, *, pattern: tuple[int, int] | None = None,
    removed: Mapping[str, Flags] | None = None, samples: int | None = None, seed: int = 0, threads: int = 0,
    progress: Callable[[str, int, int | None], None] = lambda *_: None,
) -> Improved:  # fmt: skip
    """Masks that keep as many weights as `masks` in each of the groups of weights `grouped`.

    graph: the original with biases where they can be had, nothing masked yet. allowed: what may stay at all. relevance: R of units by
    weight. removed: by weight, units [out] that go as a whole. Weights that repair has to leave alone keep their mask. With a
    `pattern` (n, m) the choice is within each block. Raises DataError, ModelError.
    """
    gone = removed or {}
    free = {layer.weight: layer for layer in plan.layers if layer.weight in masks.keep and not refusal(plan, layer, weights)}

    def pooled(left: Collection[str]) -> list[Pool]:
        return [
            Pool([free[weight] for weight in group if weight in free and weight not in left], masks, allowed, gone) for group in grouped
        ]

    pools = pooled(())
    effort = _effort(pools, pattern)
    if effort.left:
        pools = pooled(effort.left)
    rounds = effort.rounds
    placed = {layer.weight: (pool, place) for pool in pools for place, layer in enumerate(pool.layers)}
    value = {layer.weight: relevance[layer.weight] ** EXPONENT for layer in free.values()}
    drawn = draw(dataset, DRAWN if samples is None else min(samples, DRAWN), seed)
    feeds = drawn.chosen(SAMPLES)
    steps = max((pool.steps for pool in pools), default=0)

    def current() -> Masks:
        return replace(masks, keep={**masks.keep, **{weight: pool.mask(place) for weight, (pool, place) in placed.items()}})

    def swept(
        start: Graph, flags: Mapping[str, Flags], chosen: Sequence[Feed], only: Collection[str], visit: Visit
    ) -> dict[str, NDArray[Any]]:
        layers = [layer for layer in plan.layers if layer.weight in only]
        return sweep(original, start, plan, layers, chosen, flags, gone, visit, seed=seed, threads=threads)

    def appraise(done: int, additions: bool) -> None:
        def visit(layer: Layer, equations: Equations) -> dict[str, NDArray[Any]]:
            pool, place = placed[layer.weight]
            progress("choose", done, total)
            if done == 0:
                variance = equations.variance()
                value[layer.weight] = np.where(variance > 0, value[layer.weight] / np.where(variance > 0, variance, 1.0), 0.0)
            found, appraisal = equations.appraised(pool.cost(place), additions, effort.layer_flops)
            pool.learn(place, appraisal.worth * value[layer.weight][:, None])
            return found

        swept(graph, initializer_masks(plan, current()), feeds, placed, visit)

    def repaired(candidate: Masks) -> onnx.ModelProto:
        flags = initializer_masks(plan, candidate)
        masked = apply_weights(graph.model, applied(graph, flags)) if flags else graph.model
        new = swept(Graph(masked), flags, drawn.fit, free, lambda _, equations: equations.solved()[0])
        return apply_weights(masked, new) if new else masked

    total = steps + rounds + 1
    floors: list[Floor] = []
    for step in range(1, steps + 1):
        appraise(step - 1, additions=False)
        floors = []
        for pool in pools:
            if pattern is not None:
                pool.cut_pattern(*pattern, step / steps)
            elif pool.steps:
                floors += pool.cut(step / steps)
    exchanged = []
    for number in range(rounds if steps else 0):
        surviving = _surviving(graph, initializer_masks(plan, current()))
        for pool in pools:
            pool.bury(surviving)
        appraise(steps + number, additions=True)
        exchanged.append(sum(pool.exchange() for pool in pools))
    found = Improved(current(), tuple(floors), tuple(exchanged), None, effort)
    if not steps or not drawn.unseen:
        return found
    progress("choose", total - 1, total)
    candidates = {"flow-obs": found.masks, "flow": masks}
    contest = best(original.model, {name: partial(repaired, own) for name, own in candidates.items()}, drawn, threads)
    return replace(found, masks=candidates[contest.winner], contest=contest)


def _effort(pools: Sequence[Pool], pattern: tuple[int, int] | None) -> Effort:
    """What the sweeps take, with all layers at the density of the whole."""
    steps = max((pool.steps for pool in pools), default=0)
    layers = [layer for pool in pools for layer in pool.layers]
    share = sum(pool.budget for pool in pools) / max(sum(int(np.prod(layer.view.shape)) for layer in layers), 1)
    densities = [share ** (step / steps) for step in range(steps)]
    return plan_effort(layers, densities, ROUNDS if steps and pattern is None else 0, share)
