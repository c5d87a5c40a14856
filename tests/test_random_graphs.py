"""The law "mask = surgery" on random graphs. RELIEF_ONNX_EXAMPLES sets how many (`make nightly` takes thousands)."""

from __future__ import annotations

import os

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from laws import check_mask_is_surgery, check_units_go
from random_graphs import KINDS, STEPS, build

EXAMPLES = int(os.environ.get("RELIEF_ONNX_EXAMPLES", "300"))
steps = st.lists(st.tuples(st.integers(0, len(STEPS) - 1), st.integers(0, 999)), min_size=1, max_size=14)
graphs = given(steps, st.sampled_from([9, 11, 13, 17, 18, 21]), st.sampled_from(KINDS), st.booleans(), st.integers(0, 999))
many = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@many
@graphs
def test_mask_is_surgery(steps: list[tuple[int, int]], opset: int, kind: str, dynamic: bool, seed: int) -> None:
    model, feed = build(steps, opset, kind, dynamic)
    check_mask_is_surgery(model, feed, np.random.default_rng(seed))


@many
@graphs
def test_whole_units_go(steps: list[tuple[int, int]], opset: int, kind: str, dynamic: bool, seed: int) -> None:
    model, feed = build(steps, opset, kind, dynamic)
    check_units_go(model, feed, np.random.default_rng(seed), all_go=False)
