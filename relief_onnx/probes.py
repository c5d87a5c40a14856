"""The probe: the user's model with the activations that statistics need as extra outputs. A valid ONNX file that `--work-dir` keeps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

from relief_onnx.graph import Graph

__all__ = ["Probe", "instrument"]


@dataclass(frozen=True)
class Probe:
    """`model` with extra outputs; `taps` maps each tensor that is measured to the output that holds it in float32."""

    model: onnx.ModelProto
    taps: dict[str, str]


def instrument(graph: Graph, tensors: Iterable[str]) -> Probe:
    """Expose `tensors` as outputs. Those that are not float32 pass a Cast on the way; model inputs need no output."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    inputs = {info.name for info in graph.inputs}
    outputs = set(graph.outputs)
    taps: dict[str, str] = {}
    for tensor in dict.fromkeys(tensors):
        element, shape = graph.types.get(tensor, (TensorProto.FLOAT, None))
        if element == TensorProto.FLOAT and (tensor in inputs or tensor in outputs):
            taps[tensor] = tensor
            continue
        name = tensor
        if element != TensorProto.FLOAT:
            name = f"{tensor}/probe"
            model.graph.node.append(helper.make_node("Cast", [tensor], [name], name=f"{name}/cast", to=TensorProto.FLOAT))
        for info in [item for item in model.graph.value_info if item.name == name]:
            model.graph.value_info.remove(info)
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        taps[tensor] = name
    return Probe(model, taps)
