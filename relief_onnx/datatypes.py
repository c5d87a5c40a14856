"""Plain frozen values that several modules share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["InputSpec"]


@dataclass(frozen=True)
class InputSpec:
    """One input of a model.

    `shape` has one entry per axis: an int is a fixed size, a str a symbolic one, None an unknown one.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]
