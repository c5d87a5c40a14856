"""Rows for random numbers: torch's own generator, so that a seed of torch repeats a run. Seeds in the file are not used."""

from __future__ import annotations

import torch
from torch import Tensor

from relief_onnx.interpreter.registry import Table
from relief_onnx.interpreter.values import torch_dtype

__all__ = ["ROWS"]

ROWS = Table()
op = ROWS.op


@op("RandomNormal", pure=False)
def random_normal(*, shape: list[int], dtype: int = 1, mean: float = 0.0, scale: float = 1.0, seed: float = 0.0) -> Tensor:
    return mean + scale * torch.randn(shape, dtype=torch_dtype(dtype))


@op("RandomUniform", pure=False)
def random_uniform(*, shape: list[int], dtype: int = 1, high: float = 1.0, low: float = 0.0, seed: float = 0.0) -> Tensor:
    return low + (high - low) * torch.rand(shape, dtype=torch_dtype(dtype))


@op("RandomNormalLike", pure=False)
def random_normal_like(x: Tensor, *, dtype: int | None = None, mean: float = 0.0, scale: float = 1.0, seed: float = 0.0) -> Tensor:
    return mean + scale * torch.randn(x.shape, dtype=x.dtype if dtype is None else torch_dtype(dtype), device=x.device)


@op("RandomUniformLike", pure=False)
def random_uniform_like(x: Tensor, *, dtype: int | None = None, high: float = 1.0, low: float = 0.0, seed: float = 0.0) -> Tensor:
    return low + (high - low) * torch.rand(x.shape, dtype=x.dtype if dtype is None else torch_dtype(dtype), device=x.device)


@op("Bernoulli", pure=False)
def bernoulli(x: Tensor, *, dtype: int | None = None, seed: float = 0.0) -> Tensor:
    return torch.bernoulli(x).to(x.dtype if dtype is None else torch_dtype(dtype))
