"""Rows for operators that pick or place entries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from relief_onnx.interpreter.registry import Table
from relief_onnx.interpreter.values import as_list, scalar

__all__ = ["ROWS"]

ROWS = Table()
op = ROWS.op

REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _from_front(places: Tensor, length: int) -> Tensor:
    """Places counted from the front; those below 0 count from the end."""
    return torch.where(places < 0, places + length, places).long()


@op("Slice", host=(1, 2, 3, 4))
def slices(x: Tensor, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Tensor:
    starts, ends = as_list(starts), as_list(ends)
    chosen = list(range(len(starts))) if axes is None else as_list(axes)
    for axis, start, end, step in zip(chosen, starts, ends, [1] * len(starts) if steps is None else as_list(steps), strict=True):
        first, last, _ = slice(start, end, step).indices(x.shape[axis])
        if step > 0:
            where = [slice(None)] * x.dim()
            where[axis] = slice(first, last, step)
            x = x[tuple(where)]
        else:
            x = x.index_select(axis, torch.tensor(list(range(first, last, step)), dtype=torch.int64, device=x.device))
    return x


@op("Gather")
def gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    axis = axis % x.dim()
    if indices.dim() == 0:
        return x.select(axis, int(indices))
    places = _from_front(indices, x.shape[axis])
    if axis == 0 and x.is_floating_point():
        return F.embedding(places, x) if x.dim() == 2 else x[places]
    return x.index_select(axis, places.reshape(-1)).reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


@op("GatherElements")
def gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    return x.gather(axis, _from_front(indices, x.shape[axis]))


@op("GatherND")
def gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    return x[_coordinates(x, indices, batch_dims)]


def _coordinates(x: Tensor, indices: Tensor, batch_dims: int = 0) -> tuple[Tensor, ...]:
    """One index tensor for each axis that the last axis of `indices` names, after the axes that both share."""
    shared = [torch.arange(x.shape[axis], device=x.device).reshape(-1, *[1] * (indices.dim() - 2 - axis)) for axis in range(batch_dims)]
    named = [_from_front(places, x.shape[batch_dims + number]) for number, places in enumerate(indices.unbind(-1))]
    return (*shared, *named)


@op("Scatter", "ScatterElements")
def scatter_elements(x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none") -> Tensor:
    places = _from_front(indices, x.shape[axis])
    if reduction == "none":
        return x.scatter(axis, places, updates)
    if reduction == "add":
        return x.scatter_add(axis, places, updates)
    return x.scatter_reduce(axis, places, updates, REDUCTIONS[reduction], include_self=True)


@op("ScatterND")
def scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    where = _coordinates(x, indices)
    if reduction in ("none", "add"):
        return x.index_put(where, updates, accumulate=reduction == "add")
    depth = indices.shape[-1]
    sizes = x.shape[:depth]
    flat = torch.zeros_like(where[0])
    for places, length in zip(where, sizes, strict=True):
        flat = flat * length + places
    rows = x.reshape(sizes.numel(), -1)
    news = updates.reshape(flat.numel(), -1)
    return rows.scatter_reduce(0, flat.reshape(-1, 1).expand_as(news), news, REDUCTIONS[reduction], include_self=True).reshape(x.shape)


@op("TensorScatter")
def tensor_scatter(past: Tensor, update: Tensor, write_indices: Tensor | None = None, *, axis: int = -2, mode: str = "linear") -> Tensor:
    """Write `update` into a cache from a place that each batch entry has."""
    axis = axis % past.dim()
    start = torch.zeros(past.shape[0], dtype=torch.int64, device=past.device) if write_indices is None else write_indices
    places = start[:, None] + torch.arange(update.shape[axis], device=past.device)
    places = places % past.shape[axis] if mode == "circular" else places
    shape = [1] * past.dim()
    shape[0], shape[axis] = places.shape
    return past.scatter(axis, places.reshape(shape).expand_as(update), update)


@op("OneHot", host=(1,))
def one_hot(indices: Tensor, depth: Any, values: Tensor, *, axis: int = -1) -> Tensor:
    count = int(scalar(depth))
    places = indices.long()
    inside = (places >= -count) & (places < count)
    hot = F.one_hot(places % count, count).bool() & inside[..., None]
    return torch.where(hot, values[1], values[0]).movedim(-1, axis)


@op("NonZero")
def non_zero(x: Tensor) -> Tensor:
    return x.reshape(1).nonzero().t() if x.dim() == 0 else x.nonzero().t()


@op("Compress")
def compress(x: Tensor, condition: Tensor, *, axis: int | None = None) -> Tensor:
    places = condition.nonzero()[:, 0]
    return x.reshape(-1)[places] if axis is None else x.index_select(axis, places)


@op("Unique")
def unique(x: Tensor, *, axis: int | None = None, sorted: int = 1) -> tuple[Tensor, ...]:
    found, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True, dim=axis)
    first = torch.full((counts.numel(),), inverse.numel(), dtype=torch.int64, device=x.device)
    order = torch.arange(inverse.numel(), device=x.device)
    first = first.scatter_reduce(0, inverse.reshape(-1), order, "amin")
    if not sorted:
        places = first.argsort()
        rank = places.argsort()
        found, inverse, counts, first = found.index_select(axis or 0, places), rank[inverse], counts[places], first[places]
    return found, first, inverse.reshape(-1), counts


@op("ReverseSequence", host=(1,))
def reverse_sequence(x: Tensor, lengths: list[int], *, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    parts = []
    for part, length in zip(x.unbind(batch_axis), lengths, strict=True):
        axis = time_axis - (batch_axis < time_axis)
        parts.append(torch.cat([part.narrow(axis, 0, length).flip(axis), part.narrow(axis, length, part.shape[axis] - length)], axis))
    return torch.stack(parts, batch_axis)
