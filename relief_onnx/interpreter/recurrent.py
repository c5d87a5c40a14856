"""Rows for LSTM, GRU and RNN: one loop over time, what a step does is the operator's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from relief_onnx.interpreter.activations import ACTIVATIONS
from relief_onnx.interpreter.recurrent_native import native
from relief_onnx.interpreter.registry import Table

__all__ = ["ROWS"]

ROWS = Table()
op = ROWS.op

Activation = Callable[[Tensor], Tensor]
States = tuple[Tensor, ...]
Cell = Callable[[Tensor, States], States]


def _check(values: Any) -> str | None:
    unknown = [name for name in values.get("activations", ()) if name not in ACTIVATIONS]
    return f"activation {unknown[0]}" if unknown else None


def _activations(names: Sequence[str], alpha: Sequence[float] | None, beta: Sequence[float] | None, clip: float | None) -> list[Activation]:
    """The functions by name, with their alpha and beta where they are given; clip bounds what they get."""
    found: list[Activation] = []
    for place, name in enumerate(names):
        given = {key: row[place] for key, row in (("alpha", alpha), ("beta", beta)) if row is not None and place < len(row)}
        function = partial(ACTIVATIONS[name], **given)
        found.append(function if clip is None else partial(_clipped, function, clip))
    return found


def _clipped(function: Activation, clip: float, x: Tensor) -> Tensor:
    return function(x.clamp(-clip, clip))


def _run(projected: Tensor, lengths: Tensor | None, states: States, cell: Cell, backward: bool) -> tuple[Tensor, States]:
    """projected [time, batch, gates]: outputs [time, batch, hidden] and the last states. Past its own length an entry keeps its states."""
    outputs = []
    steps = range(len(projected))
    for time in reversed(steps) if backward else steps:
        new = cell(projected[time], states)
        if lengths is not None:
            alive = (lengths > time)[:, None]
            outputs.append(torch.where(alive, new[0], 0.0))
            states = tuple(torch.where(alive, now, before) for now, before in zip(new, states, strict=True))
        else:
            outputs.append(new[0])
            states = new
    return torch.stack(outputs[::-1] if backward else outputs), states


def _recurrent(
    x: Tensor,
    w: Tensor,
    lengths: Tensor | None,
    initial: Sequence[Tensor | None],
    hidden_size: int,
    direction: str,
    layout: int,
    make_cell: Callable[[int], tuple[Callable[[Tensor], Tensor], Cell]],
    fast: Callable[..., tuple[Tensor, ...] | None] | None,
) -> tuple[Tensor, ...]:
    """Both directions and layouts. make_cell: for a direction the function that adds its biases to x W, and the cell.

    fast: torch's own kernel, where nothing in the node rules it out.
    """
    x = x.transpose(0, 1) if layout else x
    starts = [state.transpose(0, 1) if state is not None and layout else state for state in initial]
    quick = fast(x=x, initial=starts, backward=direction == "reverse") if fast is not None and lengths is None else None
    if quick is not None:
        return (quick[0].permute(2, 0, 1, 3), *(state.transpose(0, 1) for state in quick[1:])) if layout else quick
    zeros = x.new_zeros(x.shape[1], hidden_size)
    outputs, lasts = [], []
    for number in range(len(w)):
        biased, cell = make_cell(number)
        states = tuple(zeros if state is None else state[number] for state in starts)
        y, last = _run(biased(x @ w[number].t()), lengths, states, cell, direction == "reverse" or number == 1)
        outputs.append(y)
        lasts.append(last)
    found = [torch.stack(outputs, 1), *(torch.stack(state) for state in zip(*lasts, strict=True))]
    return (found[0].permute(2, 0, 1, 3), *(state.transpose(0, 1) for state in found[1:])) if layout else tuple(found)


def _biases(b: Tensor | None, number: int, r: Tensor) -> tuple[Tensor, Tensor]:
    """What is added to x W and to h R in a direction, [gates * hidden] each."""
    if b is None:
        return r.new_zeros(r.shape[1]), r.new_zeros(r.shape[1])
    first, second = b[number].chunk(2)
    return first, second


@op("RNN", check=_check)
def rnn(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    activation_alpha: list[float] | None = None,
    activation_beta: list[float] | None = None,
    activations: list[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
) -> tuple[Tensor, ...]:
    names = activations or ["Tanh"] * len(w)
    functions = _activations(names, activation_alpha, activation_beta, clip)

    def make(number: int) -> tuple[Activation, Cell]:
        wb, rb = _biases(b, number, r)
        weight, f = r[number].t(), functions[number]
        return lambda rows: rows + (wb + rb), lambda row, states: (f(row + states[0] @ weight),)

    plain = clip is None and not activation_alpha and not activation_beta
    fast = partial(native, "RNN", names, w=w, r=r, b=b) if plain else None
    return _recurrent(x, w, sequence_lens, (initial_h,), r.shape[-1], direction, layout, make, fast)


@op("GRU", check=_check)
def gru(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    activation_alpha: list[float] | None = None,
    activation_beta: list[float] | None = None,
    activations: list[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    linear_before_reset: int = 0,
) -> tuple[Tensor, ...]:
    names = activations or ["Sigmoid", "Tanh"] * len(w)
    functions = _activations(names, activation_alpha, activation_beta, clip)
    size = r.shape[-1]

    def make(number: int) -> tuple[Activation, Cell]:
        wb, rb = _biases(b, number, r)
        gates, new = r[number, : 2 * size].t(), r[number, 2 * size :].t()
        f, g = functions[2 * number : 2 * number + 2]
        rb_gates, rb_new = rb[: 2 * size], rb[2 * size :]

        def cell(row: Tensor, states: States) -> States:
            (h,) = states
            z, reset = f(row[:, : 2 * size] + h @ gates + rb_gates).chunk(2, -1)
            if linear_before_reset:
                fresh = g(row[:, 2 * size :] + reset * (h @ new + rb_new))
            else:
                fresh = g(row[:, 2 * size :] + (reset * h) @ new + rb_new)
            return (torch.lerp(fresh, h, z),)

        return lambda rows: rows + wb, cell

    plain = clip is None and not activation_alpha and not activation_beta and linear_before_reset
    fast = partial(native, "GRU", names, w=w, r=r, b=b) if plain else None
    return _recurrent(x, w, sequence_lens, (initial_h,), size, direction, layout, make, fast)


@op("LSTM", check=_check)
def lstm(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    initial_c: Tensor | None = None,
    p: Tensor | None = None,
    *,
    activation_alpha: list[float] | None = None,
    activation_beta: list[float] | None = None,
    activations: list[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    input_forget: int = 0,
    layout: int = 0,
) -> tuple[Tensor, ...]:
    names = activations or ["Sigmoid", "Tanh", "Tanh"] * len(w)
    functions = _activations(names, activation_alpha, activation_beta, clip)

    def make(number: int) -> tuple[Activation, Cell]:
        wb, rb = _biases(b, number, r)
        weight = r[number].t()
        f, g, h = functions[3 * number : 3 * number + 3]
        peep_i, peep_o, peep_f = (0.0, 0.0, 0.0) if p is None else p[number].chunk(3)

        def cell(row: Tensor, states: States) -> States:
            hidden, memory = states
            i, o, forget, c = (row + hidden @ weight).chunk(4, -1)
            if p is not None:
                i, forget = i + peep_i * memory, forget + peep_f * memory
            i = f(i)
            memory = (1 - i if input_forget else f(forget)) * memory + i * g(c)
            return f(o if p is None else o + peep_o * memory) * h(memory), memory

        return lambda rows: rows + (wb + rb), cell

    plain = clip is None and not activation_alpha and not activation_beta and p is None and not input_forget
    fast = partial(native, "LSTM", names, w=w, r=r, b=b) if plain else None
    return _recurrent(x, w, sequence_lens, (initial_h, initial_c), r.shape[-1], direction, layout, make, fast)
