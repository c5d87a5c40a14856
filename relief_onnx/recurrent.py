"""What the inputs and the last states contribute to the units of LSTM, GRU and RNN nodes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from relief_onnx.graph import Graph
from relief_onnx.layers import Layer
from relief_onnx.recurrent_layers import idle_gates, whole_bias
from relief_onnx.recurrent_reads import cell_of

__all__ = ["RecurrentShares", "around", "looped", "of_states", "recurrent_shares"]

Doubles = NDArray[np.float64]

# What a unit that hears nothing of the input passes to it, as a part of what it passes round the loop.
LEAST = 1e-6


@dataclass(frozen=True)
class RecurrentShares:
    """Per direction and hidden unit: `input` [directions, hidden, features] and `loop` [directions, hidden, hidden]."""

    input: Doubles
    loop: Doubles


def initial_states(node: onnx.NodeProto) -> list[str]:
    """The states that a node starts from, where they are given."""
    return [name for name in node.input[5:7] if name]


def recurrent_shares(graph: Graph, node: onnx.NodeProto, inputs: Doubles, states: Doubles, squared: bool) -> RecurrentShares | None:
    """Shares of what x and h bring in, summed over the gates of a unit, as in a dense layer; None where a weight is not stored.

    inputs: activity of x [features]; states: of h [directions * hidden]. `squared`: it is a variance, so that W^2 counts and biases do not;
    otherwise |W| and |b|.
    """
    w, r = graph.constant(node.input[1]), graph.constant(node.input[2])
    if w is None or r is None:
        return None
    directions, rows, features = w.shape
    hidden = r.shape[2]
    power = 2 if squared else 1
    gates = [gate for gate in range(rows // hidden) if gate not in idle_gates(node)]
    own = np.abs(w.astype(np.float64) ** power).reshape(directions, -1, hidden, features)[:, gates].sum(1) * inputs.reshape(1, 1, -1)
    loop = np.abs(r.astype(np.float64) ** power).reshape(directions, -1, hidden, hidden)[:, gates].sum(1)
    loop = loop * np.broadcast_to(states, (directions * hidden,)).reshape(directions, 1, hidden)
    bias = np.zeros((directions, hidden))
    known = whole_bias(graph, graph.producer[next(name for name in node.output if name)])
    if known is not None and not squared:
        bias = np.abs((known[0] + known[1]).reshape(directions, -1, hidden))[:, gates].sum(1)
    return _parts(own, loop, bias)


def _parts(own: Doubles, loop: Doubles, bias: Doubles) -> RecurrentShares:
    # A unit that hears nothing of x passes a trifle on evenly: without a way out of the loop R would go round for ever.
    silent = own.sum(2, keepdims=True) == 0
    around = loop.sum(2, keepdims=True)
    own = np.where(silent, np.where(around > 0, LEAST * around, 1.0) / own.shape[2], own)
    total = own.sum(2) + loop.sum(2) + bias
    safe = np.where(total > 0, total, 1.0)[..., None]
    return RecurrentShares(own / safe, loop / safe)


@dataclass(frozen=True)
class RowShares:
    """As `RecurrentShares`, and of a unit's R the part that each of its gate rows carries, by layer name [out]."""

    units: RecurrentShares
    rows: Mapping[str, Doubles]


def layer_shares(w: Layer, r: Layer, shares: Mapping[str, Doubles], totals: Mapping[str, Doubles]) -> RowShares:
    """From shares within the rows of W and R, by name [out, in per group], and what each row brings in, its bias included [out].

    A unit's R is shared between its rows, those of W and those of R, in proportion to what they bring in. Where nothing is, evenly.
    """
    kind = w.recurrent
    assert kind is not None
    sizes = (kind.directions, kind.gates, kind.hidden)
    inflow, rows = [], []
    works = ~np.isin(np.arange(kind.gates), kind.idle)
    for layer in (w, r):
        total = totals.get(layer.name, np.full(layer.out_channels, float(layer.in_per_group))).reshape(sizes) * works[:, None]
        inflow.append((shares[layer.name] * total.reshape(-1, 1)).reshape(*sizes, -1).sum(1))
        rows.append(total)
    # What of the rows is no connection is their bias.
    bias = sum(part.sum(1) for part in rows) - sum(part.sum(2) for part in inflow)
    every = rows[0].sum(1) + rows[1].sum(1)
    silent = every == 0
    safe = np.where(silent, 1.0, every)[:, None]
    carried = [np.where(silent[:, None], 0.5 / kind.gates, part / safe).reshape(-1) for part in rows]
    return RowShares(_parts(inflow[0], inflow[1], np.maximum(bias, 0.0)), {w.name: carried[0], r.name: carried[1]})


Passed = list[tuple[str, Doubles]]


def of_states(graph: Graph, node: onnx.NodeProto, values: Sequence[Doubles | None]) -> Doubles | None:
    """R of all outputs of a recurrent node together [directions, hidden]; spread evenly where it is not told apart by unit."""
    sizes = tuple(size if isinstance(size, int) else 1 for size in (graph.shape(node.input[2]) or (1, 1, 1)))
    units = (sizes[0], sizes[2])
    total: Doubles | None = None
    for name, own in zip(node.output, values, strict=False):
        if own is not None and name:
            known = own.size == int(np.prod(units))
            each = own.reshape(units) if known else np.full(units, own.sum() / int(np.prod(units)))
            total = each if total is None else total + each
    return total


def _steps(graph: Graph, node: onnx.NodeProto) -> int | None:
    """How many steps a node takes, where that is known."""
    shape = graph.shape(node.input[0])
    steps = shape[1 if cell_of(node).batch_first else 0] if shape else None
    return steps if isinstance(steps, int) else None


def around(graph: Graph, node: onnx.NodeProto, total: Doubles, shares: RecurrentShares, fed: Collection[str]) -> tuple[Passed, Doubles]:
    """What goes to the inputs, and R of the units with what comes back to them round the loop [directions, hidden].

    T = R + T P_loop, so R at the input is R (1 - P_loop)^-1 P_input. A node that takes one step has no loop: what h brings in goes to
    the states that it starts from. fed: tensors that some layer leads to.
    """
    once = _steps(graph, node) == 1
    passed, units = Passed(), np.empty_like(total)
    found = np.zeros(shares.input.shape[-1])
    for direction, own in enumerate(total):
        loop = shares.loop[direction]
        units[direction] = own if once else np.linalg.solve(np.eye(len(loop)) - loop.T, own)
        found = found + units[direction] @ shares.input[direction]
    starts = initial_states(node)
    for name in starts:
        if name in fed:
            given = sum(float((own @ loop).sum()) for own, loop in zip(total, shares.loop, strict=True)) / (len(starts) if once else 2)
            passed.append((name, np.asarray(given)))
            if not once:
                found = found * (1 - given / max(total.sum(), 1e-300))
    return [*passed, (node.input[0], found.reshape(1, 1, -1))], units


def looped(
    graph: Graph, node: onnx.NodeProto, values: Sequence[Doubles | None], parts: Mapping[str, Layer], shares: Mapping[str, Doubles],
    totals: Mapping[str, Doubles], fed: Collection[str],
) -> tuple[Passed, dict[str, Doubles]]:  # fmt: skip
    """What a node whose weights are layers gives to its inputs, and R of each row of the layers, by name."""
    total, kind = of_states(graph, node, values), parts["W"].recurrent
    assert total is not None
    assert kind is not None
    found = layer_shares(parts["W"], parts["R"], shares, totals)
    passed, units = around(graph, node, total, found.units, fed)
    each = np.broadcast_to(units[:, None], (kind.directions, kind.gates, kind.hidden)).reshape(-1)
    return passed, {name: share * each for name, share in found.rows.items()}
