"""Is a pruned file right? Looked at without relief-onnx: ONNX's checker, onnxruntime, the protobuf fields, and outputs on fresh inputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from benchmarks.zoo_models import tensors

TOLERANCE = {"float": 1e-4, "half": 1e-2}
# An output that is all but 0 (a saturated sigmoid) may differ by what onnxruntime's optimiser alone makes of the masked model, times this.
ROUNDING, ALL_BUT_ZERO = 10.0, 1e-3
THREADS = 2


def difference(expected: Sequence[Any], found: Sequence[Any]) -> float:
    """Largest difference of any output, relative to that output's largest absolute value; infinite where shape, type or NaN differ."""
    if len(expected) != len(found):
        return float("inf")
    return max((_one(np.asarray(a), np.asarray(b)) for a, b in zip(expected, found, strict=True)), default=0.0)


def _one(a: Any, b: Any) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if a.dtype.kind not in "fiub":  # text: equal or not
        return 0.0 if np.array_equal(a, b) else float("inf")
    x, y = a.astype(np.float64).reshape(-1), b.astype(np.float64).reshape(-1)
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    if same.all():
        return 0.0
    gap = np.abs(x[~same] - y[~same]).max()
    largest = np.abs(x[np.isfinite(x)]).max(initial=0.0)
    return float(gap / largest) if np.isfinite(gap) and largest > 0 else float("inf")


def is_rounding(expected: Any, found: Any, unoptimised: Any) -> bool:
    """Whether an output that is all but 0 differs by no more than rounding does."""
    if not np.abs(expected).max(initial=0.0) < ALL_BUT_ZERO:
        return False
    return difference([expected], [found]) <= ROUNDING * difference([expected], [unoptimised]) < float("inf")


def signature(model: onnx.ModelProto) -> dict[str, Any]:
    """Everything of a file that pruning must not change."""
    constants = {item.name for item in model.graph.initializer}
    return {
        "inputs": [item.SerializeToString(deterministic=True) for item in model.graph.input if item.name not in constants],
        "outputs": [item.SerializeToString(deterministic=True) for item in model.graph.output],
        "opset": sorted((item.domain, item.version) for item in model.opset_import),
        "metadata": sorted((item.key, item.value) for item in model.metadata_props),
        "fields": (model.ir_version, model.producer_name, model.producer_version, model.domain, model.model_version, model.doc_string),
        "graph": (model.graph.name, model.graph.doc_string),
    }


def checker(model: onnx.ModelProto) -> str | None:
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # whatever it raises is the answer
        return str(error).strip().splitlines()[0]
    return None


def session(path: Path, optimise: bool = True) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = THREADS, 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def agreement(original: Path, result: Path, feeds: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Per float output: the cosine between what the two files answer, over all samples as one vector."""
    pair = session(original), session(result)
    names = [item.name for item in pair[0].get_outputs()]
    sums: dict[str, Any] = {}
    for feed in feeds:
        for name, expected, value in zip(names, *(item.run(names, feed) for item in pair), strict=True):
            if isinstance(expected, np.ndarray) and expected.dtype.kind == "f":
                a, b = expected.astype(np.float64).ravel(), value.astype(np.float64).ravel()
                sums[name] = sums.get(name, 0.0) + np.array([a @ b, a @ a, b @ b])
    return {name: _cosine(*values) for name, values in sums.items()}


def _cosine(product: float, one: float, other: float) -> float:
    size = float(np.sqrt(one * other))
    if size == 0:
        return 1.0 if one == other else 0.0
    return float(product) / size


def check(original: Path, result: Path, masked: Path, feeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`problems`, empty where all is well, the `worst` difference from the masked model, and outputs too near 0 to say more."""
    problems = []
    before, after = onnx.load(original), onnx.load(result)
    complaint = checker(after)
    if complaint is not None and checker(before) is None:
        problems.append(f"checker: {complaint[:160]}")
    one, other = signature(before), signature(after)
    problems += [f"{key} changed" for key in one if one[key] != other[key]]
    half = any(tensor.data_type in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16) for tensor in tensors(before.graph))
    worst, excused, wrong = 0.0, set(), set()
    try:
        pruned, reference, plain = session(result), session(masked), session(masked, optimise=False)
        names = [item.name for item in pruned.get_outputs()]
        for feed in feeds:
            runs = [item.run(names, feed) for item in (reference, pruned, plain)]
            for name, expected, found, unoptimised in zip(names, *runs, strict=True):
                gap = difference([expected], [found])
                worst = max(worst, gap)
                if not gap <= TOLERANCE["half" if half else "float"]:
                    (excused if is_rounding(expected, found, unoptimised) else wrong).add(name)
    except Exception as error:  # onnxruntime's exceptions have no common base
        return {"problems": [*problems, f"onnxruntime: {str(error).splitlines()[0][:160]}"], "worst": None, "all_but_zero": []}
    if wrong:
        problems.append(f"differs from the masked model by {worst:.1e} in {', '.join(sorted(wrong))}")
    return {"problems": problems, "worst": worst if np.isfinite(worst) else None, "all_but_zero": sorted(excused)}
