"""Conjugate gradients for neurons that keep different inputs."""

from __future__ import annotations

import numpy as np
import pytest

from relief_onnx.gradients import kept_solution

FEATURES, UNITS = 96, 40


@pytest.mark.parametrize("seed", range(8))
def test_neurons_that_are_done_early_stay_so(seed: int) -> None:
    """Some have a few inputs and are solved in as many steps, others take hundreds: all are right in the end."""
    rng = np.random.default_rng(seed)
    basis, ridge = np.linalg.qr(rng.standard_normal((FEATURES, FEATURES)))[0], 1e-4
    sizes = np.geomspace(ridge, 1.0, FEATURES)
    moments, root = basis @ np.diag(sizes) @ basis.T, basis @ np.diag(np.sqrt(sizes)) @ basis.T
    pull, keep = rng.standard_normal((UNITS, FEATURES)) @ root, rng.random((UNITS, FEATURES)) < np.geomspace(0.02, 1.0, UNITS)[:, None]
    found = kept_solution(moments, pull, ridge, keep, 1e12)
    system = moments + ridge * np.eye(FEATURES)
    for row in range(UNITS):
        kept = np.flatnonzero(keep[row])
        assert not found[row, ~keep[row]].any()
        right = np.linalg.solve(system[np.ix_(kept, kept)], pull[row, kept]) if len(kept) else np.zeros(0)
        error = found[row, kept] - right
        assert error @ system[np.ix_(kept, kept)] @ error <= 2e-5 * (right @ pull[row, kept])
