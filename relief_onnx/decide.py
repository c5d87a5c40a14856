"""What goes: the options meet the rules. Masks from scores, at whatever granularity, and what follows for units and means."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from relief_onnx.caches import find_all_states
from relief_onnx.channels import Choice, unit_masks, without_units
from relief_onnx.coupling import Coupling
from relief_onnx.cut import Floor, Pool, cut, pattern_masks
from relief_onnx.dataset import Dataset
from relief_onnx.graph import Graph
from relief_onnx.kept_share import reaching
from relief_onnx.layers import Layer, Plan
from relief_onnx.masks import Masks, keep_all, make_masks, mask_of
from relief_onnx.measure import macs_of_layers
from relief_onnx.ops import row_of
from relief_onnx.options import Options
from relief_onnx.patterns import parse_pattern
from relief_onnx.scoring import Scores
from relief_onnx.states import NO_STATES
from relief_onnx.two_ways import paired
from relief_onnx.unit_budget import COST_EXPONENT, choose_units, macs_left, unit_values
from relief_onnx.walk import trace

__all__ = ["Choose", "Chosen", "Search", "decide", "kept_portions", "local_alpha", "pools", "shrinks", "silenced"]

# (importance of units, exponent of their MACs, share of the MACs that stays) -> what goes
Choose = Callable[[Mapping[int, float], float, float], tuple[Choice, ...]]
# (what is coupled, flow's choice, how to choose, the share of the MACs) -> a better choice
Search = Callable[[Coupling, Sequence[Choice], Choose, float], tuple[Choice, ...]]
# What units are worth by a better measure than flow.
Worth = Callable[[Coupling], Mapping[int, float]]


@dataclass(frozen=True)
class Chosen:
    """What the rules keep: masks, what happened to each coupling group, units that go as a whole, layers that a floor saved.

    allowed: what is left where only whole units go.
    """

    masks: Masks
    allowed: Masks
    choices: tuple[Choice, ...] = ()
    coupling: Coupling | None = None
    floors: tuple[Floor, ...] = ()

    def within(self, masks: Masks) -> Masks:
        """What may stay: `allowed`, without what later rules took away from the masks."""
        keep = {}
        for weight, own in masks.keep.items():
            may = self.allowed.keep[weight] if weight in self.allowed.keep else np.ones(own.shape, bool)
            taken = self.masks.keep[weight] & ~own if weight in self.masks.keep else ~own
            keep[weight] = may.reshape(*may.shape, *(1,) * (own.ndim - may.ndim)) & ~taken
        return Masks(keep, masks.bias_keep, masks.vectors)

    def removed(self, plan: Plan) -> dict[str, Any]:
        """Flags [out] of the units that go, by layer name."""
        if self.coupling is None:
            return {}
        gone = np.array(sorted(unit for choice in self.choices for unit in choice.removed), np.int64)
        return {layer.name: np.isin(self.coupling.outputs[layer.key], gone) for layer in plan.layers}


def decide(
    graph: Graph, plan: Plan, options: Options, scores: Scores, weights: frozenset[str], dataset: Dataset, search: Search | None = None,
    worth: Worth | None = None,
) -> Chosen:  # fmt: skip
    """What the rule keeps of the chosen weights: whole units first, then connections or weights inside those that stay.

    search: finds a better choice of units, given flow's. worth: what units are worth to it, to pair those of two directions by.
    """
    if not options.by_channel:
        at, every = partial(_fine_masks, plan, options, scores, weights), keep_all(plan, weights)
        # flow-obs hands on what dead units leave by itself.
        if options.keep is None or options.fine is None or options.criterion == "flow-obs":
            masks, floors = at(options.keep)
        else:
            masks, floors = reaching(graph, plan, options.keep, every, at)
        return Chosen(masks, every, floors=floors)
    coupling = trace(graph, plan, find_all_states(graph, plan) if options.allow_state_change else NO_STATES)
    if coupling.ways:
        coupling = paired(coupling, unit_values(plan, coupling, scores) if worth is None else worth(coupling))
    sample = next(iter(dataset.batches(1, limit=1)))
    macs = macs_of_layers(graph, plan, sample)

    def choose(keep: float | None, importance: Mapping[int, float] | None = None, exponent: float = COST_EXPONENT) -> tuple[Choice, ...]:
        return tuple(choose_units(
            plan, coupling, scores, alpha=_unit_alpha(options), keep=keep, macs=macs, allowed=weights, round_to=options.round_to,
            importance=importance, exponent=exponent,
        ))  # fmt: skip

    choices = choose(options.keep)
    if search is not None and any(choice.removed for choice in choices):
        gone = frozenset(unit for choice in choices for unit in choice.removed)
        share = options.keep or macs_left(plan, coupling, gone, macs) / sum(macs.values())
        choices = search(coupling, choices, lambda importance, exponent, share: choose(share, importance, exponent), share)
    removed = frozenset(unit for choice in choices for unit in choice.removed)
    inside, floors = _fine_masks(plan, options, without_units(plan, coupling, scores, removed), weights, None)
    units = unit_masks(graph, plan, coupling, removed, keep_all(plan, weights))
    return Chosen(unit_masks(graph, plan, coupling, removed, inside), units, choices, coupling, floors)


def _fine_masks(
    plan: Plan, options: Options, scores: Scores, weights: frozenset[str], keep: float | None
) -> tuple[Masks, tuple[Floor, ...]]:
    """Masks of connections or single weights: by pattern, by one ranking over the network, or neuron by neuron."""
    if options.fine is None:
        return keep_all(plan, weights), ()
    if options.pattern is not None:
        return pattern_masks(plan, scores, weights, *parse_pattern(options.pattern)), ()
    if options.by_flow or keep is not None:
        return cut(plan, scores, pools(plan, options, weights, keep), keep)
    return make_masks(plan, scores, weights, local_alpha(options), options.bias == "prune"), ()


def pools(plan: Plan, options: Options, weights: frozenset[str], keep: float | None) -> list[Pool]:
    """Weights with one and the same alpha are ranked together; where a recipe names a layer it is on its own."""
    found: dict[tuple[str, float | None], list[str]] = {}
    for weight, layers in plan.by_weight().items():
        if weight not in weights:
            continue
        names = (layers[0].name, weight)
        named = options.layer_alpha(names)
        alpha = named[1] if named is not None else None if keep is not None else local_alpha(options)(layers[0])
        found.setdefault(("" if named is None else named[0], alpha), []).append(weight)
    return [Pool(tuple(own), alpha) for (_, alpha), own in found.items()]


# How much of the mean of what goes is moved where inputs shrink: (share of the layer's flow that stays)^SHIFT_EXPONENT; see docs/flow.md.
SHIFT_EXPONENT = 2


def kept_portions(graph: Graph, plan: Plan, scores: Scores, masks: Masks, exponent: float = SHIFT_EXPONENT) -> dict[str, Any]:
    """How much of the mean of what goes biases should take over [out], by layer name; the same for all units of a layer.

    Means were measured before the cut. Inputs that are never negative shrink with what makes them: the less of a layer is left, the less
    their means hold, and the less is moved. Signed inputs (normalised ones, gates times values, linear bottlenecks) hardly do: all of it.
    """
    found = {}
    for weight, layers in plan.by_weight().items():
        for layer in layers if weight in masks.keep else ():
            score, keep = scores[layer.name], mask_of(layers, layer, masks.keep[weight])
            flow = score.score if score.relevance is None else score.flow
            kept = flow * keep.reshape(*keep.shape, *(1,) * (flow.ndim - keep.ndim)) if flow.ndim >= keep.ndim else flow * keep.any(-1)
            share = float(kept.sum()) / float(flow.sum()) if flow.sum() > 0 else 1.0
            found[layer.name] = np.full(layer.out_channels, share**exponent if shrinks(graph, layer.input) and not is_loop(layer) else 1.0)
    return found


def is_loop(layer: Layer) -> bool:
    """Whether it reads the last state of a recurrent node, which has a sign."""
    return layer.recurrent is not None and layer.recurrent.part == "R"


def shrinks(graph: Graph, tensor: str) -> bool:
    """Whether a tensor is never negative, as far as operators say: moved and pooled from one that is, or an input of the model."""
    while tensor in graph.producer:
        node = graph.nodes[graph.producer[tensor]]
        row = row_of(node)
        if row is None or row.one_sided:
            return row is not None
        if row.kind != "carry" or not node.input:
            return False
        tensor = node.input[0]
    return True


def silenced(plan: Plan, chosen: Chosen, masks: Masks) -> dict[str, Any]:
    """Units that emit 0 from now on: those that go as a whole, and those that the paper's rules switched off after the cut."""
    found = chosen.removed(plan)
    for weight, layers in plan.by_weight().items():
        if weight not in masks.keep or weight not in chosen.masks.keep:
            continue
        for layer in layers:
            keeps = (mask_of(layers, layer, part.keep[weight]) for part in (chosen.masks, masks))
            before, after = (keep.reshape(layer.out_channels, -1).any(1) for keep in keeps)
            found[layer.name] = found.get(layer.name, np.zeros(layer.out_channels, bool)) | (before & ~after)
    return found


def local_alpha(options: Options) -> Callable[[Layer], float]:
    """Alpha of a layer's connections or weights."""

    def alpha(layer: Layer) -> float:
        return options.alpha_for((layer.name, layer.weight), layer.is_convolution)

    return alpha


def _unit_alpha(options: Options) -> Callable[[Layer], float]:
    def alpha(layer: Layer) -> float:
        return options.unit_alpha_for((layer.name, layer.weight), layer.is_convolution)

    return alpha
