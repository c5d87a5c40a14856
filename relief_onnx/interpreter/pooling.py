"""Rows for pools. torch's own where it has the same padding, else windows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from relief_onnx.interpreter.registry import Table
from relief_onnx.interpreter.windows import padded, paddings, windows

__all__ = ["ROWS"]

ROWS = Table()
op = ROWS.op

MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVERAGE_POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _native(before: list[int], after: list[int], kernel: list[int]) -> bool:
    return before == after and all(0 <= 2 * low <= width for low, width in zip(before, kernel, strict=True))


def _reach(x: Tensor, before: list[int], after: list[int], kernel: list[int], strides: list[int], dilations: list[int]) -> list[int]:
    """Padding behind, with what ceil_mode adds so that the last window fits; none starts in the padding behind."""
    reached = []
    for axis, width in enumerate(kernel):
        span = (width - 1) * dilations[axis] + 1
        size = x.shape[2 + axis] + before[axis] + after[axis]
        count = -(-(size - span) // strides[axis]) + 1
        if (count - 1) * strides[axis] >= x.shape[2 + axis] + before[axis]:
            count -= 1
        reached.append(after[axis] + (count - 1) * strides[axis] + span - size)
    return reached


@op("MaxPool")
def max_pool(
    x: Tensor,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: list[int] | None = None,
    kernel_shape: list[int],
    pads: list[int] | None = None,
    storage_order: int = 0,
    strides: list[int] | None = None,
    outputs: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    rank = len(kernel_shape)
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    before, after = paddings(auto_pad, pads, x.shape[2:], kernel_shape, strides, dilations)
    if outputs == 1 and x.is_floating_point() and not ceil_mode and _native(before, after, kernel_shape):
        return MAX_POOLS[rank](x, kernel_shape, strides, before, dilations)
    if ceil_mode:
        after = _reach(x, before, after, kernel_shape, strides, dilations)
    lowest = float("-inf") if x.is_floating_point() else torch.iinfo(x.dtype).min
    y, places = windows(padded(x, before, after, lowest), kernel_shape, strides, dilations).max(-1)
    if outputs == 1:
        return y
    numbers = torch.arange(x[0, 0].numel(), device=x.device).reshape(x.shape[2:])
    if storage_order:
        numbers = torch.arange(x[0, 0].numel(), device=x.device).reshape(x.shape[2:][::-1]).permute(*reversed(range(rank)))
    numbers = windows(padded(numbers[None, None], before, after), kernel_shape, strides, dilations).expand(*y.shape, -1)
    planes = torch.arange(x.shape[0] * x.shape[1], device=x.device).reshape(*x.shape[:2], *[1] * rank) * x[0, 0].numel()
    return y, numbers.gather(-1, places[..., None])[..., 0] + planes


@op("AveragePool")
def average_pool(
    x: Tensor,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: list[int] | None = None,
    kernel_shape: list[int],
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    rank = len(kernel_shape)
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    before, after = paddings(auto_pad, pads, x.shape[2:], kernel_shape, strides, dilations)
    if not ceil_mode and max(dilations) == 1 and _native(before, after, kernel_shape):
        return AVERAGE_POOLS[rank](x, kernel_shape, strides, before, False, bool(count_include_pad))
    counted = torch.ones_like(x[:1, :1])
    if count_include_pad:
        counted = padded(counted, before, after, 1.0)
        counted_before, counted_after = [0] * rank, [0] * rank
    else:
        counted_before, counted_after = before, after
    if ceil_mode:
        reach = _reach(x, before, after, kernel_shape, strides, dilations)
        counted_after = [more + new - old for more, new, old in zip(counted_after, reach, after, strict=True)]
        after = reach
    total = windows(padded(x, before, after), kernel_shape, strides, dilations).sum(-1)
    return total / windows(padded(counted, counted_before, counted_after), kernel_shape, strides, dilations).sum(-1)


@op("LpPool")
def lp_pool(
    x: Tensor,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: list[int] | None = None,
    kernel_shape: list[int],
    p: int = 2,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    rank = len(kernel_shape)
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    before, after = paddings(auto_pad, pads, x.shape[2:], kernel_shape, strides, dilations)
    if ceil_mode:
        after = _reach(x, before, after, kernel_shape, strides, dilations)
    return windows(padded(x, before, after), kernel_shape, strides, dilations).norm(p, -1)


@op("GlobalAveragePool")
def global_average_pool(x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


@op("GlobalMaxPool")
def global_max_pool(x: Tensor) -> Tensor:
    return x.amax(tuple(range(2, x.dim())), keepdim=True)


@op("GlobalLpPool")
def global_lp_pool(x: Tensor, *, p: int = 2) -> Tensor:
    return x.norm(p, tuple(range(2, x.dim())), keepdim=True)


@op("MaxUnpool", host=(2,))
def max_unpool(
    x: Tensor,
    places: Tensor,
    output_shape: list[int] | None = None,
    *,
    kernel_shape: list[int],
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """Places count over the smallest output that fits; a larger one is filled up behind."""
    rank = len(kernel_shape)
    strides, pads = strides or [1] * rank, pads or [0] * 2 * rank
    sizes = [(size - 1) * strides[axis] + kernel_shape[axis] - pads[axis] - pads[axis + rank] for axis, size in enumerate(x.shape[2:])]
    y = x.new_zeros([*x.shape[:2], *sizes]).reshape(-1).scatter(0, places.reshape(-1), x.reshape(-1)).reshape([*x.shape[:2], *sizes])
    if output_shape is None:
        return y
    return padded(y, [0] * rank, [wanted - size for wanted, size in zip(output_shape[2:], sizes, strict=True)])
