"""A read-only index over a ModelProto: who produces and who reads each tensor, constants, shapes, node names.

The ModelProto stays the single source of truth; nothing is converted to another representation and back, so whatever a file
carries (metadata, docs, functions, dimension denotations) is never at risk. The index is rebuilt after an edit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

__all__ = ["Graph", "Use", "attributes", "subgraphs"]

Shape = tuple[int | str | None, ...]
FLOATS = frozenset({onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE})

# Initializers with more elements hold weights, never the target of a Reshape or the like.
LARGEST_SHAPE_CONSTANT = 1024


@dataclass(frozen=True)
class Use:
    """One reader of a tensor: input number `slot` of node number `node`; slot -1 where a subgraph of the node captures it."""

    node: int
    slot: int


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes as Python values; strings as str."""
    values = {item.name: helper.get_attribute_value(item) for item in node.attribute if not item.ref_attr_name}
    return {key: value.decode() if isinstance(value, bytes) else value for key, value in values.items()}


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The bodies of If, Loop, Scan and the like."""
    for item in node.attribute:
        if item.type == onnx.AttributeProto.GRAPH:
            yield item.g
        elif item.type == onnx.AttributeProto.GRAPHS:
            yield from item.graphs


def _captured(body: onnx.GraphProto) -> set[str]:
    """Names that a body reads from the graphs around it."""
    own = {item.name for item in body.input} | {item.name for item in body.initializer}
    own |= {name for node in body.node for name in node.output}
    read = {name for node in body.node for name in node.input if name} | {item.name for item in body.output}
    for node in body.node:
        for inner in subgraphs(node):
            read |= _captured(inner)
    return read - own


class Graph:
    """The index of a model's main graph."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.proto = model.graph
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
                for name in sorted(_captured(body)):
                    self.uses.setdefault(name, []).append(Use(i, -1))
        self.opset = max((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), default=1)
        self._arrays: dict[str, NDArray[Any]] = {}

    @cached_property
    def names(self) -> list[str]:
        """A unique readable name for each node: its own, or operator and number where it has none."""
        counts = Counter(node.name for node in self.nodes)
        return [
            node.name if node.name and counts[node.name] == 1 else f"{node.name or node.op_type}#{i}" for i, node in enumerate(self.nodes)
        ]

    def array(self, name: str) -> NDArray[Any]:
        """An initializer's value."""
        if name not in self._arrays:
            self._arrays[name] = numpy_helper.to_array(self.initializers[name])
        return self._arrays[name]

    def constant(self, name: str) -> NDArray[Any] | None:
        """The value of an initializer or Constant node (through Identity and Cast), or None where it is computed at run time."""
        if name in self.initializers:
            return self.array(name)
        if name not in self.producer:
            return None
        node = self.nodes[self.producer[name]]
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            values = attributes(node)
            if "value" in values:
                return numpy_helper.to_array(values["value"])
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
    def types(self) -> dict[str, tuple[int, Shape | None]]:
        """Element type and shape of every tensor that ONNX shape inference knows; None for an unknown rank."""
        try:
            inferred = onnx.shape_inference.infer_shapes(self._without_values(), data_prop=True).graph
        except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
            # Over 2 GB, or an operator with a broken annotation: what the file itself says remains.
            inferred = self.proto
        found: dict[str, tuple[int, Shape | None]] = {}
        for info in (*inferred.input, *inferred.value_info, *inferred.output):
            tensor = info.type.tensor_type
            if info.type.HasField("tensor_type"):
                found[info.name] = (tensor.elem_type, _shape(tensor) if tensor.HasField("shape") else None)
        for name, item in self.initializers.items():
            found[name] = (item.data_type, tuple(item.dims))
        return found

    def _without_values(self) -> onnx.ModelProto:
        """The model with large initializers as inputs of the same shape: inference needs no weights, and would copy them twice."""
        light = onnx.ModelProto(ir_version=max(self.model.ir_version, 4))
        light.opset_import.extend(self.model.opset_import)
        light.functions.extend(self.model.functions)
        for field in ("node", "input", "output", "value_info", "sparse_initializer"):
            getattr(light.graph, field).extend(getattr(self.proto, field))
        listed = {info.name for info in self.proto.input}
        for name, item in self.initializers.items():
            if int(np.prod(item.dims)) <= LARGEST_SHAPE_CONSTANT:
                light.graph.initializer.append(item)
            elif name not in listed:
                light.graph.input.append(helper.make_tensor_value_info(name, item.data_type, item.dims))
        return light

    def shape(self, name: str) -> Shape | None:
        """A tensor's shape, or None where its rank is unknown."""
        return self.types.get(name, (0, None))[1]

    def is_float(self, name: str) -> bool:
        """Whether the tensor's elements are floating point, as far as is known."""
        return self.types.get(name, (0, None))[0] in FLOATS


def _shape(tensor: onnx.TypeProto.Tensor) -> Shape:
    return tuple(item.dim_value if item.HasField("dim_value") else (item.dim_param or None) for item in tensor.shape.dim)
