"""Retraining under masks: zeros that stay, losses found in the graph, rounds, stopped runs, refusals."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import CALIB, LENET, SAMPLES, TEST, program, run
from numpy.typing import NDArray
from onnx import helper, numpy_helper

import relief_onnx
from relief_onnx import model as files
from relief_onnx.data import open_dataset
from relief_onnx.errors import DataError, ModelError, NothingPrunedError, RecipeError
from relief_onnx.graph import Graph
from relief_onnx.layers import find
from relief_onnx.options import resolve
from relief_onnx.pack import unpack
from relief_onnx.recalibrate import recalibrate
from relief_onnx.surgery import apply_weights
from relief_onnx.trainer.augment import augment
from relief_onnx.trainer.heads import find_heads, label_head
from relief_onnx.trainer.samples import Samples
from relief_onnx.training import Training, parse_training

torch = pytest.importorskip("torch")

from relief_onnx.trainer.loop import Trainer  # noqa: E402 - these need torch
from relief_onnx.trainer.schedule import factor  # noqa: E402

RESNET, LENET300 = SAMPLES / "resnet8.onnx", SAMPLES / "lenet300.onnx"
Array = NDArray[Any]


def weights_of(model: onnx.ModelProto | Path) -> dict[str, Array]:
    loaded = unpack(onnx.load(str(model)) if isinstance(model, Path) else model)
    return {item.name: numpy_helper.to_array(item) for item in loaded.graph.initializer}


def halved(path: Path = LENET) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A model without the smaller half of each weight, and the flags of what stays."""
    model = files.prepare(files.load(path))
    graph = Graph(model)
    flags = {}
    for layer in find(graph).layers:
        weight = graph.array(layer.weight)
        flags[layer.weight] = np.abs(weight) >= np.median(np.abs(weight))
    return apply_weights(model, {name: np.where(flag, graph.array(name), np.float32(0)) for name, flag in flags.items()}), flags


def dataset(path: Path = TEST, model: Path = LENET) -> Any:
    return open_dataset(path, files.input_specs(files.load(model)))


def prune(source: Any = LENET, data: Any = TEST, **options: Any) -> relief_onnx.pipeline.Result:
    given = {"threads": 1, "batch": 32, "epochs": 2, "repair": "distill", **options}
    return relief_onnx.prune(source, data, **given)


# --- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adam", "weight_decay": 1e-2},
        {"optimizer": "sgd", "weight_decay": 1e-2, "clip": 1.0, "warmup": 0.5, "schedule": "step"},
    ],
)
def test_zeros_stay_zero_at_every_step(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, flags = halved()
    training = parse_training({"epochs": 1, "batch": 64, "validation": 0, **options})
    trainer = Trainer(files.load(LENET), dataset(), training, label_weight=0.5, threads=1)
    steps = []

    def looked(self: Any, *args: Any) -> Any:
        found = step(self, *args)
        for name, flag in flags.items():
            assert (self._network.weight(name).detach().numpy()[~flag] == 0).all()
        steps.append(found)
        return found

    from relief_onnx.trainer import loop

    step = loop._Round._step
    monkeypatch.setattr(loop._Round, "_step", looked)
    found = trainer.run(model, flags)
    assert len(steps) == -(-trainer.samples.training_rows // 64)
    for name, flag in flags.items():
        assert (found.arrays[name][~flag] == 0).all()
        assert not np.signbit(found.arrays[name][~flag]).any()
        assert (found.arrays[name][flag] != weights_of(model)[name][flag]).any()


def test_the_file_has_the_zeros_and_distillation_raises_agreement(tmp_path: Path) -> None:
    options = {"keep": "8%", "criterion": "magnitude"}
    plain = prune(**options, repair="none", batch=None, epochs=None)
    found = prune(**options, epochs=8, output=tmp_path / "out.onnx")
    assert found.report["quality"]["agreement"]["logits"]["top1"] > plain.report["quality"]["agreement"]["logits"]["top1"] + 0.1
    shipped, masks = weights_of(tmp_path / "out.onnx"), found.masks
    before, after = (
        sum(int((value != 0).sum()) for value in weights_of(result.model).values() if value.ndim > 1) for result in (plain, found)
    )
    assert after == before
    assert {name for name, keep in masks.keep.items() if not keep.all()} <= shipped.keys()
    document = found.report["retrain"]
    assert document["loss"] == [{"output": "logits", "loss": "kl", "form": "logits", "reason": "it looks like class scores [N, classes]"}]
    (row,) = document["iterations"]
    assert [epoch["epoch"] for epoch in row["epochs"]] == list(range(1, 9))
    assert row["epochs"][-1]["validation_loss"] < row["epochs"][0]["validation_loss"]
    assert row["quality"] == row["epochs"][-1]["validation_quality"]
    assert (document["method"], document["measure"], document["validation_samples"]) == ("distill", "accuracy", 45)


def test_labels_and_mixes() -> None:
    by_labels = prune(keep="8%", repair="labels", criterion="magnitude")
    mixed = prune(keep="8%", label_weight=0.3, criterion="magnitude")
    assert by_labels.report["retrain"]["label_weight"] == 1.0
    assert mixed.report["retrain"]["label_weight"] == 0.3
    assert by_labels.model != mixed.model
    assert min(item.report["quality"]["accuracy_after"] for item in (by_labels, mixed)) > 0.35


def test_unlabelled_data_is_judged_by_agreement() -> None:
    found = prune(data=CALIB, keep="20%", epochs=1)
    document = found.report["retrain"]
    assert (document["measure"], document["labels"], document["baseline"]) == ("top-1 agreement", None, 1.0)
    with pytest.raises(DataError, match="has no labels to train on"):
        prune(data=CALIB, keep="20%", repair="labels")


def test_same_seed_same_bytes() -> None:
    first, second, third = (prune(keep="10%", epochs=1, seed=seed).model.SerializeToString(deterministic=True) for seed in (3, 3, 4))
    assert first == second
    assert first != third


# --- rounds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"criterion": "flow", "keep": "10%"}, {"preset": "paper"}, {"criterion": "magnitude", "alpha": 0.8}])
def test_rounds_only_take_away(options: dict[str, Any], tmp_path: Path) -> None:
    found = prune(iterations=3, epochs=1, work_dir=tmp_path, **options)
    rows = found.report["retrain"]["iterations"]
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    assert rows[0]["weights_kept"] > rows[1]["weights_kept"] > rows[2]["weights_kept"]
    rounds = [weights_of(tmp_path / f"iteration-{number}" / "trained.onnx") for number in (1, 2, 3)]
    for earlier, later in itertools.pairwise(rounds):
        for layer in find(Graph(files.load(LENET))).layers:
            assert (later[layer.weight][earlier[layer.weight] == 0] == 0).all()
    if "keep" in options:
        assert [round(row["target_percent"], 2) for row in rows] == [46.42, 21.54, 10.0]
        assert rows[-1]["kept_percent"] <= 10.0
    assert found.report["totals"]["weights_kept"] == rows[-1]["weights_kept"]


@pytest.mark.parametrize("granularity", ["channel", "channel+weight"])
def test_rounds_take_away_whole_units_too(granularity: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"granularity": granularity, "round_to": 1, "epochs": 1, "samples": 64}
    found = prune(RESNET, keep="40%", iterations=3, work_dir=tmp_path, **options)
    rows = found.report["retrain"]["iterations"]
    assert rows[0]["weights_kept"] > rows[1]["weights_kept"] > rows[2]["weights_kept"]
    rounds = [weights_of(tmp_path / f"iteration-{number}" / "trained.onnx") for number in (1, 2, 3)]
    for earlier, later in itertools.pairwise(rounds):
        for layer in find(Graph(files.load(RESNET))).layers:
            assert (later[layer.weight][earlier[layer.weight] == 0] == 0).all()
    once = prune(RESNET, keep="40%", iterations=1, **options)
    macs = [report["output"]["macs"] / report["input"]["macs"] for report in (found.report, once.report)]
    assert macs[0] <= 0.42
    assert macs[0] == pytest.approx(macs[1], abs=0.015)
    assert found.report["verification"]["masked_vs_output_max_rel"] < 1e-4


def test_rewind_starts_from_the_given_weights(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    model = files.load(LENET)
    start = {item.name: rng.normal(size=item.dims).astype(np.float32) for item in model.graph.initializer if len(item.dims) > 1}
    files.save(apply_weights(model, start), tmp_path / "init.onnx")
    found = prune(keep="50%", epochs=0, rewind=str(tmp_path / "init.onnx"), storage="dense", granularity="weight")
    stored = weights_of(found.masked)
    name = "classifier.0.weight"
    keep = found.masks.keep[name]
    np.testing.assert_array_equal(stored[name][keep], start[name][keep])
    other = onnx.load(str(LENET300))
    other.graph.initializer[0].name = "classifier.0.weight"
    files.save(other, tmp_path / "other.onnx")
    with pytest.raises(RecipeError, match=r"has shape|has no weight"):
        prune(keep="50%", epochs=0, rewind=str(tmp_path / "other.onnx"))


def test_max_drop_ships_the_round_before() -> None:
    found = prune(keep="0.5%", iterations=3, epochs=2, max_drop="15%", criterion="magnitude", validation=0.3)
    document = found.report["retrain"]
    assert "more than the 15 of max-drop" in document["stopped"]
    good = document["iterations"][document["iterations_shipped"] - 1]
    assert good["drop"] <= 15 < document["iterations"][-1]["drop"]
    assert found.report["totals"]["weights_kept"] == good["weights_kept"]
    with pytest.raises(NothingPrunedError, match=r"iteration 1 loses .* nothing is left to ship"):
        prune(keep="0.5%", epochs=1, max_drop=0, criterion="magnitude", validation=0.3)


def test_early_stopping_ships_the_best_epoch() -> None:
    found = prune(keep="8%", criterion="magnitude", epochs=40, patience=1, learning_rate=0.01, schedule="constant", validation=0.3)
    (row,) = found.report["retrain"]["iterations"]
    losses = [epoch["validation_loss"] for epoch in row["epochs"]]
    assert len(losses) < 40
    assert row["epoch_shipped"] == 1 + int(np.argmin(losses))
    assert row["quality"] == row["epochs"][row["epoch_shipped"] - 1]["validation_quality"]
    assert "no better validation loss" in row["stopped"]


@pytest.mark.parametrize("data", [TEST, CALIB])
def test_training_that_only_made_it_worse_ships_the_start(data: Path) -> None:
    options: dict[str, Any] = {"data": data, "keep": "30%", "learning_rate": 0.3, "schedule": "constant", "validation": 0.3}
    found, start = prune(**options), prune(**options, epochs=0)
    (row,), (before,) = (result.report["retrain"]["iterations"] for result in (found, start))
    assert (row["epoch_shipped"], len(row["epochs"]), before["epoch_shipped"]) == (0, 2, 0)
    assert row["quality"] == before["quality"] > max(epoch["validation_quality"] for epoch in row["epochs"])
    assert found.model == start.model
    head, tail = "no epoch of training in iteration 1 was better on the samples set aside", "lower --learning-rate (now 0.3)"
    assert [line for line in found.report["warnings"] if line.startswith(head) and line.endswith(tail)]
    assert not [line for line in start.report["warnings"] if "no epoch" in line]


def test_the_best_epoch_ships_without_patience_too() -> None:
    found = prune(keep="8%", criterion="magnitude", epochs=9, learning_rate=0.01, schedule="constant", validation=0.3)
    (row,) = found.report["retrain"]["iterations"]
    losses = [epoch["validation_loss"] for epoch in row["epochs"]]
    assert row["epoch_shipped"] == 1 + int(np.argmin(losses)) < 9
    assert row["quality"] == row["epochs"][row["epoch_shipped"] - 1]["validation_quality"]


def test_without_samples_set_aside_the_last_epoch_ships() -> None:
    (row,) = prune(keep="30%", learning_rate=0.3, validation=0).report["retrain"]["iterations"]
    assert (row["epoch_shipped"], row["quality"]) == (2, None)


def test_retrain_ships_the_start_where_nothing_was_better() -> None:
    model, _ = halved()
    found = relief_onnx.retrain(model, TEST, teacher=LENET, epochs=1, learning_rate=0.5, threads=1, recalibrate="off")
    assert found.report["retrain"]["iterations"][0]["epoch_shipped"] == 0
    assert found.report["warnings"][0].endswith("which stay; lower --learning-rate (now 0.5)")
    for name, value in weights_of(model).items():
        np.testing.assert_array_equal(weights_of(found.dense)[name], value)


# --- a stopped run --------------------------------------------------------------------------------------------------


def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    common = [
        "prune", LENET, "--data", TEST, "--repair", "distill", "--keep", "10%", "--iterations", "2", "--epochs", "3", "--batch", "4",
        "--threads", "1", "--augment", "flip,crop", "--patience", "3", "--checkpoint", "0.05", "--quiet", "--force",
    ]  # fmt: skip
    command = [*program(), *map(str, common)]
    note = tmp_path / "killed" / "iteration-2" / "checkpoint.npz"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([*command, "-o", tmp_path / "a.onnx", "--work-dir", tmp_path / "killed"], env=environment)
    try:
        for _ in range(10000):
            if child.poll() is not None or (note.exists() and _place(note)[1] > 0):
                break
            time.sleep(0.02)
        assert child.poll() is None, "it was done before it could be killed"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    epoch, step = _place(note)
    assert epoch * 102 + step > 0
    assert not (tmp_path / "a.onnx").exists()
    for name, folder in (("a.onnx", "killed"), ("b.onnx", "whole")):
        result = run(*common, "-o", tmp_path / name, "--work-dir", tmp_path / folder)
        assert (result.exit_code, result.output) == (0, "")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def _place(note: Path) -> tuple[int, int]:
    with np.load(note) as archive:
        found = json.loads(archive["note"].tobytes())
    return found["epoch"], found["step"]


def test_a_damaged_note_or_another_run_starts_anew(tmp_path: Path) -> None:
    first = prune(keep="5%", criterion="magnitude", epochs=1, work_dir=tmp_path)
    (tmp_path / "iteration-1" / "trained.npz").write_bytes(b"nothing")
    again = prune(keep="5%", criterion="magnitude", epochs=1, work_dir=tmp_path)
    assert again.model == first.model
    assert prune(keep="5%", criterion="magnitude", epochs=1, learning_rate=0.01, work_dir=tmp_path).model != first.model


# --- losses ---------------------------------------------------------------------------------------------------------


def _tiny(*tail: onnx.NodeProto, outputs: tuple[str, ...] = ("y",), size: int = 6) -> onnx.ModelProto:
    rng = np.random.default_rng(1)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], name="first"), *tail]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", size]) for name in outputs],
        [numpy_helper.from_array(rng.normal(size=(4, size)).astype(np.float32), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(
    ("nodes", "kind", "form"),
    [
        ((helper.make_node("Softmax", ["h"], ["y"]),), "kl", "probabilities"),
        ((helper.make_node("LogSoftmax", ["h"], ["y"], axis=1),), "kl", "log-probabilities"),
        ((helper.make_node("Softmax", ["h"], ["p"]), helper.make_node("Identity", ["p"], ["y"])), "kl", "probabilities"),
        ((helper.make_node("Sigmoid", ["h"], ["y"]),), "bce", "sigmoid"),
        ((helper.make_node("Identity", ["h"], ["y"]),), "mse", "values"),
        ((helper.make_node("Tanh", ["h"], ["y"]),), "mse", "values"),
    ],
)
def test_the_loss_is_found_in_the_graph_and_falls(nodes: tuple[onnx.NodeProto, ...], kind: str, form: str) -> None:
    model = _tiny(*nodes)
    (head,) = find_heads(model)
    assert (head.kind, head.form) == (kind, form)
    rng = np.random.default_rng(2)
    feeds = [{"x": rng.normal(size=(64, 4)).astype(np.float32)} for _ in range(4)]
    for feed in feeds:
        feed["x"][:, 1] = feed["x"][:, 0]  # so that one weight can stand in for another
    flags = {"w": np.ones((4, 6), bool)}
    flags["w"][0, ::2] = False
    weight = np.where(flags["w"], weights_of(model)["w"], 0)
    training = Training(epochs=30, batch=32, learning_rate=0.02, validation=0.25)
    trainer = Trainer(model, open_dataset(feeds, files.input_specs(model)), training, label_weight=0.0, threads=1)
    found = trainer.run(apply_weights(model, {"w": weight}), flags)
    assert found.epochs[-1]["validation_loss"] < 0.3 * found.epochs[0]["loss"]
    # The original itself is at 0.
    exact = Trainer(
        model, open_dataset(feeds, files.input_specs(model)), Training(epochs=1, learning_rate=1e-12), label_weight=0, threads=1
    )
    assert abs(exact.run(model, {}).epochs[0]["loss"]) < 1e-5


@pytest.mark.parametrize(("operator", "axis"), [("LogSoftmax", 2), ("Softmax", -1), ("Tanh", None)])
def test_outputs_whose_samples_stand_along_another_axis_are_judged_together(operator: str, axis: int | None) -> None:
    """Time first, as recurrent layers hand it on."""
    given = {} if axis is None else {"axis": axis}
    steps = helper.make_node("Split", ["h"], ["one", "two"], axis=1)
    stacked = helper.make_node("SequenceConstruct", ["one", "two"], ["both"])
    joined = helper.make_node("ConcatFromSequence", ["both"], ["steps"], axis=0, new_axis=1)
    model = _tiny(steps, stacked, joined, helper.make_node(operator, ["steps"], ["y"], **given))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, "n", 3]))
    feeds = [{"x": np.random.default_rng(2).normal(size=(32, 4)).astype(np.float32)}]
    training = Training(epochs=1, learning_rate=1e-12, validation=0.25)
    trainer = Trainer(model, open_dataset(feeds, files.input_specs(model)), training, label_weight=0, threads=1)
    assert trainer.run(model, {}).quality == pytest.approx(1)
    other = apply_weights(model, {"w": -weights_of(model)["w"]})
    assert (trainer.run(other, {}).quality or 0.0) < 0.5


def test_a_sequence_among_the_outputs_has_no_loss() -> None:
    parts = helper.make_node("SplitToSequence", ["h"], ["parts"], axis=1)
    model = _tiny(helper.make_node("Softmax", ["h"], ["y"]), parts)
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, None))
    model.graph.output.append(helper.make_value_info("parts", kind))
    assert [head.kind for head in find_heads(model)] == ["kl", "none"]
    feeds = [{"x": np.random.default_rng(3).normal(size=(32, 4)).astype(np.float32)}]
    training = Training(epochs=1, validation=0.25)
    assert (
        len(Trainer(model, open_dataset(feeds, files.input_specs(model)), training, label_weight=0, threads=1).run(model, {}).epochs) == 1
    )


def test_several_outputs_and_chosen_losses() -> None:
    tail = (helper.make_node("Softmax", ["h"], ["y"]), helper.make_node("Tanh", ["h"], ["z"]), helper.make_node("ArgMax", ["h"], ["k"]))
    model = _tiny(*tail, outputs=("y", "z"))
    assert [head.kind for head in find_heads(model)] == ["kl", "mse"]
    assert [head.kind for head in find_heads(model, [("z", "cosine")])] == ["kl", "cosine"]
    assert [head.kind for head in find_heads(model, [("", "mse"), ("y", "none")])] == ["none", "mse"]
    with pytest.raises(RecipeError, match="which is no output of the model; its outputs are y, z"):
        find_heads(model, [("q", "mse")])
    with pytest.raises(RecipeError, match="no output of the model has a loss"):
        find_heads(model, [("", "none")])
    feeds = [{"x": np.random.default_rng(3).normal(size=(32, 4)).astype(np.float32)}]
    data = open_dataset(feeds, files.input_specs(model))
    trainer = Trainer(model, data, Training(epochs=3, loss=(("z", "cosine"),), validation=0), label_weight=0.0, threads=1)
    assert len(trainer.run(model, {}).epochs) == 3
    assert label_head(model, trainer.heads, np.array([1, 2])).name == "y"


# --- samples --------------------------------------------------------------------------------------------------------


def _numbers(samples: Samples, epoch: int) -> list[int]:
    return [int(number) for draw in samples.epoch(epoch) for number in draw.numbers[: draw.rows]]


@pytest.mark.parametrize("limit", [1 << 30, 1000])
def test_every_sample_once_in_an_order_of_its_own(limit: int, tmp_path: Path) -> None:
    for part in range(3):
        np.save(tmp_path / f"{part}.npy", np.arange(part * 1000, part * 1000 + 400, dtype=np.float32).reshape(400, 1).repeat(4, 1))
    data = open_dataset(tmp_path, files.input_specs(_tiny(helper.make_node("Tanh", ["h"], ["y"]))))
    samples = Samples(data, batch=32, validation=0.1, seed=5, limit=limit)
    assert samples.cached == (limit > 1000)
    assert (samples.training_rows, samples.validation_rows) == (1080, 120)
    first, second = _numbers(samples, 0), _numbers(samples, 1)
    aside = {int(number) for draw in samples.validation() for number in draw.numbers}
    assert sorted(first) == sorted(second) == sorted(set(range(1200)) - aside)
    assert first != second
    assert first == _numbers(Samples(data, batch=32, validation=0.1, seed=5, limit=limit), 0)
    for draw in itertools.chain(samples.epoch(2), samples.validation(), samples.everything()):
        values = draw.feed["x"][:, 0].astype(int)
        np.testing.assert_array_equal(values % 1000 + values // 1000 * 400, draw.numbers)


def test_streamed_and_cached_samples_train_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    from relief_onnx.trainer import samples

    monkeypatch.setattr(samples.Samples.__init__, "__kwdefaults__", {"limit": 10_000})
    found = prune(keep="20%", epochs=1)
    assert found.report["retrain"]["in_memory"] is False
    assert found.report["quality"]["accuracy_after"] > 0.8


def test_a_fixed_batch_is_filled_and_counts_rows_once() -> None:
    model = _tiny(helper.make_node("Tanh", ["h"], ["y"]))
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.shape.dim[0].dim_value = 8
    feeds = [{"x": np.random.default_rng(3).normal(size=(8, 4)).astype(np.float32)} for _ in range(5)]
    samples = Samples(open_dataset(feeds, files.input_specs(model)), batch=64, validation=0.3, seed=0)
    assert samples.batch == 8
    assert all(len(draw.feed["x"]) == 8 for draw in itertools.chain(samples.epoch(0), samples.validation()))
    assert sum(draw.rows for draw in samples.validation()) == samples.validation_rows == 12


def test_augmentation_keeps_pixels_and_leaves_the_rest() -> None:
    images = np.random.default_rng(0).random((16, 3, 16, 16)).astype(np.float32)
    feed = {"image": images, "scale": np.ones((16, 2), np.float32)}
    flipped = augment(feed, ("flip",), np.random.default_rng(1))["image"]
    same, mirrored = (flipped == images).all((1, 2, 3)), (flipped == images[..., ::-1]).all((1, 2, 3))
    assert (same | mirrored).all()
    assert same.any()
    assert mirrored.any()
    moved = augment(feed, ("crop",), np.random.default_rng(1))
    assert moved["scale"] is feed["scale"]
    last = augment({"image": images.transpose(0, 2, 3, 1)}, ("crop",), np.random.default_rng(1))["image"]
    np.testing.assert_array_equal(last.transpose(0, 3, 1, 2), moved["image"])
    for before, after in zip(images, moved["image"], strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(before, ((0, 0), (2, 2), (2, 2))), (3, 16, 16))[0]
        assert (windows == after).all((2, 3, 4)).any()


def test_augmentation_needs_images() -> None:
    model = _tiny(helper.make_node("Tanh", ["h"], ["y"]))
    data = open_dataset([{"x": np.zeros((4, 4), np.float32)}], files.input_specs(model))
    with pytest.raises(RecipeError, match="no input of the model has 4 axes"):
        Trainer(model, data, Training(augment=("flip",)), label_weight=0.0)


# --- BatchNormalization ---------------------------------------------------------------------------------------------


def test_recalibration_finds_the_statistics_of_the_samples() -> None:
    model = files.load(RESNET)
    names = [node.input[3:5] for node in model.graph.node if node.op_type == "BatchNormalization"]
    spoilt = {name: np.full_like(weights_of(model)[name], 0.5) for pair in names for name in pair}
    data = dataset(CALIB, RESNET)
    found = recalibrate(apply_weights(model, spoilt), data, threads=1)
    assert found.keys() == spoilt.keys()
    again = recalibrate(model, data, threads=1)
    for name in found:
        np.testing.assert_allclose(found[name], again[name], rtol=1e-6, atol=1e-6)
    plain = relief_onnx.compare_models(model, apply_weights(model, spoilt), data, threads=1).outputs["logits"]
    better = relief_onnx.compare_models(model, apply_weights(model, found), data, threads=1).outputs["logits"]
    assert better.cosine > 0.95 > plain.cosine


def test_recalibration_without_training() -> None:
    found = relief_onnx.prune(RESNET, CALIB, keep="40%", recalibrate="on", threads=1)
    assert len(found.report["retrain"]["recalibrated"]) == 9
    assert relief_onnx.prune(RESNET, CALIB, keep="40%", threads=1, samples=32).report["retrain"] is None


def test_statistics_move_in_training_and_zeros_stay() -> None:
    found = prune(RESNET, CALIB, keep="40%", epochs=1, samples=64, storage="dense")
    before, after = weights_of(RESNET), weights_of(found.masked)
    moved = [name for name in before if name.endswith("running_mean") and not np.allclose(before[name], after[name])]
    assert moved


# --- the command ----------------------------------------------------------------------------------------------------


def test_retrain_holds_the_zeros_of_the_file(tmp_path: Path) -> None:
    small, out, report = tmp_path / "small.onnx", tmp_path / "out.onnx", tmp_path / "r.json"
    relief_onnx.prune(LENET, CALIB, keep="6%", criterion="magnitude", output=small, threads=1)
    few = ("--epochs", "6", "--batch", "32", "--threads", "1")
    result = run("retrain", small, "--teacher", LENET, "--data", TEST, "-o", out, *few, "--json", report)
    assert result.exit_code == 0, result.output
    assert "trained (distill) on 405 samples; loss logits: kl" in result.stdout
    before, after = weights_of(small), weights_of(out)
    for layer in find(Graph(unpack(files.load(small)))).layers:
        np.testing.assert_array_equal(before[layer.weight] == 0, after[layer.weight] == 0)
    found = json.loads(report.read_text())
    assert set(found) == {
        "schema", "input", "output", "options", "data", "retrain", "totals", "verification", "quality", "timing", "warnings"
    }  # fmt: skip
    low = relief_onnx.compare_models(files.load(LENET), files.load(small), dataset(), threads=1).accuracy
    assert low is not None
    assert found["quality"]["accuracy_after"] > low[1] + 0.1
    assert found["output"]["bytes"] == out.stat().st_size < 2 * small.stat().st_size


def test_retrain_on_labels_and_refusals(tmp_path: Path) -> None:
    from relief_onnx.retraining import retrain

    found = retrain(LENET, TEST, epochs=1, threads=1)
    assert found.report["retrain"]["method"] == "labels"
    assert "no weight is 0, so nothing had to be held" in found.report["warnings"]
    with pytest.raises(ModelError, match="give the model before pruning"):
        retrain(LENET, TEST, teacher=_tiny(helper.make_node("Tanh", ["h"], ["y"])))
    with pytest.raises(RecipeError, match="give the original with --teacher"):
        retrain(LENET, TEST, label_weight=0.5)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"epochs": -1}, "epochs is -1; it must be a whole number, 0 or more"),
        ({"learning_rate": 0.0}, "learning-rate is 0.0; it must be a number, above 0"),
        ({"label_weight": 2}, "label-weight is 2; it must be a number, 0 or more and at most 1"),
        ({"schedule": "linear"}, "schedule is 'linear'; choose one of cosine, step, constant"),
        ({"augment": "rotate"}, "augment is 'rotate'; choose from flip, crop"),
        ({"loss": "l1"}, "loss is 'l1'; write KIND or OUTPUT=KIND"),
        ({"milestones": "0.5,2"}, "milestones is '0.5,2'; give shares of the epochs"),
        ({"max_drop": "much"}, "max-drop is 'much'; give the points that may be lost"),
        ({"precision": "mixed"}, "precision mixed works on a GPU only"),
        ({"iterations": 2, "repair": "none"}, "iterations train the model again each time; add --repair distill"),
        ({"validation": 0, "patience": 2}, "patience and max-drop need samples that are set aside"),
        ({"learning_rate": 1e30, "optimizer": "sgd"}, "lower --learning-rate"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        prune(**{"keep": "50%", **options})
    assert sentence in str(caught.value)


def test_training_options_in_a_recipe_and_in_the_preset() -> None:
    options = resolve("paper", {"epochs": 7, "loss": {"logits": "mse"}}, {"batch": 9, "repair": "labels"})
    assert (options.training.epochs, options.training.batch, options.training.weight_decay) == (7, 9, 5e-4)
    assert options.training.loss == (("logits", "mse"),)
    assert (
        relief_onnx.prune(LENET, CALIB, keep="50%", epochs=3, threads=1, samples=32).report["warnings"][0].startswith("epochs: nothing is")
    )


def test_the_learning_rate_over_time() -> None:
    step = Training(epochs=10, schedule="step", milestones=(0.5, 0.8), warmup=2)
    assert [round(factor(step, at), 4) for at in (0.5, 1.0, 3.0, 5.0, 9.0)] == [0.25, 0.5, 1.0, 0.1, 0.01]
    cosine = Training(epochs=10)
    assert [round(factor(cosine, at), 4) for at in (0, 5, 10)] == [1.0, 0.5, 0.0]
    assert factor(Training(schedule="constant"), 9.9) == 1.0


def test_without_torch_one_sentence_says_what_to_install() -> None:
    code = (
        "import sys; from importlib.abc import MetaPathFinder\n"
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'torch' else real(name, *rest)\n"
        "import relief_onnx\ntry:\n"
        f"    relief_onnx.prune({str(LENET)!r}, {str(CALIB)!r}, keep='50%', repair='distill', samples=16)\n"
        "except relief_onnx.RecipeError as error:\n    print(error)\n"
        "sys.exit('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert "retraining needs torch, which is not installed; run: pip install relief-onnx[retrain]" in found.stdout


def test_a_model_that_torch_cannot_run_is_refused_by_name() -> None:
    model = _tiny(helper.make_node("Inverse", ["h"], ["y"], name="odd", domain="com.microsoft"), size=4)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4  # onnxruntime crashes on matrices that are not square
    with pytest.raises(ModelError, match=r"node odd: operator Inverse of domain com.microsoft.*use --repair least-squares"):
        relief_onnx.prune(model, [{"x": np.eye(4, dtype=np.float32)}], keep="50%", repair="distill", validation=0, threads=1)
