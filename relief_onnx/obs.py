"""flow-obs: flow's mask, chosen again by what is lost after repair.

Flow says how many weights stay and what each unit means to the outputs (R). From the dense network the masks shrink in geometric steps;
between two steps every layer is solved for again (as in `repair`), and each weight is worth what its neuron's squared error would grow by
without it once the others make up for it (see `worth`), as a part of the neuron's variance, times R^EXPONENT: one ranking over the network.
When the number is reached, the least of what stays is exchanged for the best of what went, as long as that is worth more.
Where there are enough samples flow's own mask and this one are both repaired, and the better one on samples set aside is taken (`contest`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from relief_onnx.contest import Contest, Draw, best, draw
from relief_onnx.cut import Floor
from relief_onnx.dataset import Dataset
from relief_onnx.effort import WORK, Effort, plan_effort
from relief_onnx.equations import Equations
from relief_onnx.graph import Graph
from relief_onnx.layers import Layer, Plan
from relief_onnx.masks import Masks, applied, initializer_masks
from relief_onnx.obs_pool import Pool
from relief_onnx.repair import Visit, batch_of, refusal, sweep
from relief_onnx.sensitivity import Trials, factors
from relief_onnx.surgery import apply_weights, operate

__all__ = ["Improved", "improve"]

Doubles = NDArray[np.float64]
Flags = NDArray[np.bool_]
Feed = Mapping[str, NDArray[Any]]

# Samples that the choice looks at, those that there are for choosing and judging together, and rounds of exchange.
SAMPLES, DRAWN, ROUNDS = 512, 768, 3
# Samples that layers are tried on by themselves.
TRIED = 128
# Powers of the layers' factors (see `sensitivity`) that are tried where so many samples judge; the first stands unless one is better.
POWERS, JUDGES = (0.0, 0.5, 1.0), 80
# Part of the work that all solves of one contest may take.
CONTEST = 0.25
# As in flow's own ranking.
EXPONENT = 0.75


@dataclass(frozen=True)
class Improved:
    """Masks of the same number of weights, the floors that acted, and how many weights were exchanged in each round.

    weighed: between powers of the layers' factors; contest: between flow's masks and those chosen again; None where there were too few
    samples. effort: what it took.
    """

    masks: Masks
    floors: tuple[Floor, ...]
    exchanged: tuple[int, ...]
    weighed: Contest | None
    contest: Contest | None
    effort: Effort

    @property
    def taken(self) -> str:
        """Whose masks these are."""
        return "flow-obs" if self.contest is None else self.contest.winner

    def document(self) -> dict[str, Any]:
        """What the report says of the choice."""
        contest, effort = self.contest, self.effort
        return {
            "taken": self.taken,
            "errors": _errors(contest),
            "samples": 0 if contest is None else contest.samples,
            "power": 0.0 if self.weighed is None else float(self.weighed.winner),
            "power_errors": _errors(self.weighed),
            "operations": effort.flops,
            "operations_unbounded": effort.wanted,
            "rounds": effort.rounds,
            "left": list(effort.left),
        }


def _errors(contest: Contest | None) -> Any:
    return {} if contest is None else contest.document()["errors"]


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
    # A body runs as a whole, once for each layer and sweep: what is in it keeps flow's mask.
    outside = [layer for layer in plan.layers if layer.inside is None and layer.weight in masks.keep]
    free = {layer.weight: layer for layer in outside if not refusal(plan, layer, weights)}

    def pooled(left: Collection[str]) -> list[Pool]:
        return [
            Pool([free[weight] for weight in group if weight in free and weight not in left], masks, allowed, gone) for group in grouped
        ]

    pools = pooled(())
    effort = _effort(pools, pattern)
    if effort.left:
        pools = pooled(effort.left)
    drawn = draw(dataset, DRAWN if samples is None else min(samples, DRAWN), seed, batch_of(graph))
    value = {layer.weight: relevance[layer.weight] ** EXPONENT for layer in free.values()}
    network = _Network(original, graph, plan, free, gone, drawn, value, effort, seed, threads)
    steps = max((pool.steps for pool in pools), default=0)
    total, done = steps + effort.rounds + 2, 0

    def current(own: Sequence[Pool]) -> Masks:
        found = {layer.weight: pool.mask(place) for pool in own for place, layer in enumerate(pool.layers)}
        return replace(masks, keep={**masks.keep, **found})

    def appraise(additions: bool) -> None:
        nonlocal done
        network.appraise(pools, current(pools), additions, lambda: progress("choose", done, total))
        done += 1

    floors: list[Floor] = []
    weighed = None
    for step in range(1, steps + 1):
        appraise(additions=False)
        if step == 1 and pattern is None and drawn.judged >= JUDGES:
            progress("choose", done, total)
            pools, weighed = _weighed(network, pools, current)
        floors = []
        for pool in pools:
            if pattern is not None:
                pool.cut_pattern(*pattern, step / steps)
            elif pool.steps:
                floors += pool.cut(step / steps)
    exchanged = []
    for _ in range(effort.rounds if steps else 0):
        surviving = network.surviving(current(pools))
        for pool in pools:
            pool.bury(surviving)
        appraise(additions=True)
        exchanged.append(sum(pool.exchange() for pool in pools))
    found = Improved(current(pools), tuple(floors), tuple(exchanged), weighed, None, effort)
    if not steps or not drawn.unseen:
        return found
    progress("choose", total - 1, total)
    candidates = {"flow-obs": found.masks, "flow": masks}
    contest = network.contest(candidates)
    return replace(found, masks=candidates[contest.winner], contest=contest)


def _weighed(network: _Network, pools: Sequence[Pool], current: Callable[[Sequence[Pool]], Masks]) -> tuple[list[Pool], Contest]:
    """The pools with layers weighed by what their errors do to the outputs, and how that was decided: a cut at once for each power."""

    def tried(own: Sequence[Pool]) -> Masks:
        copies = [copy(pool) for pool in own]  # a cut makes new flags
        for pool in copies:
            if pool.steps:
                pool.cut(1.0)
        return current(copies)

    known = network.factors(pools, tried(pools))

    def at(power: float) -> list[Pool]:
        return [pool.scaled([known.get(layer.weight, 1.0) ** power for layer in pool.layers]) for pool in pools]

    rivals = {f"{power:g}": at(power) for power in POWERS}
    contest = network.contest({name: tried(own) for name, own in rivals.items()}, rough=True)
    network.weigh({weight: factor ** float(contest.winner) for weight, factor in known.items()})
    return rivals[contest.winner], contest


class _Network:
    """The network that masks are tried on: sweeps over it, and what its layers' units count for."""

    def __init__(
        self, original: Graph, graph: Graph, plan: Plan, free: Mapping[str, Layer], removed: Mapping[str, Flags], drawn: Draw,
        value: Mapping[str, Doubles], effort: Effort, seed: int, threads: int,
    ) -> None:  # fmt: skip
        self._original, self._graph, self._plan, self._free, self._removed = original, graph, plan, free, removed
        self._drawn, self._feeds = drawn, drawn.chosen(SAMPLES)
        self._value, self._whole = dict(value), True
        self._effort, self._seed, self._threads = effort, seed, threads
        self._flops = CONTEST * WORK / len(POWERS) / max(len(free), 1)

    def appraise(self, pools: Sequence[Pool], masks: Masks, additions: bool, tick: Callable[[], None]) -> None:
        """Tell the pools what their weights are worth now."""
        placed = {layer.weight: (pool, place) for pool in pools for place, layer in enumerate(pool.layers)}

        def visit(layer: Layer, equations: Equations) -> dict[str, NDArray[Any]]:
            pool, place = placed[layer.weight]
            tick()
            if not equations.met:  # other rows than before, or none: worth what it was
                return {}
            if self._whole:
                variance, own = equations.variance(), self._value[layer.weight]
                self._value[layer.weight] = np.where(variance > 0, own / np.where(variance > 0, variance, 1.0), 0.0)
            found, appraisal = equations.appraised(pool.cost(place), additions, self._effort.layer_flops)
            pool.learn(place, appraisal.worth * self._value[layer.weight][:, None])
            return found

        self._swept(self._graph, initializer_masks(self._plan, masks), self._feeds, placed, visit)
        self._whole = False

    def factors(self, pools: Sequence[Pool], masks: Masks) -> dict[str, float]:
        """By weight, how much more or less the layers' errors do to the outputs than foreseen, where each layer has its mask alone."""
        trials = Trials()

        def visit(layer: Layer, equations: Equations) -> dict[str, NDArray[Any]]:
            trials.add(layer, *equations.trial(self._flops), self._value[layer.weight])
            return {}  # the others see what the whole network emits

        placed = {layer.weight for pool in pools for layer in pool.layers}
        self._swept(self._graph, initializer_masks(self._plan, masks), self._feeds, placed, visit)
        batches = -(-TRIED * len(self._drawn.fit) // self._drawn.fitted)
        return factors(self._graph.model, trials, self._feeds[:batches], self._threads)

    def weigh(self, by: Mapping[str, float]) -> None:
        """From now on layers are worth so much more or less."""
        self._value |= {weight: factor * self._value[weight] for weight, factor in by.items()}

    def contest(self, candidates: Mapping[str, Masks], rough: bool = False) -> Contest:
        """Which masks are best once repaired; `rough` repairs leave out the Relus behind layers, and their rounds."""
        makers = {name: partial(self._repaired, own, rough) for name, own in candidates.items()}
        return best(self._original.model, makers, self._drawn, self._threads)

    def surviving(self, masks: Masks) -> Mapping[str, Flags]:
        """What is left of each weight when units that are dead under the masks are gone."""
        return operate(self._masked(initializer_masks(self._plan, masks))).surviving

    def _masked(self, flags: Mapping[str, Flags]) -> onnx.ModelProto:
        return apply_weights(self._graph.model, applied(self._graph, flags)) if flags else self._graph.model

    def _repaired(self, masks: Masks, rough: bool) -> onnx.ModelProto:
        def visit(_: Layer, equations: Equations) -> dict[str, NDArray[Any]]:
            return (equations.trial if rough else equations.solved)(self._flops)[0]

        flags = initializer_masks(self._plan, masks)
        masked = self._masked(flags)
        new = self._swept(Graph(masked), flags, self._drawn.fit, self._free, visit)
        return apply_weights(masked, new) if new else masked

    def _swept(
        self, start: Graph, flags: Mapping[str, Flags], feeds: Sequence[Feed], only: Collection[str], visit: Visit
    ) -> dict[str, NDArray[Any]]:
        layers = [layer for layer in self._plan.layers if layer.weight in only]
        return sweep(self._original, start, self._plan, layers, feeds, flags, self._removed, visit, seed=self._seed, threads=self._threads)


def _effort(pools: Sequence[Pool], pattern: tuple[int, int] | None) -> Effort:
    """What the sweeps take, with all layers at the density of the whole."""
    steps = max((pool.steps for pool in pools), default=0)
    layers = [layer for pool in pools for layer in pool.layers]
    share = sum(pool.budget for pool in pools) / max(sum(int(np.prod(layer.view.shape)) for layer in layers), 1)
    densities = [share ** (step / steps) for step in range(steps)]
    return plan_effort(layers, densities, ROUNDS if steps and pattern is None else 0, share)
