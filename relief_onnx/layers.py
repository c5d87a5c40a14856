"""Which weights can be pruned: a table of layer operators, and the search that fills it in for a graph.

`find` walks the main graph once. Every float initializer that some tool could prune becomes either one `Layer` per node that
reads it or a `Skipped` row with the reason: nothing is left out in silence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from onnx import AttributeProto, TensorProto

from relief_onnx.graph import FLOATS, Graph, Use, attributes, subgraphs
from relief_onnx.nodes import home_of, taken_branch
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
    "select",
]


@dataclass(frozen=True)
class Geometry:
    """How a convolution slides: one entry per spatial axis, pads as ONNX has them (all begins, then all ends)."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str = "NOTSET"
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()

    @property
    def positions(self) -> int:
        """Weights in one kernel."""
        return int(np.prod(self.kernel))


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
    inside: int | None = None

    @property
    def is_convolution(self) -> bool:
        """Whether a unit of the mask is a whole kernel."""
        return self.geometry is not None

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
    """What can be pruned in a model, and what cannot and why."""

    layers: tuple[Layer, ...]
    skipped: tuple[Skipped, ...]

    def by_weight(self) -> dict[str, tuple[Layer, ...]]:
        """The layers that read each weight; more than one where it is shared."""
        found: dict[str, tuple[Layer, ...]] = {}
        for layer in self.layers:
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


def _with_following_add(graph: Graph, layer: Layer) -> Layer:
    """Take a constant that is added right after a layer without a bias as its bias."""
    uses = graph.uses.get(layer.output, [])
    if layer.bias is not None or len(uses) != 1 or uses[0].slot < 0 or graph.is_output(layer.output):
        return layer
    node = graph.nodes[uses[0].node]
    if node.op_type != "Add" or len(set(node.input)) != 2:
        return layer
    bias = _bias(graph, layer, node.input[1 - uses[0].slot], 1.0, uses[0].node)
    return layer if bias is None else replace(layer, bias=bias, output=node.output[0])


def _read_inside(graph: Graph, index: int) -> str:
    """Why a weight that a body captures is left alone."""
    node = graph.nodes[index]
    body = "a branch" if node.op_type == "If" else "the body"
    return f"{body} of {node.op_type} node {graph.names[index]} reads it{_OF_BODY.get(taken_branch(node), _NEVER)}"


# What is known of the bodies of a node, by what was noted of it (see `nodes.mark_taken`).
_NEVER = ", which never ran on the calibration data"
_OF_BODY = {"": ": whether it can be pruned depends on the data, which have not run", "both": ", as no layer that can be pruned"}


def _describe(graph: Graph, use: Use, source: Source) -> Layer | Refusal:
    node = graph.nodes[use.node]
    if use.slot < 0:
        return Refusal(_read_inside(graph, use.node))
    row = LAYER_OPERATORS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if row is None or use.slot not in row.slots:
        return Refusal(f"{node.op_type} node {graph.names[use.node]} reads it, which is not a layer that can be pruned")
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
    return _with_following_add(graph, replace(layer, bias=_own_bias(graph, layer, row.bias_slot)))


# Element types of weights; eight bit integers are those of quantised models.
_WEIGHT_TYPES = FLOATS | {TensorProto.INT8, TensorProto.UINT8}


def _candidate(item: TensorProto) -> bool:
    """A float or quantised tensor with two axes or more that are longer than 1: some tool could prune it."""
    return item.data_type in _WEIGHT_TYPES and sum(size > 1 for size in item.dims) >= 2


def find(graph: Graph) -> Plan:
    """All prunable layers in graph order, and a row with a reason for every other weight."""
    layers: list[Layer] = []
    skipped: list[Skipped] = []
    for name in graph.initializers:
        found_readers = _without_mirrored(graph, readers(graph, name))
        rows = [(use, LAYER_OPERATORS.get(graph.nodes[use.node].op_type)) for use, _ in found_readers if use.slot >= 0]
        is_layer_weight = any(row and use.slot in row.slots and graph.is_float(name) for use, row in rows)
        if not (_candidate(graph.initializers[name]) or is_layer_weight) or not found_readers:
            continue
        found = [_from_reader(graph, use, tensor) for use, tensor in found_readers]
        refusals = [(use, item) for (use, _), item in zip(found_readers, found, strict=True) if isinstance(item, Refusal)]
        if graph.is_output(name) or any(graph.is_output(tensor) for _, tensor in found_readers):
            refusals.append((found_readers[0][0], Refusal("the weight itself is an output of the model")))
        if refusals:
            use, refusal = refusals[0]
            shape = tuple(graph.initializers[name].dims)
            skipped.append(Skipped(graph.names[use.node], graph.nodes[use.node].op_type, name, shape, refusal.reason))
        else:
            layers += [item for item in found if isinstance(item, Layer)]
    skipped += _without_initializer(graph) + _inner(graph)
    return Plan(tuple(sorted(layers, key=lambda layer: layer.node)), tuple(skipped))


def _without_mirrored(graph: Graph, found: list[tuple[Use, str]]) -> list[tuple[Use, str]]:
    """Without the bodies whose layers have mirrors in the main graph (see `loops`)."""
    homes = {graph.producer.get(home_of(graph.nodes[use.node]), -1) for use, _ in found if use.slot >= 0}
    return [(use, name) for use, name in found if use.slot >= 0 or use.node not in homes]


def _from_reader(graph: Graph, use: Use, tensor: str) -> Layer | Refusal:
    source = trace_constant(graph, tensor)
    if isinstance(source, Source):
        return _describe(graph, use, source)
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


def select(plan: Plan, only: str | None, skip: str | None) -> tuple[frozenset[str], dict[str, str]]:
    """Which weights --only and --skip let through (regular expressions over node and weight names), and why the others not."""
    allowed: set[str] = set()
    reasons: dict[str, str] = {}
    for weight, layers in plan.by_weight().items():
        names = [weight, *(layer.name for layer in layers)]
        if skip and any(re.search(skip, name) for name in names):
            reasons[weight] = f"--skip {skip} names it"
        elif only and not any(re.search(only, name) for name in names):
            reasons[weight] = f"--only {only} does not name it"
        else:
            allowed.add(weight)
    return frozenset(allowed), reasons
