"""The mean of what a mask removes, in biases: units keep their mean, and nothing else changes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import laws
import numpy as np
import onnx
import pytest
from builders import Net
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from laws import Feed, assert_inferred_dims, assert_same_frame, assert_same_outputs
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from random_graphs import KINDS, STEPS, build
from test_score import CONVOLUTIONS, DENSE, convolution

from relief_onnx import calibrate
from relief_onnx.channels import unit_masks
from relief_onnx.compensate import Shift, compensate
from relief_onnx.data import open_dataset
from relief_onnx.graph import Graph
from relief_onnx.layers import Layer, find
from relief_onnx.masks import Masks, applied, initializer_masks, insert
from relief_onnx.model import input_specs, prepare
from relief_onnx.probes import instrument
from relief_onnx.session import Session
from relief_onnx.streaming import InputMeans
from relief_onnx.surgery import Operation, apply_weights, operate
from relief_onnx.walk import trace

Array = NDArray[Any]
NAMES = [*CONVOLUTIONS, *DENSE]
# Where every output position sees all weights: elsewhere a border sees fewer than the middle.
EVEN = [name for name, case in CONVOLUTIONS.items() if not case.transposed and not any(case.pads or case.values.get("pads", ()))]


def made(name: str, dtype: Any = np.float32) -> tuple[onnx.ModelProto, Array]:
    """A row of the tables of the score's tests, and random data for it."""
    if name in CONVOLUTIONS:
        model, x, *_ = convolution(CONVOLUTIONS[name], dtype)
        return model, x
    net = Net(seed=4)
    out, *_ = DENSE[name](net)
    x = net.rng.standard_normal([5 if size == "N" else size for size in net.inputs[0][1]]).astype(np.float32)
    return prepare(net.model(out)), x


def input_means(graph: Graph, layers: tuple[Layer, ...], feeds: list[Array]) -> dict[str, Array]:
    """What a calibration pass measures."""
    statistics = {layer.name: InputMeans(None if layer.geometry else layer.input_axis, signed=True) for layer in layers}
    probe = instrument(graph, [layer.input for layer in layers])
    wanted = [calibrate.Measurement(layer.input, statistics[layer.name]) for layer in layers]
    data = open_dataset([{graph.inputs[0].name: x} for x in feeds], input_specs(graph.model))
    calibrate.run(probe, wanted, data, limit=None, seed=0, threads=1, progress=lambda *_: None)
    return {layer.name: statistics[layer.name].input_means(layer) for layer in layers}


def random_masks(graph: Graph, seed: int, per_weight: bool = True) -> Masks:
    """About half goes; every unit keeps something where it reads more than one thing, and loses something."""
    rng, found = np.random.default_rng(seed), find(graph).by_weight()
    keep = {}
    for name, layers in found.items():
        shape = layers[0].view.shape[: None if per_weight else 2]
        rows = rng.random((shape[0], int(np.prod(shape[1:])))) < 0.5
        rows[:, 0], rows[:, -1] = True, False
        rows[1::2, -1] = rows.shape[1] == 1  # of single weights every other stays
        keep[name] = rows.reshape(shape)
    return Masks(keep, {name: np.ones(layers[0].out_channels, bool) for name, layers in found.items()})


def corrected(
    model: onnx.ModelProto, masks: Masks, means: Mapping[str, Array], **given: Any
) -> tuple[onnx.ModelProto, onnx.ModelProto, tuple[Shift, ...]]:
    """The model with new biases, without its masks and with them."""
    graph, before = Graph(model), model.SerializeToString(deterministic=True)
    result, shifts = compensate(graph, find(graph), masks, means, **given)
    assert model.SerializeToString(deterministic=True) == before
    again = Graph(result)
    masked = insert(again, initializer_masks(find(again), masks))
    onnx.checker.check_model(masked, full_check=True)
    return result, masked, shifts


def assert_only_biases_changed(model: onnx.ModelProto, result: onnx.ModelProto) -> None:
    assert_same_frame(model, result)
    assert_inferred_dims(result)
    before, after = ({item.name: item for item in each.graph.initializer} for each in (model, result))
    graph = Graph(model)
    layers = find(graph).layers
    biases = {layer.bias.name for layer in layers if layer.bias}
    weights = {layer.weight for layer in layers}
    assert all(before[name] == after[name] for name in before if name not in biases)
    assert all(name.rstrip("_").rpartition("/")[0] in weights for name in set(after) - set(before))
    added = [node for node in result.graph.node if all(node.name != old.name for old in model.graph.node)]
    assert all(node.op_type == "Add" for node in added)


def outputs(model: onnx.ModelProto, x: Array) -> Array:
    return np.asarray(Session(model, 1).run({model.graph.input[0].name: x})[0], np.float64)


# -- the statistic, judged by the mean of the output -----------------------------------------------------------------------------


def check_means(model: onnx.ModelProto, x: Array, per_weight: bool, tolerance: float = 1e-4) -> None:
    graph = Graph(model)
    plan = find(graph)
    (layer,) = plan.layers
    masks = random_masks(graph, 1, per_weight)
    result, masked, shifts = corrected(model, masks, input_means(graph, plan.layers, [x]))
    assert shifts == (Shift(layer, True),)
    assert_only_biases_changed(model, result)
    plain = insert(graph, initializer_masks(plan, masks))
    wanted, found, without = (per_unit(outputs(each, x), layer).mean(1) for each in (model, masked, plain))
    scale = np.abs(outputs(model, x)).mean()
    assert np.abs(found - wanted).max() <= tolerance * scale
    assert np.abs(without - wanted).max() > 10 * tolerance * scale  # the law can fail


def per_unit(y: Array, layer: Layer) -> Array:
    """[out, everything else]"""
    return np.moveaxis(y, layer.output_axis, 0).reshape(layer.out_channels, -1)


@pytest.mark.parametrize("per_weight", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_each_unit_keeps_its_mean(name: str, per_weight: bool) -> None:
    """Over samples and positions, on random data, with zero padding and the gaps of transposed convolutions."""
    check_means(*made(name), per_weight)


@pytest.mark.parametrize("name", ["groups", "stride", "transposed stride", "no bias", "1d"])
def test_half_precision(name: str) -> None:
    check_means(*made(name, np.float16), True, 2e-3)


@pytest.mark.parametrize("axis", [-1, -2])
def test_half_precision_of_a_product(axis: int) -> None:
    net = Net(seed=5, dtype=np.float16)
    x = net.input("N", 6, 6)
    w = net.weight(4, 6) if axis == -2 else net.weight(6, 4)
    model = net.model(net.op("MatMul", *([w, x] if axis == -2 else [x, w])))
    check_means(model, 1 + net.rng.standard_normal((7, 6, 6)).astype(np.float16), True, 2e-3)


def uniform(graph: Graph, layer: Layer, x: Array, seed: int) -> Array:
    """Data in which every sample and position is alike: one number for each input channel."""
    axis = layer.input_axis % x.ndim
    line = np.random.default_rng(seed).standard_normal(x.shape[axis]).astype(x.dtype)
    return np.ascontiguousarray(np.broadcast_to(line.reshape([-1 if i == axis else 1 for i in range(x.ndim)]), x.shape))


@pytest.mark.parametrize("per_weight", [True, False])
@pytest.mark.parametrize("name", [*EVEN, *DENSE])
def test_what_is_constant_is_moved_exactly(name: str, per_weight: bool) -> None:
    model, x = made(name)
    graph = Graph(model)
    plan = find(graph)
    (layer,) = plan.layers
    x = uniform(graph, layer, x, 2)
    _, masked, _ = corrected(model, random_masks(graph, 2, per_weight), input_means(graph, plan.layers, [x]))
    wanted = outputs(model, x)
    assert np.abs(outputs(masked, x) - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_a_transposed_convolution_without_its_border_is_exact_too() -> None:
    net = Net(seed=6)
    name = net.input("N", 3, 6, 5)
    model = net.model(net.op("ConvTranspose", name, net.weight(3, 4, 3, 2), net.bias(4), pads=[2, 1, 2, 1]))
    graph = Graph(model)
    plan = find(graph)
    x = uniform(graph, plan.layers[0], np.zeros((2, 3, 6, 5), np.float32), 3)
    _, masked, _ = corrected(model, random_masks(graph, 3), input_means(graph, plan.layers, [x]))
    np.testing.assert_allclose(outputs(masked, x), outputs(model, x), rtol=1e-5, atol=1e-5)


def test_images_of_several_sizes_and_batches_that_weigh_less() -> None:
    net = Net(seed=3)
    model = net.model(net.op("Conv", net.input("N", 3, "H", "W"), net.weight(4, 3, 3, 3), net.bias(4), pads=[1] * 4))
    graph = Graph(model)
    plan = find(graph)
    feeds = [net.rng.standard_normal((count, 3, *space)).astype(np.float32) for count, space in ((1, (5, 6)), (3, (4, 4)), (2, (5, 6)))]
    _, masked, _ = corrected(model, random_masks(graph, 3), input_means(graph, plan.layers, feeds))
    wanted, found = (np.concatenate([per_unit(outputs(each, x), plan.layers[0]) for x in feeds], 1).mean(1) for each in (model, masked))
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    fixed, x = convolution(CONVOLUTIONS["stride"], batch=4)[:2]  # five samples
    means = [input_means(Graph(each), find(Graph(each)).layers, [x]) for each in (fixed, made("stride")[0])]
    np.testing.assert_allclose(*(next(iter(each.values())) for each in means), rtol=1e-5, atol=1e-7)


# -- where there is no bias, or not one of its own -----------------------------------------------------------------------------------


def test_nothing_to_move_is_the_same_model() -> None:
    model, _ = made("2d")
    graph = Graph(model)
    (layer,) = plan = find(graph).layers
    whole = Masks({layer.weight: np.ones((4, 3), bool)}, {layer.weight: np.ones(4, bool)})
    assert compensate(graph, find(graph), whole, {}) == (model, ())
    masks = random_masks(graph, 0)
    for means, why in (
        ({}, "what it reads was not measured"),
        ({layer.name: np.zeros((3, 3, 2))}, "what it loses is 0 on average"),
        ({layer.name: np.full((3, 3, 2), np.inf)}, "what it reads is not finite on average"),
    ):
        result, shifts = compensate(graph, find(graph), masks, means)
        assert result is graph.model
        assert shifts == (Shift(plan[0], False, why),)


def test_a_bias_that_half_precision_cannot_hold_stays() -> None:
    model, _ = made("2d", np.float16)
    graph = Graph(model)
    (layer,) = find(graph).layers
    result, (shift,) = compensate(graph, find(graph), random_masks(graph, 0), {layer.name: np.full((3, 3, 2), 1e6)})
    assert result is model
    assert shift.reason == "its bias would be too large for float16"


@pytest.mark.parametrize(("opset", "ir_version"), [(11, 3), (17, 8)])  # before opset 11 Gemm always has a C
@pytest.mark.parametrize("operator", ["Conv", "ConvTranspose", "Gemm", "MatMul"])
def test_a_new_bias(operator: str, opset: int, ir_version: int) -> None:
    net = Net(opset=opset, ir_version=ir_version)
    spatial = operator.startswith("Conv")
    x = net.input("N", 4, *([5, 5] if spatial else []))
    model = net.model(net.op(operator, x, net.weight(4, 4, *([3, 3] if spatial else []))))
    data = net.rng.standard_normal((6, 4, 5, 5) if spatial else (6, 4)).astype(np.float32) + 1
    check_means(model, data, True)
    graph = Graph(model)
    (layer,) = find(graph).layers
    result, _, _ = corrected(model, random_masks(graph, 1), input_means(graph, (layer,), [data]))
    (bias,) = [item for item in result.graph.initializer if item.name == f"{layer.weight}/bias"]
    assert list(bias.dims) == [4]
    assert (bias.name in {item.name for item in result.graph.input}) == (ir_version < 4)
    assert [item.name for item in result.graph.output] == [item.name for item in model.graph.output]


def two_readers(operator: str, shared_weight: bool) -> tuple[onnx.ModelProto, list[str]]:
    """Two layers with one bias, on different inputs; the bias is an output of a third node too."""
    net = Net(seed=8)
    x, bias = net.input("N", 4), net.bias(4)
    first = net.weight(4, 4)
    second = first if shared_weight else net.weight(4, 4)

    def layer(value: str, weight: str) -> str:
        if operator == "Gemm":
            return str(net.op("Gemm", value, weight, bias, transB=1))
        return str(net.op("Add", bias, net.op("MatMul", value, weight)))

    y = layer(x, first)
    z = layer(net.op("Mul", y, net.constant(np.float32(2))), second)
    return net.model(y, z, net.op("Mul", bias, net.constant(np.float32(3)))), [first, second]


@pytest.mark.parametrize("shared_weight", [True, False])
@pytest.mark.parametrize("operator", ["Gemm", "MatMul"])
def test_a_shared_bias_gets_a_copy_per_reader(operator: str, shared_weight: bool) -> None:
    model, _ = two_readers(operator, shared_weight)
    graph = Graph(model)
    plan = find(graph)
    x = np.random.default_rng(1).standard_normal((6, 4)).astype(np.float32) + 1
    masks = random_masks(graph, 4)
    result, _, shifts = corrected(model, masks, input_means(graph, plan.layers, [x]))
    assert [shift.moved for shift in shifts] == [True, True]
    assert_only_biases_changed(model, result)
    name = graph.inputs[0].name
    outer = [Session(each).run({name: x})[2] for each in (model, result)]
    assert np.array_equal(*outer)
    added = [item.name for item in result.graph.initializer if item.name not in graph.initializers]
    assert len(added) == 2
    # Each layer was corrected for what itself reads.
    values = {item.name: numpy_helper.to_array(item) for item in result.graph.initializer}
    means = input_means(graph, plan.layers, [x])
    for layer, own in zip(plan.layers, added, strict=True):
        keep = layer.view.apply(initializer_masks(plan, masks)[layer.weight])
        lost = np.where(keep, 0, layer.view.apply(values[layer.weight]))
        assert layer.bias is not None
        np.testing.assert_allclose(values[own], graph.array(layer.bias.name) + lost @ means[layer.name], rtol=1e-5)


def test_a_bias_that_nobody_reads_any_more_goes() -> None:
    net = Net(seed=8)
    x, bias = net.input("N", 4), net.bias(4)
    y = net.op("Gemm", x, net.weight(4, 4), bias)
    model = net.model(net.op("Gemm", y, net.weight(4, 4), bias))
    graph = Graph(model)
    means = {layer.name: np.ones(4) for layer in find(graph).layers}
    result, _, _ = corrected(model, random_masks(graph, 4), means)
    assert bias not in {item.name for item in result.graph.initializer}


def one_gemm(c: tuple[int, ...] | None, beta: float = 1.0, stored: bool = True) -> onnx.ModelProto:
    net = Net(seed=9)
    x = net.input("N", 4)
    extra = [] if c is None else [net.bias(*c) if stored else net.op("Neg", net.bias(*c))]
    return net.model(net.op("Gemm", x, net.weight(4, 3), *extra, beta=beta))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (one_gemm((3,), 0.0), "multiplied by 0"),
        (one_gemm(None, 0.0), "beta is 0"),
        (one_gemm((2, 3)), "not one stored number for each unit"),
        (one_gemm((3,), stored=False), "not one stored number for each unit"),
    ],
)
def test_a_bias_that_cannot_take_it_is_left_alone_with_a_reason(model: onnx.ModelProto, why: str) -> None:
    graph = Graph(model)
    plan = find(graph)
    result, (shift,) = compensate(graph, plan, random_masks(graph, 0), {plan.layers[0].name: np.ones(4)})
    assert result is model
    assert not shift.moved
    assert why in shift.reason


@pytest.mark.parametrize("c", [(), (1,), (1, 1)])
def test_one_number_for_all_units_becomes_one_for_each(c: tuple[int, ...]) -> None:
    model = one_gemm(c, 2.0)
    graph = Graph(model)
    plan = find(graph)
    result, (shift,) = compensate(graph, plan, random_masks(graph, 0), {plan.layers[0].name: np.ones(4)})
    assert shift.moved
    old, new = (next(item for item in each.graph.initializer if item.name == each.graph.node[0].input[2]) for each in (model, result))
    assert (list(new.dims), old.name in {item.name for item in result.graph.initializer}) == ([3], False)


@pytest.mark.parametrize("shape", [(4,), None])
def test_a_matrix_on_the_left_needs_to_know_its_axes(shape: tuple[int, ...] | None) -> None:
    net = Net(seed=9)
    x = net.input("N", 4, 2)
    model = net.model(net.op("MatMul", net.weight(3, 4), x))
    kind = model.graph.input[0].type.tensor_type
    kind.CopyFrom(helper.make_tensor_type_proto(TensorProto.FLOAT, shape).tensor_type)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info(model.graph.output[0].name, TensorProto.FLOAT, None))
    graph = Graph(model)
    plan = find(graph)
    result, (shift,) = compensate(graph, plan, random_masks(graph, 0), {plan.layers[0].name: np.ones(4)})
    assert result is model
    assert ("one axis only" if shape else "not known") in shift.reason


# -- units that go ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_a_unit_that_went_with_its_bias_stays_silent(shared: bool) -> None:
    net = Net(seed=10)
    x, bias = net.input("N", 4), net.bias(3)
    y = net.op("Gemm", x, net.weight(4, 3), bias)
    model = net.model(y, *([net.op("Neg", bias)] if shared else []))
    graph = Graph(model)
    (layer,) = find(graph).layers
    keep, stays = np.ones((3, 4), bool), np.array([True, False, True])
    keep[1], keep[:, 2] = False, False
    data = net.rng.standard_normal((5, 4)).astype(np.float32) + 1
    masks = Masks({layer.weight: keep}, {layer.weight: stays})
    _, masked, (shift,) = corrected(model, masks, input_means(graph, (layer,), [data]))
    assert shift.moved
    after, before = outputs(masked, data), outputs(model, data)
    assert not after[:, 1].any()
    np.testing.assert_allclose(after.mean(0)[[0, 2]], before.mean(0)[[0, 2]], rtol=1e-4)


@pytest.mark.parametrize("removed", [None, [False, True, False], [False] * 3])
def test_a_unit_without_a_bias_that_lost_all_its_weights(removed: list[bool] | None) -> None:
    """It stays silent, unless the caller knows that nobody asked for that."""
    net = Net(seed=10)
    model = net.model(net.op("Conv", net.input("N", 4, 3, 3), net.weight(3, 4, 2, 2)))
    graph = Graph(model)
    (layer,) = find(graph).layers
    keep = np.ones((3, 4), bool)
    keep[1], keep[:, 2] = False, False
    data = net.rng.standard_normal((5, 4, 3, 3)).astype(np.float32) + 1
    masks = Masks({layer.weight: keep}, {layer.weight: np.ones(3, bool)})
    given = None if removed is None else {layer.name: np.asarray(removed)}
    _, masked, _ = corrected(model, masks, input_means(graph, (layer,), [data]), removed=given)
    after, before = (outputs(each, data).mean((0, 2, 3)) for each in (masked, model))
    silent = removed is None or removed[1]
    np.testing.assert_allclose(after[[0, 2]], before[[0, 2]], rtol=1e-4)
    np.testing.assert_allclose(after[1], 0 if silent else before[1], rtol=1e-4)


# -- together with the cut ----------------------------------------------------------------------------------------------------------

steps = st.lists(st.tuples(st.integers(0, len(STEPS) - 1), st.integers(0, 999)), min_size=1, max_size=14)
graphs = given(steps, st.sampled_from([9, 11, 13, 17, 18, 21]), st.sampled_from(KINDS), st.booleans(), st.integers(0, 999))
EXAMPLES = int(os.environ.get("RELIEF_ONNX_EXAMPLES", "300")) // 10
some = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def shifted_and_cut(graph: Graph, masks: Masks, rng: np.random.Generator, feed: Feed, **given: Any) -> Operation:
    """With any means at all the cut model computes what the masked one does."""
    plan = find(graph)
    shape = {layer.name: (layer.groups * layer.in_per_group, *layer.view.shape[2:]) for layer in plan.layers}
    means = {name: rng.uniform(-0.5, 0.5, size) for name, size in shape.items()}
    result, shifts = compensate(graph, plan, masks, means, **given)
    assert (result is graph.model) == (not any(shift.moved for shift in shifts))
    assert_same_frame(graph.model, result)
    again = Graph(result)
    flags = initializer_masks(find(again), masks)
    operation = operate(apply_weights(result, applied(again, flags)))
    assert_same_outputs(insert(again, flags), operation.model, feed, 1e-5)
    return operation


@some
@graphs
def test_mask_is_surgery_after_a_shift(steps: list[tuple[int, int]], opset: int, kind: str, dynamic: bool, seed: int) -> None:
    model, feed = build(steps, opset, kind, dynamic)
    graph, rng = Graph(prepare(model)), np.random.default_rng(seed)
    shifted_and_cut(graph, laws.random_masks(find(graph), rng), rng, feed)


@some
@graphs
def test_units_that_were_switched_off_still_go(steps: list[tuple[int, int]], opset: int, kind: str, dynamic: bool, seed: int) -> None:
    model, feed = build(steps, opset, kind, dynamic)
    graph, rng = Graph(prepare(model)), np.random.default_rng(seed)
    plan = find(graph)
    coupling = trace(graph, plan)
    chosen = laws.random_units(coupling, rng)
    removed = {layer.name: np.isin(coupling.outputs[layer.node], list(chosen)) for layer in plan.layers}
    masks = unit_masks(graph, plan, coupling, chosen, Masks({}, {}))
    operation = shifted_and_cut(graph, masks, rng, feed, removed=removed)
    read = {unit for reader in coupling.zero_readers for name, axis in reader.factors for unit in coupling.line(name, axis).tolist()}
    for layer in plan.layers:
        stay = int((~np.isin(coupling.outputs[layer.node], list(chosen - read))).sum())
        assert operation.channels[graph.names[layer.node]][1] <= stay
