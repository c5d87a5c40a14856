"""Whole units: how much each matters, which of a coupling group stay, and the masks that switch the others off.

A unit is a channel, neuron or head with everything that is coupled to it. Its importance is an exchangeable function of the scores;
the one here is the mean share that it has in the layers that read it (DESIGN section 2, Granularity).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from relief_onnx.coupling import Coupling, Units
from relief_onnx.graph import Graph
from relief_onnx.layers import Layer, Plan
from relief_onnx.masks import Masks
from relief_onnx.scoring import LayerScore, Scores

__all__ = ["Choice", "Group", "choose", "consumer_shares", "groups", "unit_masks", "without_units"]

Flags = NDArray[np.bool_]
Importance = Callable[[Plan, Coupling, Scores], Mapping[int, float]]


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
    emitted: list[tuple[str, Layer | None, set[int]]] = [(layer.name, layer, _units(coupling.outputs[layer.node])) for layer in plan.layers]
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
    readers = tuple(layer for layer in plan.layers if units & _units(coupling.inputs[layer.node]))
    lines = [coupling.outputs[layer.node] for layer in layers] + [coupling.inputs[layer.node] for layer in readers]
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
        for unit, share in zip(coupling.inputs[layer.node].tolist(), per_channel.tolist(), strict=True):
            if unit >= 0:
                found[unit] = found.get(unit, 0.0) + share
    return found


def choose(
    plan: Plan,
    coupling: Coupling,
    scores: Scores,
    *,
    alpha: Callable[[Layer], float],
    allowed: frozenset[str],
    round_to: int,
    importance: Importance = consumer_shares,
) -> list[Choice]:
    """Per group the shortest prefix of units, sorted by importance, that carries the share alpha of it (in [0, 1]); of a group with k
    readers the share 1 - (1 - alpha) / k, so that the losses of all its readers together are those of one. Rounded up until every
    layer has a multiple of `round_to` channels. Nothing that is tied to a weight outside `allowed` goes."""
    values = importance(plan, coupling, scores)
    found = [_choose_in(group, coupling, values, alpha, allowed, round_to) for group in groups(plan, coupling)]
    return _leave_no_tensor_empty(coupling, found, values)


def _choose_in(
    group: Group, coupling: Coupling, values: Mapping[int, float], alpha: Callable[[Layer], float], allowed: frozenset[str], round_to: int
) -> Choice:
    def nothing(reason: str) -> Choice:
        return Choice(group, frozenset(), reason)

    if not group.free:
        return nothing(next(iter(group.pinned.values()), "it has no channels of its own"))
    excluded = [layer.name for layer in (*group.layers, *group.readers) if layer.weight not in allowed]
    if excluded:
        return nothing(f"--skip or --only leaves {excluded[0]} alone, which makes or reads them too")
    if not group.readers:
        return nothing("no layer reads it, so the share that it carries is not known")
    alphas = [alpha(layer) for layer in group.layers or group.readers]
    free = np.array(group.free)
    shares = np.array([values.get(unit, 0.0) for unit in group.free])
    order = np.argsort(-shares, kind="stable")
    running = np.cumsum(shares[order])
    if running[-1] <= 0:
        return nothing("its measured share is 0 everywhere")
    # What several layers read is lost to each of them: the losses of all readers together are those of one.
    wanted = 1.0 - (1.0 - max(alphas)) / len(group.readers)
    kept = int((shares > 0).sum()) if wanted >= 1.0 else int(np.searchsorted(running, wanted * running[-1])) + 1
    best = free[order].tolist()
    stays = _rounded_up(group, coupling, {*best[:kept], *group.pinned}, best, round_to)
    removed = frozenset(unit for unit in best if unit not in stays)
    if removed:
        return Choice(group, removed, f"units below the cut: {len(removed)} of {group.size}")
    if kept < len(free):
        return nothing(f"rounded up to a multiple of {round_to} channels, all of them stay; a smaller --round-to removes more")
    return nothing(f"every unit is needed at alpha {wanted:.3g}")


def _rounded_up(group: Group, coupling: Coupling, kept: set[int], best: Sequence[int], round_to: int) -> set[int]:
    """Add units, best first, until every layer of the group makes, and reads of it alone, a multiple of `round_to` channels, or all."""
    own = {*group.free, *group.pinned}
    made = [coupling.outputs[layer.node].tolist() for layer in group.layers]
    read = [coupling.inputs[layer.node].tolist() for layer in group.readers]
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
        rows = np.isin(coupling.outputs[layer.node], gone)
        columns = np.isin(coupling.inputs[layer.node], gone).reshape(layer.groups, -1)
        score[np.repeat(columns, layer.out_channels // layer.groups, 0)] = 0
        score[rows], bias[rows] = 0, 0
        found[layer.name] = LayerScore(layer.weight, layer.name, score, bias)
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
        line = stays.reshape([-1 if axis == tie.axis else 1 for axis in range(len(shape))])
        flags[tie.initializer] = flags.get(tie.initializer, np.ones(shape, bool)) & line
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
