"""Which channels live and die together: one walk over the graph with the operator table.

Every output channel of a layer is a *unit*, a number. The walk carries pictures of unit numbers (see `ops`) along the graph. Where
two pictures meet in an element-wise operator, their units are united; where an operator may see every channel, units are pinned,
with the reason. Initializers whose axes follow units (weights, biases, normalisation parameters) are tied to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray

from relief_onnx.graph import Graph, attributes
from relief_onnx.layers import LAYER_OPERATORS, Layer, Plan
from relief_onnx.ops import Barrier, OperatorRow, row_of
from relief_onnx.sources import Source, readers, trace_constant
from relief_onnx.views import View

__all__ = ["Coupling", "Tie", "trace"]

Units = NDArray[np.int64]
UNTRACKED = -1


@dataclass(frozen=True)
class Tie:
    """An initializer whose `axis` has one entry per unit."""

    initializer: str
    axis: int
    units: Units


@dataclass
class Coupling:
    """The result of the walk. Unit numbers in `pictures` and `ties` are canonical: equal numbers are coupled.

    `constants` are the nodes that read constants only.
    """

    pictures: dict[str, Units] = field(default_factory=dict)
    ties: list[Tie] = field(default_factory=list)
    inputs: dict[int, Units] = field(default_factory=dict)
    outputs: dict[int, Units] = field(default_factory=dict)
    pinned: dict[int, str] = field(default_factory=dict)
    barriers: set[int] = field(default_factory=set)
    constants: set[int] = field(default_factory=set)


def trace(graph: Graph, plan: Plan) -> Coupling:
    """Walk the graph once and return its coupling."""
    walk = _Walk(graph, plan)
    walk.run()
    return walk.result()


class _Walk:
    def __init__(self, graph: Graph, plan: Plan) -> None:
        self.graph = graph
        self.layers = {layer.node: layer for layer in plan.layers}
        self.found = Coupling()
        self._parents: list[int] = []
        self._pins: list[tuple[int, str]] = []
        self._tied_uses: dict[str, int] = {}

    # -- units: union-find ------------------------------------------------------------------------------------------------

    def _fresh(self, count: int) -> Units:
        first = len(self._parents)
        self._parents.extend(range(first, first + count))
        return np.arange(first, first + count)

    def _root(self, unit: int) -> int:
        while self._parents[unit] != unit:
            self._parents[unit] = self._parents[self._parents[unit]]
            unit = self._parents[unit]
        return unit

    def _unite(self, a: Units, b: Units, why: str) -> None:
        """Entry by entry; a unit that meets something untracked is pinned."""
        a, b = np.broadcast_arrays(a, b)
        for x, y in zip(a.reshape(-1).tolist(), b.reshape(-1).tolist(), strict=True):
            if x >= 0 and y >= 0:
                self._parents[self._root(x)] = self._root(y)
            elif x != y:
                self._pins.append((max(x, y), why))

    def _pin(self, units: Units, why: str) -> None:
        self._pins += [(unit, why) for unit in np.unique(units).tolist() if unit >= 0]

    # -- the walk ---------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        graph = self.graph
        for info in graph.inputs:
            self._untracked(info.name)
        for index, node in enumerate(graph.nodes):
            try:
                self._visit(index, node)
            except Barrier as barrier:
                self._barrier(index, node, str(barrier))
        for name in graph.outputs:
            self._pin(self._picture(name), "it is an output of the model")
        for name, uses in graph.uses.items():
            if any(use.slot < 0 for use in uses):
                self._pin(self._picture(name), "the body of a control flow node reads it")

    def _visit(self, index: int, node: onnx.NodeProto) -> None:
        if index in self.layers:
            self._layer(self.layers[index])
            return
        if all(name in self.graph.initializers or self._is_constant(name) for name in node.input if name):
            for name in node.output:
                self._untracked(name)
            self.found.constants.add(index)
            return
        row = row_of(node)
        if row is None:
            raise Barrier("it is not in the operator table")
        for slot, name in enumerate(node.input):
            if row.data is not None and slot not in row.data and name in self.found.pictures:
                self._pin(self.found.pictures[name], f"{node.op_type} node {self.graph.names[index]} reads it as a parameter")
        if row.kind == "mix":
            self._mix(node, row)
        elif row.kind == "affine":
            self._affine(node)
        else:
            self._carry(node, row)

    def _is_constant(self, name: str) -> bool:
        return name not in self.found.pictures and (
            self.graph.constant(name) is not None or isinstance(trace_constant(self.graph, name), Source)
        )

    def _picture(self, name: str) -> Units:
        if name not in self.found.pictures:
            self._untracked(name)
        return self.found.pictures[name]

    def _untracked(self, name: str) -> None:
        shape = self.graph.shape(name)
        self.found.pictures[name] = np.full((1,) * len(shape or ()), UNTRACKED, np.int64)

    def _barrier(self, index: int, node: onnx.NodeProto, why: str) -> None:
        reason = f"{node.op_type} node {self.graph.names[index]}: {why}"
        self.found.barriers.add(index)
        if index in self.layers:
            layer = self.layers[index]
            self.found.inputs[index] = np.full(layer.groups * layer.in_per_group, UNTRACKED, np.int64)
            self.found.outputs[index] = self._fresh(layer.out_channels)
            self._pin(self.found.outputs[index], reason)
        for name in node.input:
            if name:
                self._pin(self._picture(name), reason)
        for name in node.output:
            self._untracked(name)

    def _rank_known(self, names: Sequence[str]) -> None:
        for name in names:
            if self.graph.shape(name) is None:
                raise Barrier(f"the shape of {name} is not known")

    # -- layers -----------------------------------------------------------------------------------------------------------

    def _layer(self, layer: Layer) -> None:
        graph, node = self.graph, self.graph.nodes[layer.node]
        self._rank_known([layer.input, node.output[0]])
        source, picture = self._picture(layer.input), None
        axis = layer.input_axis % source.ndim
        others = [size for i, size in enumerate(source.shape) if i != axis]
        inputs = source.reshape(-1) if all(size == 1 for size in others) else None
        why = f"{node.op_type} node {layer.name}: it carries other axes than the one it reads"
        if inputs is None:
            self._pin(source, why)
            inputs = np.full(1, UNTRACKED, np.int64)
        channels = layer.groups * layer.in_per_group
        inputs = np.broadcast_to(inputs, channels).copy()
        units = self._fresh(layer.out_channels)
        if layer.out_channels == 1:
            self._pin(units, f"{layer.name} has one output channel")
        self._group(layer, inputs, units)
        weight_why = f"{layer.name}: its weight {layer.weight} reaches the node through a layout that mixes channels"
        self._tie_view(layer.weight, layer.view, 0, units, weight_why)
        if layer.groups == 1 or layer.in_per_group > 1:
            self._tie_view(layer.weight, layer.view, 1, inputs[: layer.in_per_group], weight_why)
        self._tied_uses[layer.weight] = self._tied_uses.get(layer.weight, 0) + 1
        rank = len(graph.shape(node.output[0]) or ())
        shape = [1] * rank
        shape[layer.output_axis] = layer.out_channels
        picture = units.reshape(shape)
        slot = LAYER_OPERATORS[layer.op].bias_slot
        if slot is not None and len(node.input) > slot and node.input[slot]:
            bias_picture = units if layer.is_convolution else picture
            self._tie_constant(node.input[slot], bias_picture, layer.name)
        self.found.inputs[layer.node], self.found.outputs[layer.node] = inputs, units
        self.found.pictures[node.output[0]] = picture

    def _group(self, layer: Layer, inputs: Units, units: Units) -> None:
        """Depthwise: a filter goes with its channel. Other groups keep equal sizes: the same place goes in each."""
        if layer.groups == 1:
            return
        why = f"{layer.name}: a grouped convolution over channels that are not tracked"
        if layer.in_per_group == 1:
            self._unite(units.reshape(layer.groups, -1), inputs[:, None], why)
            return
        for places in (inputs.reshape(layer.groups, -1), units.reshape(layer.groups, -1)):
            self._unite(places, places[:1], why)

    def _tie_view(self, name: str, view: View, axis: int, units: Units, why: str) -> None:
        if view.shape[axis] == 1:
            self._pin(units, why)
            return
        source = view.source_axis(axis)
        if source is None:
            self._pin(units, why)
        else:
            self.found.ties.append(Tie(name, source, units))

    def _tie_constant(self, tensor: str, picture: Units, where: str) -> None:
        """A constant that is broadcast against `picture`: its long axes follow the units."""
        source = trace_constant(self.graph, tensor)
        if not isinstance(source, Source):
            value = self.graph.constant(tensor)
            if value is None or value.ndim > 0:
                self._pin(picture, f"{where}: {tensor} is computed or stored where it cannot be cut")
            return
        view = source.view
        if len(view.shape) > picture.ndim:
            self._pin(picture, f"{where}: the constant {tensor} has more axes than what it meets")
            return
        self._tied_uses[source.name] = self._tied_uses.get(source.name, 0) + 1
        aligned = picture.ndim - len(view.shape)
        for axis, size in enumerate(picture.shape):
            if size == 1 or axis < aligned or view.shape[axis - aligned] == 1:
                continue
            if view.shape[axis - aligned] != size:
                self._pin(picture, f"{where}: the constant {tensor} does not fit")
                continue
            line = np.moveaxis(picture, axis, 0).reshape(size, -1)
            if line.shape[1] > 1:
                self._pin(picture, f"{where}: two tracked axes meet the constant {tensor}")
            self._tie_view(source.name, view, axis - aligned, line[:, 0], f"{where}: {tensor} cannot be cut")

    # -- other operators --------------------------------------------------------------------------------------------------

    def _mix(self, node: onnx.NodeProto, row: OperatorRow) -> None:
        data = [name for i, name in enumerate(node.input) if name and (row.data is None or i in row.data)]
        running = [name for name in data if name not in self.graph.initializers and not self._is_constant(name)]
        self._rank_known([*running, *node.output[:1]])
        rank = len(self.graph.shape(node.output[0]) or ())
        pictures = [self._picture(name) for name in running]
        pictures = [picture.reshape((1,) * (rank - picture.ndim) + picture.shape) for picture in pictures]
        result = np.full((1,) * rank, UNTRACKED, np.int64)
        for name, picture in zip(running, pictures, strict=True):
            result = self._meet(node, result, picture, name, rank) if name != running[0] else picture
        for name in data:
            if name not in running:
                self._tie_constant(name, result, node.name or node.op_type)
        self.found.pictures[node.output[0]] = result

    def _meet(self, node: onnx.NodeProto, a: Units, b: Units, name: str, rank: int) -> Units:
        """Unite two pictures. An axis of size 1 in a picture is either truly 1 long, or long and untracked: then the other is pinned."""
        why = f"{node.op_type} node {node.name or '(unnamed)'}: {name} and what it meets are not both tracked"
        first = next(item for item in node.input if item in self.found.pictures)
        for picture, other in ((a, name), (b, first)):
            shape = self.graph.shape(other) or ()
            dims = (1,) * (rank - len(shape)) + tuple(shape)
            own = b if picture is a else a
            for axis, size in enumerate(picture.shape):
                if size > 1 and own.shape[axis] == 1 and dims[axis] != 1:
                    self._pin(picture, why)
        long_a, long_b = ([i for i, size in enumerate(p.shape) if size > 1] for p in (a, b))
        if long_a and long_b and long_a != long_b:
            self._pin(a, why)
            self._pin(b, why)
            return np.full((1,) * rank, UNTRACKED, np.int64)
        if long_a and long_b:
            self._unite(a, b, why)
        return a if long_a else b

    def _affine(self, node: onnx.NodeProto) -> None:
        self._rank_known([node.input[0]])
        if attributes(node).get("training_mode", 0):
            raise Barrier("it is in training mode, so it sees the whole batch")
        picture = self._picture(node.input[0])
        if picture.size > 1 and (picture.ndim < 2 or picture.shape[1] != picture.size):
            raise Barrier("its channel axis is not the tracked one")
        for name in node.input[1:]:
            self._tie_constant(name, picture.reshape(-1), node.name or node.op_type)
        self.found.pictures[node.output[0]] = picture

    def _carry(self, node: onnx.NodeProto, row: OperatorRow) -> None:
        assert row.carry is not None
        names = [name for i, name in enumerate(node.input) if name and (row.data is None or i in row.data)]
        self._rank_known(names)
        results = row.carry(self.graph, node, [self._picture(name) for name in names])
        for name, picture in zip(node.output, results, strict=False):
            if name:
                self.found.pictures[name] = self._rectangular(picture)
        for name in node.output[len(results) :]:
            self._untracked(name)

    def _rectangular(self, picture: Units) -> Units:
        """A tracked axis that was split in two keeps its first part tracked: whole rows go, so that what is left is a box."""
        long = [axis for axis, size in enumerate(picture.shape) if size > 1]
        for axis in long[1:]:
            first = picture.take([0], axis)
            self._unite(picture, first, "it is part of an axis that is split")
            picture = first
        return picture

    # -- the result -------------------------------------------------------------------------------------------------------

    def result(self) -> Coupling:
        found = self.found
        for name, uses in self._tied_uses.items():
            if uses != len(readers(self.graph, name)) or self.graph.is_output(name):
                for tie in found.ties:
                    if tie.initializer == name:
                        self._pin(tie.units, f"{name} is also read where it must keep its shape")
        axes: dict[tuple[str, int], Units] = {}
        for tie in found.ties:
            self._unite(tie.units, axes.setdefault((tie.initializer, tie.axis), tie.units), "a shared parameter")
        roots = np.array([self._root(unit) for unit in range(len(self._parents))] + [UNTRACKED], np.int64)
        for unit, why in self._pins:
            found.pinned.setdefault(int(roots[unit]), why)
        return Coupling(
            {name: roots[picture] for name, picture in found.pictures.items()},
            [Tie(tie.initializer, tie.axis, roots[tie.units]) for tie in found.ties],
            {node: roots[units] for node, units in found.inputs.items()},
            {node: roots[units] for node, units in found.outputs.items()},
            found.pinned,
            found.barriers,
            found.constants,
        )
