"""Verification: what rounding explains, and what it does not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

import relief_onnx
from relief_onnx.data import open_dataset
from relief_onnx.model import input_specs
from relief_onnx.verify import Verification, verify

ROUNDED = "q, s, z = DynamicQuantizeLinear(p) y = DequantizeLinear(q, s, z)"
PLAIN = "y = Identity(p)"


def model(last: float, rest: str = ROUNDED) -> onnx.ModelProto:
    """Of the inputs 0, 255 and 0.5 the last stands in the middle of two integers, as long as `last`, what it is multiplied by, is 1."""
    found = parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> net (float[1, 3] x) => (float[1, 3] y) {{ p = Mul(x, w) {rest} }}'
    )
    found.graph.initializer.append(numpy_helper.from_array(np.array([1, 1, last], np.float32), "w"))
    return found


def verified(masked: onnx.ModelProto, result: onnx.ModelProto) -> Verification:
    dataset = open_dataset([{"x": np.array([[0, 255, 0.5]], np.float32)}], input_specs(masked))
    return verify(masked, masked, result, dataset, seed=0, threads=1)


def test_a_number_that_is_rounded_the_other_way_is_no_difference() -> None:
    found = verified(model(1.0), model(1 + 1e-6))
    assert found.max_abs == pytest.approx(1.0, rel=1e-5)
    assert found.max_rel <= 1e-4


@pytest.mark.parametrize(("last", "rest"), [(10.0, ROUNDED), (1.1, PLAIN)])
def test_what_is_more_than_that_is_one(last: float, rest: str) -> None:
    with pytest.raises(relief_onnx.VerificationError, match="differs from the masked one"):
        verified(model(1.0, rest), model(last, rest))
