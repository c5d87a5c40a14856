"""A fused node laid open: the standard operators that take its place, and whether an edited model still has them as they were.

A place knows its parts by node name. Edits between (masks, new biases, cuts) may change what parts read and emit; as long as the parts
are there and lead to each other, the fused node can be put back with whatever they read now.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from relief_onnx.aside import array_of
from relief_onnx.graph import Graph, attributes
from relief_onnx.moves import Barrier

__all__ = ["MAIN", "Edited", "Found", "Place", "Rewrite", "ordered"]

# The part that has the node's own name: the one with the weight, where there is one.
MAIN = ""


@dataclass
class Found:
    """A place in an edited model: `parts` as they are now, by role; `node` is the fused node in the making.

    biases: constants that were added to what a part emits, by its role. constants: the graph's stored tensors. new: tensors to store.
    """

    node: onnx.NodeProto
    parts: dict[str, onnx.NodeProto]
    biases: dict[str, str]
    consumed: list[onnx.NodeProto]
    constants: dict[str, onnx.TensorProto]
    new: dict[str, NDArray[Any]] = field(default_factory=dict)
    before: list[onnx.NodeProto] = field(default_factory=list)
    after: list[onnx.NodeProto] = field(default_factory=list)

    def value(self, role: str, slot: int) -> NDArray[Any] | None:
        """The stored constant that a part reads now."""
        stored = self.constants.get(self.parts[role].input[slot])
        return None if stored is None else array_of(stored)

    def set(self, name: str, value: Any) -> None:
        """Set an attribute of the fused node."""
        made = helper.make_attribute(name, value)
        old = next((item for item in self.node.attribute if item.name == name), None)
        if old is None:
            self.node.attribute.append(made)
        else:
            old.CopyFrom(made)


@dataclass(frozen=True)
class Rewrite:
    """Nodes of an edited model that go, the nodes that stand for them, and new stored tensors."""

    gone: Sequence[onnx.NodeProto]
    nodes: Sequence[onnx.NodeProto]
    new: Mapping[str, NDArray[Any]]


class Place:
    """One fused node of `graph`, and the operators that take its place. Rows fill it with `op`; Barrier says why one cannot."""

    def __init__(self, graph: Graph, index: int, taken: set[str]) -> None:
        """`taken`: names of tensors and nodes that are not free; grows."""
        self.graph, self.node, self._taken = graph, graph.nodes[index], taken
        self.name, self.values = graph.names[index], attributes(graph.nodes[index])
        self.parts: dict[str, onnx.NodeProto] = {}
        self.constants: dict[str, NDArray[Any]] = {}
        self.free: set[tuple[str, int]] = set()  # own constants that may change: part and input
        self.slots: dict[int, tuple[str, int]] = {}  # inputs of the fused node that no part reads (yet): where they would be read
        self.copied: str | None = None  # the part whose attributes the fused node has too
        self.extra: dict[str, int] = {}  # what may be added to a part's output, as a constant: the input of the fused node that takes it
        self.rebuild: Callable[[Place, Found], bool] = lambda place, found: True
        self.otherwise: tuple[Callable[[Place, Edited], Rewrite | None], ...] = ()  # where the fused node cannot be put back

    # -- what rows ask and say -----------------------------------------------------------------------------------------------

    def input(self, slot: int) -> str:
        """An input's name, or nothing."""
        return str(self.node.input[slot]) if slot < len(self.node.input) else ""

    def is_read(self, slot: int) -> bool:
        """Whether anybody reads that output."""
        name = self.output(slot)
        return bool(name) and (bool(self.graph.uses.get(name)) or self.graph.is_output(name))

    def output(self, slot: int) -> str:
        """An output's name, or nothing."""
        return str(self.node.output[slot]) if slot < len(self.node.output) else ""

    def rank(self, slot: int) -> int | None:
        """Of an input; None where it is not known."""
        shape = self.graph.shape(self.input(slot))
        return None if shape is None else len(shape)

    def size(self, slot: int, axis: int) -> int:
        """Of an axis of an input; -1 where it is open."""
        size = (self.graph.shape(self.input(slot)) or {axis: -1})[axis]
        return size if isinstance(size, int) else -1

    def unused(self, wanted: str) -> str:
        """A name that nothing has yet."""
        while wanted in self._taken:
            wanted += "_"
        self._taken.add(wanted)
        return wanted

    def constant(self, role: str, value: NDArray[Any]) -> str:
        """A new stored tensor."""
        name = self.unused(f"{self.output(0)}/{role}")
        self.constants[name] = value
        return name

    def ints(self, role: str, *values: int) -> str:
        """A list of sizes or axes."""
        return self.constant(role, np.array(values, np.int64))

    def number(self, role: str, value: float, like: str) -> str:
        """A scalar of the element type of the tensor `like`."""
        element = self.graph.types.get(like, (onnx.TensorProto.FLOAT, None))[0] or onnx.TensorProto.FLOAT
        return self.constant(role, np.asarray(value, helper.tensor_dtype_to_np_dtype(element)))

    def op(self, role: str, operator: str, *inputs: str, output: str = "", outputs: int = 1, domain: str = "", **values: Any) -> Any:
        """A part; returns its output, or a list where it has several."""
        name = self.name if role == MAIN else self.unused(f"{self.name}/{role}")
        made = [output] if output else [self.unused(f"{self.output(0)}/{role or 'main'}{number or ''}") for number in range(outputs)]
        trimmed = list(inputs)
        while trimmed and not trimmed[-1]:
            trimmed.pop()
        self.parts[role] = helper.make_node(operator, trimmed, made, name=name, domain=domain, **values)
        return made[0] if outputs == 1 else made

    def axes(self, role: str, operator: str, x: str, *axes: int, **values: Any) -> str:
        """Squeeze, Unsqueeze, ReduceSum: axes are an input since opset 13."""
        if self.graph.opset < 13:
            return str(self.op(role, operator, x, axes=axes, **values))
        return str(self.op(role, operator, x, self.ints(f"{role}/axes", *axes), **values))

    def need(self, opset: int, what: str) -> None:
        """Raises Barrier where the model's standard operators are older."""
        if self.graph.opset < opset:
            raise Barrier(f"{what} needs opset {opset}")

    # -- the way back ---------------------------------------------------------------------------------------------------------

    def restored(self, model: Edited) -> Rewrite | None:
        """What to write for what stands in an edited model: the fused node where it can say that; None: leave all as it is."""
        found = self._find(model)
        if found is not None:
            return Rewrite(found.consumed, [*found.before, found.node, *found.after], found.new)
        return next((rewrite for make in self.otherwise if (rewrite := make(self, model)) is not None), None)

    def _find(self, model: Edited) -> Found | None:
        parts = {role: model.by_name.get(part.name) for role, part in self.parts.items()}
        whole = {role: part for role, part in parts.items() if part is not None}
        if len(whole) < len(parts) or not all(self._same(role, whole[role]) for role in whole):
            return None
        node = onnx.NodeProto()
        node.CopyFrom(self.node)
        found = Found(node, whole, {}, list(whole.values()), model.constants)
        outer: dict[str, str] = {}
        if not self._connected(model, found, outer) or not self._takes(found, outer) or not self._gives(model, found):
            return None
        if self.copied is not None:
            for item in whole[self.copied].attribute:
                found.set(item.name, helper.get_attribute_value(item))
        return found if self.rebuild(self, found) else None

    def _same(self, role: str, now: onnx.NodeProto) -> bool:
        part = self.parts[role]
        if (now.op_type, now.domain) != (part.op_type, part.domain) or len(now.output) != len(part.output):
            return False
        # A cut may write other sizes; who reads them back knows.
        loose = role == self.copied or part.op_type == "Split"
        return loose or {item.SerializeToString() for item in now.attribute} == {item.SerializeToString() for item in part.attribute}

    def _connected(self, model: Edited, found: Found, outer: dict[str, str]) -> bool:
        """Whether parts read each other as they did; notes what stands for each tensor from outside."""
        makers = {name: (role, slot) for role, part in self.parts.items() for slot, name in enumerate(part.output)}
        allowed = set(self.slots.values())
        for role, part in self.parts.items():
            now = found.parts[role]
            reads = [*part.input, *[""] * (len(now.input) - len(part.input))]
            if len(now.input) < len(part.input):
                return False
            for slot, (name, current) in enumerate(zip(reads, now.input, strict=True)):
                if name in makers:
                    if not self._leads(model, found, makers[name], current):
                        return False
                elif name in self.constants:
                    if (role, slot) not in self.free and not _equal(model.constants.get(current), self.constants[name]):
                        return False
                elif not name:
                    if current and (role, slot) not in allowed:
                        return False
                elif outer.setdefault(name, current) != current:
                    return False
        return True

    def _leads(self, model: Edited, found: Found, maker: tuple[str, int], current: str) -> bool:
        """Whether `current` is what a part emits, or that plus a constant."""
        role, slot = maker
        made = found.parts[role].output[slot]
        if current == made:
            return True
        add = model.producer.get(current)
        if add is None or add.op_type != "Add" or role not in self.extra or made not in add.input or role in found.biases:
            return False
        other = next((name for name in add.input if name != made), "")
        if other not in model.fixed:
            return False
        found.biases[role] = other
        found.consumed.append(add)
        return True

    def _takes(self, found: Found, outer: dict[str, str]) -> bool:
        """Give the fused node what the parts read now."""
        inputs = [outer.get(name, name) for name in self.node.input]
        wanted = {slot: found.parts[role].input[at] for slot, (role, at) in self.slots.items() if at < len(found.parts[role].input)}
        for role, slot in ((role, self.extra[role]) for role in found.biases):
            if slot < 0:
                return False
            wanted[slot] = found.biases[role]
        for slot, name in wanted.items():
            inputs += [""] * (slot + 1 - len(inputs))
            inputs[slot] = name
        found.node.input[:] = inputs
        return True

    def _gives(self, model: Edited, found: Found) -> bool:
        """Give it what the parts emit now; False where somebody else reads what it cannot emit."""
        makers = {name: (role, slot) for role, part in self.parts.items() for slot, name in enumerate(part.output)}
        given = set()
        for slot, name in enumerate(self.node.output):
            if name in makers:
                role, at = makers[name]
                found.node.output[slot] = found.parts[role].output[at]
                given.add(found.node.output[slot])
        inside = {id(node) for node in found.consumed}
        emitted = {name for node in found.consumed for name in node.output} - given
        return not any(name in model.outputs or any(id(node) not in inside for node in model.readers.get(name, ())) for name in emitted)


class Edited:
    """An index over a model that is edited: nodes by name, who makes and who reads each tensor, what is stored, what never changes."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = Graph(model)
        self.graph, self.nodes = graph, graph.nodes
        self.by_name = {node.name: node for node in graph.nodes if node.name}
        self.producer = {name: graph.nodes[index] for name, index in graph.producer.items()}
        # What the body of a node reads counts as read by that node.
        self.readers = {name: [graph.nodes[use.node] for use in uses] for name, uses in graph.uses.items()}
        self.outputs = frozenset(graph.outputs)
        self.constants = graph.initializers
        self.fixed = set(graph.initializers)
        for node in graph.nodes:
            if node.input and all(not name or name in self.fixed for name in node.input):
                self.fixed.update(node.output)


def _equal(stored: onnx.TensorProto | None, value: NDArray[Any]) -> bool:
    return stored is not None and bool(np.array_equal(array_of(stored), value))


def ordered(nodes: Sequence[onnx.NodeProto], reads: Callable[[onnx.NodeProto], Sequence[str]]) -> list[onnx.NodeProto]:
    """The nodes so that each comes after what it reads, otherwise in their order."""
    waiting, made = list(nodes), {name for node in nodes for name in node.output if name}
    result: list[onnx.NodeProto] = []
    while waiting:
        later = []
        for node in waiting:
            if any(name in made for name in reads(node)):
                later.append(node)
            else:
                result.append(node)
                made.difference_update(node.output)
        if len(later) == len(waiting):
            raise ValueError("the nodes read each other in a circle")
        waiting = later
    return result
