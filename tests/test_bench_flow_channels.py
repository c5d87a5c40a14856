"""The channel benchmark's search, count of work and table, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from benchmarks.flow_channels import table, verdicts
from benchmarks.flow_channels_data import Cells, at_most, best_rows, onnx_macs


def test_the_search_ends_below_the_target() -> None:
    found = at_most(lambda kept: kept**2, 0.5, steps=20, close=1e-4)
    assert found is not None
    assert found[1] == found[0] ** 2
    assert 0.4999 <= found[1] <= 0.5


def test_the_search_takes_the_best_of_a_staircase() -> None:
    tried: list[float] = []

    def share(kept: float) -> float:
        tried.append(kept)
        return np.floor(kept * 4) / 4 * 0.9

    found = at_most(share, 0.5, steps=9)
    assert found is not None
    assert found[1] == pytest.approx(0.45)
    assert len(tried) == 9
    assert at_most(lambda _: 0.8, 0.5) is None


def test_work_is_counted_from_a_run() -> None:
    rng = np.random.default_rng(0)
    weights = {"k": rng.standard_normal((4, 3, 3, 3)), "w": rng.standard_normal((10, 4)), "v": rng.standard_normal((10, 2))}
    nodes = [
        helper.make_node("Conv", ["input", "k"], ["c"], strides=[2, 2], pads=[1] * 4),
        helper.make_node("GlobalAveragePool", ["c"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w"], ["g"], transB=1),
        helper.make_node("Gemm", ["g", "v"], ["out"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input", 1, ["batch", 3, 32, 32])],
        [helper.make_tensor_value_info("out", 1, ["batch", 2])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    assert onnx_macs(model) == 4 * 16 * 16 * 27 + 10 * 4 + 2 * 10
    assert [item.name for item in model.graph.output] == ["out"]


def row(tool: str, criterion: str, target: float, accuracy: float | None, **more: Any) -> dict[str, Any]:
    values = {"tool": tool, "criterion": criterion, "target": target, "form": "bn", "setting": "global", "round_to": 1, "labels": False}
    found = {"reason": "no"} if accuracy is None else {"accuracy_2500": accuracy, "share": target - 0.001}
    return values | found | more


ROWS = [
    row("relief-onnx", "flow", 0.75, 80.0, accuracy_10000=79.0),
    row("relief-onnx", "flow", 0.5, 30.0),
    row("Torch-Pruning", "LAMP", 0.75, 70.0),
    row("Torch-Pruning", "LAMP", 0.75, 75.0, form="folded"),
    row("Torch-Pruning", "LAMP", 0.5, 20.0),
    row("Torch-Pruning", "BN scale", 0.75, None, accuracy_500=12.4),
    row("Torch-Pruning", "BN scale", 0.5, None),
    row("Torch-Pruning", "taylor", 0.75, 78.0, labels=True),
    row("Torch-Pruning", "taylor", 0.5, 35.0, labels=True),
    row("onnxsim", "structured l2", 0.5, 31.0),
]


def test_the_table_takes_the_best_of_each_criterion() -> None:
    lines = table(ROWS, 1)
    assert [line[1] for line in lines] == ["flow", "taylor (reads labels)", "LAMP", "structured l2", "BN scale"]
    assert lines[0][2] == "80.00 (79.00) at 74.9 %, bn, global"
    assert lines[2][2].startswith("75.00 at")
    assert "folded" in lines[2][2]
    assert lines[4][2:] == ["about 12 (500 images)", "-"]
    assert table(ROWS, 8) == []
    assert best_rows(ROWS, ("tool",))[("Torch-Pruning",)]["accuracy_2500"] == 78.0


def test_the_verdict_can_be_against_us() -> None:
    first, second = verdicts(ROWS)
    assert first["flow ahead"] is True
    assert first["flow ahead of labels too"] is True
    assert first["Torch-Pruning"] == 75.0
    assert second["flow ahead"] is False  # onnxsim: 31
    assert second["flow ahead of labels too"] is False
    assert verdicts([item for item in ROWS if item["criterion"] != "flow"])[0]["flow ahead"] is None


def test_stored_rows_are_not_measured_again_by_the_same_versions(tmp_path: Path) -> None:
    path, made = tmp_path / "cells.json", []

    def make() -> dict[str, Any]:
        made.append(1)
        return {"n": len(made)}

    assert Cells(path, {"torch": "1"}).get(("a", 0.5), make) == {"n": 1}
    assert Cells(path, {"torch": "1"}).get(("a", 0.5), make) == {"n": 1}
    assert Cells(path, {"torch": "2"}).get(("a", 0.5), make) == {"n": 2}
