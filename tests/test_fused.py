"""Files that onnxruntime's optimisers wrote: fused nodes are laid open, pruned like the model before, and put back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from fused_cases import CASES, Feed, Fused, attention, tokens
from laws import assert_same_outputs, masked_and_cut, units_switched_off

import relief_onnx
from relief_onnx.errors import NothingPrunedError
from relief_onnx.fused import lay_open
from relief_onnx.graph import Graph
from relief_onnx.lowering import lower
from relief_onnx.prepared import prepare
from relief_onnx.surgery import operate


def operators(model: onnx.ModelProto) -> Counter[tuple[str, str]]:
    return Counter((node.domain, node.op_type) for node in model.graph.node)


def lost(before: onnx.ModelProto, after: onnx.ModelProto) -> Counter[tuple[str, str]]:
    """Operators of `before` that `after` has fewer of."""
    return operators(before) - operators(after)


def samples(feed: Feed) -> list[Feed]:
    return [{name: value[i : i + 1] for name, value in feed.items()} for i in range(len(next(iter(feed.values()))))]


# What the optimisers leave alone because the operator table has it as it is.
AS_IT_IS = {"gelu", "fast gelu", "quick gelu"}


@pytest.mark.parametrize("name", CASES)
def test_laid_open_it_computes_the_same(name: str) -> None:
    """And nothing but standard operators is left, the sizes of every tensor are known, and the way back gives the same file."""
    model, feed = CASES[name]()
    opened = lay_open(model)
    if name in AS_IT_IS:
        assert opened is None
        return
    assert opened is not None
    lowered, restore = opened
    left = {node.op_type for node in lowered.graph.node if node.domain == "com.microsoft"}
    assert left <= {"Gelu", "FastGelu", "QuickGelu"}
    graph = Graph(lowered)
    assert [name for name in graph.producer if graph.shape(name) is None] == []
    assert_same_outputs(model, lowered, feed, 1e-5)
    back = restore(lowered, {})
    assert [node.SerializeToString() for node in back.graph.node] == [node.SerializeToString() for node in model.graph.node]
    assert {item.name: item.SerializeToString() for item in back.graph.initializer} == {
        item.name: item.SerializeToString() for item in model.graph.initializer
    }


@pytest.mark.parametrize("granularity", ["weight", "channel", "channel+weight"])
@pytest.mark.parametrize("name", CASES)
def test_pruned_it_keeps_its_operators(name: str, granularity: str) -> None:
    """Every weight of a layer is scored, the cut model computes what the masked one does (`prune` verifies it), fused nodes stay."""
    model, feed = CASES[name]()
    if name.startswith("product of two") and granularity == "channel":
        with pytest.raises(NothingPrunedError, match="it makes products of two kinds of channels"):
            relief_onnx.prune(model, samples(feed), granularity=granularity, keep="60%", round_to=1, threads=1)
        return
    result = relief_onnx.prune(model, samples(feed), granularity=granularity, keep="60%", round_to=1, storage="dense", threads=1)
    # A norm whose channels are cut is padded; the sum of tables has no fused node that says so.
    allowed = {"EmbedLayerNormalization"} if granularity != "weight" else set()
    assert {operator for domain, operator in lost(model, result.model) if domain} <= allowed
    # Masks are nodes there, one for each group.
    assert lost(model, result.masked) == ({("", "Einsum"): 1} if name.startswith("einsum, groups") else {})
    if name.startswith(("einsum, groups", "stack")):
        assert lost(model, result.model) == {}
        assert len(result.model.graph.node) <= len(model.graph.node) + 6  # biases
    layers = [row for row in result.report["layers"] if row["op"] not in ("Gather", "Add", "Expand")]
    assert layers
    assert [row for row in layers if row["status"] == "skipped"] == []
    assert_same_outputs(result.masked, result.model, feed, 1e-5)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", sorted(CASES.keys() - AS_IT_IS))
def test_mask_is_surgery(name: str, seed: int) -> None:
    """For random weights and random units, both written back: they compute the same, and the cut file is valid and can be cut again."""
    model, feed = CASES[name]()
    opened = lay_open(model)
    assert opened is not None
    lowered, restore = opened
    for number, make in enumerate((masked_and_cut, units_switched_off)):
        masked, operation, *_ = make(lowered, np.random.default_rng(100 * seed + number))
        final = restore(operation.model, operation.kept)
        assert_same_outputs(restore(masked, {}), final, feed, 1e-5)
        if not name.endswith("opset 9"):
            onnx.checker.check_model(final, full_check=True)
        assert {item.domain for item in final.opset_import} == {"", "com.microsoft"}
        unread = {item.name for item in final.graph.initializer} - {name for node in final.graph.node for name in node.input}
        assert unread <= {item.name for item in operation.model.graph.initializer} - {
            name for node in operation.model.graph.node for name in node.input
        }
        again = operate(lower(final).model)
        assert again.units_removed == 0


def edited(name: str, edit: Callable[[onnx.ModelProto], None]) -> tuple[onnx.ModelProto, onnx.ModelProto, Feed]:
    """A laid open model after an edit by hand, and what it is written back as."""
    model, feed = CASES[name]()
    opened = lay_open(model)
    assert opened is not None
    lowered, restore = opened
    edit(lowered)
    return lowered, restore(lowered, {}), feed


def part(model: onnx.ModelProto, end: str) -> onnx.NodeProto:
    (found,) = (node for node in model.graph.node if node.name.endswith(end))
    return found


def rescaled(model: onnx.ModelProto) -> None:
    name = part(model, "/scaled").input[1]
    (item,) = (item for item in model.graph.initializer if item.name == name)
    item.CopyFrom(onnx.numpy_helper.from_array(np.asarray(0.01, np.float32), name))


def read_inside(model: onnx.ModelProto) -> None:
    model.graph.output.append(onnx.helper.make_tensor_value_info(part(model, "/softmax").output[0], onnx.TensorProto.FLOAT, [None] * 4))


def without_activation(model: onnx.ModelProto) -> None:
    part(model, "/act").op_type = "Abs"


def more_than_a_bias(model: onnx.ModelProto) -> None:
    part(model, "/bias").op_type = "Mul"


EDITS = [
    ("attention", rescaled, "Attention"), ("attention", read_inside, "Attention"), ("heads", rescaled, "MultiHeadAttention"),
    ("conv relu", without_activation, "FusedConv"), ("bias gelu", more_than_a_bias, "BiasGelu"),
    ("skip, bias", more_than_a_bias, "SkipLayerNormalization"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "edit", "operator"), EDITS)
def test_what_it_cannot_say_stays(name: str, edit: Callable[[onnx.ModelProto], None], operator: str) -> None:
    """A place that was edited beyond what the fused node can say keeps its standard operators and computes the same."""
    lowered, back, feed = edited(name, edit)
    assert operator not in {node.op_type for node in back.graph.node}
    assert_same_outputs(lowered, back, feed, 1e-5)


def test_norms_are_spelled_out_where_the_opset_has_none() -> None:
    """Without the sum before it, a norm below opset 17 stands for itself, in steps that are standard."""
    for name in ("skip, opset 13", "skip simple"):
        lowered, back, feed = edited(name, lambda model: setattr(part(model, "/sum"), "op_type", "Sub"))
        assert not {node.op_type for node in back.graph.node} & {"LayerNormalization", "SimplifiedLayerNormalization"}
        assert_same_outputs(lowered, back, feed, 1e-5)
        onnx.checker.check_model(back, full_check=True)


def test_a_form_that_is_not_known_says_why() -> None:
    """Nothing is laid open, the weight is left alone, and the reason names node, operator and form."""
    model, _ = tokens(attention(do_rotary=1))()
    assert lay_open(model) is None
    (row,) = (row for row in prepare(model).plan.skipped if row.op == "Attention")
    reads = "Attention node Attention_11 reads it, which is not a layer that can be pruned"
    assert row.reason == f"{reads}: it rotates or shares its past, which is not known here"


def heads_apart(net: Fused, x: str) -> str:
    """Keys and values come as heads already."""
    shape = net.ints(0, 0, 3, 4)
    keys, values = (net.op("Transpose", net.op("Reshape", net.op("MatMul", x, net.weight(12, 12)), shape), perm=[0, 2, 1, 3]) for _ in "kv")
    return str(net.ms("MultiHeadAttention", net.op("MatMul", x, net.weight(12, 12)), keys, values, num_heads=3))


def test_a_closed_node_is_a_barrier() -> None:
    """Weights around it are pruned; channels that it reads stay, and the report says why."""
    model, feed = tokens(heads_apart)()
    result = relief_onnx.prune(model, samples(feed), granularity="channel+weight", keep="60%", round_to=1, threads=1, storage="dense")
    assert lost(model, result.model) == Counter()
    assert result.report["totals"]["kept_percent"] < 60
    reasons = {group["reason"] for group in result.report["groups"]}
    assert any("MultiHeadAttention node" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("groups", "lead", "readers", "reason"),
    [
        ("G", (3,), 1, "how many groups of rows its input has is not known"),
        (3, (3,), 2, "others read it too"),
        (3, (2, 3), 1, "groups along several axes"),
        (600, (600,), 1, "up to 512 are laid open"),
    ],
)
def test_a_stack_that_is_not_taken_apart_says_why(groups: int | str, lead: tuple[int, ...], readers: int, reason: str) -> None:
    net = Fused(seed=3)
    x, weight = net.input(groups, "N", 4), net.weight(*lead, 4, 2, prefix="own")
    model = net.done(*((net.op("MatMul", x, weight), len(lead) + 2) for _ in range(readers)))
    (row,) = [skipped for skipped in prepare(model).plan.skipped if skipped.weight.startswith("own")]
    assert "is a batch of matrices" in row.reason
    assert reason in row.reason


@pytest.mark.parametrize(
    ("equation", "shape", "reason"),
    [
        ("abc,cd->ad", (7, 4), "it adds up an axis of its input or of its weight alone"),
        ("abc,bc->ac", (5, 7), "its weight is no matrix"),
    ],
)
def test_an_einsum_that_is_no_layer_says_why(equation: str, shape: tuple[int, ...], reason: str) -> None:
    net = Fused(seed=3)
    y = net.op("Einsum", net.input("N", 5, 7), net.weight(*shape, prefix="own"), equation=equation)
    rank = len(equation.split("->")[1])
    model = net.done((net.op("MatMul", y, net.weight(7 if rank == 2 and shape == (5, 7) else 4, 3)), rank))
    (row,) = [skipped for skipped in prepare(model).plan.skipped if skipped.weight.startswith("own")]
    assert reason in row.reason
