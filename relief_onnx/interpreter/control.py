"""Rows for If, Loop and Scan, and for sequences and optional values. Bodies arrive as functions of their inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from relief_onnx.interpreter.registry import Table
from relief_onnx.interpreter.values import scalar

__all__ = ["ROWS"]

ROWS = Table()
op = ROWS.op

Body = Callable[..., list[Any]]


@op("If", pure=False)
def branch(condition: Tensor, *, then_branch: Body, else_branch: Body) -> tuple[Any, ...]:
    return tuple(then_branch() if bool(condition) else else_branch())


@op("Loop", pure=False)
def loop(count: Tensor | None, condition: Tensor | None, *carried: Any, body: Body) -> tuple[Any, ...]:
    """The body maps (round, condition, carried) to (condition, carried, what is collected)."""
    values, collected = list(carried), list[list[Tensor]]()
    limit = None if count is None else int(count)
    going, number = condition is None or bool(condition), 0
    while going and (limit is None or number < limit):
        again, *rest = body(torch.tensor(number), torch.tensor(going), *values)
        going, values = bool(again), rest[: len(values)]
        collected = collected or [[] for _ in rest[len(values) :]]
        for row, value in zip(collected, rest[len(values) :], strict=True):
            row.append(value)
        number += 1
    return (*values, *(torch.stack(row) for row in collected))


@op("Scan", pure=False, absent=(0,))
def scan_of_batches(
    lengths: None, *values: Tensor, body: Body, num_scan_inputs: int, directions: list[int] | None = None
) -> tuple[Tensor, ...]:
    """Opset 8: every value has a leading batch axis. Lengths of their own are refused."""
    directions_only = {} if directions is None else {"scan_input_directions": directions}
    rows = [
        scan(*(value[entry] for value in values), body=body, num_scan_inputs=num_scan_inputs, **directions_only)
        for entry in range(values[0].shape[0])
    ]
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


@op("Scan", since=9, pure=False)
def scan(
    *values: Tensor,
    body: Body,
    num_scan_inputs: int,
    scan_input_axes: list[int] | None = None,
    scan_input_directions: list[int] | None = None,
    scan_output_axes: list[int] | None = None,
    scan_output_directions: list[int] | None = None,
) -> tuple[Tensor, ...]:
    """The body maps (states, entries) to (states, what is collected)."""
    count = len(values) - num_scan_inputs
    states, sources = list(values[:count]), values[count:]
    axes = scan_input_axes or [0] * num_scan_inputs
    backward = scan_input_directions or [0] * num_scan_inputs
    length = sources[0].shape[axes[0]]
    collected = list[list[Tensor]]()
    for number in range(length):
        entries = [
            source.select(axis, length - 1 - number if back else number) for source, axis, back in zip(sources, axes, backward, strict=True)
        ]
        found = body(*states, *entries)
        states, outputs = found[:count], found[count:]
        collected = collected or [[] for _ in outputs]
        for row, value in zip(collected, outputs, strict=True):
            row.append(value)
    turned = scan_output_directions or [0] * len(collected)
    rows = [row[::-1] if back else row for row, back in zip(collected, turned, strict=True)]
    along = scan_output_axes or [0] * len(collected)
    return (*states, *(torch.stack(row, axis) for row, axis in zip(rows, along, strict=True)))


@op("SequenceEmpty", pure=False)
def sequence_empty(*, dtype: int = 1) -> list[Any]:
    return []


@op("SequenceConstruct")
def sequence_construct(*values: Any) -> list[Any]:
    return list(values)


@op("SequenceAt", host=(1,))
def sequence_at(sequence: list[Any], position: int) -> Any:
    return sequence[scalar(position)]


@op("SequenceErase", host=(1,))
def sequence_erase(sequence: list[Any], position: int | None = None) -> list[Any]:
    place = len(sequence) - 1 if position is None else scalar(position) % len(sequence)
    return sequence[:place] + sequence[place + 1 :]


@op("SequenceInsert", host=(2,))
def sequence_insert(sequence: list[Any], value: Any, position: int | None = None) -> list[Any]:
    place = len(sequence) if position is None else scalar(position)
    place = place + len(sequence) if place < 0 else place
    return [*sequence[:place], value, *sequence[place:]]


@op("SequenceLength")
def sequence_length(sequence: list[Any]) -> Tensor:
    return torch.tensor(len(sequence))


@op("SequenceMap", pure=False)
def sequence_map(sequence: list[Any], *others: Any, body: Body) -> tuple[list[Any], ...]:
    """The body of each entry; an input that is a tensor is the same for all."""
    rows = [body(value, *(other[place] if isinstance(other, list) else other for other in others)) for place, value in enumerate(sequence)]
    return tuple(list(column) for column in zip(*rows, strict=True))


@op("SplitToSequence", host=(1,))
def split_to_sequence(x: Tensor, split: Any = None, *, axis: int = 0, keepdims: int = 1) -> list[Tensor]:
    if split is None:
        return list(torch.split(x, 1, axis)) if keepdims else list(x.unbind(axis))
    return list(torch.split(x, split, axis))


@op("ConcatFromSequence")
def concat_from_sequence(sequence: list[Tensor], *, axis: int, new_axis: int = 0) -> Tensor:
    return torch.stack(sequence, axis) if new_axis else torch.cat(sequence, axis)


@op("Optional")
def optional(value: Any = None, *, type: Any = None) -> Any:
    return value


@op("OptionalGetElement")
def optional_get_element(value: Any) -> Any:
    return value


@op("OptionalHasElement", pure=False)
def optional_has_element(value: Any = None) -> Tensor:
    return torch.tensor(value is not None)
