"""The criterion flow from calibration to the file: budgets, floors, patterns, score files, means that move into biases, odd data."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from architectures import ARCHITECTURES
from builders import Net
from helpers import CALIB, LENET, SAMPLES, TEST, digits, run
from laws import assert_same_outputs
from numpy.typing import NDArray
from onnx import numpy_helper
from PIL import Image
from random_graphs import KINDS, STEPS, build
from test_relevance import EVENLY, residual

import relief_onnx
from relief_onnx import calibrate
from relief_onnx.data import open_dataset
from relief_onnx.decide import shrinks
from relief_onnx.errors import NothingPrunedError
from relief_onnx.flow import FlowMeasure
from relief_onnx.graph import Graph
from relief_onnx.layers import find
from relief_onnx.model import input_specs, prepare
from relief_onnx.pipeline import Result
from relief_onnx.probes import instrument
from relief_onnx.scoring import Scores

Array = NDArray[Any]
MODELS = ("lenet300", "lenet5", "resnet8")
GRANULARITIES = ("connection", "weight", "channel", "channel+connection", "channel+weight")
FEW = ("--data", CALIB, "--samples", 16)


@functools.cache
def sample(name: str) -> onnx.ModelProto:
    return onnx.load(str(SAMPLES / f"{name}.onnx"))


def feed(name: str, images: Array | None = None) -> dict[str, Array]:
    return {sample(name).graph.input[0].name: digits(16) if images is None else images}


@functools.cache
def other_digits() -> Array:
    """Digits that no calibration here has seen."""
    files = sorted(TEST.rglob("*.png"))[::29][:12]
    return np.stack([np.asarray(Image.open(file), np.float32)[None] / 255 for file in files])


def prune(name: str, images: Array | None = None, **options: Any) -> Result:
    if options.get("granularity", "").startswith("channel"):
        options.setdefault("round_to", 1)
    return relief_onnx.prune(sample(name), [feed(name, images)], **options)


def arrays(model: onnx.ModelProto) -> dict[str, Array]:
    return {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}


# -- the measurement -----------------------------------------------------------------------------------------------------------


def scored(name: str, feeds: list[Array], **options: Any) -> Scores:
    return relief_onnx.score(sample(name), [feed(name, images) for images in feeds], **options)


@pytest.mark.parametrize("granularity", ["connection", "weight"])
@pytest.mark.parametrize("name", MODELS)
def test_how_samples_are_split_does_not_matter(name: str, granularity: str) -> None:
    x = digits(16)
    whole = scored(name, [x], granularity=granularity)
    for parts in (np.split(x, [1, 5]), list(x[:, None])):
        other = scored(name, parts, granularity=granularity)
        for layer in whole:
            for part in ("score", "relevance", "flow", "means"):
                np.testing.assert_allclose(getattr(other[layer], part), getattr(whole[layer], part), rtol=0, atol=1e-6, err_msg=layer)


def floats_held(item: Any, seen: set[int]) -> int:
    """Numbers in all arrays that an object holds."""
    if id(item) in seen:
        return 0
    seen.add(id(item))
    if isinstance(item, np.ndarray):
        return item.size
    inside: list[Any] = []
    if isinstance(item, Mapping):
        inside = list(item.values())
    elif isinstance(item, list | tuple):
        inside = list(item)
    elif type(item).__module__.startswith("relief_onnx"):
        inside = list(vars(item).values())
    return sum(floats_held(each, seen) for each in inside)


def test_memory_does_not_grow_with_the_samples() -> None:
    graph = Graph(prepare(sample("resnet8")))
    held = []
    for count in (2, 32):
        measure = FlowMeasure(graph, find(graph), "weight")
        probe = instrument(graph, [item.tensor for item in measure.measurements])
        data = open_dataset([feed("resnet8", image[None]) for image in digits(count)], input_specs(graph.model))
        calibrate.run(probe, measure.measurements, data, limit=None, seed=0, threads=1, progress=lambda *_: None)
        held.append(sum(floats_held(item.statistic, set()) for item in measure.measurements))
    assert held[0] == held[1] > 1000


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert run("score", LENET, *FEW, "--seed", seed, "-o", tmp_path / f"{name}.npz", "--quiet").exit_code == 0
    a, b, c = ((tmp_path / f"{name}.npz").read_bytes() for name in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize("granularity", ["connection", "weight"])
def test_a_score_file_holds_what_was_measured(granularity: str, tmp_path: Path) -> None:
    options = ("--granularity", granularity)
    assert run("score", SAMPLES / "resnet8.onnx", *FEW, *options, "-o", tmp_path / "s.npz").exit_code == 0
    with np.load(tmp_path / "s.npz") as archive:
        found = dict(archive)
    layers = find(Graph(prepare(sample("resnet8")))).layers
    parts = ("score", "bias_score", "relevance", "flow", "input_mean")
    assert set(found) == {f"{layer.weight}/{part}" for layer in layers for part in parts}
    for layer in layers:
        score, bias, r, flow, means = (found[f"{layer.weight}/{part}"] for part in parts)
        assert score.shape == (layer.view.shape if granularity == "weight" else layer.view.shape[:2])
        np.testing.assert_allclose(score.reshape(len(score), -1).sum(1), 1, rtol=1e-12)
        assert not bias.any()  # a constant carries no flow
        assert (r.shape, means.shape) == ((layer.out_channels,), (layer.in_per_group * layer.groups, *layer.view.shape[2:]))
        np.testing.assert_array_equal(flow, score * r.reshape(-1, *(1,) * (score.ndim - 1)))
        assert 0 < r.sum() <= 1 + 1e-9
    np.testing.assert_allclose(found[f"{layers[0].weight}/relevance"].sum(), 1, rtol=1e-9)  # all of it goes through the first layer


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_pruning_with_a_score_file_is_pruning(granularity: str, tmp_path: Path) -> None:
    kind = () if granularity != "weight" and not granularity.endswith("+weight") else ("--granularity", "weight")
    assert run("score", LENET, *FEW, *kind, "-o", tmp_path / "s.npz").exit_code == 0
    for name, more in (("direct", ()), ("stored", ("--scores", tmp_path / "s.npz"))):
        options = (*FEW, "--granularity", granularity, "--keep", "40%", "-o", tmp_path / f"{name}.onnx", "--quiet")
        assert run("prune", LENET, *options, *more).exit_code == 0
    assert (tmp_path / "direct.onnx").read_bytes() == (tmp_path / "stored.onnx").read_bytes()


def test_a_file_of_a_local_score_is_cut_locally(tmp_path: Path) -> None:
    assert run("score", LENET, *FEW, "--criterion", "relief", "-o", tmp_path / "s.npz").exit_code == 0
    for name, more in (("direct", ("--criterion", "relief")), ("stored", ("--scores", tmp_path / "s.npz")), ("flow", ())):
        report = tmp_path / f"{name}.json"
        assert run("prune", LENET, *FEW, "--alpha", 0.9, "-o", tmp_path / f"{name}.onnx", "--json", report, *more).exit_code == 0
    content = {name: (tmp_path / f"{name}.onnx").read_bytes() for name in ("direct", "stored", "flow")}
    assert content["direct"] == content["stored"] != content["flow"]
    document = json.loads((tmp_path / "stored.json").read_text())
    assert (document["options"]["criterion"], document["flow"]) == ("relief", None)


@pytest.mark.parametrize("name", ["Det", "Gather"])
def test_the_report_names_what_was_passed_on_evenly(name: str) -> None:
    net = Net(seed=9)
    model = net.model(EVENLY[name](net))
    rng = np.random.default_rng(0)
    data = {
        item: rng.standard_normal([4 if isinstance(size, str) else size for size in shape]).astype(np.float32)
        for item, shape, kind in net.inputs
        if kind == onnx.TensorProto.FLOAT
    }
    data |= {item: np.array([4, 1]) for item, _, kind in net.inputs if kind == onnx.TensorProto.INT64}
    report = relief_onnx.prune(model, [data], keep="50%").report
    assert [(row["op"], bool(row["reason"])) for row in report["flow"]["evenly"]] == [(name, True)]
    assert report["flow"]["evenly"][0]["node"] in {node.name for node in model.graph.node}


# -- means that move into biases -------------------------------------------------------------------------------------------------


def biases(model: onnx.ModelProto) -> dict[str, str]:
    """The bias of every layer, by the layer's name."""
    return {layer.name: layer.bias.name for layer in find(Graph(prepare(model))).layers if layer.bias is not None}


@pytest.mark.parametrize("criterion", ["flow", "relief"])
@pytest.mark.parametrize("granularity", ["connection", "channel"])
def test_means_move_where_they_are_asked_to(granularity: str, criterion: str) -> None:
    given = {"criterion": criterion, "granularity": granularity, "keep": "50%", "storage": "dense"}
    off, on, auto = (prune("lenet5", mean_shift=shift, **given) for shift in ("off", "on", "auto"))
    before, untouched, changed = arrays(sample("lenet5")), arrays(off.masked), arrays(on.masked)
    assert all(np.array_equal(untouched[name], value) for name, value in before.items())
    assert off.report["mean_shift"] == {"moved": [], "left": []}
    for name, value in arrays(off.model).items():  # what is left is what was there, bit by bit; biases take over what dead units emit
        assert name.endswith(".bias") or np.isin(value[value != 0], before[name]).all(), name
    moved = on.report["mean_shift"]["moved"]
    assert moved
    named = biases(sample("lenet5"))
    assert {name for name, value in before.items() if not np.array_equal(changed[name], value)} == {named[layer] for layer in moved}
    assert all(len(row["reason"]) > 10 for row in on.report["mean_shift"]["left"])
    assert (auto.model.SerializeToString() == on.model.SerializeToString()) == (criterion == "flow")
    assert (auto.model.SerializeToString() == off.model.SerializeToString()) == (criterion == "relief")


def test_a_neuron_that_loses_a_constant_loses_nothing() -> None:
    """An input that is always 0.2 goes into the bias as a whole where the rest of the neuron stays."""
    net = Net(seed=2)
    x, a = net.input("N", 5), net.weight(5, 4)
    bias = net.bias(4)
    model = net.model(net.op("Add", net.op("MatMul", x, a), bias))
    data = net.rng.standard_normal((32, 5)).astype(np.float32)
    data[:, 3] = 0.2
    result = relief_onnx.prune(model, [{x: data}], alpha=0.999, storage="dense")
    expected = np.ones((4, 5), bool)
    expected[:, 3] = False
    assert np.array_equal(result.masks.keep[a], expected)
    value = arrays(model)
    shift = arrays(result.masked)[bias] - value[bias]
    (kept,) = (row["flow_kept"] for row in result.report["layers"])
    np.testing.assert_allclose(shift, kept**2 * 0.2 * value[a][3], rtol=1e-5)
    # The layer keeps all but some ten-thousandths of its flow, and that much less is moved.
    assert_same_outputs(result.masked, model, {x: data}, 1e-4)


@pytest.mark.parametrize(
    ("operators", "expected"),
    [
        ((), True),
        (("Relu",), True),
        (("Tanh",), False),
        (("Relu", "MaxPool"), True),
        (("Relu", "Transpose", "Identity"), True),
        (("Tanh", "Transpose"), False),
        (("Relu", "LeakyRelu"), False),
        (("Relu", "Unheard"), False),
    ],
)
def test_only_inputs_that_are_never_negative_shrink(operators: tuple[str, ...], expected: bool) -> None:
    net = Net(seed=0)
    x = net.input("N", 3, 4, 4)
    for operator in operators:
        given = {"MaxPool": {"kernel_shape": [1, 1]}, "Transpose": {"perm": [0, 1, 3, 2]}}.get(operator, {})
        x = net.op(operator, x, **given)
    graph = Graph(net.model(net.op("Conv", x, net.weight(2, 3, 1, 1))))
    assert shrinks(graph, x) == expected


def test_behind_signed_inputs_all_of_the_mean_moves() -> None:
    """The same neuron twice, behind Tanh and behind Relu: the first keeps its mean, the second hands over the square of what it keeps."""
    shifts = {}
    for operator in ("Tanh", "Relu"):
        net = Net(seed=2)
        x, a = net.input("N", 5), net.weight(5, 4)
        bias = net.bias(4)
        model = net.model(net.op("Add", net.op("MatMul", net.op(operator, x), a), bias))
        data = np.abs(net.rng.standard_normal((64, 5))).astype(np.float32)
        result = relief_onnx.prune(model, [{x: data}], keep="40%", granularity="weight", storage="dense")
        mean = (np.tanh(data) if operator == "Tanh" else data).mean(0, dtype=np.float64)
        lost = np.where(result.masks.keep[a], 0, arrays(model)[a].T) @ mean
        (kept,) = (row["flow_kept"] for row in result.report["layers"])
        portion = 1.0 if operator == "Tanh" else kept**2
        shifts[operator] = (arrays(result.masked)[bias] - arrays(model)[bias], portion * lost)
    for shift, expected in shifts.values():
        np.testing.assert_allclose(shift, expected, rtol=1e-4, atol=1e-6)


# -- masked = output -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", MODELS)
def test_the_output_is_the_masked_model_on_other_data(name: str, granularity: str) -> None:
    result = prune(name, granularity=granularity, keep="35%")
    assert_same_outputs(result.masked, result.model, feed(name, other_digits()), 1e-5)
    assert result.report["totals"]["kept_percent"] < 60


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", ["transformer", "squeeze and excitation", "halves", "shuffle", "vision transformer"])
def test_the_output_is_the_masked_model_for_architectures(name: str, granularity: str) -> None:
    model, data = ARCHITECTURES[name]()
    result = relief_onnx.prune(model, [data], granularity=granularity, keep="60%", round_to=1)
    assert_same_outputs(result.masked, result.model, data, 1e-5)
    assert result.report["flow"]["evenly"] == []


def random_model(seed: int) -> tuple[onnx.ModelProto, dict[str, Array]]:
    rng = np.random.default_rng(seed)
    steps = [(int(number), int(rng.integers(999))) for number in rng.integers(0, len(STEPS), 8)]
    return build(steps, int(rng.choice([11, 13, 17, 18, 21])), KINDS[seed % 3], bool(rng.random() < 0.5))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_output_is_the_masked_model_on_random_graphs(granularity: str) -> None:
    pruned = 0
    for seed in range(14):
        model, data = random_model(seed)
        try:
            result = relief_onnx.prune(model, [data], granularity=granularity, keep="50%", round_to=1)
        except NothingPrunedError:
            continue
        pruned += 1
        assert_same_outputs(result.masked, result.model, data, 1e-4)
        assert all(np.isfinite(score.flow).all() for score in result.scores.values())
    assert pruned >= 8


# -- odd data ------------------------------------------------------------------------------------------------------------------


def dead_unit(_: Array) -> tuple[onnx.ModelProto, Array]:
    """The first filter of lenet5 never answers."""
    model = onnx.ModelProto()
    model.CopyFrom(sample("lenet5"))
    for item in model.graph.initializer:
        if item.name in ("features.0.weight", "features.0.bias"):
            value = numpy_helper.to_array(item).copy()
            value[0] = -np.abs(value[0]) - (0.1 if value.ndim == 1 else 0.0)
            item.CopyFrom(numpy_helper.from_array(value, item.name))
    return model, digits(16)


ODD: dict[str, Callable[[Array], tuple[onnx.ModelProto, Array]]] = {
    "one sample": lambda x: (sample("lenet5"), x[:1]),
    "one sample, dense layers": lambda x: (sample("lenet300"), x[:1]),
    "one sample, residual": lambda x: (sample("resnet8"), x[:1]),
    "the same sample again": lambda x: (sample("lenet5"), np.repeat(x[:1], 3, 0)),
    "constant": lambda x: (sample("lenet5"), np.ones_like(x)),
    "constant, dense layers": lambda x: (sample("lenet300"), np.ones_like(x)),
    "very large": lambda x: (sample("lenet5"), x * np.float32(1e18)),
    "very small": lambda x: (sample("lenet300"), x * np.float32(1e-25)),
    "a dead unit": dead_unit,
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("name", "granularity"), list(itertools.product(ODD, ["connection", "weight", "channel"])))
def test_odd_data_gives_a_sane_cut(name: str, granularity: str) -> None:
    model, x = ODD[name](digits(8))
    result = relief_onnx.prune(model, [{model.graph.input[0].name: x}], granularity=granularity, keep="30%", round_to=1)
    for score in result.scores.values():
        for part in (score.score, score.bias_score, score.relevance, score.flow, score.means):
            assert part is not None
            assert np.isfinite(part).all()
        rows = score.score.reshape(len(score.score), -1).sum(1)
        assert ((np.abs(rows - 1) < 1e-9) | (rows == 0)).all()
    kept = {weight: float(keep.mean()) for weight, keep in result.masks.keep.items()}
    assert min(kept.values()) > 0
    macs = result.report["output"]["macs"] / result.report["input"]["macs"]
    assert 0.01 < (macs if granularity == "channel" else result.report["totals"]["kept_percent"] / 100) <= 0.3
    if name == "a dead unit":
        assert not result.masks.keep["features.3.weight"][:, 0].any()


def test_one_sample_ranks_by_means_where_nothing_varies() -> None:
    """w^2 mean(x)^2 is what a single sample says about a dense layer; the variance is 0 but for float32's last digit of x^2."""
    net = Net(seed=4)
    x, a = net.input("N", 6), net.weight(6, 4)
    model = net.model(net.op("MatMul", x, a))
    data = net.rng.standard_normal((1, 6)).astype(np.float32)
    (score,) = relief_onnx.score(model, [{x: data}]).values()
    parts = np.square(arrays(model)[a].T.astype(float)) * np.square(data[0].astype(float))
    np.testing.assert_allclose(score.score, parts / parts.sum(1, keepdims=True), rtol=2e-4)


def test_the_absolute_rule_counts_biases() -> None:
    """The paper's local share, carried to the output: the other choice of what is active."""
    from relief_onnx.flow import FlowRule

    model, data, _, _ = residual()
    graph = Graph(prepare(model))
    plan = find(graph)
    measure = FlowMeasure(graph, plan, "connection", FlowRule(absolute=True))
    probe = instrument(graph, [item.tensor for item in measure.measurements])
    dataset = open_dataset([data], input_specs(graph.model))
    calibrate.run(probe, measure.measurements, dataset, limit=None, seed=0, threads=1, progress=lambda *_: None)
    for name, score in measure.scores({}).items():
        assert score.bias_score.all(), name
        np.testing.assert_allclose(score.score.sum(1) + score.bias_score, 1, rtol=1e-9)
        assert score.relevance is not None
        assert 0 < score.relevance.sum() <= 1
