"""The whole operator table: the rows of every family."""

from __future__ import annotations

from relief_onnx.interpreter import (
    activations,
    attention,
    control,
    convolution,
    detection,
    elementwise,
    fused,
    fused_attention,
    indexing,
    normalisation,
    pooling,
    products,
    quantised,
    random_numbers,
    recurrent,
    reductions,
    resizing,
    shapes,
    signals,
)
from relief_onnx.interpreter.registry import Table

__all__ = ["TABLE"]

FAMILIES = (
    activations,
    attention,
    control,
    convolution,
    detection,
    elementwise,
    fused,
    fused_attention,
    indexing,
    normalisation,
    pooling,
    products,
    quantised,
    random_numbers,
    recurrent,
    reductions,
    resizing,
    shapes,
    signals,
)
TABLE = Table(*(family.ROWS for family in FAMILIES))
