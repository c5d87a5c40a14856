"""N:M patterns against a naive loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relief_onnx.errors import RecipeError
from relief_onnx.patterns import keep_pattern, parse_pattern


def naive(line: list[float], n: int, m: int) -> list[bool]:
    """One output at one offset: its inputs in order."""
    keep = [False] * len(line)
    for start in range(0, len(line), m):
        block = range(start, min(start + m, len(line)))
        for i in sorted(block, key=lambda i: (-line[i], i))[:n]:
            keep[i] = True
    return keep


@given(st.lists(st.integers(1, 3), min_size=0, max_size=2), st.integers(1, 11), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_each_block_keeps_its_best(kernel: list[int], inputs: int, n: int, more: int, seed: int) -> None:
    shares = np.random.default_rng(seed).integers(0, 4, (2, inputs, *kernel)).astype(float)  # few values, so many ties
    keep = keep_pattern(shares, n, n + more)
    assert keep.shape == shares.shape
    for place in np.ndindex(2, *kernel):
        line = (place[0], slice(None), *place[1:])
        assert keep[line].tolist() == naive(shares[line].tolist(), n, n + more)


def test_blocks_run_along_the_inputs() -> None:
    shares = np.arange(2 * 8 * 3 * 3, dtype=float).reshape(2, 8, 3, 3)
    keep = keep_pattern(shares, 2, 4)
    assert (keep.reshape(2, 2, 4, 3, 3).sum(2) == 2).all()
    assert keep[:, [2, 3, 6, 7]].all()


@pytest.mark.parametrize(("text", "wanted"), [("2:4", (2, 4)), ("1:2", (1, 2)), (" 3 : 16 ", (3, 16))])
def test_parse(text: str, wanted: tuple[int, int]) -> None:
    assert parse_pattern(text) == wanted


@pytest.mark.parametrize("text", ["", "2", "2:", "4:2", "0:4", "4:4", "-1:4", "2:4:8", "2/4", "two:four"])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="write N:M"):
        parse_pattern(text)
