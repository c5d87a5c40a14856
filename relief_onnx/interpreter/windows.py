"""Windows that slide over the spatial axes: padding as ONNX means it, shared by convolutions and pools."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["padded", "paddings", "windows"]


def paddings(
    auto_pad: str, pads: Sequence[int] | None, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Padding before and after each spatial axis. sizes: lengths of the axes; kernel: lengths of the window."""
    rank = len(kernel)
    if auto_pad in ("NOTSET", "VALID", ""):
        given = list(pads) if pads and auto_pad != "VALID" else [0] * (2 * rank)
        return given[:rank], given[rank:]
    before, after = [], []
    for size, width, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        count = -(-size // stride)
        total = max((count - 1) * stride + (width - 1) * dilation + 1 - size, 0)
        small = total // 2
        before.append(total - small if auto_pad == "SAME_LOWER" else small)
        after.append(small if auto_pad == "SAME_LOWER" else total - small)
    return before, after


def padded(x: Tensor, before: Sequence[int], after: Sequence[int], value: float = 0.0) -> Tensor:
    """x [n, c, *spatial] with more (or, below 0, fewer) entries on its spatial axes."""
    if not any(before) and not any(after):
        return x
    return F.pad(x, [length for pair in zip(before[::-1], after[::-1], strict=True) for length in pair], value=value)


def windows(x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> Tensor:
    """x [n, c, *spatial] as [n, c, *positions, entries of the window]: a view but for the last step."""
    rank = len(kernel)
    for axis in range(rank):
        x = x.unfold(2 + axis, (kernel[axis] - 1) * dilations[axis] + 1, strides[axis])[..., :: dilations[axis]]
    return torch.flatten(x, -rank)
