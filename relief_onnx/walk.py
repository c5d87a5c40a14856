"""The walk that finds which channels live and die together.

It carries pictures of unit numbers (see `ops`) along the graph. Where two pictures meet in an element-wise operator, their units are
united; where an operator may see every channel, units are pinned, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx

from relief_onnx.coupling import Coupling, Tie, Units, ZeroReader, line_of
from relief_onnx.detours import Detour, find_detours
from relief_onnx.graph import Graph
from relief_onnx.groupnorms import GroupNorm, find_group_norms
from relief_onnx.kinds import KINDS
from relief_onnx.layers import LAYER_OPERATORS, Layer, Plan, why_stopped
from relief_onnx.moves import UNTRACKED, Barrier, long_axes, squeezed
from relief_onnx.nodes import blocks_of, operator_of
from relief_onnx.ops import OperatorRow, row_of
from relief_onnx.recurrent_layers import is_bias
from relief_onnx.recurrent_units import moves_whole, walk_recurrent
from relief_onnx.reshapes import heads_of
from relief_onnx.sources import VIEW_OPERATORS, Source, trace_constant
from relief_onnx.states import NO_STATES, States
from relief_onnx.two_ways import rows_of
from relief_onnx.unions import UnionFind
from relief_onnx.views import View

__all__ = ["Walk", "trace"]


def trace(graph: Graph, plan: Plan, states: States = NO_STATES) -> Coupling:
    """The coupling of a graph. A second walk lets single channels through norms over groups where whole groups hang together.

    states: inputs and outputs of the model that may get narrower.
    """
    found = Walk(graph, plan, states).run()
    norms = [norm for norm in find_group_norms(graph) if _hangs_together(found.pictures.get(norm.source))]
    return Walk(graph, plan, states, restored={norm.first: norm for norm in norms}).run() if norms else found


def _hangs_together(picture: Units | None) -> bool:
    """Whether all channels of a tensor are one unit."""
    return picture is not None and picture.size > 1 and bool(picture.flat[0] >= 0) and bool((picture == picture.flat[0]).all())


@dataclass
class Walk:
    graph: Graph
    plan: Plan
    states: States = NO_STATES
    pictures: dict[str, Units] = field(default_factory=dict)
    ties: list[Tie] = field(default_factory=list)
    inputs: dict[int, Units] = field(default_factory=dict)
    outputs: dict[int, Units] = field(default_factory=dict)
    barriers: set[int] = field(default_factory=set)
    constants: set[int] = field(default_factory=set)
    sources: dict[str, View] = field(default_factory=dict)
    zero_readers: list[ZeroReader] = field(default_factory=list)
    restored: Mapping[int, GroupNorm] = field(default_factory=dict)
    ways: list[Units] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.layers, self.recurrent = self.plan.single(), self.plan.recurrent()
        self.units = UnionFind()
        self.widths = {size for layer in self.plan.layers for size in (layer.out_channels, layer.groups * layer.in_per_group)}
        self.widths |= heads_of(self.graph, self.widths)
        self._pins: list[tuple[int, str]] = []
        self._tied_uses: dict[str, list[set[int]]] = {}
        self.emitted: dict[str, int] = {}
        self._detours = {detour.first: detour for detour in find_detours(self.graph)}
        self._away: dict[int, Detour] = {}
        self._back = {norm.last: norm for norm in self.restored.values() if norm.last != norm.first}

    def unite(self, a: Units, b: Units, why: str) -> None:
        """Entry by entry; a unit that meets something untracked is pinned."""
        a, b = np.broadcast_arrays(a, b)
        differ = a != b
        # Each pair once: as one number it sorts much faster than as two.
        keys = np.unique((a[differ] + 1 << 32) + (b[differ] + 1))
        for x, y in zip((keys // (1 << 32) - 1).tolist(), (keys % (1 << 32) - 1).tolist(), strict=True):
            if x >= 0 and y >= 0:
                self.units.unite(x, y)
            else:
                self._pins.append((max(x, y), why))

    def pin(self, units: Units, why: str) -> None:
        self._pins += [(unit, why) for unit in np.unique(units).tolist() if unit >= 0]

    # -- the walk ---------------------------------------------------------------------------------------------------------

    def run(self) -> Coupling:
        """Walk the graph once."""
        graph = self.graph
        for info in graph.inputs:
            self._input(info.name)
        for index, node in enumerate(graph.nodes):
            self._visit(index, node)
        for name in graph.outputs:
            self.level(name)
            if name not in self.states.outputs:
                self.pin(self.picture(name), "it is an output of the model")
        for name, uses in graph.uses.items():
            if any(use.slot < 0 for use in uses):
                self.pin(self.picture(name), "the body of a control flow node reads it")
        return self._result()

    def _input(self, name: str) -> None:
        """Of a state that may get narrower, the units that its recurrent node is to have."""
        self.untracked(name)
        if name in self.states.inputs:
            axis, shape = self.states.inputs[name], self.graph.shape(name) or ()
            self.pictures[name] = np.moveaxis(self.units.fresh(int(shape[axis] or 0)).reshape([-1] + [1] * (len(shape) - 1)), 0, axis)

    def _visit(self, index: int, node: onnx.NodeProto) -> None:
        """Carry a node; where it could if fewer axes were tracked, hold those together and try again."""
        while True:
            try:
                self._step(index, node)
                return
            except Barrier as barrier:
                if not self.collapse(node.input[0] if node.input else "", barrier.axes, str(barrier)):
                    self._barrier(index, node, str(barrier))
                    return

    def collapse(self, name: str, axes: Sequence[int], why: str) -> bool:
        """Hold units together along some tracked axes of a tensor; False where no other axis would remain."""
        picture = self.pictures.get(name)
        if picture is None or not axes or not set(long_axes(picture)) - set(axes):
            return False
        for axis in axes:
            first = picture.take([0], axis)
            self.unite(picture, first, why)
            picture = first
        self.pictures[name] = picture
        return True

    def level(self, name: str) -> None:
        """Where a tensor has the units of both directions of a recurrent node side by side: hold those at the same place together."""
        picture = self.pictures.get(name)
        if picture is not None and self._has_ways(picture):
            self.collapse(name, long_axes(picture)[:1], "both directions of a recurrent node lose the same units")

    def _has_ways(self, picture: Units) -> bool:
        """Whether a picture has the units of both directions of a recurrent node, or others that are coupled to them place by place."""
        if not self.ways or len(long_axes(picture)) != 2:
            return False
        return rows_of(self.units.canonical(picture), [self.units.canonical(rows) for rows in self.ways]) is not None

    def _step(self, index: int, node: onnx.NodeProto) -> None:
        if index not in self.recurrent and not moves_whole(node):
            for name in node.input:
                self.level(name)
        if index in self.layers:
            self._layer(self.layers[index])
            return
        if index in self.restored:
            self._restore(self.restored[index])
            if index in self.barriers:
                return
        if index in self._back:
            self.pictures[node.output[0]] = self.picture(self._back[index].source)
            self.barriers.add(index)
            return
        if index in self._detours and self._leave(self._detours[index]):
            return
        if index in self._away:
            self.pictures[node.output[0]] = self.picture(self._away[index].source).swapaxes(2, 3)
            return
        row = row_of(node)
        if all(self.is_constant(name) for name in node.input if name) and not self._emits(node, row):
            for name in node.output:
                self.untracked(name)
            self.constants.add(index)
            return
        if row is None:
            raise Barrier(why_stopped(self.graph, self.plan, index))
        if index in self.recurrent:
            walk_recurrent(self, index, node, self.recurrent[index])
            return
        for slot, name in enumerate(node.input):
            if row.data is not None and slot not in row.data and name in self.pictures and name not in self.sources:
                self.pin(self.pictures[name], f"{node.op_type} node {self.graph.names[index]} reads it as a parameter")
        KINDS[row.kind](self, index, node, row)

    def _restore(self, norm: GroupNorm) -> None:
        """Channels go through a norm over groups as they are; one of zeros can go if it still counts."""
        picture = self.picture(norm.source)
        if long_axes(picture) != [1]:
            raise Barrier("its channel axis is not the only tracked one")
        if self.graph.nodes[self.graph.producer.get(norm.source, norm.first)].op_type == "Gather":
            # What stands there several times are zeros for channels that went before.
            units, counts = np.unique(picture, return_counts=True)
            self.pin(units[counts > 1], "it takes the place of channels that are gone but still count")
        self.zero_readers.append(ZeroReader(norm.first, ((norm.source, 1),)))
        if norm.last != norm.first:
            self.untracked(self.graph.nodes[norm.first].output[0])
            self.barriers.add(norm.first)

    def _leave(self, detour: Detour) -> bool:
        """Heads go on a detour: between its ends they are not tracked."""
        picture = self.picture(detour.source)
        if picture.ndim != 4 or picture.shape[1] == 1:
            return False
        self.collapse(detour.source, [axis for axis in long_axes(picture) if axis != 1], "heads go whole")
        self.untracked(self.graph.nodes[detour.first].output[0])
        self.barriers.add(detour.first)
        self._away[detour.last] = detour
        return True

    def _emits(self, node: onnx.NodeProto, row: OperatorRow | None) -> bool:
        """A constant that is cut to shape on its way to where channels are: its channels are units too."""
        if row is None or row.kind != "carry" or node.op_type in VIEW_OPERATORS or node.op_type == "Shape" or is_bias(self.graph, node):
            return False
        return self.graph.is_float(node.output[0]) and self.graph.shape(node.output[0]) is not None

    def is_constant(self, name: str) -> bool:
        return (
            name in self.graph.initializers
            or (
                name not in self.pictures
                and (self.graph.constant(name) is not None or isinstance(trace_constant(self.graph, name), Source))
            )
            or (name in self.graph.producer and self.graph.producer[name] in self.constants)
        )

    def picture(self, name: str) -> Units:
        if name not in self.pictures:
            self.untracked(name)
        return self.pictures[name]

    def untracked(self, name: str) -> None:
        shape = self.graph.shape(name)
        self.pictures[name] = np.full((1,) * len(shape or ()), UNTRACKED, np.int64)

    def _barrier(self, index: int, node: onnx.NodeProto, why: str) -> None:
        reason = f"{node.op_type} node {self.graph.names[index]}: {why}"
        self.barriers.add(index)
        own = [self.layers[index]] if index in self.layers else self.recurrent.get(index, {}).values()
        for layer in own:
            self.inputs[layer.key] = np.full(layer.groups * layer.in_per_group, UNTRACKED, np.int64)
            self.outputs[layer.key] = self.units.fresh(layer.out_channels)
            self.pin(self.outputs[layer.key], reason)
        for name in node.input:
            if name:
                self.pin(self.picture(name), reason)
        for name in node.output:
            self.untracked(name)

    def rank_known(self, names: Sequence[str]) -> None:
        for name in names:
            if self.graph.shape(name) is None:
                raise Barrier(f"the shape of {name} is not known")

    # -- layers -----------------------------------------------------------------------------------------------------------

    def _layer(self, layer: Layer) -> None:
        graph, node = self.graph, self.graph.nodes[layer.node]
        self.rank_known([layer.input, node.output[0]])
        source = self.picture(layer.input)
        others = [axis for axis in long_axes(source) if axis != layer.input_axis % source.ndim]
        why = f"{node.op_type} node {layer.name}: it carries other axes than the one it reads"
        if others and self.collapse(layer.input, others, why):
            source, others = self.picture(layer.input), []
        inputs = source.reshape(-1)
        if others:
            self.pin(source, why)
            inputs = np.full(1, UNTRACKED, np.int64)
        inputs = np.broadcast_to(inputs, layer.groups * layer.in_per_group).copy()
        units = self.units.fresh(layer.out_channels)
        if layer.out_channels == 1:
            self.pin(units, f"{layer.name} has one output channel")
        self._group(layer, inputs, units)
        since = len(self.ties)
        self._tie_weight(layer, inputs, units)
        self.used(layer.weight, {tie.axis for tie in self.ties[since:]})
        rank = len(graph.shape(node.output[0]) or ())
        shape = [1] * rank
        shape[layer.output_axis] = layer.out_channels
        picture = units.reshape(shape)
        slot = LAYER_OPERATORS[layer.op].bias_slot
        if slot is not None and len(node.input) > slot and node.input[slot]:
            self.tie_constant(node.input[slot], units if layer.is_convolution else picture, layer.name, True)
        self.inputs[layer.key], self.outputs[layer.key] = inputs, units
        self.pictures[node.output[0]] = picture

    def _tie_weight(self, layer: Layer, inputs: Units, units: Units) -> None:
        why = f"{layer.name}: its weight {layer.weight} reaches the node through a layout that mixes channels"
        if layer.is_grouped_transposed:
            # W is [in, out per group, *kernel]: the same outputs go in each group.
            own = View.of(layer.view.source)
            self.tie_view(layer.weight, own, 0, inputs, why, True)
            if layer.in_per_group > 1:
                self.tie_view(layer.weight, own, 1, units[: own.shape[1]], why, True)
            return
        self.tie_view(layer.weight, layer.view, 0, units, why, True)
        self.hold_blocks(self.graph.nodes[layer.node], layer.view, {0: units, 1: inputs[: layer.in_per_group]})
        if layer.groups == 1 or layer.in_per_group > 1:
            self.tie_view(layer.weight, layer.view, 1, inputs[: layer.in_per_group], why, True)

    def _group(self, layer: Layer, inputs: Units, units: Units) -> None:
        """Depthwise: a filter goes with its channel. Other groups keep equal sizes: the same place goes in each."""
        if layer.groups == 1:
            return
        why = f"{layer.name}: a grouped convolution over channels that are not tracked"
        if layer.in_per_group == 1:
            self.unite(units.reshape(layer.groups, -1), inputs[:, None], why)
            return
        for places in (inputs.reshape(layer.groups, -1), units.reshape(layer.groups, -1)):
            self.unite(places, places[:1], why)

    def used(self, initializer: str, axes: set[int]) -> None:
        """Note one use of an initializer, with the axes that it ties to units."""
        self._tied_uses.setdefault(initializer, []).append(axes)

    def tie_view(self, name: str, view: View, axis: int, units: Units, why: str, zeroable: bool, across: int | None = None) -> None:
        """Units along an axis of a view of an initializer; [across, axis] where they are others in each entry of that axis."""
        if view.shape[axis] == 1:
            self.pin(units, why)
            return
        source = view.source_axis(axis)
        if source is None:
            self.pin(units, why)
            return
        lead = None if across is None else view.source_axis(across)
        if across is not None and lead is None:
            self.unite(units, units[:1], why)
            units = units[0]
        self.ties.append(Tie(name, source, units, zeroable, lead))

    def hold_blocks(self, node: onnx.NodeProto, view: View, lines: Mapping[int, Units]) -> None:
        """Of a weight that is stored in blocks, the places of each go together. lines: units along axes of a view of it."""
        axis, size = blocks_of(node) or (None, 1)
        for line in (line for side, line in lines.items() if axis is not None and view.source_axis(side) == axis):
            for start in range(0, len(line), size):
                self.unite(line[start : start + size], line[start : start + 1], f"{node.op_type}: its weight is stored in blocks")

    def tie_constant(self, tensor: str, picture: Units, where: str, zeroable: bool) -> None:
        """A constant that is broadcast against `picture`: its long axes follow the units."""
        source = trace_constant(self.graph, tensor)
        if not isinstance(source, Source):
            value = self.graph.constant(tensor)
            shape = value.shape if value is not None else self.graph.shape(tensor)
            if shape is None or any(size != 1 for size in shape):
                for units in (picture, self.picture(tensor)):
                    self.pin(units, f"{where}: {tensor} is computed or stored where it cannot be cut")
            return
        view = source.view
        if len(view.shape) > picture.ndim:
            self.pin(picture, f"{where}: the constant {tensor} has more axes than what it meets")
            return
        since = len(self.ties)
        aligned = picture.ndim - len(view.shape)
        for axis, size in enumerate(picture.shape):
            if size == 1 or axis < aligned or view.shape[axis - aligned] == 1:
                continue
            if view.shape[axis - aligned] != size:
                self.pin(picture, f"{where}: the constant {tensor} does not fit")
                continue
            # Other tracked axes are resolved at the end: what is left must be a box.
            self.tie_view(source.name, view, axis - aligned, line_of(picture, axis), f"{where}: {tensor} cannot be cut", zeroable)
        self.used(source.name, {tie.axis for tie in self.ties[since:]})

    # -- the result -------------------------------------------------------------------------------------------------------

    def _result(self) -> Coupling:
        self._keep_what_others_read()
        axes: dict[tuple[str, int], Units] = {}
        for tie in self.ties:
            self.unite(tie.units, axes.setdefault((tie.initializer, tie.axis), tie.units), "a shared parameter")
        self._make_boxes()
        canonical = self.units.canonical
        pictures = {name: canonical(picture) for name, picture in self.pictures.items()}
        # Whoever reads a state output sees every unit but those that are 0.
        seen = [(name, long_axes(pictures[name])) for name in sorted(self.states.outputs)]
        self.zero_readers += [ZeroReader(-1, ((name, axis),)) for name, axes in seen for axis in axes]
        for name, picture in pictures.items():
            if _hangs_together(picture):
                self.pin(picture, f"all channels of {name} hang together, so none can go without the others")
        pinned: dict[int, str] = {}
        for unit, why in self._pins:
            pinned.setdefault(self.units.root(unit), why)
        return Coupling(
            pictures,
            [replace(tie, units=canonical(tie.units)) for tie in self.ties],
            {node: canonical(units) for node, units in self.inputs.items()},
            {node: canonical(units) for node, units in self.outputs.items()},
            pinned,
            frozenset(self.barriers),
            frozenset(self.constants),
            self.sources,
            self.zero_readers,
            self.restored,
            [canonical(rows) for rows in self.ways],
        )

    def _keep_what_others_read(self) -> None:
        """An axis can be cut only if every reader follows."""
        readers = {name: self._readers(name) for name in self._tied_uses}
        for tie in self.ties:
            uses = self._tied_uses.get(tie.initializer, [])
            follow = len(uses) == readers.get(tie.initializer, 0) and all(tie.axis in axes for axes in uses)
            if not follow or self.graph.is_output(tie.initializer):
                self.pin(tie.units, self._where_it_stays(tie.initializer))

    def _where_it_stays(self, tensor: str) -> str:
        body = next((use.node for use in self.graph.uses.get(tensor, ()) if use.slot < 0), None)
        if body is None:
            return f"{tensor} is also read where it must keep its shape"
        where = f"{operator_of(self.graph.nodes[body])} node {self.graph.names[body]}"
        return f"{tensor} is read inside {where}, where whole channels stay (connections and single weights can go)"

    def _readers(self, tensor: str) -> int:
        """Nodes that read a stored tensor, in whatever layout it reaches them."""
        count = 0
        for use in self.graph.uses.get(tensor, ()):
            node = self.graph.nodes[use.node]
            is_view = use.slot == 0 and node.op_type in VIEW_OPERATORS and isinstance(trace_constant(self.graph, node.output[0]), Source)
            count += self._readers(node.output[0]) if is_view else 1
        return count

    def _make_boxes(self) -> None:
        """A tensor with two tracked axes can only lose whole lines: of groups side by side, each loses the same places."""
        counted = {name for reader in self.zero_readers for name, _ in reader.factors}
        for name, picture in self.pictures.items():
            if self._has_ways(picture) and name not in counted:
                continue
            if len(long_axes(picture)) > 1:
                for rows in self.ways:  # both directions in another order
                    if all(np.isin(picture, row).any() for row in rows):
                        self.unite(rows, rows[:1], "it is part of an axis that is split")
                picture = squeezed(self.units.canonical(picture))
                while len(tracked := long_axes(picture)) > 1:
                    first = picture.take([0], tracked[0])
                    self.unite(picture, first, "it is part of an axis that is split")
                    picture = squeezed(self.units.canonical(first))
                self.pictures[name] = picture
