"""What the weights of recurrent nodes read at each step: the input, and the state of the step before as it really runs.

The state comes from the node's own output Y, one step earlier in the direction of the walk, and from its first state where a walk
begins. Steps past an entry's own length do not count. The candidate rows of a GRU with linear_before_reset 0 read the state times the
reset gate, which is computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from relief_onnx.graph import Graph, attributes
from relief_onnx.recurrent_layers import describe, is_recurrent, made, text, whole_bias
from relief_onnx.sources import Refusal, trace_constant

__all__ = ["Cell", "Derived", "Steps", "cell_of", "derived", "steps_of"]

Values = Mapping[str, NDArray[Any]]
Floats = NDArray[np.floating[Any]]


def _sigmoid(x: Floats, alpha: float, beta: float) -> Floats:
    found: Floats = 0.5 * (1 + np.tanh(0.5 * x))
    return found


# The activations that a gate can have: (x, alpha, beta) -> y, with alpha and beta where none are given.
ACTIVATIONS: Mapping[str, tuple[Callable[[Floats, float, float], Any], float, float]] = {
    "sigmoid": (_sigmoid, 0.0, 0.0),
    "tanh": (lambda x, a, b: np.tanh(x), 0.0, 0.0),
    "relu": (lambda x, a, b: np.maximum(x, 0), 0.0, 0.0),
    "affine": (lambda x, a, b: a * x + b, 1.0, 0.0),
    "leakyrelu": (lambda x, a, b: np.where(x >= 0, x, a * x), 0.01, 0.0),
    "thresholdedrelu": (lambda x, a, b: np.where(x > a, x, 0), 1.0, 0.0),
    "scaledtanh": (lambda x, a, b: a * np.tanh(b * x), 1.0, 1.0),
    "hardsigmoid": (lambda x, a, b: np.clip(a * x + b, 0, 1), 0.2, 0.5),
    "elu": (lambda x, a, b: np.where(x >= 0, x, a * np.expm1(np.minimum(x, 0))), 1.0, 0.0),
    "softsign": (lambda x, a, b: x / (1 + np.abs(x)), 0.0, 0.0),
    "softplus": (lambda x, a, b: np.logaddexp(x, 0), 0.0, 0.0),
}
# Functions of each direction, in the order of the attribute `activations`.
DEFAULTS: Mapping[str, tuple[str, ...]] = {"LSTM": ("sigmoid", "tanh", "tanh"), "GRU": ("sigmoid", "tanh"), "RNN": ("tanh",)}


@dataclass(frozen=True)
class Cell:
    """How a node runs: `backward` per direction, `batch_first` (layout 1), and its functions per direction."""

    op: str
    backward: tuple[bool, ...]
    batch_first: bool
    linear_before_reset: bool
    functions: tuple[tuple[Callable[[Floats], Floats], ...], ...]
    clip: float | None

    @property
    def keeps_zero(self) -> bool:
        """Whether a unit whose candidate hears nothing stays at 0: functions after the first are 0 at 0 (of RNN the only one)."""
        zero = np.zeros(1)
        return not any(np.asarray(function(zero)).any() for own in self.functions for function in (own[1:] or own))

    def gate(self, direction: int, x: Floats) -> Floats:
        """The first function of a direction, after the clip."""
        return self.functions[direction][0](x if self.clip is None else np.clip(x, -self.clip, self.clip))


def cell_of(node: onnx.NodeProto) -> Cell:
    """The attributes of a recurrent node."""
    values = attributes(node)
    direction = text(values.get("direction", "forward"))
    backward = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}[direction]
    each = DEFAULTS[node.op_type]
    names = [text(name).lower() for name in values.get("activations", ())] or [*each * len(backward)]
    given = {key: list(values.get(f"activation_{key}", ())) for key in ("alpha", "beta")}
    found = []
    for name in names:
        function, alpha, beta = ACTIVATIONS[name]
        # Alphas and betas are given for the functions that have them, in order.
        own = [given[key].pop(0) if default and given[key] else default for key, default in (("alpha", alpha), ("beta", beta))]
        found.append(_bound(function, *own))
    functions = tuple(tuple(found[start : start + len(each)]) for start in range(0, len(found), len(each)))
    return Cell(
        node.op_type, backward, bool(values.get("layout", 0)), bool(values.get("linear_before_reset", 0)),
        functions, float(values["clip"]) if "clip" in values else None,
    )  # fmt: skip


def _bound(function: Callable[[Floats, float, float], Any], alpha: float, beta: float) -> Callable[[Floats], Floats]:
    def run(x: Floats) -> Floats:
        found: Floats = function(x, alpha, beta)
        return found

    return run


@dataclass(frozen=True)
class Steps:
    """What a node reads: x [batch, time, features], h [batch, time, directions, hidden] (before each step), and which steps count."""

    x: Floats
    h: Floats
    counts: NDArray[np.bool_]  # [batch, time]

    def rows(self, values: Floats) -> Floats:
        """Of values [batch, time, n] those of the steps that count, with batch and time where all do, or [1, rows, n]."""
        return values if self.counts.all() else values[self.counts][None]


def steps_of(cell: Cell, x: Floats, y: Floats, initial: Floats | None, lengths: NDArray[Any] | None) -> Steps:
    """From the node's input, its output Y and its first states (None: 0), all as the node has them."""
    if not cell.batch_first:
        x, y = x.swapaxes(0, 1), y.transpose(2, 0, 1, 3)
        initial = None if initial is None else initial.swapaxes(0, 1)
    batch, time = x.shape[:2]
    start = np.zeros((batch, *y.shape[2:]), y.dtype) if initial is None else initial.astype(y.dtype)
    ends = np.full(batch, time) if lengths is None else np.asarray(lengths).reshape(-1).astype(np.int64)
    h = np.zeros_like(y)
    for direction, backward in enumerate(cell.backward):
        if backward:
            h[:, :-1, direction] = y[:, 1:, direction]
            alive = np.flatnonzero(ends > 0)
            h[alive, ends[alive] - 1, direction] = start[alive, direction]
        else:
            h[:, 1:, direction] = y[:, :-1, direction]
            if time:
                h[:, 0, direction] = start[:, direction]
    return Steps(x, h, np.arange(time)[None] < ends[:, None])


def reset_states(cell: Cell, steps: Steps, w: Floats, r: Floats, biases: tuple[Floats, Floats]) -> Floats:
    """What the candidate rows of a GRU read: h times the reset gate [batch, time, directions, hidden]. w, r as stored, 3 axes."""
    hidden = r.shape[2]
    rows = slice(hidden, 2 * hidden)
    found = np.empty_like(steps.h)
    for direction in range(len(cell.backward)):
        total = steps.x @ w[direction, rows].T + steps.h[:, :, direction] @ r[direction, rows].T
        gate = cell.gate(direction, total + (biases[0] + biases[1])[direction, rows])
        found[:, :, direction] = gate * steps.h[:, :, direction]
    return found


def read_by_r(cell: Cell, steps: Steps, w: Floats, r: Floats, biases: tuple[Floats, Floats]) -> Floats:
    """What the groups of R read (see `recurrent_layers.Recurrent.groups`): [batch, time, groups * hidden]."""
    batch, time = steps.h.shape[:2]
    if cell.op != "GRU" or cell.linear_before_reset:
        return steps.h.reshape(batch, time, -1)
    reset = reset_states(cell, steps, w, r, biases)
    return np.stack([steps.h, steps.h, reset], 3).reshape(batch, time, -1)


@dataclass(frozen=True)
class Derived:
    """A tensor that is computed from tensors of the graph: `sources`, then `make` of their values by name."""

    sources: tuple[str, ...]
    make: Callable[[Values], NDArray[Any]]


def derived(graph: Graph) -> dict[str, Derived]:
    """By the name that layers listen to (`Layer.reads`): what each W and R of the graph reads; Y of nodes without it as `NAME/R/states`."""
    found: dict[str, Derived] = {}
    for index, node in enumerate(graph.nodes):
        if not is_recurrent(node) or any(isinstance(describe(graph, index, slot), Refusal) for slot in (1, 2)):
            continue
        for part in "WR":
            found[f"{made(node)}/{part}/reads"] = _reading(graph, index, part)
    return found


def states_name(node: onnx.NodeProto) -> str:
    """Y, or what the probe calls it where the node has none."""
    return node.output[0] or f"{made(node)}/R/states"


def _reading(graph: Graph, index: int, part: str) -> Derived:
    node = graph.nodes[index]
    x, y = node.input[0], states_name(node)
    lengths = node.input[4] if len(node.input) > 4 else ""
    initial = node.input[5] if len(node.input) > 5 else ""
    running = tuple(dict.fromkeys(name for name in (x, lengths, y, initial) if name and graph.constant(name) is None))
    cell = cell_of(node)

    def make(values: Values) -> NDArray[Any]:
        def value(name: str) -> NDArray[Any] | None:
            return values[name] if name in values else graph.constant(name) if name else None

        given, made_ = value(x), value(y)
        assert given is not None
        assert made_ is not None
        steps = steps_of(cell, given, made_, value(initial), value(lengths))
        if part == "W":
            return np.asarray(steps.rows(steps.x))
        return np.asarray(steps.rows(read_by_r(cell, steps, *stored(graph, index))))

    return Derived(running, make)


def stored(graph: Graph, index: int) -> tuple[Floats, Floats, tuple[Floats, Floats]]:
    """W and R as the node reads them [directions, gates * hidden, n], and both halves of its bias (zeros where they are computed)."""
    node = graph.nodes[index]
    w, r = (_weight(graph, name) for name in node.input[1:3])
    biases = whole_bias(graph, index)
    if biases is None:
        zeros = np.zeros(w.shape[:2])
        biases = zeros, zeros
    return w, r, biases


def _weight(graph: Graph, name: str) -> Floats:
    source = trace_constant(graph, name)
    assert source is not None
    assert not isinstance(source, Refusal)
    found: Floats = source.view.apply(graph.array(source.name)).astype(np.float32)
    return found
