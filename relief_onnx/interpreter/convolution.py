"""Rows for convolutions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from relief_onnx.interpreter.registry import Table
from relief_onnx.interpreter.windows import padded, paddings

__all__ = ["ROWS", "conv"]

ROWS = Table()
op = ROWS.op

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@op("Conv")
def conv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    rank = w.dim() - 2
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    before, after = paddings(auto_pad, pads, x.shape[2:], w.shape[2:], strides, dilations)
    if before != after or min(before) < 0:
        x, before = padded(x, before, after), [0] * rank
    return CONVOLUTIONS[rank](x, w, b, strides, before, dilations, group)


@op("ConvTranspose")
def conv_transpose(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    output_padding: list[int] | None = None,
    output_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    rank = w.dim() - 2
    strides, dilations, extra = strides or [1] * rank, dilations or [1] * rank, output_padding or [0] * rank
    function = TRANSPOSED[rank]
    if output_shape is None and auto_pad in ("NOTSET", "VALID"):
        before, after = paddings(auto_pad, pads, x.shape[2:], w.shape[2:], strides, dilations)
        if before == after and all(more < stride for more, stride in zip(extra, strides, strict=True)):
            return function(x, w, b, strides, before, extra, group, dilations)
    else:
        before, after = _transposed_pads(auto_pad, output_shape, x.shape[2:], w.shape[2:], strides, dilations, extra)
    y = function(x, w, None, strides, 0, 0, group, dilations)
    y = padded(y, [-low for low in before], [more - high for more, high in zip(extra, after, strict=True)])
    return y if b is None else y + b.reshape(-1, *[1] * rank)


def _transposed_pads(
    auto_pad: str,
    output_shape: list[int] | None,
    sizes: torch.Size,
    kernel: torch.Size,
    strides: list[int],
    dilations: list[int],
    extra: list[int],
) -> tuple[list[int], list[int]]:
    """What is cut off so that the output has the wanted shape: `output_shape`, or stride times the input."""
    wanted = [size * stride for size, stride in zip(sizes, strides, strict=True)] if output_shape is None else output_shape[-len(sizes) :]
    before, after = [], []
    for axis, length in enumerate(wanted):
        full = strides[axis] * (sizes[axis] - 1) + extra[axis] + (kernel[axis] - 1) * dilations[axis] + 1
        total = max(full - length, 0)
        low = total // 2 if auto_pad == "SAME_UPPER" else total - total // 2
        before.append(low)
        after.append(full - length - low)
    return before, after
