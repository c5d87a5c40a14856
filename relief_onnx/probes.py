"""The probe: the user's model with what statistics need as extra outputs. A valid ONNX file that `--work-dir` keeps.

Most statistics take the activations themselves. A small convolution is measured inside the graph instead: one grouped convolution of
|x| with every |K_ij| apart, and the sum of squares of each result, which is the paper's formula word for word.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from relief_onnx.graph import Graph
from relief_onnx.layers import Layer
from relief_onnx.recurrent_layers import is_recurrent
from relief_onnx.recurrent_reads import Derived, derived, states_name

__all__ = ["Probe", "instrument", "norms_name"]


@dataclass(frozen=True)
class Probe:
    """`model` with extra outputs; `taps` maps each tensor that is measured to the output that holds it in float32.

    `derived`: what is computed from other tensors once they are there (what the weights of recurrent nodes read).
    """

    model: onnx.ModelProto
    taps: dict[str, str]
    derived: Mapping[str, Derived] = field(default_factory=dict)

    def fetched(self, tensors: Iterable[str]) -> set[str]:
        """The outputs that have to be there for some of the measured tensors."""
        wanted = (self.derived[name].sources if name in self.derived else (name,) for name in tensors)
        return {self.taps[name] for names in wanted for name in names}

    def value(self, tensor: str, outputs: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """A measured tensor, from the outputs."""
        if tensor not in self.derived:
            return outputs[self.taps[tensor]]
        item = self.derived[tensor]
        return item.make({name: outputs[self.taps[name]] for name in item.sources})


def norms_name(layer: Layer) -> str:
    """The tensor that holds a layer's squared kernel norms [n, in channels * filters per group] where they are measured in the graph."""
    return f"{layer.name}/probe/norms"


def _kernel_norms(graph: Graph, model: onnx.ModelProto, layer: Layer, weight: NDArray[Any]) -> str:
    geometry, name = layer.geometry, f"{layer.name}/probe"
    if geometry is None:
        raise ValueError(f"{layer.name} is not a convolution")
    per_group = layer.out_channels // layer.groups
    apart = np.abs(weight).reshape(layer.groups, per_group, layer.in_per_group, *geometry.kernel).swapaxes(1, 2)
    kernels = np.ascontiguousarray(apart.reshape(-1, 1, *geometry.kernel).astype(np.float32))
    axes = list(range(2, 2 + len(geometry.kernel)))
    padding: dict[str, Any] = {"pads": geometry.pads} if geometry.auto_pad == "NOTSET" else {"auto_pad": geometry.auto_pad}
    squares: dict[str, Any] = {"axes": axes} if graph.opset < 18 else {}
    add = [numpy_helper.from_array(kernels, f"{name}/kernels")]
    if not squares:
        add.append(numpy_helper.from_array(np.array(axes, np.int64), f"{name}/axes"))
    for tensor in add:
        model.graph.initializer.append(tensor)
        if model.ir_version < 4:
            model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    model.graph.node.extend(
        [
            helper.make_node("Abs", [layer.input], [f"{name}/magnitude"], name=f"{name}/magnitude"),
            helper.make_node(
                "Conv", [f"{name}/magnitude", f"{name}/kernels"], [f"{name}/responses"], name=f"{name}/responses",
                group=layer.groups * layer.in_per_group, strides=geometry.strides, dilations=geometry.dilations, **padding,
            ),
            helper.make_node(
                "ReduceSumSquare", [f"{name}/responses", *([] if squares else [f"{name}/axes"])], [norms_name(layer)],
                name=norms_name(layer), keepdims=0, **squares,
            ),
        ]
    )  # fmt: skip
    model.graph.output.append(helper.make_tensor_value_info(norms_name(layer), TensorProto.FLOAT, [None, len(kernels)]))
    return norms_name(layer)


def instrument(graph: Graph, tensors: Iterable[str], inside: Mapping[str, tuple[Layer, NDArray[Any]]] | None = None) -> Probe:
    """Expose `tensors` as outputs, and measure the layers in `inside` (by `norms_name`, with their W in canonical layout) in the graph.

    Tensors that are not float32 pass a Cast on the way; model inputs need no output.
    """
    inside = inside or {}
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    inputs = {info.name for info in graph.inputs}
    outputs = set(graph.outputs)
    taps: dict[str, str] = {}
    tensors = list(dict.fromkeys(tensors))
    known = derived(graph)
    made = {name: known[name] for name in tensors if name in known}
    unnamed: dict[str, int] = {}
    if made:
        for node in model.graph.node:
            if is_recurrent(node) and not node.output[0]:
                node.output[0] = states_name(node)
                unnamed[node.output[0]] = graph.types.get(node.input[0], (TensorProto.FLOAT, None))[0]
        tensors = [name for name in tensors if name not in made] + [name for item in made.values() for name in item.sources]
    for tensor in dict.fromkeys(tensors):
        if tensor in inside:
            taps[tensor] = _kernel_norms(graph, model, *inside[tensor])
            continue
        element, shape = graph.types.get(tensor, (unnamed.get(tensor, TensorProto.FLOAT), None))
        if element == TensorProto.FLOAT and (tensor in inputs or tensor in outputs):
            taps[tensor] = tensor
            continue
        name = tensor
        if element != TensorProto.FLOAT:
            name = f"{tensor}/probe"
            model.graph.node.append(helper.make_node("Cast", [tensor], [name], name=f"{name}/cast", to=TensorProto.FLOAT))
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        taps[tensor] = name
    exposed, described = set(taps.values()), model.graph.value_info
    for place in reversed(range(len(described))):
        if described[place].name in exposed:
            del described[place]
    return Probe(model, taps, made)
