"""The law "mask = surgery" as functions, for connections and for whole units; the operator table and random graphs are put to it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from relief_onnx.channels import unit_masks
from relief_onnx.coupling import Coupling
from relief_onnx.graph import Graph
from relief_onnx.layers import Plan, find
from relief_onnx.masks import Masks, applied, initializer_masks, insert
from relief_onnx.model import prepare
from relief_onnx.session import Session
from relief_onnx.surgery import Operation, apply_weights, operate
from relief_onnx.two_ways import paired
from relief_onnx.walk import trace

Feed = dict[str, NDArray[Any]]


def random_masks(plan: Plan, rng: np.random.Generator, density: float = 0.4) -> Masks:
    """Random connections, and some rows and columns that lose everything; a dead row loses its bias half of the time.

    Half of the models lose single weights of their kernels too.
    """
    keeps, biases = {}, {}
    single = rng.random() < 0.5
    for weight, layers in plan.by_weight().items():
        shape = layers[0].view.shape[:2]
        keep = rng.random(shape) < density
        keep[rng.random(shape[0]) < 0.35] = False
        keep[:, rng.random(shape[1]) < 0.35] = False
        if single:
            keep = keep.reshape(*shape, *(1,) * len(layers[0].view.shape[2:])) & (rng.random(layers[0].view.shape) < 0.7)
        keeps[weight] = keep
        bias = layers[0].bias
        prunable = bias is not None and not bias.shared and len(layers) == 1
        biases[weight] = rng.random(shape[0]) < 0.5 if prunable else np.ones(shape[0], bool)
    return Masks(keeps, biases)


def masked_and_cut(model: onnx.ModelProto, rng: np.random.Generator) -> tuple[onnx.ModelProto, Operation]:
    """A model under random masks, once with Mul nodes and once cut."""
    graph = Graph(prepare(model))
    plan = find(graph)
    flags = initializer_masks(plan, random_masks(plan, rng))
    return insert(graph, flags), operate(apply_weights(graph.model, applied(graph, flags)))


def check_mask_is_surgery(model: onnx.ModelProto, feed: Feed, rng: np.random.Generator, tolerance: float = 1e-5) -> Operation:
    """Raise AssertionError unless the cut model computes what the masked one does, is valid, and is otherwise the same file."""
    masked, operation = masked_and_cut(model, rng)
    _check(model, masked, operation, feed, tolerance)
    return operation


def _check(model: onnx.ModelProto, masked: onnx.ModelProto, operation: Operation, feed: Feed, tolerance: float) -> None:
    if not any(node.op_type == "GroupNormalization" for node in model.graph.node) or model.opset_import[0].version > 20:
        # The standard calls GroupNormalization of opset 18 to 20 deprecated, so the checker refuses every model that has it.
        onnx.checker.check_model(masked, full_check=True)
        onnx.checker.check_model(operation.model, full_check=True)
    assert_same_outputs(masked, operation.model, feed, tolerance)
    again = operate(operation.model)
    assert again.units_removed == 0
    assert again.model.SerializeToString(deterministic=True) == operation.model.SerializeToString(deterministic=True)
    assert_surviving_is_what_is_left(operation)
    assert_same_frame(model, operation.model, {name for branch in operation.dead_branches for name in branch.nodes})
    assert_inferred_dims(operation.model)


# -- whole units ----------------------------------------------------------------------------------------------------------


def random_units(coupling: Coupling, rng: np.random.Generator, density: float = 0.5) -> frozenset[int]:
    """Random units that may go, none of them the last one of a tensor that a layer or a stored table makes (padding does not count)."""
    pictures = [set(picture.reshape(-1).tolist()) - {-1} for picture in coupling.pictures.values() if picture.size > 1]
    free = sorted(set().union(*pictures) - set(coupling.pinned))
    chosen = {unit for unit in free if rng.random() < density}
    made = {unit for units in coupling.outputs.values() for unit in units.tolist()}
    made |= {unit for name in coupling.sources for unit in coupling.pictures[name].reshape(-1).tolist()}
    for own in sorted(pictures, key=len):
        last = own & made or own
        if last and last <= chosen:
            chosen.discard(min(last))
    return frozenset(chosen)


def units_switched_off(
    model: onnx.ModelProto, rng: np.random.Generator
) -> tuple[onnx.ModelProto, Operation, Plan, Coupling, frozenset[int]]:
    """A model with random units switched off, once with Mul nodes and once cut; with what was chosen from what."""
    graph = Graph(prepare(model))
    plan = find(graph)
    coupling = trace(graph, plan)
    if coupling.ways:  # directions lose other units, but as many: in random pairs
        units = sorted({unit for rows in coupling.ways for unit in rows.reshape(-1).tolist()})
        coupling = paired(coupling, dict(zip(units, rng.random(len(units)).tolist(), strict=True)))
    chosen = random_units(coupling, rng)
    flags = initializer_masks(plan, unit_masks(graph, plan, coupling, chosen, Masks({}, {})))
    return insert(graph, flags), operate(apply_weights(graph.model, applied(graph, flags))), plan, coupling, chosen


def check_units_go(model: onnx.ModelProto, feed: Feed, rng: np.random.Generator, tolerance: float = 1e-5, all_go: bool = True) -> Operation:
    """The same law for whole units; and those that were switched off are no longer there.

    Without `all_go` units may stay that a sum or a norm over channels reads: there only channels that are 0 can go.
    """
    masked, operation, plan, coupling, chosen = units_switched_off(model, rng)
    _check(model, masked, operation, feed, tolerance)
    read = {unit for reader in coupling.zero_readers for name, axis in reader.factors for unit in coupling.line(name, axis).tolist()}
    assert_units_are_gone(operation, plan, coupling, chosen if all_go else chosen - read)
    return operation


def assert_units_are_gone(operation: Operation, plan: Plan, coupling: Coupling, chosen: frozenset[int]) -> None:
    """No layer makes, reads or stores the entries of those units any more."""
    left = {item.name: tuple(item.dims) for item in operation.model.graph.initializer}
    gone = list(chosen)
    for layer in plan.layers:
        stay = int((~np.isin(coupling.outputs[layer.node], gone)).sum())
        assert operation.channels[layer.name][1] <= stay, f"{layer.name} still has {operation.channels[layer.name][1]} channels, not {stay}"
    for tie in coupling.ties:
        stay = int((~np.isin(tie.units if tie.across is None else tie.units[0], gone)).sum())
        if tie.initializer in left:
            assert left[tie.initializer][tie.axis] <= stay, f"{tie.initializer} still has {left[tie.initializer]}, not {stay} on {tie.axis}"


def assert_surviving_is_what_is_left(operation: Operation) -> None:
    """`surviving` without its empty rows and columns is what is in the cut model; each layer has the channels that `channels` says."""
    graph = Graph(operation.model)
    for weight, layers in find(graph).by_weight().items():
        left, surviving = layers[0].view.apply(graph.array(weight)) != 0, operation.surviving[weight]
        assert surviving.ndim == left.ndim, weight
        assert int(surviving.sum()) == int(left.sum()), weight
        # Rows and columns keep their order, so what is left follows in the same order too.
        assert np.array_equal(_packed(surviving), _packed(left)), weight
        for layer in layers:
            assert operation.channels[layer.name][1] == layer.out_channels, layer.name


def _packed(flags: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The kernels [connections, positions] that have any weight, in order."""
    kernels = flags.reshape(flags.shape[0] * flags.shape[1], -1)
    return kernels[kernels.any(1)]


def assert_same_outputs(first: onnx.ModelProto, second: onnx.ModelProto, feed: Feed, tolerance: float) -> None:
    before, after = Session(first, 1).run(feed), Session(second, 1).run(feed)
    for name, a, b in zip([item.name for item in first.graph.output], before, after, strict=True):
        assert a.shape == b.shape, name
        assert a.dtype == b.dtype, name
        assert np.array_equal(np.isfinite(a), np.isfinite(b)), name
        finite = np.isfinite(a)
        scale = max(float(np.abs(a[finite]).max(initial=0.0)), 1.0)
        worst = float(np.abs(a[finite].astype(float) - b[finite].astype(float)).max(initial=0.0)) / scale
        assert worst <= tolerance, f"{name} differs by {worst:.2g}"


def assert_same_frame(before: onnx.ModelProto, after: onnx.ModelProto, gone: Collection[str] = ()) -> None:
    """Metadata, doc strings, opset, inputs, outputs and the nodes' identity survive, but for nodes in `gone`."""
    for field in ("ir_version", "producer_name", "domain", "model_version", "doc_string"):
        assert getattr(before, field) == getattr(after, field)
    assert list(before.metadata_props) == list(after.metadata_props)
    assert list(before.opset_import) == list(after.opset_import)
    assert (before.graph.name, before.graph.doc_string) == (after.graph.name, after.graph.doc_string)
    weights = {item.name for model in (before, after) for item in model.graph.initializer}
    assert [item for item in before.graph.input if item.name not in weights] == [
        item for item in after.graph.input if item.name not in weights
    ]
    assert list(before.graph.output) == list(after.graph.output)
    left = iter((node.name, node.doc_string) for node in after.graph.node)
    # New nodes may stand between: padding and counting for statistics, sizes that are put together.
    for node in [node for node in before.graph.node if node.name not in gone]:
        assert any(found == (node.name, node.doc_string) for found in left), node.name


def assert_inferred_dims(model: onnx.ModelProto) -> None:
    """value_info says what shape inference says."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]
    inferred = {item.name: item for item in onnx.shape_inference.infer_shapes(bare, data_prop=True).graph.value_info}
    for item in model.graph.value_info:
        if item.name in inferred and inferred[item.name].type.tensor_type.HasField("shape") and item.type.tensor_type.HasField("shape"):
            stored, right = item.type.tensor_type.shape.dim, inferred[item.name].type.tensor_type.shape.dim
            for a, b in zip(stored, right, strict=True):
                if a.HasField("dim_value") and b.HasField("dim_value"):
                    assert a.dim_value == b.dim_value, item.name
