"""LSTM, GRU and RNN by torch's own kernels where they compute the same; several times faster than a loop over time in Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["native"]

# Operator and activations of a direction -> torch's function, and where torch's gates are among ONNX's.
KERNELS: Mapping[tuple[str, tuple[str, ...]], tuple[Callable[..., Any], tuple[int, ...]]] = {
    ("LSTM", ("Sigmoid", "Tanh", "Tanh")): (torch.lstm, (0, 2, 3, 1)),  # i o f c -> i f c o
    ("GRU", ("Sigmoid", "Tanh")): (torch.gru, (1, 0, 2)),  # z r h -> r z h
    ("RNN", ("Tanh",)): (torch.rnn_tanh, (0,)),
    ("RNN", ("Relu",)): (torch.rnn_relu, (0,)),
}


def _reordered(values: Tensor, gates: tuple[int, ...]) -> Tensor:
    """[gates * hidden, ...] in torch's order of gates."""
    if len(gates) == 1:
        return values
    parts = values.chunk(len(gates))
    return torch.cat([parts[gate] for gate in gates])


def native(
    operator: str,
    activations: Sequence[str],
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None,
    initial: Sequence[Tensor | None],
    backward: bool,
) -> tuple[Tensor, ...] | None:
    """x [time, batch, features]: outputs [time, directions, batch, hidden] and last states [directions, batch, hidden]; None where
    torch has no kernel for these activations. `backward`: the only direction goes back in time."""
    count = len(activations) // len(w)
    chosen = {tuple(activations[place * count : (place + 1) * count]) for place in range(len(w))}
    kernel = KERNELS.get((operator, next(iter(chosen)))) if len(chosen) == 1 else None
    if kernel is None:
        return None
    function, gates = kernel
    weights = []
    for place in range(len(w)):
        weights += [_reordered(w[place], gates), _reordered(r[place], gates)]
        weights += [_reordered(half, gates) for half in b[place].chunk(2)] if b is not None else []
    zeros = x.new_zeros(len(w), x.shape[1], r.shape[-1])
    states = [zeros if state is None else state for state in initial]
    start = states if len(states) > 1 else states[0]
    y, *last = function(x.flip(0) if backward else x, start, weights, b is not None, 1, 0.0, torch.is_grad_enabled(), len(w) == 2, False)
    y = y.flip(0) if backward else y
    return (y.unflatten(-1, (len(w), -1)).transpose(1, 2), *last)
