"""Means of x, |x| and x^2 from one look at x: each is what it would be alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_compensate import Array, corrected, made, random_masks
from test_score import DENSE

from relief_onnx.graph import Graph
from relief_onnx.layers import Layer, find
from relief_onnx.streaming import InputMeans


def moments(x: Array, layer: Layer, parts: int = 1, **given: Any) -> InputMeans:
    found = InputMeans(None if layer.geometry else layer.input_axis, **given)
    for part in np.array_split(x, parts):
        for job in found.jobs(part, 0.5):
            job()
    return found


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("name", ["2d", "stride", "transposed stride", *list(DENSE)[:1], *list(DENSE)[-1:]])
def test_all_moments_from_one_look(name: str, positive: bool) -> None:
    model, x = made(name)
    x = np.concatenate([np.abs(x), np.abs(x) if positive else x])  # what is negative is not in the first sample
    (layer,) = find(Graph(model)).layers
    every = moments(x, layer, signed=True, squares=True)
    for moment, values in (("signed", x), ("absolute", np.abs(x)), ("squares", x.astype(float) ** 2)):
        wanted = moments(values.astype(np.float32), layer, signed=True).input_means(layer)
        np.testing.assert_allclose(every.input_means(layer, moment), wanted, rtol=1e-5, atol=1e-6)
        split = moments(x, layer, 3, signed=True, squares=True)
        np.testing.assert_allclose(split.input_means(layer, moment), wanted, rtol=1e-5, atol=1e-6)
    magnitude = np.abs(layer.view.apply(Graph(model).array(layer.weight)))
    for options in ({}, {"power": 2}, {"per_weight": True}):
        if layer.geometry is None or options != {"power": 2}:
            alone, all_of_them = (moments(x, layer, **options, signed=more, squares=more) for more in (False, True))
            assert np.array_equal(alone.contributions(layer, magnitude)[0], all_of_them.contributions(layer, magnitude)[0])


def test_squares_that_float32_cannot_hold() -> None:
    (layer,) = find(Graph(made("2d")[0])).layers
    x = np.full((2, 3, 6, 5), 1e25, np.float32)
    np.testing.assert_allclose(moments(x, layer, squares=True).input_means(layer, "squares"), 1e50, rtol=1e-6)


def test_what_was_not_measured_that_way_is_an_error() -> None:
    (layer,) = find(Graph(made("2d")[0])).layers
    with pytest.raises(ValueError, match="means of channels were measured"):
        InputMeans(1, signed=True).input_means(layer)
    model, _ = made("2d")
    with pytest.raises(ValueError, match="reads \\[3, 3, 2\\] means"):
        corrected(model, random_masks(Graph(model), 0), {layer.name: np.ones(3)})
