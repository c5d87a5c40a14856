"""Whole units: which belong together, how much each matters, which stay, and that they are gone from the file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from architectures import ARCHITECTURES, attention, conv, dense, text
from builders import Net
from helpers import CALIB, LENET, SAMPLES, digits, run
from laws import assert_same_outputs

import relief_onnx
from relief_onnx.channels import Choice, by_share, choose, consumer_shares, groups, unit_masks, without_units
from relief_onnx.coupling import Coupling
from relief_onnx.graph import Graph
from relief_onnx.layers import Plan, find
from relief_onnx.masks import applied, initializer_masks, insert, make_masks
from relief_onnx.model import prepare
from relief_onnx.scoring import LayerScore, Scores
from relief_onnx.surgery import apply_weights, operate
from relief_onnx.walk import trace

Traced = tuple[Graph, Plan, Coupling]


def traced(model: onnx.ModelProto) -> Traced:
    graph = Graph(prepare(model))
    plan = find(graph)
    return graph, plan, trace(graph, plan)


def chain(width: int, seed: int = 0) -> Traced:
    """Conv -> Relu -> Conv."""
    net = Net(seed=seed)
    x = net.input("N", 3, 6, 6)
    return traced(net.model(conv(net, net.op("Relu", conv(net, x, 3, width)), width, 4)))


def random_scores(plan: Plan, seed: int = 0) -> dict[str, LayerScore]:
    rng = np.random.default_rng(seed)
    found = {}
    for layer in plan.layers:
        rows = rng.random((layer.out_channels, layer.in_per_group + 1)) ** 3
        rows /= rows.sum(1, keepdims=True)
        found[layer.name] = LayerScore(layer.weight, layer.name, rows[:, :-1], rows[:, -1])
    return found


def with_reader(plan: Plan, *shares: float) -> dict[str, LayerScore]:
    """Scores in which every output of the last layer gets those shares of its inputs."""
    layer = plan.layers[-1]
    scores = random_scores(plan)
    scores[layer.name] = LayerScore(
        layer.weight, layer.name, np.tile(np.array(shares), (layer.out_channels, 1)), np.zeros(layer.out_channels)
    )
    return scores


def cut(
    found: Traced,
    scores: Scores,
    alpha: float,
    round_to: int = 1,
    allowed: frozenset[str] | None = None,
    importance: Callable[[Plan, Coupling, Scores], Mapping[int, float]] = consumer_shares,
) -> list[Choice]:
    _, plan, coupling = found
    weights = frozenset(layer.weight for layer in plan.layers) if allowed is None else allowed
    values = importance(plan, coupling, scores)
    return choose(groups(plan, coupling), coupling, values, by_share(lambda layer: alpha), allowed=weights, round_to=round_to)


def places(found: Traced, choice: Choice) -> list[int]:
    """Which channels of the first layer go."""
    line = found[2].outputs[found[1].layers[0].node].tolist()
    return sorted(line.index(unit) for unit in choice.removed)


# -- groups ---------------------------------------------------------------------------------------------------------------


def summary(name: str) -> list[tuple[int, int, int, int, int]]:
    """Of each group: members, readers, units, pinned ones, channels per unit."""
    _, plan, coupling = traced(ARCHITECTURES[name]()[0])
    found = groups(plan, coupling)
    assert sorted(layer.name for group in found for layer in group.layers) == sorted(layer.name for layer in plan.layers)
    return [(len(group.members), len(group.readers), group.size, len(group.pinned), group.width) for group in found]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("squeeze and excitation", [(3, 3, 8, 0, 1), (1, 1, 8, 0, 1), (1, 1, 4, 0, 1), (1, 0, 3, 3, 1)]),
        ("halves", [(2, 2, 8, 0, 1), (1, 1, 4, 0, 1), (1, 0, 3, 3, 1)]),
        ("attention, three layers", [(1, 3, 8, 0, 1), (3, 1, 4, 0, 3), (1, 1, 8, 0, 1), (1, 0, 3, 3, 1)]),
        ("attention, grouped queries", [(1, 3, 8, 0, 1), (3, 1, 2, 0, 3), (1, 1, 8, 0, 1), (1, 0, 3, 3, 1)]),
    ],
)
def test_groups_of_known_structures(name: str, expected: list[tuple[int, int, int, int, int]]) -> None:
    assert summary(name) == expected


def test_a_residual_stream_is_one_group_with_its_table() -> None:
    _, plan, coupling = traced(ARCHITECTURES["transformer"]()[0])
    stream = next(group for group in groups(plan, coupling) if len(group.members) > len(group.layers))
    assert (len(stream.layers), stream.size, stream.pinned) == (4, 8, {})
    assert any(name.startswith("table") for name in stream.members)


# -- importance -----------------------------------------------------------------------------------------------------------


def naive_shares(plan: Plan, coupling: Coupling, scores: Scores) -> dict[int, float]:
    found: dict[int, float] = {}
    for layer in plan.layers:
        per_group = layer.out_channels // layer.groups
        for row in range(layer.out_channels):
            for column in range(layer.in_per_group):
                unit = int(coupling.inputs[layer.node][row // per_group * layer.in_per_group + column])
                if unit >= 0:
                    found[unit] = found.get(unit, 0.0) + float(scores[layer.name].score[row, column]) / layer.out_channels
    return found


@pytest.mark.parametrize("name", ["shuffle", "halves", "transformer", "squeeze and excitation", "pixel shuffle"])
def test_importance_is_the_naive_loop(name: str) -> None:
    _, plan, coupling = traced(ARCHITECTURES[name]()[0])
    scores = random_scores(plan)
    expected, found = naive_shares(plan, coupling, scores), consumer_shares(plan, coupling, scores)
    assert found.keys() == expected.keys()
    assert all(abs(found[unit] - value) <= 1e-9 * max(value, 1) for unit, value in expected.items())


# -- which stay -----------------------------------------------------------------------------------------------------------


def test_the_shortest_prefix_that_carries_alpha_stays() -> None:
    found = chain(5)
    scores = with_reader(found[1], 0.1, 0.4, 0.05, 0.3, 0.15)
    assert places(found, cut(found, scores, 0.69)[0]) == [0, 2, 4]
    assert places(found, cut(found, scores, 0.71)[0]) == [0, 2]
    assert places(found, cut(found, scores, 1e-6)[0]) == [0, 2, 3, 4]  # one stays


def test_the_losses_of_several_readers_count_together() -> None:
    """Where two layers read the same channels, each may lose half of 1 - alpha; every layer but for rounding loses no more."""
    net = Net(seed=2)
    x = net.input("N", 3, 6, 6)
    y = net.op("Relu", conv(net, x, 3, 12))
    found = traced(net.model(conv(net, y, 12, 4), conv(net, y, 12, 5)))
    _, plan, coupling = found
    scores = random_scores(plan)
    values = consumer_shares(plan, coupling, scores)
    alpha, removed = 0.6, cut(found, scores, 0.6)[0].removed
    total, lost = sum(values.values()), sum(values[unit] for unit in removed)
    assert lost <= (1 - alpha) / 2 * total
    weakest = min((values[unit] for unit in values if unit not in removed), default=0.0)
    assert lost + weakest > (1 - alpha) / 2 * total  # and no unit more could go


def test_alpha_1_removes_only_what_has_no_share() -> None:
    found = chain(5)
    assert not any(choice.removed for choice in cut(found, random_scores(found[1]), 1.0))
    assert places(found, cut(found, with_reader(found[1], 0.1, 0.0, 0.4, 0.0, 0.5), 1.0)[0]) == [1, 3]


def test_ties_go_from_the_end_and_no_more_than_asked() -> None:
    found = chain(6)
    assert places(found, cut(found, with_reader(found[1], *[0.1] * 6), 0.45)[0]) == [3, 4, 5]


@pytest.mark.parametrize(
    ("width", "kept", "round_to", "expected"),
    [(16, 9, 8, 16), (16, 8, 8, 8), (16, 3, 8, 8), (20, 17, 8, 20), (20, 9, 8, 16), (6, 3, 8, 6), (6, 3, 1, 3), (12, 5, 4, 8)],
)
def test_channels_are_rounded_up(width: int, kept: int, round_to: int, expected: int) -> None:
    found = chain(width)
    choice = cut(found, with_reader(found[1], *[1 / width] * width), (kept - 0.5) / width, round_to)[0]
    assert choice.group.size - len(choice.removed) == expected
    assert ("rounded up to a multiple" in choice.reason) == (expected == width)


@pytest.mark.parametrize(("size", "kept", "expected"), [(4, 3, 4), (8, 3, 3), (2, 3, 4), (3, 3, 8), (1, 3, 8)])
def test_heads_are_rounded_by_their_channels(size: int, kept: int, expected: int) -> None:
    found = traced(text(lambda net, x: dense(net, attention(net, x, False, count=8, size=size), 8, 3))()[0])
    _, plan, coupling = found
    equal = dict.fromkeys(consumer_shares(plan, coupling, random_scores(plan)), 1.0)
    choices = cut(found, random_scores(plan), (kept - 0.5) / 8, 8, importance=lambda *_: equal)
    choice = next(choice for choice in choices if len(choice.group.layers) == 3)
    assert (choice.group.size, choice.group.width) == (8, size)
    assert choice.group.size - len(choice.removed) == expected


def test_what_a_user_excludes_keeps_its_group() -> None:
    found = chain(5)
    first, second = found[1].layers
    for left, kept in ((first, second), (second, first)):
        choice = cut(found, random_scores(found[1]), 0.3, allowed=frozenset({left.weight}))[0]
        assert not choice.removed
        assert choice.reason == f"--skip or --only leaves {kept.name} alone, which makes or reads them too"


def test_no_part_of_a_split_becomes_empty() -> None:
    found = traced(ARCHITECTURES["halves"]()[0])
    first = found[1].layers[0]
    line = found[2].outputs[first.node].tolist()
    weights = {unit: 1.0 if place < 2 else 0.01 + 0.001 * place for place, unit in enumerate(line)}
    choice = next(
        choice for choice in cut(found, random_scores(found[1]), 0.5, importance=lambda *_: weights) if first in choice.group.layers
    )
    assert line[7] not in choice.removed  # the best of the second half
    assert set(line[4:7]) <= choice.removed
    assert "a part of it keeps its last one" in choice.reason


def test_importance_can_be_exchanged() -> None:
    found = chain(4)

    def backwards(plan: Plan, coupling: Coupling, scores: Scores) -> Mapping[int, float]:
        return {unit: -share + 2 for unit, share in consumer_shares(plan, coupling, scores).items()}

    scores = with_reader(found[1], 0.1, 0.2, 0.3, 0.4)
    assert places(found, cut(found, scores, 0.6)[0]) == [0, 1]
    assert places(found, cut(found, scores, 0.5, importance=backwards)[0]) == [2, 3]


# -- masks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_connections_and_channels_together(name: str) -> None:
    """The finer masks share out what is left; masked and cut model agree, and no unit that went is left."""
    model, feed = ARCHITECTURES[name]()
    graph, plan, coupling = found = traced(model)
    scores = random_scores(plan)
    gone = frozenset(unit for choice in cut(found, scores, 0.4) for unit in choice.removed)
    assert gone
    left = without_units(plan, coupling, scores, gone)
    weights = frozenset(layer.weight for layer in plan.layers)
    fine = make_masks(plan, left, weights, lambda layer: 0.8, False)
    masks = unit_masks(graph, plan, coupling, gone, fine)
    assert all((masks.keep[weight] <= keep.reshape(masks.keep[weight].shape)).all() for weight, keep in fine.keep.items())
    for layer in plan.layers:
        rows = np.isin(coupling.outputs[layer.node], list(gone))
        assert not masks.keep[layer.weight][rows].any()
    flags = initializer_masks(plan, masks)
    operation = operate(apply_weights(graph.model, applied(graph, flags)))
    assert_same_outputs(insert(graph, flags), operation.model, feed, 1e-5)
    assert operation.units_removed


def test_the_share_that_is_left_is_shared_out() -> None:
    _, plan, coupling = chain(5)
    first, second = plan.layers
    unit = int(coupling.outputs[first.node][2])
    left = without_units(plan, coupling, random_scores(plan), [unit])
    assert not left[first.name].score[2].any()
    assert left[first.name].bias_score[2] == 0
    assert not left[second.name].score[:, 2].any()
    assert left[second.name].score[:, [0, 1, 3, 4]].all()


# -- the whole way --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["lenet5", "lenet300", "resnet8"])
def test_a_sample_model_gets_fewer_macs_in_a_dense_file(model: str, tmp_path: Path) -> None:
    target, report = tmp_path / "out.onnx", tmp_path / "report.json"
    result = run(
        "prune", SAMPLES / f"{model}.onnx", "--data", CALIB, "-o", target, "--granularity", "channel", "--alpha", "0.8", "--json", report
    )
    assert result.exit_code == 0, result.output
    document = json.loads(report.read_text())
    assert document["output"]["macs"] < document["input"]["macs"]
    assert document["output"]["params"] < document["input"]["params"]
    assert {row.get("storage", "dense") for row in document["layers"]} == {"dense"}
    cut_groups = [row for row in document["groups"] if row["units_kept"] < row["units"]]
    assert cut_groups
    assert all(row["units_kept"] % 8 == 0 for row in cut_groups)
    assert all(row["reason"] for row in document["groups"])


@pytest.mark.parametrize("criterion", ["flow", "relief"])
def test_alpha_1_on_a_model_without_idle_channels_is_exit_4_with_reasons(criterion: str, tmp_path: Path) -> None:
    net = Net(seed=2)
    x = net.input("N", 3, 6, 6)
    onnx.save(net.model(conv(net, net.op("Sigmoid", conv(net, x, 3, 6)), 6, 4)), str(tmp_path / "m.onnx"))
    np.save(tmp_path / "data.npy", np.random.default_rng(0).standard_normal((8, 3, 6, 6)).astype(np.float32))
    out = tmp_path / "out.onnx"
    options = ("--granularity", "channel", "--alpha", "1", "--criterion", criterion)
    result = run("prune", tmp_path / "m.onnx", "--data", tmp_path / "data.npy", "-o", out, *options)
    assert result.exit_code == 4
    assert "every unit is above the cut" in result.output
    assert not out.exists()


def test_scores_measured_once_serve_channels(tmp_path: Path) -> None:
    assert run("score", LENET, "--data", CALIB, "-o", tmp_path / "scores.npz").exit_code == 0
    files = []
    for name, scores in (("measured", []), ("stored", ["--scores", tmp_path / "scores.npz"])):
        files.append(tmp_path / f"{name}.onnx")
        arguments = ["--data", CALIB, "-o", files[-1], "--granularity", "channel", "--alpha", "0.8", *scores]
        assert run("prune", LENET, *arguments).exit_code == 0
    assert files[0].read_bytes() == files[1].read_bytes()


def test_both_granularities_through_the_library() -> None:
    name = onnx.load(str(LENET)).graph.input[0].name
    feeds = [{name: digits(16)}]
    coarse = relief_onnx.prune(LENET, feeds, granularity="channel", alpha=0.9, round_to=1)
    both = relief_onnx.prune(LENET, feeds, granularity="channel+connection", alpha=0.9, round_to=1)
    assert both.report["totals"]["weights_kept"] < coarse.report["totals"]["weights_kept"]
    for result in (coarse, both):
        assert_same_outputs(result.masked, result.model, feeds[0], 1e-5)


@pytest.mark.parametrize("given", ["channel+weight", "weight+channel", "channel,weight", "weight, channel"])
def test_granularities_in_any_order(given: str, tmp_path: Path) -> None:
    result = run(
        "prune", LENET, "--data", CALIB, "--samples", 8, "-o", tmp_path / "o.onnx", "--alpha", 0.8, "--json", "-", "--granularity", given
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["options"]["granularity"] == "channel+weight"
