"""Networks behind and in front of ai.onnx.ml nodes: what is behind them is pruned, they stay; outputs of strings and maps are compared."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders import Net
from helpers import run
from onnx import TensorProto, helper, numpy_helper

import relief_onnx
from relief_onnx.compare import compare_models
from relief_onnx.data import open_dataset
from relief_onnx.model import input_specs

Case = tuple[onnx.ModelProto, dict[str, Any]]


def ml(net: Net, operator: str, *inputs: str, **values: Any) -> str:
    y = net.op(operator, *inputs, **values)
    net.nodes[-1].domain = "ai.onnx.ml"
    return str(y)


def body(net: Net, x: str, inputs: int = 6, out: int = 3) -> str:
    h = net.op("Relu", net.op("Gemm", x, net.weight(inputs, 16), net.bias(16)))
    return str(net.op("Gemm", h, net.weight(16, out), net.bias(out)))


def finished(net: Net, *outputs: str | onnx.ValueInfoProto) -> onnx.ModelProto:
    """Without ONNX's shape inference, which knows little of ai.onnx.ml."""
    infos = [helper.make_tensor_value_info(item, TensorProto.FLOAT, None) if isinstance(item, str) else item for item in outputs]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in net.initializers.items()]
    inputs = [helper.make_tensor_value_info(name, kind, shape) for name, shape, kind in net.inputs]
    graph = helper.make_graph(net.nodes, "pipeline", inputs, infos, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)], ir_version=8)


def numbers(count: int = 64) -> Any:
    rng = np.random.default_rng(0)
    return (rng.standard_normal((count, 6)) * np.array([1, 10, 0.1, 3, 1, 1])).astype(np.float32)


def words(count: int = 64) -> Any:
    return np.random.default_rng(1).choice(np.array(["a", "b", "c"], object), (count, 1))


SCALE: dict[str, Any] = {"offset": [0.1] * 6, "scale": [1.0, 0.1, 10.0, 0.3, 1.0, 1.0]}
IMPUTE: dict[str, Any] = {"imputed_value_floats": [0.0] * 6, "replaced_value_float": -999.0}


def one(operator: str, width: int = 6, **values: Any) -> Case:
    net = Net()
    return finished(net, body(net, ml(net, operator, net.input("N", 6), **values), width)), {"x1": numbers()}


def extracted() -> Case:
    net = Net()
    return finished(net, body(net, ml(net, "ArrayFeatureExtractor", net.input("N", 6), net.ints(0, 2, 3, 5)), 4)), {"x1": numbers()}


def encoded(element: int, **values: Any) -> Case:
    """Numbers and a category side by side."""
    net = Net()
    x = net.input("N", 6)
    net.inputs.append(("category", ("N", 1), element))
    one_hot = net.op("Reshape", ml(net, "OneHotEncoder", "category", zeros=1, **values), net.ints(-1, 3))
    y = ml(net, "FeatureVectorizer", x, one_hot, inputdimensions=[6, 3])
    category = words() if element == TensorProto.STRING else np.random.default_rng(1).integers(0, 3, (64, 1))
    return finished(net, body(net, y, 9)), {"x1": numbers(), "category": category}


def labelled() -> Case:
    net = Net()
    x = net.input("N", 6)
    net.inputs.append(("category", ("N", 1), TensorProto.STRING))
    code = ml(net, "LabelEncoder", "category", keys_strings=["a", "b", "c"], values_floats=[0.0, 1.0, 2.0])
    return finished(net, body(net, net.op("Concat", x, code, axis=1), 7)), {"x1": numbers(), "category": words()}


def classifier() -> Case:
    """As skl2onnx writes it: the label as a string, and a map of class scores for each sample."""
    net = Net()
    scores = net.op("Softmax", body(net, net.input("N", 6)))
    label = ml(net, "LabelEncoder", net.op("ArgMax", scores, axis=1, keepdims=0), keys_int64s=[0, 1, 2], values_strings=["x", "y", "z"])
    maps = ml(net, "ZipMap", scores, classlabels_int64s=[0, 1, 2])
    kind = helper.make_sequence_type_proto(
        helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    )
    return finished(net, helper.make_tensor_value_info(label, TensorProto.STRING, ["N"]), helper.make_value_info(maps, kind)), {
        "x1": numbers()
    }


def inside(operator: str, **values: Any) -> Case:
    """Between two networks."""
    net = Net()
    y = ml(net, operator, net.op("Relu", body(net, net.input("N", 6), 6, 6)), **values)
    return finished(net, body(net, y)), {"x1": numbers()}


CASES: dict[str, Case] = {
    "Scaler": one("Scaler", **SCALE),
    "Normalizer": one("Normalizer", norm="L2"),
    "Imputer": one("Imputer", **IMPUTE),
    "Binarizer": one("Binarizer", threshold=0.1),
    "ArrayFeatureExtractor": extracted(),
    "OneHotEncoder of numbers": encoded(TensorProto.INT64, cats_int64s=[0, 1, 2]),
    "OneHotEncoder of strings": encoded(TensorProto.STRING, cats_strings=["a", "b", "c"]),
    "LabelEncoder": labelled(),
    "classifier": classifier(),
    "Scaler inside": inside("Scaler", **SCALE),
    "Imputer inside": inside("Imputer", **IMPUTE),
}
RUNS: dict[str, dict[str, Any]] = {
    "flow": {"keep": "50%"},
    "relief": {"criterion": "relief", "alpha": 0.9},
    "channel": {"granularity": "channel", "keep": "60%", "round_to": 1},
    "repaired": {"keep": "40%", "repair": "least-squares"},
}


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node if node.domain == "ai.onnx.ml")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("options", RUNS)
def test_networks_around_them_are_pruned_and_they_stay(name: str, options: str) -> None:
    model, feed = CASES[name]
    result = relief_onnx.prune(model, [feed], **RUNS[options])
    assert operators(result.model) == operators(model)
    assert [node.attribute for node in model.graph.node if node.domain] == [
        node.attribute for node in result.model.graph.node if node.domain
    ]
    assert all(row["status"] == "pruned" for row in result.report["layers"][-2:-1])
    assert result.report["totals"]["kept_percent"] < 95
    flow = result.report["flow"]
    assert flow is None or not [row for row in flow["evenly"] if row["op"] not in ("ArgMax", "LabelEncoder")]
    if options == "channel":
        assert result.report["units_removed"] > 0


def test_what_is_inside_keeps_its_features() -> None:
    """A Scaler's numbers are attributes, one per feature: the layer before it loses none."""
    for name in ("Scaler inside", "Imputer inside"):
        model, feed = CASES[name]
        result = relief_onnx.prune(model, [feed], **RUNS["channel"])
        rows = {row["node"]: row["channels"] for row in result.report["layers"]}
        assert [6, 6] in rows.values()


def test_labels_and_maps_are_compared() -> None:
    model, feed = classifier()
    other = onnx.ModelProto()
    other.CopyFrom(model)
    weight = next(item for item in other.graph.initializer if item.name.startswith("w"))
    weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
    data = open_dataset([feed], input_specs(model))
    same = compare_models(model, model, data, threads=1).outputs
    different = compare_models(model, other, data, threads=1).outputs
    label, maps = same
    assert same[label].cosine == same[maps].cosine == same[maps].top1 == 1.0
    assert different[label].cosine < 0.95
    assert different[maps].cosine < 0.95
    top = different[maps].top1
    assert top is not None
    assert top == pytest.approx(different[label].cosine ** 2)  # the share of samples with the same label


def test_strings_from_the_command_line(tmp_path: Path) -> None:
    model, feed = labelled()
    path, data, report = tmp_path / "m.onnx", tmp_path / "data", tmp_path / "r.json"
    onnx.save(model, path)
    data.mkdir()
    np.savez(data / "all.npz", x1=feed["x1"], category=feed["category"].astype(str))
    result = run("prune", path, "--data", data, "--keep", "50%", "--json", report, "--quiet")
    assert result.exit_code == 0, result.output
    assert json.loads(report.read_text())["totals"]["kept_percent"] <= 50


def test_scores_inside_maps_are_trained() -> None:
    """A ZipMap's outputs are maps, and what makes labels cannot run in torch: neither takes part."""
    pytest.importorskip("torch")
    model, feed = CASES["classifier"]
    result = relief_onnx.prune(model, [feed], keep="50%", repair="distill", epochs=2, batch=16, threads=1)
    assert [head["loss"] for head in result.report["retrain"]["loss"]] == ["none", "kl"]
    assert [info.type.WhichOneof("value") for info in result.model.graph.output] == [
        info.type.WhichOneof("value") for info in model.graph.output
    ]
