"""Models over 2 GB: the same code on small ones, with the limits lowered."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import relief_onnx
from relief_onnx import aside, external
from relief_onnx import model as files
from relief_onnx.errors import OutputError, VerificationError
from relief_onnx.session import Session

WIDTH = 64  # 16 KiB for each of the weights


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file holds 30 kB, a model of 8 kB is large."""
    monkeypatch.setattr(aside, "LIMIT", 30_000)
    monkeypatch.setattr(aside, "FROM", 8_000)
    monkeypatch.setattr(aside, "SMALLEST", 1_024)


def mlp(layers: int = 4, kind: type = np.float32) -> onnx.ModelProto:
    """MatMul, Add and Relu, `layers` times."""
    rng = np.random.default_rng(0)
    nodes, tensors, name = [], [], "x"
    element = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    for number in range(layers):
        weight = (rng.standard_normal((WIDTH, WIDTH)) * rng.gamma(0.3, 1, (WIDTH, WIDTH)) / WIDTH**0.5).astype(kind)
        tensors += [numpy_helper.from_array(weight, f"w{number}"), numpy_helper.from_array(np.full(WIDTH, 0.1, kind), f"b{number}")]
        nodes += [
            helper.make_node("MatMul", [name, f"w{number}"], [f"m{number}"], name=f"fc{number}"),
            helper.make_node("Add", [f"m{number}", f"b{number}"], [f"a{number}"]),
            helper.make_node("Relu", [f"a{number}"], [f"r{number}"]),
        ]
        name = f"r{number}"
    nodes[-1].output[0] = "y"
    ends = [helper.make_tensor_value_info(end, element, ["n", WIDTH]) for end in ("x", "y")]
    graph = helper.make_graph(nodes, "mlp", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def stored(folder: Path, how: str, model: onnx.ModelProto | None = None) -> Path:
    """The model as a file: inside, with one data file, with one for each tensor, or with two."""
    folder.mkdir(parents=True, exist_ok=True)
    model, path = mlp() if model is None else model, folder / "m.onnx"
    if how == "two":
        for number, item in enumerate(model.graph.initializer):
            name, content = f"part{number % 2}.bin", item.raw_data
            with (folder / name).open("ab") as file:
                onnx.external_data_helper.set_external_data(item, name, offset=file.tell(), length=len(content))
                file.write(content)
            item.ClearField("raw_data")
        path.write_bytes(model.SerializeToString())
    elif how == "inside":
        onnx.save(model, path)
    else:
        location = "weights.bin" if how == "one" else None
        onnx.save_model(model, path, save_as_external_data=True, all_tensors_to_one_file=how == "one", location=location, size_threshold=0)
    return path


def samples(folder: Path) -> Path:
    path = folder / "x.npy"
    np.save(path, np.random.default_rng(1).standard_normal((40, WIDTH)).astype(np.float32))
    return path


def run(path: Path) -> np.ndarray[Any, Any]:
    """What onnxruntime makes of a file, without us."""
    x = np.random.default_rng(2).standard_normal((5, WIDTH)).astype(np.float32)
    found: np.ndarray[Any, Any] = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    return found


OPTIONS: dict[str, dict[str, Any]] = {
    "magnitude": {"criterion": "magnitude", "keep": "50%", "granularity": "weight"},
    "relief": {"criterion": "relief", "alpha": 0.8, "granularity": "weight"},
    "flow": {"criterion": "flow", "keep": "50%", "granularity": "weight"},
    "repair": {"criterion": "flow", "keep": "50%", "granularity": "weight", "repair": "least-squares"},
    "flow-obs": {"keep": "50%", "granularity": "weight", "repair": "least-squares"},
    "channel": {"criterion": "flow", "keep": "70%", "granularity": "channel", "round_to": 1},
    "channel repair": {"keep": "70%", "granularity": "channel+weight", "round_to": 1, "repair": "least-squares", "criterion": "flow"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_large_model_is_pruned_as_a_small_one(tmp_path: Path, name: str, limits: None, monkeypatch: pytest.MonkeyPatch) -> None:
    source, data = stored(tmp_path / "in", "one"), samples(tmp_path)
    out = tmp_path / "out.onnx"
    result = relief_onnx.prune(source, data, output=out, storage="dense", threads=1, **OPTIONS[name])
    model = onnx.load(out, load_external_data=False)
    external_data = [item for item in model.graph.initializer if item.data_location == TensorProto.EXTERNAL]
    assert external_data
    assert {item.external_data[0].value for item in external_data} == {"out.onnx.data"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in", "out.onnx", "out.onnx.data", "x.npy"]
    assert result.report["output"]["bytes"] == out.stat().st_size + (tmp_path / "out.onnx.data").stat().st_size
    assert result.report["output"]["sha256"] == files.sha256(out.read_bytes())
    assert result.report["input"]["bytes"] == sum(file.stat().st_size for file in (tmp_path / "in").iterdir())
    onnx.checker.check_model(str(out), full_check=True)
    monkeypatch.undo()
    usual = tmp_path / "usual.onnx"
    relief_onnx.prune(source, data, output=usual, storage="dense", threads=1, **OPTIONS[name])
    assert not list(tmp_path.glob("usual.onnx.*"))
    small, large = (onnx.load(path) for path in (usual, out))
    for one, other in zip(small.graph.initializer, large.graph.initializer, strict=True):
        assert one.name == other.name
        np.testing.assert_array_equal(numpy_helper.to_array(one), numpy_helper.to_array(other))
    assert np.array_equal(run(usual), run(out))


def test_what_fits_into_one_file_has_its_weights_inside(tmp_path: Path, limits: None) -> None:
    source, data, out = stored(tmp_path / "in", "each"), samples(tmp_path), tmp_path / "out.onnx"
    result = relief_onnx.prune(source, data, output=out, criterion="magnitude", keep="5%", granularity="weight", threads=1)
    assert {row["storage"] for row in result.report["layers"]} != {"dense"}
    assert out.stat().st_size <= aside.LIMIT
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in", "out.onnx", "x.npy"]
    assert not aside.held(result.model)
    x = np.load(data)[:5]
    np.testing.assert_allclose(Session(result.model, 1).run({"x": x})[0], Session(out, 1).run({"x": x})[0])


def test_a_packed_result_can_be_large_too_and_is_read_again(tmp_path: Path, limits: None) -> None:
    source, data, out, again = stored(tmp_path / "in", "one"), samples(tmp_path), tmp_path / "out.onnx", tmp_path / "again.onnx"
    result = relief_onnx.prune(source, data, output=out, criterion="magnitude", keep="60%", granularity="weight", threads=1)
    assert [row["storage"] for row in result.report["layers"]] == ["bitmask"] * 4
    assert (tmp_path / "out.onnx.data").exists()
    relief_onnx.prune(
        out, data, output=again, criterion="magnitude", keep="50%", alpha=None, storage="dense", threads=1, granularity="weight"
    )
    held = {item.name: numpy_helper.to_array(item) for item in onnx.load(again).graph.initializer}
    before = {item.name: numpy_helper.to_array(item) for item in mlp().graph.initializer}
    for number in range(4):
        kept = held[f"w{number}"] != 0
        assert 0.4 < kept.mean() < 0.55
        np.testing.assert_array_equal(held[f"w{number}"][kept], before[f"w{number}"][kept])


@pytest.mark.parametrize(("how", "names"), [
    ("one", {"out.onnx.data"}),
    ("two", {"out.onnx.part0.bin", "out.onnx.part1.bin"}),
    ("each", {f"out.onnx.w{number}" for number in range(4)}),
    ("inside", {"out.onnx.data"}),
])  # fmt: skip
def test_data_files_are_laid_out_as_they_were(tmp_path: Path, how: str, names: set[str], limits: None) -> None:
    model = mlp()
    if how == "two":  # a weight in each
        order = [model.graph.initializer[place] for place in (0, 2, 1, 3, 4, 6, 5, 7)]
        copies = [TensorProto.FromString(item.SerializeToString()) for item in order]
        del model.graph.initializer[:]
        model.graph.initializer.extend(copies)
    source, data, out = stored(tmp_path / "in", how, model), samples(tmp_path), tmp_path / "out.onnx"
    before = {file.name: file.read_bytes() for file in (tmp_path / "in").iterdir()}
    relief_onnx.prune(source, data, output=out, storage="dense", criterion="magnitude", keep="50%", threads=1)
    assert {file.name for file in tmp_path.iterdir()} == {"in", "out.onnx", "x.npy"} | names
    assert {file.name: file.read_bytes() for file in (tmp_path / "in").iterdir()} == before
    places = [
        {entry.key: entry.value for entry in item.external_data}
        for item in onnx.load(out, load_external_data=False).graph.initializer
        if item.external_data
    ]
    assert all(int(place["offset"]) % 65536 == 0 and int(place["length"]) == 4 * WIDTH**2 for place in places)
    assert np.isfinite(run(out)).all()


def test_a_model_proto_in_memory_can_be_large(tmp_path: Path, limits: None) -> None:
    model, data, out = mlp(), samples(tmp_path), tmp_path / "out.onnx"
    content = model.SerializeToString()
    result = relief_onnx.prune(model, data, storage="dense", criterion="magnitude", keep="50%", threads=1)
    assert model.SerializeToString() == content
    assert aside.held(result.model)
    first = result.model.graph.initializer[0]
    assert np.array_equal(aside.array_of(first) != 0, result.masks.keep[first.name].T)
    assert sum(int(keep.sum()) for keep in result.masks.keep.values()) == sum(keep.size for keep in result.masks.keep.values()) // 2
    files.save(result.model, out)
    x = np.load(data)[:3]
    np.testing.assert_array_equal(Session(result.model, 1).run({"x": x})[0], Session(out, 1).run({"x": x})[0])


def test_nothing_outlives_a_run_but_its_result(tmp_path: Path, limits: None) -> None:
    source, data = stored(tmp_path / "in", "one"), samples(tmp_path)
    before = set(aside._held)
    result = relief_onnx.prune(source, data, storage="dense", criterion="magnitude", keep="50%", threads=1)
    relief_onnx.pipeline.score(source, data, criterion="flow", threads=1)
    left = {item.external_data[-1].value for model in (result.model, result.masked) for item in aside.held(model)}
    assert set(aside._held) - before == left


@pytest.mark.parametrize("activations", ["none", "uint8"])
def test_a_large_model_is_quantised(tmp_path: Path, activations: str, limits: None, monkeypatch: pytest.MonkeyPatch) -> None:
    source, data, out, usual = stored(tmp_path / "in", "one"), samples(tmp_path), tmp_path / "out.onnx", tmp_path / "usual.onnx"
    monkeypatch.setattr(aside, "LIMIT", 10_000)
    relief_onnx.quantize(source, data, output=out, activations=activations, threads=1)
    assert (tmp_path / "out.onnx.data").exists()
    monkeypatch.undo()
    relief_onnx.quantize(source, data, output=usual, activations=activations, threads=1)
    assert not (tmp_path / "usual.onnx.data").exists()
    np.testing.assert_array_equal(run(out), run(usual))


def test_scores_of_a_large_model_are_those_of_a_small_one(tmp_path: Path, limits: None, monkeypatch: pytest.MonkeyPatch) -> None:
    source, data = stored(tmp_path / "in", "two"), samples(tmp_path)
    large = {name: relief_onnx.pipeline.score(source, data, criterion=name, threads=1) for name in ("relief", "flow", "magnitude")}
    monkeypatch.undo()
    for name, found in large.items():
        for layer, score in relief_onnx.pipeline.score(source, data, criterion=name, threads=1).items():
            np.testing.assert_array_equal(score.score, found[layer].score)


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_other_types_of_weights(tmp_path: Path, kind: type, limits: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aside, "LIMIT", 20_000)
    source, out = stored(tmp_path / "in", "one", mlp(kind=kind)), tmp_path / "out.onnx"
    data = [{"x": np.random.default_rng(0).standard_normal((20, WIDTH)).astype(kind)}]
    result = relief_onnx.prune(source, data, output=out, storage="dense", criterion="relief", alpha=0.9, threads=1)
    assert result.report["verification"]["checker"] == "passed"
    assert (tmp_path / "out.onnx.data").exists()
    assert Session(out, 1).run(data[0])[0].dtype == kind


# ---- whole or not at all


def written(folder: Path) -> tuple[onnx.ModelProto, Path]:
    """A large model and where it lies."""
    folder.mkdir(exist_ok=True)
    path = folder / "out.onnx"
    model = files.load(mlp())
    files.save(model, path)
    return model, path


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def scaled(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with other numbers."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for item in result.graph.initializer:
        item.CopyFrom(aside.tensor_of(2 * aside.array_of(item), item.name, item))
    return result


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["_put", "_created", "_move"])
def test_an_error_or_an_interruption_leaves_what_was_there(
    tmp_path: Path, place: str, error: BaseException, limits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = written(tmp_path)
    before = content(tmp_path)
    original: Callable[..., Any] = getattr(external, place)
    calls = 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(external, place, failing)
    with pytest.raises((OutputError, KeyboardInterrupt)):
        files.save(scaled(model), path)
    assert content(tmp_path) == before
    monkeypatch.setattr(external, place, original)
    files.save(scaled(model), path)
    assert content(tmp_path).keys() == before.keys()
    assert all(content(tmp_path)[name] != before[name] for name in ("out.onnx.data",))


def test_an_interruption_after_a_move_is_undone(tmp_path: Path, limits: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = written(tmp_path)
    before = content(tmp_path)
    original, calls = os.replace, 0

    def interrupted(*args: Any) -> None:
        nonlocal calls
        calls += 1
        original(*args)
        if calls == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(external.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.save(scaled(model), path)
    assert content(tmp_path) == before


def test_the_data_of_the_input_and_files_of_others_are_never_written_to(tmp_path: Path, limits: None) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    source = folder / "m.onnx"
    onnx.save_model(mlp(), str(source), save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    data, before = samples(tmp_path), (folder / "m.onnx.data").read_bytes()
    (folder / "out.onnx.data").write_bytes(b"of somebody else")
    options: dict[str, Any] = {"storage": "dense", "criterion": "magnitude", "keep": "50%", "threads": 1}
    relief_onnx.prune(source, data, output=folder / "out.onnx", **options)
    assert (folder / "out.onnx.data").read_bytes() == b"of somebody else"
    assert (folder / "out.onnx.2.data").exists()
    relief_onnx.prune(source, data, output=source, force=True, **options)  # in the place of the input
    assert (folder / "m.onnx.data").read_bytes() == before
    assert {entry.value for item in onnx.load(source, load_external_data=False).graph.initializer for entry in item.external_data[:1]} == {
        "m.onnx.2.data"
    }
    assert np.array_equal(run(source), run(folder / "out.onnx"))


def test_a_file_that_does_not_load_is_not_written(tmp_path: Path, limits: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = files.load(mlp())
    put = external._put
    monkeypatch.setattr(external, "_put", lambda file, tensor, start: put(file, tensor, start) if tensor.name != "w3" else None)
    with pytest.raises(VerificationError, match="nothing was written"):
        files.save(model, tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())


def test_the_work_folder_knows_when_external_data_changed(tmp_path: Path, limits: None) -> None:
    source, data, work = stored(tmp_path / "in", "one"), samples(tmp_path), tmp_path / "work"
    options: dict[str, Any] = {"storage": "dense", "criterion": "magnitude", "keep": "50%", "threads": 1, "work_dir": work}
    relief_onnx.prune(source, data, **options)
    key = json.loads((work / "scores.json").read_text())["key"]
    weights = source.parent / "weights.bin"
    weights.write_bytes((2 * np.frombuffer(weights.read_bytes(), np.float32)).tobytes())
    relief_onnx.prune(source, data, **options)
    assert json.loads((work / "scores.json").read_text())["key"] != key
    assert (work / "masked.onnx.data").exists()


LARGE = "RELIEF_ONNX_LARGE"


@pytest.mark.skipif(LARGE not in os.environ, reason=f"writes some 15 GB and takes a quarter of an hour; set {LARGE}=1 to run it")
def test_a_model_that_really_is_over_2_gb(tmp_path: Path) -> None:
    from benchmarks.large import build, runs

    source, out = build(tmp_path, 9, 8192), tmp_path / "out.onnx"
    relief_onnx.prune(source, tmp_path / "x.npy", output=out, storage="dense", criterion="magnitude", keep="50%")
    assert (tmp_path / "out.onnx.data").stat().st_size > 2**31
    assert runs(out)
