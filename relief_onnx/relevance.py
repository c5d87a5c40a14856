"""Relevance: the part of the network's output activity that every unit carries, by one walk backward over the operator table.

R is 1 in all at the outputs and goes back to the inputs (DESIGN section 2, Flow). It is held per tensor as an array of the tensor's rank
with the sizes of its track (`tracks`). A row's column `relevance` says how a node passes it:

* `through`  the first input that is an activation gets all of it, place by place (activations, norms, softmax, a numerator);
* `join`     inputs are added up: each gets its share of the activity in that channel; inputs that no layer leads to, such as constants,
             get none where there are others: nothing in them could be damaged;
* `select`   like `join` for what is chosen from; the condition gets some only where nothing else leads to a layer;
* `product`  the factors share it by their relative variance, Var(x) / mean(x^2) (what each varies of the product, to first order): a
             gate that hardly moves gets little, and x * sigmoid(x) passes on what it gets;
* `move`     entries go back to where they came from;
* `reduce`   goes back along the reduced axes in proportion to activity;
* `contract` sums of products: the factors that some layer leads to share it evenly, within a factor by the product of activities;
* `recurrent` through the weights of a recurrent layer to its inputs, round the loop until nothing is left;
* `attend`   V by channel, Q and K by head (see `attending`);
* `none`     nothing goes back (sizes).

A node without a row, or one whose row cannot follow a track, passes its total on evenly and is listed. Where layers lead to nothing but
choices (rows by TopK, places of samples, a condition), and so have none, what chooses gets as much as what it chooses from.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from relief_onnx.attending import attended
from relief_onnx.graph import Graph
from relief_onnx.layers import Layer, Plan, why_stopped
from relief_onnx.leads import led_to, starved, working
from relief_onnx.moves import Barrier, reduced_axes
from relief_onnx.nodes import handed_on, operator_of
from relief_onnx.ops import OperatorRow, passing_row_of
from relief_onnx.recurrent import around, looped, of_states, recurrent_shares
from relief_onnx.tracks import Track, Tracks, labels_of, moved

__all__ = ["Ask", "Even", "Relevance", "asks", "propagate"]

Doubles = NDArray[np.float64]
Ask = tuple[str, tuple[int, ...]]  # a tensor and the axes along which its activity is told apart
Activity = Callable[[Ask], Doubles]


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


def _axes(track: Sequence[int], rank: int) -> tuple[int, ...]:
    """The tracked axes of a node's output as axes of one of its inputs, which is broadcast to it."""
    return tuple(axis - (len(track) - rank) for axis, size in enumerate(track) if size > 1 and axis >= len(track) - rank)


class _Node:
    """What a rule sees of one node."""

    def __init__(self, graph: Graph, tracks: Tracks, index: int) -> None:
        self.graph, self.tracks, self.index = graph, tracks, index
        self.node = graph.nodes[index]

    def rank(self, name: str) -> int:
        return len(self.graph.shape(name) or ())

    def track(self, name: str) -> Track:
        return self.tracks.of.get(name, (1,) * self.rank(name))

    def data(self, row: OperatorRow) -> list[str]:
        return [name for slot, name in enumerate(self.node.input) if name and (row.data is None or slot in row.data)]

    def asked(self, name: str, track: Sequence[int]) -> Ask:
        """The activity of an input along the axes of `track` that it has itself."""
        shape = self.graph.shape(name) or ()
        return name, tuple(axis for axis in _axes(track, len(shape)) if shape[axis] != 1)


def fit(values: Doubles, track: Sequence[int]) -> Doubles:
    """Summed over what `track` does not follow, spread evenly over what only `track` follows."""
    if values.ndim != len(track):
        return np.full(track, values.sum() / max(int(np.prod(track)), 1))
    for axis, size in enumerate(track):
        if values.shape[axis] != size:
            total = values.sum(axis, keepdims=True)
            values = np.broadcast_to(total / size, (*values.shape[:axis], size, *values.shape[axis + 1 :]))
    return values


Passed = list[tuple[str, Doubles]]


@dataclass
class _Walk:
    """The walk backward. `fed`: tensors that some layer leads to. `starved`: of these, those that a layer without relevance leads to."""

    graph: Graph
    plan: Plan
    tracks: Tracks
    activity: Activity
    variation: Activity
    fed: set[str]
    squared: bool = True
    starved: set[str] = field(default_factory=set)
    tensors: dict[str, Doubles] = field(default_factory=dict)
    evenly: dict[int, str] = field(default_factory=dict)

    def add(self, name: str, values: Doubles) -> None:
        track = self.tracks.of.get(name, (1,) * len(self.graph.shape(name) or ()))
        fitted = fit(values, track)
        self.tensors[name] = self.tensors[name] + fitted if name in self.tensors else np.array(fitted)


# -- the rules: what a node wants to know, and how it passes relevance ------------------------------------------------------


def _ask_nothing(at: _Node, row: OperatorRow) -> list[Ask]:
    return []


def _ask_data(at: _Node, row: OperatorRow) -> list[Ask]:
    return [at.asked(name, at.track(at.node.output[0])) for name in at.data(row)]


def _ask_choices(at: _Node, row: OperatorRow) -> list[Ask]:
    return [at.asked(name, at.track(at.node.output[0])) for name in at.node.input[1:]]


def _ask_own(at: _Node, row: OperatorRow) -> list[Ask]:
    return [at.asked(at.node.input[0], at.track(at.node.input[0]))]


def _ask_labels(at: _Node, row: OperatorRow) -> list[Ask]:
    labels, _, sizes = labels_of(at.graph, at.node, at.tracks.of)
    return [
        (name, tuple(axis for axis, label in enumerate(own) if label in sizes and (at.graph.shape(name) or ())[axis] != 1))
        for name, own in zip(at.node.input, labels, strict=False)
    ]


def _ask_recurrent(at: _Node, row: OperatorRow) -> list[Ask]:
    states = [name for name in at.node.output[:2] if name][:1]
    return [(at.node.input[0], (2,)), *((name, _axes(at.track(name), at.rank(name))) for name in states)]


def _through(walk: _Walk, at: _Node, row: OperatorRow, values: Sequence[Doubles | None]) -> Passed:
    data = at.data(row)
    running = [name for name in data if not _is_stored(at.graph, name)] or data[:1]
    name = next((name for name in running if name in walk.fed), running[0])
    return [(name, _lowered(at, name, found)) for found in values if found is not None]


def _lowered(at: _Node, name: str, values: Doubles) -> Doubles:
    """From the rank of an output to that of an input that was broadcast to it."""
    rank = at.rank(name)
    track = at.track(name)
    if values.ndim < rank:
        return fit(values, track)
    return fit(values, (1,) * (values.ndim - rank) + tuple(track)).reshape(track)


def _is_stored(graph: Graph, name: str) -> bool:
    return name in graph.initializers or graph.constant(name) is not None


def _shared(walk: _Walk, at: _Node, inputs: Sequence[str], values: Doubles, relative: bool = False) -> Passed:
    """By activity, place by place, among the inputs that some layer leads to; evenly where nothing is active.

    `relative`: by activity in units of the mean square.
    """
    names = [name for name in inputs if name in walk.fed] or list(inputs)
    track = at.track(at.node.output[0])
    found = [(walk.variation if relative else walk.activity)(at.asked(name, track)) for name in names]
    lifted = [own.reshape((1,) * (len(track) - own.ndim) + own.shape) for own in found]
    if any(own.ndim > len(track) or any(n not in (1, m) for n, m in zip(own.shape, track, strict=True)) for own in lifted):
        raise Barrier("what it writes has other sizes than what it makes")
    total = sum(lifted, np.zeros(()))
    shares = [np.where(total > 0, own / np.where(total > 0, total, 1.0), 1.0 / len(names)) for own in lifted]
    return [(name, _lowered(at, name, values * share)) for name, share in zip(names, shares, strict=True)]


def _join(walk: _Walk, at: _Node, row: OperatorRow, values: Sequence[Doubles | None]) -> Passed:
    return _shared(walk, at, at.data(row), values[0]) if values[0] is not None else []


def _select(walk: _Walk, at: _Node, row: OperatorRow, values: Sequence[Doubles | None]) -> Passed:
    return _shared(walk, at, at.node.input[1:], values[0]) if values[0] is not None else []


def _product(walk: _Walk, at: _Node, row: OperatorRow, values: Sequence[Doubles | None]) -> Passed:
    return _shared(walk, at, at.data(row), values[0], relative=True) if values[0] is not None else []


def _move(walk: _Walk, at: _Node, row: OperatorRow, values: Sequence[Doubles | None]) -> Passed:
    if at.index not in walk.tracks.moves:
        walk.tracks.moves[at.index] = moved(at.graph, at.node, row, walk.tracks.of)
    result, why = walk.tracks.moves[at.index]
    ends = np.cumsum([int(np.prod(shape)) for shape in result.shapes])
    found = np.zeros(ends[-1])
    for places, own in zip(result.outputs, values, strict=False):
        if own is not None:
            own = np.broadcast_to(fit(own, places.shape[1:]) / len(places), places.shape)
            known = places >= 0
            np.add.at(found, places[known], own[known])
    if why:
        walk.evenly[at.index] = why
    parts = np.split(found, ends[:-1])
    return [(name, part.reshape(shape)) for name, part, shape in zip(result.names, parts, result.shapes, strict=True)]


def _reduce(walk: _Walk, at: _Node, row: OperatorRow, values: Sequence[Doubles | None]) -> Passed:
    if values[0] is None:
        return []
    name = at.node.input[0]
    track = at.track(name)
    own = walk.activity(at.asked(name, track))
    axes = tuple(sorted(reduced_axes(at.graph, at.node, len(track))))
    lifted = values[0] if values[0].ndim == len(track) else np.expand_dims(values[0], axes)
    total = own.sum(axes, keepdims=True)
    number = int(np.prod([own.shape[axis] for axis in axes]))
    return [(name, lifted * np.where(total > 0, own / np.where(total > 0, total, 1.0), 1.0 / number))]


def _contract(walk: _Walk, at: _Node, row: OperatorRow, values: Sequence[Doubles | None]) -> Passed:
    if values[0] is None:
        return []
    labels, out, sizes = labels_of(at.graph, at.node, walk.tracks.of)
    names = [name for name in at.node.input if name]
    every = list(sizes)
    products = np.ones((1,) * len(every))
    for ask, own in zip(_ask_labels(at, row), labels, strict=True):
        products = products * _aligned(walk.activity(ask), own, every)
    summed = tuple(axis for axis, label in enumerate(every) if label not in out)
    full = np.broadcast_to(products, [sizes[label] for label in every])
    number = int(np.prod([sizes[every[axis]] for axis in summed]))
    total = full.sum(summed, keepdims=True)
    share = np.where(total > 0, full / np.where(total > 0, total, 1.0), 1.0 / number)
    given = _aligned(fit(values[0], [sizes.get(label, 1) for label in out]), out, every) * share
    factors = list(zip(names, labels, strict=True))
    running = [(name, own) for name, own in factors if name in walk.fed] or factors
    passed = []
    for name, own in running:
        gone = tuple(axis for axis, label in enumerate(every) if label not in own)
        kept = [label for label in every if label in own]
        part = given.sum(gone).transpose([kept.index(label) for label in own if label in sizes])
        passed.append((name, part.reshape([sizes.get(label, 1) for label in own]) / len(running)))
    return passed


def _aligned(values: Doubles, own: Sequence[Hashable], every: Sequence[Hashable]) -> Doubles:
    """An array with the axes of the labels `own` as one with an axis for every tracked label."""
    places = [own.index(label) for label in every if label in own]
    others = tuple(axis for axis in range(len(own)) if axis not in places)
    packed: Doubles = values.sum(others, keepdims=True).transpose([*places, *others])
    sizes = iter(packed.shape)
    return packed.reshape([next(sizes) if label in own else 1 for label in every])


def _recur(walk: _Walk, at: _Node, row: OperatorRow, values: Sequence[Doubles | None]) -> Passed:
    """T = R + T P_loop, so R at the input is R (1 - P_loop)^-1 P_input."""
    total = of_states(at.graph, at.node, values)
    if total is None:
        return []
    asked = _ask_recurrent(at, row)
    inputs = walk.activity(asked[0]).reshape(-1)
    states = walk.activity(asked[1]).reshape(-1) if len(asked) > 1 else np.ones(1)
    shares = recurrent_shares(at.graph, at.node, inputs, states, walk.squared)
    if shares is None or shares.loop.shape[:2] != total.shape:
        raise Barrier("its weights are computed")
    return around(at.graph, at.node, total, shares, walk.fed)[0]


def _none(walk: _Walk, at: _Node, row: OperatorRow, values: Sequence[Doubles | None]) -> Passed:
    return []


def _attend(walk: _Walk, at: _Node, row: OperatorRow, values: Sequence[Doubles | None]) -> Passed:
    return attended(at.graph, at.node, values, walk.fed)


@dataclass(frozen=True)
class _Rule:
    ask: Callable[[_Node, OperatorRow], list[Ask]]
    give: Callable[[_Walk, _Node, OperatorRow, Sequence[Doubles | None]], Passed]


_RULES: Mapping[str, _Rule] = {
    "through": _Rule(_ask_nothing, _through),
    "join": _Rule(_ask_data, _join),
    "select": _Rule(_ask_choices, _select),
    "product": _Rule(_ask_data, _product),
    "move": _Rule(_ask_nothing, _move),
    "reduce": _Rule(_ask_own, _reduce),
    "contract": _Rule(_ask_labels, _contract),
    "recurrent": _Rule(_ask_recurrent, _recur),
    "attend": _Rule(_ask_nothing, _attend),
    "none": _Rule(_ask_nothing, _none),
}


# -- the walk -------------------------------------------------------------------------------------------------------------


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
            wanted = _RULES[row.flow].ask(_Node(graph, tracks, index), row)
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
    walk = _Walk(graph, plan, tracks, activity, variation, led_to(graph, working(plan)), squared)
    outputs = _back(walk, shares, weights, totals or {})
    if starving := starved(graph, plan, walk.tensors):
        walk = replace(walk, starved=starving, tensors={}, evenly={})
        outputs = _back(walk, shares, weights, totals or {})
    evenly = (Even(graph.names[index], operator_of(graph.nodes[index]), why) for index, why in sorted(walk.evenly.items()))
    return Relevance(walk.tensors, outputs, tuple(evenly))


def _back(walk: _Walk, shares: Mapping[str, Doubles], weights: Mapping[str, float], totals: Mapping[str, Doubles]) -> dict[str, Doubles]:
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
            layer = layers[index]
            own = _line(values[0], layer.output_axis, layer.out_channels)
            outputs[layer.name] = own
            if layer.is_table:
                continue  # row numbers carry no activity
            grouped = own.reshape(layer.groups, -1)
            back = np.einsum("gji,gj->gi", shares[layer.name].reshape(layer.groups, -1, layer.in_per_group), grouped)
            shape = [1] * len(graph.shape(layer.input) or ())
            if shape:
                shape[layer.input_axis] = -1
            walk.add(layer.input, back.reshape(shape or -1))
            for name in walk.fed.intersection(node.input[2:]):  # a bias that other layers make
                walk.add(name, own if layer.is_convolution else own.reshape((-1, 1) if layer.output_axis == 0 else (1, -1)))
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


def _line(values: Doubles | None, axis: int, size: int) -> Doubles:
    """R per output unit."""
    assert values is not None
    if values.ndim == 0:
        return np.full(size, float(values) / size)
    track = [1] * values.ndim
    track[axis] = size
    return fit(values, track).reshape(-1)


def _passed(walk: _Walk, index: int, values: Sequence[Doubles | None], adds: Mapping[int, Layer]) -> Passed:
    """What a node that is no layer gives to its inputs."""
    at, graph = _Node(walk.graph, walk.tracks, index), walk.graph
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
        passed = _RULES[row.flow].give(walk, at, row, values)
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
