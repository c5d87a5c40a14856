"""A view is an invertible chain of transposes and reshapes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relief_onnx.views import View

Steps = list[tuple[bool, int]]
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)
steps = st.lists(st.tuples(st.booleans(), st.integers(0, 10_000)), max_size=4)


def walk(shape: tuple[int, ...], steps: Steps) -> tuple[View, np.ndarray]:
    """A view and what numpy makes of numbered entries in the same way."""
    view, array = View.of(shape), np.arange(math.prod(shape)).reshape(shape)
    for is_transpose, seed in steps:
        rng = np.random.default_rng(seed)
        if is_transpose:
            order = rng.permutation(array.ndim).tolist()
            view, array = view.transpose(*order), array.transpose(order)
        else:
            target = _factors(array.size, rng)
            view, array = view.reshape(*target), array.reshape(target)
    return view, array


def _factors(size: int, rng: np.random.Generator) -> list[int]:
    found = []
    while size > 1 and len(found) < 3:
        factor = int(rng.choice([item for item in range(1, size + 1) if size % item == 0]))
        found.append(factor)
        size //= factor
    return [*found, size]


@given(shapes, steps)
def test_apply_and_invert(shape: tuple[int, ...], steps: Steps) -> None:
    view, array = walk(shape, steps)
    numbers = np.arange(array.size).reshape(shape)
    assert view.shape == array.shape
    assert np.array_equal(view.apply(numbers), array)
    assert np.array_equal(view.invert(array), numbers)


@given(shapes, steps)
def test_source_axis(shape: tuple[int, ...], steps: Steps) -> None:
    """Taking entries along a canonical axis is taking the same ones along its source axis."""
    view, array = walk(shape, steps)
    numbers = np.arange(array.size).reshape(shape)
    for axis, size in enumerate(array.shape):
        source = view.source_axis(axis)
        if source is None:
            continue
        for place in range(size):
            assert set(array.take(place, axis).flat) == set(numbers.take(place, source).flat)


def test_source_axis_is_found_where_there_is_one() -> None:
    view = View.of((2, 3, 4, 5)).transpose(3, 0, 1, 2).reshape(5, 2, 12)
    assert [view.source_axis(axis) for axis in range(3)] == [3, 0, None]
    assert View.of((4, 6)).reshape(-1, 3).source_axis(0) is None


def test_one_number_for_all_has_no_way_back() -> None:
    view = View.of((1, 1)).reshape(1).spread(3)
    assert view.apply(np.full((1, 1), 5)).tolist() == [5, 5, 5]
    assert view.source_axis(0) is None
    with pytest.raises(ValueError, match="one number stands for all"):
        view.invert(np.full(3, 5))
