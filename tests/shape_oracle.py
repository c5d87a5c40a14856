"""A judge of inferred shapes: a model's run with every tensor as an output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime

from relief_onnx.dims import Dim
from relief_onnx.shapes import Shapes


def run_all(model: onnx.ModelProto, feed: Mapping[str, Any]) -> dict[str, Any]:
    """Every tensor of the main graph in one run, nothing optimised away."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    listed = {info.name for info in model.graph.output}
    names = [name for node in model.graph.node for name in node.output if name and name not in listed]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs = [info.name for info in session.get_outputs()]
    return dict(zip(outputs, session.run(outputs, dict(feed)), strict=True)) | dict(feed)


def disagreements(found: Shapes, real: Mapping[str, Any]) -> list[str]:
    """Where what was inferred contradicts a run: ranks, sizes, contents, or one symbol with two meanings."""
    claims: list[tuple[str, Dim, int]] = []
    wrong = []
    for name, tensor in real.items():
        if not isinstance(tensor, np.ndarray):
            continue
        dims, values = found.dims.get(name), found.values.get(name)
        if dims is not None and len(dims) != tensor.ndim:
            wrong.append(f"{name}: rank {len(dims)}, really {tensor.shape}")
        elif dims is not None:
            claims += [(f"{name} axis {axis}", size, length) for axis, (size, length) in enumerate(zip(dims, tensor.shape, strict=True))]
        if values is not None and len(values) != tensor.size:
            wrong.append(f"{name}: {len(values)} values, really {tensor.size}")
        elif values is not None:
            claims += [(f"{name} entry {i}", value, int(entry)) for i, (value, entry) in enumerate(zip(values, tensor.flat, strict=True))]
        kind = found.types.get(name, 0)
        if kind and onnx.helper.tensor_dtype_to_np_dtype(kind) != tensor.dtype and tensor.dtype != object:
            wrong.append(f"{name}: type {kind}, really {tensor.dtype}")
    meaning = {size.symbols[0]: number // size.coefficient for _, size, number in claims if len(size.symbols) == 1}
    for where, size, number in claims:
        if all(symbol in meaning for symbol in size.symbols):
            expected = size.coefficient * int(np.prod([meaning[symbol] for symbol in size.symbols], dtype=np.int64))
            if expected != number:
                wrong.append(f"{where}: {size} is {expected}, really {number}")
    return wrong
