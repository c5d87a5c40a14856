"""Small ONNX models for tests, built node by node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper


class Net:
    """A graph in the making: every method adds something and returns a tensor's name."""

    def __init__(self, seed: int = 0, opset: int = 17, ir_version: int = 8, dtype: Any = np.float32) -> None:
        self.rng = np.random.default_rng(seed)
        self.opset, self.ir_version, self.dtype = opset, ir_version, np.dtype(dtype)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, NDArray[Any]] = {}
        self.inputs: list[tuple[str, Sequence[int | str], int]] = []
        self.outputs: list[str] = []
        self.ranks: dict[str, int] = {}
        self._count = 0

    def name(self, prefix: str) -> str:
        self._count += 1
        return f"{prefix}{self._count}"

    def input(self, *shape: int | str) -> str:
        name = self.name("x")
        self.inputs.append((name, shape, helper.np_dtype_to_tensor_dtype(self.dtype)))
        return name

    def constant(self, value: Any, prefix: str = "c") -> str:
        """An initializer with that value."""
        name = self.name(prefix)
        self.initializers[name] = np.asarray(value)
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.asarray(values, np.int64), "i")

    def weight(self, *shape: int, prefix: str = "w") -> str:
        """A random initializer; no entry is near 0."""
        fan = max(int(np.prod(shape[1:])), 1)
        value = self.rng.uniform(0.3, 1.5, shape) * self.rng.choice([-1.0, 1.0], shape) / np.sqrt(fan)
        return self.constant(value.astype(self.dtype), prefix)

    def bias(self, *shape: int) -> str:
        return self.constant((self.rng.uniform(0.1, 1.0, shape) * self.rng.choice([-1.0, 1.0], shape)).astype(self.dtype), "b")

    def op(self, operator: str, *inputs: str, outputs: int = 1, **values: Any) -> Any:
        """A node; returns its output, or a list where it has several."""
        names = [self.name(operator.lower()) for _ in range(outputs)]
        node = helper.make_node(operator, list(inputs), names, name=self.name(f"{operator}_"), **values)
        node.doc_string = f"made by {operator}"
        self.nodes.append(node)
        return names[0] if outputs == 1 else names

    def model(self, *outputs: str) -> onnx.ModelProto:
        """The finished model, with metadata and with value_info from shape inference."""
        wanted = [*outputs, *self.outputs]
        tensors = [numpy_helper.from_array(value, name) for name, value in self.initializers.items()]
        inputs = [helper.make_tensor_value_info(name, kind, shape) for name, shape, kind in self.inputs]
        if self.ir_version < 4:
            inputs += [helper.make_tensor_value_info(item.name, item.data_type, item.dims) for item in tensors]
        graph = helper.make_graph(self.nodes, "net", inputs, [onnx.ValueInfoProto(name=name) for name in wanted], tensors)
        graph.doc_string = "a graph with a doc string"
        domains = sorted({node.domain for node in self.nodes if node.domain})
        opsets = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
        model = helper.make_model(graph, opset_imports=opsets, producer_name="tests")
        model.ir_version = self.ir_version
        model.domain, model.model_version, model.doc_string = "org.example", 7, "a model with a doc string"
        helper.set_model_props(model, {"author": "somebody", "labels": "a,b"})
        model = onnx.shape_inference.infer_shapes(model)
        for info in model.graph.output:  # what inference does not find out: at least type and rank
            if not info.type.tensor_type.HasField("shape"):
                info.CopyFrom(helper.make_tensor_value_info(info.name, TensorProto.FLOAT, [None] * self.ranks.get(info.name, 2)))
        return model
