"""The ridge chosen by cross-validation: how close new weights stay to the old ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from builders import Net
from numpy.typing import NDArray

import relief_onnx
from relief_onnx import solve as solving
from relief_onnx.contest import Contest
from relief_onnx.repair_choice import MARGIN
from relief_onnx.ridge import ENOUGH_ROWS, PARTS, best_part
from relief_onnx.solve import Target, solve

Array = NDArray[Any]


def samples(rng: np.random.Generator, count: int, tokens: int, features: int, alike: float) -> Array:
    """Rows of so many tokens per sample; `alike`: the part of a row that all tokens of its sample share."""
    own = rng.standard_normal((count, 1, features)) * np.sqrt(alike)
    return (own + rng.standard_normal((count, tokens, features)) * np.sqrt(1 - alike)).reshape(-1, features).astype(np.float32)


def centred(x: Array) -> Array:
    return np.asarray(x - x.mean(0), np.float32)


@pytest.mark.parametrize("seed", range(3))
def test_what_can_be_explained_takes_the_least_ridge_and_noise_the_largest(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = centred(samples(rng, 400, 1, 20, 0.0))
    keep, old = rng.random((6, 20)) < 0.5, rng.standard_normal((6, 20))
    truth = np.where(keep, old + rng.standard_normal((6, 20)), 0.0)
    start = np.where(keep, old, 0.0)
    assert best_part(x, centred(x @ truth.T), start, keep) == min(PARTS)
    noise = rng.standard_normal((400, 6))
    assert best_part(x, centred(x @ start.T + 10 * noise), start, keep) == max(PARTS)


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_one_sample_do_not_vouch_for_each_other(seed: int) -> None:
    """30 samples of 32 like tokens, 60 inputs: plenty of rows by number, few by what they say."""
    rng = np.random.default_rng(seed)
    truth, keep = rng.standard_normal((16, 60)), rng.random((16, 60)) < 0.5

    def drawn(count: int) -> tuple[Array, Array]:
        x = samples(rng, count, 32, 60, 0.95)
        return x, (x @ truth.T + 4 * samples(rng, count, 32, 16, 0.95)).astype(np.float32)

    (x, wanted), (unseen, there) = drawn(30), drawn(500)

    def error(validated: bool) -> float:
        target = Target(wanted, np.zeros_like(wanted), np.ones(16), one_sided=False)
        weight, bias = solve(x, target, truth, np.zeros(16), keep, True, validated=validated)
        return float(np.square(unseen @ weight.T + bias - there).mean())

    assert error(True) < 0.9 * error(False)


def test_the_same_in_any_unit() -> None:
    rng = np.random.default_rng(5)
    x = centred(samples(rng, 40, 8, 30, 0.9))
    keep, weight = rng.random((4, 30)) < 0.5, rng.standard_normal((4, 30))
    weight[~keep] = 0.0
    wanted = centred(x @ weight.T + samples(rng, 40, 8, 4, 0.9))
    start = 0.5 * weight
    found = best_part(x, wanted, start, keep)
    assert min(PARTS) < found < max(PARTS)
    assert best_part(np.float32(1e3) * x, wanted, start / 1e3, keep) == found
    assert best_part(x, np.float32(1e-3) * wanted, start / 1e3, keep) == found


def test_with_plenty_of_rows_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(6)
    x = rng.standard_normal((ENOUGH_ROWS * 5, 5)).astype(np.float32)
    wanted, keep = rng.standard_normal((len(x), 3)).astype(np.float32), np.ones((3, 5), bool)
    tried: list[int] = []
    monkeypatch.setattr(solving, "best_part", lambda *_: tried.append(1) or 0.01)
    for rows in (len(x), len(x) - 1):
        target = Target(wanted[:rows], np.zeros_like(wanted[:rows]), np.ones(3), one_sided=False)
        solve(x[:rows], target, np.zeros((3, 5)), np.zeros(3), keep, True, validated=True)
        assert bool(tried) == (rows < len(x))


def network(features: int = 24) -> tuple[Any, str]:
    """Tokens through two dense layers with a tanh between them."""
    net = Net(seed=3)
    x = net.input("N", 8, features)
    middle = net.op("Tanh", net.op("Add", net.op("MatMul", x, net.weight(features, 48)), net.bias(48)))
    return net.model(net.op("Add", net.op("MatMul", middle, net.weight(48, 6)), net.bias(6))), x


def test_the_outputs_decide_between_the_rule_and_the_validated_ridge() -> None:
    model, x = network()
    rng = np.random.default_rng(4)
    data = samples(rng, 120, 8, 24, 0.97).reshape(120, 8, 24)
    found = relief_onnx.prune(model, [{x: data}], repair="least-squares", criterion="flow", keep="40%", threads=1)
    ridge = found.report["repair"]["ridge"]
    errors = ridge["errors"]
    assert set(errors) == {"rule", "validated"}
    assert ridge["taken"] == ("validated" if errors["validated"] < (1 - MARGIN) * errors["rule"] else "rule")
    assert 32 <= ridge["samples"] < 120


@pytest.mark.parametrize("taken", ["rule", "validated"])
def test_what_was_decided_is_what_ships(taken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network()
    data = samples(np.random.default_rng(4), 120, 8, 24, 0.97).reshape(120, 8, 24)
    monkeypatch.setattr(Contest, "winner", property(lambda _: taken))
    shipped = relief_onnx.prune(model, [{x: data}], repair="least-squares", criterion="flow", keep="40%", threads=1, storage="dense")
    monkeypatch.undo()
    monkeypatch.setattr(solving, "few_rows", lambda rows, keep: False)  # the rule everywhere
    rule = relief_onnx.prune(model, [{x: data}], repair="least-squares", criterion="flow", keep="40%", threads=1, storage="dense")
    assert (shipped.model.SerializeToString() == rule.model.SerializeToString()) == (taken == "rule")


@pytest.mark.parametrize(("count", "features"), [(60, 24), (600, 2)])
def test_too_few_samples_to_judge_or_rows_enough(count: int, features: int) -> None:
    net = Net(seed=3)
    x = net.input("N", 8, features)
    model = net.model(net.op("MatMul", x, net.weight(features, 6)))
    data = np.random.default_rng(4).standard_normal((count, 8, features)).astype(np.float32)
    found = relief_onnx.prune(model, [{x: data}], repair="least-squares", keep="50%", threads=1)
    assert found.report["repair"]["ridge"] is None
