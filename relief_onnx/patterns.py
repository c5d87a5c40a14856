"""N:M patterns: of every m consecutive inputs of a neuron n stay, as sparse matrix units of accelerators want it.

TensorRT and cuSPARSELt look for 2:4 along the input channels, for each output and each offset of the kernel by itself.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from relief_onnx.errors import OptionError

__all__ = ["keep_pattern", "parse_pattern"]


def parse_pattern(text: str) -> tuple[int, int]:
    """(n, m) of "n:m". Raises OptionError unless 1 <= n < m."""
    found = re.fullmatch(r"\s*([0-9]+)\s*:\s*([0-9]+)\s*", text)
    n, m = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= n < m:
        raise OptionError(f"{text!r} is no pattern; write N:M with N at least 1 and below M, as 2:4 (of every 4 inputs 2 stay)")
    return n, m


def keep_pattern(shares: NDArray[np.float64], n: int, m: int) -> NDArray[np.bool_]:
    """Flags of the n largest shares in every block of m consecutive inputs; of equal ones the first stay.

    shares: [out, in per group, ...]. Blocks run along axis 1, for each output and each further index apart, so never across groups.
    The last block may be shorter than m; of it n stay too, or all.
    """
    size = shares.shape[1]
    lines = np.moveaxis(shares, 1, -1)
    padded = np.full((*lines.shape[:-1], -(-size // m) * m), -np.inf)
    padded[..., :size] = lines
    blocks = padded.reshape(*lines.shape[:-1], -1, m)
    best = np.argsort(-blocks, axis=-1, kind="stable")[..., :n]  # padding comes last in its block, so it ranks last
    keep = np.zeros(blocks.shape, bool)
    np.put_along_axis(keep, best, True, -1)
    flags: NDArray[np.bool_] = np.ascontiguousarray(np.moveaxis(keep.reshape(padded.shape)[..., :size], -1, 1))
    return flags
