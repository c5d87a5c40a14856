"""flow-obs against flow's own mask on samples set aside, what layers keep whatever their worth, and the bound on what it may take."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from builders import Net
from helpers import LENET, SAMPLES, digits
from numpy.typing import NDArray

import relief_onnx
from relief_onnx import contest, effort
from relief_onnx.contest import Contest, distance, draw
from relief_onnx.dataset import Dataset
from relief_onnx.effort import plan_effort
from relief_onnx.graph import Graph
from relief_onnx.inverse import inverse_root
from relief_onnx.layers import Layer, find
from relief_onnx.masks import Masks
from relief_onnx.model import input_specs, prepare
from relief_onnx.obs_pool import FLOOR_OF_FLOW, TRUST, Pool
from relief_onnx.replay import Replay
from relief_onnx.session import Session
from relief_onnx.solve import LEAST_BLOCK, SOLVE_FLOPS

Array = NDArray[Any]


@pytest.mark.parametrize("count", [0, 1, 2, 31, 32, 33, 100, 257])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_root_is_that_of_the_inverse(count: int, dtype: type) -> None:
    rows = np.random.default_rng(count).standard_normal((count // 2 + 1, count))  # half of it is the ridge alone
    matrix: Array = (rows.T @ rows + 0.01 * max(count, 1) * np.eye(count)).astype(dtype)
    root = inverse_root(matrix)
    assert root.dtype == dtype
    expected = np.linalg.inv(matrix.astype(np.float64))
    np.testing.assert_allclose(root.T @ root, expected, atol=(1e-9 if dtype is np.float64 else 3e-5) * np.abs(expected).max(initial=0.0))


@pytest.mark.parametrize("place", [3, 90])
def test_no_root_of_what_is_not_positive(place: int) -> None:
    matrix = np.eye(100)
    matrix[place, place] = -1.0
    with pytest.raises(np.linalg.LinAlgError):
        inverse_root(matrix)


def dataset(rows: int) -> Dataset:
    from relief_onnx.data import open_dataset

    model = onnx.load(str(LENET))
    return open_dataset([{model.graph.input[0].name: digits(rows)}], input_specs(model))


@pytest.mark.parametrize("rows", [96, 200, 256])
def test_judges_are_not_those_who_fit(rows: int) -> None:
    drawn = draw(dataset(rows), 1000, 0)
    fit, unseen = (np.concatenate([next(iter(feed.values())) for feed in feeds]) for feeds in (drawn.fit, drawn.unseen))
    assert (len(fit), len(unseen)) == (drawn.fitted, drawn.judged)
    assert drawn.fitted + drawn.judged == rows
    assert rows / 4 <= drawn.judged <= rows / 2
    assert not {row.tobytes() for row in fit} & {row.tobytes() for row in unseen}
    assert len(drawn.chosen(drawn.fitted)) == len(drawn.fit)
    assert len(drawn.chosen(drawn.fitted + 1)) == len(drawn.fit) + len(drawn.unseen)


def test_few_samples_judge_nothing() -> None:
    drawn = draw(dataset(64), 1000, 0)
    assert (drawn.fitted, drawn.judged, drawn.unseen) == (64, 0, ())


@pytest.mark.parametrize("granularity", ["weight", "channel"])
@pytest.mark.parametrize(("rows", "limit", "chosen"), [(1, None, False), (7, None, False), (8, None, True), (32, 5, False)])
def test_too_few_samples_to_choose_again(granularity: str, rows: int, limit: int | None, chosen: bool) -> None:
    options: Any = {"granularity": granularity, "keep": "50%", "repair": "least-squares", "samples": limit, "storage": "dense"}
    data = [{"image": digits(rows)}]
    found, flow = (relief_onnx.prune(LENET, data, criterion=name, **options) for name in ("flow-obs", "flow"))
    told = f"flow's choice ships: flow-obs needs 8 samples or more, and has {min(rows, limit or rows)}"
    assert (told in found.report["warnings"]) is not chosen
    assert chosen or found.model.SerializeToString() == flow.model.SerializeToString()
    assert (found.report["flow"]["choice"] is not None) is (chosen and granularity == "weight")


def test_samples_are_counted_where_their_number_is_not_known() -> None:
    def stream(count: int) -> Any:
        class Feeds:
            def __iter__(self) -> Any:
                return iter([{"image": digits(1)}] * count)

        return Feeds()

    for count in (7, 8):
        report = relief_onnx.prune(LENET, stream(count), keep="50%", repair="least-squares").report
        assert any("flow's choice ships" in warning for warning in report["warnings"]) is (count < 8)


def test_the_first_candidate_wins_unless_another_is_clearly_better() -> None:
    assert Contest({"a": 1.0, "b": 1.0 - contest.MARGIN / 2}, 9).winner == "a"
    assert Contest({"a": 1.0, "b": 1.0 - 2 * contest.MARGIN}, 9).winner == "b"
    assert Contest({"a": np.inf, "b": 5.0}, 9).winner == "b"
    assert Contest({"a": np.inf, "b": np.inf}, 9).winner == "a"


def test_a_distance_is_a_part_of_the_variance() -> None:
    wanted = np.array([1.0, 3.0])
    assert distance([wanted, wanted], [wanted, wanted]) == 0
    assert distance([wanted], [np.array([2.0, 2.0])]) == 1
    assert distance([wanted], [np.array([np.nan, 2.0])]) == np.inf
    constant = 3 + 1e-7 * np.arange(4)  # nothing but rounding
    assert distance([constant, wanted], [constant[::-1], wanted]) < 0.01


def prune(rows: int = 128, **options: Any) -> relief_onnx.Result:
    model = onnx.load(str(LENET))
    feed = {model.graph.input[0].name: digits(rows)}
    given: dict[str, Any] = {"granularity": "weight", "keep": "10%", "repair": "least-squares", "storage": "dense", "threads": 1}
    return relief_onnx.prune(model, [feed], **given | options)


def test_the_report_says_whose_mask_it_is() -> None:
    choice = prune().report["flow"]["choice"]
    assert choice.keys() == {"taken", "errors", "samples", "operations", "operations_unbounded", "rounds", "left", "power", "power_errors"}
    assert choice["errors"].keys() == {"flow", "flow-obs"}
    assert choice["taken"] == "flow-obs"
    assert choice["samples"] == 32
    assert 0 < choice["operations"] == choice["operations_unbounded"]
    assert prune(criterion="flow").report["flow"]["choice"] is None
    few = prune(rows=64).report["flow"]["choice"]
    assert (few["taken"], few["errors"], few["samples"]) == ("flow-obs", {}, 0)
    assert (choice["power"], choice["power_errors"]) == (0.0, {})  # 32 judges are too few for that


def test_flows_mask_is_taken_where_it_repairs_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worths that say nothing make a bad mask; flow's is shipped then, and the report tells both errors."""
    rng = np.random.default_rng(0)
    learn = Pool.learn
    monkeypatch.setattr(Pool, "learn", lambda self, place, worth: learn(self, place, rng.random(worth.shape)))
    sabotaged, flow = prune(), prune(criterion="flow")
    choice = sabotaged.report["flow"]["choice"]
    assert choice["taken"] == "flow"
    assert choice["errors"]["flow"] < (1 - contest.MARGIN) * choice["errors"]["flow-obs"]
    for weight, keep in flow.masks.keep.items():
        assert np.array_equal(sabotaged.masks.keep[weight], keep)
    assert sabotaged.report["flow"]["floors"] == flow.report["flow"]["floors"]


@pytest.mark.parametrize("share", [0.05, 0.2, 0.6])
def test_layers_keep_half_of_what_flow_leaves_and_fall_slowly(share: float) -> None:
    plan = find(Graph(prepare(onnx.load(str(SAMPLES / "resnet8.onnx")))))
    rng = np.random.default_rng(1)
    shapes = {layer.weight: layer.view.shape for layer in plan.layers}
    masks = Masks({weight: rng.random(shape) < share * rng.random() * 2 for weight, shape in shapes.items()}, {})
    pool = Pool(plan.layers, masks, Masks({weight: np.ones(shape, bool) for weight, shape in shapes.items()}, {}), {})
    for place, layer in enumerate(plan.layers):  # one layer after the other is worth nothing
        pool.learn(place, rng.random(shapes[layer.weight]) * 10.0 ** -(place * 3))
    for step in range(1, pool.steps + 1):
        before = [int(pool.mask(place).sum()) for place in range(len(plan.layers))]
        pool.cut(step / pool.steps)
        after = [int(pool.mask(place).sum()) for place in range(len(plan.layers))]
        assert all(b >= TRUST * sum(after) / sum(before) * a - 1 for a, b in zip(before, after, strict=True))
    assert sum(after) <= pool.budget
    assert all(count >= FLOOR_OF_FLOW * masks.keep[layer.weight].sum() for layer, count in zip(plan.layers, after, strict=True))


def wide(count: int = 4) -> list[Layer]:
    net = Net(seed=1)
    x = net.input("N", 1024)
    for _ in range(count):
        x = net.op("Relu", net.op("MatMul", x, net.weight(1024, 1024)))
    return list(find(Graph(prepare(net.model(x)))).layers)


def test_the_bound_is_kept_by_leaving_out_ever_more() -> None:
    layers = wide()
    free = plan_effort(layers, [1.0, 0.5], 3, 0.25, 1e18)
    assert (free.flops, free.rounds, free.left) == (free.wanted, 3, ())
    assert free.layer_flops == SOLVE_FLOPS
    limits = [free.flops * factor for factor in (0.7, 0.3, 0.03, 0.01, 0.003, 1e-3, 1e-4, 1e-7)]
    found = [plan_effort(layers, [1.0, 0.5], 3, 0.25, limit) for limit in limits]
    for limit, own in zip(limits, found, strict=True):
        assert own.flops <= limit
        assert own.wanted == free.wanted
        assert own.rounds == 3 or own.layer_flops < SOLVE_FLOPS  # smaller blocks first
        assert not own.left or own.rounds == 0  # layers last
    assert [own.rounds for own in found] == sorted((own.rounds for own in found), reverse=True)
    assert found[0].layer_flops < SOLVE_FLOPS
    assert found[0].rounds == 3
    assert len(found[-1].left) == len(layers)
    assert LEAST_BLOCK > 1


def test_what_is_left_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    usual, flow = prune(), prune(criterion="flow")
    monkeypatch.setattr(effort, "WORK", usual.report["flow"]["choice"]["operations"] / 200)
    bounded = prune()
    choice = bounded.report["flow"]["choice"]
    assert choice["operations"] <= effort.WORK
    assert choice["operations_unbounded"] == usual.report["flow"]["choice"]["operations"]
    assert choice["rounds"] == 0 == len(bounded.report["flow"]["exchanged"])
    assert choice["left"]
    for weight in choice["left"]:
        assert np.array_equal(bounded.masks.keep[weight], flow.masks.keep[weight])
    assert any("keep flow's mask" in line for line in bounded.report["warnings"])
    assert not any("keep flow's mask" in line for line in usual.report["warnings"])
    kept = [sum(int(keep.sum()) for keep in result.masks.keep.values()) for result in (bounded, flow)]
    assert kept[0] == kept[1]


def test_sizes_made_from_shapes_of_an_earlier_piece() -> None:
    """A table of positions resized to the grid of the image, as in vision transformers: the walk gives what the model gives."""
    net = Net(seed=4)
    x = net.input("N", 3, 8, 8)
    height = net.op("Gather", net.op("Shape", x), net.constant(np.asarray(2, np.int64)))
    y = net.op("Conv", x, net.weight(4, 3, 2, 2), strides=[2, 2])
    rows = net.op("Unsqueeze", net.op("Div", height, net.constant(np.asarray(2, np.int64))), net.ints(0))
    table = net.op("Transpose", net.op("Reshape", net.weight(1, 9, 4), net.ints(1, 3, 3, 4)), perm=[0, 3, 1, 2])
    first = net.op("Slice", net.op("Shape", table), net.ints(0), net.ints(2), net.ints(0))
    sizes = net.op("Concat", first, net.op("Concat", rows, rows, axis=0), axis=0)
    placed = net.op("Add", y, net.op("Resize", table, "", "", sizes, mode="nearest"))
    model = net.model(net.op("Conv", placed, net.weight(2, 4, 1, 1)))
    feeds = [{x: net.rng.standard_normal((rows, 3, 8, 8)).astype(np.float32)} for rows in (3, 2)]
    graph = Graph(prepare(model))
    with Replay(graph, feeds, graph.outputs) as walk:
        for layer in find(graph).layers:
            walk.advance(layer.node)
        walk.advance(len(graph.nodes))
        for batch, feed in enumerate(feeds):
            found = walk.value(graph.outputs[0], batch)
            assert found is not None
            np.testing.assert_allclose(found, Session(model).run(feed)[0], rtol=1e-5, atol=1e-5)
