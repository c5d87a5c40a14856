"""What onnxruntime's own optimisers write is pruned like the file before: the same weights go, and the file keeps its operators."""

from __future__ import annotations

import functools
import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from architectures import ARCHITECTURES
from graph_bert import HEADS, HIDDEN, bert, sentences
from helpers import SAMPLES, digits, real_model, run
from laws import assert_same_outputs
from numpy.typing import NDArray

import relief_onnx
from benchmarks.zoo_models import SHARED, feed, rows
from relief_onnx.folding import fold_norms
from relief_onnx.model import share_again
from relief_onnx.prepared import prepare

Feed = dict[str, NDArray[Any]]
LEVELS = {
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


def optimised(model: onnx.ModelProto, level: str, folder: Path) -> onnx.ModelProto:
    """What onnxruntime makes of a model at that level; "transformer": what its offline optimiser makes of a BERT."""
    if level == "transformer":
        missing = [name for name in ("sympy", "packaging", "coloredlogs") if importlib.util.find_spec(name) is None]
        optimizer = pytest.importorskip(
            "onnxruntime.transformers.optimizer", reason=f"onnxruntime's transformer optimiser needs more packages: pip install {missing}"
        )
        onnx.save(model, folder / "given.onnx")
        found = optimizer.optimize_model(str(folder / "given.onnx"), model_type="bert", num_heads=HEADS, hidden_size=HIDDEN, opt_level=1)
        found.save_model_to_file(str(folder / "optimised.onnx"))
    else:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level, options.log_severity_level, options.intra_op_num_threads = LEVELS[level], 4, 1
        options.optimized_model_filepath = str(folder / "optimised.onnx")
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimised.onnx")


def operators(model: onnx.ModelProto) -> Counter[tuple[str, str]]:
    return Counter((node.domain, node.op_type) for node in model.graph.node)


@functools.cache
def model_and_data(name: str) -> tuple[onnx.ModelProto, Feed]:
    if name.startswith("bert"):
        return bert(opset=int(name[4:])), sentences()
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]()
    model = onnx.load(SAMPLES / f"{name}.onnx")
    if name == "resnet8":
        model, _ = fold_norms(model)
    x: NDArray[Any] = digits(32)
    if len(model.graph.input[0].type.tensor_type.shape.dim) == 2:
        x = x.reshape(len(x), -1)
    return model, {model.graph.input[0].name: x}


def samples(feed: Feed) -> list[Feed]:
    return [{name: value[i : i + 1] for name, value in feed.items()} for i in range(len(next(iter(feed.values()))))]


@functools.cache
def pruned(name: str, options: tuple[tuple[str, Any], ...]) -> relief_onnx.Result:
    model, feed = model_and_data(name)
    return relief_onnx.prune(model, samples(feed), threads=1, storage="dense", **dict(options))


Masks = list[tuple[NDArray[Any], NDArray[np.bool_]]]


def neurons(model: onnx.ModelProto, result: relief_onnx.Result) -> Masks:
    """Of every neuron or filter, in the order of the graph: its weights, and what the masks keep of them."""
    ready = prepare(model)
    found: Masks = []
    for weight, layers in ready.plan.by_weight().items():
        array = layers[0].view.apply(ready.graph.array(weight))
        keep = result.masks.keep[weight]
        keep = np.broadcast_to(keep.reshape(*keep.shape, *(1,) * (array.ndim - keep.ndim)), array.shape)
        found += [(row.reshape(-1), flags.reshape(-1)) for row, flags in zip(array, keep, strict=True)]
    return found


def equal_share(first: Masks, second: Masks) -> tuple[float, float]:
    """The share of the first model's weights that some neuron of the second has too, and of these the share with the same mask.

    Optimisers pack layers together and rename them, and fold norms up to rounding: neurons are told by their weights.
    """
    known: dict[int, Masks] = {}
    for row, flags in second:
        known.setdefault(len(row), []).append((row, flags))
    stacks = {size: (np.stack([row for row, _ in own]), np.stack([flags for _, flags in own])) for size, own in known.items()}
    total = matched = same = 0
    for row, flags in first:
        total += len(row)
        if len(row) in stacks:
            weights, masks = stacks[len(row)]
            distance = np.abs(weights - row).max(1)
            best = int(distance.argmin())
            if distance[best] <= 1e-5 * np.abs(row).max():
                matched += len(row)
                same += int((masks[best] == flags).sum())
    return matched / total, same / max(matched, 1)


def test_the_comparison_can_fail() -> None:
    """Other weights are not matched, other masks are counted."""
    row, flags = np.arange(4.0), np.array([True, False, True, True])
    assert equal_share([(row, flags)], [(row * (1 + 1e-7), flags)]) == (1.0, 1.0)
    assert equal_share([(row, flags)], [(row + 1, flags)]) == (0.0, 0.0)
    assert equal_share([(row, flags)], [(row, ~flags)]) == (1.0, 0.0)
    assert equal_share([(row, flags)], [(row, np.ones(4, bool))]) == (1.0, 0.75)


def agreement(result: relief_onnx.Result) -> float:
    return min(float(item["cosine"]) for item in result.report["quality"]["agreement"].values())


HALF = (("granularity", "weight"), ("keep", "50%"))
NAMES = (
    "lenet300", "lenet5", "resnet8", "squeeze and excitation", "shuffle", "padded shortcut", "transposed, two groups",
    "attention, one layer, five axes", "transformer", "vision transformer", "bert11", "bert13", "bert17",
)  # fmt: skip
FILES = [(name, "extended") for name in NAMES] + [(name, "basic") for name in ("lenet5", "resnet8", "transformer", "bert17")]
TRANSFORMERS = [(name, "transformer") for name in ("bert11", "bert13", "bert17")]


@pytest.mark.parametrize(("name", "level"), FILES + TRANSFORMERS)
def test_the_same_weights_go(name: str, level: str, tmp_path: Path) -> None:
    """All weights that are scored in the file before are scored, the masks are the same, and nothing comes out unfused."""
    model, feed = model_and_data(name)
    file = optimised(model, level, tmp_path)
    result = relief_onnx.prune(file, samples(feed), threads=1, storage="dense", **dict(HALF))
    before = pruned(name, HALF)
    share, same = equal_share(neurons(model, before), neurons(file, result))
    assert share == 1.0
    # Of a packed layer the floor of flow holds for queries, keys and values together.
    assert same >= (0.99 if level == "transformer" else 0.995)
    assert operators(file) - operators(result.model) == operators(result.model) - operators(file) == Counter()
    assert operators(file) - operators(result.masked) == Counter()
    assert agreement(result) == pytest.approx(agreement(before), abs=0.001)
    if level != "basic":
        assert any(node.domain == "com.microsoft" for node in result.model.graph.node) or name in ("vision transformer", "shuffle")
    known = {row["op"] for row in before.report["layers"] if row["status"] == "skipped"} | {"Add"}  # a table of positions, gathered before
    assert {row["op"] for row in result.report["layers"] if row["status"] == "skipped"} <= known


REPAIRED = [("lenet5", "extended"), ("bert17", "extended"), ("bert11", "transformer"), ("bert17", "transformer")]


@pytest.mark.parametrize(("name", "level"), REPAIRED)
@pytest.mark.parametrize("options", [
    (("granularity", "weight"), ("keep", "50%"), ("repair", "least-squares")),
    (("granularity", "channel"), ("keep", "60%"), ("round_to", 1)),
    (("granularity", "channel+weight"), ("keep", "50%"), ("repair", "least-squares"), ("round_to", 1)),
])  # fmt: skip
def test_repaired_and_whole_units(name: str, level: str, options: tuple[tuple[str, Any], ...], tmp_path: Path) -> None:
    """As good as for the file before, with as many multiplications left; fused nodes stay fused."""
    model, feed = model_and_data(name)
    file = optimised(model, level, tmp_path)
    result = relief_onnx.prune(file, samples(feed), threads=1, storage="dense", **dict(options))
    before = pruned(name, options)
    assert agreement(result) == pytest.approx(agreement(before), abs=0.002)
    assert result.report["output"]["macs"] == pytest.approx(before.report["output"]["macs"], rel=0.02)
    assert result.report["totals"]["kept_percent"] == pytest.approx(before.report["totals"]["kept_percent"], abs=1)
    assert {node for node in operators(file) - operators(result.model) if node[0]} == set()
    if dict(options).get("repair"):
        assert agreement(result) >= 0.99


def test_packed(tmp_path: Path) -> None:
    """Weights of fused nodes are stored compactly too, and a packed file is read again."""
    model, feed = model_and_data("lenet300")
    file = optimised(model, "extended", tmp_path)
    result = relief_onnx.prune(file, samples(feed), threads=1, granularity="weight", keep="10%", output=tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").stat().st_size < 0.3 * len(file.SerializeToString())
    again = prepare(tmp_path / "out.onnx")
    assert {layer.weight for layer in again.plan.layers} == {layer.weight for layer in prepare(file).plan.layers}
    assert again.restored(again.graph.model) == again.original
    assert operators(again.original) == operators(file)
    assert_same_outputs(again.graph.model, result.model, feed, 1e-5)


def test_quantised(tmp_path: Path) -> None:
    """Weights of fused nodes become int8, and with floats between layers the nodes stay fused."""
    model, feed = model_and_data("lenet5")
    file = optimised(model, "extended", tmp_path)
    for activations, status, left in (("none", "int8 weights", {"FusedConv", "FusedGemm"}), ("uint8", "int8", set())):
        result = relief_onnx.quantize(file, samples(feed), activations=activations, threads=1, storage="dense")
        assert {row["weight"] for row in result.report["layers"] if row["status"] == status} == set(prepare(file).plan.by_weight())
        assert {node.op_type for node in result.model.graph.node if node.domain == "com.microsoft"} == left
        assert_same_outputs(file, result.model, feed, 0.05)


def test_all_is_refused(tmp_path: Path) -> None:
    """A file in the layout of one processor: one sentence that says what to do."""
    file = optimised(model_and_data("lenet5")[0], "all", tmp_path)
    if not any(node.domain == "com.microsoft.nchwc" for node in file.graph.node):
        pytest.skip("onnxruntime has no layout of its own for convolutions on this processor")
    onnx.save(file, tmp_path / "all.onnx")
    result = run("inspect", tmp_path / "all.onnx")
    assert result.exit_code == 1
    assert "optimised the model at level 'all'; prune the model from before that" in result.output


REAL = ("resnet20_cifar10_folded", "yunet_n", "ppocr_cls", "dtln_2", "minilm_l3")


@pytest.mark.parametrize("name", REAL)
def test_real_models(name: str, tmp_path: Path) -> None:
    """Laid open they compute the same and have the layers of the file before; the way back changes nothing."""
    model = onnx.load(real_model(name))
    if not SHARED.is_dir():
        pytest.skip("../shared/models is missing, which says what inputs real models take")
    row = next(row for row in rows() if row["id"] == name)
    file = optimised(model, "extended", tmp_path)
    ready, before = prepare(file), prepare(model)
    assert scored(ready) >= 0.95 * scored(before)
    assert_same_outputs(file, ready.graph.model, feed(row, 0), 1e-5)
    back = share_again(ready.restored(ready.graph.model), file)
    assert [node.SerializeToString() for node in back.graph.node] == [node.SerializeToString() for node in file.graph.node]


def scored(ready: Any) -> int:
    return sum(int(np.prod(layers[0].view.shape)) for layers in ready.plan.by_weight().values())
