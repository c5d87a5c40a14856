"""The command line as users and pipelines meet it: files, keys, exit codes, silence, speed."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime
import pytest
from builders import Net
from helpers import CALIB, LENET, ROOT, SAMPLES, TEST, digits, process, program, run
from relief_onnx_cli.main import main

import relief_onnx
from relief_onnx import calibrate
from relief_onnx.report import ONLY_PACKED

FEW = ("--data", CALIB, "--samples", 32)
COMMANDS = ("check-data", "compare", "inspect", "prune", "quantize", "retrain", "score")
NOT_BUILT = ("--target", "--report", "--provider")


def outputs(path: Path) -> Any:
    return onnxruntime.InferenceSession(path.read_bytes()).run(None, {"image": digits()})[0]


def arrays_of(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def prune(folder: Path, *options: object, name: str = "out.onnx") -> dict[str, Any]:
    """Prune lenet5 into the folder and return the report."""
    result = run("prune", LENET, *FEW, "-o", folder / name, "--force", "--json", folder / "report.json", *options)
    assert result.exit_code == 0, result.stderr
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


# --- prune: what it writes ------------------------------------------------------------------------------------------


def test_the_main_job_with_nothing_else(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(LENET.read_bytes())
    first = process("prune", "model.onnx", "--data", CALIB, cwd=tmp_path)
    assert (first.returncode, first.stderr) == (0, ""), first.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.pruned.onnx"]
    written = (tmp_path / "model.pruned.onnx").read_bytes()
    assert len(written) < 0.6 * len(LENET.read_bytes())
    onnx.checker.check_model(onnx.load_from_string(written), full_check=True)
    for word in ("features.3", "connections kept", "MACs", "same top class on", "times smaller and verified", "relief-onnx compare"):
        assert word in first.stdout

    again = process("prune", "model.onnx", "--data", CALIB, "--alpha", "0.5", cwd=tmp_path)
    assert again.returncode == 1
    assert again.stderr == "Error: model.pruned.onnx exists already; choose another name with -o or overwrite it with --force.\n"
    assert (tmp_path / "model.pruned.onnx").read_bytes() == written

    forced = process("prune", "model.onnx", "--data", CALIB, "--alpha", "0.5", "--force", "--quiet", cwd=tmp_path)
    assert (forced.returncode, forced.stdout, forced.stderr) == (0, "", "")
    assert len((tmp_path / "model.pruned.onnx").read_bytes()) < len(written)
    assert model.read_bytes() == LENET.read_bytes()


def test_nothing_more_to_remove(tmp_path: Path) -> None:
    """Where all that is below the cut is 0 already: a result by packing alone says so, and without that there is none."""
    cut = ("--granularity", "weight", "--pattern", "2:4", "--mean-shift", "off", "--storage")
    prune(tmp_path, *cut, "dense", name="dense.onnx")
    document = tmp_path / "r.json"
    packed = run("prune", tmp_path / "dense.onnx", *FEW, "-o", tmp_path / "packed.onnx", "--json", document, *cut, "auto")
    assert packed.exit_code == 0
    assert "Nothing more was removed. Kept" in packed.stdout
    assert "times smaller and verified" in packed.stdout
    report = json.loads(document.read_text())
    assert {row["status"] for row in report["layers"]} == {"kept"}
    assert report["input"]["nonzero_params"] == report["output"]["nonzero_params"]
    assert report["output"]["bytes"] < report["input"]["bytes"]
    assert ONLY_PACKED in report["warnings"]
    for storage, name in {"dense": "dense.onnx", "auto": "packed.onnx"}.items():
        result = run("prune", tmp_path / name, *FEW, "-o", tmp_path / "again.onnx", *cut, storage)
        assert result.exit_code == 4
        assert "classifier.0.weight: it has the pattern 2:4 already" in result.stderr
        assert not (tmp_path / "again.onnx").exists()


def test_a_share_that_is_kept_already() -> None:
    """The same --keep again and again: once no unit dies of it, the cut meets zeros alone."""
    model: Any = LENET
    with pytest.raises(relief_onnx.NothingPrunedError) as refused:  # noqa: PT012 - how often is what the loop finds out
        for _ in range(6):
            model = relief_onnx.prune(model, CALIB, keep="76%", samples=128, storage="dense").model
    assert model is not LENET
    reasons = [reason for _, reason in refused.value.reasons]
    assert "every connection below the cut is 0 already" in reasons
    assert set(reasons) <= {"every connection below the cut is 0 already", "every connection is above the cut"}


def test_out_may_be_the_model_with_force(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(LENET.read_bytes())
    assert run("prune", model, *FEW, "-o", model, "--force").exit_code == 0
    assert model.stat().st_size < LENET.stat().st_size


FILE_KEYS = {"path", "sha256", "bytes", "params", "nonzero_params", "macs"}
LAYER_KEYS = {
    "node", "op", "weight", "status", "reason", "connections", "connections_kept", "weights", "weights_kept", "alpha",
}  # fmt: skip


def check_report(report: dict[str, Any]) -> None:
    """Every key of the contract, with a value of the right kind."""
    assert report["schema"] == "relief-onnx/report/1"
    for side in ("input", "output"):
        assert set(report[side]) >= FILE_KEYS
        assert re.fullmatch("[0-9a-f]{64}", report[side]["sha256"])
    for row in report["layers"]:
        assert set(row) >= LAYER_KEYS
        assert row["status"] in ("pruned", "kept", "skipped")
        assert row["reason"]
        assert 0 <= row["connections_kept"] <= row["connections"]
        assert 0 <= row["weights_kept"] <= row["weights"]
        assert (row["alpha"] is None) == (row["status"] == "skipped")
    assert set(report["totals"]) >= {"weights", "weights_kept", "kept_percent"}
    assert report["totals"]["weights"] == sum(row["weights"] for row in report["layers"])
    assert report["totals"]["weights_kept"] == sum(row["weights_kept"] for row in report["layers"])
    assert set(report["verification"]) == {"checker", "masked_vs_output_max_abs", "masked_vs_output_max_rel", "rounding_max_abs"}
    assert set(report["quality"]) >= {"agreement", "accuracy_before", "accuracy_after"}
    for agreement in report["quality"]["agreement"].values():
        assert set(agreement) >= {"cosine", "sqnr_db"}
    assert set(report["timing"]) == {"load", "calibrate", "mask", "surgery", "pack", "verify", "compare", "plain_inference"}
    assert 0 < report["timing"]["plain_inference"] <= report["timing"]["compare"]  # which ran the samples through both models
    few = [f"only {report['data']['samples']} samples were used; 128 or more give steadier scores"]
    assert report["warnings"] == (few if report["data"]["samples"] < 128 else [])


@pytest.mark.parametrize(
    ("granularity", "keep", "cosines"), [("channel", "50%", (0, 0.9)), ("weight", "10%", (0.5, 0.9)), ("weight", "15%", (0.9, 0.95))]
)
def test_poor_agreement_without_repair_points_to_it(tmp_path: Path, granularity: str, keep: str, cosines: tuple[float, float]) -> None:
    """Told where the agreement is low and no repair was asked for, in the report and on the screen; not where there was one."""
    out, document = tmp_path / "out.onnx", tmp_path / "report.json"
    told: dict[str, str] = {}
    for repair in ("none", "least-squares"):
        options = ("--granularity", granularity, "--keep", keep, "--repair", repair, "--force", "--json", document)
        result = run("prune", LENET, *FEW, "-o", out, *options)
        report = json.loads(document.read_text())
        told[repair] = " ".join(report["warnings"])
        assert ("add --repair least-squares" in " ".join(result.stdout.split())) == ("add --repair least-squares" in told[repair])
        if repair == "none":
            assert cosines[0] < report["quality"]["agreement"]["logits"]["cosine"] < cosines[1]
    assert "agree poorly" in told["none"]
    assert "keep more, or add --repair least-squares" in told["none"]
    assert "--repair" not in told["least-squares"]


def test_good_agreement_without_repair_has_no_hint(tmp_path: Path) -> None:
    report = prune(tmp_path)
    assert report["quality"]["agreement"]["logits"]["cosine"] > 0.95
    assert not any("--repair" in text for text in report["warnings"])


def test_json_has_every_key_of_the_contract(tmp_path: Path) -> None:
    start = time.perf_counter()
    report = prune(tmp_path)
    took = time.perf_counter() - start
    check_report(report)
    stages = {stage: seconds for stage, seconds in report["timing"].items() if stage != "plain_inference"}
    assert min(stages.values()) > 0
    assert 0.1 * took < sum(stages.values()) <= took + 0.0001 * len(stages)  # each rounded; no second is counted twice
    for side, path in (("input", LENET), ("output", tmp_path / "out.onnx")):
        assert report[side]["path"] == str(path)
        assert report[side]["bytes"] == path.stat().st_size
    assert report["verification"]["checker"] == "passed"
    assert report["verification"]["masked_vs_output_max_rel"] <= 1e-4
    assert set(report["quality"]["agreement"]["logits"]) >= {"cosine", "sqnr_db", "top1"}
    assert report["quality"]["accuracy_before"] is None  # the calibration digits have no labels


def test_json_accuracy_where_labelled_and_on_standard_output(tmp_path: Path) -> None:
    result = run("prune", LENET, "--data", TEST, "-o", tmp_path / "out.onnx", "--json", "-")
    report = json.loads(result.stdout)  # nothing else on standard output
    check_report(report)
    assert report["quality"]["accuracy_before"] == pytest.approx(446 / 450)
    assert 0.9 < report["quality"]["accuracy_after"] <= 1


def test_same_seed_same_bytes_other_seed_other_samples(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        prune(tmp_path, "--seed", seed, name=f"{name}.onnx")
    a, b, c = ((tmp_path / f"{name}.onnx").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_score_then_prune_equals_direct_prune(tmp_path: Path) -> None:
    scored = run("score", LENET, *FEW, "-o", tmp_path / "scores.npz")
    assert scored.exit_code == 0
    assert f"--scores {tmp_path / 'scores.npz'}" in scored.stdout
    prune(tmp_path, name="direct.onnx")
    prune(tmp_path, "--scores", tmp_path / "scores.npz", name="two_steps.onnx")
    assert (tmp_path / "direct.onnx").read_bytes() == (tmp_path / "two_steps.onnx").read_bytes()

    arrays = arrays_of(tmp_path / "scores.npz")
    weights = {"features.0": (6, 1), "features.3": (16, 6), "classifier.0": (120, 256), "classifier.2": (84, 120), "classifier.4": (10, 84)}
    parts = ("score", "bias_score", "relevance", "flow", "input_mean")
    assert set(arrays) == {f"{name}.weight/{part}" for name in weights for part in parts}
    for name, shape in weights.items():
        score, bias = arrays[f"{name}.weight/score"], arrays[f"{name}.weight/bias_score"]
        assert (score.shape, score.dtype, bias.shape) == (shape, np.float64, shape[:1])
        np.testing.assert_allclose(score.sum(1) + bias, 1, rtol=1e-12)


def test_score_does_not_overwrite(tmp_path: Path) -> None:
    (tmp_path / "s.npz").write_bytes(b"mine")
    result = run("score", LENET, *FEW, "-o", tmp_path / "s.npz")
    assert result.exit_code == 1
    assert "--force" in result.stderr
    assert (tmp_path / "s.npz").read_bytes() == b"mine"
    assert run("score", LENET, *FEW, "-o", tmp_path / "s.npz", "--force", "--quiet").exit_code == 0


def test_save_masks(tmp_path: Path) -> None:
    report = prune(tmp_path, "--save-masks", tmp_path / "masks.npz")
    arrays = arrays_of(tmp_path / "masks.npz")
    for row in report["layers"]:
        keep, bias = arrays[f"{row['weight']}/keep"], arrays[f"{row['weight']}/bias_keep"]
        assert keep.dtype == bias.dtype == np.bool_
        assert keep.size == row["connections"]
        assert bias.shape == keep.shape[:1]
        assert keep.sum() >= row["connections_kept"]  # dead units go after the rule
    assert len(arrays) == 2 * len(report["layers"])


# --- prune: the work folder -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", ["auto", "off"])
def test_work_dir_keeps_every_stage(shift: str, tmp_path: Path) -> None:
    work = tmp_path / "work"
    prune(tmp_path, "--work-dir", work, "--mean-shift", shift)
    for name in ("probe.onnx", "masked.onnx", "pruned.onnx"):
        onnx.checker.check_model(onnx.load(str(work / name)), full_check=True)
    assert len(arrays_of(work / "scores.npz")) == 25  # five layers: shares, of biases too, R, flow and means
    masked = onnx.load(str(work / "masked.onnx"))
    weights = {item.name for item in masked.graph.initializer}
    gated = {node.input[0] for node in masked.graph.node if node.op_type == "Mul" and set(node.input) <= weights}
    assert gated >= {"features.3.weight", "classifier.0.weight", "classifier.2.weight", "classifier.4.weight"}
    original = {item.name: item.raw_data for item in onnx.load(str(LENET)).graph.initializer}
    changed = {item.name for item in masked.graph.initializer if item.name in original and item.raw_data != original[item.name]}
    assert all(name.endswith(".bias") for name in changed)
    assert bool(changed) == (shift == "auto")  # biases hold the mean of what goes
    np.testing.assert_allclose(outputs(work / "masked.onnx"), outputs(work / "pruned.onnx"), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(outputs(work / "pruned.onnx"), outputs(tmp_path / "out.onnx"))


def test_a_second_run_does_not_measure_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = ("--work-dir", tmp_path / "work")
    prune(tmp_path, *work, name="first.onnx")
    passes = []
    real = calibrate.run

    def counted(*arguments: Any, **options: Any) -> Any:
        passes.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(calibrate, "run", counted)
    prune(tmp_path, *work, name="second.onnx")
    prune(tmp_path, *work, "--alpha", "0.8", name="third.onnx")
    assert not passes
    assert (tmp_path / "first.onnx").read_bytes() == (tmp_path / "second.onnx").read_bytes()
    prune(tmp_path, *work, "--criterion", "wanda")
    prune(tmp_path, *work, "--criterion", "wanda", "--seed", 5)
    assert len(passes) == 2


# --- prune: options -------------------------------------------------------------------------------------------------


def test_dense_and_packed_give_equal_outputs(tmp_path: Path) -> None:
    packed = prune(tmp_path, "--storage", "auto", name="auto.onnx")
    dense = prune(tmp_path, "--storage", "dense", name="dense.onnx")
    np.testing.assert_array_equal(outputs(tmp_path / "auto.onnx"), outputs(tmp_path / "dense.onnx"))
    assert packed["output"]["bytes"] < dense["output"]["bytes"] < packed["input"]["bytes"]
    assert {row["storage"] for row in dense["layers"]} == {"dense"}


@pytest.mark.parametrize(
    ("options", "touched"),
    [
        (("--only", "features"), {"features.0", "features.3"}),
        (("--skip", "features"), {"classifier.0", "classifier.2", "classifier.4"}),
        (("--only", "classifier", "--skip", r"\.[24]\."), {"classifier.0"}),
    ],
)
def test_only_and_skip(options: tuple[str, ...], touched: set[str], tmp_path: Path) -> None:
    report = prune(tmp_path, "--alpha", "0.7", "--save-masks", tmp_path / "m.npz", *options)
    assert {name.removesuffix(".weight/keep") for name in arrays_of(tmp_path / "m.npz") if name.endswith("/keep")} == touched
    for row in report["layers"]:
        chosen = row["weight"].removesuffix(".weight") in touched
        assert (row["alpha"] is not None) == chosen
        if not chosen and row["status"] == "skipped":
            assert row["reason"].startswith(("--only", "--skip"))


def test_recipe_loses_to_the_command_line_and_beats_the_preset(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('preset = "paper"\nalpha-fc = 0.8\nstorage = "dense"\n[layers]\n"classifier.4" = 0.6\n')
    found = prune(tmp_path, "--recipe", recipe)
    alphas = {row["weight"]: row["alpha"] for row in found["layers"]}
    assert found["options"]["bias"] == "prune"  # from the preset
    assert alphas["features.0.weight"] == 0.9
    assert alphas["classifier.0.weight"] == 0.8  # the recipe beats the preset
    assert alphas["classifier.4.weight"] == 0.6
    given = prune(tmp_path, "--recipe", recipe, "--alpha-fc", "0.7", "--storage", "auto")
    assert {row["weight"]: row["alpha"] for row in given["layers"]}["classifier.0.weight"] == 0.7
    assert given["options"]["storage"] == "auto"


def test_alpha_one_changes_nothing_on_its_samples(tmp_path: Path) -> None:
    report = prune(tmp_path, "--alpha", "1")
    assert report["quality"]["agreement"]["logits"]["max_abs"] < 1e-4
    assert report["quality"]["agreement"]["logits"]["top1"] == 1


def test_criteria_differ(tmp_path: Path) -> None:
    found = {}
    for criterion in ("relief", "relief-fast", "magnitude", "wanda"):
        path = tmp_path / f"{criterion}.npz"
        assert run("score", LENET, *FEW, "-o", path, "--criterion", criterion).exit_code == 0
        found[criterion] = arrays_of(path)["features.3.weight/score"]
    for first, second in itertools.combinations(found, 2):
        assert np.abs(found[first] - found[second]).max() > 1e-4, (first, second)


def test_the_shell_and_python_give_the_same_bytes(tmp_path: Path) -> None:
    prune(tmp_path, "--alpha", "0.9")
    result = relief_onnx.prune(LENET, CALIB, alpha=0.9, samples=32)
    assert result.model.SerializeToString(deterministic=True) == (tmp_path / "out.onnx").read_bytes()


# --- the other commands ---------------------------------------------------------------------------------------------


def test_inspect(tmp_path: Path) -> None:
    result = run("inspect", SAMPLES / "resnet8.onnx", "--json", tmp_path / "i.json")
    assert result.exit_code == 0
    assert "layer2.0.downsample.0" in result.stdout
    assert "it is an output of the model" in result.stdout
    document = json.loads((tmp_path / "i.json").read_text())
    assert document["schema"] == "relief-onnx/inspect/1"
    assert {"node", "op", "weight", "weights", "macs", "removable_channels"} <= set(document["layers"][0])
    assert {"layer2.0.conv2", "layer2.0.downsample.0"} in [set(group["layers"]) for group in document["groups"]]
    assert document["totals"]["prunable_weights"] == sum(row["weights"] for row in document["layers"])
    assert json.loads(run("inspect", LENET, "--json", "-").stdout)["opset"] == 17


def test_inspect_counts_a_shared_weight_once(tmp_path: Path) -> None:
    net = Net()
    h, weight = net.input("N", 6), net.weight(6, 6)
    for _ in range(3):
        h = net.op("Tanh", net.op("MatMul", h, weight))
    onnx.save(net.model(h), tmp_path / "m.onnx")
    result = run("inspect", tmp_path / "m.onnx", "--json", tmp_path / "i.json")
    document = json.loads((tmp_path / "i.json").read_text())
    assert (len(document["layers"]), document["totals"]["prunable_weights"]) == (3, 36)
    assert "36 weights can be pruned" in result.stdout


def test_compare(tmp_path: Path) -> None:
    prune(tmp_path)
    result = run("compare", LENET, tmp_path / "out.onnx", "--data", TEST, "--json", tmp_path / "c.json")
    assert result.exit_code == 0
    for word in ("accuracy %", "99.11", "MACs", "ms per sample", "cosine"):
        assert word in result.stdout
    document = json.loads((tmp_path / "c.json").read_text())
    assert document["schema"] == "relief-onnx/compare/1"
    assert set(document["a"]) >= FILE_KEYS | {"ms_per_sample"}
    assert document["quality"]["samples"] == 450
    same = json.loads(run("compare", LENET, LENET, *FEW, "--json", "-").stdout)["quality"]["agreement"]["logits"]
    assert (same["cosine"], same["sqnr_db"], same["max_abs"], same["top1"]) == (1.0, None, 0.0, 1.0)


def test_check_data() -> None:
    result = run("check-data", LENET, TEST)
    assert result.exit_code == 0
    for word in ("450 samples", "labelled", "batch x 1 x 28 x 28", "The data fits the model."):
        assert word in result.stdout
    document = json.loads(run("check-data", LENET, TEST, "--json", "-").stdout)
    assert document["schema"] == "relief-onnx/data/1"
    assert (document["kind"], document["samples"], len(document["classes"])) == ("images", 450, 10)
    assert document["inputs"][0]["name"] == "image"


def test_progress_on_a_terminal_only(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    command = [*program(), "prune", str(LENET), *(str(part) for part in FEW), "-o", str(tmp_path / "out.onnx")]
    subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, check=True, env=os.environ | {"TERM": "xterm", "COLUMNS": "120"})
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError), open(ours, "rb", buffering=0) as terminal:  # a closed terminal ends in an error
        while piece := terminal.read(4096):
            shown += piece
    assert b"Calibrating and scoring" in shown
    assert b"32/32" in shown


def test_runs_as_a_module() -> None:
    found = subprocess.run([sys.executable, "-m", "relief_onnx_cli", "--version"], capture_output=True, text=True, check=True)
    assert found.stdout.startswith("relief-onnx, version ")


@pytest.mark.parametrize("command", ["prune", "score", "compare"])
def test_quiet_prints_nothing(command: str, tmp_path: Path) -> None:
    tail: dict[str, tuple[object, ...]] = {
        "prune": (LENET, "-o", tmp_path / "o.onnx"), "score": (LENET, "-o", tmp_path / "s.npz"), "compare": (LENET, LENET),
    }  # fmt: skip
    result = run(command, *tail[command], *FEW, "--quiet")
    assert (result.exit_code, result.output) == (0, "")


# --- usage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [*NOT_BUILT, "--colour"])
def test_an_option_that_is_not_built_does_not_exist(option: str, tmp_path: Path) -> None:
    result = run("prune", LENET, *FEW, "-o", tmp_path / "out.onnx", option, "1")
    assert result.exit_code == 2
    assert f"No such option: {option}" in result.stderr or f"No such option '{option}'" in result.stderr
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("prune", LENET), ("prune",), ("compare", LENET), ("score", LENET, *FEW), ("nothing",), ("check-data", LENET),
        ("prune", LENET, *FEW, "--criterion", "taylor"), ("prune", LENET, *FEW, "--granularity", "layer"),
        ("prune", LENET, *FEW, "--repair", "distil"), ("prune", LENET, *FEW, "--alpha", "much"),
        ("prune", LENET, *FEW, "--mean", "a,b"),
    ],
)  # fmt: skip
def test_wrong_usage(arguments: tuple[object, ...]) -> None:
    assert run(*arguments).exit_code == 2


def test_exit_codes_of_a_real_process(tmp_path: Path) -> None:
    codes = {
        1: ("prune", tmp_path / "none.onnx", *FEW),
        2: ("prune", LENET, "--nothing"),
        4: ("prune", LENET, *FEW, "-o", tmp_path / "out.onnx", "--only", "nothing"),
    }
    for code, arguments in codes.items():
        found = process(*arguments)
        assert (found.returncode, found.stdout) == (code, "")
        assert "Traceback" not in found.stderr
    assert list(tmp_path.iterdir()) == []


def test_commands() -> None:
    assert tuple(sorted(main.commands)) == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_documented(name: str) -> None:
    command = main.commands[name]
    readme = (ROOT / "README.md").read_text()
    assert f"relief-onnx {name}" in readme
    assert f"relief-onnx {name}" in str(command.help)  # an example
    shown = run(name, "--help")
    assert shown.exit_code == 0
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            for option in parameter.opts:
                assert option in shown.stdout
                assert f"`{option}" in readme, f"the README does not mention {option}"


def test_version() -> None:
    assert run("--version").stdout == f"relief-onnx, version {relief_onnx.__version__}\n"


# --- imports and speed ----------------------------------------------------------------------------------------------

HEAVY = ("torch", "onnxruntime", "onnx", "numpy", "PIL", "rich", "sklearn")


@pytest.mark.parametrize(
    ("code", "banned"),
    [
        ("from relief_onnx_cli.main import main; main(['--help'], standalone_mode=False)", HEAVY),
        ("from relief_onnx_cli.main import main; main(['prune', '--help'], standalone_mode=False)", HEAVY),
        ("import relief_onnx", HEAVY),
        ("import relief_onnx; relief_onnx.prune, relief_onnx.Options", ("torch", "sklearn", "rich", "click")),
    ],
)
def test_what_is_imported(code: str, banned: tuple[str, ...]) -> None:
    script = f"import sys\n{code}\nprint('loaded', *sys.modules)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(found.stdout.split("loaded ")[-1].split())
    assert not loaded & set(banned)


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def test_help_is_fast() -> None:
    pairs = [(_seconds([*program(), "--help"]), _seconds([sys.executable, "-c", "import click"])) for _ in range(7)]
    ours, bare = (statistics.median(times) for times in zip(*pairs, strict=True))
    assert ours - bare < 0.3


MODULES = sorted(path.stem for path in (ROOT / "relief_onnx").glob("*.py"))


@pytest.mark.parametrize("name", MODULES)
def test_all_names_exist(name: str) -> None:
    module = import_module("relief_onnx" if name == "__init__" else f"relief_onnx.{name}")
    assert len(module.__all__) == len(set(module.__all__))
    missing = [item for item in module.__all__ if not hasattr(module, item)]
    assert not missing
