"""The sample models and their digits: valid, as accurate as they say, and rebuilt from `sample_models/build.py`."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import re
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper
from PIL import Image

Array = npt.NDArray[Any]

FOLDER = Path(__file__).parents[1] / "sample_models"
DIGITS = FOLDER / "digits"

RESIDUAL = ["Conv", "BatchNormalization", "Relu", "Conv", "BatchNormalization"]
SHORTCUT = ["Conv", "BatchNormalization"]
END = ["Add", "Relu"]

# file -> operators in order, learned parameters, running statistics, MACs per image, least accuracy
EXPECTED: dict[str, tuple[list[str], int, int, int, float]] = {
    "lenet300": (["Flatten", "Gemm", "Relu", "Gemm", "Relu", "Gemm"], 266_610, 0, 266_200, 0.97),
    "lenet5": (
        ["Conv", "Relu", "MaxPool"] * 2 + ["Flatten", "Gemm", "Relu", "Gemm", "Relu", "Gemm"],
        44_426,
        0,
        281_640,
        0.98,
    ),
    "resnet8": (
        ["Conv", "BatchNormalization", "Relu", *RESIDUAL, *END]
        + (RESIDUAL + SHORTCUT + END) * 2
        + ["GlobalAveragePool", "Flatten", "Gemm"],
        77_754,
        672,
        9_345_920,
        0.98,
    ),
}
every_model = pytest.mark.parametrize("name", EXPECTED)


@cache
def load(name: str) -> onnx.ModelProto:
    return onnx.load(FOLDER / f"{name}.onnx")


@cache
def builder() -> ModuleType:
    """`sample_models/build.py` as a module; its training half imports torch only when called."""
    spec = importlib.util.spec_from_file_location("sample_models_build", FOLDER / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@cache
def samples(part: str) -> dict[Path, Array]:
    return {path: np.asarray(Image.open(path)) for path in sorted((DIGITS / part).rglob("*.png"))}


@cache
def labelled() -> tuple[Array, Array]:
    """Images as a user reads them (scale 1/255, no mean, no std) and the labels from the folder names."""
    images = np.stack(list(samples("test").values()))[:, None].astype(np.float32) * np.float32(1 / 255)
    return images, np.array([int(path.parent.name) for path in samples("test")])


def run(name: str, images: Array) -> Array:
    session = ort.InferenceSession(FOLDER / f"{name}.onnx", providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], {"image": images})[0])


def index_of(path: Path) -> int:
    match = re.fullmatch(r"digit_(\d{4})\.png", path.name)
    assert match, path
    return int(match[1])


def shape_of(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def macs(graph: onnx.GraphProto) -> int:
    """Multiply-accumulates per image of the convolutions and fully connected layers."""
    weights = {t.name: tuple(t.dims) for t in graph.initializer}
    outputs = {v.name: shape_of(v) for v in [*graph.value_info, *graph.output]}
    total = 0
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm"):
            places = math.prod(int(side) for side in outputs[node.output[0]][2:])
            total += places * math.prod(weights[node.input[1]])
    return total


@every_model
def test_model_passes_the_full_checker(name: str) -> None:
    onnx.checker.check_model(load(name), full_check=True)


def test_full_checker_would_notice_a_wrong_shape() -> None:
    model = onnx.ModelProto.FromString(load("lenet5").SerializeToString())
    model.graph.value_info[0].type.tensor_type.shape.dim[1].dim_value += 1
    with pytest.raises(onnx.shape_inference.InferenceError):
        onnx.checker.check_model(model, full_check=True)


@every_model
def test_model_is_documented_and_has_every_shape(name: str) -> None:
    model = load(name)
    graph = model.graph
    assert (model.ir_version, [(o.domain, o.version) for o in model.opset_import]) == (8, [("", 17)])
    assert model.producer_name == "relief-onnx sample_models"
    assert {"licence", "data", "preprocessing", "test_accuracy"} <= {p.key for p in model.metadata_props}
    assert all([model.doc_string, graph.doc_string, *(node.doc_string for node in graph.node)])
    assert len({node.name for node in graph.node} - {""}) == len(graph.node)
    assert [(v.name, shape_of(v)) for v in graph.input] == [("image", ["batch", 1, 28, 28])]
    assert [(v.name, shape_of(v)) for v in graph.output] == [("logits", ["batch", 10])]
    inner = {out for node in graph.node for out in node.output} - {"logits"}
    assert {v.name for v in graph.value_info} == inner
    assert all(shape_of(v)[0] == "batch" and 0 not in shape_of(v) for v in graph.value_info)


@every_model
def test_architecture(name: str) -> None:
    operators, learned, running, cost, _ = EXPECTED[name]
    graph = load(name).graph
    assert [node.op_type for node in graph.node] == operators
    sizes = {t.name: math.prod(t.dims) for t in graph.initializer}
    assert sum(size for key, size in sizes.items() if ".running_" not in key) == learned
    assert sum(size for key, size in sizes.items() if ".running_" in key) == running
    assert macs(graph) == cost
    assert all(key.endswith((".weight", ".bias", ".running_mean", ".running_var")) for key in sizes)
    assert all(np.isfinite(numpy_helper.to_array(t)).all() for t in graph.initializer)


def test_normalization_was_trained_and_left_unfolded() -> None:
    graph = load("resnet8").graph
    assert all(len(node.input) == 2 for node in graph.node if node.op_type == "Conv")
    weights = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "BatchNormalization":
            assert [key.rsplit(".", 1)[1] for key in node.input[1:]] == [
                "weight",
                "bias",
                "running_mean",
                "running_var",
            ]
            assert np.std(weights[node.input[3]]) > 0
            assert (weights[node.input[4]] > 0).all()


@every_model
def test_accuracy_in_onnxruntime_is_what_the_metadata_say(name: str) -> None:
    images, labels = labelled()
    correct = int((run(name, images).argmax(axis=1) == labels).sum())
    metadata = {p.key: p.value for p in load(name).metadata_props}
    assert (metadata["test_correct"], metadata["test_images"]) == (str(correct), str(len(labels)))
    assert metadata["test_accuracy"] == f"{correct / len(labels):.4f}"
    assert correct / len(labels) >= EXPECTED[name][-1]


@every_model
def test_accuracy_needs_the_right_labels_and_pixels(name: str) -> None:
    images, labels = labelled()
    assert (run(name, images).argmax(axis=1) == np.roll(labels, len(labels) // 2)).mean() < 0.3
    assert (run(name, images.transpose(0, 1, 3, 2).copy()).argmax(axis=1) == labels).mean() < 0.8


@every_model
def test_batch_of_any_size(name: str) -> None:
    images = labelled()[0][::60][:7]
    together = run(name, images)
    assert together.shape == (7, 10)
    alone = np.concatenate([run(name, image[None]) for image in images])
    np.testing.assert_allclose(alone, together, rtol=1e-4, atol=1e-4)


def test_calibration_and_test_digits_are_different() -> None:
    indices = {part: [index_of(path) for path in samples(part)] for part in ("calib", "test")}
    hashes = {part: [hashlib.sha256(a.tobytes()).digest() for a in samples(part).values()] for part in indices}
    assert (len(indices["calib"]), len(indices["test"])) == (256, 450)
    for keys in (indices, hashes):
        seen = Counter(key for part in keys.values() for key in part)
        assert max(seen.values()) == 1


def test_no_training_digit_looks_like_a_test_digit() -> None:
    digits = builder().load()
    test = {digits.images[i].tobytes() for i in digits.test}
    assert not test & {digits.images[i].tobytes() for i in digits.training}
    assert set(digits.calibration) <= set(digits.training)
    assert sorted([*digits.training, *digits.test]) == list(range(1797))


def test_digits_are_small_gray_pngs_of_every_class() -> None:
    for path in DIGITS.rglob("*.png"):
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "L", (28, 28)), path
    per_class = Counter(path.parent.name for path in samples("test"))
    assert sorted(per_class) == list("0123456789")
    assert min(per_class.values()) >= 40
    assert sum(path.stat().st_size for path in DIGITS.rglob("*.png")) < 1.5e6
    assert sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file() and "__pycache__" not in p.parts) < 4e6


def test_digits_rebuild_to_the_same_bytes(tmp_path: Path) -> None:
    stale = tmp_path / "test" / "3" / "digit_9999.png"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"from an earlier split")
    builder().write_digits(builder().load(), tmp_path)
    rebuilt = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*.png")}
    assert rebuilt == {p.relative_to(DIGITS): p.read_bytes() for p in DIGITS.rglob("*.png")}


def test_enlarging_is_bilinear_interpolation() -> None:
    image = np.random.default_rng(7).integers(0, 17, (8, 8))
    enlarged = builder().enlarge(image[None])[0]
    for row, column in np.ndindex(28, 28):
        y, x = (min(max((k + 0.5) * 8 / 28 - 0.5, 0.0), 7.0) for k in (row, column))
        top, left = min(int(y), 6), min(int(x), 6)
        (a, b), (c, d) = image[top : top + 2, left : left + 2]
        v, u = y - top, x - left
        exact = (a * (1 - u) * (1 - v) + b * u * (1 - v) + c * (1 - u) * v + d * u * v) * 255 / 16
        assert abs(enlarged[row, column] - exact) <= 0.5 + 1e-9


@every_model
def test_builder_writes_this_file_from_these_weights(name: str) -> None:
    build = builder()
    weights = {t.name: numpy_helper.to_array(t) for t in load(name).graph.initializer}
    metadata = {p.key: p.value for p in load(name).metadata_props}
    assert metadata == build.describe(int(metadata["test_correct"]), int(metadata["test_images"]))
    (network,) = (make() for make in build.NETWORKS if make().name == name)
    assert build.to_onnx(network, weights, metadata) == load(name)


@every_model
def test_readme_states_the_measured_numbers(name: str) -> None:
    (row,) = re.findall(rf"^\| `{name}\.onnx` .*$", (FOLDER / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    metadata = {p.key: p.value for p in load(name).metadata_props}
    _, learned, _, cost, _ = EXPECTED[name]
    size = (FOLDER / f"{name}.onnx").stat().st_size
    accuracy = f"{float(metadata['test_accuracy']):.2%} ({metadata['test_correct']} of {metadata['test_images']})"
    for stated in (f"{learned:,}", f"{cost:,}", f"{size:,}", accuracy.replace("%", " %")):
        assert f"| {stated} |" in row
