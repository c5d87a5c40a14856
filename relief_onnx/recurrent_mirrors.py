"""Recurrent nodes within bodies: the sequences of all runs as one batch, for their mirror (see `loops`).

A batch without sequences would stop onnxruntime, so a sequence of zeros stands at the end, whose length is 0: none of its steps count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from relief_onnx.bodies import Names
from relief_onnx.borders import Border
from relief_onnx.graph import Graph, attributes
from relief_onnx.layers import Layer
from relief_onnx.recurrent_layers import is_bias
from relief_onnx.sources import Source, trace_constant

__all__ = ["Batch", "can_mirror"]

X, BIAS, LENGTHS, STATES = 0, 3, 4, (5, 6)


def can_mirror(graph: Graph, layer: Layer) -> bool:
    """Whether all that a recurrent node stores is known, and that its input has three axes."""
    node = graph.nodes[layer.node]
    for slot, name in enumerate(node.input):
        if not name or slot in (X, LENGTHS, *STATES) or name in graph.initializers:
            continue
        source = trace_constant(graph, name)
        moved = isinstance(source, Source) and all(
            len([item for item in graph.nodes[graph.producer[step]].input if item]) == 1 for step in source.path
        )
        joined = slot == BIAS and name in graph.producer and is_bias(graph, graph.nodes[graph.producer[name]])
        if not moved and not (joined and all(half in graph.initializers for half in graph.nodes[graph.producer[name]].input)):
            return False
    return graph.is_float(node.input[X]) and len(graph.shape(node.input[X]) or ()) == 3


class Batch:
    """What a recurrent node of a body reads, over all runs. `nodes`: of the graph around, before the mirror. steps: None where open."""

    def __init__(self, border: Border, body: str, node: onnx.NodeProto, graph: Graph, names: Names) -> None:
        self._border, self._body, self._node, self._names = border, body, node, names
        self._first = bool(attributes(node).get("layout", 0))  # whether the batch is the first axis
        self._element, shape = graph.types[node.input[X]]
        size = (shape or (None,) * 3)[1 if self._first else 0]
        self.steps = size if isinstance(size, int) else None
        self.nodes: list[onnx.NodeProto] = []

    def handed_out(self, layer: Layer) -> dict[int, str]:
        """By input of the node, the tensor of the graph around that the mirror reads."""
        kind = layer.recurrent
        assert kind is not None
        rows = self._out(self._node.input[X], [self.steps, layer.in_per_group], [self.steps or 1, layer.in_per_group])
        sizes = self._op("Shape", [rows], "sizes")
        count, steps, rest = (self._part(sizes, *ends) for ends in ((0, 1), (1, 2), (1, 3)))
        one = self._stored(np.array([1], np.int64))
        none = self._op("Expand", [self._zero(), self._op("Concat", [one, rest], "shape", axis=0)], "none")
        found = {X: self._placed(self._op("Concat", [rows, none], "batch", axis=0))}
        length = self._node.input[LENGTHS] if len(self._node.input) > LENGTHS else ""
        if length:
            lengths = self._border.hand_out(self._body, length, TensorProto.INT32, [], [])
        else:
            lengths = self._op("Expand", [self._op("Cast", [steps], "whole", to=TensorProto.INT32), count], "lengths")
        found[LENGTHS] = self._op("Concat", [lengths, self._stored(np.zeros(1, np.int32))], "counts", axis=0)
        for slot in STATES:
            if len(self._node.input) > slot and self._node.input[slot]:
                held = [kind.directions, kind.hidden]
                start = self._out(self._node.input[slot], held, held)
                blank = self._op("Expand", [self._zero(), self._stored(np.array([1, *held], np.int64))], "blank")
                found[slot] = self._placed(self._op("Concat", [start, blank], "starts", axis=0))
        return found

    def _out(self, tensor: str, sizes: Sequence[int | None], least: Sequence[int]) -> str:
        """With the batch in front."""
        if not self._first:
            tensor = self._border.inside(self._body, "Transpose", [tensor], f"{tensor}/turned", perm=[1, 0, 2])
        return self._border.hand_out(self._body, tensor, self._element, sizes, least)

    def _placed(self, name: str) -> str:
        return name if self._first else self._op("Transpose", [name], "placed", perm=[1, 0, 2])

    def _part(self, sizes: str, start: int, end: int) -> str:
        return self._op("Slice", [sizes, *(self._stored(np.array([place], np.int64)) for place in (start, end))], "part")

    def _zero(self) -> str:
        return self._stored(np.zeros((), helper.tensor_dtype_to_np_dtype(self._element)))

    def _stored(self, value: Any) -> str:
        name = self._names.free("mirror/number")
        self._border.stored.append(numpy_helper.from_array(np.asarray(value), name))
        self._border.added.initializers.add(name)
        return name

    def _op(self, operator: str, inputs: Sequence[str], wanted: str, **values: Any) -> str:
        name = self._names.free(f"{next(item for item in self._node.output if item)}/{wanted}")
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name=name, **values))
        return name
