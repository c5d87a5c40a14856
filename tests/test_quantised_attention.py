"""QAttention: taken apart, pruned and put together again."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders import Net
from fused_cases import CASES
from graph_bert import HEADS, HIDDEN, bert, sentences
from laws import units_switched_off
from onnx import helper, numpy_helper
from test_fused_files import optimised, samples
from test_quantised import masked_and_cut, operators, quiet, values
from test_quantised_packed import same_file

from relief_onnx import prune
from relief_onnx.graph import Graph
from relief_onnx.layers import find
from relief_onnx.pack import unpack
from relief_onnx.prepared import prepare
from relief_onnx.session import Session

KINDS = [(kind, per_channel) for kind in ("QInt8", "QUInt8") for per_channel in (False, True)]


def in_integers(model: onnx.ModelProto, **how: Any) -> onnx.ModelProto:
    """As onnxruntime's dynamic quantiser writes it."""
    from onnxruntime import quantization as ort

    with tempfile.TemporaryDirectory() as folder, quiet():
        paths = Path(folder) / "a.onnx", Path(folder) / "b.onnx"
        onnx.save(model, paths[0])
        ort.quantize_dynamic(*paths, **how)
        return onnx.load(paths[1])


@functools.cache
def floats(opset: int = 17) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder, quiet():
        return optimised(bert(opset=opset), "transformer", Path(folder))


@functools.cache
def integers(kind: str = "QInt8", per_channel: bool = False, opset: int = 17) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantType

    model = in_integers(floats(opset), per_channel=per_channel, weight_type=getattr(QuantType, kind))
    assert operators(model)["QAttention"] == 2
    return model


def answers(model: onnx.ModelProto, feed: Any = None) -> Any:
    return Session(model, 1).run(sentences() if feed is None else feed)[0]


def nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "QAttention"]


def numbers(model: onnx.ModelProto, node: onnx.NodeProto) -> Any:
    """The packed weight [in, 3 * hidden] of a QAttention, by hand."""
    stored = values(model)
    weight, scale, zero = (stored[node.input[slot]] for slot in (1, 4, 7))
    return (weight.astype(np.float64) - zero) * scale


@pytest.mark.parametrize(("kind", "per_channel"), KINDS)
def test_it_is_scored_as_what_it_stands_for_and_comes_back_bit_for_bit(kind: str, per_channel: bool) -> None:
    model = integers(kind, per_channel)
    ready = prepare(model)
    assert len(ready.plan.layers) == len(prepare(floats()).plan.layers)
    same_file(ready.restored(ready.graph.model), model)
    layers = {layer.weight: layer for layer in ready.plan.layers}
    for node in nodes(model):
        layer = layers[node.input[1]]
        assert np.allclose(layer.view.apply(ready.graph.array(layer.weight)), numbers(model, node).T, rtol=1e-6, atol=0)
    # The kernels add integers before they scale, so a rounding may fall to the other side.
    assert np.abs(answers(ready.graph.model) - answers(model)).max() < 0.02 * np.abs(answers(model)).max()


def test_older_opsets_have_one_scale() -> None:
    model = integers("QInt8", False, 12)
    ready = prepare(model)
    same_file(ready.restored(ready.graph.model), model)
    assert {node.input[1] for node in nodes(model)} <= {layer.weight for layer in ready.plan.layers}
    rows = prepare(integers("QInt8", True, 12)).plan.skipped
    assert sum("need opset 13" in row.reason for row in rows) == 2


@pytest.mark.parametrize(("kind", "per_channel"), KINDS)
def test_zeros_are_zero_points_and_the_masked_model_computes_what_the_cut_one_does(kind: str, per_channel: bool) -> None:
    model = integers(kind, per_channel)
    ready = prepare(model)
    for seed in range(2):
        masked, cut, _ = masked_and_cut(ready, seed)
        onnx.checker.check_model(cut)
        assert operators(cut)["QAttention"] == operators(masked)["QAttention"] == 2
        assert np.abs(answers(masked) - answers(cut)).max() <= 1e-5 * np.abs(answers(masked)).max()
        stored, before = values(masked), values(model)
        for new, old in zip(nodes(masked), nodes(model), strict=True):
            assert [*new.input[:2], *new.input[3:]] == [*old.input[:2], *old.input[3:]]  # the bias has a mask of its own
            weight, zero = stored[new.input[1]], np.broadcast_to(before[old.input[7]], before[old.input[1]].shape)
            changed = weight != before[old.input[1]]
            assert changed.mean() > 0.2
            assert np.array_equal(weight[changed], zero[changed])


@pytest.mark.parametrize(("kind", "per_channel"), KINDS)
def test_heads_go_with_their_scales(kind: str, per_channel: bool) -> None:
    model = integers(kind, per_channel)
    ready, smaller, feed = prepare(model), 0, sentences(16)
    for seed in range(3):
        opened, operation, *_ = units_switched_off(ready.graph.model, np.random.default_rng(seed))
        masked, cut = ready.restored(opened), ready.restored(operation.model, operation.kept)
        onnx.checker.check_model(cut)
        assert operators(cut)["QAttention"] == operators(masked)["QAttention"] == 2
        # Another order of sums may turn one rounding in some sample.
        assert (np.abs(answers(masked, feed) - answers(cut, feed)).max(1) > 1e-5).sum() <= 1
        stored = values(cut)
        for node in nodes(cut):
            (heads,) = (item.i for item in node.attribute if item.name == "num_heads")
            width = stored[node.input[1]].shape[1]
            assert width == 3 * heads * HIDDEN // HEADS == stored[node.input[2]].size
            assert stored[node.input[1]].dtype == (np.int8 if kind == "QInt8" else np.uint8)
            assert stored[node.input[4]].shape == stored[node.input[7]].shape == ((width,) if per_channel else ())
            smaller += heads < HEADS
    assert smaller > 2


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_it_is_pruned_like_the_float_file(granularity: str, per_channel: bool) -> None:
    choices: dict[str, Any] = {"granularity": granularity, "keep": "60%", "samples": 64, "threads": 1}
    choices["repair"] = "least-squares" if granularity == "weight" else "none"
    data, model = samples(sentences()), integers("QInt8", per_channel)
    wanted, result = (prune(item, data, **choices) for item in (floats(), model))
    cosines = [next(iter(item.report["quality"]["agreement"].values()))["cosine"] for item in (result, wanted)]
    assert cosines[0] == pytest.approx(cosines[1], abs=3e-4 if granularity == "weight" else 1e-4)
    if granularity == "channel":
        assert all(np.array_equal(a, b) for a, b in zip(result.masks.keep.values(), wanted.masks.keep.values(), strict=True))
    assert result.report["verification"]["masked_vs_output_max_rel"] < 1e-5
    assert operators(unpack(result.model))["QAttention"] == 2
    assert operators(unpack(result.model))["Attention"] == 0
    assert [row for row in result.report["layers"] if row["op"] == "Attention"] == []


def test_it_is_opened_behind_integer_embeddings() -> None:
    """Their sizes are known, so the mask that they make is; their tables are left alone."""
    given, feed = CASES["embed, mask"]()
    model = in_integers(given, extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT})
    assert operators(model)["QEmbedLayerNormalization"] == operators(model)["QAttention"] == 1
    ready = prepare(model)
    same_file(ready.restored(ready.graph.model), model)
    assert nodes(model)[0].input[1] in {layer.weight for layer in ready.plan.layers}
    masked, cut, _ = masked_and_cut(ready, 0)
    assert np.allclose(answers(masked, feed), answers(cut, feed), atol=1e-5)
    result = prune(model, samples(feed), keep="60%", threads=1, storage="dense")
    assert operators(result.model)["QAttention"] == 1


# -- by hand ----------------------------------------------------------------------------------------------------------------


def by_hand(heads: int = 1, zero: int = 0, static: bool = False, edit: Callable[[onnx.NodeProto, Net], None] | None = None) -> Any:
    """A product, a QAttention of its result, rounded, and a product."""
    net = Net(2)
    x = net.op("Relu", net.op("MatMul", net.input("n", 4, 8), net.weight(8, 8)))
    if static:
        made = [net.constant(np.float32(0.05)), net.constant(np.uint8(3))]
        made.insert(0, net.op("QuantizeLinear", x, *made))
    else:
        made = net.op("DynamicQuantizeLinear", x, outputs=3)
    weight = net.constant(net.rng.integers(-90, 90, (8, 24)).astype(np.int8), "q")
    parts = [weight, net.bias(24), made[1], net.constant(np.float32(0.01)), "", made[2], net.constant(np.int8(zero))]
    y = net.op("QAttention", made[0], *parts, num_heads=heads, domain="com.microsoft")
    if edit is not None:
        edit(net.nodes[-1], net)
    model = net.model(net.op("MatMul", y, net.weight(8, 4)))
    if all(item.domain != "com.microsoft" for item in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def tokens(model: onnx.ModelProto) -> Any:
    return {model.graph.input[0].name: np.random.default_rng(0).standard_normal((16, 4, 8)).astype(np.float32)}


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("zero", [0, 5])
def test_a_single_head_gets_narrower(zero: int, static: bool) -> None:
    """Where queries are narrower than values they are filled up; where they are wider the float Attention stays."""
    model = by_hand(zero=zero, static=static)
    ready, seen = prepare(model), set()
    same_file(ready.restored(ready.graph.model), model)
    for seed in range(10):
        opened, operation, *_ = units_switched_off(ready.graph.model, np.random.default_rng(seed))
        masked, cut = ready.restored(opened), ready.restored(operation.model, operation.kept)
        assert (np.abs(answers(masked, tokens(model)) - answers(cut, tokens(model))).max((1, 2)) > 1e-5).sum() <= 1
        for node in cut.graph.node:
            if node.op_type == "QAttention":
                seen.add("filled" if values(cut)[node.input[4]].size > 1 else "whole")
                assert {item.name for item in node.attribute} == {"num_heads"}
            elif node.op_type == "Attention":
                (sizes,) = (item.ints for item in node.attribute if item.name == "qkv_hidden_sizes")
                assert sizes[0] > sizes[2]
                seen.add("floats")
    assert {"filled", "floats"} <= seen


def test_past_mask_and_causal_order_stay() -> None:
    def more(node: onnx.NodeProto, net: Net) -> None:
        node.attribute.append(helper.make_attribute("unidirectional", 1))
        node.input[5] = net.constant(np.array([[1, 1, 1, 0]], np.int32).repeat(16, 0), "mask")
        node.input.append(net.constant(np.zeros((2, 16, 2, 0, 4), np.float32), "past"))
        node.output.append("present")

    model = by_hand(2, edit=more)
    ready = prepare(model)
    assert len(ready.plan.layers) == 3
    same_file(ready.restored(ready.graph.model), model)
    masked, cut, _ = masked_and_cut(ready, 0)
    assert operators(cut)["QAttention"] == 1
    assert np.allclose(answers(masked, tokens(model)), answers(cut, tokens(model)), atol=1e-5)


def others(node: onnx.NodeProto, net: Net) -> None:
    net.op("Cast", node.input[1], to=onnx.TensorProto.FLOAT)


def negative(node: onnx.NodeProto, net: Net) -> None:
    node.input[4] = net.constant(np.float32(-0.01))


def mixed(node: onnx.NodeProto, net: Net) -> None:
    node.input[4] = net.constant(np.full(24, 0.01, np.float32))


REFUSED = [
    (others, "others read its weight too"), (negative, "not positive"), (mixed, "neither one nor one for each column"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "reason"), REFUSED)
def test_what_is_left_alone_has_its_reason(edit: Callable[[onnx.NodeProto, Net], None], reason: str) -> None:
    model = by_hand(2, edit=edit)
    ready = prepare(model)
    (weight,) = (node.input[1] for node in nodes(model))
    assert [reason in row.reason for row in ready.plan.skipped if row.weight == weight] == [True]
    assert len(ready.plan.layers) == 2


def test_a_weight_of_two_nodes_stays_one() -> None:
    def twice(node: onnx.NodeProto, net: Net) -> None:
        other = onnx.NodeProto()
        other.CopyFrom(node)
        other.name, other.output[0], other.input[2] = "again", "second", net.bias(24)
        net.nodes.append(other)

    model = by_hand(2, edit=twice)
    model.graph.output.append(helper.make_tensor_value_info("second", onnx.TensorProto.FLOAT, None))
    ready = prepare(model)
    same_file(ready.restored(ready.graph.model), model)
    masked, cut, _ = masked_and_cut(ready, 1)
    assert operators(cut)["QAttention"] == 2
    assert len({node.input[1] for node in nodes(cut)}) == 1
    assert numpy_helper.to_array(next(item for item in cut.graph.initializer if item.name == nodes(cut)[0].input[1])).dtype == np.int8
    assert np.allclose(answers(masked, tokens(model)), answers(cut, tokens(model)), atol=1e-5)
    assert len(find(Graph(ready.graph.model)).by_weight()) == 3
