"""`--keep` is what is left in the end, whatever dies of the cut."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import Net

import relief_onnx
from relief_onnx.channels import Choice
from relief_onnx.graph import Graph
from relief_onnx.kept_share import SHORT
from relief_onnx.layers import find
from relief_onnx.states import NO_STATES
from relief_onnx.unit_budget import COST_EXPONENT, _costs, choose_units, macs_left, unit_values
from relief_onnx.walk import trace

SAMPLES = Path(__file__).parents[1] / "sample_models"


@pytest.mark.parametrize("keep", [50, 10])
@pytest.mark.parametrize("granularity", ["weight", "connection"])
@pytest.mark.parametrize("criterion", ["flow", "relief", "magnitude", "wanda"])
def test_what_is_left_is_what_was_asked_for(criterion: str, granularity: str, keep: int) -> None:
    """Local criteria leave units without readers: at 10 % of this model 4 to 8.5 % were left before."""
    feeds = [{"image": value[None]} for value in np.random.default_rng(0).standard_normal((64, 1, 28, 28)).astype(np.float32)]
    result = relief_onnx.prune(
        SAMPLES / "lenet5.onnx", feeds, criterion=criterion, granularity=granularity, keep=f"{keep}%", threads=1, repair="none"
    )
    assert keep * (1 - SHORT) <= result.report["totals"]["kept_percent"] <= keep


def test_what_nobody_reads_is_no_reason_to_keep_the_rest() -> None:
    """Half of this model's weights are dead from the start: of the others as much goes as was asked for."""
    net = Net(seed=1)
    x = net.input("N", 8)
    net.op("MatMul", x, net.weight(8, 16))
    y = net.op("MatMul", net.op("Relu", net.op("MatMul", x, net.weight(8, 12))), net.weight(12, 4))
    feeds = [{x: value[None]} for value in np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)]
    options: dict[str, Any] = {"criterion": "magnitude", "granularity": "weight", "keep": "50%", "threads": 1}
    report = relief_onnx.prune(net.model(y), feeds, **options).report
    kept = {row["weights"]: row["weights_kept"] for row in report["layers"]}
    assert kept[128] == 0
    assert 0.45 <= (kept[96] + kept[48]) / 144 <= 0.5


WIDTHS = (16, 72, 40, 24, 56, 4)


@pytest.mark.parametrize("keep", [0.75, 0.5, 0.2])
@pytest.mark.parametrize("criterion", ["flow", "relief"])
def test_no_further_block_of_channels_fits(criterion: str, keep: float) -> None:
    """Rounded to 8 the last units to go used to leave room for others; without rounding the cut is that of the ranking alone."""
    net = Net(seed=2)
    x = y = net.input("N", WIDTHS[0])
    for inputs, out in pairwise(WIDTHS):
        y = net.op("MatMul", net.op("Relu", y) if y != x else y, net.weight(inputs, out))
    model, feed = net.model(y), {x: np.random.default_rng(0).standard_normal((64, WIDTHS[0])).astype(np.float32)}
    scores = relief_onnx.score(model, [feed], criterion=criterion, granularity="channel", threads=1)
    graph = Graph(model)
    plan = find(graph)
    coupling = trace(graph, plan, NO_STATES)
    macs = {layer.name: float(np.prod(layer.view.shape)) for layer in plan.layers}
    total, every = sum(macs.values()), frozenset(plan.by_weight())

    def chosen(round_to: int) -> list[Choice]:
        return choose_units(plan, coupling, scores, alpha=lambda _: 1.0, keep=keep, macs=macs, allowed=every, round_to=round_to)

    def left(choices: list[Choice], back: frozenset[int] = frozenset()) -> float:
        return macs_left(plan, coupling, frozenset(unit for choice in choices for unit in choice.removed) - back, macs) / total

    choices = chosen(8)
    assert left(choices) <= keep
    cut = [choice for choice in choices if choice.removed]
    assert cut
    for choice in cut:
        assert len(choice.removed) % 8 == 0
        assert left(choices, frozenset(sorted(choice.removed)[:8])) > keep
    if criterion == "flow":
        exact, values = chosen(1), unit_values(plan, coupling, scores)
        cost = {unit: each for unit, each in _costs(plan, coupling, macs).items() if unit in values}
        worth = {unit: value / cost[unit] ** COST_EXPONENT for unit, value in values.items()}
        gone = {unit for choice in exact for unit in choice.removed}
        stays = {unit for choice in exact for unit in choice.group.free} - gone
        assert max(worth[unit] for unit in gone) <= min(worth[unit] for unit in stays)
