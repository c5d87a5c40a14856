"""The law "mask = surgery" on random graphs. RELIEF_ONNX_EXAMPLES sets how many (a nightly run takes thousands)."""

from __future__ import annotations

import os

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from laws import check_mask_is_surgery
from random_graphs import STEPS, build

EXAMPLES = int(os.environ.get("RELIEF_ONNX_EXAMPLES", "300"))
steps = st.lists(st.tuples(st.integers(0, len(STEPS) - 1), st.integers(0, 999)), min_size=1, max_size=14)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(steps, st.sampled_from([9, 11, 13, 17, 21]), st.booleans(), st.booleans(), st.integers(0, 999))
def test_mask_is_surgery(steps: list[tuple[int, int]], opset: int, image: bool, dynamic: bool, seed: int) -> None:
    model, feed = build(steps, opset, image, dynamic)
    check_mask_is_surgery(model, feed, np.random.default_rng(seed))
