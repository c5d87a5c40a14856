"""Two more rules of the paper, each an option: skip connections and silent units (arXiv 2109.10795 sections 3.3 and 3.4).

Skip connections. At y = f(x) + shortcut(x), with a = || mean_n |f| ||_F and r = || mean_n |shortcut| ||_F per channel: where
a / (a + r) < 1 - alpha the branch's filter goes; where r / (a + r) < 1 - alpha the shortcut's channel goes. An identity shortcut has
no filter, so its channel is multiplied by 0.

Silent units. A unit whose activation is 0 on every calibration sample loses all its connections. Unlike a provably dead unit it
might wake up on other data, so this is never done unless asked for.

Both take a whole unit out: its row, its bias, and the scale and shift of a normalisation that follows, so that it emits 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from relief_onnx import calibrate
from relief_onnx.dataset import Dataset
from relief_onnx.graph import Graph
from relief_onnx.layers import Layer, Plan
from relief_onnx.masks import Masks
from relief_onnx.ops import row_of
from relief_onnx.options import Options
from relief_onnx.probes import instrument
from relief_onnx.streaming import ChannelMaximum, MeanImage

__all__ = ["Gate", "PaperRules", "both_gates"]

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Gate:
    """A shortcut that keeps only some channels: input `slot` of Add node `node`."""

    node: str
    tensor: str
    slot: int
    keep: Flags


def both_gates(first: tuple[Gate, ...], second: tuple[Gate, ...]) -> tuple[Gate, ...]:
    """The channels of shortcuts that stay by both."""
    found = {(gate.node, gate.slot): gate for gate in first}
    for gate in second:
        earlier = found.get((gate.node, gate.slot))
        found[gate.node, gate.slot] = gate if earlier is None else replace(gate, keep=gate.keep & earlier.keep)
    return tuple(found.values())


@dataclass(frozen=True)
class Chain:
    """A layer and what follows it one to one: normalisations (their scale and shift names), then an activation or not."""

    layer: Layer
    output: str
    affine: tuple[str, ...]
    whole: bool


@dataclass(frozen=True)
class Join:
    """A residual Add: its branch's layer, and the other side's layer or None for an identity."""

    node: str
    branch: Chain
    branch_tensor: str
    shortcut: Chain | None
    shortcut_tensor: str
    slot: int


class PaperRules:
    """What the two rules need to measure, and what they take out."""

    def __init__(self, graph: Graph, plan: Plan, options: Options) -> None:
        self._graph, self._options = graph, options
        users = plan.by_weight()
        chains = [_chain(graph, layer) for layer in plan.single().values() if len(users[layer.weight]) == 1]
        self._chains = {chain.output: chain for chain in chains if chain.whole}
        self._silent = {
            chain.layer.weight: (chain, ChannelMaximum(_axis(chain.layer))) for chain in self._chains.values() if options.silent == "remove"
        }
        joins = _joins(graph, plan) if options.skip_rule != "off" else []
        self._joins = [(join, MeanImage(), MeanImage()) for join in joins]
        self.measurements = [calibrate.Measurement(chain.output, found) for chain, found in self._silent.values()]
        for join, branch, shortcut in self._joins:
            self.measurements += [
                calibrate.Measurement(join.branch_tensor, branch),
                calibrate.Measurement(join.shortcut_tensor, shortcut),
            ]

    def measure_alone(self, dataset: Dataset, options: Options, progress: calibrate.Progress) -> None:
        """A pass for these rules only, where scores come from a file."""
        if self.measurements:
            probe = instrument(self._graph, [item.tensor for item in self.measurements])
            calibrate.run(
                probe, self.measurements, dataset, limit=options.samples, seed=options.seed,
                threads=options.threads or 1, progress=progress,
            )  # fmt: skip

    def apply(self, masks: Masks) -> tuple[Masks, tuple[Gate, ...]]:
        """Take out what the measurements say. Returns new masks, and gates for identity shortcuts."""
        for weight, (chain, maximum) in self._silent.items():
            if weight in masks.keep:
                masks = _without(self._graph, masks, chain, np.asarray(maximum.maximum) == 0)
        gates = []
        for join, branch, shortcut in self._joins:
            a, r = branch.norms(), shortcut.norms()
            share = a / np.where(a + r > 0, a + r, 1.0)
            least = 1.0 - self._options.alpha_for((join.node,), True)
            if join.branch.layer.weight in masks.keep:
                masks = _without(self._graph, masks, join.branch, (share < least) & (a + r > 0))
            if self._options.skip_rule == "both":
                gone = (1.0 - share < least) & (a + r > 0)
                if join.shortcut is not None and join.shortcut.layer.weight in masks.keep:
                    masks = _without(self._graph, masks, join.shortcut, gone)
                elif join.shortcut is None and gone.any():
                    gates.append(Gate(join.node, join.shortcut_tensor, join.slot, ~gone))
        return masks, tuple(gates)

    def insert_gates(self, model: onnx.ModelProto, gates: tuple[Gate, ...]) -> onnx.ModelProto:
        """A copy with each gated shortcut multiplied by its 0/1 channel mask."""
        if not gates:
            return model
        result = onnx.ModelProto()
        result.CopyFrom(model)
        by_name = {gate.node: gate for gate in gates}
        names = dict(zip((id(node) for node in self._graph.nodes), self._graph.names, strict=True))
        originals = {names[id(node)]: list(node.output) for node in self._graph.nodes}
        outputs = {originals[gate.node][0]: gate for gate in by_name.values()}
        nodes = []
        for node in result.graph.node:
            gate = outputs.get(node.output[0]) if node.output else None
            if gate is not None:
                nodes.append(_gate_node(self._graph, result, gate))
                node.input[gate.slot] = nodes[-1].output[0]
            nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
        del result.graph.node[:]
        result.graph.node.extend(nodes)
        return result


def _gate_node(graph: Graph, model: onnx.ModelProto, gate: Gate) -> onnx.NodeProto:
    rank = len(graph.shape(gate.tensor) or ())
    dtype = helper.tensor_dtype_to_np_dtype(graph.types[gate.tensor][0])
    shape = (len(gate.keep), *(1,) * (rank - 2))
    mask = numpy_helper.from_array(gate.keep.astype(dtype).reshape(shape), f"{gate.node}/shortcut/mask")
    model.graph.initializer.append(mask)
    if model.ir_version < 4:
        model.graph.input.append(helper.make_tensor_value_info(mask.name, mask.data_type, mask.dims))
    output = f"{gate.node}/shortcut/masked"
    return helper.make_node("Mul", [gate.tensor, mask.name], [output], name=output)


def _axis(layer: Layer) -> int:
    return layer.output_axis


def _chain(graph: Graph, layer: Layer) -> Chain:
    """Follow a layer through operators that work on each channel alone and have no other reader."""
    affine: list[str] = []
    tensor, whole = layer.output, layer.bias is None or not layer.bias.shared
    while True:
        uses = graph.uses.get(tensor, [])
        if len(uses) != 1 or uses[0].slot != 0 or graph.is_output(tensor):
            return Chain(layer, tensor, tuple(affine), whole)
        node = graph.nodes[uses[0].node]
        row = row_of(node)
        if row is None or row.constant != "computed" or row.data is None:
            return Chain(layer, tensor, tuple(affine), whole)
        if row.kind == "affine":
            names = list(node.input[1:3])
            whole = whole and all(name in graph.initializers and len(graph.uses[name]) == 1 for name in names)
            affine += names
        tensor = node.output[0]


def _before_activation(graph: Graph, plan: Plan) -> dict[str, Chain]:
    """Every tensor that is a layer's output, or that output after normalisation."""
    found = {}
    for layer in plan.single().values():
        chain = Chain(layer, layer.output, (), layer.bias is None or not layer.bias.shared)
        found[chain.output] = chain
        while True:
            uses = graph.uses.get(chain.output, [])
            node = graph.nodes[uses[0].node] if len(uses) == 1 and uses[0].slot == 0 else None
            row = row_of(node) if node is not None else None
            if node is None or row is None or row.kind != "affine" or row.constant != "computed":
                break
            names = list(node.input[1:3])
            whole = chain.whole and all(name in graph.initializers and len(graph.uses[name]) == 1 for name in names)
            chain = replace(chain, output=node.output[0], affine=(*chain.affine, *names), whole=whole)
            found[chain.output] = chain
    return found


def _depths(graph: Graph, plan: Plan) -> dict[str, int]:
    """How many layers lie before each tensor, at most."""
    layers = {layer.node for layer in plan.layers}
    depth: dict[str, int] = {}
    for index, node in enumerate(graph.nodes):
        here = max((depth.get(name, 0) for name in node.input), default=0) + (index in layers)
        depth.update(dict.fromkeys(node.output, here))
    return depth


def _joins(graph: Graph, plan: Plan) -> list[Join]:
    """Residual Adds of two image tensors [N, C, ...] whose deeper side ends in a layer that nothing else reads."""
    ends, depth = _before_activation(graph, plan), _depths(graph, plan)
    found = []
    for index, node in enumerate(graph.nodes):
        if node.op_type != "Add" or len(set(node.input)) != 2:
            continue
        shapes = [graph.shape(name) for name in node.input]
        if any(shape is None or len(shape) < 3 for shape in shapes) or any(name in graph.initializers for name in node.input):
            continue
        deep = int(depth.get(node.input[1], 0) > depth.get(node.input[0], 0))
        branch, shortcut = ends.get(node.input[deep]), ends.get(node.input[1 - deep])
        if branch is None or not _alone(graph, branch):
            continue
        shortcut = shortcut if shortcut is not None and _alone(graph, shortcut) else None
        found.append(Join(graph.names[index], branch, node.input[deep], shortcut, node.input[1 - deep], 1 - deep))
    return found


def _alone(graph: Graph, chain: Chain) -> bool:
    return chain.whole and len(graph.uses.get(chain.output, [])) == 1


def _without(graph: Graph, masks: Masks, chain: Chain, gone: Flags) -> Masks:
    """Masks in which the units flagged in `gone` emit 0."""
    weight = chain.layer.weight
    if not gone.any() or gone.shape != (chain.layer.out_channels,):
        return masks
    old = masks.keep[weight]
    keep: Mapping[str, Any] = {**masks.keep, weight: old & ~gone.reshape(-1, *(1,) * (old.ndim - 1))}
    bias = {**masks.bias_keep, weight: masks.bias_keep[weight] & ~gone}
    vectors = {**masks.vectors}
    for name in chain.affine:
        vectors[name] = vectors.get(name, np.ones(graph.array(name).shape, bool)) & ~gone
    return Masks(keep, bias, vectors)
