"""Models in float16, bfloat16, double and mixed: masks like those of the float32 model, weights in their own type, Casts kept."""

from __future__ import annotations

import functools
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import ROOT, SAMPLES, digits, run
from onnx import TensorProto, helper

import relief_onnx
from relief_onnx.errors import ModelError
from relief_onnx.graph import Graph

sys.path.insert(0, str(ROOT))
from sample_models.half import convert, store

Make = Callable[[onnx.ModelProto], onnx.ModelProto]
VARIANTS: dict[str, Make] = {
    "pure": convert,
    "keep_io": lambda model: convert(model, keep_io=True),
    "mixed": lambda model: convert(model, keep_io=True, block=("Gemm", "Relu")),
    "stored": lambda model: store(model, "float16"),
    "bfloat16": store,
}
RUNS: dict[str, dict[str, Any]] = {
    "connection": {"keep": "50%"},
    "weight": {"keep": "40%", "granularity": "weight"},
    "relief": {"criterion": "relief"},
    "channel": {"keep": "70%", "granularity": "channel", "round_to": 1},
    "channel+weight": {"granularity": "channel+weight", "round_to": 1},
    "paper": {"preset": "paper"},
    "repaired": {"keep": "30%", "granularity": "weight", "repair": "least-squares"},
}


def model(name: str = "lenet5") -> onnx.ModelProto:
    return onnx.load(str(SAMPLES / f"{name}.onnx"))


def feed(given: onnx.ModelProto, count: int = 48) -> list[dict[str, Any]]:
    (info,) = given.graph.input
    return [{info.name: digits(count).astype(helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type))}]


@functools.cache
def reference(name: str) -> Any:
    return relief_onnx.prune(model(), feed(model()), **RUNS[name])


def elements(given: onnx.ModelProto) -> dict[str, int]:
    """Element types of float tensors by name, made by nodes or stored; what packing rebuilds among them."""
    graph = Graph(given)
    return {name: kind for name, (kind, _) in graph.types.items()} | {name: item.data_type for name, item in graph.initializers.items()}


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("name", RUNS)
def test_masks_are_those_of_float32(kind: str, name: str) -> None:
    before = VARIANTS[kind](model())
    result, expected = relief_onnx.prune(before, feed(before), **RUNS[name]), reference(name)
    same = [np.mean(result.masks.keep[weight] == keep) for weight, keep in expected.masks.keep.items()]
    least = {"bfloat16": 0.995, "mixed": 0.995}.get(kind, 0.998) if name != "repaired" else 0.8
    assert min(same) >= least
    (agreement,) = result.report["quality"]["agreement"].values()
    (wanted,) = expected.report["quality"]["agreement"].values()
    assert agreement["cosine"] == pytest.approx(wanted["cosine"], abs=0.004 if (name, kind) == ("channel+weight", "mixed") else 1e-3)
    # Weights are of the type that they had, and no Cast of the file is gone or new.
    old, new = elements(before), elements(result.model)
    for row in result.report["layers"]:
        assert new[row["weight"]] == old[row["weight"]], row["weight"]
    casts = [
        Counter(node.name for node in item.graph.node if node.op_type == "Cast" and "/to/" in node.name) for item in (before, result.model)
    ]
    assert casts[0] == casts[1]
    assert [info.type for info in before.graph.input] == [info.type for info in result.model.graph.input]


@pytest.mark.parametrize("kind", VARIANTS)
def test_files_are_smaller_and_compare_and_quantize_take_them(kind: str, tmp_path: Path) -> None:
    before = VARIANTS[kind](model())
    path, data, out, report = tmp_path / "m.onnx", tmp_path / "x.npy", tmp_path / "out.onnx", tmp_path / "r.json"
    onnx.save(before, path)
    (batch,) = feed(before)[0].values()
    np.save(data, batch)
    result = run("prune", path, "--data", data, "--keep", "30%", "-o", out, "--quiet")
    assert result.exit_code == 0, result.output
    assert out.stat().st_size < 0.5 * path.stat().st_size
    result = run("compare", path, out, "--data", data, "--json", report, "--quiet")
    assert result.exit_code == 0, result.output
    (agreement,) = json.loads(report.read_text())["quality"]["agreement"].values()
    assert agreement["cosine"] > 0.9
    small = tmp_path / "small.onnx"
    result = run("quantize", out, "--data", data, "--activations", "none", "-o", small, "--json", report, "--quiet")
    if kind == "bfloat16":
        assert result.exit_code in (1, 4)
        assert "BFLOAT16" in result.output
        return
    assert result.exit_code == 0, result.output
    assert {row["status"] for row in json.loads(report.read_text())["layers"]} == {"int8 weights"}


def test_casts_at_the_front_do_not_hide_repaired_weights() -> None:
    """All Casts of weights come first: a later layer must see what the repaired layers before it really emit."""
    before = store(model("lenet300"), "float16")
    result = relief_onnx.prune(before, feed(before), keep="10%", criterion="flow", repair="least-squares")
    plain = relief_onnx.prune(model("lenet300"), feed(model("lenet300")), keep="10%", criterion="flow", repair="least-squares")
    (agreement,), (wanted,) = (item.report["quality"]["agreement"].values() for item in (result, plain))
    assert agreement["cosine"] == pytest.approx(wanted["cosine"], abs=1e-5)


def test_double(tmp_path: Path) -> None:
    """Where onnxruntime has kernels of doubles: dense layers."""
    before, plain = convert(model("lenet300"), "double"), model("lenet300")
    result, expected = (relief_onnx.prune(item, feed(item), keep="40%") for item in (before, plain))
    assert all(np.mean(result.masks.keep[weight] == keep) > 0.999 for weight, keep in expected.masks.keep.items())
    assert all(elements(result.model)[row["weight"]] == TensorProto.DOUBLE for row in result.report["layers"])


@pytest.mark.parametrize("to", ["bfloat16", "double"])
def test_types_that_onnxruntime_cannot_run_are_told(to: str) -> None:
    before = convert(model(), to)
    with pytest.raises(ModelError, match="no kernel on the CPU for the types"):
        relief_onnx.prune(before, feed(before), keep="50%")
