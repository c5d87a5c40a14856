"""Golden numbers of the paper's formula: one NNrelief step on two fixed models, made outside of this project."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders import Net
from numpy.typing import NDArray

import relief_onnx

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "golden"
Arrays = Mapping[str, NDArray[Any]]


def golden(name: str) -> dict[str, NDArray[Any]]:
    path = FOLDER / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"the golden numbers are not beside this project: shared/golden/{path.name}")
    with np.load(path) as archive:
        return {key: archive[key] for key in archive.files}


def parameters(net: Net, arrays: Arrays, layer: str, *names: str) -> list[str]:
    found = [f"{layer}.{name}" for name in names]
    net.initializers.update({name: arrays[f"param/{name}"] for name in found})
    return found


def dense(net: Net, arrays: Arrays, x: str, layer: str) -> str:
    return str(net.op("Gemm", x, *parameters(net, arrays, layer, "weight", "bias"), transB=1))


def lenet(arrays: Arrays) -> tuple[onnx.ModelProto, str]:
    net = Net()
    x = y = net.input("N", 784)
    for layer in ("classifier.0", "classifier.2"):
        y = net.op("Relu", dense(net, arrays, y, layer))
    return net.model(dense(net, arrays, y, "classifier.4")), x


def vgg(arrays: Arrays) -> tuple[onnx.ModelProto, str]:
    """Numbered as PyTorch numbers the modules: Conv, BatchNormalization, Relu are three, MaxPool is one."""
    net, place = Net(), 0
    x = y = net.input("N", 3, 32, 32)
    for width in (16, 16, "M", 16, "M", 32, "M", 32, "M", 512, "M"):
        if width == "M":
            y, place = net.op("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2]), place + 1
            continue
        y = net.op("Conv", y, *parameters(net, arrays, f"features.{place}", "weight", "bias"), pads=[1, 1, 1, 1])
        names = parameters(net, arrays, f"features.{place + 1}", "weight", "bias", "running_mean", "running_var")
        y, place = net.op("Relu", net.op("BatchNormalization", y, *names, epsilon=1e-5)), place + 3
    y = net.op("Relu", dense(net, arrays, net.op("Flatten", y), "classifier.1"))
    return net.model(dense(net, arrays, y, "classifier.3")), x


MODELS = {"lenet300_100": lenet, "vgg_like_tiny": vgg}


def layers_of(arrays: Arrays) -> list[str]:
    return [key.removeprefix("paper/score/") for key in arrays if key.startswith("paper/score/")]


@pytest.mark.parametrize("name", MODELS)
def test_scores(name: str) -> None:
    arrays = golden(name)
    model, x = MODELS[name](arrays)
    scores = {item.weight: item for item in relief_onnx.score(model, [{x: arrays["input"]}], criterion="relief").values()}
    assert set(scores) == {f"{layer}.weight" for layer in layers_of(arrays)}
    for layer in layers_of(arrays):
        wanted = arrays[f"paper/score/{layer}"]
        wanted = wanted / wanted.sum(1, keepdims=True)
        found = scores[f"{layer}.weight"]
        rows = len(wanted)
        # The absolute part is for activations that are all but 0, where float32 inference itself rounds.
        np.testing.assert_allclose(found.score[:rows], wanted[:, :-1], rtol=1e-5, atol=1e-9, err_msg=layer)
        np.testing.assert_allclose(found.bias_score[:rows], wanted[:, -1], rtol=1e-5, atol=1e-9, err_msg=layer)


@pytest.mark.parametrize("name", MODELS)
def test_masks(name: str) -> None:
    arrays = golden(name)
    model, x = MODELS[name](arrays)
    masks = relief_onnx.prune(model, [{x: arrays["input"]}], preset="paper", alpha=0.95).masks
    for layer in layers_of(arrays):
        different = int((masks.keep[f"{layer}.weight"] != arrays[f"paper/keep/{layer}.weight"].astype(bool)).sum())
        different += int((masks.bias_keep[f"{layer}.weight"] != arrays[f"paper/keep/{layer}.bias"].astype(bool)).sum())
        # Where the cut falls within float32's rounding of alpha, single entries may flip.
        assert different <= (3 if arrays[f"paper/min_cut_margin/{layer}"] < 1e-6 else 0), f"{layer}: {different} connections differ"
