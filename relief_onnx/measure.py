"""Size and work of a model: parameters, bytes, multiply-accumulates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from relief_onnx.graph import FLOATS, Graph
from relief_onnx.layers import Layer, Plan, find

__all__ = ["Size", "layer_macs", "measure"]


@dataclass(frozen=True)
class Size:
    """`params` and `nonzero_params` count the elements of floating point initializers; `macs` are those of one sample.

    `macs` is None where the work depends on input sizes that are not known.
    """

    params: int
    nonzero_params: int
    macs: int | None


def measure(model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Size:
    """Measure a (not packed) model; `shapes` are the inputs' shapes for one sample where the model leaves them open."""
    graph = Graph(_fixed(model, shapes or {}))
    params = nonzero = 0
    for name, item in graph.initializers.items():
        if item.data_type in FLOATS:
            array = graph.array(name)
            params += array.size
            nonzero += int(np.count_nonzero(array))
    works = [layer_macs(graph, layer) for layer in find(graph).layers]
    known = [work for work in works if work is not None]
    return Size(params, nonzero, sum(known) if len(known) == len(works) else None)


def macs_by_layer(model: onnx.ModelProto, plan: Plan, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int | None]:
    """Multiply-accumulates of each layer for one sample."""
    graph = Graph(_fixed(model, shapes))
    return {layer.name: layer_macs(graph, layer) for layer in plan.layers}


def layer_macs(graph: Graph, layer: Layer) -> int | None:
    """Outputs of the layer times the weights that each of them reads."""
    shape = graph.shape(graph.nodes[layer.node].output[0])
    if shape is None or not all(isinstance(size, int) for size in shape):
        return None
    return int(np.prod([size for size in shape if isinstance(size, int)])) * int(np.prod(layer.view.shape[1:])) if not (
        layer.geometry is not None and layer.geometry.transposed
    ) else _transposed_macs(graph, layer)  # fmt: skip


def _transposed_macs(graph: Graph, layer: Layer) -> int | None:
    """A transposed convolution spends its work per input position."""
    shape = graph.shape(layer.input)
    if shape is None or not all(isinstance(size, int) for size in shape):
        return None
    inputs = int(np.prod([size for size in shape if isinstance(size, int)]))
    return inputs * layer.out_channels // layer.groups * int(np.prod(layer.view.shape[2:]))


def _fixed(model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> onnx.ModelProto:
    """A copy whose open input sizes are fixed, and whose stored intermediate shapes are forgotten so that they are inferred anew."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    initializers = {item.name for item in fixed.graph.initializer}
    for info in fixed.graph.input:
        if info.name in initializers or not info.type.HasField("tensor_type"):
            continue
        wanted = shapes.get(info.name)
        for axis, dim in enumerate(info.type.tensor_type.shape.dim):
            if not (dim.HasField("dim_value") and dim.dim_value > 0):
                if wanted is not None and axis < len(wanted):
                    dim.dim_value = wanted[axis]
                elif axis == 0:
                    dim.dim_value = 1
    if any(shapes.values()):
        del fixed.graph.value_info[:]
        for info in fixed.graph.output:
            info.type.tensor_type.ClearField("shape")
    return fixed
