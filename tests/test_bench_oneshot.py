"""The one-shot benchmark's own logic: cells and losses are counted right, runs have limits, the ablation really switches parts off."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders import Net
from helpers import CALIB, LENET
from numpy.typing import NDArray
from onnx import numpy_helper

from benchmarks import oneshot, oneshot_ablation, oneshot_channels, oneshot_run
from benchmarks import oneshot_cells as cells
from benchmarks.flow_channels_data import Cells
from benchmarks.oneshot_ablation import Parts
from relief_onnx import repair as repairs
from relief_onnx.data import ImageOptions, open_dataset
from relief_onnx.graph import Graph
from relief_onnx.layers import find
from relief_onnx.masks import applied
from relief_onnx.model import input_specs, prepare
from relief_onnx.solve import Target
from relief_onnx.surgery import apply_weights

FLOW, OBS = cells.REPAIRED


def _row(share: float, score: float, kept: float | None = None, **more: Any) -> dict[str, Any]:
    return {"share": share, "kept": share if kept is None else kept, "score": score, **more}


def _model() -> dict[str, Any]:
    rows = {
        "flow": [_row(0.5, 0.5), _row(0.1, 0.2)],
        FLOW: [_row(0.5, 0.9), _row(0.1, 0.6)],
        OBS: [{"share": 0.5, "reason": "longer than 1 s"}, _row(0.1, 0.8)],
        "magnitude-layer": [_row(0.5, 0.9), _row(0.1, 0.1)],
        "magnitude-global": [_row(0.5, 0.4), _row(0.1, 0.1)],
        "wanda": [_row(0.5, 0.5), {"share": 0.1, "reason": "died"}],
        "sparsegpt": [_row(0.5, 0.8, kept=0.6), _row(0.1, 0.1)],
    }
    matched = {FLOW: [_row(0.6, 0.95)], OBS: []}
    return {"kind": "CNN", "metric": "accuracy", "prunable_weights": 100, "original": 1.0, "rows": rows, "matched": matched}


# --- cells ------------------------------------------------------------------------------------------------------------


def test_each_repaired_method_is_judged_at_what_the_opponent_kept() -> None:
    model = _model()
    assert cells.words(model, FLOW, "sparsegpt") == ["ahead", "ahead"]
    assert cells.words(model, FLOW, "magnitude-layer") == ["tied", "ahead"]
    assert cells.words(model, FLOW, "wanda") == ["ahead", "open"]
    assert cells.words(model, OBS, "sparsegpt") == ["open", "ahead"]
    assert cells.words(model, FLOW) == ["tied", "ahead"]
    assert cells.needs_match(model["rows"], FLOW) == [0.6]
    found = cells.counts({"one": model, "two": model}, FLOW)
    assert found["sparsegpt"] == {"ahead": 4, "tied": 0, "behind": 0, "open": 0}
    assert found[cells.ALL] == {"ahead": 2, "tied": 2, "behind": 0, "open": 0}


def test_the_loss_that_is_left() -> None:
    model = _model()
    first, second = cells.losses(model, FLOW)
    assert first == pytest.approx({"share": 0.5, "kept": 0.6, "ours": 0.05, "theirs": 0.2, "left": 0.25})
    assert second["left"] == pytest.approx(0.4 / 0.9)
    (only,) = cells.losses(model, OBS)
    assert only["left"] == pytest.approx(0.2 / 0.9)
    found = cells.median_left({"one": model}, FLOW)
    assert found["median"] == pytest.approx((0.25 + 0.4 / 0.9) / 2)
    assert found["cells"] == found["cells_in_use"] == 2


def test_no_quotient_where_nothing_was_lost_and_none_in_use_where_both_are_garbage() -> None:
    rows = {FLOW: [_row(0.5, 0.9), _row(0.1, 0.2)], "sparsegpt": [_row(0.5, 1.0), _row(0.1, 0.1)]}
    model = {"original": 1.0, "rows": rows, "matched": {}}
    assert ["left" in cell for cell in cells.losses(model, FLOW)] == [False, True]
    found = cells.median_left({"one": model}, FLOW)
    assert (found["cells"], found["cells_in_use"], found["median_in_use"]) == (1, 0, None)
    assert cells.median_left({}, FLOW)["median"] is None


def test_cost_is_in_multiples_of_the_calibration() -> None:
    rows = [
        _row(0.5, 0.9, timing={"calibrate": 2.0, "choose": 4.0, "repair": 6.0}, peak_mb=300, seconds=13.0),
        _row(0.1, 0.9, timing={"calibrate": 1.0, "repair": 3.0}, peak_mb=200, seconds=5.0),
        {"share": 0.05, "reason": "longer than 1 s"},
    ]
    found = cells.cost(rows)
    assert (found["of_calibration"], found["most_of_calibration"], found["peak_mb"]) == (4.0, 5.0, 300)
    assert (found["calibrate_s"], found["choose_s"], found["repair_s"], found["seconds"]) == (1.5, 2.0, 4.5, 9.0)
    assert cells.cost(rows[2:]) == {}


def test_floors_are_compared_where_there_is_a_result() -> None:
    model = {"rows": {FLOW: [_row(0.25, 0.9), _row(0.1, 0.6)]}}
    (line,) = cells.against({"resnet20": model}, FLOW, {"resnet20": {0.5: 0.9, 0.25: 0.9, 0.1: 0.642}, "minilm_l3": {0.5: 0.9}})
    assert line == "resnet20: 25 %: 90.0 (reached, 90.0), 10 %: 60.0 (missed, 64.2)"


def test_the_verdicts_name_losses() -> None:
    model = _model()
    model["rows"]["wanda"][0]["score"] = 0.99
    text = cells.verdicts({"lenet5": model})
    assert "behind on lenet5: wanda at 50 %" in text
    assert "60 %: 0.25, 10 %: 0.44" in text
    assert "median 0.35 of 2 cells" in text
    assert cells.verdicts({"lenet5": {**model, "rows": {"flow": model["rows"]["flow"]}}}) == ""


# --- tables, JSON and plot ----------------------------------------------------------------------------------------------


def test_the_table_has_all_methods_and_the_runs_at_what_peers_kept() -> None:
    text = oneshot.table("lenet5", _model())
    assert f"{FLOW} at what peers kept (%): 60.0: 95.0" in text
    assert "80.0*" in text
    assert f"{OBS}: longer than 1 s" in text


def test_everything_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    document = {"models": {"lenet5": _model()}}
    oneshot.write(document, tmp_path / "oneshot.json")
    stored = json.loads((tmp_path / "oneshot.json").read_text())
    assert stored["cells"][FLOW]["sparsegpt"]["ahead"] == 2
    assert stored["left_of_sparsegpt"][OBS]["cells"] == 1
    drawn = (tmp_path / "oneshot.svg").read_text()
    assert drawn.count("<path") > 10
    oneshot.write(json.loads((tmp_path / "oneshot.json").read_text()), tmp_path / "oneshot.json")
    assert json.loads((tmp_path / "oneshot.json").read_text()) == stored
    assert (tmp_path / "oneshot.svg").read_text() == drawn


def test_channel_rows_as_text(tmp_path: Path) -> None:
    timing = {"ms_before": 2.0, "ms_after": 1.0, "speedup": 2.0}
    good = {"criterion": "flow", "form": "bn", "target": 0.5, "share": 0.499, "accuracy_2500": 88.1, "accuracy_10000": 87.2, "peak_mb": 250}
    good |= {"timing": {"calibrate": 1.0, "repair": 3.25}, "latency": {"1": timing, "8": timing}}
    bad = {"criterion": "flow-obs", "form": "bn", "target": 0.5, "reason": "longer than 1 s"}
    stored = tmp_path / "flow_channels.json"
    assert oneshot_channels.peers("resnet20_cifar10", stored) == {}
    lines = [{"round_to": number, "target": 0.5, "flow": 48.0, "onnxsim": 16.8} for number in (1, 8)]
    stored.write_text(json.dumps({"models": {"resnet20_cifar10": {"verdicts": lines}}}))
    peers = oneshot_channels.peers("resnet20_cifar10", stored)
    assert peers == {"0.5": {"onnxsim": 16.8}}
    entry = {"macs": 4.1e7, "accuracy_2500": 92.2, "accuracy_10000": 91.7, "rows": [good, bad], "peers": peers}
    text = oneshot_channels.table("resnet20_cifar10", entry)
    assert "88.10" in text
    assert "1.0 0.0 3.2" in text
    assert "2.0 -> 1.0 ms, 2.00 x" in text
    assert "longer than 1 s" in text
    assert "peers at 50 %: onnxsim 16.8" in text


def test_the_ablation_as_text() -> None:
    rows = {"mask only": [{"score": 0.5, "spread": 0.25}, {"score": 0.1, "spread": None}], "all": [{"score": 1, "spread": 1234.0}] * 2}
    text = oneshot_ablation.table("mlp", {"original": 0.98, "shares": [0.194, 0.1], "masks": {"relief": rows}})
    for part in ("19.4 %", "50.0 (0.25)", "10.0 (-)", "100.0 (1e+03)"):
        assert part in text


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_says_what_it_kept_and_cost(tmp_path: Path) -> None:
    target = tmp_path / "pruned.onnx"
    options = {"keep": "30%", "granularity": "weight", "repair": "least-squares", "criterion": "flow", "storage": "dense", "threads": 1}
    row = oneshot_run.run(LENET, CALIB, target, options, 120)
    assert row["kept"] == pytest.approx(0.3, abs=1e-3)
    assert row["timing"]["repair"] > 0
    assert row["peak_mb"] >= row["start_mb"] > 10
    onnx.checker.check_model(onnx.load(target))


def test_a_run_that_fails_or_takes_too_long_is_a_reason(tmp_path: Path) -> None:
    row = oneshot_run.run(LENET, CALIB, tmp_path / "pruned.onnx", {"keep": "300%"}, 120)
    assert set(row) == {"reason"}
    assert "300" in row["reason"]
    assert oneshot_run.run(LENET, CALIB, tmp_path / "pruned.onnx", {}, 0) == {"reason": "longer than 0 s"}


def test_the_key_of_stored_runs_follows_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = oneshot.code()
    assert before == oneshot.code()
    (tmp_path / "relief_onnx").mkdir()
    (tmp_path / "relief_onnx" / "solve.py").write_text("RIDGE = 1\n")
    monkeypatch.setattr(oneshot, "ROOT", tmp_path)
    assert oneshot.code() != before
    stored = Cells(tmp_path / "rows.json", {"code": "a"})
    stored.get(("flow", "0.5"), lambda: _row(0.5, 0.9))
    assert Cells(tmp_path / "rows.json", {"code": "a"}).rows
    assert not Cells(tmp_path / "rows.json", {"code": "b"}).rows


# --- ablation ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repaired() -> Callable[[Parts | None], NDArray[np.float64]]:
    """All weights of a small residual network after a repair with some parts, or (None) by the library as it is."""
    net = Net()
    x = net.input("batch", 3, 6, 6)
    first = net.op("Relu", net.op("Conv", x, net.weight(8, 3, 3, 3), net.bias(8), pads=[1] * 4, kernel_shape=[3, 3]))
    branch = net.op("Relu", net.op("Conv", first, net.weight(8, 8, 3, 3), net.bias(8), pads=[1] * 4, kernel_shape=[3, 3]))
    branch = net.op("Conv", branch, net.weight(8, 8, 3, 3), net.bias(8), pads=[1] * 4, kernel_shape=[3, 3])
    pooled = net.op("Flatten", net.op("GlobalAveragePool", net.op("Relu", net.op("Add", branch, first))))
    graph = Graph(prepare(net.model(net.op("Gemm", pooled, net.weight(5, 8), net.bias(5), transB=1))))
    rng = np.random.default_rng(0)
    data = open_dataset([{x: rng.standard_normal((80, 3, 6, 6), np.float32)}], input_specs(graph.model), images=ImageOptions())
    weights = find(graph).by_weight()
    flags = {name: rng.random(graph.array(name).shape) < 0.4 for name in weights}
    masked = apply_weights(graph.model, applied(graph, flags))

    def run(parts: Parts | None) -> NDArray[np.float64]:
        with oneshot_ablation.switched(parts, graph) if parts else nullcontext():
            feeds = repairs.samples_of(graph, data, (parts and parts.samples) or repairs.SAMPLES)
            model, _ = repairs.repair(graph, masked, flags, frozenset(weights), feeds, threads=1)
        arrays = {item.name: numpy_helper.to_array(item).astype(np.float64) for item in model.graph.initializer}
        return np.concatenate([arrays[name].reshape(-1) for name in sorted(arrays)])

    return run


def test_with_all_parts_on_the_repair_is_the_library_s(repaired: Any) -> None:
    np.testing.assert_array_equal(repaired(Parts()), repaired(None))


def test_every_part_changes_what_the_repair_does(repaired: Any) -> None:
    """A hook that no longer reaches the library would leave the weights as they were."""
    whole = repaired(None)
    parts = {**oneshot_ablation.CHANGES, "masked": Parts(inputs="masked"), "samples": Parts(samples=64)}
    parts |= {"bias": Parts(free_bias=False), "relu": Parts(relu=False), "sums": Parts(sums=False)}
    for label, item in parts.items():
        assert np.abs(repaired(item) - whole).max() > 1e-4, label
    steps = [repaired(item) for item in oneshot_ablation.STEPS.values()]
    assert all(np.abs(one - other).max() > 1e-4 for one, other in itertools.pairwise(steps))


def test_with_spread_kept_outputs_vary_as_their_targets() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 6)).astype(np.float32)
    wanted = (x @ rng.standard_normal((6, 4)) + 3 * rng.standard_normal((500, 4)) + 1).astype(np.float32)
    target = Target(wanted, np.zeros_like(wanted), np.ones(4), False)
    weight, bias = oneshot_ablation._spread(x, target, rng.standard_normal((4, 6)), np.zeros(4), 1.0)
    y = x @ weight.T + bias
    np.testing.assert_allclose(y.std(0), wanted.std(0), rtol=1e-5)
    np.testing.assert_allclose(y.mean(0), wanted.mean(0), atol=1e-5)
