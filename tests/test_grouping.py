"""Groups of samples that a model answers alike, and flow within them."""

from __future__ import annotations

import numpy as np
import pytest
from builders import Net

import relief_onnx
from relief_onnx import calibrate
from relief_onnx.data import ImageOptions, open_dataset
from relief_onnx.flow import DEFAULT_RULE
from relief_onnx.graph import Graph
from relief_onnx.grouping import Grouping
from relief_onnx.model import input_specs


def outputs(count: int, clusters: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Samples around far apart centres, and which one each is of."""
    rng = np.random.default_rng(seed)
    centers, which = 10 * rng.standard_normal((clusters, 6)), np.arange(count) % clusters  # equally many of each
    return (centers[which] + 0.01 * rng.standard_normal((count, 6))).astype(np.float32), which


def test_samples_around_two_centres_are_two_groups() -> None:
    values, which = outputs(64, 2)
    grouping = Grouping(["y"], [({"y": values}, 64)], 1)
    grouping.look({"y": values}, 64)
    assert grouping.groups == 2
    assert len(set(grouping.current[which == 0])) == len(set(grouping.current[which == 1])) == 1
    assert grouping.current[which == 0][0] != grouping.current[which == 1][0]


def test_a_group_does_not_depend_on_the_batch() -> None:
    values, _ = outputs(64, 5)
    grouping = Grouping(["y"], [({"y": values[:40]}, 40), ({"y": values[40:]}, 24)], 4)
    grouping.look({"y": values}, 64)
    whole = grouping.current
    for start in range(0, 64, 7):
        part = values[start : start + 7]
        grouping.look({"y": part}, len(part))
        assert np.array_equal(grouping.current, whole[start : start + 7])


@pytest.mark.parametrize(("count", "groups"), [(1, 1), (7, 1), (8, 2), (16, 4), (64, 16)])
def test_few_samples_make_few_groups(count: int, groups: int) -> None:
    values = np.random.default_rng(1).standard_normal((count, 9)).astype(np.float32)
    assert Grouping(["y"], [({"y": values}, count)], 4).groups == groups


def test_outputs_that_tell_nothing_apart_make_one_group() -> None:
    constant = np.ones((32, 3), np.float32)
    assert Grouping(["y"], [({"y": constant}, 32)], 4).groups == 1
    turned = np.ones((3, 32), np.float32)  # its first axis does not count the samples
    assert Grouping(["y"], [({"y": turned}, 32)], 4).groups == 1
    assert Grouping([], [({}, 32)], 4).groups == 1


def test_long_and_broken_outputs_are_described_all_the_same() -> None:
    values = np.random.default_rng(2).standard_normal((32, 5, 100)).astype(np.float32)
    values[3, 0, 0], values[4, 0, 0] = np.nan, np.inf
    grouping = Grouping(["y"], [({"y": values}, 32)], 3)
    grouping.look({"y": values}, 32)
    assert grouping.groups == 8
    assert set(grouping.current.tolist()) <= set(range(8))


def test_flow_is_the_mean_of_the_flows_within_groups() -> None:
    """Two dense layers, against the formula in float64 for every group by itself."""
    net = Net(seed=3)
    x, a, b = net.input("N", 6), net.weight(6, 8), net.weight(8, 4)
    model = net.model(net.op("MatMul", net.op("Relu", net.op("MatMul", x, a)), b))
    data = net.rng.standard_normal((48, 6)).astype(np.float32) * np.linspace(0.5, 2, 6, dtype=np.float32)
    scores = relief_onnx.score(model, [{x: data}], granularity="weight")
    dataset = open_dataset([{x: data}], input_specs(model), images=ImageOptions())
    grouping = calibrate.sort_samples(model, dataset, DEFAULT_RULE.bits, limit=None, seed=0, threads=1)
    graph = Graph(model)
    first, second = graph.array(a).T.astype(np.float64), graph.array(b).T.astype(np.float64)
    hidden = np.maximum(data @ first.T, 0.0)
    result = hidden @ second.T
    grouping.look({graph.outputs[0]: result.astype(np.float32)}, len(data))
    assert grouping.groups > 2
    flows = [np.zeros(first.shape), np.zeros(second.shape)]
    for group in set(grouping.current.tolist()):
        members = grouping.current == group
        relevance = np.full(len(second), 1 / len(second))
        for place, (weight, values) in reversed(list(enumerate([(first, data.astype(np.float64)), (second, hidden)]))):
            center = values.mean(0)
            part = weight**2 * (np.square(values[members] - center).mean(0) + DEFAULT_RULE.constant * center**2)
            share = part / part.sum(1, keepdims=True)
            flows[place] += members.mean() * share * relevance[:, None]
            relevance = share.T @ relevance
    found = {score.weight: score.flow for score in scores.values()}
    np.testing.assert_allclose(found[a], flows[0], rtol=1e-4)
    np.testing.assert_allclose(found[b], flows[1], rtol=1e-4)
