"""Embedding tables: scored like dense layers on one-hot inputs, kept unless they are named, and why other constants are no layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders import Net
from fused_cases import CASES as FUSED
from helpers import real_model, run
from numpy.typing import NDArray
from onnx import helper, numpy_helper

import relief_onnx
from relief_onnx.embeddings import smoothed
from relief_onnx.graph import Graph
from relief_onnx.layers import find
from relief_onnx.prepared import prepare
from relief_onnx.scoring import read_scores, write_scores
from relief_onnx.session import Session

ROWS, DIMS, WIDTH = 12, 6, 8


def text_model(tied: bool = False, axis: int = 0, dtype: Any = np.float32) -> onnx.ModelProto:
    """Token numbers [N, 5] -> table -> dense -> Relu -> dense; `tied`: the table is the last layer's weight too."""
    net = Net(seed=5, dtype=dtype)
    net.inputs.append(("tokens", ("N", 5), onnx.TensorProto.INT64))
    table = net.weight(ROWS, DIMS, prefix="table") if axis == 0 else net.weight(DIMS, ROWS, prefix="table")
    x = net.op("Gather", table, "tokens", axis=axis)
    x = x if axis == 0 else net.op("Transpose", x, perm=[1, 2, 0])
    x = net.op("Relu", net.op("MatMul", x, net.weight(DIMS, WIDTH)))
    x = net.op("MatMul", x, net.weight(WIDTH, DIMS if tied else 3))
    if tied:
        x = net.op("MatMul", x, net.op("Transpose", table, perm=[1, 0]))
    return net.model(x)


def tokens(count: int = 160, rows: int = ROWS - 3, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Numbers of the first `rows` rows, the low ones more often."""
    rng = np.random.default_rng(seed)
    return {"tokens": np.minimum(rng.geometric(0.3, (count, 5)) - 1, rows - 1)}


def table_of(model: onnx.ModelProto) -> NDArray[Any]:
    return next(numpy_helper.to_array(item) for item in model.graph.initializer if item.name.startswith("table"))


@pytest.mark.parametrize("criterion", ["flow", "relief", "relief-fast", "magnitude", "wanda"])
@pytest.mark.parametrize("granularity", ["connection", "weight"])
@pytest.mark.parametrize("axis", [0, 1])
def test_score_is_the_papers_on_one_hot_inputs(criterion: str, granularity: str, axis: int) -> None:
    model, feed = text_model(axis=axis), tokens()
    feed["tokens"][:, 0] -= ROWS  # numbers from the end of the table, as ONNX allows
    scores = relief_onnx.score(model, [feed], criterion=criterion, granularity=granularity)
    found = scores["Gather_3"] if "Gather_3" in scores else next(score for name, score in scores.items() if name.startswith("Gather"))
    table = table_of(model).astype(float)
    table = table if axis == 0 else table.T
    counts = np.zeros(ROWS)
    for number in feed["tokens"].reshape(-1):
        counts[number] += 1
    naive = np.zeros((DIMS, ROWS))
    for j in range(DIMS):
        for i in range(ROWS):
            naive[j, i] = abs(table[i, j]) * counts[i] / counts.sum()
        naive[j] /= naive[j].sum()
    assert found.counts is not None
    assert found.counts.tolist() == counts.tolist()
    np.testing.assert_allclose(found.score, naive, rtol=1e-6)
    assert (found.score[:, counts == 0] == 0).all()


def test_flow_carries_relevance_to_the_dims_and_leaves_that_of_layers_alone() -> None:
    model, feed = text_model(), tokens()
    scores = relief_onnx.score(model, [feed], criterion="flow")
    table = next(score for name, score in scores.items() if name.startswith("Gather"))
    assert table.relevance is not None
    # All that reaches the first dense layer comes from the table: R is 1 in all, and the flow of a dim is its R.
    assert table.relevance.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(table.flow.sum(1), table.relevance)
    first = next(score for name, score in scores.items() if name.startswith("MatMul"))
    assert first.relevance is not None
    np.testing.assert_allclose(table.relevance, (first.score * first.relevance[:, None]).sum(0), rtol=1e-9)


def test_splitting_the_batches_changes_no_histogram() -> None:
    model, feed = text_model(), tokens(64)
    whole = relief_onnx.score(model, [feed], criterion="relief")
    parts = relief_onnx.score(model, [{"tokens": feed["tokens"][start : start + 5]} for start in range(0, 64, 5)], criterion="relief")
    name = next(name for name in whole if name.startswith("Gather"))
    assert np.array_equal(whole[name].counts, parts[name].counts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [{"keep": "50%"}, {"criterion": "relief", "alpha": 0.8}, {"granularity": "channel", "keep": "70%", "round_to": 1}]
)
def test_by_default_tables_stay_and_change_nothing(options: dict[str, Any]) -> None:
    model, feed = text_model(), tokens()
    result = relief_onnx.prune(model, [feed], **options)
    row = next(row for row in result.report["layers"] if row["op"] == "Gather")
    assert row["weight"] not in result.masks.keep or options.get("granularity") == "channel"
    if options.get("granularity") == "channel":
        return
    assert (row["status"], row["weights_kept"]) == ("kept", ROWS * DIMS)
    assert "--only" in row["reason"]
    assert np.array_equal(table_of(result.model), table_of(model))
    layers = [row for row in result.report["layers"] if row["op"] == "MatMul"]
    if "keep" in options:
        assert sum(row["connections_kept_by_rule"] for row in layers) == round(0.5 * sum(row["weights"] for row in layers))


@pytest.mark.parametrize("options", [{}, {"criterion": "relief"}, {"criterion": "flow-obs"}, {"repair": "least-squares"}])
def test_a_named_table_is_pruned_and_rows_not_seen_survive_in_part(options: dict[str, Any], tmp_path: Path) -> None:
    model, feed = text_model(), tokens(80)
    result = relief_onnx.prune(model, [feed], keep="60%", only="table|MatMul", output=tmp_path / "out.onnx", storage="dense", **options)
    row = next(row for row in result.report["layers"] if row["op"] == "Gather")
    assert row["status"] == "pruned"
    after = table_of(result.model)
    assert row["weights_kept"] == np.count_nonzero(after) <= round(0.6 * ROWS * DIMS)
    assert row["weights_kept"] > 0.4 * ROWS * DIMS
    assert result.masks.keep[row["weight"]].shape == (DIMS, ROWS)
    if options.get("repair"):
        repaired = {item["node"]: item for item in result.report["repair"]["layers"]}
        assert "looked up" in repaired[row["node"]]["reason"]


def test_smoothing_lets_rows_compete_that_were_not_seen() -> None:
    counts = np.array([50.0, 20, 1, 1, 0, 0])
    found = smoothed(counts)
    assert found.sum() == pytest.approx(1)
    assert found[4] == found[5] > 0
    assert found[0] / found[1] == pytest.approx(50 / 20)  # what was seen keeps its proportions
    assert found[4] == pytest.approx(3 / 73 / 2)
    assert np.array_equal(smoothed(np.array([3.0, 1.0])), [0.75, 0.25])
    every = smoothed(np.array([1.0, 1, 1, 0, 0, 0, 0, 0]))
    np.testing.assert_allclose(every, 1 / 8)  # all seen once: nothing is known, so all are alike
    assert np.array_equal(smoothed(np.zeros(4)), np.full(4, 0.25))


def test_only_the_table(tmp_path: Path) -> None:
    model, feed = text_model(), tokens()
    for options in ({}, {"criterion": "flow-obs", "repair": "least-squares"}, {"criterion": "relief", "alpha": 0.7}):
        result = relief_onnx.prune(model, [feed], only="^table", storage="dense", **{"alpha": 0.9, **options})
        status = {row["op"]: row["status"] for row in result.report["layers"]}
        assert status == {"Gather": "pruned", "MatMul": "skipped"}


@pytest.mark.parametrize(("options", "word"), [({"granularity": "channel", "round_to": 1}, "channel"), ({"pattern": "1:2"}, "pattern")])
def test_what_a_named_table_cannot_do_has_a_reason(options: dict[str, Any], word: str) -> None:
    result = relief_onnx.prune(text_model(), [tokens()], only=".*", **options)
    row = next(row for row in result.report["layers"] if row["op"] == "Gather")
    assert word in row["reason"]


def test_a_tied_head_loses_only_what_both_readers_let_go() -> None:
    model, feed = text_model(tied=True), tokens()
    plan = prepare(model).plan
    assert [layer.op for layer in plan.tables] == ["Gather", "MatMul"]
    assert len(plan.layers) == 2
    kept = relief_onnx.prune(model, [feed], keep="50%")
    assert np.array_equal(table_of(kept.model), table_of(model))
    named = relief_onnx.prune(model, [feed], keep="50%", only="table", storage="dense")
    assert np.count_nonzero(table_of(named.model)) == round(0.5 * ROWS * DIMS)
    by_relief = relief_onnx.prune(model, [feed], alpha=0.6, criterion="relief", only="table", storage="dense")
    assert 0 < np.count_nonzero(table_of(by_relief.model)) < ROWS * DIMS


def test_scores_go_through_the_file_and_the_command_line(tmp_path: Path) -> None:
    model, feed = text_model(), tokens()
    path, data, out = tmp_path / "m.onnx", tmp_path / "tokens.npy", tmp_path / "s.npz"
    onnx.save(model, path)
    np.save(data, feed["tokens"])
    assert run("score", path, "--data", data, "-o", out, "--quiet").exit_code == 0
    ready = prepare(path)
    found = read_scores(out, ready.plan, "connection", ready.plan.tables)
    again = tmp_path / "again.npz"
    write_scores(found, again)
    name = ready.plan.tables[0].name
    assert np.array_equal(found[name].counts, np.bincount(feed["tokens"].reshape(-1), minlength=ROWS))  # type: ignore[arg-type]
    report = tmp_path / "r.json"
    result = run("prune", path, "--data", data, "--scores", out, "--only", "table", "--keep", "50%", "--json", report, "--quiet")
    assert result.exit_code == 0, result.output
    (row,) = [row for row in json.loads(report.read_text())["layers"] if row["op"] == "Gather"]
    assert row["weights_kept"] == ROWS * DIMS // 2
    # A score file without the table still serves the layers, and says what is missing where the table is named.
    thin = tmp_path / "thin.npz"
    with np.load(out) as archive:
        np.savez(thin, **{key: archive[key] for key in archive.files if not key.startswith("table")})
    assert run("prune", path, "--data", data, "--scores", thin, "--force", "--quiet").exit_code == 0
    failed = run("prune", path, "--data", data, "--scores", thin, "--only", "table", "--force", "--quiet")
    assert failed.exit_code == 1
    assert "/score" in failed.output
    shown = tmp_path / "i.json"
    assert run("inspect", path, "--json", shown).exit_code == 0
    document = json.loads(shown.read_text())
    assert [row["rows"] for row in document["tables"]] == [ROWS]
    assert document["totals"]["table_weights"] == ROWS * DIMS


CONSTANTS = [
    ("Mul", "multiplies with"), ("Add", "adds to its input"), ("Div", "divides"), ("Where", "chooses"), ("GatherElements", "picks entries"),
    ("ScatterElements", "writes entries"), ("Concat", "puts beside"),
]  # fmt: skip


@pytest.mark.parametrize(("operator", "role"), CONSTANTS)
def test_other_constants_say_what_they_are(operator: str, role: str) -> None:
    net = Net(opset=18)
    x = net.op("MatMul", net.input(4, 5), net.weight(5, 6))
    table = net.weight(4, 6, prefix="const")
    zeros = net.constant(np.zeros((4, 6), np.int64))
    inputs = {
        "Where": [net.op("Greater", x, net.constant(np.float32(0))), x, table],
        "GatherElements": [table, zeros],
        "ScatterElements": [x, zeros, table],
        "Concat": [x, table],
    }
    values = {"Concat": {"axis": 0}}.get(operator, {})
    y = net.op(operator, *inputs.get(operator, [x, table]), **values)
    plan = find(Graph(net.model(y)))
    (row,) = plan.skipped
    assert role in row.reason
    assert "not connections between units" in row.reason
    assert not plan.tables


def test_a_table_whose_size_is_looked_at_and_that_is_resized_says_so() -> None:
    """As positions of a vision transformer: Reshape to a size that is computed, Resize, then Add."""
    net = Net()
    x = net.input("N", 4, 6, 6)
    table = net.weight(1, 9, 4, prefix="positions")
    size = helper.make_node("Shape", [x], ["size"], name="size")
    net.nodes.append(size)
    target = net.op("Concat", net.ints(1, 3, 3), net.op("Slice", "size", net.ints(1), net.ints(2)), axis=0)
    grid = net.op("Transpose", net.op("Reshape", table, target), perm=[0, 3, 1, 2])
    net.op("Shape", grid)
    big = net.op("Resize", grid, "", net.constant(np.array([1, 1, 2, 2], np.float32)), mode="nearest")
    plan = find(Graph(net.model(net.op("Add", net.op("Conv", x, net.weight(4, 4, 1, 1)), big))))
    (row,) = plan.skipped
    assert (row.op, "resamples" in row.reason) == ("Resize", True)


def test_minilm_keeps_its_words() -> None:
    plan = prepare(real_model("minilm_l3")).plan
    assert not plan.skipped
    assert sum(int(np.prod(layer.view.shape)) for layer in plan.layers) == 5308416
    assert max(layer.in_per_group for layer in plan.tables) == 30522


_LOOKUP = "row = Gather <axis = 1> (ids, i)  e = Gather (table, row)  m = MatMul (e, w)  a = Add (m, s)  o = Tanh (a)"
_BODIES = {
    "plain": "rows = Gather (table, ids)\n"
    + "".join(
        f"e{i} = Gather <axis = 1> (rows, i{i})  m{i} = MatMul (e{i}, w)  "
        f"a{i} = Add (m{i}, {f's{i - 1}' if i else 'h'})  s{i} = Tanh (a{i})\n"
        for i in range(5)
    )
    + "last = Identity (s4)",
    "Loop": f"""last = Loop (times, "", h) <body = each (int64 i, bool go, float[N, 6] s) => (bool again, float[N, 6] o) {{
        again = Identity (go)  {_LOOKUP}
    }}>""",
    "Scan": f"""turned = Transpose <perm = [1, 0]> (ids)
    last = Scan <num_scan_inputs = 1, body = each (float[N, 6] s, int64[N] row) => (float[N, 6] o) {{
        {_LOOKUP.split("i)  ", 1)[1]}
    }}> (h, turned)""",
    "If": f"""last = If (flag) <
        then_branch = one () => (float[N, 6] o) {{ i = Constant <value = int64 {{0}}> ()  s = Identity (h)  {_LOOKUP} }},
        else_branch = two () => (float[N, 6] n) {{ n = Neg (h) }}
    >""",
}


def looked_up(form: str) -> tuple[onnx.ModelProto, list[dict[str, Any]]]:
    """Five rows of a table for each sample, one after the other (of If the first, for some samples); and samples."""
    flag = ", bool flag" if form == "If" else ""
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> net (float[N, 3] x, int64[N, 5] ids{flag}) => (float[N, 4] y) '
        f"{{ h = MatMul (x, w0)  {_BODIES[form]}  y = MatMul (last, w1) }}"
    )
    rng = np.random.default_rng(0)
    floats = {name: rng.normal(size=shape) for name, shape in (("table", (20, 6)), ("w", (6, 6)), ("w0", (3, 6)), ("w1", (6, 4)))}
    stored = {name: value.astype(np.float32) for name, value in floats.items()}
    stored |= {"times": np.array(5)} if form == "Loop" else {f"i{i}": np.array(i) for i in range(5 if form == "plain" else 0)}
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in stored.items())
    onnx.checker.check_model(model, full_check=True)
    feeds = [
        {"x": rng.normal(size=(1, 3)).astype(np.float32), "ids": np.minimum(*rng.integers(0, 20, (2, 1, 5)))}
        | ({"flag": np.array(k % 2 == 0)} if form == "If" else {})
        for k in range(40)
    ]
    return model, feeds


@pytest.mark.parametrize("form", ["Loop", "Scan"])
def test_a_table_in_a_body_is_pruned_as_outside(form: str) -> None:
    model, feeds = looked_up(form)
    options: dict[str, Any] = {"only": "^table$", "keep": "50%", "criterion": "relief", "threads": 1}
    found, wanted = relief_onnx.prune(model, feeds, **options), relief_onnx.prune(looked_up("plain")[0], feeds, **options)
    np.testing.assert_array_equal(found.masks.keep["table"], wanted.masks.keep["table"])
    assert not found.masks.keep["table"].all()
    assert {row["weight"]: row["status"] for row in found.report["layers"]}["table"] == "pruned"
    one, other = (Session(item.model, 1).run(feeds[0])[0] for item in (found, wanted))
    np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("form", ["Loop", "Scan", "If"])
def test_a_table_in_a_body_has_flow_and_is_kept_unless_it_is_named(form: str) -> None:
    model, feeds = looked_up(form)
    found = relief_onnx.prune(model, feeds, only="table|w", keep="50%", threads=1)
    rows = {row["weight"]: row for row in found.report["layers"]}
    assert (rows["table"]["weights_kept"], rows["w"]["status"]) == (60, "pruned")
    plain = relief_onnx.prune(model, feeds, keep="50%", threads=1)
    (row,) = [row for row in plain.report["layers"] if row["weight"] == "table"]
    assert (row["status"], row["weights_kept"]) == ("kept", 120)
    assert "--only" in row["reason"]


ANGLES = "it holds the cosines or sines of angles that tell tokens' places (rotary embedding), not connections between units"


def test_rotary_caches_are_no_embedding_tables() -> None:
    """Those of a fused node (com.microsoft) that is laid open, in inspect and in the report; nor can --only name them."""
    model, feed = FUSED["groups, rotary"]()
    ready = prepare(model)
    assert not ready.plan.tables
    caches = {row.weight for row in ready.plan.skipped if row.reason == ANGLES}
    assert len(caches) == 2
    assert all(name.startswith("turn") for name in caches)
    report = relief_onnx.prune(model, [feed], keep="60%", threads=1).report
    assert {row["weight"] for row in report["layers"] if row["reason"] == ANGLES and row["status"] == "skipped"} == caches
    with pytest.raises(relief_onnx.NothingPrunedError) as refused:
        relief_onnx.prune(model, [feed], only="turn", threads=1)
    assert {name for name, reason in refused.value.reasons if reason == ANGLES} == caches


@pytest.mark.parametrize(("dtype", "scale"), [(np.float32, 1.0), (np.float16, 1.2)])
def test_two_tables_are_angles_only_on_a_circle(dtype: Any, scale: float) -> None:
    net = Net(seed=3, dtype=dtype)
    net.inputs.append(("tokens", ("N", 5), onnx.TensorProto.INT64))
    angles = np.arange(ROWS)[:, None] * net.rng.uniform(0.1, 1, DIMS)
    turns = [net.constant((scale * turn(angles)).astype(dtype)) for turn in (np.cos, np.sin)]
    learned = [net.weight(ROWS, DIMS, prefix="table") for _ in range(2)]
    x = net.op("Sum", *(net.op("Gather", table, "tokens") for table in (*turns, *learned)))
    plan = find(Graph(net.model(net.op("MatMul", x, net.weight(DIMS, 3)))))
    assert {row.weight for row in plan.skipped if row.reason == ANGLES} == set(turns)
    assert set(plan.by_table()) == set(learned)
