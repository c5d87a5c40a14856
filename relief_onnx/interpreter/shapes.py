"""Rows for operators that change or read shapes: exact arithmetic in int64, on the CPU."""

from __future__ import annotations

import math
from typing import Any

import onnx
import torch
from torch import Tensor
from torch.nn import functional as F

from relief_onnx.interpreter.registry import Table
from relief_onnx.interpreter.values import as_list, scalar, to_tensor, torch_dtype

__all__ = ["ROWS"]

ROWS = Table()
op = ROWS.op


@op("Shape")
def shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(x.shape[start:end], dtype=torch.int64)


@op("Size")
def size(x: Tensor) -> Tensor:
    return torch.tensor(x.numel())


@op("Reshape", host=(1,))
def reshape(x: Tensor, shape: list[int], *, allowzero: int = 0) -> Tensor:
    if 0 in shape and not allowzero:
        shape = [x.shape[axis] if length == 0 else length for axis, length in enumerate(shape)]
    if -1 in shape and x.numel() == 0:
        known = math.prod(length for length in shape if length != -1)
        shape = [(0 if known == 0 else x.numel() // known) if length == -1 else length for length in shape]
    return x.reshape(shape)


@op("Flatten")
def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@op("Squeeze", host=(1,))
def squeeze(x: Tensor, axes: list[int] | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(as_list(axes)))


@op("Unsqueeze", host=(1,))
def unsqueeze(x: Tensor, axes: list[int]) -> Tensor:
    axes = as_list(axes)
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@op("Transpose")
def transpose(x: Tensor, *, perm: list[int] | None = None) -> Tensor:
    return x.permute(perm if perm is not None else list(range(x.dim()))[::-1])


@op("Concat")
def concat(*values: Tensor, axis: int) -> Tensor:
    return torch.cat(values, axis)


@op("Split", host=(1,))
def split(x: Tensor, split: list[int] | None = None, *, axis: int = 0, num_outputs: int | None = None, outputs: int) -> tuple[Tensor, ...]:
    if split is not None:
        return tuple(torch.split(x, split, axis))
    step = -(-x.shape[axis] // (num_outputs or outputs))
    return tuple(torch.split(x, step, axis))


@op("Expand", host=(1,))
def expand(x: Tensor, shape: list[int]) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, shape))


@op("Tile", host=(1,))
def tile(x: Tensor, repeats: list[int]) -> Tensor:
    return x.repeat(repeats)


@op("Identity")
def identity(x: Any) -> Any:
    return x


@op("Constant")
def constant(
    *,
    value_float: float | None = None,
    value_floats: list[float] | None = None,
    value_int: int | None = None,
    value_ints: list[int] | None = None,
) -> Tensor:
    if value_int is not None or value_ints is not None:
        return torch.tensor(value_int if value_int is not None else list(value_ints or ()), dtype=torch.int64)
    return torch.tensor(value_float if value_float is not None else list(value_floats or ()), dtype=torch.float32)


@op("ConstantOfShape", host=(0,))
def constant_of_shape(shape: list[int], *, value: onnx.TensorProto | None = None) -> Tensor:
    filling = torch.zeros(1) if value is None else to_tensor(value)
    return filling.expand(shape).contiguous() if shape else filling.reshape(())


@op("Range", either=(0, 1, 2))
def arange(start: Any, limit: Any, delta: Any, *, stash_type: int = 1) -> Tensor:
    """On the CPU; the type is that of any of the three (where all are constants they are tensors, and it is computed once)."""
    given = (start, limit, delta)
    dtype = next((value.dtype for value in given if isinstance(value, Tensor)), None)
    return torch.arange(*(scalar(value.tolist() if isinstance(value, Tensor) else value) for value in given), dtype=dtype)


@op("EyeLike")
def eye_like(x: Tensor, *, dtype: int | None = None, k: int = 0) -> Tensor:
    rows, columns = torch.arange(x.shape[0])[:, None], torch.arange(x.shape[1])[None]
    return (columns - rows == k).to(x.dtype if dtype is None else torch_dtype(dtype))


@op("Trilu", host=(1,))
def trilu(x: Tensor, k: int | None = None, *, upper: int = 1) -> Tensor:
    return (torch.triu if upper else torch.tril)(x, 0 if k is None else scalar(k))


@op("DepthToSpace")
def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    n, c, h, w = x.shape
    if mode == "CRD":
        return F.pixel_shuffle(x, blocksize)
    y = x.reshape(n, blocksize, blocksize, c // blocksize**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return y.reshape(n, c // blocksize**2, h * blocksize, w * blocksize)


@op("SpaceToDepth")
def space_to_depth(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    n, c, h, w = x.shape
    if mode == "CRD":
        return F.pixel_unshuffle(x, blocksize)
    y = x.reshape(n, c, h // blocksize, blocksize, w // blocksize, blocksize).permute(0, 3, 5, 1, 2, 4)
    return y.reshape(n, c * blocksize**2, h // blocksize, w // blocksize)


@op("Pad", host=(1, 2, 3))
def pad(
    x: Tensor, pads: list[int], constant_value: Any = None, axes: list[int] | None = None, *, mode: str = "constant", value: float = 0.0
) -> Tensor:
    chosen = list(range(x.dim())) if axes is None else [axis % x.dim() for axis in as_list(axes)]
    before, after = [0] * x.dim(), [0] * x.dim()
    for place, axis in enumerate(chosen):
        before[axis], after[axis] = pads[place], pads[place + len(chosen)]
    if mode == "constant":
        filling = value if constant_value is None else scalar(constant_value)
        return F.pad(x, [length for pair in zip(before[::-1], after[::-1], strict=True) for length in pair], value=filling)
    for axis in chosen:
        if before[axis] or after[axis]:
            x = x.index_select(axis, _places(x.shape[axis], before[axis], after[axis], mode).to(x.device))
    return x


def _places(length: int, before: int, after: int, mode: str) -> Tensor:
    """Where each entry of a padded axis comes from."""
    places = torch.arange(-before, length + after)
    if mode == "edge":
        return places.clamp(0, length - 1)
    if mode == "wrap":
        return places % length
    period = max(2 * (length - 1), 1)
    places = places % period
    return torch.where(places >= length, period - places, places)


@op("CenterCropPad", host=(1,))
def center_crop_pad(x: Tensor, shape: list[int], *, axes: list[int] | None = None) -> Tensor:
    for axis, wanted in zip(range(x.dim()) if axes is None else axes, shape, strict=True):
        missing = wanted - x.shape[axis]
        if missing < 0:
            x = x.narrow(axis, -missing // 2, wanted)
        elif missing > 0:
            pads = [0] * (2 * x.dim())
            pads[axis % x.dim()], pads[axis % x.dim() + x.dim()] = missing // 2, missing - missing // 2
            x = pad(x, pads)
    return x
