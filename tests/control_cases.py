"""Small networks with and without control flow that compute the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Arrays = dict[str, NDArray[Any]]
X, HIDDEN, INNER, JOINT, OUT = 8, 12, 16, 6, 4
BODY = ("w2", "b2", "w3")


def weights(seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    shapes = {"w1": (X, HIDDEN), "b1": (HIDDEN,), "w2": (HIDDEN, INNER), "b2": (INNER,), "w3": (INNER, JOINT), "w4": (JOINT, OUT)}
    shapes["v"] = (X, JOINT)
    return {name: rng.normal(0, 1 / np.sqrt(shape[0]), shape).astype(np.float32) for name, shape in shapes.items()}


def samples(count: int = 64, seed: int = 1) -> list[Arrays]:
    return [{"x": np.random.default_rng(seed).normal(0, 1, (count, X)).astype(np.float32)}]


def model(nodes: Sequence[onnx.NodeProto], stored: Arrays, inputs: Sequence[onnx.ValueInfoProto] = ()) -> onnx.ModelProto:
    """A model from x [N, 8] to y [N, 4]."""
    graph = helper.make_graph(
        nodes,
        "net",
        [value("x", "N", X), *inputs],
        [value("y", "N", OUT)],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(made, full_check=True)
    return made


def value(name: str, *shape: Any, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def node(operator: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    """Names in one word each; the node is named after its first output."""
    return helper.make_node(operator, inputs.split(), outputs.split(), name=f"node_{outputs.split()[0]}", **attributes)


def first() -> list[onnx.NodeProto]:
    return [node("MatMul", "x w1", "h1"), node("Add", "h1 b1", "h2"), node("Relu", "h2", "h")]


def inner() -> list[onnx.NodeProto]:
    return [
        node("MatMul", "h w2", "k1"), node("Add", "k1 b2", "k2"), node("Relu", "k2", "k"), node("MatMul", "k w3", "j_then"),
    ]  # fmt: skip


def last(source: str = "j") -> list[onnx.NodeProto]:
    return [node("Relu", source, "jr"), node("MatMul", "jr w4", "y")]


def plain(given: Arrays) -> onnx.ModelProto:
    """The network without control flow."""
    stored = {name: given[name] for name in ("w1", "b1", *BODY, "w4")}
    return model([*first(), *inner(), *last("j_then")], stored)


def condition(kind: str) -> list[onnx.NodeProto]:
    """A bool `c`: "always" true on any sample, "never", or "sign" of the first sample's first number."""
    limit = {"always": -1.0, "never": 1e9, "sign": 0.0}[kind]
    source = [node("Abs", "x", "a"), node("ReduceSum", "a", "s", keepdims=0)]
    if kind == "sign":
        source = [node("Gather", "x zero", "a", axis=0), node("Gather", "a zero", "s", axis=0)]
    zero = helper.make_node("Constant", [], ["zero"], value=numpy_helper.from_array(np.int64(0)))
    edge = helper.make_node("Constant", [], ["edge"], value=numpy_helper.from_array(np.float32(limit)))
    return [zero, edge, *source, node("Greater", "s edge", "c")]


def held(nodes: list[onnx.NodeProto], stored: Arrays, storage: str) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """What a body holds itself, as "constant" nodes or "initializer"s; nothing where it is "captured"."""
    tensors = [numpy_helper.from_array(array, name) for name, array in stored.items()]
    if storage == "constant":
        return [helper.make_node("Constant", [], [item.name], value=item, name=f"make_{item.name}") for item in tensors] + nodes, []
    return nodes, tensors if storage == "initializer" else []


def branched(
    given: Arrays, storage: str = "initializer", kind: str = "always", nested: bool = False, swapped: bool = False
) -> onnx.ModelProto:
    """`plain` with its middle in a branch; the other branch is one product. swapped: the middle is in else_branch."""
    own = {name: given[name] for name in BODY}
    stored = {name: given[name] for name in ("w1", "b1", "w4", *(BODY if storage == "captured" else ()))}
    nodes, tensors = held(inner(), own, storage)
    middle = helper.make_graph(nodes, "middle", [], [value("j_then", "N", JOINT)], tensors)
    if nested:
        other = helper.make_graph(
            [helper.make_node("MatMul", ["x", "v_in"], ["j_in"])], "inner_other", [], [value("j_in", "N", JOINT)],
            [numpy_helper.from_array(given["v"], "v_in")],
        )  # fmt: skip
        again = helper.make_node("Not", ["c"], ["not_c"])
        choice = helper.make_node("If", ["not_c"], ["j_outer"], name="inner_if", then_branch=other, else_branch=middle)
        middle = helper.make_graph([again, choice], "outer", [], [value("j_outer", "N", JOINT)])
    other = helper.make_graph(
        [helper.make_node("MatMul", ["x", "v"], ["j_else"])], "other", [], [value("j_else", "N", JOINT)],
        [numpy_helper.from_array(given["v"], "v")],
    )  # fmt: skip
    branches = {"then_branch": other, "else_branch": middle} if swapped else {"then_branch": middle, "else_branch": other}
    choice = helper.make_node("If", ["c"], ["j"], name="choice", doc_string="which way", **branches)
    turned = [node("Not", "c", "c_not")] if swapped else []
    if swapped:
        choice.input[0] = "c_not"
    return model([*first(), *condition(kind), *turned, choice, *last()], stored)
