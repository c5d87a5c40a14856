"""The zoo benchmark's comparator can fail, and so can its look at a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import lenet
from onnx import numpy_helper

from benchmarks.zoo import summary, verdict
from benchmarks.zoo_check import agreement, check, difference, is_rounding, signature
from benchmarks.zoo_half import scored

ONES = np.ones((2, 3), np.float32)


def test_equal_outputs_do_not_differ() -> None:
    assert difference([ONES, np.array([np.nan, np.inf])], [ONES.copy(), np.array([np.nan, np.inf])]) == 0.0
    assert difference([np.zeros(3)], [np.zeros(3)]) == 0.0
    assert difference([], []) == 0.0


@pytest.mark.parametrize(
    ("expected", "found", "least"),
    [
        (ONES, ONES * 1.001, 9e-4),
        (ONES, ONES * 1000, 900),
        (np.zeros(3), np.full(3, 1e-9), np.inf),
        (ONES, np.where(np.eye(2, 3) > 0, np.nan, ONES).astype(np.float32), np.inf),
        (ONES, ONES[:1], np.inf),
        (ONES, ONES.astype(np.float64), np.inf),
        (np.array([1, 2]), np.array([1, 3]), 0.4),
        (np.array(["a"]), np.array(["b"]), np.inf),
    ],
)
def test_other_outputs_differ(expected: np.ndarray, found: np.ndarray, least: float) -> None:
    assert difference([expected], [found]) >= least


def test_a_missing_output_differs() -> None:
    assert difference([ONES, ONES], [ONES]) == np.inf


def test_each_output_is_measured_by_its_own_size() -> None:
    assert difference([ONES * 1e6, ONES * 1e-3], [ONES * 1e6, ONES * 2e-3]) == pytest.approx(1.0, rel=1e-4)


def test_rounding_excuses_only_what_is_all_but_zero() -> None:
    tiny, noise = ONES * 1e-6, ONES * 1e-7
    assert is_rounding(tiny, tiny + noise, tiny - noise)
    assert not is_rounding(tiny, tiny + 20 * noise, tiny - noise)
    assert not is_rounding(tiny, tiny + noise, tiny)
    assert not is_rounding(tiny, tiny * np.nan, tiny + noise)
    assert not is_rounding(ONES, ONES + noise, ONES - noise)


def _changed(edit: str) -> onnx.ModelProto:
    model = lenet()
    if edit == "weights":
        item = model.graph.initializer[0]
        item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item) * np.float32(1.5), item.name))
    elif edit == "metadata":
        model.metadata_props.add(key="k", value="v")
    elif edit == "opset":
        model.opset_import[0].version += 1
    elif edit == "outputs":
        model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 7
    return model


@pytest.mark.parametrize(
    ("edit", "problem"), [("weights", "differs"), ("metadata", "metadata"), ("opset", "opset"), ("outputs", "outputs")]
)
def test_a_changed_file_is_seen(tmp_path: Path, edit: str, problem: str) -> None:
    original, result = tmp_path / "a.onnx", tmp_path / "b.onnx"
    onnx.save(lenet(), original)
    onnx.save(_changed(edit), result)
    name = lenet().graph.input[0].name
    feeds = [{name: np.random.default_rng(0).random((1, 1, 28, 28), np.float32)}]
    assert check(original, original, original, feeds) == {"problems": [], "worst": 0.0, "all_but_zero": []}
    assert any(problem in found for found in check(original, result, original, feeds)["problems"])


def test_the_signature_does_not_look_at_weights() -> None:
    assert signature(lenet()) == signature(_changed("weights"))


def test_a_smaller_share_is_named() -> None:
    run = {"exit": 2, "seconds": 0.0, "problems": []}
    rows = [
        {"model": name, "share": ours, "cnn_or_transformer": True, "connection": run, "channel": run}
        | {"peers": {"torch-pruning": {"share": peer, "reason": None}, "onnxsim": {"share": None, "reason": "x"}}}
        for name, ours, peer in (("a", 0.9, 0.9), ("b", 0.5, 0.6), ("c", 0.1, None))
    ]
    found = summary(rows)
    assert found["against"]["torch-pruning"] == {"handled": 2, "ours_behind": ["b"], "ours_unknown": []}
    assert verdict("torch-pruning", found["against"]["torch-pruning"]).endswith("smaller on b")
    assert "no results" in verdict("onnxsim", found["against"]["onnxsim"])


def test_agreement_is_one_for_the_same_file_and_less_for_another(tmp_path: Path) -> None:
    original, result = tmp_path / "a.onnx", tmp_path / "b.onnx"
    onnx.save(lenet(), original)
    changed = lenet()
    for item in changed.graph.initializer:
        value = numpy_helper.to_array(item)
        item.CopyFrom(numpy_helper.from_array(value * (np.arange(value.size).reshape(value.shape) % 2 == 0).astype(value.dtype), item.name))
    onnx.save(changed, result)
    name = lenet().graph.input[0].name
    feeds = [{name: np.random.default_rng(seed).random((1, 1, 28, 28), np.float32)} for seed in range(3)]
    (same,) = agreement(original, original, feeds).values()
    (other,) = agreement(original, result, feeds).values()
    assert same == pytest.approx(1.0)
    assert other < 0.999


def test_the_share_scored_counts_weights_and_tells_reasons() -> None:
    rows = [
        {"weight": "a", "op": "Conv", "weights": 75, "reason": "", "status": "pruned"},
        {"weight": "b", "op": "If", "weights": 20, "reason": "it lives inside a body", "status": "skipped"},
        {"weight": "c", "op": "Gather", "weights": 5, "reason": "", "status": "skipped"},
        {"weight": "d", "op": "Mul", "weights": 7, "reason": "a constant that Mul node x multiplies with", "status": "skipped"},
    ]
    found = scored({"layers": rows})
    assert found["share"] == 0.75
    assert found["constants"] == 7
    assert found["unexplained"] == ["c"]
    assert list(found["left"]) == ["b", "c"]
