"""Inverse roots of symmetric positive definite matrices, by halves: nearly all of it is matrix products, which run several times faster.

With A = L L' the root is L^-1, so that A^-1 b = root' (root b) and the diagonal of A^-1 is that of root' root.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["inverse_root"]

# Rows below which LAPACK does it.
WHOLE = 32


def inverse_root(matrix: NDArray[Any]) -> NDArray[Any]:
    """L^-1 of [n, n] = L L', in the matrix' own type. Raises LinAlgError where the matrix is not positive definite."""
    count = len(matrix)
    if count <= WHOLE:
        return np.asarray(np.linalg.inv(np.linalg.cholesky(matrix))) if count else matrix
    half = count // 2
    first = inverse_root(matrix[:half, :half])
    seen = first @ matrix[:half, half:]
    second = inverse_root(matrix[half:, half:] - seen.T @ seen)  # what the first half does not explain of the second
    found = np.zeros_like(matrix)
    found[:half, :half], found[half:, half:] = first, second
    found[half:, :half] = -second @ (seen.T @ first)
    return found
