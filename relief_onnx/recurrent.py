"""What the inputs and the last states contribute to the units of LSTM, GRU and RNN nodes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from relief_onnx.graph import Graph

__all__ = ["RecurrentShares", "initial_states", "recurrent_shares"]

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
    own = np.abs(w.astype(np.float64) ** power).reshape(directions, rows // hidden, hidden, features).sum(1) * inputs.reshape(1, 1, -1)
    loop = np.abs(r.astype(np.float64) ** power).reshape(directions, rows // hidden, hidden, hidden).sum(1)
    loop = loop * np.broadcast_to(states, (directions * hidden,)).reshape(directions, 1, hidden)
    bias = np.zeros((directions, hidden))
    value = graph.constant(node.input[3]) if len(node.input) > 3 and node.input[3] else None
    if value is not None and not squared:
        bias = np.abs(value.astype(np.float64).reshape(directions, 2, rows // hidden, hidden).sum(1)).sum(1)
    # A unit that hears nothing of x passes a trifle on evenly: without a way out of the loop R would go round for ever.
    silent = own.sum(2, keepdims=True) == 0
    around = loop.sum(2, keepdims=True)
    own = np.where(silent, np.where(around > 0, LEAST * around, 1.0) / features, own)
    total = own.sum(2) + loop.sum(2) + bias
    safe = np.where(total > 0, total, 1.0)[..., None]
    return RecurrentShares(own / safe, loop / safe)
