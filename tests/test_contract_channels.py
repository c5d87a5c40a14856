"""What a channel run promises to a pipeline: the keys of its JSON, and numbers in it that the files bear out. Only onnx and numpy judge."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from architectures import C, dense, text
from helpers import CALIB, LENET, SAMPLES, run
from numpy.typing import NDArray
from onnx import numpy_helper

import relief_onnx

MODELS = ("lenet300", "lenet5", "resnet8")
GRANULARITIES = ("channel", "channel+connection", "channel+weight")
CASES = [(model, granularity) for model in MODELS for granularity in GRANULARITIES]
ROUND_TO = 4
FEW = ("--data", CALIB, "--samples", "32", "--alpha", "0.85", "--round-to", str(ROUND_TO))

TOP = {
    "schema", "input", "output", "options", "data", "layers", "groups", "flow", "mean_shift", "repair", "retrain", "totals",
    "units_removed", "state_changes", "health",
    "verification", "quality", "timing", "warnings",
}  # fmt: skip
FILE = {"path", "sha256", "bytes", "params", "nonzero_params", "macs"}
ROW = {"node", "op", "weight", "status", "reason", "connections", "connections_kept", "weights", "weights_kept", "alpha"}
GROUP = {"members", "readers", "units", "units_kept", "pinned", "reason"}
HEALTH = {"depth", "narrowest_layer", "mean_width", "collapsed_layers", "detached_outputs", "dead_branches"}

Arrays = Mapping[str, NDArray[Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where all runs of this file write."""
    yield tmp_path_factory.mktemp("channels")
    _prune.cache_clear()


@functools.cache
def _prune(folder: Path, model: str, granularity: str, storage: str, name: str = "run") -> tuple[dict[str, Any], Path]:
    """The report of a run, and the stem of its files: .onnx, .npz (masks) and -work/."""
    stem = folder / f"{model}-{granularity}-{storage}-{name}"
    out, report, masks, work = (f"{stem}{end}" for end in (".onnx", ".json", ".npz", "-work"))
    options = ("--granularity", granularity, "--storage", storage, "--json", report, "--save-masks", masks, "--work-dir", work)
    result = run("prune", SAMPLES / f"{model}.onnx", *FEW, *options, "-o", out, "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    return json.loads(Path(report).read_text()), stem


def stored(path: Path | str) -> Arrays:
    return {item.name: numpy_helper.to_array(item) for item in onnx.load(str(path)).graph.initializer}


def kernels(weight: NDArray[Any]) -> NDArray[np.bool_]:
    """Connections [out, in per group] with any weight that is not zero."""
    found: NDArray[np.bool_] = (weight != 0).reshape(*weight.shape[:2], -1).any(-1)
    return found


@pytest.mark.parametrize(("model", "granularity"), CASES)
def test_every_key_is_there(model: str, granularity: str, folder: Path) -> None:
    report, stem = _prune(folder, model, granularity, "auto")
    assert report["schema"] == "relief-onnx/report/1"
    assert set(report) == TOP
    for side, path in (("input", SAMPLES / f"{model}.onnx"), ("output", Path(f"{stem}.onnx"))):
        assert set(report[side]) == FILE
        content = path.read_bytes()
        assert (report[side]["sha256"], report[side]["bytes"]) == (hashlib.sha256(content).hexdigest(), len(content))
        assert report[side]["path"] == str(path)
    assert all(set(row) >= ROW for row in report["layers"])
    assert report["groups"]
    assert all(set(row) == GROUP for row in report["groups"])
    assert set(report["health"]) == HEALTH
    assert set(report["totals"]) == {"weights", "weights_kept", "kept_percent"}
    assert set(report["verification"]) >= {"checker", "masked_vs_output_max_abs", "masked_vs_output_max_rel"}
    assert set(report["quality"]) >= {"agreement", "accuracy_before", "accuracy_after"}
    assert "plain_inference" in report["timing"]


@pytest.mark.parametrize(("model", "granularity"), CASES)
def test_layers_count_what_is_in_the_file(model: str, granularity: str, folder: Path) -> None:
    report, stem = _prune(folder, model, granularity, "dense")
    before, after = stored(SAMPLES / f"{model}.onnx"), stored(f"{stem}.onnx")
    assert report["units_removed"] > 0
    for row in report["layers"]:
        old, new = before[row["weight"]], after[row["weight"]]
        assert (row["weights"], row["weights_kept"]) == (old.size, np.count_nonzero(new)), row["node"]
        assert (row["connections"], row["connections_kept"]) == (kernels(old).size, kernels(new).sum()), row["node"]
        assert row["channels"] == [len(old), len(new)], row["node"]
        assert row["status"] == ("pruned" if np.count_nonzero(new) < np.count_nonzero(old) else "kept"), row["node"]
    kept = sum(np.count_nonzero(after[row["weight"]]) for row in report["layers"])
    assert report["totals"]["weights_kept"] == kept
    assert report["totals"]["kept_percent"] == pytest.approx(100 * kept / report["totals"]["weights"])
    for side, arrays in (("input", before), ("output", after)):
        floats = [array for array in arrays.values() if array.dtype == np.float32]
        assert report[side]["params"] == sum(array.size for array in floats)
        assert report[side]["nonzero_params"] == sum(np.count_nonzero(array) for array in floats)


@pytest.mark.parametrize(("model", "granularity"), CASES)
def test_packing_changes_no_count(model: str, granularity: str, folder: Path) -> None:
    (packed, stem), (dense, plain) = (_prune(folder, model, granularity, storage) for storage in ("auto", "dense"))
    rows = [[{key: value for key, value in row.items() if key != "storage"} for row in report["layers"]] for report in (packed, dense)]
    assert rows[0] == rows[1]
    assert {row["storage"] for row in dense["layers"]} == {"dense"}
    for key in ("groups", "totals", "units_removed", "health"):
        assert packed[key] == dense[key]
    unpacked, wanted = stored(f"{stem}-work/pruned.onnx"), stored(f"{plain}.onnx")
    assert unpacked.keys() == wanted.keys()
    assert all(np.array_equal(unpacked[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("model", MODELS)
def test_groups_agree_with_the_layers_that_make_them(model: str, folder: Path) -> None:
    report, _ = _prune(folder, model, "channel", "dense")
    channels = {row["node"]: row["channels"] for row in report["layers"]}
    for row in report["groups"]:
        assert 0 < row["units_kept"] <= row["units"]
        for member in row["members"]:
            assert channels[member] == [row["units"], row["units_kept"]]
        assert row["units_kept"] % ROUND_TO == 0 or row["units_kept"] == row["units"]


@pytest.mark.parametrize(("model", "granularity"), CASES)
def test_masks_have_the_shape_of_the_scores(model: str, granularity: str, folder: Path) -> None:
    report, stem = _prune(folder, model, granularity, "dense")
    masks, scores, after = dict(np.load(f"{stem}.npz")), dict(np.load(f"{stem}-work/scores.npz")), stored(f"{stem}.onnx")
    ranked = {name for name in scores if name.endswith(("/score", "/bias_score"))}
    assert {name.replace("/score", "/keep").replace("/bias_score", "/bias_keep") for name in ranked} == set(masks)
    for row in report["layers"]:
        for mask, score in (("keep", "score"), ("bias_keep", "bias_score")):
            keep = masks[f"{row['weight']}/{mask}"]
            assert keep.dtype == bool
            assert keep.shape == scores[f"{row['weight']}/{score}"].shape
        keep = masks[f"{row['weight']}/keep"]
        left = after[row["weight"]] if keep.ndim > 2 else kernels(after[row["weight"]])
        assert np.count_nonzero(left) <= keep.sum(), "the file holds nothing that the rule removed"


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_same_run_gives_the_same_bytes(granularity: str, folder: Path) -> None:
    (first, one), (second, two) = (_prune(folder, "resnet8", granularity, "auto"), _prune(folder, "resnet8", granularity, "auto", "again"))
    for end in (".onnx", ".npz", "-work/scores.npz", "-work/masked.onnx", "-work/pruned.onnx"):
        assert Path(f"{one}{end}").read_bytes() == Path(f"{two}{end}").read_bytes()
    moved = first["output"] | {"path": second["output"]["path"]}
    assert first | {"timing": None, "output": moved} == second | {"timing": None}


def test_nothing_is_written_where_nothing_can_go(tmp_path: Path) -> None:
    files = ("--json", tmp_path / "r.json", "--save-masks", tmp_path / "m.npz", "-o", tmp_path / "out.onnx")
    for options in (("--only", "matches-nothing"), ("--round-to", "1000")):
        result = run("prune", LENET, *FEW, "--granularity", "channel", *options, *files)
        assert result.exit_code == 4
        assert result.stderr.startswith("Error: nothing could be pruned: ")
        assert not list(tmp_path.iterdir())


def test_the_alpha_of_a_row_is_the_one_that_was_used(tmp_path: Path) -> None:
    for granularity, wanted in (("channel", 0.9), ("channel+connection", 0.85)):
        options = ("--granularity", granularity, "--alpha-channel", "0.9", "--json", "-", "-o", tmp_path / f"{granularity}.onnx")
        report = json.loads(run("prune", LENET, *FEW, *options).stdout)
        assert {row["alpha"] for row in report["layers"]} == {wanted}


def test_a_table_counts_what_went_with_its_channels() -> None:
    """An embedding is ranked by nobody, yet its columns go with the channels of the layers that read it."""
    model, feed = text(lambda net, x: dense(net, net.op("Relu", dense(net, x, C, 16)), 16, 5))()
    result = relief_onnx.prune(model, [feed], granularity="channel", alpha=0.6, round_to=1, storage="dense")
    after = {item.name: numpy_helper.to_array(item) for item in result.model.graph.initializer}
    rows = {row["weight"]: row for row in result.report["layers"]}
    for row in rows.values():
        assert row["weights_kept"] == np.count_nonzero(after[row["weight"]])
    (table,) = (row for name, row in rows.items() if name.startswith("table"))
    assert table["status"] == "pruned"
    assert table["weights_kept"] < table["weights"]
    assert table["reason"].startswith("it lost channels with the layers that it is coupled to; ")
