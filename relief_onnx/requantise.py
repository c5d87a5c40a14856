"""The way back from the float form of a quantised model: which numbers its integers can hold, and which scales they have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from relief_onnx.datatypes import Kept
from relief_onnx.graph import Graph
from relief_onnx.grids import Grid
from relief_onnx.layers import Layer, find
from relief_onnx.quantised_restore import PER_CHANNEL, write_back
from relief_onnx.quantised_rows import Place
from relief_onnx.surgery import apply_weights

__all__ = ["Axes", "Requantise", "Standing"]

Axes = Mapping[int, tuple[str, int]]  # of a stored tensor: which axes are the rows (0) or columns (1) of which weight
Chains = Mapping[str, Sequence[tuple[str, tuple[onnx.NodeProto, ...]]]]


@dataclass(frozen=True)
class Standing:
    """What a float node stands for: the nodes of the file, `main` among them the one that computes."""

    place: Place
    nodes: tuple[onnx.NodeProto, ...]
    main: int


@dataclass(frozen=True)
class Requantise:
    """The way back; `notes` say what changed besides values.

    source: the model before. grids: of the float initializers. standing: by name of the float node. chains: by initializer, what made
    floats of it: (output, nodes). readers: which of these outputs (first output of a node, slot) read. made: tensors that
    only the float form has. copies: whose integers initializers hold that have a name of their own only in the float form.
    """

    source: onnx.ModelProto = field(repr=False)
    grids: Mapping[str, Grid]
    axes: Mapping[str, Axes]
    standing: Mapping[str, Standing]
    chains: Chains
    readers: Mapping[tuple[str, int], str]
    made: set[str]
    copies: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def settled(self, model: onnx.ModelProto, flags: Mapping[str, NDArray[np.bool_]]) -> tuple[onnx.ModelProto, Requantise]:
        """The float model with values that the integers can hold, and the way back with its scales.

        flags: by initializer, what stays: what goes has no say in a scale.
        """
        graph = Graph(model)
        grids, notes = dict(self.grids), []
        layers = {layer.weight: layer for layer in find(graph).layers if layer.weight in grids}
        new: dict[str, Any] = {}
        for name, grid in self.grids.items():
            if name not in graph.initializers or graph.array(name).shape != grid.shape:
                continue
            values = graph.array(name)
            if grid.type != TensorProto.INT32:
                grids[name] = grid.fitted(np.where(flags[name], values, 0) if name in flags else values)
                notes += [f"{name}: scales are larger now: its values no longer fit the old ones"] if grids[name] is not grid else []
        for name, layer in layers.items():
            self._follow(layer, grids, name)
        for bias, grid in {**self.new_biases(graph, grids), **grids}.items():
            if bias in graph.initializers and graph.array(bias).shape == grid.shape:
                near = grid.nearest(graph.array(bias))
                if not np.array_equal(near, graph.array(bias)):
                    new[bias] = near
        return (apply_weights(model, new) if new else model), replace(self, grids=grids, notes=tuple(notes))

    def _follow(self, layer: Layer, grids: dict[str, Grid], name: str) -> None:
        """A bias of int32 counts in units of the weight's scales; where these cannot follow, they stay."""
        before, after = self.grids[name], grids[name]
        if after is before or layer.bias is None or (bias := grids.get(layer.bias.name)) is None or bias.type != TensorProto.INT32:
            return
        ratio = (after.scale.astype(np.float64) / before.scale).reshape(-1)
        if ratio.size != bias.scale.size:
            grids[name] = before
            return
        grids[layer.bias.name] = replace(bias, scale=(bias.scale * ratio).astype(bias.scale.dtype))

    def new_biases(self, graph: Graph, grids: Mapping[str, Grid]) -> dict[str, Grid]:
        """The grids of biases that layers did not have in the file: int32 in units of both scales, as their kernels want them."""
        found = {}
        known = {item.name for item in self.source.graph.initializer}
        for layer in find(graph).layers:
            bias, weight = layer.bias, grids.get(layer.weight)
            if bias is None or weight is None or bias.node != layer.node or bias.name in grids or bias.name in known or bias.factor != 1:
                continue
            maker = graph.nodes[graph.producer[layer.input]] if layer.input in graph.producer else None
            factor = graph.constant(maker.input[1]) if maker is not None and maker.op_type == "DequantizeLinear" else None
            array = graph.array(bias.name)
            scale = weight.scale.reshape(-1)
            if (
                factor is None
                or factor.size != 1
                or scale.size not in (1, array.size)
                or array.ndim != 1
                or layer.view.source_axis(0) is None
            ):
                continue
            if scale.size > 1 and (graph.opset < PER_CHANNEL or weight.scale.shape[layer.view.source_axis(0) or 0] != scale.size):
                continue
            unit = (scale * factor.reshape(()) * np.float32(layer.scale)).astype(scale.dtype)
            found[bias.name] = Grid(bias.name, TensorProto.INT32, np.zeros(array.shape, np.int32), unit, np.zeros(1, np.int64), fresh=True)
        return found

    def __call__(self, model: onnx.ModelProto, kept: Kept) -> onnx.ModelProto:
        return write_back(self, model, kept)

    def cut(self, name: str, values: NDArray[Any], kept: Kept) -> Grid | None:
        """The grid of what surgery left of a stored tensor."""
        places = {axis: kept[weight][side] for axis, (weight, side) in self.axes.get(name, {}).items() if weight in kept}
        return self.grids[name].cut(values, places)
