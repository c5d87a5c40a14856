"""Which weights can be pruned: the search that fills in the table of layer operators for a graph.

`find` walks the main graph once. Every float initializer that some tool could prune becomes either one `Layer` per node that
reads it or a `Skipped` row with the reason: nothing is left out in silence.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto

from relief_onnx.fused import refusal
from relief_onnx.graph import WEIGHT_TYPES, Graph, Use, attributes
from relief_onnx.layer_rows import LAYER_OPERATORS, LayerRow, embedding_table
from relief_onnx.nodes import STANDARD, home_of, operator_of, taken_branch
from relief_onnx.plan import Bias, Geometry, Layer, Plan, Skipped
from relief_onnx.quantised_open import unopened
from relief_onnx.reasons import why_no_layer
from relief_onnx.recurrent_layers import is_bias, is_recurrent
from relief_onnx.sources import Refusal, Source, readers, trace_constant

__all__ = ["BODY_OPSET", "DATA_DECIDE", "LAYER_OPERATORS", "Bias", "Geometry", "Layer", "Plan", "Skipped", "find", "why_stopped"]


def _own_bias(graph: Graph, layer: Layer, slot: int | None) -> Bias | None:
    node = graph.nodes[layer.node]
    if slot is None or len(node.input) <= slot or not node.input[slot]:
        return None
    factor = float(attributes(node).get("beta", 1.0)) if layer.op == "Gemm" else 1.0
    return _bias(graph, layer, node.input[slot], factor, layer.node)


def _bias(graph: Graph, layer: Layer, tensor: str, factor: float, node: int) -> Bias | None:
    source = trace_constant(graph, tensor)
    if not isinstance(source, Source) or not graph.is_float(source.name):
        return None
    if layer.op == "Gemm" and node == layer.node and int(np.prod(source.view.shape)) == 1 < layer.out_channels:
        return Bias(source.name, source.view.reshape(1).spread(layer.out_channels), factor, node, shared=True)
    shape, rank = source.view.shape, _rank(graph, layer)
    axis = layer.output_axis if layer.output_axis < 0 else layer.output_axis - rank if rank else None
    per_unit = int(np.prod(shape)) == layer.out_channels and (
        len(shape) == 1 if layer.is_convolution and node == layer.node else _on_axis(shape, axis, layer.out_channels)
    )
    if not per_unit:
        return None
    uses = [[use for use in graph.uses.get(name, ()) if use.slot >= 0 or use.node != layer.inside] for name in (source.name, *source.path)]
    shared = any(len(own) != 1 for own in uses) or graph.is_output(source.name)
    return Bias(source.name, source.view.reshape(layer.out_channels), factor, node, shared)


def _rank(graph: Graph, layer: Layer) -> int:
    shape = graph.shape(layer.output)
    return len(shape) if shape else len(layer.view.shape) if layer.is_convolution else 2 if layer.op == "Gemm" else 0


def _on_axis(shape: tuple[int, ...], axis: int | None, size: int) -> bool:
    """Whether a broadcast constant varies only along `axis` (negative) of the output."""
    return axis is not None and -axis <= len(shape) and shape[axis] == size


# What a quantised model has between a product and the bias that is added to it.
_ROUNDING = frozenset({"QuantizeLinear", "DequantizeLinear"})


def _with_following_add(graph: Graph, layer: Layer) -> Layer:
    """Take a constant that is added right after a layer without a bias as its bias."""
    uses, output = graph.uses.get(layer.output, []), layer.output
    while len(uses) == 1 and uses[0].slot == 0 and graph.nodes[uses[0].node].op_type in _ROUNDING and not graph.is_output(output):
        output = graph.nodes[uses[0].node].output[0]
        uses = graph.uses.get(output, [])
    if layer.bias is not None or len(uses) != 1 or uses[0].slot < 0 or graph.is_output(output):
        return layer
    node = graph.nodes[uses[0].node]
    if node.op_type != "Add" or len(set(node.input)) != 2:
        return layer
    bias = _bias(graph, layer, node.input[1 - uses[0].slot], 1.0, uses[0].node)
    return layer if bias is None else replace(layer, bias=bias, output=node.output[0])


# What else a recurrent node stores, by its slot: a number or three for each hidden unit, which go with it.
_KEPT = {3: "bias", 5: "first state", 6: "first state", 7: "peepholes"}


def _read_inside(graph: Graph, index: int, weight: str) -> str:
    """Why a weight that a body captures is left alone."""
    node = graph.nodes[index]
    body = "a branch" if node.op_type == "If" else "the body"
    why = _of_body(graph, node)
    more = _INTEGERS if why == _OF_BODY["both"] and not graph.is_float(weight) else ""
    return f"{body} of {operator_of(node)} node {graph.names[index]} reads it{why}{more}"


# What is said of a body where no data were run.
DATA_DECIDE = "whether it can be pruned depends on the data, which have not run"
# What is said of integers besides.
_INTEGERS = " (integers that several bodies which run share are left as they are)"
# What is known of the bodies of a node, by what was noted of it (see `nodes.mark_taken`).
_NEVER = ", which never ran on the calibration data"
_OF_BODY = {
    "": f": {DATA_DECIDE}",
    "both": ", as no layer that can be pruned",
    "old": ", which is not looked into below IR version 4",
}
# The first opset whose operators `loops` uses to look into bodies that are not moved out.
BODY_OPSET = 11


def _of_body(graph: Graph, node: onnx.NodeProto) -> str:
    return _too_early(graph, node) or _OF_BODY.get(taken_branch(node), _NEVER)


def _too_early(graph: Graph, node: onnx.NodeProto) -> str:
    """What is said of bodies that stay where they are in a file of an early opset, such as that of a Scan with a batch (opset 8)."""
    stays = taken_branch(node) == "both" or (not taken_branch(node) and node.op_type != "If")
    if graph.opset >= BODY_OPSET or not stays:
        return ""
    return f", which is not looked into at opset {graph.opset}: export the model at opset {BODY_OPSET} or later"


def _describe(graph: Graph, use: Use, source: Source) -> Layer | Refusal:
    node = graph.nodes[use.node]
    if use.slot < 0:
        return Refusal(_read_inside(graph, use.node, source.name))
    row = _row_of(node)
    if row is None and _looks_up(node, use.slot):
        table = embedding_table(graph, use.node, source.view)
        return table if isinstance(table, Refusal) else replace(table, weight=source.name, inside=graph.producer.get(home_of(node)))
    if use.slot in _KEPT and is_recurrent(node):
        return Refusal(f"{node.op_type} node {graph.names[use.node]} reads it as its {_KEPT[use.slot]}, which is not pruned")
    if row is None or use.slot not in row.slots:
        why = refusal(graph, use.node) or unopened(graph, use.node)
        return Refusal(f"{_no_layer(graph, use.node, source.name)}: {why}" if why else _no_layer(graph, use.node, source.name, part=True))
    found = row.describe(graph, use.node, use.slot, source.view)
    if isinstance(found, Refusal):
        why = refusal(graph, use.node)
        return Refusal(found.reason + (f": {why}" if why else ""))
    if graph.constant(found.input) is not None:
        return Refusal("its input is a constant, so the node computes a constant")
    if not graph.is_float(found.input) and found.input in graph.types:
        return Refusal("its input is not floating point")
    shape = graph.shape(found.input)
    if shape is not None and found.input_axis >= len(shape):
        return Refusal(f"its input has {len(shape)} axes, too few for the operator")
    layer = replace(found, weight=source.name, inside=graph.producer.get(home_of(node)))
    if layer.recurrent is not None:
        return layer
    return _with_following_add(graph, replace(layer, bias=_own_bias(graph, layer, row.bias_slot)))


def _no_layer(graph: Graph, index: int, read: str, part: bool = False) -> str:
    """Why what a node reads is no weight of a layer; if `part`, also of which layer's weight numbers are a part."""
    node, name, is_float = graph.nodes[index], graph.names[index], graph.is_float(read)
    made, seen = [output for output in node.output if part and is_float and _from_stored(graph, output)], set[str]()
    while made:
        tensor = made.pop()
        seen.add(tensor)
        for use in (item for item in graph.uses.get(tensor, []) if item.slot >= 0):
            reader = graph.nodes[use.node]
            if (row := _row_of(reader)) is not None and use.slot in row.slots:
                layer = f"{reader.op_type} node {graph.names[use.node]}"
                return f"{node.op_type} node {name} computes the weight of {layer} from it; fold constants first, with onnxsim for example"
            made += [output for output in reader.output if output not in seen and _from_stored(graph, output)]
    return why_no_layer(node, name, is_float)


def _from_stored(graph: Graph, tensor: str) -> bool:
    """Whether a tensor is computed from stored numbers alone."""
    above, seen = [tensor], set[str]()
    while above:
        name = above.pop()
        seen.add(name)
        if name and name not in graph.initializers:
            if name not in graph.producer:
                return False
            above += [read for read in graph.read_by(graph.producer[name]) if read not in seen]
    return True


def _row_of(node: onnx.NodeProto) -> LayerRow | None:
    return LAYER_OPERATORS.get(node.op_type) if node.domain in STANDARD else None


def why_stopped(graph: Graph, plan: Plan, index: int) -> str:
    """Why nothing is known of what a node does to units: what keeps a fused one closed, or why the weight of a layer is left alone."""
    node = graph.nodes[index]
    row = _row_of(node)
    read = {name: trace_constant(graph, name) for slot, name in enumerate(node.input) if row is not None and slot in row.slots}
    weights = {source.name if isinstance(source, Source) else name for name, source in read.items()}
    left = next((item.reason for item in plan.skipped if item.weight in weights), "")
    computed = row is not None and row.needs_weight and not isinstance(read[node.input[1]], Source)
    return refusal(graph, index) or left or (_computed(graph, node) if computed else "it is not in the operator table")


def _computed(graph: Graph, node: onnx.NodeProto) -> str:
    maker = graph.nodes[graph.producer[node.input[1]]].op_type if node.input[1] in graph.producer else "a model input"
    return f"its weight is not stored in the file but computed by {maker} when the model runs"


def _looks_up(node: onnx.NodeProto, slot: int) -> bool:
    return node.op_type == "Gather" and node.domain in ("", "ai.onnx") and slot == 0


def _candidate(item: TensorProto) -> bool:
    """A float or quantised tensor, not empty, with two axes or more that are longer than 1: some tool could prune it."""
    return item.data_type in WEIGHT_TYPES and all(item.dims) and sum(size > 1 for size in item.dims) >= 2


def find(graph: Graph) -> Plan:
    """All prunable layers in graph order, and a row with a reason for every other weight."""
    layers: list[Layer] = []
    skipped: list[Skipped] = []
    tables: list[Layer] = []
    for name in graph.initializers:
        found_readers = _without_mirrored(graph, _real(graph, readers(graph, name)))
        rows = [(use, LAYER_OPERATORS.get(graph.nodes[use.node].op_type)) for use, _ in found_readers if use.slot >= 0]
        is_layer_weight = any(row and use.slot in row.slots and graph.is_float(name) for use, row in rows)
        if not (_candidate(graph.initializers[name]) or (is_layer_weight and all(graph.initializers[name].dims))) or not found_readers:
            continue
        if all(is_bias(graph, graph.nodes[use.node]) for use, _ in found_readers):
            continue  # half of a bias (see `recurrent_layers`)
        found = [_from_reader(graph, use, tensor) for use, tensor in found_readers]
        refusals = [(use, item) for (use, _), item in zip(found_readers, found, strict=True) if isinstance(item, Refusal)]
        if graph.is_output(name) or any(graph.is_output(tensor) for _, tensor in found_readers):
            refusals.append((found_readers[0][0], Refusal("the weight itself is an output of the model")))
        if refusals:
            use, refusal = refusals[0]
            shape = tuple(graph.initializers[name].dims)
            skipped.append(Skipped(graph.names[use.node], operator_of(graph.nodes[use.node]), name, shape, refusal.reason))
        else:
            made = [item for item in found if isinstance(item, Layer)]
            (tables if any(item.is_table for item in made) else layers).extend(made)
    layers = _in_pairs(graph, layers, skipped)
    skipped += _without_initializer(graph) + _inner(graph)
    in_order = [tuple(sorted(part, key=lambda layer: (layer.node, -layer.key))) for part in (layers, tables)]
    return Plan(in_order[0], tuple(skipped), in_order[1])


def _in_pairs(graph: Graph, layers: list[Layer], skipped: list[Skipped]) -> list[Layer]:
    """Without W or R of a recurrent node where the other is no layer: it gets a row in `skipped`, and so do all that share it."""
    while True:
        parts = Counter(layer.node for layer in layers if layer.recurrent is not None)
        alone = next((layer for layer in layers if parts.get(layer.node) == 1), None)
        if alone is None:
            return layers
        shape = tuple(graph.initializers[alone.weight].dims)
        reason = f"the other weight of {alone.op} node {graph.names[alone.node]} cannot be pruned"
        skipped.append(Skipped(graph.names[alone.node], alone.op, alone.weight, shape, reason))
        layers = [layer for layer in layers if layer.weight != alone.weight]


def _real(graph: Graph, found: list[tuple[Use, str]]) -> list[tuple[Use, str]]:
    """Readers, without those that only look at the size where others look at the values."""
    return [item for item in found if graph.nodes[item[0].node].op_type not in ("Shape", "Size")] or found


def _without_mirrored(graph: Graph, found: list[tuple[Use, str]]) -> list[tuple[Use, str]]:
    """Without the bodies whose layers have mirrors in the main graph (see `loops`)."""
    homes = {graph.producer.get(home_of(graph.nodes[use.node]), -1) for use, _ in found if use.slot >= 0}
    return [(use, name) for use, name in found if use.slot >= 0 or use.node not in homes]


def _from_reader(graph: Graph, use: Use, tensor: str) -> Layer | Refusal:
    source = trace_constant(graph, tensor)
    if isinstance(source, Source):
        return _describe(graph, use, source)
    node = graph.nodes[use.node]
    if use.slot >= 0 and node.op_type not in LAYER_OPERATORS and not _looks_up(node, use.slot):
        return Refusal(_no_layer(graph, use.node, tensor, part=True))
    return source or Refusal("its value is computed at run time")


def _without_initializer(graph: Graph) -> list[Skipped]:
    """Layers whose weight is not stored in the file but computed by other nodes."""
    found = []
    for i, node in enumerate(graph.nodes):
        row = _row_of(node)
        if row is None or not row.needs_weight or isinstance(trace_constant(graph, node.input[1]), Source):
            continue
        shape = tuple(size for size in graph.shape(node.input[1]) or () if isinstance(size, int))
        stored = (graph.initializers[name] for name in _origins(graph, node.input[1]) if name in graph.initializers)
        if not any(_candidate(item) for item in stored):
            found.append(Skipped(graph.names[i], node.op_type, node.input[1], shape, _computed(graph, node)))
    return found


def _origins(graph: Graph, tensor: str) -> list[str]:
    """The tensors that the first inputs of nodes lead back to: those that `find` has rows for already."""
    path = [tensor]
    while path[-1] in graph.producer and graph.nodes[graph.producer[path[-1]]].input:
        path.append(graph.nodes[graph.producer[path[-1]]].input[0])
    return path


def _inner(graph: Graph) -> list[Skipped]:
    """Weights that live inside the bodies of control flow, as initializers or in Constant nodes."""
    found: list[Skipped] = []
    for i, node in enumerate(graph.nodes):
        for name in (item.name for item in node.attribute if item.type == AttributeProto.GRAPH):
            runs = taken_branch(node) == "both" and not _too_early(graph, node)
            known = "and no layer that can be pruned reads it there" if runs else ""
            known += " on samples one by one" if known and node.op_type == "If" else ""
            where = f"it lives inside the {name} of {operator_of(node)} node {graph.names[i]}"
            reason = f"{where}, {known}" if known else where + _of_body(graph, node)
            body = next(item.g for item in node.attribute if item.name == name)
            rows = _held_in(body, where.removeprefix("it lives "), reason, runs)
            found += [Skipped(graph.names[i], operator_of(node), name, tuple(item.dims), why) for name, item, why in rows]
    return found


def _held_in(body: onnx.GraphProto, where: str, reason: str, runs: bool) -> list[tuple[str, TensorProto, str]]:
    """What could be pruned in a body and in those within it, with the reason. runs: the body does, so those within may differ."""
    held = [(item.name, item) for item in body.initializer]
    held += [(child.output[0], item.t) for child in body.node if child.op_type == "Constant" for item in child.attribute]
    found = [(name, item, reason) for name, item in held if _candidate(item)]
    for child in body.node:
        for own in (item for item in child.attribute if item.type == AttributeProto.GRAPH):
            name = child.name or next((output for output in child.output if output), "")
            inside, why, taken = f"inside the {own.name} of {operator_of(child)} node {name} {where}", reason, taken_branch(child)
            goes = runs and taken in ("both", "idle", f"only {own.name}", f"idle {own.name}")
            if runs and taken:
                why = f"it lives {inside}" + (", and no layer that can be pruned reads it there" if goes else _NEVER)
            found += _held_in(own.g, inside, why, goes)
    return found
