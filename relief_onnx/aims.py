"""Where a layer's output is judged: followed through an affine step to the sum that it goes into, and to the Relu behind it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx
from numpy.typing import NDArray

from relief_onnx.graph import Graph, attributes
from relief_onnx.layers import LAYER_OPERATORS, Layer
from relief_onnx.nodes import handed_on

__all__ = ["Aim", "aim_of"]

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Aim:
    """Where a layer's output is judged: in `tensor`, which is scale * output + shift + factor * `other`; before a Relu only where that is
    positive. other: a tensor of the pruned network, or one that is stored, that may have to be broadcast (see `rows.as_output`).
    """

    tensor: str
    scale: Doubles
    shift: Doubles
    other: str = ""
    factor: float = 1.0
    one_sided: bool = False


def aim_of(original: Graph, graph: Graph, layer: Layer) -> Aim:
    """Follow a layer's output to the sum that it goes into, and to the Relu behind it."""
    aim = _start(graph, layer)
    if layer.output not in original.producer:
        return replace(aim, tensor=graph.nodes[layer.node].output[0])
    while len(uses := original.uses.get(aim.tensor, [])) == 1 and not original.is_output(aim.tensor):
        node = original.nodes[uses[0].node]
        outside = dict(zip(handed_on(node), node.output, strict=False)).get(aim.tensor, "") if uses[0].slot < 0 else ""
        if outside:
            aim = replace(aim, tensor=outside)  # from a branch of an If to the graph around it
            continue
        if uses[0].slot < 0:
            break
        step = _STEPS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        found = step(original, graph, layer, aim, node, uses[0].slot) if step is not None else None
        if found is None:
            break
        aim = found
        if aim.one_sided:
            break
    return aim


def _start(graph: Graph, layer: Layer) -> Aim:
    """A layer's output, with what its node adds that is no bias of the layer: numbers that are not stored as one, or another branch."""
    aim = Aim(layer.output, np.ones(layer.out_channels), np.zeros(layer.out_channels))
    node, slot = graph.nodes[layer.node], LAYER_OPERATORS[layer.op].bias_slot
    if layer.bias is not None or slot is None or len(node.input) <= slot or not node.input[slot]:
        return aim
    factor = float(attributes(node).get("beta", 1.0)) if layer.op == "Gemm" else 1.0
    value = graph.constant(node.input[slot])
    per_unit = value is not None and layer.output_axis != 0 and value.shape[-1:] == (layer.out_channels,) == (value.size,)
    if value is not None and (value.size == 1 or per_unit):
        return replace(aim, shift=aim.shift + factor * value.reshape(-1).astype(np.float64))
    return replace(aim, other=node.input[slot], factor=factor)


def _affine(original: Graph, graph: Graph, layer: Layer, aim: Aim, node: onnx.NodeProto, slot: int) -> Aim | None:
    """BatchNormalization as it runs in inference: another scale and shift."""
    values = [original.constant(name) for name in node.input[1:5]]
    if slot or aim.other or len(values) < 4 or layer.output_axis != 1 or attributes(node).get("training_mode", 0):
        return None
    if any(value is None or value.size != layer.out_channels for value in values):
        return None
    gamma, beta, mean, variance = (np.asarray(value, np.float64).reshape(-1) for value in values)
    scale = gamma / np.sqrt(variance + float(attributes(node).get("epsilon", 1e-5)))
    if not scale.all():
        return None
    return Aim(node.output[0], aim.scale * scale, aim.shift * scale + beta - mean * scale)


def _sum(original: Graph, graph: Graph, layer: Layer, aim: Aim, node: onnx.NodeProto, slot: int) -> Aim | None:
    """A sum with another branch, where the pruned network has it before this layer runs."""
    other = node.input[1 - slot]
    is_input = any(info.name == other for info in graph.inputs)
    ready = is_input or graph.producer.get(other, layer.node) < layer.node
    if aim.other or not ready or original.constant(other) is not None or original.shape(other) != original.shape(aim.tensor):
        return None
    if original.shape(other) is None or len(set(node.input)) != 2:
        return None
    return Aim(node.output[0], aim.scale, aim.shift, other)


def _positive(original: Graph, graph: Graph, layer: Layer, aim: Aim, node: onnx.NodeProto, slot: int) -> Aim | None:
    """Only what is above 0 counts."""
    if node.op_type == "Clip":
        least = attributes(node).get("min") if original.opset < 11 else original.constant(node.input[1]) if len(node.input) > 1 else None
        if slot or least is None or float(np.asarray(least).reshape(-1)[0]) != 0:
            return None
    return replace(aim, one_sided=True)


# How a layer's output is followed: operator -> step.
_STEPS = {"BatchNormalization": _affine, "Add": _sum, "Relu": _positive, "Clip": _positive}
