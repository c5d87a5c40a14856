"""`--keep` is what is left in the end, whatever dies of the cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import Net

import relief_onnx
from relief_onnx.kept_share import SHORT

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
