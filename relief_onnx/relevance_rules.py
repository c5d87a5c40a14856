"""How relevance passes a node: a rule for each word in the operator table's column `relevance`.

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

A rule says whose activity it wants to know (`ask`, before the samples run) and what each input then gets (`give`). Held per tensor as an
array of the tensor's rank with the sizes of its track (`tracks`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from relief_onnx.attending import attended
from relief_onnx.graph import Graph
from relief_onnx.layers import Plan
from relief_onnx.moves import Barrier, reduced_axes
from relief_onnx.ops import OperatorRow
from relief_onnx.recurrent import around, of_states, recurrent_shares
from relief_onnx.tracks import Track, Tracks, labels_of, moved

__all__ = ["RULES", "Activity", "Ask", "Doubles", "NodeView", "Passed", "Rule", "Walk", "fit"]

Doubles = NDArray[np.float64]
Ask = tuple[str, tuple[int, ...]]  # a tensor and the axes along which its activity is told apart
Activity = Callable[[Ask], Doubles]
Passed = list[tuple[str, Doubles]]


def _axes(track: Sequence[int], rank: int) -> tuple[int, ...]:
    """The tracked axes of a node's output as axes of one of its inputs, which is broadcast to it."""
    return tuple(axis - (len(track) - rank) for axis, size in enumerate(track) if size > 1 and axis >= len(track) - rank)


class NodeView:
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


@dataclass
class Walk:
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


def _ask_nothing(at: NodeView, row: OperatorRow) -> list[Ask]:
    return []


def _ask_data(at: NodeView, row: OperatorRow) -> list[Ask]:
    return [at.asked(name, at.track(at.node.output[0])) for name in at.data(row)]


def _ask_choices(at: NodeView, row: OperatorRow) -> list[Ask]:
    return [at.asked(name, at.track(at.node.output[0])) for name in at.node.input[1:]]


def _ask_own(at: NodeView, row: OperatorRow) -> list[Ask]:
    return [at.asked(at.node.input[0], at.track(at.node.input[0]))]


def _ask_labels(at: NodeView, row: OperatorRow) -> list[Ask]:
    labels, _, sizes = labels_of(at.graph, at.node, at.tracks.of)
    return [
        (name, tuple(axis for axis, label in enumerate(own) if label in sizes and (at.graph.shape(name) or ())[axis] != 1))
        for name, own in zip(at.node.input, labels, strict=False)
    ]


def _ask_recurrent(at: NodeView, row: OperatorRow) -> list[Ask]:
    states = [name for name in at.node.output[:2] if name][:1]
    return [(at.node.input[0], (2,)), *((name, _axes(at.track(name), at.rank(name))) for name in states)]


def _through(walk: Walk, at: NodeView, row: OperatorRow, values: Sequence[Doubles | None]) -> Passed:
    data = at.data(row)
    running = [name for name in data if not _is_stored(at.graph, name)] or data[:1]
    name = next((name for name in running if name in walk.fed), running[0])
    return [(name, _lowered(at, name, found)) for found in values if found is not None]


def _lowered(at: NodeView, name: str, values: Doubles) -> Doubles:
    """From the rank of an output to that of an input that was broadcast to it."""
    rank = at.rank(name)
    track = at.track(name)
    if values.ndim < rank:
        return fit(values, track)
    return fit(values, (1,) * (values.ndim - rank) + tuple(track)).reshape(track)


def _is_stored(graph: Graph, name: str) -> bool:
    return name in graph.initializers or graph.constant(name) is not None


def _shared(walk: Walk, at: NodeView, inputs: Sequence[str], values: Doubles, relative: bool = False) -> Passed:
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


def _join(walk: Walk, at: NodeView, row: OperatorRow, values: Sequence[Doubles | None]) -> Passed:
    return _shared(walk, at, at.data(row), values[0]) if values[0] is not None else []


def _select(walk: Walk, at: NodeView, row: OperatorRow, values: Sequence[Doubles | None]) -> Passed:
    return _shared(walk, at, at.node.input[1:], values[0]) if values[0] is not None else []


def _product(walk: Walk, at: NodeView, row: OperatorRow, values: Sequence[Doubles | None]) -> Passed:
    return _shared(walk, at, at.data(row), values[0], relative=True) if values[0] is not None else []


def _move(walk: Walk, at: NodeView, row: OperatorRow, values: Sequence[Doubles | None]) -> Passed:
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


def _reduce(walk: Walk, at: NodeView, row: OperatorRow, values: Sequence[Doubles | None]) -> Passed:
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


def _contract(walk: Walk, at: NodeView, row: OperatorRow, values: Sequence[Doubles | None]) -> Passed:
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


def _recur(walk: Walk, at: NodeView, row: OperatorRow, values: Sequence[Doubles | None]) -> Passed:
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


def _none(walk: Walk, at: NodeView, row: OperatorRow, values: Sequence[Doubles | None]) -> Passed:
    return []


def _attend(walk: Walk, at: NodeView, row: OperatorRow, values: Sequence[Doubles | None]) -> Passed:
    return attended(at.graph, at.node, values, walk.fed)


@dataclass(frozen=True)
class Rule:
    ask: Callable[[NodeView, OperatorRow], list[Ask]]
    give: Callable[[Walk, NodeView, OperatorRow, Sequence[Doubles | None]], Passed]


RULES: Mapping[str, Rule] = {
    "through": Rule(_ask_nothing, _through),
    "join": Rule(_ask_data, _join),
    "select": Rule(_ask_choices, _select),
    "product": Rule(_ask_data, _product),
    "move": Rule(_ask_nothing, _move),
    "reduce": Rule(_ask_own, _reduce),
    "contract": Rule(_ask_labels, _contract),
    "recurrent": Rule(_ask_recurrent, _recur),
    "attend": Rule(_ask_nothing, _attend),
    "none": Rule(_ask_nothing, _none),
}
