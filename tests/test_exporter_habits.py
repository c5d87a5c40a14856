"""What exporters write besides the graph: descriptions of what is stored, types before a Cast, names that are there twice."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import control_cases
import numpy as np
import onnx
import pytest
from builders import Net
from onnx import TensorProto, helper, numpy_helper
from test_quantised import values

import relief_onnx
from relief_onnx.errors import DataError
from relief_onnx.lifting import body_of
from relief_onnx.pack import packed_names
from relief_onnx.prepared import prepare
from relief_onnx.session import Session


def recurrent() -> tuple[onnx.ModelProto, list[dict[str, Any]]]:
    """An LSTM in both directions with 12 hidden units; each direction makes what the other does not."""
    net = Net(seed=2, opset=18)
    x = net.input(5, "n", 6)
    y = net.op("LSTM", x, net.weight(2, 48, 6), net.weight(2, 48, 12), net.bias(2, 96), hidden_size=12, direction="bidirectional")
    flat = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3]), net.ints(5, -1, 24))
    model = net.model(net.op("MatMul", flat, net.weight(24, 3)))
    rng = np.random.default_rng(0)
    return model, [{x: rng.standard_normal((5, 4, 6)).astype(np.float32)} for _ in range(6)]


def test_described_biases_of_recurrent_nodes_follow_a_cut() -> None:
    """PyTorch's exporter describes what is stored: the description of B kept all hidden units, and the checker refused the result."""
    model, data = recurrent()
    for item in model.graph.initializer:
        model.graph.value_info.append(helper.make_tensor_value_info(item.name, item.data_type, item.dims))
    result = relief_onnx.prune(model, data, granularity="channel", keep="60%", round_to=1)
    onnx.checker.check_model(result.model, full_check=True)
    (node,) = (node for node in result.model.graph.node if node.op_type == "LSTM")
    assert values(result.model)[node.input[3]].shape[1] < 96


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_recurrent_nodes_whose_weights_pass_a_cast(kind: int) -> None:
    """The halves of their bias were of the stored type, which onnxruntime's kernel does not take."""
    model, data = recurrent()
    dtype, nodes = helper.tensor_dtype_to_np_dtype(kind), []
    for item in list(model.graph.initializer):
        if item.data_type == TensorProto.FLOAT:
            short = numpy_helper.from_array(numpy_helper.to_array(item).astype(dtype), f"{item.name}/short")
            nodes.append(helper.make_node("Cast", [short.name], [item.name], to=TensorProto.FLOAT, name=f"{item.name}/cast"))
            item.CopyFrom(short)
    nodes += [onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    ready = prepare(model)
    assert ready.restored(ready.graph.model).graph.node[-1] == model.graph.node[-1]
    result = relief_onnx.prune(model, data, granularity="weight", keep="50%", mean_shift="off", storage="dense")
    (node,) = (node for node in result.model.graph.node if node.op_type == "LSTM")
    assert all(row["weights_kept"] < row["weights"] for row in result.report["layers"])
    assert values(result.model)[f"{node.input[1]}/short"].dtype == dtype
    Session(result.model, 1).run(data[0])


def test_old_types_of_stored_tensors_are_no_matter_once_packed() -> None:
    """onnxruntime's float16 converter leaves float32 there; of what a node makes, onnxruntime takes it at its word."""
    net = Net(seed=1, opset=18, dtype=np.float16)
    x = net.input("n", 64)
    name = net.weight(64, 64)
    model = net.model(net.op("MatMul", net.op("Relu", net.op("MatMul", x, name)), net.weight(64, 4)))
    model.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [64, 64]))
    data = [{x: np.random.default_rng(0).standard_normal((16, 64)).astype(np.float16)}]
    result = relief_onnx.prune(model, data, granularity="weight", keep="30%", mean_shift="off")
    assert name in packed_names(result.model)


def test_nodes_of_a_branch_that_are_called_like_nodes_outside() -> None:
    """onnxruntime refused the model in which the branch stood beside them."""
    given = control_cases.weights()
    model = control_cases.branched(given, "initializer")
    outer = next(node for node in model.graph.node if node.op_type == "MatMul")
    choice = next(node for node in model.graph.node if node.op_type == "If")
    inner = next(node for node in body_of(choice, "then_branch").node if node.op_type == "MatMul")
    inner.name = outer.name
    result = relief_onnx.prune(model, control_cases.samples(), granularity="weight", keep="50%", storage="dense", mean_shift="off")
    choice = next(node for node in result.model.graph.node if node.op_type == "If")
    assert next(node.name for node in body_of(choice, "then_branch").node if node.op_type == "MatMul") == outer.name
    assert all(row["weights_kept"] < row["weights"] for row in result.report["layers"] if row["status"] == "pruned")


def test_heads_go_whose_mask_is_made_of_conditions() -> None:
    """PyTorch's exporter makes masks of stored places and conditions; the places counted as channels, and all heads stayed."""
    net, tokens, heads, size = Net(seed=4, opset=18), 6, 4, 4
    x, seen = net.input("n", tokens, 12), net.input("n", tokens)
    parts = [net.op("Reshape", net.op("MatMul", x, net.weight(12, heads * size)), net.ints(0, 0, heads, size)) for _ in range(3)]
    q, k, v = (net.op("Transpose", item, perm=perm) for item, perm in zip(parts, ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]), strict=True))
    every = net.constant(np.ones((1, 1, tokens, 1), np.bool_))
    counts = net.op("Unsqueeze", net.op("Greater", seen, net.constant(np.float32(0))), net.ints(1, 2))
    mask = net.op("Where", net.op("And", every, counts), net.constant(np.float32(0)), net.constant(np.float32(-1e4)))
    mixed = net.op("MatMul", net.op("Softmax", net.op("Add", net.op("MatMul", q, k), mask), axis=-1), v)
    together = net.op("Reshape", net.op("Transpose", mixed, perm=[0, 2, 1, 3]), net.ints(0, 0, heads * size))
    model = net.model(net.op("MatMul", together, net.weight(heads * size, 3)))
    rng = np.random.default_rng(0)
    data = [{x: rng.standard_normal((4, tokens, 12)).astype(np.float32), seen: np.ones((4, tokens), np.float32)} for _ in range(4)]
    result = relief_onnx.prune(model, data, granularity="channel", keep="60%", round_to=1)
    stored = values(result.model)
    assert all(stored[row["weight"]].shape[1] < heads * size for row in result.report["layers"][:3])


_PIECE = """
import numpy as np, onnx
from onnx import helper, numpy_helper, TensorProto
from relief_onnx.session import Session
half, single = TensorProto.FLOAT16, TensorProto.FLOAT
stored = {"s": np.ones(64, "f4"), "b": np.zeros(64, "f4"), "w": np.ones((64, 192), "f2"), "c": np.ones(192, "f2")}
nodes = [
    helper.make_node("Cast", ["x"], ["x32"], to=single),
    helper.make_node("LayerNormalization", ["x32", "s", "b"], ["n32"]),
    helper.make_node("Cast", ["n32"], ["n"], to=half),
    helper.make_node("Transpose", ["n"], ["t"], perm=[1, 0, 2]),
    helper.make_node("MatMul", ["t", "w"], ["p"]),
    helper.make_node("Add", ["p", "c"], ["y"]),
]
ends = [helper.make_tensor_value_info(name, half, None) for name in "ny"]
given = helper.make_tensor_value_info("x", half, [None, 12, 64])
graph = helper.make_graph(nodes, "piece", [given], ends, [numpy_helper.from_array(v, k) for k, v in stored.items()])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
print(Session(model, 1, working=True).run({"x": np.ones((2, 12, 64), "f2")})[1].shape)
"""


def test_a_piece_of_half_precision_does_not_end_the_process() -> None:
    """onnxruntime's layout optimiser crashes on a Transpose that it fused into a MatMul of half precision."""
    done = subprocess.run([sys.executable, "-c", _PIECE], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "(12, 2, 192)"), done.stderr


@pytest.mark.parametrize("criterion", ["flow", "relief"])
def test_a_model_that_promises_any_batch_and_takes_one_sample(criterion: str) -> None:
    """A tracer wrote the 1 of its example into the Reshape that splits heads; samples ran together, which failed."""
    net = Net(seed=3)
    x = net.input("batch", 5, 6)
    hidden = net.op("Relu", net.op("MatMul", x, net.weight(6, 8)))
    heads = net.op("Transpose", net.op("Reshape", hidden, net.ints(1, 5, 2, 4)), perm=[0, 2, 1, 3])
    joined = net.op("Reshape", net.op("Transpose", heads, perm=[0, 2, 1, 3]), net.ints(1, 5, 8))
    model = net.model(net.op("MatMul", joined, net.weight(8, 3)))
    rng = np.random.default_rng(0)
    data = [{x: rng.standard_normal((1, 5, 6)).astype(np.float32)} for _ in range(6)]
    with pytest.raises(DataError):
        Session(model).run({x: np.concatenate([item[x] for item in data])})
    result = relief_onnx.prune(model, data, criterion=criterion, keep="60%")
    assert any("with one only" in text for text in result.report["warnings"])
    small = relief_onnx.quantize(result.model, data)
    assert any("with one only" in text for text in small.report["warnings"])
    before, after = (Session(item).run(data[0])[0] for item in (model, small.model))
    assert before.shape == after.shape


def test_a_model_that_takes_many_samples_has_no_such_note() -> None:
    model, data = recurrent()
    assert not any("with one only" in text for text in relief_onnx.prune(model, data).report["warnings"])
