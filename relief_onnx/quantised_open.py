"""Operators that pack quantised weights in a form of their own, taken apart before `quantised` sees them: a pass of `lowering`.

Their integers become plain tensors behind nodes that make floats of them, which `quantised` knows. The way back puts the operator there
again where these nodes still stand as they did; where they do not, what stands there stays. A node that is not taken apart has its
reason in `unopened`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import onnx
from onnx import TensorProto

from relief_onnx import quantised_attention, quantised_blocks, quantised_embedding, quantised_lstm
from relief_onnx.bodies import replace_all
from relief_onnx.edits import set_initializer
from relief_onnx.graph import Graph
from relief_onnx.grids import carried
from relief_onnx.nodes import captured, subgraphs, unmark
from relief_onnx.quantised_parts import Closed, Opened
from relief_onnx.quantised_rows import MICROSOFT

if TYPE_CHECKING:
    from relief_onnx.datatypes import Kept

__all__ = ["open_packed", "unopened"]


class _Row(Protocol):
    """What a module for one operator has."""

    def refusal(self, graph: Graph, index: int) -> str:
        """Why a node is not taken apart; empty where it is."""

    def opened(self, graph: Graph, index: int) -> Opened:
        """What stands for a node."""

    def closed(self, graph: Graph, index: int, before: Graph, original: onnx.NodeProto) -> Closed | None:
        """The node of the file for the float node number `index`; None where its neighbours are others now."""


_ROWS: Mapping[str, _Row] = {
    "MatMulNBits": quantised_blocks,
    "DynamicQuantizeLSTM": quantised_lstm,
    "QAttention": quantised_attention,
    "QEmbedLayerNormalization": quantised_embedding,
}
_CLOSED = {"GatherBlockQuantized": "a table of packed integers, which is not taken apart"}


def _row(node: onnx.NodeProto) -> _Row | None:
    return _ROWS.get(node.op_type) if node.domain == MICROSOFT else None


def unopened(graph: Graph, index: int) -> str:
    """Why a node with packed integers is left alone; empty where it is none."""
    node = graph.nodes[index]
    row = _row(node)
    return row.refusal(graph, index) if row is not None else _CLOSED.get(node.op_type, "") if node.domain == MICROSOFT else ""


def open_packed(model: onnx.ModelProto) -> tuple[onnx.ModelProto, _Close] | None:
    """The model with every such node that is understood taken apart, and the way back; None where there is none."""
    if not any(_row(node) is not None for node in model.graph.node):
        return None
    graph = Graph(model)
    found: dict[int, Opened] = {}
    for index, node in enumerate(graph.nodes):
        row = _row(node)
        if row is not None and not row.refusal(graph, index):
            found[index] = row.opened(graph, index)
    if not found:
        return None
    result = onnx.ModelProto()
    result.CopyFrom(model)
    _set_nodes(result, [new for index, node in enumerate(graph.nodes) for new in (found[index].nodes if index in found else [node])])
    stored: dict[str, TensorProto] = {name: tensor for item in found.values() for name, tensor in item.tensors.items()}
    _set_tensors(result, stored, {name for index in found for name in graph.nodes[index].input}, ())
    made = {name for item in found.values() for name in item.made}
    return result, _Close(graph, {item.key: index for index, item in found.items()}, made)


@dataclass(frozen=True)
class _Close:
    """The way back. before: the file's model. nodes: by name of the float node, the node of the file that it stands for. made: tensors
    that only the other form has."""

    before: Graph = field(repr=False)
    nodes: Mapping[str, int]
    made: set[str]

    def __call__(self, model: onnx.ModelProto, kept: Kept) -> onnx.ModelProto:
        graph = Graph(model)
        new: dict[int, onnx.NodeProto] = {}
        gone: set[int] = set()
        tensors: dict[str, TensorProto] = {}
        for index, node in enumerate(graph.nodes):
            if node.name not in self.nodes:
                continue
            original = self.before.nodes[self.nodes[node.name]]
            row = _row(original)
            assert row is not None
            closed = row.closed(graph, index, self.before, original)
            if closed is not None:
                new[closed.at] = closed.node
                gone |= closed.gone
                tensors |= closed.tensors
        result = onnx.ModelProto()
        result.CopyFrom(model)
        # What was not put together again loses its notes.
        documented = {key: self.before.nodes[index].doc_string for key, index in self.nodes.items()}
        for node in result.graph.node:
            if node.name in documented:
                unmark(node, documented[node.name])
        nodes = [new.get(index, node) for index, node in enumerate(result.graph.node) if index in new or index not in gone]
        _set_nodes(result, nodes)
        self._sweep(result)
        read = _read(result)
        missing = {name: item for name, item in self.before.initializers.items() if name in read and name not in graph.initializers}
        _set_tensors(result, {**missing, **tensors}, set(graph.initializers) - set(self.before.initializers), self.before.initializers)
        self._as_floats(result)
        return result

    def _sweep(self, model: onnx.ModelProto) -> None:
        """Nodes that only the other form has and nobody reads."""
        while True:
            read = _read(model)
            idle = [node for node in model.graph.node if node.output and self.made.issuperset(node.output) and not read & set(node.output)]
            for node in idle:
                model.graph.node.remove(node)
            if not idle:
                return

    def _as_floats(self, model: onnx.ModelProto) -> None:
        """Blocks that could not go back are floats: DequantizeLinear of packed integers needs newer files."""
        graph = Graph(model)
        for node in graph.nodes:
            if node.op_type == "DequantizeLinear" and node.domain == MICROSOFT and self.made.issuperset(node.output):
                values = carried(node, *(graph.array(name) for name in node.input))
                assert values is not None
                set_initializer(model, node.output[0], values)
                model.graph.node.remove(node)
        _set_tensors(model, {}, {name for node in graph.nodes for name in node.input}, self.before.initializers)


def _read(model: onnx.ModelProto) -> set[str]:
    read = {name for node in model.graph.node for name in node.input} | {item.name for item in model.graph.output}
    return read | {name for node in model.graph.node for body in subgraphs(node) for name in captured(body)}


def _set_nodes(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    replace_all(model.graph.node, nodes)
    made = {name for node in nodes for name in node.output}
    for position in range(len(model.graph.value_info) - 1, -1, -1):
        if model.graph.value_info[position].name not in made:
            del model.graph.value_info[position]


def _set_tensors(model: onnx.ModelProto, new: Mapping[str, TensorProto], idle: set[str], order: Any) -> None:
    """Put initializers in; of those in `idle` what nobody reads goes; `order` first."""
    read = _read(model)
    held = {item.name: item for item in model.graph.initializer if item.name in read or item.name not in idle}
    held |= {name: tensor for name, tensor in new.items() if name in read}
    places = {name: number for number, name in enumerate(order)}
    items = sorted(held.values(), key=lambda item: places.get(item.name, len(places)))
    copies = [TensorProto.FromString(item.SerializeToString()) for item in items]
    del model.graph.initializer[:]
    model.graph.initializer.extend(copies)
