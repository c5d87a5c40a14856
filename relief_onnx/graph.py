"""A read-only index over a ModelProto: who produces and who reads each tensor, constants, shapes, node names.

The ModelProto stays the single source of truth; nothing is converted to another representation and back, so whatever a file
carries (metadata, docs, functions, dimension denotations) is never at risk. The index is rebuilt after an edit.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from relief_onnx.aside import array_of
from relief_onnx.nodes import STANDARD, attributes, captured, operator_of, subgraphs
from relief_onnx.shapes import Dim, Shapes, infer

__all__ = ["FLOATS", "WEIGHT_TYPES", "Graph", "Use", "attributes", "subgraphs"]

Shape = tuple[int | str | None, ...]
FLOATS = frozenset({onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE})
# Element types of weights; short integers and floats of 8 bits are those of quantised models.
WEIGHT_TYPES = FLOATS | {
    kind
    for name, kind in onnx.TensorProto.DataType.items()
    if name in ("INT8", "UINT8", "INT16", "UINT16", "INT4", "UINT4") or name.startswith("FLOAT8")
}


@dataclass(frozen=True)
class Use:
    """One reader of a tensor: input number `slot` of node number `node`; slot -1 where a subgraph of the node captures it."""

    node: int
    slot: int


class Graph:
    """The index of a model's main graph."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes: list[onnx.NodeProto] = list(model.graph.node)
        self.initializers: dict[str, onnx.TensorProto] = {item.name: item for item in model.graph.initializer}
        self.inputs = [item for item in model.graph.input if item.name not in self.initializers]
        self.outputs = [item.name for item in model.graph.output]
        self.producer = {name: i for i, node in enumerate(self.nodes) for name in node.output if name}
        self.uses: dict[str, list[Use]] = {}
        for i, node in enumerate(self.nodes):
            for slot, name in enumerate(node.input):
                if name:
                    self.uses.setdefault(name, []).append(Use(i, slot))
            for body in subgraphs(node):
                for name in sorted(captured(body)):
                    self.uses.setdefault(name, []).append(Use(i, -1))
        self.opset = max((item.version for item in model.opset_import if item.domain in STANDARD), default=1)
        self._arrays: dict[str, NDArray[Any]] = {}

    @cached_property
    def names(self) -> list[str]:
        """A unique readable name for each node: its own, or operator and number among its like where it has none.

        So nodes with names that we add change no other node's.
        """
        counts = Counter(node.name for node in self.nodes)
        numbers: dict[str, Iterator[int]] = {}
        found = []
        for node in self.nodes:
            name = node.name
            if not name or counts[name] > 1:
                base = name or operator_of(node)
                free = (f"{base}#{number}" for number in numbers.setdefault(base, itertools.count()))
                name = next(item for item in free if item not in counts)
            found.append(name)
        return found

    def read_by(self, index: int) -> list[str]:
        """The tensors that a node reads, those that its subgraphs capture among them."""
        node = self.nodes[index]
        return [name for name in node.input if name] + [name for body in subgraphs(node) for name in sorted(captured(body))]

    def array(self, name: str) -> NDArray[Any]:
        """An initializer's value."""
        if name not in self._arrays:
            self._arrays[name] = array_of(self.initializers[name])
        return self._arrays[name]

    def constant(self, name: str) -> NDArray[Any] | None:
        """The value of an initializer or Constant node (through Identity and Cast), or None where it is computed at run time."""
        if name in self.initializers:
            return self.array(name)
        if name not in self.producer:
            return None
        node = self.nodes[self.producer[name]]
        if node.op_type == "Constant" and node.domain in STANDARD:
            values = attributes(node)
            if "value" in values:
                return array_of(values["value"])
            for key, dtype in (
                ("value_int", "i8"),
                ("value_ints", "i8"),
                ("value_float", "f4"),
                ("value_floats", "f4"),
            ):
                if key in values:
                    return np.asarray(values[key], dtype)
            return None
        if node.op_type == "Identity":
            return self.constant(node.input[0])
        if node.op_type == "Cast":
            value = self.constant(node.input[0])
            return None if value is None else value.astype(helper.tensor_dtype_to_np_dtype(attributes(node)["to"]))
        return None

    def is_output(self, name: str) -> bool:
        """Whether the tensor is an output of the model."""
        return name in self.outputs

    @cached_property
    def _shapes(self) -> Shapes:
        return infer(self.model)

    @cached_property
    def types(self) -> dict[str, tuple[int, Shape | None]]:
        """Element type and shape of every tensor whose type is known; None for an unknown rank."""
        return {name: (kind, self.shape(name)) for name, kind in self._shapes.types.items()}

    def shape(self, name: str) -> Shape | None:
        """A tensor's shape, or None where its rank is unknown; equal strings are equal sizes, as `2*batch` is."""
        dims = self.dims(name)
        return None if dims is None else tuple(size.coefficient if not size.symbols else str(size) for size in dims)

    def dims(self, name: str) -> tuple[Dim, ...] | None:
        """A tensor's sizes in symbols, or None where its rank is unknown."""
        return self._shapes.dims.get(name)

    def values(self, name: str) -> tuple[Dim, ...] | None:
        """What a small integer or bool tensor of rank 0 or 1 holds, in symbols, or None where that is unknown."""
        return self._shapes.values.get(name)

    def is_float(self, name: str) -> bool:
        """Whether the tensor's elements are floating point, as far as is known."""
        return self.types.get(name, (0, None))[0] in FLOATS
