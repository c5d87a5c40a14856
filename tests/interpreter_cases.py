"""The node tests of the standard as cases for the interpreter, and how outputs are compared."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from relief_onnx.interpreter import Network

HALF_STEPS = {"bfloat16": 1e-2, "float16": 2e-3}


def to_torch(value: Any) -> Any:
    """A value of a test case: an array, a sequence of them, or None."""
    if isinstance(value, (list, tuple)):
        return [to_torch(item) for item in value]
    if value is None:
        return None
    array = np.array(numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value)
    return torch.from_numpy(array.astype(np.float32) if array.dtype.name == "bfloat16" else array)


def to_numpy(value: Any) -> Any:
    if isinstance(value, list):
        return [to_numpy(item) for item in value]
    return None if value is None else (value.float() if value.dtype == torch.bfloat16 else value).detach().numpy()


def differences(expected: Any, found: Any, rtol: float, atol: float) -> str | None:
    """What differs, or None. Shapes and types must agree too."""
    if expected is None or found is None:
        return None if expected is None and found is None else "one of them is empty"
    if isinstance(expected, (list, tuple)):
        if not isinstance(found, list) or len(expected) != len(found):
            return "another number of entries in a sequence"
        return next((text for pair in zip(expected, found, strict=True) if (text := differences(*pair, rtol, atol))), None)
    expected = numpy_helper.to_array(expected) if isinstance(expected, onnx.TensorProto) else np.asarray(expected)
    found = np.asarray(found)
    if expected.shape != found.shape:
        return f"shape {found.shape} instead of {expected.shape}"
    if expected.dtype.name in HALF_STEPS:  # computed in single precision and rounded once, so nearer to the truth than the example
        rtol, atol = max(rtol, HALF_STEPS[expected.dtype.name]), max(atol, HALF_STEPS[expected.dtype.name])
    kind = "float32" if expected.dtype.name == "bfloat16" else expected.dtype.name
    if kind != found.dtype.name:
        return f"type {found.dtype} instead of {expected.dtype}"
    if kind.startswith("float"):
        expected, found = expected.astype(np.float64), found.astype(np.float64)
    if np.allclose(expected, found, rtol=rtol, atol=atol, equal_nan=True):
        return None
    with np.errstate(all="ignore"):
        return f"off by {np.abs(expected.astype(np.float64) - found).max()}"


def run_case(model: onnx.ModelProto, inputs: list[Any], outputs: list[Any], rtol: float = 1e-3, atol: float = 1e-6) -> str | None:
    """Run a model on stored inputs and compare with stored outputs: what differs, or None."""
    network = Network(model)
    network.train(False)
    with torch.no_grad():
        found = network({name: to_torch(value) for name, value in zip(network.inputs, inputs, strict=False)})
    assert len(found) == len(outputs)
    for (name, value), expected in zip(found.items(), outputs, strict=True):
        text = differences(expected, to_numpy(value), rtol, atol)
        if text is not None:
            return f"{name}: {text}"
    return None


@functools.cache
def node_cases() -> dict[str, Any]:
    """Every node test of the installed onnx by name."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {case.name: case for case in collect_testcases(None) if case.model is not None and case.data_sets}
