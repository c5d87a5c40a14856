"""Law: a masked model and the model that surgery makes of it compute the same; for every row of the operator table."""

from __future__ import annotations

import numpy as np
import pytest
from laws import assert_same_outputs, assert_units_are_gone, check_mask_is_surgery, check_units_go, masked_and_cut, units_switched_off
from surgery_cases import CASES, LAYERS, sandwich

from relief_onnx.kinds import KINDS
from relief_onnx.layers import LAYER_OPERATORS
from relief_onnx.ops import OPERATORS
from relief_onnx.recurrent_layers import GATES

PAIRS = [(case, layer) for case, (layers, _, _) in CASES.items() for layer in layers]
OFTEN = 3  # random masks for every case; more where few masks leave anything that can go
AT_MOST = 24


def test_every_row_of_the_operator_table_has_a_case() -> None:
    # Onnxruntime's own operator in the standard's domain, which ONNX's checker refuses: its law is in tests/test_fused.py.
    assert {case.split("/")[0] for case in CASES} | {"SimplifiedLayerNormalization"} == set(OPERATORS)
    assert {*LAYERS, *GATES} == set(LAYER_OPERATORS)  # recurrent layers have cases of their own, tests/test_recurrent.py
    assert {row.kind for row in OPERATORS.values()} == set(KINDS)


@pytest.mark.parametrize(("case", "layer"), PAIRS)
def test_mask_is_surgery(case: str, layer: str) -> None:
    model, feed = sandwich(case, layer)
    removed = 0
    for seed in range(AT_MOST):
        if seed < OFTEN or not removed:
            removed += check_mask_is_surgery(model, feed, np.random.default_rng(seed)).units_removed
    assert removed > 0  # no case of the table is a barrier


@pytest.mark.parametrize(("case", "layer"), PAIRS)
def test_whole_units_go(case: str, layer: str) -> None:
    model, feed = sandwich(case, layer)
    removed = sum(check_units_go(model, feed, np.random.default_rng(seed)).units_removed for seed in range(OFTEN))
    assert removed > 0


def test_the_law_can_fail() -> None:
    model, feed = sandwich("Relu", "Conv")
    masked, operation = masked_and_cut(model, np.random.default_rng(0))
    name = next(item.name for item in operation.model.graph.initializer if len(item.dims) == 4)
    for item in operation.model.graph.initializer:
        if item.name == name:
            item.raw_data = bytes(np.frombuffer(item.raw_data, np.float32) * np.float32(1.001))
    with pytest.raises(AssertionError, match="differs by"):
        assert_same_outputs(masked, operation.model, feed, 1e-5)


def test_the_law_of_units_can_fail() -> None:
    model, _ = sandwich("Relu", "Conv")
    _, operation, plan, coupling, chosen = units_switched_off(model, np.random.default_rng(0))
    assert_units_are_gone(operation, plan, coupling, chosen)
    left = next(unit for unit in coupling.outputs[plan.layers[0].node].tolist() if unit not in chosen)
    with pytest.raises(AssertionError, match=r"Conv_\d+ still has"):
        assert_units_are_gone(operation, plan, coupling, chosen | {left})
