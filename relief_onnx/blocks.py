"""N:M patterns where units go as well: blocks are those of the weight in the file, which has lost columns."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import numpy as np
import onnx
from numpy.typing import NDArray

from relief_onnx.cut import worths
from relief_onnx.datatypes import Kept
from relief_onnx.decide import Chosen
from relief_onnx.graph import Graph
from relief_onnx.layers import find
from relief_onnx.masks import Masks, applied, initializer_masks, whole_units
from relief_onnx.options import Options
from relief_onnx.patterns import keep_pattern, parse_pattern
from relief_onnx.prepared import Prepared
from relief_onnx.scoring import Scores
from relief_onnx.state_changes import cut_states
from relief_onnx.surgery import apply_weights
from relief_onnx.two_ways import crossed

__all__ = ["across_blocks", "in_blocks"]

Flags = NDArray[np.bool_]
Gated = Callable[[onnx.ModelProto], onnx.ModelProto]


def in_blocks(
    ready: Prepared, options: Options, chosen: Chosen, scores: Scores, graph: Graph, masks: Masks, allowed: Masks, gated: Gated, *,
    again: bool = False,
) -> Masks:  # fmt: skip
    """Masks whose pattern, where one is asked for, holds in the file; a weight that loses no columns keeps its mask.

    graph: what is masked. allowed: what may stay. gated: what the paper's rules add to the masked model. again: in weights that lose
    columns choose anew by the scores, instead of keeping what was chosen as far as it fits.
    """
    if options.pattern is None or not options.cuts_units:
        return masks
    n, m = parse_pattern(options.pattern)
    plan = find(graph)
    readers = plan.by_weight()
    wide = {name for name in masks.keep if name in readers and masks.keep[name].shape[1] >= m}
    worth = {entry.weight: entry.flow for entry in worths(ready.plan, scores, frozenset(wide))}
    while True:
        kept = _kept(ready, options, chosen, graph, gated(apply_weights(graph.model, applied(graph, initializer_masks(plan, masks)))))
        fitted = {}
        for name in wide & kept.keys():
            box, held = crossed(*kept[name]), masks.keep[name]
            width, fits = held[box].shape[1], not np.any(held & ~keep_pattern(held.astype(np.float64), n, m))
            if width and (width < held.shape[1] or not fits):
                keep = np.zeros_like(held)
                keep[box] = _fit(held[box], allowed.keep[name][box], worth[name][box], n, m, again)
                keep = whole_units(readers[name], keep)
                if not np.array_equal(keep, held):
                    fitted[name] = keep
        # What is gone stays gone, as what it read and what read it is not chosen any more, so this ends.
        if not fitted:
            return masks
        masks = replace(masks, keep={**masks.keep, **fitted})


def _kept(ready: Prepared, options: Options, chosen: Chosen, graph: Graph, masked: onnx.ModelProto) -> Kept:
    """Rows and columns of every weight that surgery would leave."""
    coupling = chosen.coupling if options.allow_state_change else None
    return cut_states(masked, masked, ready.graph, ready.plan, coupling)[0].kept


def _fit(held: Flags, allowed: Flags, worth: NDArray[np.float64], n: int, m: int, again: bool) -> Flags:
    """In every block the n best of what may stay, by worth, or those that are held first; a row that holds nothing stays empty."""
    rank = np.empty(worth.size, np.int64)
    rank[np.argsort(worth.reshape(-1), kind="stable")] = np.arange(1, worth.size + 1)
    ranks = np.where(allowed | held, rank.reshape(worth.shape), 0) + (0 if again else held * worth.size)
    rows = held.reshape(len(held), -1).any(1)
    return keep_pattern(ranks.astype(np.float64), n, m) & (allowed | held) & rows.reshape(-1, *(1,) * (held.ndim - 1))


def across_blocks(model: onnx.ModelProto, weights: Collection[str], pattern: str) -> list[str]:
    """A sentence for each weight whose pattern holds for one node that reads it and not for another, which reads it turned round."""
    (n, m), graph, found = parse_pattern(pattern), Graph(model), []
    for weight, layers in find(graph).by_weight().items():
        flags = [layer.view.apply(graph.array(weight)) != 0 for layer in layers] if weight in weights else []
        held = [not np.any(item & ~keep_pattern(item.astype(np.float64), n, m)) for item in flags]
        if any(held) and not all(held):
            names = [
                ", ".join(layer.name for layer, is_so in zip(layers, held, strict=True) if is_so is wanted) for wanted in (True, False)
            ]
            found.append(f"{weight} has the pattern {pattern} along the inputs of {names[0]}, not along those of {names[1]}")
    return found
