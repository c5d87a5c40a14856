"""Models that come quantised, as models of floats: a pass of `lowering`.

Stored integers become float initializers of the same names; nodes that compute with integers become a float operator between
DequantizeLinear and QuantizeLinear. Activations are rounded as in the file, so scores see what the model sees. What is not understood
stays as it is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import onnx
from onnx import helper

from relief_onnx.aside import tensor_of
from relief_onnx.graph import Graph
from relief_onnx.grids import RANGES, Grid
from relief_onnx.layers import find
from relief_onnx.lifting import rename_in
from relief_onnx.nodes import blocks_of, captured, is_level, mark_blocks, mark_level, rounds_states, subgraphs
from relief_onnx.quantised_rows import Chain, Claim, Place, chains, is_quantising, places
from relief_onnx.requantise import Axes, Requantise, Standing

__all__ = ["lower_quantised"]

# DequantizeLinear is there from this opset on.
_OPSET = 10


def lower_quantised(model: onnx.ModelProto) -> tuple[onnx.ModelProto, Requantise] | None:
    """A model of floats and the way back; None where nothing in it is quantised, or in no way that is known."""
    integers = frozenset(item.name for item in model.graph.initializer if item.data_type in RANGES)
    if not any(is_quantising(node, integers) for node in model.graph.node):
        return None
    source = _with_initializers(model)
    graph = Graph(source)
    found: list[Chain | Place] = [*chains(graph), *(places(graph) if graph.opset >= _OPSET else ())]
    accepted = _agreed(graph, found)
    return _Lowering(graph, accepted).run() if accepted else None


def _claims(item: Chain | Place) -> tuple[Claim, ...]:
    return (item.claim,) if isinstance(item, Chain) else item.claims


def _with_initializers(model: onnx.ModelProto) -> onnx.ModelProto:
    """Integers in Constant nodes that a node multiplies with as initializers of the same name."""
    held: dict[str, onnx.TensorProto] = {}
    outputs = {item.name for item in model.graph.output}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.output[0] not in outputs:
            value = next((item.t for item in node.attribute if item.name == "value"), onnx.TensorProto())
            if value.data_type in RANGES and value.dims:
                held[node.output[0]] = value
    if not held or model.ir_version < 4:
        return model
    read = {node.input[slot] for node in model.graph.node if is_quantising(node, frozenset(held)) for slot in range(len(node.input))}
    moved = read & set(held)
    if not moved:
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    result.graph.node.extend(node for node in model.graph.node if not (node.op_type == "Constant" and node.output[0] in moved))
    for name in sorted(moved):
        result.graph.initializer.add().CopyFrom(held[name])
        result.graph.initializer[-1].name = name
    return result


def _agreed(graph: Graph, found: list[Chain | Place]) -> list[Chain | Place]:
    """Those whose stored tensors are read by such places only."""
    while True:
        claimed: dict[str, set[tuple[int, int]]] = defaultdict(set)
        for item in found:
            for claim in _claims(item):
                claimed[claim.grid.name].add((claim.node, claim.slot))
        refused = {
            name
            for name, uses in claimed.items()
            if graph.is_output(name) or any((use.node, use.slot) not in uses for use in graph.uses.get(name, ()))
        }
        left = [item for item in found if not any(claim.grid.name in refused for claim in _claims(item))]
        if len(left) == len(found):
            return left
        found = left


class _Lowering:
    """One rewriting: new nodes by the number of the node whose place they take."""

    def __init__(self, graph: Graph, found: list[Chain | Place]) -> None:
        self.graph, self.found = graph, found
        self.taken = {*graph.initializers, *graph.producer, *graph.uses, *graph.outputs, *graph.names}
        self.grids: dict[str, Grid] = {}
        self.copies: dict[str, str] = {}  # by the name of a copy, whose it is
        self.new: dict[int, list[onnx.NodeProto]] = {}
        self.gone: set[int] = set()
        self.standing: dict[str, Standing] = {}
        self.chains: dict[str, list[tuple[str, tuple[onnx.NodeProto, ...]]]] = {}
        self.readers: dict[tuple[str, int], str] = {}
        self.made: set[str] = set()
        self._running: dict[tuple[str, ...], str] = {}

    def run(self) -> tuple[onnx.ModelProto, Requantise]:
        graph, renamed = self.graph, dict[str, str]()
        for item in sorted(self.found, key=lambda item: item.nodes[-1] if isinstance(item, Chain) else item.last):
            if isinstance(item, Chain):
                name = self._float(item.claim)
                renamed[item.output] = name
                nodes = tuple(onnx.NodeProto.FromString(graph.nodes[index].SerializeToString()) for index in item.nodes)
                self.chains.setdefault(name, []).append((item.output, nodes))
            else:
                self._stand(item)
            self.gone.update(item.nodes)
        result = onnx.ModelProto()
        result.CopyFrom(graph.model)
        del result.graph.node[:]
        for index, node in enumerate(graph.nodes):
            for new in self.new.get(index, [node] if index not in self.gone else []):
                copy = result.graph.node.add()
                copy.CopyFrom(new)
                for slot, name in enumerate(copy.input):
                    if name in renamed:
                        copy.input[slot] = renamed[name]
                        if copy.output:
                            self.readers[copy.output[0], slot] = name
                for body in subgraphs(copy):
                    rename_in(body, renamed)
        self._store(result)
        self._mark(result)
        restore = Requantise(
            graph.model, self.grids, self._axes(result), self.standing, self.chains, self.readers, self.made, self.copies
        )  # fmt: skip
        return result, restore

    def _name(self, wanted: str) -> str:
        name = next(free for free in (wanted, *(f"{wanted}~{number}" for number in range(2, 1 << 30))) if free not in self.taken) \
            if wanted in self.taken else wanted  # fmt: skip
        self.taken.add(name)
        return name

    def _float(self, claim: Claim) -> str:
        """The float initializer of a stored tensor; one more where another reader takes the same integers for other numbers."""
        wanted = claim.grid.name
        for number in count(1):
            name = wanted if number == 1 else f"{wanted}~{number}"
            if name not in self.grids and (number == 1 or name not in self.taken):
                self.grids[name] = replace(claim.grid, name=name)
                if number > 1:
                    self.copies[name] = wanted
                    self.taken.add(name)
                return name
            if name in self.grids and self.grids[name].alike(claim.grid):
                return name
        raise AssertionError("names do not end")

    def _node(self, operator: str, inputs: Iterable[str], outputs: Iterable[str], name: str, **values: Any) -> onnx.NodeProto:
        return helper.make_node(operator, list(inputs), list(outputs), name=name, **values)

    def _numbers(self, triple: tuple[str, str, str], nodes: list[onnx.NodeProto]) -> str:
        """Integers that run, as floats; once for all readers."""
        triple = triple if triple[2] else triple[:2]  # type: ignore[assignment]
        if triple not in self._running:
            name = self._name(f"{triple[0]}/number")
            nodes.append(self._node("DequantizeLinear", triple, [name], name))
            self._running[triple] = name
            self.made.add(name)
        return self._running[triple]

    def _stand(self, place: Place) -> None:
        graph = self.graph
        main = next(index for index in place.nodes if graph.nodes[index].op_type not in ("Mul", "Cast"))
        key, output = graph.names[main], graph.nodes[place.last if len(place.nodes) == 1 else place.nodes[-1]].output[0]
        nodes: list[onnx.NodeProto] = []
        inputs: list[str] = []
        for item in place.inputs:
            if isinstance(item, Claim):
                inputs.append(self._float(item))
            elif isinstance(item, tuple):
                inputs.append(self._numbers(item, nodes))
            elif place.dynamic and not inputs:
                inputs.append(self._measured(item, nodes))
            else:
                inputs.append(item)
        bias = inputs.pop() if place.added is not None and len(inputs) > 2 else ""
        target = output if place.result is None and not bias else self._name(f"{output}/float")
        nodes.append(self._node(place.operator, inputs, [target], key, **place.attributes))
        if bias:
            nodes.append(self._node("Add", [target, bias], [output], self._name(f"{key}/bias")))
        if place.result is not None:
            ends = [name for name in place.result if name]
            nodes.append(self._node("QuantizeLinear", [target, *ends], [output], self._name(f"{key}/rounded")))
        self.new[place.last] = nodes
        originals = tuple(onnx.NodeProto.FromString(graph.nodes[index].SerializeToString()) for index in place.nodes)
        self.standing[key] = Standing(place, originals, place.nodes.index(main))

    def _measured(self, tensor: str, nodes: list[onnx.NodeProto]) -> str:
        """Floats that run, rounded by the range that they have."""
        if (tensor,) not in self._running:
            parts = [self._name(f"{tensor}/{part}") for part in ("integers", "scale", "zero")]
            nodes.append(self._node("DynamicQuantizeLinear", [tensor], parts, parts[0]))
            self.made.update(parts)
            self._running[tensor,] = self._numbers((parts[0], parts[1], parts[2]), nodes)
        return self._running[tensor,]

    def _store(self, model: onnx.ModelProto) -> None:
        """Floats in the places of integers; types that are written down follow."""
        stored = {item.name: item for item in model.graph.initializer}
        for name, grid in self.grids.items():
            tensor = tensor_of(np.ascontiguousarray(grid.floats()), name, stored.get(name), self.graph.initializers.get(name))
            if name in stored:
                tensor.doc_string = stored[name].doc_string
                stored[name].CopyFrom(tensor)
            else:
                model.graph.initializer.append(tensor)
            for info in model.graph.input:
                if info.name == name:
                    info.type.tensor_type.elem_type = tensor.data_type
        made = {name for node in model.graph.node for name in node.output}
        read = {name for node in model.graph.node for name in node.input}
        read |= {name for node in model.graph.node for body in subgraphs(node) for name in captured(body)}
        for field, keep in ((model.graph.value_info, made), (model.graph.initializer, read | {item.name for item in model.graph.output})):
            for position in range(len(field) - 1, -1, -1):
                if field[position].name not in keep and (field is model.graph.value_info or field[position].name in self.graph.uses):
                    del field[position]

    def _mark(self, model: onnx.ModelProto) -> None:
        """Bidirectional nodes with a scale for each row: it holds for both directions. Weights in blocks: these go as a whole."""
        plan = find(Graph(model))
        for layer in (layer for layer in (*plan.layers, *plan.tables) if layer.weight in self.grids):
            node, grid = model.graph.node[layer.node], self.grids[layer.weight]
            if layer.recurrent is None:
                if grid.block is not None and blocks_of(node) is None:
                    mark_blocks(node, *grid.block)
            elif layer.recurrent.directions > 1 and grid.scale.size > 1 and not is_level(node) and not rounds_states(node):
                mark_level(node)

    def _axes(self, model: onnx.ModelProto) -> dict[str, Axes]:
        """Which axes of each stored tensor are rows, and which columns, of which weight."""
        graph = Graph(model)
        found: dict[str, Axes] = {}
        for layer in find(graph).layers:
            if layer.weight in self.grids:
                sides = {layer.view.source_axis(side): (layer.weight, side) for side in (0, 1)}
                found.setdefault(layer.weight, {axis: side for axis, side in sides.items() if axis is not None})
            if layer.bias is not None and layer.bias.name in self.grids:
                axis = layer.bias.view.source_axis(0)
                if axis is not None:
                    found.setdefault(layer.bias.name, {axis: (layer.weight, 0)})
        return found
