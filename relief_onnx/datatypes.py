"""Plain frozen values that several modules share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["InputSpec", "Kept"]

# By weight: which of its rows and columns [out, in per group] are left. Columns are [directions, kept] where each direction of a recurrent
# node has lost others.
Kept = Mapping[str, tuple[NDArray[np.intp], NDArray[np.intp]]]


@dataclass(frozen=True)
class InputSpec:
    """One input of a model.

    `shape` has one entry per axis: an int is a fixed size, a str a symbolic one, None an unknown one. Where the model gives no
    shape at all it is empty, and `ranked` is False: any number of axes will do.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]
    ranked: bool = True
