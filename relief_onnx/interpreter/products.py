"""Rows for products of matrices."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from relief_onnx.interpreter.registry import Table

__all__ = ["ROWS", "gemm"]

ROWS = Table()
op = ROWS.op


@op("MatMul")
def matmul(a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


@op("Gemm")
def gemm(
    a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0
) -> Tensor:
    a = a.t() if transA else a
    if alpha == 1 and (c is None or (beta == 1 and c.dim() <= 1)):
        return F.linear(a, b if transB else b.t(), c)
    y = alpha * (a @ (b.t() if transB else b))
    return y if c is None else y + beta * c


@op("Einsum")
def einsum(*values: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation, *values)


@op("Det")
def determinant(x: Tensor) -> Tensor:
    return torch.linalg.det(x)
