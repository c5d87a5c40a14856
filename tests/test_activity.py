"""Activity: means within groups of samples, however the samples come in batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from relief_onnx import activity
from relief_onnx.activity import Activity

GROUPS = 4
X = np.random.default_rng(0).standard_normal((12, 3, 5)).astype(np.float32)
LABELS = np.random.default_rng(1).integers(0, GROUPS - 1, 12)  # the last group stays empty


def measured(step: int) -> Activity:
    grouping: Any = SimpleNamespace(groups=GROUPS)
    found = Activity((1,), ("signed", "squares"), grouping)
    for start in range(0, 12, step):
        found.add(X[start : start + step], 1.0, LABELS[start : start + step])
    return found


@pytest.mark.parametrize("step", [1, 5, 12])
def test_groups_have_means_of_their_own(step: int) -> None:
    found = measured(step)
    for group in range(GROUPS - 1):
        np.testing.assert_allclose(found.mean("signed", group)[0, :, 0], X[group == LABELS].mean((0, 2)), rtol=1e-6)
        np.testing.assert_allclose(found.mean("squares", group)[0, :, 0], np.square(X[group == LABELS]).mean((0, 2)), rtol=1e-6)
    for group in (None, GROUPS - 1):
        np.testing.assert_allclose(found.mean("signed", group)[0, :, 0], X.mean((0, 2)), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(found.weights, np.bincount(LABELS, minlength=GROUPS) / 12)


@pytest.mark.parametrize("step", [1, 5, 12])
def test_what_is_large_is_kept_for_all_groups_together(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    apart = measured(step)
    monkeypatch.setattr(activity, "LARGEST", 3 * GROUPS - 1)
    found = measured(step)
    for group in (None, 0, GROUPS - 1):
        np.testing.assert_allclose(found.mean("signed", group), apart.mean("signed"), rtol=1e-6, atol=1e-8)
    np.testing.assert_array_equal(found.weights, apart.weights)


@pytest.mark.parametrize("largest", [0, 1 << 20])
def test_what_cannot_be_told_apart_counts_for_every_group(largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activity, "LARGEST", largest)
    grouping: Any = SimpleNamespace(groups=GROUPS)
    found = Activity((0,), ("signed",), grouping)
    for _ in range(2):
        found.add(X, 1.0, LABELS)
    for group in (None, 0, 3):
        np.testing.assert_allclose(found.mean("signed", group)[:, 0, 0], X.mean((1, 2)), rtol=1e-6)
