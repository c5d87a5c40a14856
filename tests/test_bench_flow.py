"""The flow benchmark's own logic: shares are met, cells are counted right, and its metrics can fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import lenet
from numpy.typing import NDArray
from onnx import numpy_helper

from benchmarks import flow_cells as cells
from benchmarks import flow_metrics as metrics
from benchmarks import flow_peers, flow_rules
from benchmarks.flow_inputs import word_pieces

SHARES = (0.7, 0.25, 0.05)


# --- shares -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> flow_rules.Subject:
    folder = tmp_path_factory.mktemp("flow")
    model = lenet()
    onnx.save(model, folder / "model.onnx")
    (value,) = model.graph.input
    shape = [size.dim_value or 12 for size in value.type.tensor_type.shape.dim]
    np.savez(folder / "data.npz", **{value.name: np.random.default_rng(0).random(shape, np.float32)})
    return flow_rules.Subject(folder / "model.onnx", folder / "data.npz", folder, threads=1)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("method", ["relief", "magnitude-layer", "magnitude-global", "wanda-row"])
def test_a_rule_keeps_the_share_that_was_asked(subject: flow_rules.Subject, method: str, share: float) -> None:
    cut = flow_rules.RULES[method](subject, share)
    rounding = len(subject.weights) * max(layer.out_channels for layer in subject.plan.layers) / subject.prunable
    assert cut.kept == pytest.approx(share, abs=max(0.002, rounding if method == "wanda-row" else 0.002))
    shapes = {name: weight.shape for name, weight in subject.weights.items()}
    assert flow_peers.density(cut.model, shapes) == pytest.approx(cut.kept)


def test_global_magnitude_is_global_and_the_layers_keep_their_own_share(subject: flow_rules.Subject) -> None:
    def kept(method: str) -> list[float]:
        model = flow_rules.RULES[method](subject, 0.25).model
        return [flow_peers.density(model, {name: weight.shape}) for name, weight in subject.weights.items()]

    assert np.ptp(kept("magnitude-layer")) < 0.02 < np.ptp(kept("magnitude-global"))
    model = flow_rules.RULES["magnitude-global"](subject, 0.25).model
    arrays = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    removed = max(np.abs(w[arrays[name] == 0]).max() for name, w in subject.weights.items() if (arrays[name] == 0).any())
    stayed = min(np.abs(w[arrays[name] != 0]).min() for name, w in subject.weights.items() if (arrays[name] != 0).any())
    assert removed <= stayed


def test_bisection_finds_the_smallest_alpha() -> None:
    reached = np.array([0.0, 0.0, 0.4, 0.5, 0.9])
    assert flow_rules.alpha_for(reached, 0.4) == pytest.approx(0.0, abs=1e-9)
    assert flow_rules.alpha_for(reached, 0.6) == pytest.approx(0.4)
    assert flow_rules.alpha_for(reached, 1.0) == pytest.approx(0.9)


def test_largest_takes_no_more_than_asked_of_ties() -> None:
    assert flow_rules.largest(np.ones((2, 5)), 0.3).sum() == 3
    assert flow_rules.largest(np.array([1.0, 3, 2, 0]), 0.5).tolist() == [False, True, True, False]


def test_density_does_not_accept_a_weight_that_is_gone_or_reshaped() -> None:
    model = lenet()
    name, shape = next((item.name, tuple(item.dims)) for item in model.graph.initializer if len(item.dims) > 1)
    assert 0 < flow_peers.density(model, {name: shape}) <= 1
    with pytest.raises(ValueError, match="gone"):
        flow_peers.density(model, {"nobody": shape})
    with pytest.raises(ValueError, match=name):
        flow_peers.density(model, {name: shape[::-1]})


def test_a_peer_run_that_is_cut_short_has_results_all_over_the_range() -> None:
    shares = [0.7, 0.5, 0.35, 0.25, 0.2, 0.15, 0.1, 0.05]
    assert sorted(flow_peers.spread(shares), reverse=True) == shares
    assert flow_peers.spread(shares)[:3] == [0.5, 0.2, 0.05]


def test_a_peer_that_cannot_start_is_a_reason_and_is_tried_again(tmp_path: Path) -> None:
    spec, broken = tmp_path / "spec.json", tmp_path / "python"
    spec.write_text("{}")
    broken.write_text("#!/bin/sh\necho no such peer >&2\nexit 3\n")
    broken.chmod(0o755)
    (row,) = flow_peers.run(broken, "mlp", "wanda", spec, (0.5,), tmp_path / "cache.json", 10)
    assert "3: no such peer" in row["reason"]
    broken.write_text('#!/bin/sh\necho \'ROW {"share": 0.5, "kept": 0.5, "score": 0.9}\'\n')
    expected = [{"share": 0.5, "kept": 0.5, "score": 0.9}]
    assert flow_peers.run(broken, "mlp", "wanda", spec, (0.5,), tmp_path / "cache.json", 10) == expected
    broken.unlink()
    assert flow_peers.run(broken, "mlp", "wanda", spec, (0.5,), tmp_path / "cache.json", 10) == expected


# --- cells ------------------------------------------------------------------------------------------------------------


def _row(share: float, score: float, kept: float | None = None) -> dict[str, Any]:
    return {"share": share, "kept": share if kept is None else kept, "score": score}


def test_cells_are_counted() -> None:
    rows = {
        "flow": [_row(0.5, 0.9), _row(0.25, 0.6), _row(0.1, 0.1), _row(0.05, 0.1)],
        "relief": [_row(0.5, 0.8), _row(0.25, 0.6), _row(0.1, 0.05), _row(0.05, 0.2)],
        "wanda": [_row(0.5, 0.8), _row(0.25, 0.1), {"share": 0.1, "reason": "died"}, _row(0.05, 0.0)],
        "sparsegpt": [{"share": share, "reason": "too slow"} for share in (0.5, 0.25, 0.1, 0.05)],
    }
    assert cells.best(rows, []) == ["ahead", "tied", "ahead", "behind"]
    assert cells.versus(rows, [], "wanda") == ["ahead", "ahead", "open", "ahead"]
    model = {"rows": rows, "matched": [], "original": 1.0}
    found = cells.summary({"one": model, "two": model})
    assert cells.useful(model) == [True, True, False, False]
    assert found["of these, in use"] == {"ahead": 2, "tied": 2, "behind": 0, "open": 0}
    assert found["all without updates"] == {"ahead": 4, "tied": 2, "behind": 2, "open": 0}
    assert found["sparsegpt"] == {"ahead": 0, "tied": 0, "behind": 0, "open": 8}


def test_nobody_gains_from_keeping_more() -> None:
    rows = {"flow": [_row(0.1, 0.5)], "wanda": [_row(0.1, 0.7, kept=0.4)], "relief": [_row(0.1, 0.4, kept=0.1001)]}
    assert cells.needs_match(rows) == [0.4]
    assert cells.versus(rows, [], "wanda") == ["open"]
    assert cells.versus(rows, [_row(0.4, 0.9)], "wanda") == ["ahead"]
    assert cells.versus(rows, [_row(0.4, 0.6)], "wanda") == ["behind"]
    assert cells.versus(rows, [_row(0.4, 0.6)], "relief") == ["ahead"]


def test_a_flow_run_that_kept_more_is_not_taken() -> None:
    assert cells.flow_at({"flow": [_row(0.1, 0.9, kept=0.2)]}, [], 0.1) is None


# --- metrics ----------------------------------------------------------------------------------------------------------


def _values(seed: int, *shape: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).standard_normal(shape)


YUNET = {f"{part}_{stride}": size for part, size in (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10)) for stride in (8, 16, 32)}
OUTPUTS: dict[str, dict[str, NDArray[np.float64]]] = {
    "agreement": {"y": _values(0, 50, 2)},
    "embedding": {"y": _values(0, 50, 30)},
    "characters": {"y": _values(0, 10, 7, 20)},
    "concordant": {"y": _values(0, 30, 8), "z": _values(1, 30, 2, 3)},
    "yolo": {"y": np.abs(_values(0, 20, 9, 30))},
    "yunet": {name: np.abs(_values(index, 20, 30, size)) for index, (name, size) in enumerate(YUNET.items())},
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_metric_is_1_for_the_original_and_falls_for_garbage(name: str) -> None:
    metric, y = getattr(metrics, name), OUTPUTS[name]
    constant = {key: np.broadcast_to(value.mean(0), value.shape) for key, value in y.items()}
    shuffled = {key: np.roll(value, 1, axis=0) for key, value in y.items()}
    noise = {key: _values(99, *value.shape) for key, value in y.items()}
    assert metric(y, y) == pytest.approx(1)
    assert 0 <= metric(constant, y) < 0.3
    assert 0 <= metric(shuffled, y) < 0.3
    assert 0 <= metric(noise, y) < 0.3
    some = {key: np.where(_values(7, *value.shape) > 1.2, -value, value) for key, value in y.items()}
    assert metric(noise, y) < metric(some, y) < 1


def test_every_metric_of_a_model_is_among_those_tested() -> None:
    assert {metric.__name__ for metric in metrics.AGAINST_ORIGINAL.values()} == set(OUTPUTS)


def test_accuracy_counts_right_labels() -> None:
    logits = np.eye(4)[[0, 1, 2, 3]]
    assert metrics.accuracy({"y": logits}, np.array([0, 1, 2, 0])) == 0.75


def test_blank_frames_earn_nothing() -> None:
    original = np.zeros((1, 10, 5))
    original[..., 0] = 1
    original[0, :2, 3] = 2
    blank = np.zeros((1, 10, 5))
    blank[..., 0] = 1
    assert metrics.characters({"y": blank}, {"y": original}) == 0
    wrong = original.copy()
    wrong[0, 5, 4] = 3
    assert metrics.characters({"y": wrong}, {"y": original}) == pytest.approx(2 / 3)


def test_not_finite_outputs_are_worth_nothing() -> None:
    y = _values(0, 5, 3)
    assert metrics.concordance(np.where(y > 0, np.nan, y), y) == 0


def test_word_pieces() -> None:
    ids = {word: number for number, word in enumerate(["[UNK]", "the", "token", "##ise", "##r", "cafe", "."])}
    assert word_pieces("The tokeniser. Café xyz", ids) == [1, 2, 3, 4, 6, 5, 0]
