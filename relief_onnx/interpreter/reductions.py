"""Rows for reductions over axes, running sums and the places of extremes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from relief_onnx.interpreter.registry import Table
from relief_onnx.interpreter.values import as_list, scalar

__all__ = ["ROWS"]

ROWS = Table()
op = ROWS.op


def _product(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keepdim)
    return x


def _largest(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    if any(x.shape[axis] == 0 for axis in axes):
        return _filled(
            x, axes, keepdim, float("-inf") if x.is_floating_point() else 0 if x.dtype == torch.bool else torch.iinfo(x.dtype).min
        )
    return x.amax(axes, keepdim) if x.dtype != torch.bool else x.to(torch.uint8).amax(axes, keepdim).bool()


def _smallest(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    if any(x.shape[axis] == 0 for axis in axes):
        return _filled(
            x, axes, keepdim, float("inf") if x.is_floating_point() else 1 if x.dtype == torch.bool else torch.iinfo(x.dtype).max
        )
    return x.amin(axes, keepdim) if x.dtype != torch.bool else x.to(torch.uint8).amin(axes, keepdim).bool()


def _filled(x: Tensor, axes: list[int], keepdim: bool, value: float) -> Tensor:
    """The extreme of nothing."""
    return torch.full_like(x.sum(axes, keepdim), value, dtype=x.dtype)


REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceL1": lambda x, axes, keepdim: x.abs().sum(axes, keepdim, dtype=x.dtype),
    "ReduceL2": lambda x, axes, keepdim: x.norm(2, axes, keepdim) if x.is_floating_point() else x.square().sum(axes, keepdim).sqrt(),
    "ReduceLogSum": lambda x, axes, keepdim: x.sum(axes, keepdim).log(),
    "ReduceLogSumExp": lambda x, axes, keepdim: torch.logsumexp(x, axes, keepdim),
    "ReduceMax": _largest,
    "ReduceMean": lambda x, axes, keepdim: x.mean(axes, keepdim),
    "ReduceMin": _smallest,
    "ReduceProd": _product,
    "ReduceSum": lambda x, axes, keepdim: x.sum(axes, keepdim, dtype=x.dtype),
    "ReduceSumSquare": lambda x, axes, keepdim: x.square().sum(axes, keepdim, dtype=x.dtype),
}


def _reduction(function: Callable[[Tensor, list[int], bool], Tensor], of_nothing: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def reduced(x: Tensor, axes: list[int] | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        chosen = as_list(axes) if axes is not None else []
        if not chosen and noop_with_empty_axes:
            return of_nothing(x)
        if x.dim() == 0:
            return of_nothing(x) if not x.is_floating_point() else function(x[None], [0], False)
        return function(x, chosen or list(range(x.dim())), bool(keepdims))

    return reduced


# What remains of a reduction over no axes at all: each entry is a sum of one.
OF_ONE: dict[str, Callable[[Tensor], Tensor]] = {
    "ReduceL1": torch.abs,
    "ReduceL2": torch.abs,
    "ReduceLogSum": torch.log,
    "ReduceSumSquare": torch.square,
}
for name, function in REDUCTIONS.items():
    op(name, host=(1,))(_reduction(function, OF_ONE.get(name, lambda x: x)))


def _place(x: Tensor, axis: int, keepdims: int, select_last_index: int, largest: bool) -> Tensor:
    """The place of an extreme; of equal ones the first or the last."""
    x = x.flip(axis) if select_last_index else x
    extreme = x.amax(axis, keepdim=True) if largest else x.amin(axis, keepdim=True)
    place = (x == extreme).to(torch.uint8).argmax(axis, keepdim=bool(keepdims))
    return x.shape[axis] - 1 - place if select_last_index else place


@op("ArgMax")
def arg_max(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    return _place(x, axis, keepdims, select_last_index, True)


@op("ArgMin")
def arg_min(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    return _place(x, axis, keepdims, select_last_index, False)


def _running(function: Callable[..., Tensor], start: float, x: Tensor, axis: Any, exclusive: int, reverse: int) -> Tensor:
    axis = scalar(axis)
    x = x.flip(axis) if reverse else x
    if exclusive:
        x = torch.cat([torch.full_like(x.narrow(axis, 0, 1), start), x.narrow(axis, 0, x.shape[axis] - 1)], axis)
    y = function(x, axis, dtype=x.dtype)
    return y.flip(axis) if reverse else y


@op("CumSum", host=(1,))
def cumulative_sum(x: Tensor, axis: Any, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    return _running(torch.cumsum, 0, x, axis, exclusive, reverse)


@op("CumProd", host=(1,))
def cumulative_product(x: Tensor, axis: Any, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    return _running(torch.cumprod, 1, x, axis, exclusive, reverse)


@op("TopK", host=(1,))
def top_k(x: Tensor, k: Any, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, Tensor]:
    """Of equal values the one with the lower place comes first."""
    values, places = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
    return values.narrow(axis, 0, scalar(k)), places.narrow(axis, 0, scalar(k))
