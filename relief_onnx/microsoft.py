"""Element-wise operators of domain com.microsoft for ONNX's reference evaluator, which computes what a constant becomes.

The evaluator also hands on the attributes of a standard operator with the same name; those mean nothing here.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx.reference.op_run import OpRun

__all__ = ["EVALUATED", "MICROSOFT"]

MICROSOFT = "com.microsoft"
Values = NDArray[Any]


class Gelu(OpRun):
    """x times the share of the normal distribution below x."""

    op_domain = MICROSOFT

    def _run(self, x: Values, **_: Any) -> tuple[Values]:
        """The value, alone in a tuple."""
        return ((x * 0.5 * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2)))).astype(x.dtype),)


class FastGelu(OpRun):
    """The same by a hyperbolic tangent."""

    op_domain = MICROSOFT

    def _run(self, x: Values, **_: Any) -> tuple[Values]:
        """The value, alone in a tuple."""
        return ((x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))).astype(x.dtype),)


class QuickGelu(OpRun):
    """x times the sigmoid of alpha x."""

    op_domain = MICROSOFT

    def _run(self, x: Values, alpha: float | None = None, **_: Any) -> tuple[Values]:
        """The value, alone in a tuple."""
        return ((x / (1 + np.exp(-(1.702 if alpha is None else alpha) * x))).astype(x.dtype),)


EVALUATED: list[type[OpRun]] = [Gelu, FastGelu, QuickGelu]
