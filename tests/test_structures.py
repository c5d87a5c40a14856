"""The law "mask = surgery" on the structures of real networks: all their hidden channels can go."""

from __future__ import annotations

import numpy as np
import pytest
from architectures import ARCHITECTURES
from laws import check_mask_is_surgery, check_units_go

from relief_onnx.graph import Graph
from relief_onnx.layers import find
from relief_onnx.model import prepare
from relief_onnx.walk import trace


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nothing_but_the_output_is_pinned(name: str) -> None:
    graph = Graph(prepare(ARCHITECTURES[name]()[0]))
    plan = find(graph)
    coupling = trace(graph, plan)
    assert not coupling.barriers - {place for norm in coupling.restored.values() for place in (norm.first, norm.last)}
    assert not plan.skipped or name.startswith(("attention", "gated", "transformer", "vision"))  # tables are not layers
    assert set(coupling.pinned.values()) == {"it is an output of the model"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_mask_is_surgery(name: str) -> None:
    model, feed = ARCHITECTURES[name]()
    for seed in range(4):
        check_mask_is_surgery(model, feed, np.random.default_rng(seed))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_whole_units_go(name: str) -> None:
    model, feed = ARCHITECTURES[name]()
    assert all(check_units_go(model, feed, np.random.default_rng(seed)).units_removed for seed in range(4))
