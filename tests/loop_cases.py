"""The middle of `control_cases.plain` inside Scan and Loop, over a leading axis, and the same as products of whole arrays."""

from __future__ import annotations

from typing import Any

import control_cases as cases
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

STEPS = 5


def samples(count: int = 24, seed: int = 1) -> list[cases.Arrays]:
    return [{"x": np.random.default_rng(seed).normal(0.2, 1, (STEPS, count, cases.X)).astype(np.float32)}]


def model(nodes: list[onnx.NodeProto], stored: cases.Arrays) -> onnx.ModelProto:
    """From x [steps, N, 8] to y [steps, N, 4]."""
    graph = helper.make_graph(
        nodes, "net", [cases.value("x", STEPS, "N", cases.X)], [cases.value("y", STEPS, "N", cases.OUT)],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(made, full_check=True)
    return made


def plain(given: cases.Arrays) -> onnx.ModelProto:
    stored = {name: given[name] for name in ("w1", "b1", *cases.BODY, "w4")}
    return model([*cases.first(), *cases.inner(), *cases.last("j_then")], stored)


def looped(given: cases.Arrays, operator: str, storage: str, gemm: bool = False) -> onnx.ModelProto:
    """operator: "Scan" or "Loop". gemm: the first product of the body is a Gemm, with its bias and a transposed weight."""
    own = {name: given[name] for name in cases.BODY}
    middle = cases.inner()
    if gemm:
        own["w2"] = np.ascontiguousarray(own["w2"].T)
        middle[:2] = [cases.node("Gemm", "h w2 b2", "k2", transB=1)]
    stored = {name: given[name] for name in ("w1", "b1", "w4")} | (own if storage == "captured" else {})
    nodes, tensors = cases.held(middle, own, storage)
    nodes[0:0] = [] if operator == "Scan" else [cases.node("Gather", "h_all i", "h", axis=0), cases.node("Identity", "going", "again")]
    made = cases.value("j_then", "N", cases.JOINT)
    if operator == "Scan":
        body = helper.make_graph(nodes, "body", [cases.value("h", "N", cases.HIDDEN)], [made], tensors)
        choice = helper.make_node("Scan", ["h_all"], ["j"], name="again", body=body, num_scan_inputs=1)
    else:
        inputs = [cases.value("i", kind=TensorProto.INT64), cases.value("going", kind=TensorProto.BOOL)]
        body = helper.make_graph(nodes, "body", inputs, [cases.value("again", kind=TensorProto.BOOL), made], tensors)
        choice = helper.make_node("Loop", ["steps", ""], ["j"], name="again", body=body)
    steps: dict[str, Any] = {} if operator == "Scan" else {"steps": np.array(STEPS, np.int64)}
    start = cases.first()
    start[-1].output[0] = "h_all"
    return model([*start, choice, *cases.last()], stored | steps)
