"""Weight granularity: single weights of a kernel, from the score to the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders import Net
from helpers import CALIB, LENET, SAMPLES, run
from numpy.typing import NDArray
from onnx import numpy_helper
from test_masks import naive as naive_prefix
from test_score import CONVOLUTIONS, CRITERIA, DENSE, Conv, Slide, assert_scores, convolution, shares

import relief_onnx
from relief_onnx import calibrate
from relief_onnx.graph import Graph
from relief_onnx.layers import find
from relief_onnx.masks import initializer_masks, make_masks
from relief_onnx.pack import entropy_bound, unpack
from relief_onnx.scoring import LayerScore

Array = NDArray[Any]
WEIGHT = ("--granularity", "weight")
FEW = ("--data", CALIB, "--samples", 64)
MODELS = ("lenet300", "lenet5", "resnet8")


# --- the score --------------------------------------------------------------------------------------------------------


def naive(criterion: str, images: list[Array], w: Array, b: Array, groups: int, slide: Slide) -> tuple[Array, Array]:
    """images [C, *space] of any sizes, w [out, in per group, *kernel], b [out]: shares and bias shares."""
    power = 2 if criterion == "wanda" else 1
    seen = np.zeros((len(images[0]), *w.shape[2:]))
    for channel, *offset in np.ndindex(*seen.shape):
        alone = np.zeros(w.shape[2:])
        alone[tuple(offset)] = 1
        seen[channel, *offset] = sum(slide(np.abs(image[channel].astype(float)) ** power, alone).sum() for image in images)
    positions = sum(slide(image[0].astype(float), alone).size for image in images)
    factor = positions / len(images) if criterion.startswith("relief") else 1.0
    measure = {"relief": seen / len(images), "wanda": np.sqrt(seen / positions), "magnitude": np.ones(seen.shape)}
    per_group = len(w) // groups
    read = np.stack([measure[criterion.removesuffix("-fast")][j // per_group * w.shape[1] :][: w.shape[1]] for j in range(len(w))])
    score, bias = shares((np.abs(w.astype(float)) * read).reshape(len(w), -1), np.abs(b.astype(float)) * factor)
    return score.reshape(w.shape), bias


def measured(model: onnx.ModelProto, feeds: list[Array], criterion: str, granularity: str = "weight") -> list[LayerScore]:
    name = model.graph.input[0].name
    return list(relief_onnx.score(model, [{name: x} for x in feeds], criterion=criterion, granularity=granularity).values())


def check(found: LayerScore, wanted: tuple[Array, Array], rtol: float = 1e-6) -> None:
    """As `assert_scores`, for scores with kernel axes."""
    assert found.score.shape == wanted[0].shape
    flat = LayerScore(found.weight, found.node, found.score.reshape(len(found.score), -1), found.bias_score)
    assert_scores(flat, (wanted[0].reshape(flat.score.shape), wanted[1]), rtol)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name: str, criterion: str) -> None:
    case = CONVOLUTIONS[name]
    model, x, w, b, slide = convolution(case)
    (found,) = measured(model, [x], criterion)
    check(found, naive(criterion, list(x), w, b, case.values.get("group", 1), slide))


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", DENSE)
def test_a_dense_layer_scores_as_at_connection_granularity(name: str, criterion: str) -> None:
    net = Net(seed=4)
    out, *_ = DENSE[name](net)
    model = net.model(out)
    x = net.rng.standard_normal([5 if size == "N" else size for size in net.inputs[0][1]]).astype(np.float32)
    (found,), (wanted,) = (measured(model, [x], criterion, granularity) for granularity in ("weight", "connection"))
    assert np.array_equal(found.score, wanted.score)
    assert np.array_equal(found.bias_score, wanted.bias_score)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", ["2d", "3x3 on 4x7", "1x1", "transposed stride"])
def test_how_samples_are_split_does_not_matter(name: str, criterion: str) -> None:
    model, x, *_ = convolution(CONVOLUTIONS[name])
    (whole,), (parts,), (single,) = (measured(model, feeds, criterion) for feeds in ([x], [x[:1], x[1:]], list(x[:, None])))
    for other in (parts, single):
        check(other, (whole.score, whole.bias_score))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_fixed_batch_size_and_half_precision(criterion: str) -> None:
    """Ten samples through a model that takes four at a time: each counts once."""
    case = Conv((4, 5), (3, 3), values={"pads": [1] * 4}, samples=10)
    model, x, w, b, slide = convolution(case, dtype=np.float16, batch=4)
    (found,) = measured(model, [x], criterion)
    check(found, naive(criterion, list(x), w, b, 1, slide), rtol=1e-5)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_images_of_several_sizes(criterion: str) -> None:
    _, _, w, b, slide = convolution(Conv((5, 6), (3, 3), values={"pads": [1] * 4}))
    net = Net(seed=3)
    model = net.model(net.op("Conv", net.input("N", 3, "H", "W"), net.constant(w), net.constant(b), pads=[1] * 4))
    feeds = [net.rng.standard_normal((count, 3, *space)).astype(np.float32) for count, space in ((1, (5, 6)), (3, (4, 4)), (2, (5, 6)))]
    (found,) = measured(model, feeds, criterion)
    check(found, naive(criterion, [image for batch in feeds for image in batch], w, b, 1, slide))


def test_an_offset_that_sees_only_padding_scores_zero() -> None:
    case = Conv((1, 4), (3, 3), values={"pads": [1] * 4})
    (found,) = measured(convolution(case)[0], [convolution(case)[1]], "relief")
    assert not found.score[:, :, [0, 2]].any()
    assert found.score[:, :, 1].all()


# --- the masks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("name", ["2d", "groups", "depthwise", "transposed groups", "1x1", "1d", "3d", "3x3 on 1x5"])
def test_the_rule_ranks_all_weights_of_a_filter_with_its_bias(name: str, alpha: float) -> None:
    model, x, *_ = convolution(CONVOLUTIONS[name])
    plan = find(Graph(model))
    (layer,) = plan.layers
    (score,) = measured(model, [x], "relief")
    masks = make_masks(plan, {layer.name: score}, frozenset([layer.weight]), lambda layer: alpha, True)
    keep, bias = masks.keep[layer.weight], masks.bias_keep[layer.weight]
    assert keep.shape == layer.view.shape
    for j, row in enumerate(np.concatenate([score.score.reshape(len(keep), -1), score.bias_score[:, None]], 1)):
        assert [*keep[j].reshape(-1), bias[j]] == naive_prefix(row.tolist(), alpha)
    flags = initializer_masks(plan, masks)
    if not keep.all():
        assert np.array_equal(layer.view.apply(np.broadcast_to(flags[layer.weight], layer.view.source)), keep)
    if alpha == 1:
        assert np.array_equal(keep, score.score > 0)


def test_a_shared_kernel_keeps_what_any_reader_keeps_and_no_more() -> None:
    net = Net(seed=6)
    weight = net.weight(4, 4, 3, 3)
    y = net.op("Conv", net.input("N", 4, 5, 5), weight, pads=[1] * 4)
    model = net.model(net.op("ConvTranspose", net.op("Relu", y), weight, pads=[1] * 4))
    plan = find(Graph(model))
    assert len(plan.layers) == 2
    table = [net.rng.random((4, 4, 3, 3)) for _ in plan.layers]
    scores = {layer.name: LayerScore(weight, layer.name, item, np.zeros(4)) for layer, item in zip(plan.layers, table, strict=True)}
    masks = make_masks(plan, scores, frozenset([weight]), lambda layer: 0.4, False)
    rows = [np.asarray([naive_prefix(row, 0.4) for row in item.reshape(4, -1).tolist()]).reshape(item.shape) for item in table]
    wanted = rows[0] | rows[1].swapaxes(0, 1)
    assert np.array_equal(masks.keep[weight], wanted)
    assert 0 < wanted.mean() < 1


# --- the file ---------------------------------------------------------------------------------------------------------


def arrays_of(path: Path) -> dict[str, Array]:
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def weights_of(path: Path) -> dict[str, Array]:
    return {item.name: numpy_helper.to_array(item) for item in unpack(onnx.load(str(path))).graph.initializer}


def pruned(model: Path, folder: Path, *options: object, name: str = "out.onnx") -> dict[str, Any]:
    result = run("prune", model, *FEW, *WEIGHT, "-o", folder / name, "--force", "--json", folder / "report.json", *options)
    assert result.exit_code == 0, result.stderr
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


@pytest.mark.parametrize("criterion", ["flow", "relief", "wanda", "magnitude"])
@pytest.mark.parametrize("name", MODELS)
def test_the_report_counts_what_is_in_the_file(name: str, criterion: str, tmp_path: Path) -> None:
    model = SAMPLES / f"{name}.onnx"
    options = ("--alpha", 0.9, "--criterion", criterion, "--save-masks", tmp_path / "masks.npz", "--work-dir", tmp_path / "work")
    report = pruned(model, tmp_path, *options)
    before, after, masks, scores = weights_of(model), weights_of(tmp_path / "out.onnx"), *(
        arrays_of(tmp_path / file) for file in ("masks.npz", "work/scores.npz")
    )  # fmt: skip
    for row in report["layers"]:
        array = after[row["weight"]]
        assert row["weights_kept"] == np.count_nonzero(array)
        assert row["connections_kept"] == np.count_nonzero(array.reshape(*array.shape[:2], -1).any(-1))
        shape = before[row["weight"]].shape
        assert (row["weights"], row["connections"]) == (np.prod(shape), np.prod(shape[:2]))
        assert masks[f"{row['weight']}/keep"].shape == scores[f"{row['weight']}/score"].shape == shape
        assert scores[f"{row['weight']}/score"].dtype == np.float64
        assert row["weights_kept"] <= masks[f"{row['weight']}/keep"].sum() < np.prod(shape)
        assert row["status"] == "pruned"
        assert row["reason"].startswith("single weights with a score below the cut: ")
    total = sum(np.count_nonzero(after[row["weight"]]) for row in report["layers"])
    assert report["totals"]["weights_kept"] == total
    assert report["totals"]["kept_percent"] == pytest.approx(100 * total / sum(row["weights"] for row in report["layers"]))
    assert report["verification"]["masked_vs_output_max_rel"] <= 1e-4
    assert report["output"]["bytes"] < report["input"]["bytes"]


def test_the_reason_tells_what_the_rule_took_from_what_was_dead(tmp_path: Path) -> None:
    report = pruned(LENET, tmp_path, "--alpha", 0.3, "--save-masks", tmp_path / "masks.npz")
    before, masks = weights_of(LENET), arrays_of(tmp_path / "masks.npz")
    dead = 0
    for row in report["layers"]:
        kept = before[row["weight"]].astype(bool) & masks[f"{row['weight']}/keep"]
        below = np.count_nonzero(before[row["weight"]]) - kept.sum()
        gone = kept.sum() - row["weights_kept"]
        parts = [f"with a score below the cut: {below}", *([f"of dead units: {gone}"] if gone else [])]
        assert row["reason"] == "single weights " + "; ".join(parts)
        dead += gone
    assert dead > 0


@pytest.mark.parametrize("alpha", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("name", MODELS)
def test_packed_weights_are_close_to_the_entropy_bound(name: str, alpha: float, tmp_path: Path) -> None:
    """No codec of whole kernels is chosen; beside the bound there are only the nodes and names that rebuild each weight."""
    report = pruned(SAMPLES / f"{name}.onnx", tmp_path, "--alpha", alpha, "--criterion", "relief")
    weights = weights_of(tmp_path / "out.onnx")
    rows = report["layers"]
    bound = sum(entropy_bound(np.count_nonzero(weights[row["weight"]]), weights[row["weight"]].size, 32) for row in rows)
    dense = sum(weights[row["weight"]].nbytes for row in rows)
    rest = unpack(onnx.load(str(tmp_path / "out.onnx"))).ByteSize() - dense
    packed = [row["storage"] for row in rows if row["storage"] != "dense"]
    assert set(packed) <= {"bitmask", "gaps", "gaps8"}
    assert report["output"]["bytes"] <= 1.06 * bound + rest + 700 * len(packed)
    assert packed


def test_alpha_one_changes_nothing_on_its_samples(tmp_path: Path) -> None:
    report = pruned(LENET, tmp_path, "--alpha", 1)
    assert report["quality"]["agreement"]["logits"]["max_abs"] < 1e-4
    assert report["quality"]["agreement"]["logits"]["top1"] == 1


def test_the_paper_preset_takes_single_weights_too(tmp_path: Path) -> None:
    report = pruned(SAMPLES / "resnet8.onnx", tmp_path, "--preset", "paper")
    assert report["options"]["skip_rule"] == "both"
    weights = weights_of(tmp_path / "out.onnx")
    assert all(row["weights_kept"] == np.count_nonzero(weights[row["weight"]]) for row in report["layers"])


def test_zeros_that_were_there_count_as_gone_only_where_the_run_ranks() -> None:
    """Of three layers with zeros in the file given, one is skipped, one keeps all that it has, one is pruned."""
    net = Net(seed=3)
    half = np.indices((8, 8)).sum(0) % 2
    x, names = net.input("N", 8), [net.constant((half * net.rng.uniform(0.5, 1, (8, 8))).astype(np.float32)) for _ in range(3)]
    y = x
    for name in names:
        y = net.op("Sigmoid", net.op("MatMul", y, name))
    feed = {x: net.rng.uniform(1, 2, (64, 8)).astype(np.float32)}
    choices: dict[str, Any] = {"criterion": "magnitude", "layers": ((f"^{names[1]}$", 1.0),), "alpha": 0.6, "skip": f"^{names[0]}$"}
    report = relief_onnx.prune(net.model(y), [feed], granularity="weight", storage="dense", **choices).report
    rows = {row["weight"]: row for row in report["layers"]}
    assert [rows[name]["status"] for name in names] == ["skipped", "kept", "pruned"]
    kept = [(rows[name]["weights_kept"], rows[name]["connections_kept"]) for name in names]
    assert kept[:2] == [(64, 64), (32, 32)]
    assert kept[2][0] == kept[2][1] < 32
    assert report["totals"]["weights_kept"] == 96 + kept[2][0]
    assert report["output"]["nonzero_params"] == 64 + kept[2][0]


def test_scores_are_measured_for_one_granularity(tmp_path: Path) -> None:
    for granularity in ("weight", "connection"):
        assert run("score", LENET, *FEW, "--granularity", granularity, "-o", tmp_path / f"{granularity}.npz").exit_code == 0
    pruned(LENET, tmp_path, name="direct.onnx")
    pruned(LENET, tmp_path, "--scores", tmp_path / "weight.npz", name="two_steps.onnx")
    assert (tmp_path / "direct.onnx").read_bytes() == (tmp_path / "two_steps.onnx").read_bytes()
    for given, wanted, shapes in (
        ("connection", "weight", ("[6, 1]", "[6, 1, 5, 5]")),
        ("weight", "connection", ("[6, 1, 5, 5]", "[6, 1]")),
    ):
        options = ("--scores", tmp_path / f"{given}.npz", "--granularity", wanted)
        result = run("prune", LENET, *FEW, *options, "-o", tmp_path / "no.onnx")
        assert result.exit_code == 1
        assert result.stderr == (
            f"Error: {tmp_path / given}.npz was measured with --granularity {given}: features.0.weight/score is {shapes[0]}, {wanted} "
            f"granularity needs {shapes[1]}; measure again with relief-onnx score --granularity {wanted}, "
            f"or prune with --granularity {given} or channel+{given}.\n"
        )
    assert not (tmp_path / "no.onnx").exists()


def test_a_work_folder_of_another_granularity_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    real = calibrate.run

    def counted(*arguments: Any, **options: Any) -> Any:
        passes.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(calibrate, "run", counted)
    for granularity, runs in (("connection", 1), ("weight", 2), ("weight", 2)):
        pruned(LENET, tmp_path, "--work-dir", tmp_path / "work", "--granularity", granularity)
        assert len(passes) == runs


def test_the_closing_table_counts_what_is_removed(tmp_path: Path) -> None:
    shown = run("prune", LENET, *FEW, *WEIGHT, "-o", tmp_path / "out.onnx").stdout
    assert "weights kept" in shown
    assert "connections kept" not in shown
