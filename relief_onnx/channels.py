"""Whole units: how much each matters, which of a coupling group stay, and the masks that switch the others off.

A unit is a channel, neuron or head with everything that is coupled to it. Its importance is its relevance R, or for a score that is
local to a layer the mean share that it has in the layers that read it (DESIGN section 2, Granularity).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from relief_onnx.coupling import Coupling, Units
from relief_onnx.graph import Graph
from relief_onnx.layers import Layer, Plan
from relief_onnx.masks import Masks
from relief_onnx.scoring import LayerScore, Scores

__all__ = [
    "Choice",
    "Group",
    "Keep",
    "by_share",
    "choose",
    "consumer_shares",
    "groups",
    "obstacle",
    "relevance",
    "unit_masks",
    "without_units",
]

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Group:
    """Units that the same layers (or stored tables) emit, so that they are ranked together.

    `free` can go; `pinned` can not, each with its reason. `width`: the fewest channels that one unit takes in any of the layers.
    """

    members: tuple[str, ...]
    layers: tuple[Layer, ...]
    readers: tuple[Layer, ...]
    free: tuple[int, ...]
    pinned: Mapping[int, str]
    width: int

    @property
    def size(self) -> int:
        """Units, free or not."""
        return len(self.free) + len(self.pinned)


@dataclass(frozen=True)
class Choice:
    """What happens to one group: the units that go, and a sentence why (not more of) them."""

    group: Group
    removed: frozenset[int]
    reason: str


def _units(line: Units) -> set[int]:
    return {unit for unit in line.tolist() if unit >= 0}


def groups(plan: Plan, coupling: Coupling) -> list[Group]:
    """Every coupling group, in graph order."""
    emitted: list[tuple[str, Layer | None, set[int]]] = [(layer.name, layer, _units(coupling.outputs[layer.key])) for layer in plan.layers]
    emitted += [(name, None, _units(coupling.pictures[name].reshape(-1))) for name in coupling.sources]
    merged: list[tuple[list[tuple[str, Layer | None]], set[int]]] = []
    for name, layer, units in emitted:
        touching = [entry for entry in merged if entry[1] & units]
        merged = [entry for entry in merged if not entry[1] & units]
        owners = [owner for entry in touching for owner in entry[0]]
        merged.append(([*owners, (name, layer)], units.union(*(entry[1] for entry in touching))))
    order = {layer.name: layer.node for layer in plan.layers}
    merged.sort(key=lambda entry: min(order.get(name, -1) for name, _ in entry[0]))
    return [_group(plan, coupling, owners, units) for owners, units in merged]


def _group(plan: Plan, coupling: Coupling, owners: Sequence[tuple[str, Layer | None]], units: set[int]) -> Group:
    layers = tuple(layer for _, layer in owners if layer is not None)
    readers = tuple(layer for layer in plan.layers if units & _units(coupling.inputs[layer.key]))
    lines = [coupling.outputs[layer.key] for layer in layers] + [coupling.inputs[layer.key] for layer in readers]
    width = min((_width(line, units) for line in lines), default=1)
    return Group(
        tuple(name for name, _ in owners),
        layers,
        readers,
        tuple(sorted(unit for unit in units if unit not in coupling.pinned)),
        {unit: coupling.pinned[unit] for unit in sorted(units) if unit in coupling.pinned},
        max(width, 1),
    )


def _width(line: Units, units: set[int]) -> int:
    """Channels that each unit has in a line, at least."""
    own, counts = np.unique(line[np.isin(line, list(units))], return_counts=True)
    return int(counts.min()) if own.size else 1


def consumer_shares(plan: Plan, coupling: Coupling, scores: Scores) -> dict[int, float]:
    """Importance of a unit: over the layers that read it, its mean share in their neurons or filters, summed."""
    found: dict[int, float] = {}
    for layer in plan.layers:
        shares = scores[layer.name].score.reshape(layer.groups, -1, layer.in_per_group, *scores[layer.name].score.shape[2:])
        per_channel = shares.reshape(*shares.shape[:3], -1).sum((1, 3)).reshape(-1) / layer.out_channels
        for unit, share in zip(coupling.inputs[layer.key].tolist(), per_channel.tolist(), strict=True):
            if unit >= 0:
                found[unit] = found.get(unit, 0.0) + share
    return found


def relevance(plan: Plan, coupling: Coupling, scores: Scores) -> dict[int, float]:
    """Importance of a unit by flow: R of all the channels that are coupled in it, summed over the layers that make them.

    Of a unit that only stored tables make (an embedding): the flow that the layers which read it take from it.
    """
    found: dict[int, float] = {}
    for layer in plan.layers:
        own = scores[layer.name].relevance
        assert own is not None
        for unit, share in zip(coupling.outputs[layer.key].tolist(), own.tolist(), strict=True):
            if unit >= 0:
                found[unit] = found.get(unit, 0.0) + share
    made = set(found)
    for layer in plan.layers:
        flow = scores[layer.name].flow.reshape(layer.groups, -1, layer.in_per_group, *scores[layer.name].score.shape[2:])
        taken = flow.reshape(*flow.shape[:3], -1).sum((1, 3)).reshape(-1)
        for unit, share in zip(coupling.inputs[layer.key].tolist(), taken.tolist(), strict=True):
            if unit >= 0 and unit not in made:
                found[unit] = found.get(unit, 0.0) + share
    return found


# How many of a group's units stay, given their importance in descending order and their numbers.
Keep = Callable[[Group, Sequence[float], Sequence[int]], int]


def by_share(alpha: Callable[[Layer], float]) -> Keep:
    """The shortest prefix that carries the share alpha of the group's importance (in [0, 1]); of a group with k readers the share
    1 - (1 - alpha) / k: what several layers read is lost to each of them, so the losses of all readers together are those of one."""

    def keep(group: Group, shares: Sequence[float], units: Sequence[int]) -> int:
        wanted = 1.0 - (1.0 - max(alpha(layer) for layer in group.layers or group.readers)) / len(group.readers)
        running = np.cumsum(shares)
        return int((np.array(shares) > 0).sum()) if wanted >= 1.0 else int(np.searchsorted(running, wanted * running[-1])) + 1

    return keep


def choose(
    grouped: Sequence[Group], coupling: Coupling, values: Mapping[int, float], keep: Keep, *, allowed: frozenset[str], round_to: int
) -> list[Choice]:
    """Per group the units that `keep` says, sorted by importance, rounded up until every layer has a multiple of `round_to` channels.

    Nothing that is tied to a weight outside `allowed` goes.
    """
    found = [_choose_in(group, coupling, values, keep, allowed, round_to) for group in grouped]
    return _leave_no_tensor_empty(coupling, found, values)


def obstacle(group: Group, values: Mapping[int, float], allowed: frozenset[str]) -> str:
    """Why a group is not ranked; empty where it is."""
    if not group.free:
        return next(iter(group.pinned.values()), "it has no channels of its own")
    excluded = [layer.name for layer in (*group.layers, *group.readers) if layer.weight not in allowed]
    if excluded:
        return f"--skip or --only leaves {excluded[0]} alone, which makes or reads them too"
    if not group.readers:
        return "no layer reads it, so the share that it carries is not known"
    return "" if any(values.get(unit, 0.0) > 0 for unit in group.free) else "its measured share is 0 everywhere"


def _choose_in(group: Group, coupling: Coupling, values: Mapping[int, float], keep: Keep, allowed: frozenset[str], round_to: int) -> Choice:
    reason = obstacle(group, values, allowed)
    if reason:
        return Choice(group, frozenset(), reason)
    shares = np.array([values.get(unit, 0.0) for unit in group.free])
    order = np.argsort(-shares, kind="stable")
    best = np.array(group.free)[order].tolist()
    kept = keep(group, shares[order].tolist(), best)
    stays = _rounded_up(group, coupling, {*best[:kept], *group.pinned}, best, round_to)
    removed = frozenset(unit for unit in best if unit not in stays)
    if removed:
        return Choice(group, removed, f"units below the cut: {len(removed)} of {group.size}")
    if kept < len(best):
        return Choice(
            group, removed, f"rounded up to a multiple of {round_to} channels, all of them stay; a smaller --round-to removes more"
        )
    return Choice(group, removed, "every unit is above the cut")


def _rounded_up(group: Group, coupling: Coupling, kept: set[int], best: Sequence[int], round_to: int) -> set[int]:
    """Add units, best first, until every layer of the group makes, and reads of it alone, a multiple of `round_to` channels, or all."""
    own = {*group.free, *group.pinned}
    # Of a recurrent layer the hidden units count, not their gate rows.
    made = [coupling.outputs[layer.key][: layer.width].tolist() for layer in group.layers]
    read = [coupling.inputs[layer.key][: layer.in_per_group if layer.recurrent else None].tolist() for layer in group.readers]
    lines = sorted({tuple(line) for line in (*made, *(line for line in read if own.issuperset(line)))}, key=len)
    stays, before = {*kept, *best[:1]}, -1
    while len(stays) > before:
        before = len(stays)
        for line in lines:
            counts = Counter(line)
            count = sum(number for unit, number in counts.items() if unit in stays)
            wanted = min(-(-count // round_to) * round_to, len(line))
            for unit in best:
                if count >= wanted:
                    break
                if unit in counts and unit not in stays:
                    stays.add(unit)
                    count += counts[unit]
    return stays


def _leave_no_tensor_empty(coupling: Coupling, found: list[Choice], values: Mapping[int, float]) -> list[Choice]:
    """A part of a group that goes its own way (a slice, a half of a split) keeps its best unit."""
    removed = {unit for choice in found for unit in choice.removed}
    back: set[int] = set()
    for picture in coupling.pictures.values():
        own = set(np.unique(picture).tolist())
        if picture.size > 1 and own <= removed - back:
            back.add(max(sorted(own), key=lambda unit: values.get(unit, 0.0)))
    return [
        Choice(choice.group, choice.removed - back, choice.reason + ("; a part of it keeps its last one" if choice.removed & back else ""))
        for choice in found
    ]


def without_units(plan: Plan, coupling: Coupling, scores: Scores, removed: Iterable[int]) -> dict[str, LayerScore]:
    """Scores in which what reads or makes a removed unit counts 0, so that a finer rule shares out what is left."""
    gone = np.array(sorted(removed), np.int64)
    found = {}
    for layer in plan.layers:
        score, bias = scores[layer.name].score.copy(), scores[layer.name].bias_score.copy()
        rows = np.isin(coupling.outputs[layer.key], gone)
        columns = np.isin(coupling.inputs[layer.key], gone).reshape(layer.groups, -1)
        score[np.repeat(columns, layer.out_channels // layer.groups, 0)] = 0
        score[rows], bias[rows] = 0, 0
        found[layer.name] = replace(scores[layer.name], score=score, bias_score=bias)
    return found


def unit_masks(graph: Graph, plan: Plan, coupling: Coupling, removed: frozenset[int], masks: Masks) -> Masks:
    """Masks that also switch whole units off: zeros in every weight, bias, scale and shift along their entries."""
    flags: dict[str, Flags] = {}
    fixed = {tie.initializer for tie in coupling.ties if not tie.zeroable}
    gone = np.array(sorted(removed), np.int64)
    for tie in coupling.ties:
        stays = ~np.isin(tie.units, gone)
        if tie.initializer in fixed or stays.all() or not graph.is_float(tie.initializer):
            continue
        shape = tuple(graph.initializers[tie.initializer].dims)
        flags[tie.initializer] = flags.get(tie.initializer, np.ones(shape, bool)) & tie.spread(stays, len(shape))
    keep, bias_keep = dict(masks.keep), dict(masks.bias_keep)
    for weight, layers in plan.by_weight().items():
        layer = layers[0]
        if weight in flags:
            own = layer.view.apply(flags.pop(weight))
            whole = own.reshape(*own.shape[:2], -1).any(-1)
            before = keep.get(weight, np.ones(whole.shape, bool))
            keep[weight] = before & whole.reshape(*whole.shape, *(1,) * (before.ndim - 2))
            bias_keep.setdefault(weight, np.ones(layer.out_channels, bool))
        if layer.bias is not None and not layer.bias.shared and len(layers) == 1 and layer.bias.name in flags and weight in keep:
            bias_keep[weight] = bias_keep[weight] & layer.bias.view.apply(flags.pop(layer.bias.name))
    vectors = {**masks.vectors}
    for name, own in flags.items():
        vectors[name] = vectors.get(name, np.ones(own.shape, bool)) & own
    return Masks(keep, bias_keep, vectors)
