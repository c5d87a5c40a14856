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
        onnx.save_model(
            model, str(path), save_as_external_data=True, all_tensors_to_one_file=how == "one", location="weights.bin" if how == "one" else None,
            size_threshold=0,
        )  # fmt: skip
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
