"""The interpreter: does what onnxruntime does, trains, and gives weights back by name."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from architectures import ARCHITECTURES
from builders import Net
from helpers import ROOT, SAMPLES, digits, real_model
from onnx import TensorProto, helper, numpy_helper
from random_graphs import KINDS as GRAPH_KINDS
from random_graphs import STEPS
from random_graphs import build as build_graph
from surgery_cases import CASES, sandwich

from benchmarks.interpreter import measure
from benchmarks.interpreter_models import LeNet5, build, to_onnx
from benchmarks.interpreter_zoo import compared, differences
from benchmarks.zoo_models import SHARED, feed, rows
from relief_onnx.errors import ModelError, Unsupported
from relief_onnx.interpreter import Network
from relief_onnx.interpreter.table import TABLE
from relief_onnx.model import prepare
from relief_onnx.session import Session
from relief_onnx.surgery import apply_weights

# Outputs agree to this share of their largest value, or to this much where all of it is next to nothing (a saturated sigmoid).
RELATIVE, ABSOLUTE = 1e-4, 1e-6


def evaluated(network: Network, given: dict[str, Any]) -> list[Any]:
    with torch.no_grad():
        return [value.numpy() for value in network({name: torch.from_numpy(value) for name, value in given.items()}).values()]


def assert_like_onnxruntime(model: onnx.ModelProto, given: dict[str, Any], network: Network | None = None) -> None:
    expected = Session(model, threads=1).run(given)
    for a, b in zip(expected, evaluated(network or Network(model), given), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if a.size:
            assert np.abs(a.astype(np.float64) - b).max() <= max(RELATIVE * np.abs(a).max(), ABSOLUTE)


def sample(name: str) -> onnx.ModelProto:
    return onnx.load(SAMPLES / f"{name}.onnx")


@pytest.mark.parametrize("name", ["lenet300", "lenet5", "resnet8"])
def test_sample_models(name: str) -> None:
    model = sample(name)
    assert_like_onnxruntime(model, {model.graph.input[0].name: digits(8)})


@pytest.mark.parametrize("row", rows() if SHARED.is_dir() else [], ids=lambda row: str(row["id"]))
def test_real_models(row: dict[str, Any]) -> None:
    model = onnx.load(real_model(row["id"]))
    if row["id"] == "basic_pitch":  # on noise onnxruntime differs from itself without its optimiser by a thousandth
        from benchmarks.zoo_samples import samples

        assert_like_onnxruntime(model, samples(row, "calib_a", 1)[0][0])
    else:
        assert_like_onnxruntime(model, feed(row, 0))


@pytest.mark.parametrize("row", rows() if SHARED.is_dir() else [], ids=lambda row: str(row["id"]))
def test_every_weight_of_a_real_model_gets_a_gradient(row: dict[str, Any]) -> None:
    path = SHARED / f"{row['id']}.onnx"
    if not path.exists():
        pytest.skip("not one of the small models beside the project")
    network = Network(onnx.load(path))
    network.train()
    given = {name: torch.from_numpy(value) for name, value in feed(row, 0).items()}
    sum((value.square().mean() for value in network(given).values()), torch.zeros(())).backward()
    for name, weight in network.weights().items():
        assert weight.grad is not None, name
        assert bool(torch.isfinite(weight.grad).all()), name


def test_the_comparison_with_onnxruntime_can_fail() -> None:
    """A difference of a thousandth is seen, and a weight without a way back to it."""
    net = Net(seed=1)
    x = net.input(2, 4)
    hidden = net.op("MatMul", x, net.weight(4, 3))
    second = net.weight(3, 2)
    model = net.model(net.op("Round", hidden), net.op("MatMul", hidden, second))
    given = {x: np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)}
    found = compared(model, {"random": [given]})
    assert found["max_rel"] < 1e-5
    assert found["without_gradient"] == []
    assert compared(net.model(net.op("Round", hidden)), {"random": [given]})["without_gradient"] == [second]  # nobody reads it now
    a = np.array([1.0, -4.0])
    assert differences(a, a * 1.001) == pytest.approx((4e-3, 1e-3))
    assert differences(a * 1e-9, a * 0) == pytest.approx((4e-9, 4e-7))
    with pytest.raises(ValueError, match="where onnxruntime has"):
        differences(a, a[None])


PAIRS = [(case, layer) for case, (layers, _, _) in CASES.items() for layer in layers]


def test_every_row_of_the_pruners_table_between_two_layers() -> None:
    """What can be pruned can be trained: all cases of the operator table that surgery is tested with."""
    for case, layer in PAIRS:
        assert_like_onnxruntime(*sandwich(case, layer))


def test_a_signal_without_an_axis_for_channels() -> None:
    """As PyTorch writes STFT: [batch, time]."""
    net = Net(seed=1)
    x = net.input("N", 40)
    window = net.constant(np.hanning(16).astype(np.float32))
    model = net.model(net.op("STFT", x, net.constant(np.int64(8)), window, net.constant(np.int64(16)), onesided=1))
    assert_like_onnxruntime(model, {x: np.random.default_rng(0).standard_normal((3, 40)).astype(np.float32)})


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_patterns_of_architectures(name: str) -> None:
    assert_like_onnxruntime(*ARCHITECTURES[name]())


def test_random_graphs() -> None:
    for seed in range(120):
        rng = np.random.default_rng(seed)
        steps = [(int(rng.integers(len(STEPS))), int(rng.integers(1000))) for _ in range(int(rng.integers(1, 14)))]
        opset = [9, 11, 13, 17, 18, 21][seed % 6]
        assert_like_onnxruntime(*build_graph(steps, opset, GRAPH_KINDS[seed % len(GRAPH_KINDS)], bool(seed % 2)))


def assert_runs_without_values(model: onnx.ModelProto, given: dict[str, Any]) -> None:
    """On torch's meta device, where tensors have shapes and no values: a GPU would never have to wait for the CPU."""
    network = Network(model)
    expected = [value.shape for value in evaluated(network, given)]
    found = network.to("meta")({name: torch.from_numpy(value).to("meta") for name, value in given.items()})
    assert [tuple(value.shape) for value in found.values()] == expected
    assert {value.device.type for value in found.values()} == {"meta"}


def test_random_graphs_run_without_reading_back() -> None:
    for seed in range(60):
        rng = np.random.default_rng(1000 + seed)
        steps = [(int(rng.integers(len(STEPS))), int(rng.integers(1000))) for _ in range(int(rng.integers(1, 14)))]
        assert_runs_without_values(*build_graph(steps, [9, 11, 13, 17, 18, 21][seed % 6], GRAPH_KINDS[seed % 3], bool(seed % 2)))


@pytest.mark.parametrize("row", rows() if SHARED.is_dir() else [], ids=lambda row: str(row["id"]))
def test_real_models_run_without_reading_back(row: dict[str, Any]) -> None:
    path = SHARED / f"{row['id']}.onnx"
    if not path.exists():
        pytest.skip("not one of the small models beside the project")
    assert_runs_without_values(onnx.load(path), feed(row, 0))


def test_prepared_models_have_the_weights_of_constant_nodes() -> None:
    net = Net()
    x = net.input(4, 8)
    y = net.op("MatMul", x, net.op("Constant", value=numpy_helper.from_array(np.ones((8, 3), np.float32))))
    model = net.model(y)
    assert not Network(model).weights()
    assert len(Network(prepare(model)).weights()) == 1


def train(network: Network, x: torch.Tensor, steps: int = 3) -> list[float]:
    """Some steps that make all outputs smaller."""
    optimiser = torch.optim.SGD(network.parameters(), lr=1e-2)
    network.train()
    losses = []
    for _ in range(steps):
        loss = sum((value.square().mean() for value in network({network.inputs[0]: x}).values()), torch.zeros(()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    network.eval()
    return losses


@pytest.mark.parametrize("name", ["lenet300", "resnet8"])
def test_trained_weights_go_back_by_name(name: str) -> None:
    model = sample(name)
    network = Network(model)
    assert network.arrays() == {}
    given = {network.inputs[0]: digits(8)}
    losses = train(network, torch.from_numpy(digits(8)))
    assert losses[-1] < losses[0]
    arrays = network.arrays()
    statistics = {name for node in model.graph.node if node.op_type == "BatchNormalization" for name in node.input[3:]}
    assert set(arrays) == set(network.weights()) | statistics
    stored = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    assert all((arrays[key].shape, arrays[key].dtype) == (stored[key].shape, stored[key].dtype) for key in arrays)
    trained = apply_weights(model, arrays)
    assert_like_onnxruntime(trained, given, network)
    assert not np.allclose(Session(model).run(given)[0], Session(trained).run(given)[0])
    assert [(item.name, item.data_type, item.dims) for item in trained.graph.initializer] == [
        (item.name, item.data_type, item.dims) for item in model.graph.initializer
    ]


def test_only_what_is_asked_for_is_trained() -> None:
    network = Network(sample("lenet5"), trainable=["classifier.0.weight"])
    train(network, torch.from_numpy(digits(8)))
    assert set(network.weights()) == set(network.arrays()) == {"classifier.0.weight"}
    assert network.weight("classifier.0.weight") is network.weights()["classifier.0.weight"]
    with pytest.raises(KeyError):
        network.weight("classifier.0.bias")
    with pytest.raises(ModelError, match=r"^nothing cannot be trained: it is no floating initializer of its own name"):
        Network(sample("lenet5"), trainable=["nothing"])
    statistic = next(node for node in sample("resnet8").graph.node if node.op_type == "BatchNormalization").input[3]
    with pytest.raises(ModelError, match="cannot be trained: it is a running statistic"):
        Network(sample("resnet8"), trainable=[statistic])


def test_a_step_is_that_of_the_plain_module() -> None:
    """Losses of the two stay together over steps of SGD, BatchNormalization among them (the benchmark's own check)."""
    row = measure(LeNet5, 8, 5, 0, 1)
    assert row["largest_difference_of_losses"] < 1e-5
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    net = Net()
    w, b = (net.constant(value.detach().numpy()) for value in (plain[0].weight, plain[0].bias))
    y = net.op("Conv", net.input(8, 3, 6, 6), w, b)
    norm = [
        net.constant(value.detach().numpy().copy())
        for value in (plain[1].weight, plain[1].bias, plain[1].running_mean, plain[1].running_var)
    ]
    network = Network(net.model(net.op("BatchNormalization", y, *norm, momentum=0.9)))
    x = torch.rand(8, 3, 6, 6)
    network.train()
    plain.train()
    for _ in range(3):
        (found,) = network({network.inputs[0]: x}).values()
        assert torch.allclose(found, plain(x), atol=1e-6)
    arrays = network.arrays()
    assert np.allclose(arrays[norm[2]], plain[1].running_mean.numpy(), atol=1e-6)
    assert np.allclose(arrays[norm[3]], plain[1].running_var.numpy(), atol=1e-6)


def test_what_is_no_weight_by_default() -> None:
    net = Net()
    x = net.input(2, 4)
    scalar, exponent = net.constant(np.float32(1e-5)), net.constant(np.full(4, 2, np.float32))
    mask, table = net.constant(np.array([0, 0, -np.inf, 0], np.float32)), net.constant(np.ones((4, 4), np.float32))
    y = net.op("Softmax", net.op("Add", net.op("Pow", net.op("Add", x, scalar), exponent), mask))
    network = Network(net.model(net.op("MatMul", y, table)))
    assert list(network.weights()) == [table]
    net = Net()
    bias, factor = net.bias(1), net.bias(1)
    y = net.op("Gemm", net.input(2, 4), net.weight(4, 1), bias)
    network = Network(net.model(net.op("Mul", y, factor)))
    assert bias in network.weights()
    assert factor not in network.weights()


def test_statistics_that_cannot_go_back_stay() -> None:
    """In Constant nodes, for example: the network would no longer be what the file says."""
    net = Net()
    tensors = [numpy_helper.from_array(value) for value in (np.array([1, 2], np.float32), np.array([3, 4], np.float32))]
    statistics = [net.op("Constant", value=tensor) for tensor in tensors]
    network = Network(net.model(net.op("BatchNormalization", net.input(4, 2), net.weight(2), net.weight(2), *statistics)))
    x = torch.rand(4, 2)
    (before,) = network({network.inputs[0]: x}).values()
    network.train()
    (training,) = network({network.inputs[0]: x}).values()
    assert torch.equal(before, training)
    assert not network.arrays()


@pytest.mark.parametrize("kind", [np.float16, "bfloat16"])
def test_half_precision_is_held_in_single_and_goes_back_as_it_was(kind: Any) -> None:
    data_type = TensorProto.FLOAT16 if kind is np.float16 else TensorProto.BFLOAT16
    dtype = helper.tensor_dtype_to_np_dtype(data_type)
    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((4, 3)).astype(dtype), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "half",
        [helper.make_tensor_value_info("x", data_type, [2, 4])],
        [helper.make_tensor_value_info("y", data_type, [2, 3])],
        [weight],
    )
    network = Network(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))
    x = torch.ones(2, 4, dtype=torch.float16 if kind is np.float16 else torch.bfloat16)
    assert network.weight("w").dtype == torch.float32
    assert network({"x": x})["y"].dtype == x.dtype
    train(network, x, 1)
    assert network.arrays()["w"].dtype == dtype
    restored = numpy_helper.from_array(network.arrays()["w"], "w")
    assert (restored.data_type, list(restored.dims)) == (data_type, [4, 3])


def test_bodies_have_weights_and_capture_names() -> None:
    """A loop that adds x W to its state: W lives in the body, x outside."""
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["xw"]),
            helper.make_node("Add", ["state", "xw"], ["next"]),
            helper.make_node("Identity", ["going"], ["on"]),
        ],
        "body",
        [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in
         (("i", TensorProto.INT64, []), ("going", TensorProto.BOOL, []), ("state", TensorProto.FLOAT, [2, 3]))],
        [helper.make_tensor_value_info("on", TensorProto.BOOL, []), helper.make_tensor_value_info("next", TensorProto.FLOAT, [2, 3])],
        [numpy_helper.from_array(np.ones((4, 3), np.float32), "w")],
    )  # fmt: skip
    graph = helper.make_graph(
        [helper.make_node("Loop", ["count", "", "start"], ["y"], body=body, name="rounds")],
        "loop",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])],
        [numpy_helper.from_array(np.array(3), "count"), numpy_helper.from_array(np.zeros((2, 3), np.float32), "start")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x = np.random.default_rng(0).random((2, 4), np.float32)
    network = Network(model)
    assert set(network.weights()) == {"w", "start"}
    assert_like_onnxruntime(model, {"x": x}, network)
    train(network, torch.from_numpy(x))
    assert set(network.arrays()) == {"w", "start"}
    assert_like_onnxruntime(apply_weights(model, network.arrays()), {"x": x}, network)


def test_dropout_is_what_the_graph_says() -> None:
    def network(*more: Any) -> Network:
        net = Net()
        return Network(net.model(net.op("Dropout", net.input(64, 64), *(net.constant(value) for value in more))))

    x = torch.ones(64, 64)
    for found, dropped in ((network(), False), (network(np.float32(0.5), np.array(True)), True)):
        for training in (True, False):
            found.train(training)
            (y,) = found({found.inputs[0]: x}).values()
            assert bool((y == 0).any()) == (dropped and training)


def test_copies_are_independent_and_states_load() -> None:
    network = Network(sample("resnet8"))
    other = copy.deepcopy(network)
    train(network, torch.from_numpy(digits(8)))
    assert not other.arrays()
    other.load_state_dict(network.state_dict())
    assert other.arrays().keys() == network.arrays().keys()
    given = {network.inputs[0]: digits(4)}
    assert np.array_equal(evaluated(network, given)[0], evaluated(other, given)[0])


def test_whole_numbers_stay_on_the_cpu() -> None:
    """Shapes that are computed at run time do not touch the device: the meta device has no values at all."""
    net = Net()
    x = net.input("n", 4, 6)
    sizes = net.op("Concat", net.op("Slice", net.op("Shape", x), net.ints(0), net.ints(1)), net.ints(-1), axis=0)
    y = net.op("Reshape", x, sizes)
    y = net.op("Add", net.op("MatMul", y, net.weight(24, 5)), net.op("Cast", net.ints(1, 2, 3, 4, 5), to=TensorProto.FLOAT))
    network = Network(net.model(net.op("Gather", y, net.ints(4, 0), axis=1))).to("meta")
    (found,) = network({network.inputs[0]: torch.empty(3, 4, 6, device="meta")}).values()
    assert (found.device.type, tuple(found.shape)) == ("meta", (3, 2))


REFUSED = {
    "an operator nobody knows": (
        helper.make_node("Mystery", ["x"], ["y"], name="riddle", domain="com.example"),
        "node riddle: operator Mystery of domain com.example, opset 3, cannot be run in torch; use --repair least-squares, "
        "which needs no torch",
    ),
    "an attribute nobody knows": (
        helper.make_node("Relu", ["x"], ["y"], sharpness=3),
        "node y: operator Relu of domain ai.onnx, opset 17, cannot be run in torch (attribute sharpness); use --repair least-squares, "
        "which needs no torch",
    ),
    "a type torch has not": (
        helper.make_node("Cast", ["x"], ["y"], name="to_text", to=TensorProto.STRING),
        "node to_text: operator Cast of domain ai.onnx, opset 17, cannot be run in torch (to STRING); use --repair least-squares, "
        "which needs no torch",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    node, sentence = REFUSED[case]
    graph = helper.make_graph(
        [node],
        "refused",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.example", 3)]
    with pytest.raises(Unsupported, match=f"^{re.escape(sentence)}$"):
        Network(helper.make_model(graph, opset_imports=opsets))


def test_a_dead_node_is_not_run() -> None:
    model = sample("lenet5")
    model.graph.node.append(helper.make_node("Mystery", [model.graph.input[0].name], ["nobody"], domain="com.example"))
    assert Network(model)


def test_wrong_inputs_are_named() -> None:
    network = Network(sample("lenet5"))
    (name,) = network.inputs
    with pytest.raises(ModelError, match=f"^the model's inputs are {name}; {name} is missing$"):
        network({})
    with pytest.raises(ModelError, match=f"^the model's inputs are {name}; other is unknown$"):
        network({name: torch.zeros(1, 1, 28, 28), "other": torch.zeros(1)})


def test_an_error_names_its_node() -> None:
    network = Network(sample("lenet5"))
    with pytest.raises(RuntimeError) as caught:
        network({network.inputs[0]: torch.zeros(1, 3, 28, 28)})
    assert re.fullmatch(r"in node .+ \(Conv\)", caught.value.__notes__[-1])


def test_constants_are_computed_once() -> None:
    net = Net()
    x = net.input(2, 12)
    sizes = net.op("Concat", net.op("Mul", net.ints(1), net.ints(2)), net.ints(3, 4), axis=0)
    network = Network(net.model(net.op("Reshape", x, sizes)))
    assert len(network._program.steps) == 1


def test_the_benchmarks_models_are_valid() -> None:
    model = to_onnx(build(LeNet5))
    onnx.checker.check_model(model, full_check=True)
    assert_like_onnxruntime(model, {"input": digits(3)})


def test_the_page_lists_every_operator() -> None:
    rows = re.findall(r"^\| `\w+`: .* \| (.*) \|$", (ROOT / "docs" / "interpreter.md").read_text().split("## Operators")[1], re.MULTILINE)
    listed = {name.removeprefix("ai.onnx.ml.") for row in rows for name in row.split(", ")}
    assert listed == {name for _, name in TABLE.rows}
