"""Relevance: the part of the network's output activity that every unit carries, by one walk backward over the operator table.

R is 1 in all at the outputs and goes back to the inputs (DESIGN section 2, Flow), through layers by the shares of their connections and
through all other nodes by the rules of `relevance_rules`.

A node without a row, or one whose row cannot follow a track, passes its total on evenly and is listed. Where layers lead to nothing but
choices (rows by TopK, places of samples, a condition), and so have none, what chooses gets as much as what it chooses from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from relief_onnx.graph import Graph
from relief_onnx.layers import Layer, Plan, why_stopped
from relief_onnx.leads import led_to, starved, working
from relief_onnx.moves import Barrier
from relief_onnx.nodes import handed_on, operator_of
from relief_onnx.ops import passing_row_of
from relief_onnx.recurrent import looped
from relief_onnx.relevance_rules import RULES, Activity, Ask, Doubles, NodeView, Passed, Walk, fit
from relief_onnx.tracks import Tracks

__all__ = ["Ask", "Even", "Relevance", "asks", "propagate"]


@dataclass(frozen=True)
class Even:
    """A node that passed relevance on evenly, and why."""

    node: str
    op: str
    reason: str


@dataclass(frozen=True)
class Relevance:
    """R of every tensor (rank of the tensor, sizes of its track), of every layer's outputs [out], and what was passed on evenly."""

    tensors: Mapping[str, Doubles]
    outputs: Mapping[str, Doubles]  # by layer name
    evenly: tuple[Even, ...]


def _bias_adds(plan: Plan) -> dict[int, Layer]:
    """Add nodes that are a layer's bias: its share counts in the layer's own sum."""
    return {layer.bias.node: layer for layer in plan.layers if layer.bias is not None and layer.bias.node != layer.node}


def asks(graph: Graph, plan: Plan, tracks: Tracks) -> list[Ask]:
    """Whose activity the walk needs besides what layers read, each once."""
    own = {layer.node for layer in plan.layers} | set(_bias_adds(plan))
    found: dict[Ask, None] = {}
    for index, node in enumerate(graph.nodes):
        row = passing_row_of(node)
        if index in own or row is None:
            continue
        try:
            wanted = RULES[row.flow].ask(NodeView(graph, tracks, index), row)
        except Barrier:
            continue  # passed on evenly, with this reason
        found.update(dict.fromkeys(wanted))
    return list(found)


def propagate(
    graph: Graph,
    plan: Plan,
    tracks: Tracks,
    activity: Activity,
    variation: Activity,
    shares: Mapping[str, Doubles],
    weights: Mapping[str, float],
    squared: bool = True,
    totals: Mapping[str, Doubles] | None = None,
) -> Relevance:
    """The walk.

    activity, variation: of each ask, how much it adds to a sum, and (in [0, 1]) what part of it varies. shares: by layer name
    [out, in per group]. weights: of outputs, 1 where not named. squared: whether activities add up as variances do. totals: by name
    of recurrent layers what each row brings in [out]; None: as many as it has inputs.
    """
    walk = Walk(graph, plan, tracks, activity, variation, led_to(graph, working(plan)), squared)
    outputs = _back(walk, shares, weights, totals or {})
    if starving := starved(graph, plan, walk.tensors):
        walk = replace(walk, starved=starving, tensors={}, evenly={})
        outputs = _back(walk, shares, weights, totals or {})
    evenly = (Even(graph.names[index], operator_of(graph.nodes[index]), why) for index, why in sorted(walk.evenly.items()))
    return Relevance(walk.tensors, outputs, tuple(evenly))


def _back(walk: Walk, shares: Mapping[str, Doubles], weights: Mapping[str, float], totals: Mapping[str, Doubles]) -> dict[str, Doubles]:
    """One walk from the outputs to the inputs: R of every layer's outputs."""
    graph, plan, tracks = walk.graph, walk.plan, walk.tracks
    layers, loops = plan.single(), plan.recurrent()
    adds, total = _bias_adds(plan), sum(weights.get(name, 1.0) for name in graph.outputs)
    for name in graph.outputs:
        track = tracks.of.get(name, (1,) * len(graph.shape(name) or ()))
        walk.add(name, np.full(track, weights.get(name, 1.0) / total / max(int(np.prod(track)), 1)))
    outputs: dict[str, Doubles] = {}
    inside = {layer.inside: [own for own in plan.layers if own.inside == layer.inside] for layer in plan.layers}
    for index in reversed(range(len(graph.nodes))):
        node = graph.nodes[index]
        values = [walk.tensors.get(name) if name else None for name in node.output]
        if all(own is None for own in values):
            if index in layers:
                outputs[layers[index].name] = np.zeros(layers[index].out_channels)
            for layer in loops.get(index, {}).values():
                outputs[layer.name] = np.zeros(layer.out_channels)
            continue
        if index in layers:
            outputs[layers[index].name] = own = _line(values[0], layers[index].output_axis, layers[index].out_channels)
            for name, given in _by_shares(walk, layers[index], own, shares):
                walk.add(name, given)
        elif index in loops:
            given_back, own_rows = looped(graph, node, values, loops[index], shares, totals, walk.fed)
            outputs.update(own_rows)
            for name, given in given_back:
                walk.add(name, given)
        else:
            for name, given in _passed(walk, index, values, adds):
                walk.add(name, given)
        # All that a node carries passes through each layer of its body.
        carried = sum(float(own.sum()) for own in values if own is not None)
        outputs |= {layer.name: np.full(layer.out_channels, carried / layer.out_channels) for layer in inside.get(index, ())}
    return outputs


def _by_shares(walk: Walk, layer: Layer, own: Doubles, shares: Mapping[str, Doubles]) -> Passed:
    """What a layer gives to its input, by the shares of its connections, and to a bias that other layers make. own: R of its outputs."""
    graph = walk.graph
    if layer.is_table:
        return []  # row numbers carry no activity
    back = np.einsum("gji,gj->gi", shares[layer.name].reshape(layer.groups, -1, layer.in_per_group), own.reshape(layer.groups, -1))
    shape = [1] * len(graph.shape(layer.input) or ())
    if shape:
        shape[layer.input_axis] = -1
    bias = own if layer.is_convolution else own.reshape((-1, 1) if layer.output_axis == 0 else (1, -1))
    made = walk.fed.intersection(graph.nodes[layer.node].input[2:])
    return [(layer.input, back.reshape(shape or -1)), *((name, bias) for name in made)]


def _line(values: Doubles | None, axis: int, size: int) -> Doubles:
    """R per output unit."""
    assert values is not None
    if values.ndim == 0:
        return np.full(size, float(values) / size)
    track = [1] * values.ndim
    track[axis] = size
    return fit(values, track).reshape(-1)


def _passed(walk: Walk, index: int, values: Sequence[Doubles | None], adds: Mapping[int, Layer]) -> Passed:
    """What a node that is no layer gives to its inputs."""
    at, graph = NodeView(walk.graph, walk.tracks, index), walk.graph
    row = passing_row_of(at.node)
    if index in adds and values[0] is not None:
        inner = graph.nodes[adds[index].node].output[0]
        return [(inner, values[0])]
    sources = handed_on(at.node)
    if sources:
        return [(name, own) for name, own in zip(sources, values, strict=True) if own is not None]
    lead = [name for name in dict.fromkeys(graph.read_by(index)) if name in walk.fed]
    passed: Passed = []
    total = sum(float(own.sum()) for own in values if own is not None)
    try:
        if row is None:
            raise Barrier(why_stopped(graph, walk.plan, index))
        passed = RULES[row.flow].give(walk, at, row, values)
    except Barrier as barrier:
        walk.evenly[index] = str(barrier)
    if not lead:
        walk.evenly.pop(index, None)  # nothing before it can be pruned
    elif row is None or (row.flow != "none" and not any(name in walk.fed for name, _ in passed)):
        walk.evenly.setdefault(index, "what it chooses or places by is all that leads to a layer")
        return [(name, np.asarray(total / len(lead))) for name in lead]
    elif choosing := [name for name in lead if name in walk.starved and all(name != other for other, _ in passed)]:
        walk.evenly.setdefault(index, f"what only chooses in it ({', '.join(choosing)}) gets as much as what it chooses from")
        part = 1.0 / (1 + len(choosing))
        return [(name, own * part) for name, own in passed] + [(name, np.asarray(total * part)) for name in choosing]
    return passed
