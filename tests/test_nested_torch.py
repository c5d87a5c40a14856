"""The interpreter runs control flow within control flow as onnxruntime does, and trains what is held at any depth."""

from __future__ import annotations

from typing import Any

import nested_cases as nested
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import relief_onnx
from relief_onnx.control import settle
from relief_onnx.data import open_dataset
from relief_onnx.interpreter import Network
from relief_onnx.model import input_specs
from relief_onnx.prepared import prepare

CASES = {**nested.CASES, "windows": nested.windowed(False), "growing windows": nested.windowed(True)}


def samples(model: onnx.ModelProto, count: int = 6) -> list[nested.Arrays]:
    inputs = {item.name for item in model.graph.input}
    return [{name: value for name, value in feed.items() if name in inputs} for feed in nested.feeds(count)]


def assert_alike(model: onnx.ModelProto, feed: Any) -> None:
    wanted = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feed)[0]
    with torch.no_grad():
        found = next(iter(Network(model)({name: torch.from_numpy(value) for name, value in feed.items()}).values())).numpy()
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("opened", [False, True], ids=["file", "working model"])
def test_as_onnxruntime(name: str, opened: bool) -> None:
    model = CASES[name].model()
    data = samples(model)
    if opened:
        model = settle(prepare(model), open_dataset(data, input_specs(model)), samples=None, seed=0, threads=1).graph.model
    for feed in data[:3]:
        assert_alike(model, feed)


@pytest.mark.parametrize("name", ["If in Loop", "Loop in Loop, held outside", "Scan in If in Loop in If"])
def test_distilled(name: str) -> None:
    """Zeros stay zeros in every body, weights of bodies change, what never ran does not."""
    model = CASES[name].model()
    data = samples(model, 16)
    common: dict[str, Any] = {"keep": "60%", "granularity": "weight", "storage": "dense", "criterion": "flow", "mean_shift": "off"}
    found = relief_onnx.prune(model, data, repair="distill", epochs=2, batch=1, validation=0.0, **common)
    plain = relief_onnx.prune(model, data, **common)
    changed = set()
    for weight, keep in found.masks.keep.items():
        np.testing.assert_array_equal(keep, plain.masks.keep[weight])
        assert not arrays(found.model)[weight][~keep.T].any()
        changed |= {weight} if not np.array_equal(arrays(found.model)[weight], arrays(plain.model)[weight]) else set()
    assert changed >= set(found.masks.keep) - {"never"}


def arrays(model: onnx.ModelProto) -> dict[str, Any]:
    """Tensors that a file holds, at any depth."""
    found, pending = {}, [model.graph]
    while pending:
        graph = pending.pop()
        found |= {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
        for node in graph.node:
            for item in node.attribute:
                if item.type == onnx.AttributeProto.TENSOR:
                    found[node.output[0]] = onnx.numpy_helper.to_array(item.t)
            pending += [item.g for item in node.attribute if item.type == onnx.AttributeProto.GRAPH]
    return found
