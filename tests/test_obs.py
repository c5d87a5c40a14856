"""flow-obs: what a weight is worth after the solve, against solving without it; the choice over the network; what it does to models."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import pytest
from architectures import ARCHITECTURES
from builders import Net
from helpers import LENET, SAMPLES, digits
from numpy.typing import NDArray
from test_flow import other_digits
from test_repair import plain, system

import relief_onnx
from relief_onnx import contest, obs_units
from relief_onnx import solve as solving
from relief_onnx.cut import FLOOR
from relief_onnx.errors import NothingPrunedError, RecipeError
from relief_onnx.graph import Graph
from relief_onnx.layers import find
from relief_onnx.masks import Masks
from relief_onnx.model import prepare
from relief_onnx.obs_pool import EXCHANGED, FLOOR_OF_BUDGET, Pool
from relief_onnx.options import resolve
from relief_onnx.session import Session
from relief_onnx.solve import RIDGE, solve
from relief_onnx.worth import Appraisal

Array = NDArray[Any]


def objective(x: Array, wanted: Array, keep: Array, prior: Array) -> float:
    """The least of |Xw + b - t|^2 + lambda |w - prior|^2 over the kept weights and b; a weight that is gone is 0 and pays as well."""
    centred = x.astype(np.float64) - x.mean(0, dtype=np.float64)
    ridge = RIDGE * np.square(centred).sum() / x.shape[1]
    target = wanted - wanted.mean(dtype=np.float64)
    places = np.flatnonzero(keep)
    stacked = np.concatenate([centred[:, places], np.sqrt(ridge) * np.eye(len(places))])
    w = np.linalg.lstsq(stacked, np.concatenate([target, np.sqrt(ridge) * prior[places]]), rcond=None)[0]
    gone = np.square(np.delete(prior, places)).sum()
    return float(np.square(centred[:, places] @ w - target).sum() + ridge * (np.square(w - prior[places]).sum() + gone))


@pytest.mark.parametrize("size", [1, 3])
def test_a_loss_is_what_the_error_grows_by(size: int) -> None:
    """Solved again without each kept weight (or run of weights), by another solver."""
    x, wanted, weight, bias, keep = system(4, rows=400)
    keep = np.repeat(keep[:, ::size], size, axis=1)
    appraisal = Appraisal.empty(keep.shape, size, additions=False)
    solve(x, plain(wanted), weight, bias, keep, True, appraisal)
    for j, row in enumerate(keep):
        for entry in range(len(row) // size):
            without = row.copy()
            without[entry * size : (entry + 1) * size] = False
            lost = objective(x, wanted[:, j], without, weight[j]) - objective(x, wanted[:, j], row, weight[j])
            assert appraisal.worth[j, entry] == pytest.approx(lost if row[entry * size] else 0.0, rel=2e-3, abs=1e-3)


def test_blocks_that_take_turns_are_inverted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory does not hold their inverses they are made again, and nothing else changes."""
    rng = np.random.default_rng(6)
    x, weight = rng.standard_normal((600, 300)).astype(np.float32), rng.standard_normal((5, 300))
    wanted = (x @ weight.T + rng.standard_normal((600, 5))).astype(np.float32)
    keep, made = rng.random((5, 300)) < 0.5, list[int]()
    inverse = solving.inverse_root

    def counted(matrix: Array) -> Array:
        made[-1] += 1
        return inverse(matrix)

    monkeypatch.setattr(solving, "inverse_root", counted)
    monkeypatch.setattr(solving, "BLOCK", 128)
    worths = []
    for limit in (solving.INVERSE_BYTES, 30_000):
        made.append(0)
        monkeypatch.setattr(solving, "INVERSE_BYTES", limit)
        appraisal = Appraisal.empty(keep.shape, 1, additions=True)
        solve(x, plain(wanted), weight, np.zeros(5), keep, True, appraisal)
        worths.append(appraisal.worth)
    assert made == [15, 30]
    np.testing.assert_allclose(*worths, rtol=1e-12)  # runs of other units are summed in another order
    assert (worths[0][keep] > 0).all()


@pytest.mark.parametrize("size", [1, 3])
def test_a_gain_is_what_the_error_falls_by(size: int) -> None:
    """Solved again with each weight that is gone; the prior of those that are gone is 0 here, so that the ridge asks for nothing."""
    x, wanted, weight, bias, keep = system(5, rows=400)
    keep = np.repeat(keep[:, ::size], size, axis=1)
    weight = weight * keep
    appraisal = Appraisal.empty(keep.shape, size, additions=True)
    solve(x, plain(wanted), weight, bias, keep, True, appraisal)
    gains = []
    for j, row in enumerate(keep):
        for entry in np.flatnonzero(~row[::size]):
            more = row.copy()
            more[entry * size : (entry + 1) * size] = True
            won = objective(x, wanted[:, j], row, weight[j]) - objective(x, wanted[:, j], more, weight[j])
            gains.append((appraisal.worth[j, entry], won))
    found, expected = np.array(gains).T
    if size == 1:
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5 * expected.max())
    else:  # held down a little where kernels are nearly combinations of others
        assert (found <= expected * 1.005 + 1e-3 * expected.max()).all()
        assert np.corrcoef(found, expected)[0, 1] > 0.95


def pool(seed: int = 0, keep: float = 0.3, granularity: str = "weight") -> Pool:
    model = prepare(onnx.load(str(LENET)))
    plan = find(Graph(model))
    rng = np.random.default_rng(seed)
    shapes = {layer.weight: layer.view.shape if granularity == "weight" else layer.view.shape[:2] for layer in plan.layers}
    masks = Masks({weight: rng.random(shape) < keep for weight, shape in shapes.items()}, {})
    every = Masks({weight: np.ones(shape, bool) for weight, shape in shapes.items()}, {})
    made = Pool(plan.layers, masks, every, {})
    for place, layer in enumerate(plan.layers):
        made.learn(place, rng.random(shapes[layer.weight]) * 10.0 ** rng.integers(-6, 6))
    return made


def kept(found: Pool) -> int:
    return sum(int(found.mask(place).sum()) * found.cost(place) for place in range(len(found.layers)))


@pytest.mark.parametrize("granularity", ["weight", "connection"])
@pytest.mark.parametrize("share", [0.005, 0.02, 0.1, 0.5, 0.9])
def test_the_budget_is_met_and_no_layer_is_emptied(share: float, granularity: str) -> None:
    found = pool(keep=share, granularity=granularity)
    largest = max(found.cost(place) for place in range(len(found.layers)))
    floors = found.cut(1.0)
    sizes = [found.mask(place).size * found.cost(place) for place in range(len(found.layers))]
    floor = min(FLOOR, FLOOR_OF_BUDGET * found.budget / sum(sizes))
    assert found.budget - largest < kept(found) <= found.budget
    for place in range(len(found.layers)):
        assert found.mask(place).sum() >= floor * found.mask(place).size - 1e-9
    assert {floor.weight for floor in floors} <= {layer.weight for layer in found.layers}
    for number, before in ((1, kept(found)), (2, kept(found))):
        moved = found.exchange()
        assert moved <= EXCHANGED * found.budget + largest, number
        assert before - largest < kept(found) <= found.budget


def test_an_exchange_raises_what_is_kept() -> None:
    found = pool()
    found.cut(1.0)
    rng = np.random.default_rng(1)
    for place in range(len(found.layers)):
        found.learn(place, rng.random(found.mask(place).shape))
    before = found.worth[found.keep].sum()
    assert found.exchange() > 0
    assert found.worth[found.keep].sum() > before
    while found.exchange():
        pass
    assert all(found.mask(place).sum() >= FLOOR * found.mask(place).size - 1 for place in range(len(found.layers)))


def test_dead_units_give_their_weights_to_others() -> None:
    found = pool(keep=0.5)
    found.cut(1.0)
    before = kept(found)
    surviving = {layer.weight: found.mask(place).copy() for place, layer in enumerate(found.layers)}
    dead = found.layers[1].weight
    surviving[dead][:5] = False
    found.bury(surviving)
    assert kept(found) < before
    found.exchange()
    assert kept(found) == found.budget
    assert not found.mask(1)[:5].any()


@pytest.mark.parametrize(
    ("name", "granularity", "keep"), [("lenet300", "weight", "5%"), ("resnet8", "weight", "15%"), ("resnet8", "connection", "30%")]
)
def test_it_is_closer_to_the_original_than_flow(name: str, granularity: str, keep: str) -> None:
    """With as many weights, both repaired, on digits that calibration has not seen."""
    model = onnx.load(str(SAMPLES / f"{name}.onnx"))
    feed, unseen = ({model.graph.input[0].name: x} for x in (digits(256), other_digits()))
    wanted = Session(model).run(unseen)[0]
    errors, numbers = [], []
    for criterion in ("flow", "flow-obs"):
        result = relief_onnx.prune(
            model, [feed], repair="least-squares", criterion=criterion, granularity=granularity, keep=keep, storage="dense", threads=1
        )
        errors.append(float(np.square(Session(result.model).run(unseen)[0] - wanted).mean()))
        shapes = {layer.weight: layer.view.shape for layer in find(Graph(prepare(model))).layers}
        numbers.append(sum(int(kept.sum()) * int(np.prod(shapes[weight])) // kept.size for weight, kept in result.masks.keep.items()))
    assert errors[1] < 0.9 * errors[0], errors
    assert abs(numbers[1] - numbers[0]) <= 9, numbers
    assert result.report["flow"]["exchanged"]
    assert "choose" in result.report["timing"]


@pytest.mark.parametrize("pattern", ["2:4", "1:3"])
def test_patterns_hold_and_are_repaired(pattern: str) -> None:
    n, m = map(int, pattern.split(":"))
    model = onnx.load(str(SAMPLES / "resnet8.onnx"))
    feed, unseen = ({model.graph.input[0].name: x} for x in (digits(128), other_digits()))
    wanted = Session(model).run(unseen)[0]
    errors = []
    for options in ({"repair": "none"}, {"repair": "least-squares", "criterion": "flow"}, {"repair": "least-squares"}):
        result = relief_onnx.prune(model, [feed], granularity="weight", pattern=pattern, threads=1, **options)
        errors.append(float(np.square(Session(result.model).run(unseen)[0] - wanted).mean()))
    assert errors[2] < errors[1] < errors[0], errors
    for layers in find(Graph(prepare(model))).by_weight().values():
        keep = result.masks.keep[layers[0].weight]
        if keep.shape[1] >= m:
            whole = keep[:, : keep.shape[1] // m * m]
            assert (whole.reshape(len(keep), -1, m, *keep.shape[2:]).sum(2) == n).all()
        else:
            assert keep.all()


def test_units_are_chosen_again() -> None:
    """Closer on digits not seen, with no more work; on ResNet-8 at half of the work."""
    model = onnx.load(str(SAMPLES / "resnet8.onnx"))
    feed, unseen = ({model.graph.input[0].name: x} for x in (digits(256), other_digits()))
    wanted = Session(model).run(unseen)[0]
    errors, macs = [], []
    for criterion in ("flow", "flow-obs"):
        result = relief_onnx.prune(
            model, [feed], granularity="channel", keep="50%", round_to=1, repair="least-squares", criterion=criterion, threads=1
        )
        errors.append(float(np.square(Session(result.model).run(unseen)[0] - wanted).mean()))
        macs.append(result.report["output"]["macs"] / result.report["input"]["macs"])
    assert errors[1] < 0.9 * errors[0], errors
    assert max(macs) <= 0.5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_units_of_all_architectures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention (Q and K that no layer reads), gates, depthwise and grouped layers: a choice is found and the model runs."""
    monkeypatch.setattr(contest, "LEAST_CHOSEN", 1)
    model, feed = ARCHITECTURES[name]()
    options: dict[str, Any] = {"granularity": "channel", "keep": "70%", "round_to": 1, "criterion": "flow-obs", "threads": 1}
    try:
        result = relief_onnx.prune(model, [feed], **options)
    except NothingPrunedError:
        with pytest.raises(NothingPrunedError):
            relief_onnx.prune(model, [feed], **options | {"criterion": "flow"})
        return
    assert result.report["units_removed"] > 0
    assert result.report["timing"]["choose"] > 0


def test_one_choice_of_units_has_flows_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many of each group as by flow, but not all the same ones."""
    model = onnx.load(str(SAMPLES / "resnet8.onnx"))
    feed = {model.graph.input[0].name: digits(256)}
    options: dict[str, Any] = {"granularity": "channel", "keep": "60%", "repair": "least-squares", "round_to": 1, "threads": 1}
    flow = relief_onnx.prune(model, [feed], criterion="flow", **options)
    monkeypatch.setattr(obs_units, "TRIES", ((0.75, True),))
    later = itertools.count()
    monkeypatch.setattr(obs_units, "distance", lambda wanted, found: -next(later))  # the last one wins
    chosen = relief_onnx.prune(model, [feed], criterion="flow-obs", **options)
    numbers = [[row["units_kept"] for row in result.report["groups"]] for result in (flow, chosen)]
    assert numbers[0] == numbers[1]
    assert any(not np.array_equal(flow.masks.keep[weight], chosen.masks.keep[weight]) for weight in flow.masks.keep)


def test_units_that_go_stay_away() -> None:
    model = onnx.load(str(SAMPLES / "resnet8.onnx"))
    feed = {model.graph.input[0].name: digits(64)}
    options: dict[str, Any] = {
        "granularity": "channel+weight",
        "keep": "60%",
        "alpha": 0.9,
        "round_to": 1,
        "repair": "least-squares",
        "threads": 1,
    }
    result = relief_onnx.prune(model, [feed], **options)
    assert result.report["options"]["criterion"] == "flow-obs"
    assert sum(row["units"] - row["units_kept"] for row in result.report["groups"]) > 0
    for layer in find(Graph(prepare(model))).layers:
        before, left = next(row["channels"] for row in result.report["layers"] if row["node"] == layer.name)
        rows = result.masks.keep[layer.weight].reshape(layer.out_channels, -1).any(1)
        assert left <= rows.sum() <= before


def test_weights_that_repair_leaves_keep_flows_mask() -> None:
    net = Net(seed=3)
    x, w = net.input("N", 6), net.weight(6, 6)
    hidden = net.op("Relu", net.op("MatMul", net.op("Relu", net.op("MatMul", x, w)), w))
    model = net.model(net.op("MatMul", hidden, net.weight(6, 4)))
    feed = {x: net.rng.standard_normal((64, 6)).astype(np.float32)}
    found = [
        relief_onnx.prune(model, [feed], repair="least-squares", criterion=criterion, keep="50%").masks.keep[w]
        for criterion in ("flow", "flow-obs")
    ]
    assert np.array_equal(*found)


def test_which_criterion_is_the_default() -> None:
    assert resolve(None, {}, {}).criterion == "flow"
    assert resolve(None, {}, {"repair": "least-squares"}).criterion == "flow-obs"
    assert resolve(None, {}, {"repair": "distill"}).criterion == "flow-obs"
    assert resolve(None, {}, {"repair": "labels", "rewind": "init.onnx"}).criterion == "flow"
    assert resolve(None, {}, {"criterion": "flow-obs"}).repair == "least-squares"
    assert resolve("paper", {}, {"repair": "least-squares"}).criterion == "relief"
    with pytest.raises(RecipeError, match="criterion flow-obs chooses by what is left after repair; add --repair least-squares"):
        resolve(None, {}, {"criterion": "flow-obs", "repair": "none"})


def test_the_same_from_stored_scores(tmp_path: Any) -> None:
    model, stored = onnx.load(str(LENET)), tmp_path / "scores.npz"
    feed = {model.graph.input[0].name: digits(64)}
    from relief_onnx.scoring import write_scores

    write_scores(relief_onnx.score(model, [feed], granularity="weight"), stored)
    options: dict[str, Any] = {"granularity": "weight", "keep": "20%", "repair": "least-squares", "threads": 1}
    straight, again = relief_onnx.prune(model, [feed], **options), relief_onnx.prune(model, [feed], scores=stored, **options)
    assert straight.model.SerializeToString() == again.model.SerializeToString()


def test_a_later_round_meets_its_budget_with_what_the_one_before_left() -> None:
    """What went stays away, and the number is filled from the rest."""
    model = onnx.load(str(LENET))
    feed = {model.graph.input[0].name: digits(128)}
    result = relief_onnx.prune(
        model, [feed], granularity="weight", keep="5%", repair="distill", iterations=3, epochs=1, storage="dense", threads=1
    )
    kept = sum(int(keep.sum()) for keep in result.masks.keep.values())
    total = sum(keep.size for keep in result.masks.keep.values())
    assert result.report["options"]["criterion"] == "flow-obs"
    assert kept == pytest.approx(0.05 * total, abs=1)


def test_units_whose_readers_are_not_solved_for_go_by_their_relevance() -> None:
    """A weight that two nodes read, one of them turned round, is left by the repair, so nothing says what its units would cost."""
    net = Net()
    x, w = net.input("N", 12), net.weight(12, 16)
    model = net.model(net.op("Gemm", net.op("Relu", net.op("MatMul", x, w)), w, transB=1))
    data = [{x: np.random.default_rng(0).standard_normal((64, 12)).astype(np.float32)}]
    flow, again = (
        relief_onnx.prune(model, data, granularity="channel", keep="50%", round_to=1, repair="least-squares", criterion=criterion)
        for criterion in ("flow", "flow-obs")
    )
    assert again.report["units_removed"] == flow.report["units_removed"] > 0
    left = [(row["error_before"], row["error_after"], row["reason"]) for row in again.report["repair"]["layers"]]
    assert left == 2 * [(None, None, "several nodes read its weight")]
