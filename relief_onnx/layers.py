"""Which weights can be pruned: a table of layer operators, and the search that fills it in for a graph.

`find` walks the main graph once. Every float initializer that some tool could prune becomes either one `Layer` per node that
reads it or a `Skipped` row with the reason: nothing is left out in silence. Embedding tables are layers too, but apart from the others
(see `embeddings`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto

from relief_onnx.fused import refusal
from relief_onnx.geometry import Geometry
from relief_onnx.graph import FLOATS, Graph, Use, attributes, subgraphs
from relief_onnx.nodes import home_of, taken_branch
from relief_onnx.reasons import TABLE_REASON, why_no_layer
from relief_onnx.recurrent_layers import Recurrent, describe, is_bias, is_recurrent, made, own_half
from relief_onnx.sources import Refusal, Source, readers, trace_constant
from relief_onnx.views import View

__all__ = [
    "LAYER_OPERATORS",
    "Bias",
    "Geometry",
    "Layer",
    "Plan",
    "Skipped",
    "find",
]


@dataclass(frozen=True)
class Bias:
    """The constant that a layer adds. `factor` is Gemm's beta; `node` is the Add that holds it, or the layer's own number."""

    name: str
    view: View
    factor: float
    node: int
    shared: bool


@dataclass(frozen=True)
class Layer:
    """One node with a prunable weight. Axes are those of the activation tensors.

    A recurrent node is two layers, W and R (`recurrent`). What R reads is no tensor of the graph; `input` names it all the same.
    inside: the node in whose body it runs; `node` is then its mirror in the main graph (see `loops`).
    """

    node: int
    name: str
    op: str
    weight: str
    view: View
    groups: int
    input: str
    input_axis: int
    output: str
    output_axis: int
    geometry: Geometry | None = None
    scale: float = 1.0
    bias: Bias | None = None
    recurrent: Recurrent | None = None

    @property
    def key(self) -> int:
        """A number of its own among all layers: the node's, of R of a recurrent node one below 0."""
        return ~self.node if self.recurrent is not None and self.recurrent.part == "R" else self.node

    @property
    def reads(self) -> str:
        """What statistics listen to: the input, of a recurrent node the steps that count (see `recurrent_reads`)."""
        return self.input if self.recurrent is None else f"{self.output}/{self.recurrent.part}/reads"

    inside: int | None = None

    @property
    def is_convolution(self) -> bool:
        """Whether a unit of the mask is a whole kernel."""
        return self.geometry is not None

    @property
    def is_table(self) -> bool:
        """Whether the weight is an embedding table: a dense layer whose input is one-hot, given as the number of a row."""
        return self.op == "Gather"

    @property
    def is_grouped_transposed(self) -> bool:
        """Whether the weight is stored as a transposed convolution with groups has it: [in, out per group, *kernel]."""
        transposed = self.geometry is not None and self.geometry.transposed
        return transposed and self.groups > 1 and [kind for kind, _ in self.view.steps] == ["reshape", "transpose", "reshape"]

    @property
    def out_channels(self) -> int:
        """Neurons or filters."""
        return self.view.shape[0]

    @property
    def width(self) -> int:
        """Channels of what it makes, of a recurrent layer in each direction."""
        return self.out_channels if self.recurrent is None else self.recurrent.hidden

    @property
    def in_per_group(self) -> int:
        """Inputs that each neuron or filter reads."""
        return self.view.shape[1]


@dataclass(frozen=True)
class Skipped:
    """A weight that some tool could prune and that this one leaves alone, with the reason."""

    node: str
    op: str
    weight: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Plan:
    """What can be pruned in a model, and what cannot and why.

    `tables` are the readers of embedding tables; where a dense layer shares the table (a tied head), that layer is among them.
    """

    layers: tuple[Layer, ...]
    skipped: tuple[Skipped, ...]
    tables: tuple[Layer, ...] = ()

    def single(self) -> dict[int, Layer]:
        """The layers that are all of their node, by its number."""
        return {layer.node: layer for layer in self.layers if layer.recurrent is None}

    def recurrent(self) -> dict[int, dict[str, Layer]]:
        """Layers W and R of recurrent nodes, by its number; of some nodes one of them only."""
        found: dict[int, dict[str, Layer]] = {}
        for layer in self.layers:
            if layer.recurrent is not None:
                found.setdefault(layer.node, {})[layer.recurrent.part] = layer
        return found

    def by_weight(self) -> dict[str, tuple[Layer, ...]]:
        """The layers that read each weight; more than one where it is shared."""
        return _by_weight(self.layers)

    def by_table(self) -> dict[str, tuple[Layer, ...]]:
        """The readers of each embedding table."""
        return _by_weight(self.tables)

    @property
    def unranked(self) -> tuple[Skipped, ...]:
        """`skipped`, and the tables, which are only ranked where the user names them."""
        rows = []
        for weight, users in self.by_table().items():
            first = next(layer for layer in users if layer.is_table)
            rows.append(Skipped(first.name, first.op, weight, first.view.source, TABLE_REASON))
        return (*self.skipped, *rows)


def _by_weight(layers: tuple[Layer, ...]) -> dict[str, tuple[Layer, ...]]:
    found: dict[str, tuple[Layer, ...]] = {}
    for layer in layers:
        found[layer.weight] = (*found.get(layer.weight, ()), layer)
    return found


Describe = Callable[[Graph, int, int, View], Layer | Refusal]


def _layer(graph: Graph, index: int, view: View, **fields: Any) -> Layer:
    node = graph.nodes[index]
    return Layer(index, graph.names[index], node.op_type, "", view, output=node.output[0], **fields)


def _geometry(values: Mapping[str, Any], kernel: tuple[int, ...], transposed: bool) -> Geometry:
    ones = (1,) * len(kernel)
    return Geometry(
        kernel,
        tuple(values.get("strides", ones)),
        tuple(values.get("dilations", ones)),
        tuple(values.get("pads", (0,) * 2 * len(kernel))),
        str(values.get("auto_pad", "NOTSET")),
        transposed,
        tuple(values.get("output_padding", ())),
        tuple(values.get("output_shape", ())),
    )


def _convolution(graph: Graph, index: int, slot: int, view: View) -> Layer | Refusal:
    """W [out, in / group, *kernel]."""
    if len(view.shape) < 3:
        return Refusal(f"its weight has {len(view.shape)} axes; a convolution needs at least 3")
    values = attributes(graph.nodes[index])
    geometry = _geometry(values, view.shape[2:], transposed=False)
    groups = values.get("group", 1)
    return _layer(
        graph, index, view, groups=groups, input=graph.nodes[index].input[0], input_axis=1, output_axis=1,
        geometry=geometry,
    )  # fmt: skip


def _transposed_convolution(graph: Graph, index: int, slot: int, view: View) -> Layer | Refusal:
    """W [in, out / group, *kernel]."""
    if len(view.shape) < 3:
        return Refusal(f"its weight has {len(view.shape)} axes; a transposed convolution needs at least 3")
    values = attributes(graph.nodes[index])
    groups = values.get("group", 1)
    total, out, *kernel = view.shape
    spatial = range(3, 3 + len(kernel))
    canonical = (
        view.reshape(groups, total // groups, out, *kernel).transpose(0, 2, 1, *spatial).reshape(groups * out, total // groups, *kernel)
        if groups > 1
        else view.transpose(1, 0, *(axis - 1 for axis in spatial))
    )
    return _layer(
        graph, index, canonical, groups=groups, input=graph.nodes[index].input[0], input_axis=1, output_axis=1,
        geometry=_geometry(values, tuple(kernel), transposed=True),
    )  # fmt: skip


def _gemm(graph: Graph, index: int, slot: int, view: View) -> Layer | Refusal:
    """Y = alpha A' B' + beta C, with the constant on either side."""
    values = attributes(graph.nodes[index])
    flip = (values.get("transA", 0), values.get("transB", 0))
    if len(view.shape) != 2:
        return Refusal(f"its weight has {len(view.shape)} axes; Gemm needs 2")
    # As B the weight is [in, out] unless transB; as A it is [out, in] unless transA.
    canonical = view.transpose(1, 0) if bool(flip[slot]) != (slot == 1) else view
    input_axis = (0 if flip[0] else 1) if slot == 1 else (1 if flip[1] else 0)
    return _layer(
        graph, index, canonical, groups=1, input=graph.nodes[index].input[1 - slot], input_axis=input_axis,
        output_axis=slot, scale=float(values.get("alpha", 1.0)),
    )  # fmt: skip


def _matmul(graph: Graph, index: int, slot: int, view: View) -> Layer | Refusal:
    """A constant matrix on the right [in, out] or on the left [out, in]; leading axes of size 1 are dropped."""
    if len(view.shape) < 2:
        return Refusal("its weight is a vector, so there is one output and nothing to rank")
    if any(size != 1 for size in view.shape[:-2]):
        return Refusal(f"its weight {list(view.shape)} is a batch of matrices")
    canonical = view.reshape(*view.shape[-2:])
    if slot == 1:
        canonical = canonical.transpose(1, 0)
    return _layer(
        graph, index, canonical, groups=1, input=graph.nodes[index].input[1 - slot],
        input_axis=-1 if slot == 1 else -2, output_axis=-1 if slot == 1 else -2,
    )  # fmt: skip


# Row numbers are measured as float32, which counts up to here.
_MOST_ROWS = 1 << 24


def _table(graph: Graph, index: int, view: View) -> Layer | Refusal:
    """A table [rows, dims] whose rows are picked by numbers that are computed at run time, or [dims, rows] along axis 1."""
    node = graph.nodes[index]
    axis = attributes(node).get("axis", 0)
    if graph.constant(node.input[1]) is not None:
        return Refusal(f"Gather node {graph.names[index]} picks fixed entries of it")
    if len(view.shape) != 2:
        return Refusal(f"Gather node {graph.names[index]} picks from a table of {len(view.shape)} axes; an embedding table has 2")
    if view.shape[axis % 2] > _MOST_ROWS:
        return Refusal(f"its table has more than {_MOST_ROWS:,} rows")
    first = axis % 2 == 0
    return _layer(
        graph, index, view.transpose(1, 0) if first else view, groups=1, input=node.input[1], input_axis=0,
        output_axis=-1 if first else 0,
    )  # fmt: skip


def _recurrent(graph: Graph, index: int, slot: int, view: View) -> Layer | Refusal:
    """W [directions, gates * hidden, features] or R [directions, gates * hidden, hidden]."""
    found = describe(graph, index, slot)
    if isinstance(found, Refusal):
        return found
    part, view = found
    node, name = graph.nodes[index], f"{graph.names[index]}/{found[0].part}"
    source = node.input[0] if slot == 1 else f"{made(node)}/R/reads"
    half = own_half(graph, index, part.part)
    stored = View.of((part.directions, view.shape[0] // part.directions)).reshape(-1)
    bias = None if half is None else Bias(half[0], stored, 1.0, index, half[1])
    return Layer(index, name, node.op_type, "", view, part.groups, source, -1, made(node), -1, bias=bias, recurrent=part)


@dataclass(frozen=True)
class LayerRow:
    """One layer operator: which inputs may hold the weight, how to read it, and where its own bias sits (None: it has none).

    `needs_weight`: input 1 is always a weight, never another activation.
    """

    slots: tuple[int, ...]
    describe: Describe
    bias_slot: int | None
    needs_weight: bool = False


LAYER_OPERATORS: Mapping[str, LayerRow] = {
    "Conv": LayerRow((1,), _convolution, 2, needs_weight=True),
    "ConvTranspose": LayerRow((1,), _transposed_convolution, 2, needs_weight=True),
    "Gemm": LayerRow((1, 0), _gemm, 2),
    "MatMul": LayerRow((1, 0), _matmul, None),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), LayerRow((1, 2), _recurrent, 3)),
}


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


def _read_inside(graph: Graph, index: int) -> str:
    """Why a weight that a body captures is left alone."""
    node = graph.nodes[index]
    body = "a branch" if node.op_type == "If" else "the body"
    return f"{body} of {node.op_type} node {graph.names[index]} reads it{_OF_BODY.get(taken_branch(node), _NEVER)}"


# What is known of the bodies of a node, by what was noted of it (see `nodes.mark_taken`).
_NEVER = ", which never ran on the calibration data"
_OF_BODY = {
    "": ": whether it can be pruned depends on the data, which have not run",
    "both": ", as no layer that can be pruned",
    "old": ", which is not looked into below IR version 4",
}


def _describe(graph: Graph, use: Use, source: Source) -> Layer | Refusal:
    node = graph.nodes[use.node]
    if use.slot < 0:
        return Refusal(_read_inside(graph, use.node))
    row = LAYER_OPERATORS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if row is None and _looks_up(node, use.slot):
        table = _table(graph, use.node, source.view)
        return table if isinstance(table, Refusal) else replace(table, weight=source.name)
    if use.slot in _KEPT and is_recurrent(node):
        return Refusal(f"{node.op_type} node {graph.names[use.node]} reads it as its {_KEPT[use.slot]}, which is not pruned")
    if row is None or use.slot not in row.slots:
        why = refusal(graph, use.node)
        return Refusal(why_no_layer(node, graph.names[use.node], graph.is_float(source.name)) + (f": {why}" if why else ""))
    found = row.describe(graph, use.node, use.slot, source.view)
    if isinstance(found, Refusal):
        return found
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


def _looks_up(node: onnx.NodeProto, slot: int) -> bool:
    return node.op_type == "Gather" and node.domain in ("", "ai.onnx") and slot == 0


# Element types of weights; eight bit integers are those of quantised models.
_WEIGHT_TYPES = FLOATS | {TensorProto.INT8, TensorProto.UINT8}


def _candidate(item: TensorProto) -> bool:
    """A float or quantised tensor with two axes or more that are longer than 1: some tool could prune it."""
    return item.data_type in _WEIGHT_TYPES and sum(size > 1 for size in item.dims) >= 2


def find(graph: Graph) -> Plan:
    """All prunable layers in graph order, and a row with a reason for every other weight."""
    layers: list[Layer] = []
    skipped: list[Skipped] = []
    tables: list[Layer] = []
    for name in graph.initializers:
        found_readers = _without_mirrored(graph, _real(graph, readers(graph, name)))
        rows = [(use, LAYER_OPERATORS.get(graph.nodes[use.node].op_type)) for use, _ in found_readers if use.slot >= 0]
        is_layer_weight = any(row and use.slot in row.slots and graph.is_float(name) for use, row in rows)
        if not (_candidate(graph.initializers[name]) or is_layer_weight) or not found_readers:
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
            skipped.append(Skipped(graph.names[use.node], graph.nodes[use.node].op_type, name, shape, refusal.reason))
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
        return Refusal(why_no_layer(node, graph.names[use.node], graph.is_float(tensor)))
    return source or Refusal("its value is computed at run time")


def _without_initializer(graph: Graph) -> list[Skipped]:
    """Layers whose weight is not stored in the file but computed by other nodes."""
    found = []
    for i, node in enumerate(graph.nodes):
        row = LAYER_OPERATORS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if row is None or not row.needs_weight or isinstance(trace_constant(graph, node.input[1]), Source):
            continue
        maker = graph.nodes[graph.producer[node.input[1]]].op_type if node.input[1] in graph.producer else "a model input"
        shape = tuple(size for size in graph.shape(node.input[1]) or () if isinstance(size, int))
        stored = (graph.initializers[name] for name in _origins(graph, node.input[1]) if name in graph.initializers)
        if not any(_candidate(item) for item in stored):
            reason = f"its weight is not stored in the file but computed by {maker} when the model runs"
            found.append(Skipped(graph.names[i], node.op_type, node.input[1], shape, reason))
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
            known = "and no layer that can be pruned reads it there" if taken_branch(node) == "both" else ""
            known += " on samples one by one" if known and node.op_type == "If" else ""
            where = f"it lives inside the {name} of {node.op_type} node {graph.names[i]}"
            reason = f"{where}, {known}" if known else where + _OF_BODY.get(taken_branch(node), _NEVER)
            pending = [item.g for item in node.attribute if item.name == name]
            while pending:
                body = pending.pop()
                held = [(item.name, item) for item in body.initializer]
                held += [(child.output[0], item.t) for child in body.node if child.op_type == "Constant" for item in child.attribute]
                found += [Skipped(graph.names[i], node.op_type, name, tuple(item.dims), reason) for name, item in held if _candidate(item)]
                pending += [inner for child in body.node for inner in subgraphs(child)]
    return found
