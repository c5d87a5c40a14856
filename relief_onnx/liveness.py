"""Which units are provably dead: constant whatever the input, or read by nobody.

A forward walk finds channels that are constant (a filter without weights emits f(bias)), a backward walk finds channels that nobody
reads. Both only use zeros in weights, never measurements, so what they remove changes nothing that the model computes. The
walks repeat until nothing changes: a unit without readers loses its incoming weights, which may orphan others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from relief_onnx.branches import dead_inputs
from relief_onnx.constants import Constants, Routes, along, broadcasts, exact
from relief_onnx.coupling import Coupling
from relief_onnx.graph import Graph
from relief_onnx.layers import LAYER_OPERATORS, Layer, Plan
from relief_onnx.nodes import rounds_states
from relief_onnx.ops import OperatorRow, row_of
from relief_onnx.recurrent_reads import cell_of
from relief_onnx.recurrent_units import as_picture, read_units, tiled
from relief_onnx.two_ways import balanced

__all__ = ["Fold", "Removal", "find_dead"]

Values = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Fold:
    """A constant that a layer's bias takes over: `amount` [out] is what the removed channels added to each unit."""

    layer: Layer
    amount: Values


@dataclass
class Removal:
    """What can go: whole units (canonical numbers), and weights that change nothing. `weights` are canonical arrays by layer node.

    `dead_inputs`: whole activations are constant too (see `branches`).
    """

    units: set[int] = field(default_factory=set)
    folds: list[Fold] = field(default_factory=list)
    weights: dict[int, NDArray[Any]] = field(default_factory=dict)
    silenced_biases: dict[int, Flags] = field(default_factory=dict)
    dead_inputs: bool = False


def find_dead(graph: Graph, plan: Plan, coupling: Coupling) -> Removal:
    """Provably dead units and weights of a model whose masks are already applied."""
    return _Liveness(graph, plan, coupling).run()


class _Liveness:
    def __init__(self, graph: Graph, plan: Plan, coupling: Coupling) -> None:
        self.graph, self.plan, self.coupling = graph, plan, coupling
        self.layers, self.recurrent = plan.single(), plan.recurrent()
        self.units: dict[int, Flags] = {}  # of recurrent nodes: those that anybody reads [directions, hidden]
        self.routes = Routes(graph, coupling)
        self.constants = Constants(graph, plan, coupling, self.routes)
        self.reads: dict[str, Flags] = {}
        shared = {weight for weight, users in plan.by_weight().items() if len(users) > 1}
        self._counting = {reader.node for reader in coupling.zero_readers}
        self._free = [layer for layer in plan.layers if layer.weight not in shared]

    def run(self) -> Removal:
        before = -1
        while True:
            self.constants.compute()
            self._backward()
            remaining = self._clear()
            if remaining == before:
                return self._removal()
            before = remaining

    # -- readers, backward ------------------------------------------------------------------------------------------------

    def _backward(self) -> None:
        self.reads = {name: np.zeros(picture.shape, bool) for name, picture in self.coupling.pictures.items()}
        for name in self.graph.outputs:
            self._read_all(name)
        for name, uses in self.graph.uses.items():
            if any(use.slot < 0 for use in uses):
                self._read_all(name)
        for layer in self.plan.layers:
            if layer.inside is not None:
                self._read_all(self.graph.nodes[layer.node].output[0])
        for index in range(len(self.graph.nodes) - 1, -1, -1):
            node, row = self.graph.nodes[index], row_of(self.graph.nodes[index])
            if index in self.coupling.constants:
                continue
            if index in self.coupling.barriers or (row is None and index not in self.layers):
                self.units.pop(index, None)  # all of them
                for name in node.input:
                    self._read_all(name)
            elif index in self.layers:
                self._layer_reads(self.layers[index])
            elif index in self.recurrent:
                self._recurrent_reads(index, node, self.recurrent[index])
            elif row is not None and (row.kind in ("contract", "norm", "recurrent") or index in self._counting):
                for name in node.input:
                    self._read_all(name)
            elif row is not None and row.carry is not None:
                self._carry_reads(index, node, row)
            else:
                self._mix_reads(node)

    def _read_all(self, name: str) -> None:
        if name in self.reads:
            self.reads[name][...] = True

    def _live(self, layer: Layer) -> Flags:
        """Which units of a layer anybody reads [out]."""
        if layer.recurrent is not None:
            return tiled(self.units[layer.node], layer) if layer.node in self.units else np.ones(layer.out_channels, bool)
        read = self.reads[self.graph.nodes[layer.node].output[0]]
        if read.size not in (1, layer.out_channels):
            return np.ones(layer.out_channels, bool)
        return np.broadcast_to(read.reshape(-1), layer.out_channels)

    def _channels_read(self, layer: Layer) -> Flags:
        """Which input channels [C] have a weight that a live unit applies."""
        weight = self.constants.weights[layer.key]
        reading = weight.reshape(*weight.shape[:2], -1).any(-1) & self._live(layer)[:, None]
        per_group: Flags = reading.reshape(layer.groups, -1, layer.in_per_group).any(1).reshape(-1)
        return per_group

    def _layer_reads(self, layer: Layer) -> None:
        read = self.reads.get(layer.input)
        if read is None:
            return
        channels = self._channels_read(layer)
        if read.size == channels.size and along(read, layer.input_axis, channels.size):
            read |= channels.reshape(read.shape)
        else:
            read[...] = True
        for name in self.graph.nodes[layer.node].input:
            if name != layer.input:
                self._read_all(name)

    def _recurrent_reads(self, index: int, node: onnx.NodeProto, layers: Mapping[str, Layer]) -> None:
        kind, batch_first = layers["R"].recurrent, cell_of(node).batch_first
        assert kind is not None
        every = np.ones((kind.directions, kind.hidden), bool)
        read = every if rounds_states(node) else ~every  # what is not 0 has its part in a range
        for name in node.output:
            if name:
                found = self.reads[name]
                full = np.broadcast_to(found, np.broadcast_shapes(found.shape, as_picture(every, found.ndim, batch_first).shape))
                # Axes: whichever are not directions and hidden are 1 long in a picture.
                read = read | full.reshape(kind.directions, kind.hidden)
        self.units[index] = read_units(layers, self.constants.weights, read)
        self._layer_reads(layers["W"])

    def _carry_reads(self, index: int, node: onnx.NodeProto, row: OperatorRow) -> None:
        names = self.routes.data(node, row)
        sizes = [self.reads[name].size for name in names]
        if max(sizes) == 1:
            for name in node.input:
                self._read_all(name)
            return
        total = np.zeros(sum(sizes) + 2, bool)
        for name, moves in zip(node.output, self.routes.moved(index, node, row), strict=False):
            for move in moves if name else ():
                read = self.reads[name]
                total[move[np.broadcast_to(read, move.shape)] if broadcasts(read.shape, move.shape) else move] = True
        start = 0
        for name, size in zip(names, sizes, strict=True):
            self.reads[name] |= total[start : start + size].reshape(self.reads[name].shape)
            start += size
        for name in node.input:
            if name not in names:
                self._read_all(name)

    def _mix_reads(self, node: onnx.NodeProto) -> None:
        out = self.reads[node.output[0]]
        for name in node.input:
            if name not in self.reads:
                continue
            read = self.reads[name]
            lifted = read.reshape((1,) * (out.ndim - read.ndim) + read.shape) if read.ndim <= out.ndim else None
            if lifted is None:
                read[...] = True
                continue
            axes = tuple(i for i, size in enumerate(lifted.shape) if size == 1)
            reduced = out.any(axes, keepdims=True)
            fits = broadcasts(reduced.shape, lifted.shape)
            self.reads[name] = np.asarray(read | np.broadcast_to(reduced, lifted.shape).reshape(read.shape)) if fits else np.ones_like(read)

    # -- what follows -----------------------------------------------------------------------------------------------------

    def _clear(self) -> int:
        """Zero the weights of units that nobody reads and of channels that are always 0; returns how many weights remain."""
        remaining = 0
        for layer in self._free:
            weight = self.constants.weights[layer.key]
            zero = self.constants.of_inputs(layer) == 0
            dead_in = np.repeat(zero.reshape(layer.groups, -1), layer.out_channels // layer.groups, 0)
            dead = dead_in | ~self._live(layer)[:, None]
            if (weight.reshape(*weight.shape[:2], -1).any(-1) & dead).any():
                weight = weight.copy()
                weight[dead] = 0
                self.constants.weights[layer.key] = weight
            remaining += int(np.count_nonzero(weight))
        return remaining

    def _removal(self) -> Removal:
        blocked: set[int] = set(self.coupling.pinned)
        for layer in self.plan.layers:
            constants = self.constants.of_inputs(layer)
            foldable = ~np.isnan(constants) & _can_fold(self.graph, layer)
            needed = self._channels_read(layer) & ~(constants == 0) & ~foldable
            blocked |= set(self.coupling.inputs[layer.key][needed].tolist())
        for reader in self.coupling.zero_readers:
            lines = [(self.coupling.line(name, axis), self.constants.zeros(name, axis)) for name, axis in reader.factors]
            blocked |= set(lines[0][0][~np.any([zero for _, zero in lines], 0)].tolist())
        channels = [*self.coupling.inputs.values(), *self.coupling.outputs.values()]
        costs = Counter(unit for line in channels for unit in line.tolist())
        tensors = [np.unique(picture).tolist() for picture in self.coupling.pictures.values()]
        units = {unit for own in tensors for unit in own} - blocked - {-1}
        for own in sorted(tensors, key=len):
            # No tensor may become empty: neither a layer's output nor a part of it. Parts first: what they keep serves the whole.
            if units.issuperset(own):
                units.discard(min(own, key=lambda unit: (costs[unit], unit)))
        units = balanced(units, self.coupling.ways, costs)
        silenced = {layer.key: ~self._live(layer) for layer in self._free}
        return Removal(
            units, self._folds(units), self.constants.weights, silenced, bool(dead_inputs(self.graph, self.coupling, self.constants))
        )

    def _folds(self, units: set[int]) -> list[Fold]:
        folds = []
        for layer in self.plan.layers:
            constants = self.constants.of_inputs(layer)
            gone = np.isin(self.coupling.inputs[layer.key], list(units)) & ~np.isnan(constants) & (constants != 0)
            if gone.any():
                weight = self.constants.weights[layer.key]
                sums = weight.reshape(*weight.shape[:2], -1).sum(-1, dtype=np.float64)
                values = np.where(gone, np.nan_to_num(constants), 0.0).reshape(layer.groups, -1)
                amount = (sums * np.repeat(values, layer.out_channels // layer.groups, 0)).sum(1) * layer.scale
                # Only units that somebody reads count: the bias of others may be shared with a layer that is read.
                amount = np.where(self._live(layer), amount, 0.0)
                if amount.any():
                    folds.append(Fold(layer, amount))
        return folds


def _can_fold(graph: Graph, layer: Layer) -> bool:
    """Whether a constant can move into the layer's bias: it has one of its own, or room for one."""
    if not exact(layer) or (layer.recurrent is not None and layer.bias is None):
        return False
    node, slot = graph.nodes[layer.node], LAYER_OPERATORS[layer.op].bias_slot
    if layer.bias is not None:
        # What is rounded on its way to the bias would be rounded to something else.
        direct = layer.bias.node == layer.node or node.output[0] in graph.nodes[layer.bias.node].input
        return direct and not layer.bias.shared and layer.bias.factor != 0
    return slot is not None and (len(node.input) <= slot or not node.input[slot])
