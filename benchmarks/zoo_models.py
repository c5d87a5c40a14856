"""The real models of ../shared/models for the benchmarks: where they are, random inputs for them, how many parameters they have.

Needs numpy and onnx only, so that the peers' environment can use it too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "models"
RESULTS = Path(__file__).parent / "results"
ZOO = ROOT / "build" / "zoo"

_DTYPES = {"float": "float32", "int64": "int64", "int32": "int32", "bool": "bool"}
_FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}


def rows() -> list[dict[str, Any]]:
    """models.json, by name."""
    return sorted(json.loads((SHARED / "models.json").read_text()), key=lambda row: str(row["id"]))


def gather(folder: Path) -> None:
    """Bring the models together where they are not there yet."""
    if not all((folder / f"{row['id']}.onnx").exists() for row in rows()):
        subprocess.run([sys.executable, str(SHARED / "get.py"), str(folder)], check=False)


def feed(row: dict[str, Any], seed: int) -> dict[str, Any]:
    """One random input for each input of a model, as its `random_input_spec` says."""
    rng = np.random.default_rng(seed)
    return {name: _array(row["random_input_spec"], name, value, rng) for name, value in row["inputs"].items()}


def _array(spec: dict[str, Any], name: str, value: dict[str, Any], rng: np.random.Generator) -> Any:
    fixed = [size if isinstance(size, int) and size > 0 else 1 for size in value["shape"]]
    given, dtype = spec.get(name, spec.get("*")) or fixed, _DTYPES[value["dtype"]]
    if given[:1] == ["const"]:
        return np.full(given[1], given[2], dtype)
    if given[:1] == ["int"]:
        return rng.integers(0, given[2], given[1] or fixed).astype(dtype)
    return rng.random(given).astype(dtype)


def tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every constant of a graph and of the graphs inside its nodes: initializers, and what Constant nodes hold."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from tensors(attribute.g)
            elif attribute.type == onnx.AttributeProto.TENSOR and node.op_type == "Constant":
                yield attribute.t


def is_float(tensor: onnx.TensorProto) -> bool:
    return tensor.data_type in _FLOATS


def float_params(model: onnx.ModelProto) -> int:
    """Numbers in the float constants of a file."""
    return sum(int(np.prod(tensor.dims)) for tensor in tensors(model.graph) if is_float(tensor))
