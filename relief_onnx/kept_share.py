"""`--keep` says what is left in the end: units that the cut leaves without inputs or readers take their other weights with them.

So a larger share is cut to, until what survives is the share that was asked for (the secant method: a few masks and cuts, no inference).
"""

from __future__ import annotations

from collections.abc import Callable

from relief_onnx.cut import Floor
from relief_onnx.graph import Graph
from relief_onnx.layers import Plan
from relief_onnx.masks import Masks, applied, initializer_masks
from relief_onnx.surgery import apply_weights, operate

__all__ = ["reaching"]

# How much less than the share may be left, as a part of it, and how many more shares are tried.
SHORT, TRIES = 0.02, 5


def reaching(
    graph: Graph, plan: Plan, keep: float, every: Masks, masks_at: Callable[[float], tuple[Masks, tuple[Floor, ...]]]
) -> tuple[Masks, tuple[Floor, ...]]:
    """What `masks_at` finds for the share (in (0, 1], of all weights that it masks) that leaves `keep` of them alive, or a little less.

    every: masks that keep all; what nobody reads even then is no reason to keep more of the others.
    """
    found = masks_at(keep)
    share, left = keep, _alive(graph, plan, found[0])
    if left >= (1 - SHORT) * keep:
        return found
    goal = keep * _alive(graph, plan, every)
    best, slope = (left, found), 1.0
    for _ in range(TRIES):
        asked = min(max(share + ((1 - SHORT / 4) * goal - left) / slope, keep), 1.0)
        if best[0] >= (1 - SHORT) * goal or asked == share:
            break
        found = masks_at(asked)
        now = _alive(graph, plan, found[0])
        slope = max((now - left) / (asked - share), 1.0)
        share, left = asked, now
        if best[0] < left <= goal:
            best = left, found
    return best[1]


def _alive(graph: Graph, plan: Plan, masks: Masks) -> float:
    """The share of the masked weights that stays when dead units are gone."""
    flags = initializer_masks(plan, masks)
    surviving = operate(apply_weights(graph.model, applied(graph, flags))).surviving
    left = total = 0
    for weight, keep in masks.keep.items():
        alive = surviving[weight]
        left += int((keep.reshape(*keep.shape, *(1,) * (alive.ndim - keep.ndim)) & alive).sum())
        total += alive.size
    return left / max(total, 1)
