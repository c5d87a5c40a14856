"""The whole operator table: the rows of every family."""

from __future__ import annotations

from relief_onnx.interpreter import (
    activations,
    control,
    convolution,
    elementwise,
    indexing,
    normalisation,
    pooling,
    products,
    recurrent,
    reductions,
    shapes,
)
from relief_onnx.interpreter.registry import Table

__all__ = ["TABLE"]

FAMILIES = (activations, control, convolution, elementwise, indexing, normalisation, pooling, products, recurrent, reductions, shapes)
TABLE = Table(*(family.ROWS for family in FAMILIES))
