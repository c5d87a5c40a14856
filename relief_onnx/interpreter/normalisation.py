"""Rows for normalisation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from relief_onnx.interpreter.registry import Mode, Table

__all__ = ["ROWS"]

ROWS = Table()
op = ROWS.op


def _per_channel(values: Mapping[str, Any]) -> str | None:
    return None if values.get("spatial", 1) else "statistics for each place, spatial = 0"


@op("BatchNormalization", statistics=(3, 4), pure=False, check=_per_channel)
def batch_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    spatial: int = 1,
    training_mode: int = 0,
    outputs: int = 1,
    state: Mode,
    updates: bool,
) -> Tensor | tuple[Tensor, ...]:
    """As the file says; but a network that is training normalises by the batch, and updates the running statistics in place.

    Statistics that are no initializers of their own cannot go back into the file: they stay, in training too.
    """
    if training_mode:
        axes = [axis for axis in range(x.dim()) if axis != 1]
        batch_var, batch_mean = torch.var_mean(x, axes, correction=0)
        y = F.batch_norm(x, None, None, scale, bias, True, 0.0, epsilon)
        return (y, mean * momentum + batch_mean * (1 - momentum), var * momentum + batch_var * (1 - momentum))[:outputs]
    if state.training and updates and x.numel() > x.shape[1]:  # one value for each channel has no variance
        return F.batch_norm(x, mean, var, scale, bias, True, 1 - momentum, epsilon)
    return F.batch_norm(x, mean, var, scale, bias, False, 0.0, epsilon)


@op("InstanceNormalization")
def instance_normalization(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    return torch.group_norm(x, x.shape[1], scale, bias, epsilon)


@op("GroupNormalization")
def group_normalization_by_group(
    x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5, num_groups: int, stash_type: int = 1
) -> Tensor:
    """Opset 18 has one scale and bias for each group."""
    repeats = x.shape[1] // num_groups
    return torch.group_norm(x, num_groups, scale.repeat_interleave(repeats), bias.repeat_interleave(repeats), epsilon)


@op("GroupNormalization", since=21)
def group_normalization(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5, num_groups: int, stash_type: int = 1) -> Tensor:
    return torch.group_norm(x, num_groups, scale, bias, epsilon)


@op("LayerNormalization")
def layer_normalization(
    x: Tensor, scale: Tensor, bias: Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1, outputs: int = 1
) -> Tensor | tuple[Tensor, ...]:
    shape = x.shape[axis:]
    if outputs == 1 and scale.shape == shape and (bias is None or bias.shape == shape):
        return F.layer_norm(x, shape, scale, bias, epsilon)
    axes = list(range(axis % x.dim(), x.dim()))
    var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    inverse = torch.rsqrt(var + epsilon)
    y = (x - mean) * inverse * scale
    return (y if bias is None else y + bias, mean, inverse)[:outputs]


@op("RMSNormalization")
def rms_normalization(x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Tensor:
    axes = list(range(axis % x.dim(), x.dim()))
    return x * torch.rsqrt(x.square().mean(axes, keepdim=True) + epsilon) * scale


@op("LpNormalization")
def lp_normalization(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    norm = x.norm(p, axis, keepdim=True)
    return torch.where(norm == 0, 0.0, x / torch.where(norm == 0, 1.0, norm))


@op("MeanVarianceNormalization")
def mean_variance_normalization(x: Tensor, *, axes: tuple[int, ...] = (0, 2, 3)) -> Tensor:
    var, mean = torch.var_mean(x, tuple(axes), correction=0, keepdim=True)
    return (x - mean) / (torch.sqrt(var) + 1e-9)


@op("LRN")
def local_response_normalization(x: Tensor, *, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0, size: int) -> Tensor:
    before, after = math.floor((size - 1) / 2), math.ceil((size - 1) / 2)
    squares = F.pad(x.square().movedim(1, -1), (before, after)).unfold(-1, size, 1).sum(-1).movedim(-1, 1)
    return x * (bias + alpha / size * squares) ** -beta
