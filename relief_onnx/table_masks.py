"""Masks of the embedding tables that the user names: ranked apart from the layers, by smoothed frequencies (see `embeddings`)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from relief_onnx.cut import cut
from relief_onnx.decide import Chosen, local_alpha, pools
from relief_onnx.embeddings import smoothed, table_score
from relief_onnx.graph import Graph
from relief_onnx.layers import Plan
from relief_onnx.masks import Masks, make_masks
from relief_onnx.options import Options
from relief_onnx.scoring import Scores

__all__ = ["table_masks", "unranked"]


def table_masks(graph: Graph, plan: Plan, options: Options, scores: Scores, weights: frozenset[str], chosen: Chosen) -> Chosen:
    """`chosen` with masks of the tables among `weights`: ranked apart from the layers, with their alpha, or the same share of their own."""
    named = tuple(layer for layer in plan.tables if layer.weight in weights)
    if not named:
        return chosen
    own = Plan(named, ())
    ready = {}
    for layer in named:
        score = scores[layer.name]
        counts = score.counts
        ready[layer.name] = score if counts is None else table_score(graph, layer, counts, score.relevance, smoothed(counts))
        if ready[layer.name].score.ndim > 2:
            ready[layer.name] = replace(ready[layer.name], score=ready[layer.name].score.reshape(layer.view.shape[:2]))
    keep = None if options.by_channel else options.keep
    if options.by_flow or keep is not None:
        found, floors = cut(own, ready, pools(own, options, weights, keep), keep)
    else:
        found, floors = make_masks(own, ready, weights, local_alpha(options), False), ()
    masks = replace(chosen.masks, keep={**chosen.masks.keep, **found.keep})
    every = {weight: np.ones_like(flags) for weight, flags in found.keep.items()}
    allowed: Masks = replace(chosen.allowed, keep={**chosen.allowed.keep, **every})
    return replace(chosen, masks=masks, allowed=allowed, floors=(*chosen.floors, *floors))


def unranked(plan: Plan, options: Options, weights: frozenset[str]) -> dict[str, str]:
    """The named tables among `weights` that a run has to leave alone, and why."""
    reason = ""
    if options.fine is None:
        reason = "whole channels are removed, and a table loses them with the layers that it is coupled to"
    elif options.pattern is not None:
        reason = "the pattern is one of inputs that a neuron reads side by side; the rows of a table are read one at a time"
    return {weight: reason for weight in plan.by_table() if weight in weights} if reason else {}
