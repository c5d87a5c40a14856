"""Rows for Fourier transforms and patches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from relief_onnx.interpreter.registry import Table
from relief_onnx.interpreter.values import scalar
from relief_onnx.interpreter.windows import padded

__all__ = ["ROWS"]

ROWS = Table()
op = ROWS.op


def _transform(x: Tensor, length: Any, axis: int, inverse: int, onesided: int) -> Tensor:
    """x [..., 1 or 2]: real numbers, or real and imaginary parts."""
    axis = axis % x.dim()
    if inverse and onesided:
        wanted = None if length is None else scalar(length)
        return torch.fft.irfft(torch.view_as_complex(x.contiguous()), wanted, axis).unsqueeze(-1)
    count = x.shape[axis] if length is None else scalar(length)
    values = torch.view_as_complex(x.contiguous()) if x.shape[-1] == 2 else x[..., 0]
    if inverse:
        return torch.view_as_real(torch.fft.ifft(values, count, axis))
    return torch.view_as_real(torch.fft.rfft(values, count, axis) if onesided else torch.fft.fft(values, count, axis))


@op("DFT", since=17, host=(1,))
def dft_along_attribute(x: Tensor, dft_length: Any = None, *, axis: int = 1, inverse: int = 0, onesided: int = 0) -> Tensor:
    return _transform(x, dft_length, axis, inverse, onesided)


@op("DFT", since=20, host=(1, 2))
def dft(x: Tensor, dft_length: Any = None, axis: Any = None, *, inverse: int = 0, onesided: int = 0) -> Tensor:
    return _transform(x, dft_length, -2 if axis is None else scalar(axis), inverse, onesided)


@op("STFT", host=(1, 3))
def stft(x: Tensor, frame_step: Any, window: Tensor | None = None, frame_length: Any = None, *, onesided: int = 1) -> Tensor:
    """x [batch, time, 1 or 2], or [batch, time] as PyTorch writes it, as [batch, frames, frequencies, 2]."""
    x = x.unsqueeze(-1) if x.dim() == 2 else x
    length = scalar(frame_length) if frame_length is not None else window.shape[0] if window is not None else x.shape[1]
    frames = x.unfold(1, length, scalar(frame_step)).transpose(-1, -2)
    if window is not None:
        frames = frames * window[:, None]
    return _transform(frames, None, 2, 0, onesided)


@op("Col2Im", host=(1, 2))
def col2im(
    x: Tensor,
    image_shape: list[int],
    block_shape: list[int],
    *,
    dilations: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """x [n, c * block, positions]: every patch is added where it came from."""
    rank = len(image_shape)
    strides, dilations, pads = strides or [1] * rank, dilations or [1] * rank, pads or [0] * 2 * rank
    sizes = [image_shape[axis] + pads[axis] + pads[axis + rank] for axis in range(rank)]
    numbers = torch.arange(torch.Size(sizes).numel()).reshape(sizes)
    for axis in range(rank):
        numbers = numbers.unfold(axis, (block_shape[axis] - 1) * dilations[axis] + 1, strides[axis])[..., :: dilations[axis]]
    places = numbers.flatten(0, rank - 1).flatten(1).t().reshape(-1).to(x.device)
    columns = x.reshape(x.shape[0], -1, places.numel())
    image = x.new_zeros(*columns.shape[:2], torch.Size(sizes).numel()).index_add(2, places, columns)
    return padded(image.unflatten(2, sizes), [-low for low in pads[:rank]], [-high for high in pads[rank:]])
