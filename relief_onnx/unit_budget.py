"""How many units of every coupling group stay: by one ranking over the whole network, or down to a share of the MACs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from relief_onnx.channels import Choice, Group, Keep, by_share, choose, consumer_shares, groups, obstacle, relevance
from relief_onnx.coupling import Coupling
from relief_onnx.layers import Layer, Plan
from relief_onnx.scoring import Scores

__all__ = ["COST_EXPONENT", "choose_units", "macs_left", "unit_values"]

# Units are ranked by importance / MACs^exponent, between importance alone (0) and importance per MAC (1); see docs/flow.md.
COST_EXPONENT = 0.75
# Values of alpha that are told apart where a local criterion is cut to a budget.
STEPS = 1 << 14


def choose_units(
    plan: Plan, coupling: Coupling, scores: Scores, *, alpha: Callable[[Layer], float], keep: float | None, macs: Mapping[str, float],
    allowed: frozenset[str], round_to: int, importance: Mapping[int, float] | None = None, exponent: float = COST_EXPONENT,
) -> list[Choice]:  # fmt: skip
    """The units that go. Scores of flow are ranked over the whole network, others within each group.

    alpha: share of the importance that stays, in (0, 1]. keep: instead of it, the share of MACs that stays at most. macs: of every layer by
    name, in any unit. importance: of units, instead of that by flow; they are ranked by importance / MACs^exponent.
    """
    by_flow = all(score.relevance is not None for score in scores.values())
    grouped = groups(plan, coupling)
    values = importance or unit_values(plan, coupling, scores)
    worth = _worths(plan, coupling, values, macs, exponent) if by_flow else values

    def chosen(rule: Keep) -> list[Choice]:
        return choose(grouped, coupling, worth, rule, allowed=allowed, round_to=round_to)

    ranked = [group for group in grouped if not obstacle(group, values, allowed)]
    if keep is None:
        return chosen(_above_share(ranked, worth, values, alpha) if by_flow else by_share(alpha))
    levels = sorted({worth.get(unit, 0.0) for group in ranked for unit in group.free}) or [0.0]

    def strict(place: int) -> Keep:
        return _above(lambda group: levels[place], worth) if by_flow else by_share(lambda layer: 1.0 - place / STEPS)

    def fits(choices: Sequence[Choice]) -> bool:
        removed = frozenset(unit for choice in choices for unit in choice.removed)
        return macs_left(plan, coupling, removed, macs) <= keep * sum(macs.values())

    rule = strict(_first(lambda place: fits(chosen(strict(place))), len(levels) if by_flow else STEPS))
    return chosen(rule) if round_to == 1 else _filled(chosen, rule, fits, worth)


def unit_values(plan: Plan, coupling: Coupling, scores: Scores) -> dict[int, float]:
    """Importance of units: by flow where that was measured, else their share in what reads them."""
    by_flow = all(score.relevance is not None for score in scores.values())
    return (relevance if by_flow else consumer_shares)(plan, coupling, scores)


def _first(fits: Callable[[int], bool], count: int) -> int:
    """The first of `count` cuts, ordered from lenient to strict, that fits; else the last."""
    low, high = 0, count - 1
    while low < high:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle + 1
    return high


def _filled(
    chosen: Callable[[Keep], list[Choice]], rule: Keep, fits: Callable[[Sequence[Choice]], bool], worth: Mapping[int, float]
) -> list[Choice]:
    """What `rule` keeps and, the best first, what still fits: numbers of units are rounded, so the last to go may leave a large gap."""
    least: dict[int, int] = {}

    def keep(group: Group, shares: Sequence[float], units: Sequence[int]) -> int:
        return max(rule(group, shares, units), least.get(id(group), 0))

    found = chosen(keep)
    open_to_more = {id(choice.group): choice for choice in found if choice.removed}
    while open_to_more:
        best = max(open_to_more, key=lambda key: max(worth.get(unit, 0.0) for unit in open_to_more[key].removed))
        choice, before = open_to_more.pop(best), least.get(best, 0)
        ranking = sorted(choice.group.free, key=lambda unit: -worth.get(unit, 0.0))
        least[best] = 1 + next(place for place, unit in enumerate(ranking) if unit in choice.removed)
        more = chosen(keep)
        if fits(more):
            found = more
            open_to_more |= {id(other.group): other for other in found if other.group is choice.group and other.removed}
        else:
            least[best] = before
    return found


def macs_left(plan: Plan, coupling: Coupling, removed: frozenset[int], macs: Mapping[str, float]) -> float:
    """MACs of all layers without some units: of each the share of its connections that stay."""
    gone = np.array(sorted(removed), np.int64)
    total = 0.0
    for layer in plan.layers:
        rows = ~np.isin(coupling.outputs[layer.key], gone).reshape(layer.groups, -1)
        columns = ~np.isin(coupling.inputs[layer.key], gone).reshape(layer.groups, -1)
        kept = float((rows.mean(1) * columns.mean(1)).mean())
        total += macs.get(layer.name, 0.0) * kept
    return total


def _costs(plan: Plan, coupling: Coupling, macs: Mapping[str, float]) -> dict[int, float]:
    """MACs that go with a unit alone: its rows in the layers that make it, its columns in those that read it."""
    found: dict[int, float] = {}

    def add(units: NDArray[np.int64], each: float) -> None:
        for unit in units.tolist():
            found[unit] = found.get(unit, 0.0) + each

    for layer in plan.layers:
        work = macs.get(layer.name, 0.0)
        add(coupling.outputs[layer.key], work / layer.out_channels)
        if layer.groups == 1 or layer.in_per_group > 1:
            add(coupling.inputs[layer.key], work / (layer.groups * layer.in_per_group))
    return found


def _worths(plan: Plan, coupling: Coupling, values: Mapping[int, float], macs: Mapping[str, float], exponent: float) -> dict[int, float]:
    costs = _costs(plan, coupling, macs)
    return {unit: value / max(costs.get(unit, 0.0), 1.0) ** exponent for unit, value in values.items()}


def _above(level: Callable[[Group], float], worth: Mapping[int, float]) -> Keep:
    """The units whose worth is above a level."""

    def keep(group: Group, shares: Sequence[float], units: Sequence[int]) -> int:
        return sum(worth.get(unit, 0.0) > level(group) for unit in units)

    return keep


def _above_share(ranked: Sequence[Group], worth: Mapping[int, float], values: Mapping[int, float], alpha: Callable[[Layer], float]) -> Keep:
    """Groups with one alpha are ranked together: the shortest prefix by worth that carries the share alpha of their importance."""
    pools: dict[float, list[Group]] = {}
    for group in ranked:
        pools.setdefault(max(alpha(layer) for layer in group.layers or group.readers), []).append(group)
    levels: dict[float, float] = {}
    for share, own in pools.items():
        units = np.array([unit for group in own for unit in group.free])
        values_of, worth_of = (np.array([table.get(unit, 0.0) for unit in units.tolist()]) for table in (values, worth))
        order = np.argsort(-worth_of, kind="stable")
        running = np.cumsum(values_of[order])
        last = int(np.searchsorted(running, share * running[-1])) if share < 1.0 else int((values_of > 0).sum()) - 1
        levels[share] = float(np.nextafter(worth_of[order][min(last, len(order) - 1)], -np.inf))
    return _above(lambda group: levels[max(alpha(layer) for layer in group.layers or group.readers)], worth)
