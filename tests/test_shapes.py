"""Inferred sizes, types and values: the algebra of sizes, small graphs, and runs of whole models as the judge."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import onnx
import pytest
from builders import Net
from helpers import ROOT, SAMPLES
from onnx import TensorProto, helper, numpy_helper
from shape_oracle import disagreements, run_all

from relief_onnx.dims import Symbols
from relief_onnx.graph import Graph
from relief_onnx.shapes import Dim, infer

SHARED = ROOT.parent / "shared" / "models"
N, M = Dim.of("n"), Dim.of("m")


# -- the algebra ------------------------------------------------------------------------------------------------------------


def test_products_and_exact_quotients() -> None:
    assert Dim.of(6) * N * M == M * Dim.of(2) * N * Dim.of(3)
    assert (Dim.of(6) * N * M).divided(Dim.of(4) * N) is None
    assert (Dim.of(6) * N * M).divided(Dim.of(3) * N) == Dim.of(2) * M
    assert N.divided(M) is None
    assert N.divided(Dim.of(0)) is None
    assert Dim.of(0) * N == Dim.of(0)
    assert (N * N).divided(N) == N
    assert (Dim.of(7).value, N.value) == (7, None)
    assert str(Dim.of(2) * N * M) == "2*m*n"


def test_the_same_expression_is_the_same_symbol() -> None:
    symbols = Symbols(["n", "m"])
    one = Dim.of(1)
    assert symbols.add(N, M) == symbols.add(M, N)
    assert symbols.sub(symbols.add(N, one), one) == N
    assert symbols.add(symbols.add(N, one), one) == symbols.add(N, Dim.of(2))
    assert symbols.floor(N, Dim.of(2)) == symbols.div(N, Dim.of(2)) != symbols.floor(M, Dim.of(2))
    assert symbols.floor(Dim.of(4) * N, Dim.of(2)) == Dim.of(2) * N
    assert symbols.floor(symbols.add(Dim.of(4) * N, Dim.of(3)), Dim.of(2)) == symbols.add(Dim.of(2) * N, one)
    assert symbols.div(Dim.of(-7), Dim.of(2)) == Dim.of(-3)
    assert symbols.least(N, Dim.of(3) * N) == N
    assert symbols.most(N, Dim.of(-1)) == N
    assert symbols.is_size(symbols.add(N, one))
    assert not symbols.is_size(symbols.sub(N, one))


def test_sizes_that_meet() -> None:
    symbols = Symbols(["n", "m"])
    assert symbols.broadcast(N, Dim.of(1)) == symbols.broadcast(Dim.of(1), N) == symbols.broadcast(N, N) == N
    assert symbols.broadcast(N, Dim.of(8)) == Dim.of(8)
    assert symbols.broadcast(N, M) == symbols.broadcast(M, N) not in (N, M)


# -- small graphs -----------------------------------------------------------------------------------------------------------


def _axis(net: Net, x: str, axis: int) -> str:
    """One size of x, as torch writes it: int64 [1]."""
    return str(net.op("Unsqueeze", net.op("Gather", net.op("Shape", x), net.constant(np.int64(axis)), axis=0), net.ints(0)))


def _merged(net: Net, x: str) -> str:
    return str(net.op("Reshape", x, net.op("Concat", _axis(net, x, 0), net.ints(-1), axis=0)))


def _heads(net: Net, x: str) -> str:
    target = net.op("Concat", _axis(net, x, 0), _axis(net, x, 1), net.ints(2, 2, -1), axis=0)
    return str(net.op("Transpose", net.op("Reshape", x, target), perm=[0, 2, 1, 3, 4]))


def _paddle(net: Net, x: str) -> str:
    sizes = net.op("Cast", net.op("Slice", net.op("Cast", net.op("Shape", x), to=TensorProto.INT32), net.ints(0), net.ints(1)), to=7)
    return str(net.op("Reshape", x, net.op("Concat", sizes, net.ints(-1, 4), axis=0)))


def _twice(net: Net, x: str) -> str:
    size = net.op("Floor", net.op("Mul", net.op("Cast", _axis(net, x, 1), to=1), net.constant(np.float32([2]))))
    return str(net.op("Tile", net.op("Expand", net.constant(np.float32([[1]])), net.op("Cast", size, to=7)), net.ints(3, 1)))


def _expanded(net: Net, x: str) -> str:
    target = net.op("Concat", _axis(net, x, 0), net.ints(-1, 8), axis=0)
    ones = net.op("ConstantOfShape", net.op("Shape", target), value=numpy_helper.from_array(np.int64([1])))
    chosen = net.op("Where", net.op("Equal", target, net.ints(-1)), ones, target)
    return str(net.op("Expand", net.op("Slice", x, net.ints(0), net.ints(1), net.ints(2)), chosen))


def _positions(net: Net, x: str) -> str:
    count = net.op("Squeeze", _axis(net, x, 1), net.ints(0))
    numbers = net.op("Range", net.constant(np.int64(0)), count, net.constant(np.int64(1)))
    return str(net.op("Add", x, net.op("Unsqueeze", net.op("Cast", numbers, to=1), net.ints(-1))))


def _halves(net: Net, x: str) -> str:
    double = net.op("Concat", x, x, axis=1)
    size = _axis(net, x, 1)
    return str(net.op("Add", x, net.op("Slice", double, size, net.op("Mul", size, net.ints(2)), net.ints(1))))


def _padded(net: Net, x: str) -> str:
    """As torch writes it: (end, begin) pairs from the last axis, turned round."""
    rows = net.op("Slice", net.op("Reshape", net.ints(1, 1, 2, 2, 0, 0), net.ints(-1, 2)), *(net.ints(i) for i in (-1, -99, 0, -1)))
    return str(net.op("Pad", x, net.op("Reshape", net.op("Transpose", rows, perm=[1, 0]), net.ints(-1))))


# Builder on x [n, m, 8], and the sizes of what it returns; None where it is a symbol of its own.
GRAPHS: list[tuple[Any, list[Dim | None]]] = [
    (_merged, [N, Dim.of(8) * M]),
    (_heads, [N, Dim.of(2), M, Dim.of(2), Dim.of(2)]),
    (_paddle, [N, Dim.of(2) * M, Dim.of(4)]),
    (_twice, [Dim.of(3), Dim.of(2) * M]),
    (_expanded, [N, M, Dim.of(8)]),
    (_positions, [N, M, Dim.of(8)]),
    (_halves, [N, M, Dim.of(8)]),
    (_padded, [N, None, Dim.of(10)]),
    (lambda net, x: net.op("Einsum", x, x, equation="bik,bjk->bij"), [N, M, M]),
    (lambda net, x: net.op("MatMul", x, net.op("Transpose", x, perm=[0, 2, 1])), [N, M, M]),
    (lambda net, x: net.op("ReduceMean", x, axes=[1], keepdims=0), [N, Dim.of(8)]),
    (lambda net, x: net.op("Split", x, axis=2, outputs=2)[1], [N, M, Dim.of(4)]),
    (lambda net, x: net.op("GRU", x, net.weight(1, 9, 8), net.weight(1, 9, 3), hidden_size=3, outputs=2)[0], [N, Dim.of(1), M, Dim.of(3)]),
    (lambda net, x: net.op("ArgMax", x, axis=-1, keepdims=0), [N, M]),
    (lambda net, x: net.op("Resize", x, "", net.constant(np.float32([1, 2, 0.5]))), [N, Dim.of(2) * M, Dim.of(4)]),
    (lambda net, x: net.op("Slice", x, net.ints(-1), net.ints(-(1 << 62)), net.ints(1), net.ints(-1)), [N, M, Dim.of(8)]),
]  # fmt: skip


@pytest.mark.parametrize(("build", "sizes"), GRAPHS, ids=[getattr(build, "__name__", "") + str(i) for i, (build, _) in enumerate(GRAPHS)])
def test_small_graphs(build: Any, sizes: list[Dim | None]) -> None:
    net = Net()
    x = net.input("n", "m", 8)
    y = build(net, x)
    model = net.model(y)
    found = infer(model)
    dims = found.dims[y]
    assert dims is not None
    assert [size if wanted else None for size, wanted in zip(dims, sizes, strict=True)] == sizes
    for shape in ((2, 5, 8), (3, 4, 8)):
        assert not disagreements(found, run_all(model, {x: net.rng.random(shape).astype(np.float32)}))


def test_convolutions_of_one_geometry_share_their_symbol() -> None:
    net = Net()
    x = net.input("n", 3, "h", "w")
    a, b = (net.op("Conv", x, net.weight(4, 3, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1]) for _ in range(2))
    up = net.op("ConvTranspose", a, net.weight(4, 6, 2, 2), strides=[2, 2])
    pooled = net.op("MaxPool", net.op("Add", a, b), kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)
    model = net.model(up, pooled)
    found = infer(model)
    first, second, wide = (found.dims[name] or () for name in (a, b, up))
    assert first == second
    assert wide == (N, Dim.of(6), first[2] * Dim.of(2), first[3] * Dim.of(2))
    for height in (7, 12):
        assert not disagreements(found, run_all(model, {x: net.rng.random((2, 3, height, 9)).astype(np.float32)}))


def _branch(*nodes: onnx.NodeProto) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), "branch", [], [onnx.ValueInfoProto(name=nodes[-1].output[0])])


@pytest.mark.parametrize(("middle", "rank"), [(1, 2), (4, 3), ("m", None)])
def test_an_if_takes_the_branch_that_its_condition_says(middle: int | str, rank: int | None) -> None:
    net = Net()
    x = net.input("n", middle, 8)
    one = net.op("Equal", _axis(net, x, 1), net.ints(1))
    axes = net.ints(1)
    y = net.op(
        "If", one,
        then_branch=_branch(helper.make_node("Squeeze", [x, axes], ["inner"])),
        else_branch=_branch(helper.make_node("Identity", [x], ["inner"])),
    )  # fmt: skip
    net.ranks[y] = 3
    model = net.model(y)
    model.graph.output[0].type.Clear()
    dims = infer(model).dims[y]
    assert (None if dims is None else len(dims)) == rank


def test_functions_of_the_model_are_walked() -> None:
    body = [
        helper.make_node("Shape", ["a"], ["s"]),
        helper.make_node("Flatten", ["a"], ["flat"]),
        onnx.helper.make_node("Softmax", ["flat"], ["b"]),
    ]
    body[1].attribute.append(onnx.AttributeProto(name="axis", ref_attr_name="at", type=onnx.AttributeProto.INT))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    function = helper.make_function("own", "F", ["a"], ["b", "s"], body, opsets[:1], attributes=["at"])
    graph = helper.make_graph(
        [helper.make_node("F", ["x"], ["y", "z"], domain="own", at=2)], "g",
        [helper.make_tensor_value_info("x", 1, ["n", 3, 4])], [onnx.ValueInfoProto(name="y"), onnx.ValueInfoProto(name="z")],
    )  # fmt: skip
    found = infer(helper.make_model(graph, opset_imports=opsets, functions=[function]))
    assert found.dims["y"] == (Dim.of(3) * N, Dim.of(4))
    assert found.values["z"] == (N, Dim.of(3), Dim.of(4))


def test_what_nobody_knows_stays_open_and_what_the_file_says_is_used() -> None:
    nodes = [helper.make_node("Odd", ["x"], ["a"], domain="elsewhere"), helper.make_node("Odd", ["a"], ["b"], domain="elsewhere")]
    nodes += [helper.make_node("Relu", ["b"], ["c"]), helper.make_node("Concat", ["b"], ["broken"])]
    stated = [helper.make_tensor_value_info("b", 1, ["n", "q", 4])]
    inputs = [helper.make_tensor_value_info("x", 1, ["n", "?", "?"])]
    graph = helper.make_graph(nodes, "g", inputs, [onnx.ValueInfoProto(name="c")], value_info=stated)
    found = infer(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("elsewhere", 1)]))
    assert found.dims["a"] is None
    dims, x = found.dims["c"], found.dims["x"]
    assert dims is not None
    assert x is not None
    assert (dims[0], dims[2]) == (N, Dim.of(4))
    assert dims[1] != Dim.of("q")
    assert x[1] != x[2]


def test_an_integer_of_the_file_refines_a_symbol_but_never_contradicts() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    stated = [helper.make_tensor_value_info("y", 1, [2, 9])]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", 1, ["n", 8])], stated)
    assert infer(helper.make_model(graph)).dims["y"] == (Dim.of(2), Dim.of(8))


def test_the_index_passes_on_what_was_inferred() -> None:
    net = Net()
    x = net.input("n", "m", 8)
    shape = net.op("Shape", x)
    graph = Graph(net.model(net.op("Reshape", x, net.ints(0, -1)), shape))
    y = graph.outputs[0]
    assert graph.dims(y) == (N, Dim.of(8) * M)
    assert graph.shape(y) == ("n", "8*m")
    assert graph.types[y] == (TensorProto.FLOAT, ("n", "8*m"))
    assert graph.values(shape) == (N, M, Dim.of(8))
    assert graph.dims("nothing") is graph.values("nothing") is graph.shape("nothing") is None


# -- whole models -------------------------------------------------------------------------------------------------------------


def _feed(model: onnx.ModelProto, open_size: int) -> dict[str, Any]:
    rng = np.random.default_rng(open_size)
    listed = {item.name for item in model.graph.initializer}
    feed = {}
    for info in model.graph.input:
        if info.name not in listed:
            tensor = info.type.tensor_type
            sizes = [size.dim_value if size.dim_value > 0 else open_size for size in tensor.shape.dim]
            feed[info.name] = rng.random(sizes).astype(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return feed


MODELS = [*(SAMPLES / f"{name}.onnx" for name in ("lenet5", "lenet300", "resnet8")),
          *(SHARED / f"{name}.onnx" for name in ("gtcrn", "ultraface_rfb320", "dtln_2", "mesonet", "yunet_n"))]  # fmt: skip


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_runs_agree(path: Any) -> None:
    if not path.exists():
        pytest.skip("the shared models are not here")
    model = onnx.load(str(path))
    found = infer(model)
    assert all(found.dims.get(name) is not None for node in model.graph.node for name in node.output if name)
    for open_size in (1, 3):
        assert not disagreements(found, run_all(model, _feed(model, open_size)))


def test_a_broken_model_never_stops_the_walk() -> None:
    original = onnx.load(str(SAMPLES / "resnet8.onnx"))
    for seed in range(60):
        rng = np.random.default_rng(seed)
        model = onnx.ModelProto.FromString(original.SerializeToString())
        nodes = model.graph.node
        for _ in range(6):
            node, other = (nodes[int(rng.integers(len(nodes)))] for _ in range(2))
            node.op_type = rng.choice(["Unsqueeze", "Constant", "Slice", "Loop", "If", "LSTM", "Resize", other.op_type])
            del node.input[int(rng.integers(1, 3)) :]
            for item in node.attribute[:1]:
                item.ints.extend([3, -7])
        assert infer(model).dims


@pytest.fixture(scope="module")
def standard_cases() -> list[Any]:
    """ONNX's own examples of single nodes, with their inputs and outputs."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [case for case in collect_testcases(None) if case.model is not None and case.data_sets]


@pytest.mark.parametrize("given", [True, False], ids=["integers known", "nothing known"])
def test_the_examples_of_the_standard_agree(standard_cases: list[Any], given: bool) -> None:
    """Sizes of inputs are symbols, outputs are not annotated; `given` makes constants of small integer inputs."""
    checked = 0
    for case in standard_cases:
        inputs, outputs = case.data_sets[0]
        if not all(isinstance(value, (np.ndarray, np.generic)) for value in (*inputs, *outputs)):
            continue
        model = onnx.ModelProto.FromString(case.model.SerializeToString())
        graph = model.graph
        real = {info.name: np.asarray(value) for info, value in zip((*graph.input, *graph.output), (*inputs, *outputs), strict=True)}
        for info in graph.output:
            info.type.Clear()
        for info in list(graph.input):
            for axis, size in enumerate(info.type.tensor_type.shape.dim):
                size.dim_param = f"{info.name}_{axis}"
            if given and real[info.name].dtype.kind in "iub" and real[info.name].size <= 64:
                graph.initializer.append(numpy_helper.from_array(real[info.name], info.name))
                graph.input.remove(info)
        assert not disagreements(infer(model), real), case.name
        checked += 1
    assert checked > 500


def test_the_judge_can_fail() -> None:
    model = onnx.load(str(MODELS[0]))
    found, real = infer(model), run_all(model, _feed(model, 3))
    name = model.graph.output[0].name
    found.dims[name] = (Dim.of(10), Dim.of(10))
    assert len(disagreements(found, real)) == 1
    found.dims[name] = (Dim.of("batch"), Dim.of("batch"))
    assert disagreements(found, real)
    found.dims[name] = None
    assert not disagreements(found, real)
