"""Rows for quantisation, and for the two operators of ai.onnx.ml that work on numbers alone.

Rounding has no gradient: training passes it straight through, as is usual, so what lies before a QuantizeLinear can still be trained. While
gradients are recorded the quantised numbers are therefore whole numbers in a floating type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
import torch
from torch import Tensor

from relief_onnx.interpreter.registry import Table
from relief_onnx.interpreter.values import torch_dtype

__all__ = ["ROWS"]

ROWS = Table()
op = ROWS.op
LIMITS = {torch.int8: (-128, 127), torch.uint8: (0, 255), torch.int16: (-32768, 32767), torch.uint16: (0, 65535)}


def _spread(values: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """A scale or zero point for every entry of x: one for all, one for each place along the axis, or one for each block of places."""
    if values.numel() == 1:
        return values.reshape(())
    if block_size:
        return values.repeat_interleave(block_size, axis).narrow(axis, 0, x.shape[axis])
    shape = [1] * x.dim()
    shape[axis] = -1
    return values.reshape(shape)


@op("DequantizeLinear", domain="com.microsoft", frozen=(1, 2))
@op("DequantizeLinear", frozen=(1, 2))
def dequantize(
    x: Tensor, scale: Tensor, zero: Tensor | None = None, *, axis: int = 1, block_size: int = 0, output_dtype: int = 0
) -> Tensor:
    values = x.to(scale.dtype)
    if zero is not None:
        values = values - _spread(zero.to(scale.dtype), x, axis, block_size)
    return values * _spread(scale, x, axis, block_size)


def _whole(values: Mapping[str, Any]) -> str | None:
    kind = values.get("output_dtype", 0)
    if kind and torch_dtype(kind) not in LIMITS:
        return f"output type {onnx.TensorProto.DataType.Name(kind)}"
    return None


class _Rounded(torch.autograd.Function):
    """round(x) between two bounds whose gradient is 1 inside them and 0 outside."""

    @staticmethod
    def forward(context: Any, x: Tensor, low: Any, high: Any) -> Tensor:
        context.save_for_backward((x >= low) & (x <= high))
        return torch.minimum(torch.maximum(torch.round(x), torch.as_tensor(low)), torch.as_tensor(high))

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = context.saved_tensors
        return gradient * inside, None, None


@op("QuantizeLinear", domain="com.microsoft", frozen=(1, 2))
@op("QuantizeLinear", frozen=(1, 2), check=_whole)
def quantize(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    saturate: int = 1,
) -> Tensor:
    dtype = zero.dtype if zero is not None else torch_dtype(output_dtype) if output_dtype else torch.uint8
    low, high = LIMITS[dtype]
    values = x / _spread(scale, x, axis, block_size)
    offset = 0.0 if zero is None else _spread(zero.to(values.dtype), x, axis, block_size)
    if x.requires_grad and torch.is_grad_enabled():
        return _Rounded.apply(values, low - offset, high - offset) + offset
    return (torch.round(values) + offset).clamp(low, high).to(dtype)


@op("DynamicQuantizeLinear")
def dynamic_quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 over the range of x, 0 among it; the range itself is held to be constant in training."""
    with torch.no_grad():
        low, high = x.min().clamp(max=0), x.max().clamp(min=0)
        scale = (high - low) / 255
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        zero = torch.round(-low / scale).clamp(0, 255).to(torch.uint8)
    return quantize(x, scale, zero), scale, zero


@op("MatMulInteger")
def matmul_integer(a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None) -> Tensor:
    left, right = a.long(), b.long()
    if a_zero is not None:
        left = left - (a_zero.long()[:, None] if a_zero.numel() > 1 and a_zero.dim() == 1 else a_zero.long())
    if b_zero is not None:
        right = right - b_zero.long()
    return (left @ right).int()


@op("Scaler", domain="ai.onnx.ml", frozen=(0,))
def scaler(x: Tensor, *, offset: list[float] | None = None, scale: list[float] | None = None) -> Tensor:
    values = x.float()
    shifted = values if offset is None else values - values.new_tensor(offset)
    return shifted if scale is None else shifted * values.new_tensor(scale)


@op("Binarizer", domain="ai.onnx.ml")
def binarizer(x: Tensor, *, threshold: float = 0.0) -> Tensor:
    return (x > threshold).to(x.dtype)
