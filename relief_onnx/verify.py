"""Is the result right? The checker, onnxruntime, the signature, and the masked model's outputs on real samples."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx
from onnx import numpy_helper

from relief_onnx.aside import array_of, as_inputs
from relief_onnx.compare import OutputAgreement, compare_models
from relief_onnx.dataset import Dataset
from relief_onnx.errors import ModelError, VerificationError
from relief_onnx.graph import FLOATS, Graph
from relief_onnx.nodes import every_node
from relief_onnx.session import Session
from relief_onnx.state_changes import StateChange, declared

__all__ = ["TOLERANCES", "Verification", "verify", "verify_packed"]

# Largest difference that rounding explains, relative to the largest output. Half precision has 11 bits.
TOLERANCES = {"float": 1e-4, "half": 1e-2}
# An output that is all but 0 (a saturated sigmoid) is compared with what the masked model differs from itself when onnxruntime
# does not optimise it: up to ten times that is rounding.
ROUNDING = 10.0
# Where numbers are rounded to integers as the model runs, one near the middle of two may go either way: a step of 8 bits that no rounding
# of floats explains. Then up to twice what comes of changing the masked model's floats by so little, this often, is rounding.
_TO_INTEGERS = re.compile(r"(Dynamic)?QuantizeLinear|DynamicQuantize\w+|QLinear\w+|QGemm|QAttention")
TREMBLE, TREMBLES, STEPS = 1e-5, 3, 2.0
SAMPLES = 16
_CHECKER_ERRORS = (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError, RuntimeError)


@dataclass(frozen=True)
class Verification:
    """`checker` is "passed", or why that says nothing; differences are between masked and final model.

    `max_rel` is relative to each output's largest value, or to the value at which `rounding` alone would use up the tolerance, or what
    one step of 8 bits makes where the model rounds to integers as it runs.
    """

    checker: str
    max_abs: float
    max_rel: float
    rounding: float


def verify(
    original: onnx.ModelProto,
    masked: onnx.ModelProto,
    result: onnx.ModelProto,
    dataset: Dataset,
    *,
    seed: int,
    threads: int,
    states: Sequence[StateChange] = (),
) -> Verification:
    """Raise VerificationError unless `result` is a valid model with the original's signature that computes what `masked` computes.

    states: the inputs and outputs that are narrower than the original's, and nothing else of the signature.
    """
    checker = _sound(original, result, threads, "pruned", states)
    tolerance = TOLERANCES["half" if _is_half(original) else "float"]
    beside = partial(compare_models, masked, dataset=dataset, batch_size=8, limit=SAMPLES, seed=seed, threads=threads)
    found, itself = beside(result, states=states).outputs, beside(masked, optimize=(True, False)).outputs
    scales = {name: max(item.peak, ROUNDING * itself[name].max_abs / tolerance) for name, item in found.items()}
    max_abs = max((item.max_abs for item in found.values()), default=0.0)
    max_rel = _largest(found, scales)
    if not max_rel <= tolerance and any(_TO_INTEGERS.fullmatch(node.op_type) for node in every_node(masked.graph)):
        for seen in (beside(_trembling(masked, number)).outputs for number in range(TREMBLES)):
            scales = {name: max(scale, STEPS * seen[name].max_abs / tolerance) for name, scale in scales.items()}
        max_rel = _largest(found, scales)
    if not max_rel <= tolerance:
        raise VerificationError(
            f"the pruned model differs from the masked one by {max_rel:.2g} of the largest output (allowed {tolerance:g}); "
            "nothing was written, please report this model"
        )
    return Verification(checker, max_abs, max_rel, max((item.max_abs for item in itself.values()), default=0.0))


def _largest(found: Mapping[str, OutputAgreement], scales: Mapping[str, float]) -> float:
    """The largest difference of all outputs, in units of each one's scale."""
    return max((item.max_abs / scales[name] for name, item in found.items() if item.max_abs > 0), default=0.0)


def _trembling(model: onnx.ModelProto, number: int) -> onnx.ModelProto:
    """A copy whose stored floats are off by up to TREMBLE of themselves; `number` draws by how much."""
    copy, rng = onnx.ModelProto(), np.random.default_rng(number)
    copy.CopyFrom(model)
    for item in copy.graph.initializer:
        if item.data_type == onnx.TensorProto.FLOAT:
            value = array_of(item)
            item.CopyFrom(numpy_helper.from_array((value * (1 + TREMBLE * rng.uniform(-1, 1, value.shape))).astype(np.float32), item.name))
    return copy


def verify_packed(
    original: onnx.ModelProto,
    dense: onnx.ModelProto,
    result: onnx.ModelProto,
    dataset: Dataset,
    *,
    seed: int,
    threads: int,
) -> Verification:
    """Raise VerificationError unless `result` is a valid model with the original's signature that computes what `dense` computes.

    The two hold the same numbers in two forms, so the tolerance is for another order of sums only, not for int8.
    """
    checker = _sound(original, result, threads, "quantised")
    found = compare_models(dense, result, dataset, batch_size=8, limit=SAMPLES, seed=seed, threads=threads).outputs.values()
    max_abs = max((item.max_abs for item in found), default=0.0)
    max_rel = max((item.max_abs / item.peak if item.peak > 0 else float("inf") for item in found if item.max_abs > 0), default=0.0)
    if not max_rel <= TOLERANCES["float"]:
        raise VerificationError(
            f"the packed model differs from the one that is not packed by {max_rel:.2g} of the largest output "
            f"(allowed {TOLERANCES['float']:g}); nothing was written; use --storage dense, and please report this model"
        )
    return Verification(checker, max_abs, max_rel, 0.0)


def _sound(original: onnx.ModelProto, result: onnx.ModelProto, threads: int, what: str, states: Sequence[StateChange] = ()) -> str:
    """Checker and signature; returns what the checker said. `what` was done to the model."""
    checker = _check(original, result, what)
    before = declared(Session(original, threads).signature(), states)
    try:
        after = Session(result, threads, f"the {what} model").signature()
    except ModelError as error:
        raise VerificationError(
            f"the {what} model does not load: {error.__cause__}; nothing was written, please report this model"
        ) from error
    if before != after:
        raise VerificationError(f"inputs and outputs changed from {before} to {after}; nothing was written, please report this model")
    return checker


def _check(original: onnx.ModelProto, result: onnx.ModelProto, what: str) -> str:
    try:
        onnx.checker.check_model(as_inputs(result), full_check=True)
    except _CHECKER_ERRORS as error:
        try:
            onnx.checker.check_model(as_inputs(original), full_check=True)
        except _CHECKER_ERRORS:  # the file that the user gave fails in the same way: not our doing
            return "the original fails ONNX's full check too"
        raise VerificationError(
            f"the {what} model fails ONNX's checker ({str(error).strip().splitlines()[0]}); nothing was written, please report this model"
        ) from error
    return "passed"


def _is_half(model: onnx.ModelProto) -> bool:
    graph = Graph(model)
    half = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    return any(item.data_type in half & FLOATS for item in graph.initializers.values())
