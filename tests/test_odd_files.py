"""Files that are not as exporters write them today: unknown domains, weights in several files, leftovers of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from builders import Net
from helpers import SAMPLES, digits, run
from onnx import TensorProto, helper, numpy_helper

import relief_onnx
from relief_onnx.errors import DataError, ModelError, NothingPrunedError
from relief_onnx.graph import Graph
from relief_onnx.ordering import sort_nodes
from relief_onnx.session import LOAD_ERRORS, Session

QONNX = "qonnx.custom_op.general"


def finished(net: Net, *outputs: str, domains: tuple[str, ...] = (), functions: Any = (), opset: int = 17) -> onnx.ModelProto:
    """Without ONNX's shape inference, which refuses what it does not know."""
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    inputs = [helper.make_tensor_value_info(name, kind, shape) for name, shape, kind in net.inputs]
    tensors = [numpy_helper.from_array(value, name) for name, value in net.initializers.items()]
    graph = helper.make_graph(net.nodes, "odd", inputs, infos, tensors)
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=functions)


def dense(net: Net, x: str, inputs: int, out: int) -> str:
    return str(net.op("Gemm", x, net.weight(inputs, out), net.bias(out)))


def feed(count: int = 40, width: int = 6) -> dict[str, Any]:
    return {"x1": np.random.default_rng(0).standard_normal((count, width)).astype(np.float32)}


def custom(domain: str, operator: str, inputs: int = 1, functions: Any = ()) -> onnx.ModelProto:
    """Dense, the operator on what it makes (with constants as further inputs), dense."""
    net = Net()
    h = dense(net, net.input("N", 6), 6, 8)
    extra = [net.constant(np.float32(0.25)) for _ in range(inputs - 1)]
    y = net.op(operator, h, *extra)
    net.nodes[-1].domain = domain
    return finished(net, dense(net, y, 8, 3), domains=(domain,), functions=functions)


@pytest.mark.parametrize(
    ("domain", "operator", "inputs"),
    [("com.acme", "Magic", 1), (QONNX, "Quant", 4), (QONNX, "BipolarQuant", 2), (QONNX, "Trunc", 5), ("com.microsoft", "NoSuchThing", 1)],
)
@pytest.mark.parametrize("options", [(), ("--criterion", "magnitude"), ("--granularity", "channel")])
def test_operators_that_onnxruntime_does_not_know(
    domain: str, operator: str, inputs: int, options: tuple[str, ...], tmp_path: Path
) -> None:
    onnx.save(custom(domain, operator, inputs), tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", feed()["x1"])
    result = run("prune", tmp_path / "m.onnx", "--data", tmp_path / "x.npy", *options, "--quiet")
    assert result.exit_code == 1
    assert f"operator {operator} of domain {domain}" in result.output.replace("\n", " ")
    assert "local function" in result.output.replace("\n", " ")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["m.onnx", "x.npy"]


def test_quantize_names_the_operator_too(tmp_path: Path) -> None:
    onnx.save(custom("com.acme", "Magic"), tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", feed()["x1"])
    for activations in ("uint8", "none"):
        result = run("quantize", tmp_path / "m.onnx", "--data", tmp_path / "x.npy", "--activations", activations, "--quiet")
        assert result.exit_code == 1
        assert "operator Magic of domain com.acme" in result.output.replace("\n", " ")
        assert sorted(item.name for item in tmp_path.iterdir()) == ["m.onnx", "x.npy"]


def test_the_same_operator_as_a_local_function_works() -> None:
    """Quant(x, scale, zero point, bits) of QONNX, reduced to what it does with a scale."""
    nodes = [
        helper.make_node("Div", ["x", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "zero"], ["moved"]),
        helper.make_node("Round", ["moved"], ["whole"]),
        helper.make_node("Sub", ["whole", "zero"], ["back"]),
        helper.make_node("Mul", ["back", "scale"], ["y"]),
    ]
    function = helper.make_function(QONNX, "Quant", ["x", "scale", "zero", "bits"], ["y"], nodes, [helper.make_opsetid("", 17)])
    result = relief_onnx.prune(custom(QONNX, "Quant", 4, [function]), [feed()], keep="50%")
    assert [row["status"] for row in result.report["layers"]] == ["pruned", "pruned"]


def split(folder: Path, files: int = 3) -> Path:
    """A model whose weights lie in several files, two in each."""
    net = Net()
    x = net.input("N", 6)
    for width, out in ((6, 40), (40, 40), (40, 3)):
        x = dense(net, x, width, out)
    model, folder_of = finished(net, x), folder / "m.onnx"
    for place, item in enumerate(model.graph.initializer):
        name = f"part{place * files // len(model.graph.initializer)}.bin"
        with (folder / name).open("ab") as stream:
            start = stream.tell()
            stream.write(item.raw_data)
        onnx.external_data_helper.set_external_data(item, name, offset=start, length=len(item.raw_data))
        item.ClearField("raw_data")
        item.data_location = TensorProto.EXTERNAL
    folder_of.write_bytes(model.SerializeToString())
    return folder_of


def test_weights_in_several_files(tmp_path: Path) -> None:
    path, out = split(tmp_path), tmp_path / "out" / "pruned.onnx"
    out.parent.mkdir()
    assert len(list(tmp_path.glob("part*.bin"))) == 3
    result = relief_onnx.prune(path, [feed()], keep="50%", output=out)
    assert result.report["totals"]["kept_percent"] == pytest.approx(50, abs=0.1)
    assert [item.name for item in out.parent.iterdir()] == ["pruned.onnx"]  # the weights are inside
    assert Session(onnx.load(out), 1).run(feed(), None)[0].shape == (40, 3)


@pytest.mark.parametrize(
    ("damage", "sentence"), [("missing", "part1.bin of initializer w6 is missing"), ("short", "part1.bin is too short for")]
)
def test_a_part_that_is_missing_or_short_is_named(damage: str, sentence: str, tmp_path: Path) -> None:
    path = split(tmp_path)
    part = tmp_path / "part1.bin"
    if damage == "missing":
        part.unlink()
    else:
        part.write_bytes(part.read_bytes()[:-8])
    with pytest.raises(ModelError, match=sentence):
        relief_onnx.prune(path, [feed()], keep="50%", output=tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def leftovers() -> onnx.ModelProto:
    """Identity chains, a weight that nobody reads, training_info with the gradients' nodes, Dropout that is switched off."""
    net = Net()
    x = net.input("N", 6)
    for _ in range(3):
        x = net.op("Identity", x)
    weight = net.weight(6, 16)
    for _ in range(2):
        weight = net.op("Identity", weight)
    x = net.op("Relu", net.op("Gemm", x, weight, net.bias(16)))
    x = net.op("Dropout", x, net.constant(np.float32(0.5)), net.constant(np.array(False)))
    x = net.op("Identity", dense(net, net.op("Identity", x), 16, 3))
    net.constant(np.ones((30, 40), np.float32), "unused")
    model = finished(net, x)
    info = model.training_info.add()
    info.algorithm.name = "steps"
    info.algorithm.node.append(helper.make_node("Adam", ["R", "T", "X", "G", "V", "H"], ["A", "B", "C"], domain="ai.onnx.preview.training"))
    return model


@pytest.mark.parametrize(
    "options", [{"keep": "50%"}, {"granularity": "channel", "keep": "50%", "round_to": 1}, {"repair": "least-squares", "keep": "40%"}]
)
def test_leftovers_of_training(options: dict[str, Any]) -> None:
    model = leftovers()
    result = relief_onnx.prune(model, [feed()], **options)
    rows = result.report["layers"]
    assert [row["op"] for row in rows] == ["Gemm", "Gemm"]
    assert all(row["status"] == "pruned" for row in rows)
    assert any("training" in warning for warning in result.report["warnings"])
    assert result.model.training_info == model.training_info


def batch_norm(training: int, opset: int = 15) -> onnx.ModelProto:
    net = Net(opset=opset)
    x = net.op("Conv", net.input("N", 3, 6, 6), net.weight(8, 3, 3, 3), net.bias(8))
    vectors = [net.constant(value.astype(np.float32)) for value in (np.ones(8), np.zeros(8), np.zeros(8), np.ones(8))]
    outputs: Any = net.op("BatchNormalization", x, *vectors, outputs=3 if training else 1, training_mode=training)
    y = outputs[0] if training else outputs
    return finished(net, net.op("Conv", net.op("Relu", y), net.weight(4, 8, 1, 1)), opset=opset)


@pytest.mark.parametrize(
    "options", [{"keep": "50%"}, {"granularity": "channel", "keep": "50%", "round_to": 1}, {"repair": "least-squares", "keep": "50%"}]
)
def test_batch_normalization_in_training_mode(options: dict[str, Any]) -> None:
    """It takes the statistics of the batch: it is pruned, or the reason is clear."""
    data = {"x1": np.random.default_rng(0).standard_normal((32, 3, 6, 6)).astype(np.float32)}
    if options.get("granularity") == "channel":
        with pytest.raises(NothingPrunedError, match="in training mode, so it sees the whole batch"):
            relief_onnx.prune(batch_norm(1), [data], **options)
        return
    result = relief_onnx.prune(batch_norm(1), [data], **options)
    assert any("training mode" in warning for warning in result.report["warnings"])
    assert not any("training mode" in warning for warning in relief_onnx.prune(batch_norm(0), [data], **options).report["warnings"])


def test_dropout_in_training_mode_is_told() -> None:
    """What comes out is random."""
    net = Net()
    x = net.op("Dropout", dense(net, net.input("N", 6), 6, 8), net.constant(np.float32(0.5)), net.constant(np.array(True)))
    result = relief_onnx.prune(finished(net, dense(net, x, 8, 3)), [feed()], keep="50%")
    assert any("random" in warning for warning in result.report["warnings"])


def test_gradient_nodes_are_named(tmp_path: Path) -> None:
    net = Net()
    x = net.input("N", 6)
    y = dense(net, x, 6, 3)
    net.op("Gradient", x, xs=[x], y=y)
    net.nodes[-1].domain = "ai.onnx.preview.training"
    with pytest.raises(ModelError, match="Gradient of domain ai"):
        relief_onnx.prune(finished(net, y, domains=("ai.onnx.preview.training",)), [feed()], keep="50%")


def parsed(text: str, seed: int = 0, **shapes: tuple[int, ...]) -> onnx.ModelProto:
    """A model whose nodes have no names, with random weights of these shapes."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    rng = np.random.default_rng(seed)
    for name, shape in shapes.items():
        value = rng.standard_normal(shape) / np.sqrt(max(np.prod(shape[:-1]), 1))
        model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    return model


def samples(*shape: int, count: int = 20) -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    return [{"x": (0.5 + rng.standard_normal((8, *shape))).astype(np.float32)} for _ in range(count)]


@pytest.mark.parametrize("repair", ["none", "least-squares"])
def test_nodes_without_names_are_called_the_same_before_and_after_new_nodes(repair: str) -> None:
    """Means move into a new Add behind each product, which must not rename those that come after."""
    model = parsed(
        "net (float[N, 8] x) => (float[N, 4] y) { a = MatMul(x, u) r = Relu(a) b = MatMul(r, v) s = Relu(b) y = MatMul(s, w) }",
        u=(8, 16), v=(16, 16), w=(16, 4),
    )  # fmt: skip
    report = relief_onnx.prune(model, samples(8), granularity="weight", keep="50%", repair=repair, threads=1).report
    names = ["MatMul#0", "MatMul#1", "MatMul#2"]
    assert [row["node"] for row in report["layers"]] == names
    assert report["mean_shift"]["moved"] == names
    assert [row["node"] for row in report["repair"]["layers"]] == (names if repair != "none" else [])


def test_a_name_that_looks_like_one_of_ours_is_left_to_its_node() -> None:
    model = parsed("net (float[N, 8] x) => (float[N, 4] y) { a = MatMul(x, u) r = Relu(a) y = MatMul(r, w) }", u=(8, 16), w=(16, 4))
    model.graph.node[2].name = "MatMul#0"
    assert Graph(model).names == ["MatMul#1", "Relu#0", "MatMul#0"]


# A layer whose bias another layer makes, in a network that has no other use for it.
COMPUTED = {
    "Gemm": "c = Gemm(x, u) a = Gemm(x, v, c) r = Relu(a) y = Gemm(r, w)",
    "Gemm, twice of it": "c = Gemm(x, u) a = Gemm<beta = 2.0>(x, v, c) r = Relu(a) y = Gemm(r, w)",
    "Conv": "m = ReduceMean<axes = [0], keepdims = 0>(x) c = MatMul(m, u) p = Unsqueeze(x, ends) a = Conv(p, k, c) r = Relu(a)"
    " f = Flatten(r) y = Gemm(f, w)",
}


@pytest.mark.parametrize("options", [{"granularity": "weight"}, {"granularity": "channel", "round_to": 1}])
@pytest.mark.parametrize("case", COMPUTED)
def test_a_bias_that_other_layers_make(case: str, options: dict[str, Any]) -> None:
    """What makes it loses no units that are read there, and counts for the output."""
    held = "<int64[2] ends = {2, 3}>" if case == "Conv" else ""
    own: dict[str, tuple[int, ...]] = {"k": (16, 8, 1, 1)} if case == "Conv" else {"v": (8, 16)}
    model = parsed(f"net (float[N, 8] x) => (float[N, 4] y) {held} {{ {COMPUTED[case]} }}", u=(8, 16), w=(16, 4), **own)
    if options["granularity"] == "channel":
        with pytest.raises(NothingPrunedError, match="is computed or stored where it cannot be cut"):
            relief_onnx.prune(model, samples(8), keep="60%", threads=1, **options)
        return
    report = relief_onnx.prune(model, samples(8), keep="60%", threads=1, **options).report
    assert next(row for row in report["layers"] if row["weight"] == "u")["weights_kept"] > 32
    assert report["quality"]["agreement"]["y"]["cosine"] > 0.95


@pytest.mark.parametrize("what", ["a list", "another branch"])
def test_repair_knows_what_a_node_adds_that_is_no_bias(what: str) -> None:
    """The equations are for what is left when it is taken off, as they are where an Add stands behind the node."""
    both = "c = Gemm(x, u) {} r = Relu(a) y = Gemm(r, w)"
    texts = (both.format(step) for step in ("a = Gemm(x, v, c)", "d = Gemm(x, v) a = Add(d, c)"))
    texts = (text.replace("c = Gemm(x, u) ", "") if what == "a list" else text for text in texts)
    shapes: dict[str, tuple[int, ...]] = {"v": (8, 16), "w": (16, 4)} | ({} if what == "a list" else {"u": (8, 16)})
    options = {"granularity": "weight", "criterion": "magnitude", "alpha": 0.6, "repair": "least-squares", "mean_shift": "off"}
    found = []
    for text in texts:
        model = parsed(f"net (float[N, 8] x) => (float[N, 4] y) {{ {text} }}", **shapes)
        if what == "a list":  # in a node
            model.graph.node.insert(0, helper.make_node("Constant", [], ["c"], value_floats=np.linspace(-3, 3, 16)))
        result = relief_onnx.prune(model, samples(8), threads=1, **options)
        found.append({item.name: numpy_helper.to_array(item) for item in result.masked.graph.initializer})
    np.testing.assert_allclose(found[0]["v"], found[1]["v"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("criterion", ["flow", "relief"])
def test_weights_without_numbers_are_no_layers(criterion: str) -> None:
    """An output of no width, and an empty tensor that is joined to others."""
    text = "net (float[N, 8] x) => (float[N, 4] y, float[N, 0] z) { a = MatMul(x, u) b = Concat<axis = 0>(a, none) r = Relu(b) "
    model = parsed(text + "y = MatMul(r, v) z = MatMul(r, w) }", u=(8, 16), v=(16, 4), none=(0, 16), w=(16, 0))
    result = relief_onnx.prune(model, samples(8), criterion=criterion, keep="60%", threads=1)
    assert {row["weight"] for row in result.report["layers"]} == {"u", "v"}
    assert Session(result.model, 1).run(samples(8)[0], None)[1].shape == (8, 0)


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_an_empty_tensor_beside_channels_keeps_its_shape(granularity: str) -> None:
    """Its rows are no units that nobody reads."""
    text = "net (float[8, 8] x) => (float[8, 4] y) { a = MatMul(x, u) r = Relu(a) b = Concat<axis = 1>(r, none) y = MatMul(b, v) }"
    result = relief_onnx.prune(parsed(text, u=(8, 16), v=(16, 4), none=(8, 0)), samples(8), granularity=granularity, keep="60%", threads=1)
    assert {item.name: list(item.dims) for item in result.model.graph.initializer}["none"] == [8, 0]


@pytest.mark.parametrize(
    "options", [{"keep": "50%"}, {"keep": "60%", "granularity": "channel"}, {"keep": "50%", "repair": "least-squares"}]
)
def test_an_input_without_a_shape(options: dict[str, Any], tmp_path: Path) -> None:
    """Takes whatever is given, samples along the first axis, and is left without one."""
    text = "net (float[N, 8] x) => (float[N, 4] y) { a = Gemm(x, u) r = Relu(a) b = Gemm(r, v) s = Relu(b) y = Gemm(s, w) }"
    bare = parsed(text, u=(8, 16), v=(16, 16), w=(16, 4))
    for info in (*bare.graph.input, *bare.graph.output):
        info.type.tensor_type.ClearField("shape")
    result = relief_onnx.prune(bare, samples(8), threads=1, round_to=1, **options)
    assert not result.model.graph.input[0].type.tensor_type.HasField("shape")
    assert result.report["quality"]["samples"] == 160
    assert result.report["totals"]["weights_kept"] <= 0.65 * result.report["totals"]["weights"]
    cut, masked = (Session(model).run(samples(8)[0])[0] for model in (result.model, result.masked))
    np.testing.assert_allclose(cut, masked, rtol=1e-5, atol=1e-6)
    onnx.save(bare, tmp_path / "m.onnx")
    np.savetxt(tmp_path / "x.csv", samples(8)[0]["x"], delimiter=",")
    assert run("check-data", tmp_path / "m.onnx", tmp_path / "x.csv").exit_code == 0
    np.save(tmp_path / "x.npy", np.float32(1))
    refused = run("check-data", tmp_path / "m.onnx", tmp_path / "x.npy")
    assert refused.exit_code == 1
    assert "of any shape" in refused.output


@pytest.mark.parametrize("axes", [2, 3])
def test_the_data_say_how_many_axes_an_input_has(axes: int) -> None:
    """Without that nothing is known of what a MatMul makes."""
    bare = parsed("net (float[N, 8] x) => (float[N, 4] y) { a = MatMul(x, u) r = Relu(a) y = MatMul(r, v) }", u=(8, 16), v=(16, 4))
    for info in (*bare.graph.input, *bare.graph.output):
        info.type.tensor_type.ClearField("shape")
    feed = {"x": samples(8)[0]["x"].reshape(-1, *[2] * (axes - 2), 8)}
    result = relief_onnx.prune(bare, [feed], threads=1, round_to=1, keep="60%", granularity="channel")
    assert any(f"followed for {axes} axes" in warning for warning in result.report["warnings"])
    assert not result.model.graph.input[0].type.tensor_type.HasField("shape")
    shapes = {item.name: list(item.dims) for item in result.model.graph.initializer}
    assert (shapes["u"], shapes["v"][1]) == ([8, shapes["v"][0]], 4)
    assert shapes["v"][0] < 12


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_samples_that_differ_in_their_axes_are_refused(granularity: str) -> None:
    bare = parsed("net (float[N, 8] x) => (float[N, 4] y) { a = MatMul(x, u) r = Relu(a) y = MatMul(r, v) }", u=(8, 16), v=(16, 4))
    for info in (*bare.graph.input, *bare.graph.output):
        info.type.tensor_type.ClearField("shape")
    x = samples(8)[0]["x"]
    with pytest.raises(DataError, match="Input x has 2 and 3 axes in different samples"):
        relief_onnx.prune(bare, [{"x": x}, {"x": x.reshape(-1, 2, 8)}], threads=1, keep="60%", granularity=granularity)


@pytest.mark.parametrize("criterion", ["flow", "flow-obs", "relief"])
def test_a_sequence_among_the_outputs(criterion: str) -> None:
    """The other output sorts the samples; both are compared."""
    text = "net (float[N, 8] x) => (seq(float[N, K]) q, float[N, 4] y) { a = MatMul(x, u) r = Relu(a) y = MatMul(r, v) "
    model = parsed(text + "q = SequenceConstruct(y, r) }", u=(8, 16), v=(16, 4))
    repair = "least-squares" if criterion == "flow-obs" else "none"
    result = relief_onnx.prune(model, samples(8), criterion=criterion, keep="50%", repair=repair, threads=1)
    assert set(result.report["quality"]["agreement"]) == {"q", "y"}
    assert [part.shape for part in Session(result.model).run(samples(8)[0])[0]] == [(8, 4), (8, 16)]


@pytest.mark.parametrize("options", [{}, {"repair": "least-squares"}, {"granularity": "channel", "repair": "least-squares"}])
def test_an_output_whose_size_depends_on_the_data(options: dict[str, Any]) -> None:
    """As those of detectors: where it differs there is nothing to compare, which is told; other outputs are compared."""
    text = "net (float[N, 40] x) => (float[M] y, float[N, 4] s) <float z = {0.0}, int64[1] flat = {-1}> "
    text += "{ h = Gemm(x, w) r = Relu(h) s = Gemm(r, v) f = Reshape(s, flat) c = Greater(f, z) y = Compress<axis = 0>(f, c) }"
    data = samples(40, count=40)
    result = relief_onnx.prune(parsed(text, w=(40, 64), v=(64, 4)), data, keep="40%", threads=1, **options)
    assert set(result.report["quality"]["agreement"]) == {"s"}
    assert any("output y has another size" in text for text in result.report["warnings"])


@pytest.mark.parametrize("options", [{"granularity": "weight", "repair": "least-squares"}, {"granularity": "channel", "round_to": 1}])
@pytest.mark.parametrize("noise", ["RandomNormalLike(v)", "RandomUniform<shape = [8, 6]>()", "Bernoulli(b)"])
def test_networks_that_draw_numbers(noise: str, options: dict[str, Any]) -> None:
    """As variational encoders do: the original, the masked and the pruned model draw the same, and the file is left without a seed."""
    text = f"a = MatMul(x, e) h = Relu(a) m = MatMul(h, u) v = MatMul(h, s) n = {noise} t = Exp(v) p = Mul(n, t) z = Add(m, p)"
    text = text.replace("n = Bernoulli", "b = Sigmoid(v) n = Bernoulli")
    model = parsed(
        f"net (float[8, 8] x) => (float[8, 4] y) {{ {text} d = MatMul(z, w) r = Relu(d) y = MatMul(r, o) }}",
        e=(8, 24), u=(24, 6), s=(24, 6), w=(6, 24), o=(24, 4),
    )  # fmt: skip
    found = relief_onnx.prune(model, samples(8), keep="70%", threads=1, **options)
    assert found.report["quality"]["agreement"]["y"]["cosine"] > 0.9
    assert found.model == relief_onnx.prune(model, samples(8), keep="70%", threads=1, **options).model
    drawing = [node for node in found.model.graph.node if node.op_type == noise.partition("<")[0].partition("(")[0]]
    assert [[item.name for item in node.attribute] for node in drawing] == [["shape"] if "shape" in noise else []]


CHOOSING = "z = MatMul(r, g) f = Greater(z, zero) q = Squeeze(f, one) n = NonZero(q) i = Squeeze(n, first) e = Gather(r, i)"
EXPERT = {
    "MatMul": "p = MatMul(e, v) s = Relu(p) t = MatMul(s, w)",
    "Conv": "c = Unsqueeze(e, ends) p = Conv(c, v) s = Relu(p) o = Conv(s, w) t = Squeeze(o, ends)",
}


@pytest.mark.parametrize("options", [{"granularity": "weight"}, {"granularity": "channel", "round_to": 1, "criterion": "flow"}])
@pytest.mark.parametrize("expert", EXPERT)
def test_rows_that_each_network_chooses_itself(expert: str, options: dict[str, Any]) -> None:
    """An expert of a mixture meets other rows, and another number of them, once what chooses lost weights: such batches are left out."""
    held = "<float zero = {0.0}, int64[1] one = {1}, int64[1] first = {0}, int64[2] ends = {2, 3}>"
    text = f"a = MatMul(x, u) r = Relu(a) {CHOOSING} {EXPERT[expert]} l = Unsqueeze(i, one) k = ScatterND(r, l, t) y = MatMul(k, h)"
    own = {"v": (24, 16), "w": (16, 24)} if expert == "Conv" else {"v": (16, 24), "w": (24, 16)}
    shapes = {name: (*shape, 1, 1) if expert == "Conv" else shape for name, shape in own.items()}
    model = parsed(f"net (float[N, 8] x) => (float[N, 4] y) {held} {{ {text} }}", u=(8, 16), g=(16, 1), h=(16, 4), **shapes)
    report = relief_onnx.prune(model, samples(8), keep="50%", repair="least-squares", skip="^g$", threads=1, **options).report
    assert {row["weight"] for row in report["layers"] if row["status"] == "pruned"} >= {"v", "w"}
    reasons = {row["weight"]: row["reason"] for row in report["repair"]["layers"]}
    assert {reasons["v"], reasons["w"]} <= {"", "it meets other rows once pruned"}
    assert reasons["u"] == reasons["h"] == ""
    assert report["quality"]["agreement"]["y"]["cosine"] > 0.8


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("criterion", ["flow", "flow-obs", "relief"])
def test_sparse_initializers(flat: bool, criterion: str) -> None:
    """Pruned like the same weights in a dense tensor."""
    net = Net()
    y = net.op("MatMul", net.op("Relu", dense(net, net.input("N", 6), 6, 40)), net.weight(40, 30))
    model = finished(net, y)
    stored = next(item for item in model.graph.initializer if list(item.dims) == [40, 30])
    values = numpy_helper.to_array(stored) * (np.random.default_rng(1).random((40, 30)) < 0.6)
    stored.CopyFrom(numpy_helper.from_array(values, stored.name))
    sparse = onnx.ModelProto()
    sparse.CopyFrom(model)
    places = np.flatnonzero(values) if flat else np.argwhere(values)
    held = numpy_helper.from_array(values[values != 0], stored.name)
    sparse.graph.sparse_initializer.append(helper.make_sparse_tensor(held, numpy_helper.from_array(places, "places"), [40, 30]))
    sparse.graph.initializer.remove(next(item for item in sparse.graph.initializer if item.name == stored.name))
    options: Any = {"keep": "40%", "criterion": criterion, "threads": 1, "repair": "least-squares" if criterion == "flow-obs" else "none"}
    found, wanted = (relief_onnx.prune(item, [feed()], **options) for item in (sparse, model))
    assert found.model.graph.SerializeToString() == wanted.model.graph.SerializeToString()
    # What is left alone is stored compactly again.
    kept = relief_onnx.prune(sparse, [feed()], skip="^" + stored.name + "$", **options)
    np.testing.assert_allclose(Session(kept.model).run(feed())[0], Session(kept.masked).run(feed())[0], rtol=1e-5, atol=1e-6)
    assert stored.name not in {item.name for item in kept.model.graph.initializer}


@pytest.mark.parametrize("options", [{}, {"granularity": "channel", "keep": "60%"}, {"keep": "50%", "repair": "least-squares"}])
def test_nodes_that_are_not_sorted(options: dict[str, Any]) -> None:
    """As onnxruntime's float16 converter writes them; the result is that of the sorted file, and valid."""
    model = onnx.load(SAMPLES / "lenet5.onnx")  # of which there is one order only
    mixed = onnx.ModelProto()
    mixed.CopyFrom(model)
    nodes = [model.graph.node[index] for index in np.random.default_rng(0).permutation(len(model.graph.node))]
    del mixed.graph.node[:]
    mixed.graph.node.extend(nodes)
    with pytest.raises(onnx.checker.ValidationError, match="topologically sorted"):
        onnx.checker.check_model(mixed)
    results = [relief_onnx.prune(item, [{"image": digits(32)}], threads=1, **options) for item in (model, mixed)]
    onnx.checker.check_model(results[1].model, full_check=True)
    first, second = (Session(result.model).run({"image": digits(8)})[0] for result in results)
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5)
    assert results[0].report["totals"] == results[1].report["totals"]


def test_bodies_are_sorted_and_circles_stay() -> None:
    body = helper.make_graph([helper.make_node("Relu", ["b"], ["c"]), helper.make_node("Neg", ["a"], ["b"])], "body", [], [])
    choice = helper.make_node("If", ["flag"], ["y"], then_branch=body, else_branch=body)
    graph = helper.make_graph([choice, helper.make_node("Abs", ["x"], ["a"])], "graph", [], [])
    sort_nodes(graph.node)
    assert [node.op_type for node in graph.node] == ["Abs", "If"]  # what a body reads counts
    assert [node.op_type for node in graph.node[1].attribute[0].g.node] == ["Neg", "Relu"]
    circle = [helper.make_node("Relu", ["b"], ["a"]), helper.make_node("Neg", ["a"], ["b"]), helper.make_node("Abs", ["x"], ["y"])]
    graph = helper.make_graph(circle, "circle", [], [])
    sort_nodes(graph.node)
    assert list(graph.node) == circle


def transposed_before_gemm() -> onnx.ModelProto:
    """The weight is the first operand of a Gemm, so that a Transpose, which onnxruntime fuses into it, makes what the layer reads."""
    net = Net()
    h = net.op("Relu", dense(net, net.input("N", 6), 6, 8))
    y = net.op("Gemm", net.weight(5, 8), net.op("Transpose", h, perm=[1, 0]))
    return finished(net, net.op("Transpose", y, perm=[1, 0]))


@pytest.mark.parametrize(
    "options", [("--keep", "60%"), ("--criterion", "relief", "--keep", "60%"), ("--repair", "least-squares", "--keep", "50%")]
)
def test_a_probe_that_onnxruntime_breaks_by_rewriting_it(options: tuple[str, ...], tmp_path: Path) -> None:
    onnx.save(transposed_before_gemm(), tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", feed()["x1"])
    result = run("prune", tmp_path / "m.onnx", "--data", tmp_path / "x.npy", *options)
    assert result.exit_code == 0, result.output


def test_only_working_models_run_without_rewriting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where onnxruntime fails when it rewrites the graph, as before 1.32 where a Transpose that it fuses into a Gemm is an output."""
    load = onnxruntime.InferenceSession

    def breaking(content: bytes, options: onnxruntime.SessionOptions, **given: Any) -> onnxruntime.InferenceSession:
        if options.graph_optimization_level != onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL:
            raise LOAD_ERRORS[0]("it is gone")
        return load(content, options, **given)

    model = transposed_before_gemm()
    model.graph.output.append(helper.make_tensor_value_info(model.graph.node[-2].input[1], TensorProto.FLOAT, [8, "N"]))
    wanted = Session(model, working=True).run(feed())
    monkeypatch.setattr(onnxruntime, "InferenceSession", breaking)
    with pytest.raises(ModelError, match="cannot load the model"):
        Session(model)
    for found, value in zip(Session(model, working=True).run(feed()), wanted, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-6)
