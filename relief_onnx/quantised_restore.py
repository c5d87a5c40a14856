"""A float model, cut or not, with the integers and the nodes of the quantised file that it came from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from relief_onnx.aside import array_of, tensor_of
from relief_onnx.datatypes import Kept
from relief_onnx.edits import unused
from relief_onnx.graph import Graph
from relief_onnx.grids import Grid
from relief_onnx.lifting import rename_in
from relief_onnx.nodes import captured, clear_blocks, clear_level, subgraphs
from relief_onnx.quantised_rows import Claim, Place
from relief_onnx.surgery import apply_weights

if TYPE_CHECKING:
    from relief_onnx.requantise import Requantise, Standing

__all__ = ["PER_CHANNEL", "write_back"]

# From this opset on DequantizeLinear has scales per channel.
PER_CHANNEL = 13


def write_back(rules: Requantise, model: onnx.ModelProto, kept: Kept) -> onnx.ModelProto:
    """The model in the form of the file. kept: rows and columns that surgery left of each weight."""
    return _Back(rules, model, kept).run()


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
        self.grids |= rules.new_biases(graph, self.grids)
        self.before = Graph(rules.source)
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
        for node in copies:
            clear_level(node)
            clear_blocks(node)
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
            masks = node.op_type == "Mul" and node.output[0] == f"{name}/masked" and node.input[1] == mask
            if masks and name not in known and name in graph.initializers and mask in graph.initializers:
                keep = graph.array(mask) != 0
                new[name] = np.where(keep, graph.array(name), np.zeros((), graph.array(name).dtype))
                renamed[node.output[0]] = name
        if not new:
            return
        self.model = apply_weights(self.model, new)
        kept = [node for node in self.model.graph.node if not (node.op_type == "Mul" and node.output[0] in renamed)]
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
        del self.model.graph.node[:]
        self.model.graph.node.extend(copies)
        rename_in(self.model.graph, renamed)
        for name in new:
            for field in (self.model.graph.initializer, self.model.graph.input):
                for item in [item for item in field if item.name == f"{name}/mask"]:
                    field.remove(item)

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
            value = self.before.constant(name)
        assert value is not None
        return value

    # -- nodes ------------------------------------------------------------------------------------------------------------

    def _fused(self, index: int, standing: Standing) -> tuple[int, set[int], list[onnx.NodeProto]] | None:
        """Where the nodes of the file go, what goes for them, and they themselves; None where what stands there is another thing now."""
        place, node = standing.place, self.graph.nodes[index]
        if node.op_type != place.operator:
            return None
        nodes = [onnx.NodeProto.FromString(item.SerializeToString()) for item in standing.nodes]
        main, inputs = nodes[standing.main], list(node.input)
        count = len(place.inputs) - (1 if place.added is not None and len(place.inputs) > 2 else 0)
        extra = inputs[count:]
        if len(inputs) < count or len(extra) > 1 or (extra and place.bias is None and not place.dynamic):
            return None
        given = list(main.input)
        for name, item, slots in zip(inputs, place.inputs, place.slots, strict=False):
            if not self._given(name, item, slots, place, given, [other for other in nodes if other is not main]):
                return None
        end = self._end(index, place)
        if end is None or (extra and place.bias is not None and extra[0] not in self.grids):
            return None
        at, gone, output, bias = end
        for slot, name in ((place.bias, extra[0] if extra else ""), (place.added, bias)):
            if slot is not None and (name or slot < len(given)):
                given += [""] * (slot + 1 - len(given))
                given[slot] = name or (given[slot] if slot == place.bias else "")
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

    def _given(
        self, name: str, item: str | tuple[str, str, str] | Claim, slots: tuple[int, ...], place: Place, given: list[str],
        others: list[onnx.NodeProto],
    ) -> bool:  # fmt: skip
        """Put one input of the float node into those of the integer node and its neighbours; whether that can be done."""
        renamed: dict[str, str] = {}
        if isinstance(item, Claim):
            if name not in self.grids:
                return False
            renamed = self.names.get(name, {})
            given[:] = [renamed.get(old, old) for old in given]
            given[item.slot] = name
        elif isinstance(item, tuple):
            made = self._maker(name, "DequantizeLinear")
            if made is None or (not place.dynamic and list(made.input)[1:] != [part for part in item[1:] if part]):
                return False
            given[slots[0]] = made.input[0]
            if place.dynamic:
                renamed = {item[1]: made.input[1]}
                given[2:3] = [made.input[2]] if len(made.input) > 2 else given[2:3]
        elif place.dynamic:
            made = self._maker(name, "DequantizeLinear")
            measured = self._maker(made.input[0], "DynamicQuantizeLinear") if made is not None else None
            if measured is None:
                return False
            given[slots[0]] = measured.input[0]
        else:
            given[slots[0]] = name
        for other in others:
            other.input[:] = [renamed.get(old, old) for old in other.input]
        return True

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
                for name in sorted({name for body in subgraphs(node) for name in captured(body)} & self.grids.keys()):
                    output, nodes = self._made(name, node, -1)
                    for body in subgraphs(node):
                        rename_in(body, {name: output})
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
        if plain and len(axes) <= 1 and (not axes or self.graph.opset >= PER_CHANNEL) and grid.block is None:
            values: dict[str, Any] = {"axis": axes[0]} if axes else {}
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
            name: tensor_of(np.ascontiguousarray(array).reshape(array.shape), name, self.originals.get(name))
            for name, array in self.arrays.items()
        }
        for name, grid in self.grids.items():
            values, before = np.ascontiguousarray(grid.stored(self.graph.array(name))), self.originals.get(name)
            same = before is not None and before.data_type == grid.type and np.array_equal(array_of(before), values)
            tensors[name] = before if before is not None and same else tensor_of(values, name, before, self.graph.initializers.get(name))
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
                if self.model.ir_version < 4 and not any(info.name == name for info in self.model.graph.input):
                    self.model.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
            for info in self.model.graph.input:
                if info.name == name:
                    info.CopyFrom(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))

    def _share(self, name: str, base: str, tensors: dict[str, TensorProto]) -> None:
        """A copy that holds the same integers as the tensor that it was made from is that one again."""
        if (
            name in tensors
            and base in tensors
            and tensors[name].dims == tensors[base].dims
            and tensors[name].data_type == tensors[base].data_type
            and np.array_equal(array_of(tensors[name]), array_of(tensors[base]))
        ):
            for node in self.model.graph.node:
                node.input[:] = [base if old == name else old for old in node.input]
            del tensors[name]

    def _sweep(self) -> None:
        """What only the float form had, or what nobody reads any more, goes; the order of initializers is that of the file."""
        graph = self.model.graph
        outputs = {item.name for item in graph.output}
        while True:
            read = {name for node in graph.node for name in node.input} | outputs
            read |= {name for node in graph.node for body in subgraphs(node) for name in captured(body)}
            idle = [node for node in graph.node if node.output and self.rules.made.issuperset(node.output) and not read & set(node.output)]
            for node in idle:
                graph.node.remove(node)
            if not idle:
                break
        order = {item.name: number for number, item in enumerate(self.rules.source.graph.initializer)}
        ours = set(self.before.uses) | set(self.rules.grids) | set(self.arrays) | set(self.grids) | set(self.graph.uses)
        kept = [item for item in graph.initializer if item.name in read or item.name not in ours]
        kept.sort(key=lambda item: order.get(item.name, len(order)))
        gone = {item.name for item in graph.initializer} - {item.name for item in kept}
        for info in [info for info in graph.input if info.name in gone]:
            graph.input.remove(info)
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
