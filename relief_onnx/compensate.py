"""The constant part of what a mask removes, moved into biases, so that every unit keeps its mean.

A removed weight w that met x on average adds w * mean(x) to its neuron or filter on average: that is what the bias takes over. What
is lost is only how w * x varied. Where the inputs were constant nothing is lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from relief_onnx.edits import set_initializer, unused
from relief_onnx.graph import Graph, attributes, subgraphs
from relief_onnx.layers import LAYER_OPERATORS, Bias, Layer, Plan
from relief_onnx.masks import Masks, initializer_masks
from relief_onnx.nodes import captured
from relief_onnx.sources import Source, trace_constant

__all__ = ["Shift", "compensate"]

Doubles = NDArray[np.float64]
Flags = NDArray[np.bool_]

# Weights that are held in float64 at a time.
BLOCK = 1 << 20


@dataclass(frozen=True)
class Shift:
    """What became of the constant part of a layer's removed weights: `moved` into a bias, else `reason` says why not."""

    layer: Layer
    moved: bool
    reason: str = ""


def compensate(
    graph: Graph,
    plan: Plan,
    masks: Masks,
    means: Mapping[str, Doubles],
    removed: Mapping[str, Flags] | None = None,
    portions: Mapping[str, Doubles] | None = None,
) -> tuple[onnx.ModelProto, tuple[Shift, ...]]:
    """A copy of the model, not masked yet, whose biases hold the mean of what the masks will remove; a row per layer that loses weights.

    means: by node name, the signed mean of what each weight meets, [in channels, *kernel], of a dense layer [in channels] (see
    `streaming.InputMeans.input_means`).
    removed: by node name, flags [out] of units that are taken out as a whole: they must emit 0, so nothing is added to them; no name, no
    unit. None: units that lose all weights in a layer without a bias. A unit whose bias the masks remove is never added to.
    portions: by node name, how much of the mean is moved [out], in [0, 1]; no name, all of it.

    Weights keep their names and values; a new bias is a new initializer or, after a MatMul, a new Add. The model itself is returned
    where nothing is moved.
    """
    edit = _Edit(graph, frozenset(masks.vectors))
    flags = initializer_masks(plan, masks)
    shifts = []
    for layer in plan.layers:
        keep = _kept(layer, flags)
        if keep is None:
            continue
        gone = _gone(layer, keep, flags, None if removed is None else removed.get(layer.name, np.zeros(layer.out_channels, bool)))
        reason = _refusal(graph, layer) or ("" if layer.name in means else "what it reads was not measured")
        if not reason:
            with np.errstate(invalid="ignore"):  # means that are not finite are refused below
                amount = np.where(gone, 0.0, _amount(graph, layer, keep, means[layer.name]) * (portions or {}).get(layer.name, 1.0))
            reason = edit.move(layer, amount, _stays(layer, flags))
        shifts.append(Shift(layer, not reason, reason))
    return edit.finished(), tuple(shifts)


def _kept(layer: Layer, flags: Mapping[str, Flags]) -> Flags | None:
    """What stays of a layer's weight in its own canonical layout, or None where all of it does."""
    if layer.weight not in flags or flags[layer.weight].all():
        return None
    keep: Flags = layer.view.apply(np.broadcast_to(flags[layer.weight], layer.view.source))
    return keep


def _stays(layer: Layer, flags: Mapping[str, Flags]) -> Flags:
    """Units whose bias stays [out]; all of a layer without one."""
    if layer.bias is None or layer.bias.name not in flags:
        return np.ones(layer.out_channels, bool)
    stays: Flags = layer.bias.view.apply(np.broadcast_to(flags[layer.bias.name], layer.bias.view.source))
    return stays


def _gone(layer: Layer, keep: Flags, flags: Mapping[str, Flags], removed: Flags | None) -> Flags:
    """Units that must not be added to [out]."""
    silent = ~_stays(layer, flags)
    if removed is not None:
        silent |= removed
    elif layer.bias is None:
        silent |= ~keep.reshape(len(keep), -1).any(1)
    return silent


def _refusal(graph: Graph, layer: Layer) -> str:
    """Why a layer's bias cannot take anything over; empty where it can."""
    added = next(iter(graph.nodes[layer.node].input[3:4]), "")
    if layer.recurrent is not None and added and (layer.bias is None or layer.bias.shared):
        return "several nodes read its bias" if layer.bias is not None or added in graph.initializers else "its bias is computed"
    if layer.recurrent is not None and not added and layer.inside is None:
        return "its node has no bias"
    if layer.inside is not None and (layer.bias is None or layer.bias.shared):
        return "it runs inside a body of control flow and has no stored bias of its own"
    if layer.bias is not None:
        return "its bias is multiplied by 0" if layer.bias.factor == 0 else ""
    node, slot = graph.nodes[layer.node], LAYER_OPERATORS[layer.op].bias_slot
    if slot is not None and len(node.input) > slot and node.input[slot]:
        return f"{node.input[slot]}, which it adds, is not one stored number for each unit"
    if layer.op == "Gemm" and attributes(node).get("beta", 1.0) == 0:
        return "its beta is 0"
    if slot is None and layer.output_axis < -1:
        shape = graph.shape(layer.input)
        if shape is None or len(shape) < -layer.output_axis:
            return f"the number of axes of {layer.input} is not known" if shape is None else f"{layer.input} has one axis only"
    return ""


def _amount(graph: Graph, layer: Layer, keep: Flags, means: Doubles) -> Doubles:
    """The mean of what the removed weights add to each unit [out]."""
    weight = layer.view.apply(graph.array(layer.weight))
    shape = (layer.groups * layer.in_per_group, *layer.view.shape[2:])
    if means.shape != shape:
        raise ValueError(f"{layer.name} reads {list(shape)} means, not {list(means.shape)}")
    seen = means.reshape(layer.groups, -1)
    amount = np.zeros(len(weight))
    per_group = layer.out_channels // layer.groups
    step = max(1, BLOCK // seen.shape[1])
    for start in (first + row for first in range(0, len(weight), per_group) for row in range(0, per_group, step)):
        rows = slice(start, min(start + step, (start // per_group + 1) * per_group))
        lost = np.where(keep[rows], 0, weight[rows]).astype(np.float64)
        amount[rows] = lost.reshape(len(lost), -1) @ seen[start // per_group]
    return layer.scale * amount


class _Edit:
    """The model with new biases in the making; copied when the first one changes."""

    def __init__(self, graph: Graph, named: frozenset[str]) -> None:
        """`named`: initializers that must stay, read or not: masks will look for them."""
        self._graph, self._named = graph, named
        self._model: onnx.ModelProto | None = None
        self._after: dict[int, onnx.NodeProto] = {}  # new nodes by the one that they follow
        self._replaced: set[str] = set()

    @property
    def _copy(self) -> onnx.ModelProto:
        if self._model is None:
            self._model = onnx.ModelProto()
            self._model.CopyFrom(self._graph.model)
        return self._model

    def move(self, layer: Layer, amount: Doubles, stays: Flags) -> str:
        """Add `amount` [out] to what the layer emits. Returns why that cannot be done, or nothing.

        stays: units whose bias the masks leave.
        """
        if not np.isfinite(amount).all():
            return "what it reads is not finite on average"
        if not amount.any():
            return "what it loses is 0 on average"
        if layer.bias is None:
            beta = float(attributes(self._graph.nodes[layer.node]).get("beta", 1.0)) if layer.op == "Gemm" else 1.0
            moved = _stored(amount / beta, self._dtype(layer))
        else:
            old = layer.bias.view.apply(self._graph.array(layer.bias.name))
            # A copy of a shared bias is no longer masked with it.
            old = np.where(stays, old, np.zeros_like(old)) if layer.bias.shared else old
            dtype = self._dtype(layer) if layer.bias.shared else old.dtype
            moved = _stored(old.astype(np.float64) + amount / layer.bias.factor, dtype)
        if not np.isfinite(moved[amount != 0]).all():
            return f"its bias would be too large for {moved.dtype.name}"
        if layer.bias is not None and not layer.bias.shared:
            set_initializer(self._copy, layer.bias.name, layer.bias.view.invert(moved))
        elif layer.bias is not None:
            self._give_copy(layer, layer.bias, moved)
        elif LAYER_OPERATORS[layer.op].bias_slot is None:
            self._add_after(layer, moved)
        else:
            self._give_new(layer, moved)
        return ""

    def _dtype(self, layer: Layer) -> np.dtype[Any]:
        """Of what the layer emits, which a Cast may have made another than its weight's."""
        for name in (self._graph.nodes[layer.node].output[0], layer.input):
            element = self._graph.types.get(name, (0, None))[0]
            if element:
                return np.dtype(helper.tensor_dtype_to_np_dtype(element))
        return self._graph.array(layer.weight).dtype

    def _initializer(self, layer: Layer, value: NDArray[Any]) -> str:
        name = unused(self._copy, f"{layer.weight}/bias")
        set_initializer(self._copy, name, value)
        return name

    def _give_copy(self, layer: Layer, bias: Bias, value: NDArray[Any]) -> None:
        """Another node reads the bias too, or all units do: this one gets its own, shaped as it reads the old one where that has room."""
        node = self._graph.nodes[bias.node]
        slot = LAYER_OPERATORS[layer.op].bias_slot
        if bias.node != layer.node:
            found = (trace_constant(self._graph, name) for name in node.input)
            slot = next(place for place, held in enumerate(found) if isinstance(held, Source) and held.name == bias.name)
        assert slot is not None
        source = trace_constant(self._graph, node.input[slot])
        assert isinstance(source, Source)
        own = value.reshape(source.view.shape) if np.prod(source.view.shape) == value.size else _in_place(layer, value)
        self._copy.graph.node[bias.node].input[slot] = self._initializer(layer, own)
        self._replaced.add(source.name)

    def _give_new(self, layer: Layer, value: NDArray[Any]) -> None:
        """The operator has a place for a bias that is empty."""
        slot = LAYER_OPERATORS[layer.op].bias_slot
        assert slot is not None
        node = self._copy.graph.node[layer.node]
        inputs = [*node.input, *[""] * (slot + 1 - len(node.input))]
        inputs[slot] = self._initializer(layer, _in_place(layer, value))
        node.input[:] = inputs

    def _add_after(self, layer: Layer, value: NDArray[Any]) -> None:
        """An Add that takes over the name of what the layer made, so that readers and outputs stay as they are."""
        node, graph = self._copy.graph.node[layer.node], self._copy.graph
        name = node.output[0]
        inner = unused(self._copy, f"{name}/product")
        bias = self._initializer(layer, value.reshape((-1, *(1,) * (-layer.output_axis - 1))))
        node.output[0] = inner
        self._after[layer.node] = helper.make_node("Add", [inner, bias], [name], name=unused(self._copy, f"{layer.name}/shift"))
        for info in [item for item in (*graph.value_info, *graph.output) if item.name == name]:
            graph.value_info.add().CopyFrom(info)
            graph.value_info[-1].name = inner

    def finished(self) -> onnx.ModelProto:
        """The model with its new nodes in place and without biases that nobody reads any more; the given one where nothing changed."""
        if self._model is None:
            return self._graph.model
        graph = self._model.graph
        if self._after:
            nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node]
            del graph.node[:]
            for i, node in enumerate(nodes):
                graph.node.extend([node, self._after[i]] if i in self._after else [node])
        fixed = {item.name for item in (*graph.input, *graph.output)} | {name for node in graph.node for name in node.input}
        fixed |= {name for node in graph.node for body in subgraphs(node) for name in captured(body)} | self._named
        for item in [item for item in graph.initializer if item.name in self._replaced - fixed]:
            graph.initializer.remove(item)
        return self._model


def _in_place(layer: Layer, value: NDArray[Any]) -> NDArray[Any]:
    """A number for each unit, in the shape that the bias of a layer's own node has."""
    return value.reshape((-1, 1) if layer.output_axis == 0 else (-1,))


def _stored(value: Doubles, dtype: np.dtype[Any]) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        return value.astype(dtype)
