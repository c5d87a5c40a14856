"""The forms of a model file in which a peer may try it, and the steps at which it may end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter

from benchmarks.zoo_models import float_params

THREADS = 2
STAGES = ("load", "onnx2torch", "forward", "DependencyGraph", "groups")
UNFINISHED = "did not finish"


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def simplified(model: onnx.ModelProto, inputs: dict[str, Any]) -> onnx.ModelProto:
    """onnxsim.simplify with the sample's shapes (without them where that fails), Constant nodes turned into initializers."""
    import onnxsim

    shapes = {name: list(array.shape) for name, array in inputs.items() if array.ndim}
    try:
        result, ok = onnxsim.simplify(model, overwrite_input_shapes=shapes)
        run_shapes(result, inputs)
    except Exception:
        result, ok = onnxsim.simplify(model)
    if not ok:
        raise RuntimeError("onnxsim.simplify: its own check failed")
    return lifted(result)


def lifted(model: onnx.ModelProto) -> onnx.ModelProto:
    """Both peers look for weights among the initializers; some exporters keep them in Constant nodes."""
    for node in [node for node in model.graph.node if node.op_type == "Constant" and node.attribute[0].name == "value"]:
        tensor = model.graph.initializer.add()
        tensor.CopyFrom(node.attribute[0].t)
        tensor.name = node.output[0]
        model.graph.node.remove(node)
    return model


def variants(path: Path, inputs: dict[str, Any]) -> Iterator[tuple[str, Callable[[], onnx.ModelProto]]]:
    yield "as it is", lambda: onnx.load(path)
    yield "simplified", lambda: simplified(onnx.load(path), inputs)


def torch_variants(path: Path, inputs: dict[str, Any]) -> Iterator[tuple[str, Callable[[], onnx.ModelProto]]]:
    """onnx2torch knows opset 13 best."""
    yield from variants(path, inputs)
    yield "opset 13, simplified", lambda: simplified(onnx.version_converter.convert_version(lifted(onnx.load(path)), 13), inputs)


def base(original: int, model: onnx.ModelProto) -> int:
    """All float numbers that a share is a share of. A form that turned quantized weights into floats is another model."""
    found = float_params(model)
    if found > 1.5 * original:
        raise RuntimeError(f"this form unfolds quantized weights into {found:,} floats; the file has {original:,}")
    return max(original, found, 1)


def run_shapes(model: onnx.ModelProto, inputs: dict[str, Any]) -> list[tuple[int, ...]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = THREADS, 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    wanted = {item.name for item in session.get_inputs()}
    return [np.shape(item) for item in session.run(None, {name: array for name, array in inputs.items() if name in wanted})]
