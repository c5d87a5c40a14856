"""From floats back to the integers of the file: the way back of `quantised`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from relief_onnx.datatypes import Kept
from relief_onnx.edits import unused
from relief_onnx.graph import Graph
from relief_onnx.grids import Grid
from relief_onnx.layers import Layer, find
from relief_onnx.nodes import captured, subgraphs
from relief_onnx.quantised_rows import Claim, Place
from relief_onnx.surgery import apply_weights

__all__ = ["Axes", "Requantise", "Standing"]

Axes = Mapping[int, tuple[str, int]]  # of a stored tensor: which axes are the rows (0) or columns (1) of which weight
Chains = Mapping[str, Sequence[tuple[str, tuple[onnx.NodeProto, ...]]]]
# From these on DequantizeLinear has scales per channel, and per block.
_PER_CHANNEL, _PER_BLOCK = 13, 21


@dataclass(frozen=True)
class Standing:
    """What a float node stands for: the nodes of the file, `main` among them the one that computes."""

    place: Place
    nodes: tuple[onnx.NodeProto, ...]
    main: int


@dataclass(frozen=True)
class Requantise:
    """The way back; `notes` say what changed besides values.

    source: the model before. grids: of the float initializers. standing: by name of the float node. chains: by initializer, what made floats
    of it: (output, nodes). readers: which of these outputs (first output of a node, slot) read. made: tensors that only the float form has.
    copies: whose integers initializers hold that have a name of their own only in the float form.
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
        for bias, grid in {**self._new_biases(graph, grids), **grids}.items():
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

    def _new_biases(self, graph: Graph, grids: Mapping[str, Grid]) -> dict[str, Grid]:
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
            if scale.size > 1 and (graph.opset < _PER_CHANNEL or weight.scale.shape[layer.view.source_axis(0) or 0] != scale.size):
                continue
            unit = (scale * factor.reshape(()) * np.float32(layer.scale)).astype(scale.dtype)
            found[bias.name] = Grid(bias.name, TensorProto.INT32, np.zeros(array.shape, np.int32), unit, np.zeros(1, np.int64), fresh=True)
        return found

    def __call__(self, model: onnx.ModelProto, kept: Kept) -> onnx.ModelProto:
        return _Back(self, model, kept).run()

    def cut(self, name: str, values: NDArray[Any], kept: Kept) -> Grid | None:
        """The grid of what surgery left of a stored tensor."""
        places = {axis: kept[weight][side] for axis, (weight, side) in self.axes.get(name, {}).items() if weight in kept}
        return self.grids[name].cut(values, places)


class _Back:
    def __init__(self, rules: Requantise, model: onnx.ModelProto, kept: Kept) -> None:
        self.rules = rules
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self._fold_masks()
        self.graph = graph = Graph(self.model)
        cut = {name: rules.cut(name, graph.array(name), kept) for name in rules.grids if name in graph.initializers}
        self.lost = {name for name, grid in cut.items() if grid is None}
        self.grids = {name: grid for name, grid in cut.items() if grid is not None}
        self.grids |= rules._new_biases(graph, self.grids)
        self.originals = {item.name: item for item in rules.source.graph.initializer}
        self.arrays: dict[str, NDArray[Any]] = {}
        self.names: dict[str, dict[str, str]] = {}
        self.gone: set[int] = set()
        self.new: dict[int, list[onnx.NodeProto]] = {}

    def run(self) -> onnx.ModelProto:
        self._write_scales()
        for index, node in enumerate(self.graph.nodes):
            if node.name in self.rules.standing and (found := self._fused(index, self.rules.standing[node.name])) is not None:
                at, gone, nodes = found
                self.gone |= gone
                self.new[at] = nodes
        self._chain()
        nodes = [
            new for index, node in enumerate(self.graph.nodes) for new in self.new.get(index, [] if index in self.gone else [node])
        ]  # fmt: skip
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del self.model.graph.node[:]
        self.model.graph.node.extend(copies)
        self._store()
        self._sweep()
        return self.model

    def _fold_masks(self) -> None:
        """Masks of the masked model, multiplied in: integers have no room for another product."""
        graph = Graph(self.model)
        known = {item.name for item in self.rules.source.graph.initializer} - set(self.rules.grids)
        new: dict[str, Any] = {}
        renamed: dict[str, str] = {}
        for node in graph.nodes:
            name = node.input[0] if len(node.input) == 2 else ""
            mask = f"{name}/mask"
            if node.op_type == "Mul" and node.output[0] == f"{name}/masked" and node.input[1] == mask and name not in known:
                if name in graph.initializers and mask in graph.initializers:
                    keep = graph.array(mask) != 0
                    new[name] = np.where(keep, graph.array(name), np.zeros((), graph.array(name).dtype))
                    renamed[node.output[0]] = name
        if not new:
            return
        self.model = apply_weights(self.model, new)
        kept = [node for node in self.model.graph.node if not (node.op_type == "Mul" and node.output[0] in renamed)]
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
        for node in copies:
            for slot, name in enumerate(node.input):
                node.input[slot] = renamed.get(name, name)
        del self.model.graph.node[:]
        self.model.graph.node.extend(copies)
        for name in new:
            item = next(item for item in self.model.graph.initializer if item.name == f"{name}/mask")
            self.model.graph.initializer.remove(item)

    # -- scales and zero points -------------------------------------------------------------------------------------------

    def _write_scales(self) -> None:
        """Scales and zero points as they are now: under their old names where they did not change or nothing else has them."""
        wanted: dict[str, dict[bytes, tuple[NDArray[Any], list[str]]]] = {}
        for name, grid in self.grids.items():
            for held, values in ((grid.scales, grid.scale), (grid.zeros, grid.zero)):
                if held:
                    before = self.rules.grids[name]
                    array = _in_file(self._held(held), before, before.scale if values is grid.scale else before.zero, values, grid)
                    key = str(array.shape).encode() + array.tobytes()
                    wanted.setdefault(held, {}).setdefault(key, (array, []))[1].append(name)
        for held, forms in wanted.items():
            old = self._held(held)
            for number, (array, users) in enumerate(forms.values()):
                if array.shape == old.shape and np.array_equal(array, old):
                    continue
                if number == 0 and len(forms) == 1 and held in self.originals and held not in self.graph.uses:
                    target = held
                else:
                    target = unused(self.model, f"{held}~{number + 2}")
                self.arrays[target] = array
                for name in users:
                    self.names.setdefault(name, {})[held] = target

    def _held(self, name: str) -> NDArray[Any]:
        value = self.graph.constant(name)
        if value is None:
            value = Graph(self.rules.source).constant(name)
        assert value is not None
        return value

    # -- nodes ------------------------------------------------------------------------------------------------------------

    def _fused(self, index: int, standing: Standing) -> tuple[int, set[int], list[onnx.NodeProto]] | None:
        """Where the nodes of the file go, what goes for them, and they themselves; None where what stands there is another thing now."""
        graph, place, node = self.graph, standing.place, self.graph.nodes[index]
        if node.op_type != place.operator:
            return None
        nodes = [onnx.NodeProto.FromString(item.SerializeToString()) for item in standing.nodes]
        main = nodes[standing.main]
        given = list(main.input)
        inputs = list(node.input)
        count = len(place.inputs) - (1 if place.added is not None and len(place.inputs) > 2 else 0)
        extra = inputs[count:] if len(inputs) > count else []
        if len(inputs) < count or len(extra) > 1 or (extra and place.bias is None and not place.dynamic):
            return None
        for name, item, slots in zip(inputs, place.inputs, place.slots, strict=False):
            if isinstance(item, Claim):
                if name not in self.grids:
                    return None
                renamed = self.names.get(name, {})
                given = [renamed.get(old, old) for old in given]
                for other in nodes:
                    if other is not main:
                        other.input[:] = [renamed.get(old, old) for old in other.input]
                given[item.slot] = name
            elif isinstance(item, tuple):
                made = self._maker(name, "DequantizeLinear")
                if made is None or (not place.dynamic and list(made.input)[1:] != [part for part in item[1:] if part]):
                    return None
                given[slots[0]] = made.input[0]
                if place.dynamic and len(made.input) > 2:
                    given[2] = made.input[2]
                if place.dynamic:
                    for other in nodes:
                        if other is not main:
                            other.input[:] = [made.input[1] if old == item[1] else old for old in other.input]
            elif place.dynamic:
                made = self._maker(name, "DequantizeLinear")
                measured = self._maker(made.input[0], "DynamicQuantizeLinear") if made is not None else None
                if measured is None:
                    return None
                given[slots[0]] = measured.input[0]
            else:
                given[slots[0]] = name
        if extra and place.bias is not None:
            if extra[0] not in self.grids:
                return None
            given += [""] * (place.bias + 1 - len(given))
            given[place.bias] = extra[0]
        end = self._end(index, place)
        if end is None:
            return None
        at, gone, output, bias = end
        if place.added is not None:
            given += [""] * (place.added + 1 - len(given))
            given[place.added] = bias
            while given and not given[-1]:
                given.pop()
        main.input[:] = given
        del main.attribute[:]
        main.attribute.extend(item for item in node.attribute)
        main.attribute.extend(helper.make_attribute(key, value) for key, value in place.own.items())
        nodes[-1].output[0] = output
        if extra and place.bias is None:
            self._add(extra[0], nodes)
        return at, gone, nodes

    def _add(self, bias: str, nodes: list[onnx.NodeProto]) -> None:
        """A bias of floats behind a convolution of integers, in a shape of its own."""
        array, output = self.graph.array(bias), nodes[-1].output[0]
        rank = len(self.graph.initializers[nodes[next(i for i, node in enumerate(nodes) if node.op_type == "ConvInteger")].input[1]].dims)
        held = unused(self.model, f"{bias}/wide")
        self.arrays[held] = array.reshape(-1, *(1,) * (rank - 2))
        nodes[-1].output[0] = unused(self.model, f"{output}/product")
        nodes.append(helper.make_node("Add", [nodes[-1].output[0], held], [output], name=unused(self.model, f"{output}/shift")))

    def _maker(self, name: str, operator: str) -> onnx.NodeProto | None:
        """The node of that operator that makes a tensor, if one does and the float form brought it in or kept it."""
        node = self.graph.nodes[self.graph.producer[name]] if name in self.graph.producer else None
        return node if node is not None and node.op_type == operator else None

    def _end(self, index: int, place: Place) -> tuple[int, set[int], str, str] | None:
        """(node whose place the nodes take, nodes that go, the tensor that they make, a bias that is added)."""
        graph, node = self.graph, self.graph.nodes[index]
        uses = graph.uses.get(node.output[0], [])
        after = graph.nodes[uses[0].node] if len(uses) == 1 and uses[0].slot >= 0 and not graph.is_output(node.output[0]) else None
        if place.result is not None:
            ends = [name for name in place.result if name]
            if after is None or after.op_type != "QuantizeLinear" or list(after.input)[1:] != ends:
                return None
            return uses[0].node, {index, uses[0].node}, after.output[0], ""
        if place.added is not None and after is not None and after.op_type == "Add":
            other = after.input[1 - uses[0].slot]
            shape = graph.shape(node.output[0])
            if other in graph.initializers and graph.array(other).ndim == 1 and shape and graph.array(other).size == shape[-1]:
                return uses[0].node, {index, uses[0].node}, after.output[0], other
        return index, {index}, node.output[0], ""

    def _chain(self) -> None:
        """What makes floats of integers, before the first node that still wants them."""
        integer = {id(new) for nodes in self.new.values() for new in nodes}
        done: set[str] = set()
        for index in range(len(self.graph.nodes)):
            if index in self.gone and index not in self.new:
                continue
            for node in self.new.get(index, [self.graph.nodes[index]]):
                before: list[onnx.NodeProto] = []
                for slot, name in enumerate(node.input):
                    if name in self.grids and id(node) not in integer:
                        output, nodes = self._made(name, node, slot)
                        node.input[slot] = output
                        before += nodes if output not in done else []
                        done.add(output)
                if before:
                    self.new[index] = [*before, *self.new.get(index, [self.graph.nodes[index]])]

    def _made(self, name: str, node: onnx.NodeProto, slot: int) -> tuple[str, list[onnx.NodeProto]]:
        """The tensor that a node reads as floats, and the nodes that make it."""
        known = self.rules.chains.get(name, ())
        if not known:
            return self._fresh(name)
        wanted = self.rules.readers.get((node.output[0], slot)) if node.output else None
        output, nodes = next((item for item in known if item[0] == wanted), known[0])
        copies = [onnx.NodeProto.FromString(item.SerializeToString()) for item in nodes]
        renamed = {**self.names.get(name, {}), **({self.rules.copies[name]: name} if name in self.rules.copies else {})}
        for item in copies:
            item.input[:] = [renamed.get(old, old) for old in item.input]
        grid = self.grids[name]
        if grid.block is not None and grid.block[1] == 1:
            copies[0].attribute.remove(next(item for item in copies[0].attribute if item.name == "block_size"))
            copies[0].attribute.append(helper.make_attribute("block_size", 1))
        return output, copies

    def _fresh(self, name: str) -> tuple[str, list[onnx.NodeProto]]:
        """A DequantizeLinear, or Cast, Sub and Mul where the opset has none for such scales."""
        grid, output = self.grids[name], f"{name}/number"
        held = self.names.get(name, {})
        scale, zero = held.get(grid.scales, grid.scales), held.get(grid.zeros, grid.zeros)
        axes = [axis for axis, size in enumerate(grid.scale.shape) if size > 1]
        if not scale:
            scale = f"{name}/scale"
            self.arrays[scale] = grid.scale.reshape(-1) if axes else grid.scale.reshape(())
        plain = self._held_now(scale).ndim <= 1 and (not zero or self._held_now(zero).shape == self._held_now(scale).shape)
        if plain and len(axes) <= 1 and (not axes or self.graph.opset >= _PER_CHANNEL) and grid.block is None:
            values = {"axis": axes[0]} if axes else {}
            return output, [helper.make_node("DequantizeLinear", [name, scale, *([zero] if zero else [])], [output], name=output, **values)]
        kind = helper.np_dtype_to_tensor_dtype(grid.scale.dtype)
        wide = f"{name}/wide"
        self.arrays[wide] = grid.scale
        nodes = [helper.make_node("Cast", [name], [f"{name}/cast"], name=f"{name}/cast", to=kind)]
        if grid.zero.any():
            self.arrays[f"{name}/offset"] = grid.zero.astype(grid.scale.dtype)
            nodes.append(helper.make_node("Sub", [f"{name}/cast", f"{name}/offset"], [f"{name}/steps"], name=f"{name}/steps"))
        return output, [*nodes, helper.make_node("Mul", [nodes[-1].output[0], wide], [output], name=output)]

    def _held_now(self, name: str) -> NDArray[Any]:
        return self.arrays[name] if name in self.arrays else self._held(name)

    # -- what is stored ---------------------------------------------------------------------------------------------------

    def _store(self) -> None:
        stored = {item.name: item for item in self.model.graph.initializer}
        tensors = {
            name: numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name) for name, array in self.arrays.items()
        }
        for name, grid in self.grids.items():
            values, before = np.ascontiguousarray(grid.stored(self.graph.array(name))), self.originals.get(name)
            same = before is not None and before.data_type == grid.type and np.array_equal(numpy_helper.to_array(before), values)
            tensors[name] = before if before is not None and same else numpy_helper.from_array(values, name)
        for name, base in self.rules.copies.items():
            self._share(name, base, tensors)
        read = {name for node in self.model.graph.node for name in node.input}
        for name in read - set(stored) - set(tensors):
            if name in self.originals:
                tensors[name] = self.originals[name]
        constants = {node.output[0]: node for node in self.rules.source.graph.node if node.op_type == "Constant"}
        made = {name for node in self.model.graph.node for name in node.output}
        for name in sorted((read & set(constants)) - made - set(tensors)):
            self.model.graph.node.insert(0, constants[name])
        for name, tensor in tensors.items():
            if name in stored:
                said = stored[name].doc_string
                stored[name].CopyFrom(tensor)
                if said:
                    stored[name].doc_string = said
            else:
                self.model.graph.initializer.add().CopyFrom(tensor)
            for info in self.model.graph.input:
                if info.name == name:
                    info.type.tensor_type.elem_type = tensor.data_type

    def _share(self, name: str, base: str, tensors: dict[str, TensorProto]) -> None:
        """A copy that holds the same integers as the tensor that it was made from is that one again."""
        if (
            name in tensors
            and base in tensors
            and tensors[name].raw_data == tensors[base].raw_data
            and tensors[name].dims == tensors[base].dims
        ):
            for node in self.model.graph.node:
                node.input[:] = [base if old == name else old for old in node.input]
            del tensors[name]

    def _sweep(self) -> None:
        """What only the float form had, or what nobody reads any more, goes; the order of initializers is that of the file."""
        graph = self.model.graph
        outputs = {item.name for item in graph.output}
        before = Graph(self.rules.source)
        while True:
            read = {name for node in graph.node for name in node.input} | outputs
            read |= {name for node in graph.node for body in subgraphs(node) for name in captured(body)}
            idle = [node for node in graph.node if node.output and self.rules.made.issuperset(node.output) and not read & set(node.output)]
            for node in idle:
                graph.node.remove(node)
            if not idle:
                break
        order = {item.name: number for number, item in enumerate(self.rules.source.graph.initializer)}
        ours = set(before.uses) | set(self.rules.grids) | set(self.arrays) | set(self.grids) | set(self.graph.uses)
        kept = [item for item in graph.initializer if item.name in read or item.name not in ours]
        kept.sort(key=lambda item: order.get(item.name, len(order)))
        copies = [TensorProto.FromString(item.SerializeToString()) for item in kept]
        del graph.initializer[:]
        graph.initializer.extend(copies)
        made = {name for node in graph.node for name in node.output}
        infos = [onnx.ValueInfoProto.FromString(item.SerializeToString()) for item in graph.value_info if item.name in made]
        del graph.value_info[:]
        graph.value_info.extend(infos)


def _in_file(old: NDArray[Any], grid: Grid, before: NDArray[Any], values: NDArray[Any], now: Grid) -> NDArray[Any]:
    """Scales or zero points as the file holds them: in the shape of `old`, but for what was cut."""
    if values.size == 1:
        new = values
    elif now.block is not None:
        axis, block = now.block
        new = values.take(np.arange(0, values.shape[axis], block), axis)
        return new.astype(old.dtype)
    else:
        new = values
    long = [size for size in new.shape if size > 1] or [new.size]
    if old.size == 1 and new.size == 1:
        return new.reshape(old.shape).astype(old.dtype)
    places = [place for place, size in enumerate(old.shape) if size > 1]
    sizes = [size for size, was in zip(new.shape, before.shape, strict=True) if was > 1]
    if len(sizes) != len(places):
        return new.reshape(long).astype(old.dtype)
    shape = list(old.shape)
    for place, size in zip(places, sizes, strict=True):
        shape[place] = size
    return new.reshape(shape).astype(old.dtype)
