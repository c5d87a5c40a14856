"""The whole operator table: the rows of every family."""

from __future__ import annotations

from relief_onnx.interpreter import (
    activations,
    attention,
    control,
    convolution,
    elementwise,
    indexing,
    normalisation,
    pooling,
    products,
    recurrent,
    reductions,
    resizing,
    shapes,
)
from relief_onnx.interpreter.registry import Table

__all__ = ["TABLE"]

FAMILIES = (activations, attention, control, convolution, elementwise, indexing, normalisation, pooling, products, recurrent, reductions, resizing, shapes)
TABLE = Table(*(family.ROWS for family in FAMILIES))
