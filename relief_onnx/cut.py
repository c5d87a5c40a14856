"""Where to cut over the whole network: one ranking of all connections, down to a share of the flow or to a share of the weights.

Each connection (or single weight) has a worth; the shortest prefix in descending order of worth per stored weight stays. For `flow` the
worth is the flow itself. For a share that is local to a neuron the same share of every neuron is kept: its worth is what part of the
neuron's total comes after it.

What all layers let through multiplies along the way to the output, so the last connections of a layer that kept little weigh more: flow
is divided by (share of its flow that the layer keeps)^balance. No layer falls below `FLOOR` of its own flow; where that acts it is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from relief_onnx.aside import beside
from relief_onnx.flow import DEFAULT_RULE, FlowRule
from relief_onnx.layers import Layer, Plan
from relief_onnx.masks import Masks, as_stored, whole_units
from relief_onnx.patterns import keep_pattern
from relief_onnx.scoring import LayerScore, Scores

__all__ = ["FLOOR", "Floor", "Pool", "cut", "pattern_masks", "worths"]

Doubles = NDArray[np.float64]
Flags = NDArray[np.bool_]

# Share of its own flow that every layer keeps, whatever the budget: below that its output is noise.
FLOOR = 0.02
# Rounds in which the balance between layers settles.
ROUNDS = 12


@dataclass(frozen=True)
class Floor:
    """A layer that would have kept less than FLOOR of its flow: connections that the ranking alone kept, and with the floor."""

    weight: str
    ranked: int
    kept: int


@dataclass(frozen=True)
class Pool:
    """Weights that are ranked together: down to `alpha` of their flow, or (None) to what the budget leaves them."""

    weights: tuple[str, ...]
    alpha: float | None


@dataclass(frozen=True)
class _Entry:
    """One weight in the ranking: worth and flow per unit of the mask, shaped as the first reader's scores, and weights per unit.

    scores: the array that they come from.
    """

    weight: str
    worth: Doubles
    flow: Doubles
    cost: int
    scores: Doubles


def worths(plan: Plan, scores: Scores, weights: frozenset[str], rule: FlowRule = DEFAULT_RULE) -> Iterator[_Entry]:
    """What is ranked, one weight after the other. A shared weight is worth what all of its readers together lose with it."""
    for weight, layers in plan.by_weight().items():
        if weight not in weights:
            continue
        first = scores[layers[0].name]
        cost = int(np.prod(layers[0].view.shape)) // first.score.size
        by_flow = first.relevance is not None
        ranked = [_ranked(scores[layer.name], rule) if by_flow else _local(scores[layer.name]) for layer in layers]
        flows = [scores[layer.name].flow if by_flow else scores[layer.name].score for layer in layers]
        if len(layers) > 1:
            merge: Callable[[list[Doubles]], Doubles] = (lambda parts: sum(parts[1:], parts[0])) if by_flow else _largest
            ranked, flows = [_merged(layers, ranked, merge)], [_merged(layers, flows, merge)]
        yield _Entry(weight, ranked[0] / cost if by_flow else ranked[0], flows[0], cost, first.score)


def _ranked(score: LayerScore, rule: FlowRule) -> Doubles:
    assert score.relevance is not None
    return replace(score, relevance=score.relevance**rule.exponent).flow


def _local(score: LayerScore) -> Doubles:
    """Of each connection the part of its neuron's total that it and all that is smaller make up; 0 where it contributes nothing.

    What stays above a worth of 1 - alpha is what `masks.keep_prefix` keeps for that alpha.
    """
    rows = np.concatenate([score.score.reshape(len(score.score), -1), score.bias_score[:, None]], 1)
    order = np.argsort(-rows, axis=1, kind="stable")
    ranked = np.take_along_axis(rows, order, 1)
    total = rows.sum(1, keepdims=True)
    after = total - np.cumsum(ranked, 1) + ranked
    worth = np.empty_like(rows)
    np.put_along_axis(worth, order, np.where(ranked > 0, after / np.where(total > 0, total, 1.0), 0.0), 1)
    return worth[:, :-1].reshape(score.score.shape)


def _largest(parts: list[Doubles]) -> Doubles:
    largest: Doubles = np.maximum.reduce(parts)
    return largest


def _merged(layers: tuple[Layer, ...], parts: list[Doubles], merge: Callable[[list[Doubles]], Doubles]) -> Doubles:
    """One array over the readers of a shared weight, as the first one sees it; of a unit, its largest entry."""
    stored = [as_stored(layer, part) for layer, part in zip(layers, parts, strict=True)]
    seen = layers[0].view.apply(merge(stored))
    return np.asarray(seen.reshape(*parts[0].shape, -1).max(-1))


def cut(
    plan: Plan, scores: Scores, pools: Sequence[Pool], keep: float | None = None, rule: FlowRule = DEFAULT_RULE
) -> tuple[Masks, tuple[Floor, ...]]:
    """Masks of all pools, and the floors that acted. Biases all stay: a constant carries no flow.

    keep: share of the weights of all pools together that stays, in (0, 1]; a pool without an alpha gets what the others leave of it.
    """
    keeps: dict[str, Flags] = {}
    floors: list[Floor] = []
    total = sum(int(np.prod(plan.by_weight()[weight][0].view.shape)) for pool in pools for weight in pool.weights)
    left = round((keep or 0.0) * total)
    for pool in sorted(pools, key=lambda pool: pool.alpha is None):
        known = [weight for weight in plan.by_weight() if weight in pool.weights]
        if not known:
            continue
        by_flow = scores[plan.by_weight()[known[0]][0].name].relevance is not None
        ranked = [_Ranked(entry, by_flow) for entry in worths(plan, scores, frozenset(pool.weights), rule)]
        kept, acted = _cut_pool(ranked, pool.alpha, left, rule.balance if by_flow else 0.0)
        left -= sum(int(kept[one.weight].sum()) * one.cost for one in ranked)
        keeps.update(kept)
        floors += acted
    keeps = {weight: whole_units(plan.by_weight()[weight], keep) for weight, keep in keeps.items()}
    biases = {weight: np.ones(plan.by_weight()[weight][0].out_channels, bool) for weight in keeps}
    return Masks(keeps, biases), tuple(floors)


def pattern_masks(plan: Plan, scores: Scores, weights: frozenset[str], n: int, m: int) -> Masks:
    """N:M masks of the chosen weights: by flow where it was measured, else by score. Layers with fewer than m inputs stay whole."""
    keeps = {}
    for entry in worths(plan, scores, weights):
        wide = entry.flow.shape[1] >= m
        keeps[entry.weight] = keep_pattern(entry.flow, n, m) if wide else np.ones(entry.flow.shape, bool)
    keeps = {weight: whole_units(plan.by_weight()[weight], keep) for weight, keep in keeps.items()}
    return Masks(keeps, {weight: np.ones(plan.by_weight()[weight][0].out_channels, bool) for weight in keeps})


class _Ranked:
    """One weight's entries in descending order of worth. What stays of it is always a prefix."""

    def __init__(self, entry: _Entry, floored: bool) -> None:
        worth, flow = entry.worth.reshape(-1), entry.flow.reshape(-1)
        self.weight, self.cost, self._shape = entry.weight, entry.cost, entry.worth.shape
        order = np.argsort(-worth, kind="stable")
        # Of a large model these are four times as large as its weights, so they go where those are.
        self._falling = beside(-worth[order], entry.scores)
        self.flow = beside(np.cumsum(flow[order]), entry.scores)
        self._order = beside(order.astype(np.uint32), entry.scores) if len(order) < 2**32 else order
        self.useful = int(np.searchsorted(self._falling, 0.0, side="left"))
        total = float(self.flow[-1]) if len(worth) else 0.0
        self.least = min(int(np.searchsorted(self.flow, FLOOR * total)) + 1, self.useful) if floored and total > 0 else 0

    def reaching(self, level: float) -> int:
        """Entries whose worth reaches a level above 0."""
        return int(np.searchsorted(self._falling, -level, side="right"))

    def count(self, level: float) -> int:
        """The same, but no fewer than the floor."""
        return max(self.reaching(level), self.least)

    def carried(self, count: int) -> float:
        """The flow of the first entries."""
        return float(self.flow[count - 1]) if count else 0.0

    def keep(self, count: int) -> Flags:
        """Flags of the first entries."""
        flags = np.zeros(len(self._order), bool)
        flags[self._order[:count]] = True
        return flags.reshape(self._shape)

    def worth(self, place: int) -> float:
        """That of the entry at a place, 0 where there is none."""
        return -float(self._falling[place]) if len(self._falling) else 0.0


def _cut_pool(ranked: list[_Ranked], alpha: float | None, budget: int, balance: float) -> tuple[dict[str, Flags], list[Floor]]:
    gains = np.ones(len(ranked))
    for _ in range(ROUNDS if balance else 1):
        counts = _counts(ranked, gains, alpha, budget)
        if balance:
            shares = np.array([one.carried(count) / max(one.flow[-1], 1e-300) for one, count in zip(ranked, counts, strict=True)])
            # Half way in the logarithm at a time, so that it settles.
            gains = np.sqrt(gains * np.maximum(shares, 1e-6) ** -balance)
    floors = [
        Floor(one.weight, alone, count)
        for one, alone, count in zip(ranked, _unfloored(ranked, gains, counts), counts, strict=True)
        if alone < count == one.least
    ]
    return {one.weight: one.keep(count) for one, count in zip(ranked, counts, strict=True)}, floors


def _counts(ranked: list[_Ranked], gains: Doubles, alpha: float | None, budget: int) -> list[int]:
    """How many entries of each weight stay: the shortest ranking that reaches alpha of the flow, or the longest within the budget."""
    if alpha is not None and alpha >= 1.0:
        return [one.useful for one in ranked]
    wanted = (alpha or 0.0) * sum(one.carried(len(one.flow)) for one in ranked)

    def enough(counts: list[int]) -> bool:
        if alpha is not None:
            return sum(one.carried(count) for one, count in zip(ranked, counts, strict=True)) >= wanted
        return sum(count * one.cost for one, count in zip(ranked, counts, strict=True)) >= budget

    def counts_at(bits: int) -> list[int]:
        level = float(np.int64(bits).view(np.float64))
        return [one.count(level / gain) for one, gain in zip(ranked, gains.tolist(), strict=True)]

    # Worth is positive, so the bits of a float64 are in the order of its value: the level is found exactly.
    top = max((one.worth(0) * gain for one, gain in zip(ranked, gains.tolist(), strict=True)), default=0.0)
    low, high = 1, int(np.float64(2 * top).view(np.int64)) + 1
    while low < high - 1:
        middle = (low + high) // 2
        low, high = (middle, high) if enough(counts_at(middle)) else (low, middle)
    return _filled(ranked, counts_at(high), counts_at(low), alpha, wanted, budget)


def _filled(ranked: list[_Ranked], counts: list[int], most: list[int], alpha: float | None, wanted: float, budget: int) -> list[int]:
    """Of the entries right at the level, in the order of the weights, as many as it takes, or as fit into the budget."""
    found = []
    flow = sum(one.carried(count) for one, count in zip(ranked, counts, strict=True))
    left = budget - sum(count * one.cost for one, count in zip(ranked, counts, strict=True))
    for one, count, limit in zip(ranked, counts, most, strict=True):
        more = max(left, 0) // one.cost
        if alpha is not None:
            missing = wanted - flow
            more = int(np.searchsorted(one.flow, one.carried(count) + missing)) + 1 - count if missing > 0 else 0
        more = min(more, limit - count)
        flow += one.carried(count + more) - one.carried(count)
        left -= more * one.cost
        found.append(count + more)
    return found


def _unfloored(ranked: list[_Ranked], gains: Doubles, counts: list[int]) -> list[int]:
    """What the ranking alone would keep: down to the least worth that stays anywhere above its floor."""
    levels = [one.worth(count - 1) * gain for one, gain, count in zip(ranked, gains.tolist(), counts, strict=True) if count > one.least]
    level = min(levels, default=np.inf)
    return [one.reaching(level / gain) for one, gain in zip(ranked, gains.tolist(), strict=True)]
