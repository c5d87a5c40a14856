"""The whole operator table: the rows of every family."""

from __future__ import annotations

from relief_onnx.interpreter import (
    activations,
    convolution,
    elementwise,
    normalisation,
    pooling,
    products,
    reductions,
    shapes,
)
from relief_onnx.interpreter.registry import Table

__all__ = ["TABLE"]

TABLE = Table(
    *(
        family.ROWS
        for family in (
            activations,
            convolution,
            elementwise,
            normalisation,
            pooling,
            products,
            reductions,
            shapes,
        )
    )
)
