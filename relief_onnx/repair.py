"""Repair without gradients: layer after layer, the weights that are left are solved for again, so that the layer emits what it used to.

Layer by layer in graph order: its inputs are those of the pruned network as repaired so far, its targets are what the original network
emits on the same samples. Where the layer's output goes into a sum with a branch that is there already (a residual block), the target is
what the *sum* should be, so that the layer makes up for what went wrong on the other branch too. Needs no labels, no gradients, no torch.
Both networks run once, piece by piece (see `replay`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from relief_onnx.aims import aim_of
from relief_onnx.dataset import Dataset
from relief_onnx.equations import Equations
from relief_onnx.graph import Graph
from relief_onnx.layers import Layer, Plan, find
from relief_onnx.nodes import chooses, runs_of
from relief_onnx.pairs import pairs_of
from relief_onnx.recurrent_equations import Loop, NoEquations, Values, inputs_of, start_of
from relief_onnx.repair_inside import Inside
from relief_onnx.replay import Replay, constant_nodes
from relief_onnx.surgery import apply_weights

__all__ = ["SAMPLES", "Repaired", "Visit", "batch_of", "few_rows_share", "refusal", "repair", "samples_of", "sweep"]

Feed = Mapping[str, NDArray[Any]]
Flags = NDArray[np.bool_]

# Samples that repair looks at, and how many of them run at a time.
SAMPLES, BATCH = 1024, 32


@dataclass(frozen=True)
class Repaired:
    """What became of a layer: its error before and after, as parts of the variance of its target, or the reason why it was left."""

    layer: Layer
    before: float | None = None
    after: float | None = None
    reason: str = ""


Visit = Callable[[Layer, Equations], dict[str, NDArray[Any]]]


def repair(
    original: Graph, masked: onnx.ModelProto, flags: Mapping[str, Flags], weights: frozenset[str], feeds: Sequence[Feed],
    *, removed: Mapping[str, Flags] | None = None, seed: int = 0, threads: int = 0, validated: bool = False, jointly: bool = True,
    progress: Callable[[str, int, int | None], None] = lambda *_: None,
) -> tuple[onnx.ModelProto, tuple[Repaired, ...]]:  # fmt: skip
    """A copy of `masked` with new values of the weights that are left, and a row for each layer of the chosen `weights`.

    original: the model before pruning. masked: the same model with zeros, perhaps with new biases. flags: by initializer, what stays.
    feeds: see `samples_of`. removed: by weight, units [out] that go as a whole. validated: see `solve`. jointly: see `sweep`. Raises
    DataError, ModelError.
    """
    graph = Graph(masked)
    plan = find(graph)
    rows = {layer.name: Repaired(layer, reason=reason) for layer in plan.layers if (reason := refusal(plan, layer, weights))}

    def visit(layer: Layer, equations: Equations) -> dict[str, NDArray[Any]]:
        progress("repair", layer.node, len(graph.nodes))
        found, errors = equations.solved(validated=validated)
        reason = "its equations have no finite solution" if equations.met else _unmet(layer, equations)
        rows[layer.name] = Repaired(layer, *errors) if found else Repaired(layer, reason=reason)
        return found

    solvable = [layer for layer in plan.layers if layer.name not in rows]
    new = sweep(original, graph, plan, solvable, feeds, flags, removed or {}, visit, seed=seed, threads=threads, jointly=jointly)
    rows |= {layer.name: Repaired(layer, reason="the rows of a table are looked up, not summed") for layer in plan.tables}
    listed = tuple(rows[layer.name] for layer in (*plan.layers, *plan.tables) if layer.weight in weights)
    return (apply_weights(masked, new) if new else masked), listed


def few_rows_share(
    original: Graph, masked: onnx.ModelProto, flags: Mapping[str, Flags], weights: frozenset[str], feeds: Sequence[Feed],
    *, removed: Mapping[str, Flags] | None = None, seed: int = 0, threads: int = 0,
) -> float:  # fmt: skip
    """The share of the weights whose layers will have so few rows that a larger ridge may do better on others.

    Asked of the first batch alone, or of as many samples where each takes its own branch. For the arguments see `repair`. Raises
    DataError, ModelError.
    """
    graph = Graph(masked)
    plan = find(graph)
    first = feeds[: BATCH // batch_of(graph)]
    few = every = 0

    def visit(layer: Layer, equations: Equations) -> dict[str, NDArray[Any]]:
        nonlocal few, every
        size = int(np.prod(layer.view.shape))
        few, every = few + size * equations.few(len(feeds) / len(first)), every + size
        return {}

    solvable = [layer for layer in plan.layers if not refusal(plan, layer, weights)]
    sweep(original, graph, plan, solvable, first, flags, removed or {}, visit, seed=seed, threads=threads)
    return few / max(every, 1)


def samples_of(graph: Graph, dataset: Dataset, limit: int = SAMPLES, seed: int = 0) -> list[Feed]:
    """At most `limit` samples in batches, the same for every sweep; one by one where each has to take its own branch."""
    return [batch.feed for batch in dataset.batches(batch_of(graph), limit=limit, seed=seed)]


def batch_of(graph: Graph) -> int:
    """Samples that run at a time."""
    return 1 if chooses(graph.nodes) else BATCH


def sweep(
    original: Graph, graph: Graph, plan: Plan, layers: Sequence[Layer], feeds: Sequence[Feed], flags: Mapping[str, Flags],
    removed: Mapping[str, Flags], visit: Visit, *, seed: int, threads: int, jointly: bool = False,
) -> dict[str, NDArray[Any]]:  # fmt: skip
    """Walk both networks side by side and ask `visit` for new initializers of each of the `layers`, which later ones see. All of them.

    jointly: layers that lost units are then fitted together with the only layer that reads them (see `pairs`).
    """
    aims = {layer.name: aim_of(original, graph, layer) for layer in layers if layer.recurrent is None}
    last = {aims[layer.name].tensor: layer for layer in layers if layer.recurrent is None}
    together = pairs_of(original, graph, layers, aims, removed) if jointly else {}
    body: Inside | None = None
    pairs, loops = plan.recurrent(), dict[int, Loop | None]()
    recurrent = [layer for layer in layers if layer.recurrent is not None]
    read = {name for layer in recurrent for name in inputs_of(original, original.producer[layer.output])}
    read |= {runs_of(graph.nodes[layer.node]) for layer in layers if layer.inside is not None}
    free = {layer.weight for layer in layers}
    new: dict[str, NDArray[Any]] = {}
    added = {aim.other for aim in aims.values()} & constant_nodes(graph).keys()
    with Replay(original, feeds, {*last, *read}, threads=threads) as before, Replay(graph, feeds, added, threads=threads) as after:
        for layer in layers:
            if layer.inside is not None and (body is None or body.node != layer.inside):
                body = Inside(original, graph, layer.inside, before, after, new)
            if layer.recurrent is not None:
                if layer.node not in loops:
                    sides: tuple[Values, Values] | None = before, after
                    if layer.inside is not None and body is not None:
                        sides = body.sides(layer, new)
                    else:
                        after.advance(start_of(graph, layer.node), new)
                        before.advance(start_of(original, original.producer[layer.output]))
                    given = original, graph, pairs[layer.node], free, flags, removed
                    loops = {layer.node: None if sides is None else Loop(*given, *sides, seed, threads)}
                loop = loops[layer.node]
                new |= visit(layer, NoEquations() if loop is None else loop.part(layer))
                continue
            aim = aims[layer.name]
            fixed = _fixed(layer, flags, removed)
            if layer.inside is not None and body is not None:
                met = body.met(layer, new)
                new |= visit(layer, Equations(graph, layer, aim, *fixed, met, met, seed))
                before.drop(aim.tensor)
                continue
            after.advance(layer.node, new)
            before.advance(original.producer[aim.tensor] + 1)
            equations = Equations(graph, layer, aim, *fixed, before, after, seed)
            new |= visit(layer, equations)
            if layer.name in together:
                pair = together[layer.name]
                before.advance(original.producer[pair.aim.tensor] + 1)
                new |= pair.fitted(graph, equations, before, after, new, _fixed(pair.reader, flags, removed), seed)
            if last[aim.tensor] is layer:
                before.drop(aim.tensor)
    return new


def _unmet(layer: Layer, equations: Equations) -> str:
    """Why a layer has no rows."""
    if layer.inside is not None:
        return "its body runs in other rounds once pruned"
    return "nothing reaches it on the samples" if equations.whole else "it meets other rows once pruned"


def _fixed(layer: Layer, flags: Mapping[str, Flags], removed: Mapping[str, Flags]) -> tuple[Flags | None, Flags | None, Flags | None]:
    """What stays of a layer's weight and of its bias, and which units go."""
    return flags.get(layer.weight), None if layer.bias is None else flags.get(layer.bias.name), removed.get(layer.weight)


def refusal(plan: Plan, layer: Layer, weights: frozenset[str]) -> str:
    """Why a layer keeps its weights as they are; empty where it can be solved for."""
    if layer.weight not in weights:
        return "not chosen"
    if len(plan.by_weight()[layer.weight]) > 1:
        return "several nodes read its weight"
    return ""
