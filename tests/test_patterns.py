"""N:M patterns: against a naive loop, and in the file where units go too."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from builders import Net
from helpers import SAMPLES, digits
from hypothesis import given
from hypothesis import strategies as st

import relief_onnx
from relief_onnx.errors import RecipeError
from relief_onnx.graph import Graph
from relief_onnx.layers import find
from relief_onnx.model import prepare
from relief_onnx.patterns import keep_pattern, parse_pattern


def naive(line: list[float], n: int, m: int) -> list[bool]:
    """One output at one offset: its inputs in order."""
    keep = [False] * len(line)
    for start in range(0, len(line), m):
        block = range(start, min(start + m, len(line)))
        for i in sorted(block, key=lambda i: (-line[i], i))[:n]:
            keep[i] = True
    return keep


@given(st.lists(st.integers(1, 3), min_size=0, max_size=2), st.integers(1, 11), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_each_block_keeps_its_best(kernel: list[int], inputs: int, n: int, more: int, seed: int) -> None:
    shares = np.random.default_rng(seed).integers(0, 4, (2, inputs, *kernel)).astype(float)  # few values, so many ties
    keep = keep_pattern(shares, n, n + more)
    assert keep.shape == shares.shape
    for place in np.ndindex(2, *kernel):
        line = (place[0], slice(None), *place[1:])
        assert keep[line].tolist() == naive(shares[line].tolist(), n, n + more)


def test_blocks_run_along_the_inputs() -> None:
    shares = np.arange(2 * 8 * 3 * 3, dtype=float).reshape(2, 8, 3, 3)
    keep = keep_pattern(shares, 2, 4)
    assert (keep.reshape(2, 2, 4, 3, 3).sum(2) == 2).all()
    assert keep[:, [2, 3, 6, 7]].all()


@pytest.mark.parametrize(("text", "wanted"), [("2:4", (2, 4)), ("1:2", (1, 2)), (" 3 : 16 ", (3, 16))])
def test_parse(text: str, wanted: tuple[int, int]) -> None:
    assert parse_pattern(text) == wanted


@pytest.mark.parametrize("text", ["", "2", "2:", "4:2", "0:4", "4:4", "-1:4", "2:4:8", "2/4", "two:four"])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="write N:M"):
        parse_pattern(text)


@pytest.mark.parametrize("repair", ["none", "least-squares"])
@pytest.mark.parametrize("granularity", ["channel+weight", "channel+connection"])
def test_blocks_are_those_of_the_file(granularity: str, repair: str) -> None:
    """Where channels go as well, and where an input dies because every neuron let it go."""
    model = onnx.load(str(SAMPLES / "resnet8.onnx"))
    result = relief_onnx.prune(
        model, [{model.graph.input[0].name: digits(64)}], pattern="2:4", granularity=granularity, keep="60%", round_to=1, repair=repair,
        storage="dense", threads=1,
    )  # fmt: skip
    assert result.report["units_removed"] > 0
    assert _fullest_block(result.model, 4) == 2
    assert result.report["verification"]["masked_vs_output_max_rel"] < 1e-4


@pytest.mark.parametrize("options", [{}, {"granularity": "channel+weight", "alpha_channel": 1.0, "round_to": 1}])
def test_inputs_that_nobody_keeps(options: dict[str, Any]) -> None:
    """Two of nine units have the smallest weights of their block for all that read it; without them blocks would be other ones."""
    rng = np.random.default_rng(0)
    net = Net(opset=17)
    x = net.input("N", 8)
    second = rng.uniform(1, 2, (9, 6)).astype(np.float32)
    second[[0, 3]] = 0.001
    hidden = net.op("Relu", net.op("MatMul", x, net.weight(8, 9)))
    model = net.model(net.op("MatMul", hidden, net.constant(second)))
    feed = {x: rng.normal(size=(64, 8)).astype(np.float32)}
    result = relief_onnx.prune(model, [feed], pattern="2:4", criterion="magnitude", storage="dense", threads=1, **options)
    assert result.report["units_removed"] == (2 if options else 0)
    assert result.report["verification"]["masked_vs_output_max_rel"] < 1e-5
    assert _fullest_block(result.model, 4) == 2


def _fullest_block(model: onnx.ModelProto, m: int) -> int:
    """The most entries that are not 0 in m consecutive inputs, of all layers with so many."""
    fullest = 0
    for layer in find(Graph(prepare(model))).layers:
        weight = layer.view.apply(Graph(prepare(model)).array(layer.weight))
        if weight.shape[1] >= m:
            blocks = (weight[:, : weight.shape[1] // m * m] != 0).reshape(len(weight), -1, m, *weight.shape[2:])
            fullest = max(fullest, int(blocks.sum(2).max()))
    return fullest


def tied() -> onnx.ModelProto:
    """A weight that one node reads as it is and the next one turned round."""
    net = Net()
    x, w = net.input("N", 12), net.weight(12, 16)
    return net.model(net.op("Gemm", net.op("Relu", net.op("MatMul", x, w)), w, transB=1))


@pytest.mark.parametrize("repair", ["none", "least-squares"])
def test_a_weight_that_is_read_both_ways_has_the_pattern_of_one(repair: str) -> None:
    data = [{"x1": np.random.default_rng(0).standard_normal((64, 12)).astype(np.float32)}]
    result = relief_onnx.prune(tied(), data, pattern="2:4", granularity="weight", repair=repair, storage="dense")
    value = onnx.numpy_helper.to_array(result.model.graph.initializer[0])
    assert ((value.T.reshape(16, 3, 4) != 0).sum(2) <= 2).all()
    assert "w2 has the pattern 2:4 along the inputs of MatMul_4, not along those of Gemm_8" in result.report["warnings"]


def test_a_file_that_has_the_pattern_says_so() -> None:
    data = [{"image": digits(64)}]
    options = {"pattern": "2:4", "granularity": "weight", "storage": "dense", "mean_shift": "off"}
    first = relief_onnx.prune(onnx.load(str(SAMPLES / "lenet5.onnx")), data, **options)
    with pytest.raises(relief_onnx.NothingPrunedError) as refused:
        relief_onnx.prune(first.model, data, **options)
    (_, few), *others = refused.value.reasons
    assert few == "its neurons have fewer inputs than a block of the pattern 2:4"
    assert {reason for _, reason in others} == {"it has the pattern 2:4 already"}
