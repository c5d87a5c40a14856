"""Where the network is cut: budgets, shares of flow, floors, patterns, and options that contradict each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders import Net
from helpers import LENET, run
from laws import assert_same_outputs
from numpy.typing import NDArray
from test_flow import FEW, MODELS, prune
from test_masks import tied
from test_relevance import two_outputs

import relief_onnx
from relief_onnx.cut import FLOOR
from relief_onnx.graph import Graph
from relief_onnx.kept_share import SHORT
from relief_onnx.layers import find
from relief_onnx.model import prepare
from relief_onnx.pipeline import Result

Array = NDArray[Any]


def weights_kept(result: Result) -> dict[str, tuple[int, int]]:
    """Of every mask the stored weights that it keeps, and all of them."""
    sizes = {row["weight"]: row["weights"] for row in result.report["layers"]}
    return {name: (int(keep.sum()) * (sizes[name] // keep.size), sizes[name]) for name, keep in result.masks.keep.items()}


def flows(result: Result) -> dict[str, Array]:
    return {score.weight: score.flow for score in result.scores.values()}


# -- how much stays ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [70, 30, 5])
@pytest.mark.parametrize("granularity", ["connection", "weight"])
@pytest.mark.parametrize("name", MODELS)
def test_keep_is_the_share_of_the_weights(name: str, granularity: str, keep: int) -> None:
    result = prune(name, granularity=granularity, keep=f"{keep}%")
    kept = weights_kept(result)
    total, left = sum(size for _, size in kept.values()), sum(count for count, _ in kept.values())
    unit = max(size // result.masks.keep[weight].size for weight, (_, size) in kept.items())
    alive = result.report["totals"]["weights_kept"]  # what dead units keep in the mask goes too
    assert alive <= round(keep / 100 * total)
    if left > round(keep / 100 * total):
        assert alive >= (1 - SHORT) * keep / 100 * total
    if left <= keep / 100 * total - unit:  # fewer only where the others carry nothing
        assert all(((flow > 0) == result.masks.keep[weight]).all() for weight, flow in flows(result).items())
    assert not any((result.masks.keep[weight] & (flow == 0)).any() for weight, flow in flows(result).items())
    assert all(row["alpha"] is None for row in result.report["layers"])
    assert all(count for count, _ in kept.values())


@pytest.mark.parametrize("criterion", ["relief", "magnitude", "wanda"])
def test_keep_with_a_local_score(criterion: str) -> None:
    """As a share of what is left when units are gone that the cut left without readers (`test_kept_share`): masks keep no less."""
    result = prune("lenet5", criterion=criterion, keep="30%")
    kept = weights_kept(result)
    assert sum(count for count, _ in kept.values()) >= 0.3 * sum(size for _, size in kept.values()) - 25
    assert 30 * (1 - SHORT) <= result.report["totals"]["kept_percent"] <= 30
    assert result.report["flow"] is None


@pytest.mark.parametrize("keep", [70, 30, 5])
@pytest.mark.parametrize("granularity", ["channel", "channel+connection", "channel+weight"])
@pytest.mark.parametrize("name", MODELS)
def test_keep_is_the_share_of_the_macs(name: str, granularity: str, keep: int) -> None:
    result = prune(name, granularity=granularity, keep=f"{keep}%")
    share = 100 * result.report["output"]["macs"] / result.report["input"]["macs"]
    told = [line for line in result.report["warnings"] if "MACs are left" in line]
    assert (share > keep) == bool(told)
    assert share > 0.75 * keep
    assert not told or keep == 5  # one channel of the first layers of lenet5 is more than that


def test_alpha_1_removes_only_what_has_no_flow(tmp_path: Path) -> None:
    net = Net(seed=1)
    a, b = net.weight(5, 6), net.weight(6, 3)
    x = net.input("N", 5)
    model = net.model(net.op("MatMul", net.op("Tanh", net.op("MatMul", x, a)), b))
    data = net.rng.standard_normal((12, 5)).astype(np.float32)
    onnx.save(model, str(tmp_path / "m.onnx"))
    np.save(tmp_path / "all.npy", data)
    found = run("prune", tmp_path / "m.onnx", "--data", tmp_path / "all.npy", "--alpha", 1, "-o", tmp_path / "o.onnx")
    assert found.exit_code == 4
    assert "every connection is above the cut that keeps 1 of the flow" in found.stderr
    assert not (tmp_path / "o.onnx").exists()
    data[:, 2] = 0  # this input says nothing
    result = relief_onnx.prune(model, [{x: data}], alpha=1.0)
    expected = np.ones((6, 5), bool)
    expected[:, 2] = False
    assert np.array_equal(result.masks.keep[a], expected)
    assert result.masks.keep[b].all()


@pytest.mark.parametrize("alpha", [0.99, 0.9, 0.5])
@pytest.mark.parametrize("name", MODELS)
def test_alpha_is_a_share_of_the_flow_of_all_layers_together(name: str, alpha: float) -> None:
    result = prune(name, alpha=alpha)
    flow = flows(result)
    kept = sum(float((part * result.masks.keep[weight]).sum()) for weight, part in flow.items())
    total, largest = (sum(float(part.sum()) for part in flow.values()), max(float(part.max()) for part in flow.values()))
    assert alpha * total <= kept * (1 + 1e-9)
    assert kept <= alpha * total + largest  # the shortest prefix
    shares = {weight: float((part * result.masks.keep[weight]).sum() / part.sum()) for weight, part in flow.items()}
    for row in result.report["layers"]:
        assert row["flow_kept"] == pytest.approx(shares[row["weight"]], rel=1e-9)
        assert row["flow_kept"] >= FLOOR


def test_alphas_of_two_kinds_are_two_rankings() -> None:
    result = prune("lenet5", alpha_conv=0.95, alpha_fc=0.6)
    flow = flows(result)
    for kind, alpha in (("features", 0.95), ("classifier", 0.6)):
        own = {weight: part for weight, part in flow.items() if weight.startswith(kind)}
        total = sum(float(part.sum()) for part in own.values())
        kept = sum(float((part * result.masks.keep[weight]).sum()) for weight, part in own.items())
        assert alpha * total <= kept <= alpha * total + max(float(part.max()) for part in own.values()), kind


def test_a_layer_that_a_recipe_names_is_on_its_own(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('keep = "20%"\n[layers]\n"features\\\\.3" = 0.999\n')
    report, masks = tmp_path / "r.json", tmp_path / "m.npz"
    options = ("--recipe", recipe, "--json", report, "--save-masks", masks, "-o", tmp_path / "o.onnx")
    assert run("prune", LENET, *FEW, *options).exit_code == 0
    rows = {row["weight"]: row for row in json.loads(report.read_text())["layers"]}
    assert rows["features.3.weight"]["flow_kept"] >= 0.999
    assert {name: row["alpha"] for name, row in rows.items() if row["alpha"] is not None} == {"features.3.weight": 0.999}
    with np.load(masks) as archive:
        kept = sum(int(archive[f"{name}/keep"].sum()) * row["weights"] // row["connections"] for name, row in rows.items())
    assert 0 <= round(0.2 * sum(row["weights"] for row in rows.values())) - kept < 25  # the others get what it leaves


def weak_branch() -> tuple[onnx.ModelProto, dict[str, Array], str]:
    """Two branches meet, one of them so weak that the ranking alone would leave nothing of it."""
    net = Net(seed=3)
    x, a, strong, weak, last = net.input("N", 8), net.weight(8, 12), net.weight(12, 40), net.weight(12, 40), net.weight(40, 4)
    net.initializers[weak] = net.initializers[weak] * np.float32(1e-7)
    h = net.op("Tanh", net.op("MatMul", x, a))
    y = net.op("Add", net.op("MatMul", h, strong), net.op("MatMul", h, weak))
    return net.model(net.op("MatMul", y, last)), {x: net.rng.standard_normal((32, 8)).astype(np.float32)}, weak


def test_no_layer_loses_all_its_flow_and_it_is_told() -> None:
    model, data, weak = weak_branch()
    result = relief_onnx.prune(model, [data], keep="10%")
    (floor,) = result.report["flow"]["floors"]
    assert floor["weight"] == weak
    assert floor["ranked"] == 0 < floor["kept"] == int(result.masks.keep[weak].sum())
    flow = flows(result)[weak]
    assert 0.02 <= float((flow * result.masks.keep[weak]).sum() / flow.sum()) < 0.5
    assert prune("lenet5", keep="30%").report["flow"]["floors"] == []


def test_a_shared_weight_is_ranked_by_the_flow_of_all_its_readers() -> None:
    model, weight = tied()
    x = np.random.default_rng(1).standard_normal((64, 5)).astype(np.float32)
    data = {model.graph.input[0].name: x}
    result = relief_onnx.prune(model, [data], keep="40%")
    layers = find(Graph(prepare(model))).by_weight()[weight]
    assert len(layers) == 2
    stored = sum(layer.view.invert(result.scores[layer.name].flow) for layer in layers)
    left = layers[0].view.invert(result.masks.keep[weight])
    assert left.sum() == round(0.4 * left.size)
    assert stored[left].min() > stored[~left].max()
    assert_same_outputs(result.masked, result.model, data, 1e-5)


@pytest.mark.parametrize("criterion", ["flow", "wanda"])
@pytest.mark.parametrize("granularity", ["connection", "weight"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 3)])
def test_a_pattern_keeps_the_best_of_every_block(n: int, m: int, granularity: str, criterion: str) -> None:
    result = prune("lenet5", pattern=f"{n}:{m}", granularity=granularity, criterion=criterion)
    seen = 0
    for score in result.scores.values():
        keep = result.masks.keep[score.weight]
        worth = score.flow if criterion == "flow" else score.score
        if keep.shape[1] < m:
            assert keep.all()  # a block would be longer than its neurons
            continue
        for start in range(0, keep.shape[1], m):
            block, own = keep[:, start : start + m], worth[:, start : start + m]
            assert (block.sum(1) == min(n, block.shape[1])).all()
            assert (np.where(block, own, np.inf).min(1) >= np.where(block, -np.inf, own).max(1)).all()
            seen += 1
    assert seen > 100
    assert {row["alpha"] for row in result.report["layers"]} == {None}
    assert len(result.masks.keep) == 5


CONFLICTS: dict[str, tuple[tuple[object, ...], int, str]] = {
    "keep and alpha": (("--keep", "30%", "--alpha", 0.9), 2, "keep and alpha both say how much stays; give one of them."),
    "keep and alpha-fc": (("--keep", "30%", "--alpha-fc", 0.9), 2, "keep and alpha both say how much stays; give one of them."),
    "keep and alpha-channel": (
        ("--keep", "30%", "--alpha-channel", 0.9, "--granularity", "channel"), 2,
        "keep and alpha-channel both say how many channels stay; give one of them.",
    ),
    "pattern and keep": (("--pattern", "2:4", "--keep", "30%"), 2, "keep and pattern both say how many weights stay; give one of them."),
    "pattern of channels": (
        ("--pattern", "2:4", "--granularity", "channel"), 2,
        "a pattern needs connections or weights; add --granularity weight, connection, or channel+weight.",
    ),
    "no pattern": (
        ("--pattern", "4:2"), 2, "'4:2' is no pattern; write N:M with N at least 1 and below M, as 2:4 (of every 4 inputs 2 stay).",
    ),
    "keep in words": (("--keep", "half"), 2, "keep is 'half'; give the percentage to keep, above 0 and at most 100, such as 30%."),
    "keep nothing": (("--keep", "0%"), 2, "keep is '0%'; give the percentage to keep, above 0 and at most 100, such as 30%."),
    "keep too much": (("--keep", "101%"), 2, "keep is '101%'; give the percentage to keep, above 0 and at most 100, such as 30%."),
    "keep a fraction": (("--keep", "0.3"), 2, "keep is '0.3', which could be 30 % or 0.3 %; write it with the % sign."),
    "an output that is not there": (
        ("--output-weight", "boxes=2"), 1, "output-weight names 'boxes', which is no output of the model; its outputs are logits.",
    ),
    "no output counts": (
        ("--output-weight", "logits=0"), 1, "output-weight is 0 for every output, so nothing would matter; give one of them a weight.",
    ),
    "no number": (
        ("--output-weight", "logits=much"), 2, "output-weight is 'logits=much'; write NAME=W, the name of an output and a number.",
    ),
    "no name": (("--output-weight", "2"), 2, "output-weight"),
    "below 0": (("--output-weight", "logits=-1"), 2, "output-weight of logits is -1.0; it must be a number, 0 or more."),
    "unknown shift": (("--mean-shift", "maybe"), 2, "Invalid value for '--mean-shift'"),
    "unknown criterion": (("--criterion", "taylor"), 2, "Invalid value for '--criterion'"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFLICTS)
def test_what_does_not_fit_together_is_one_sentence(name: str, tmp_path: Path) -> None:
    options, code, sentence = CONFLICTS[name]
    found = run("prune", LENET, *FEW, "-o", tmp_path / "o.onnx", *options)
    assert (found.exit_code, found.stdout) == (code, "")
    if not sentence.startswith("Invalid value"):
        assert found.stderr.startswith(f"Error: {sentence}")
        assert found.stderr.count("\n") == 1
        assert not sentence.endswith(".") or found.stderr == f"Error: {sentence}\n"
    assert sentence in found.stderr
    assert not list(tmp_path.iterdir())


def test_keep_of_channels_and_alpha_of_what_is_inside_go_together() -> None:
    wide, narrow = (prune("lenet5", granularity="channel+weight", keep="60%", alpha=alpha) for alpha in (0.99, 0.7))
    assert wide.report["output"]["macs"] >= narrow.report["output"]["macs"]
    assert narrow.report["totals"]["weights_kept"] < wide.report["totals"]["weights_kept"]


def test_an_output_that_counts_more_keeps_more() -> None:
    """Of the layers behind two outputs, at the same budget."""
    model, data, _, made = two_outputs()
    first, second = (item.name for item in model.graph.output)
    weights = {units: weight for weight, units in made.items()}
    kept = []
    for name in (first, second):
        result = relief_onnx.prune(model, [data], keep="50%", output_weight=[f"{name}=20"])
        kept.append(int(result.masks.keep[weights[first]].sum()) / int(result.masks.keep[weights[second]].sum()))
    assert kept[0] > kept[1]
