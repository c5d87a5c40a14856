"""From a graph to a program: rows are looked up, attributes bound, constants computed, once and for all runs.

What cannot be run is refused here, before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx
import torch

from relief_onnx.errors import Unsupported
from relief_onnx.interpreter.program import ABSENT, Program, Step, Store
from relief_onnx.interpreter.registry import Mode, Row
from relief_onnx.interpreter.table import TABLE
from relief_onnx.interpreter.values import to_tensor
from relief_onnx.nodes import STANDARD, attributes, captured, subgraphs

__all__ = ["Builder", "Shared", "refusal", "row_of"]

INJECTED = ("outputs", "state", "opset", "updates")
# Attributes that say nothing about what is computed.
IGNORED = frozenset({"consumed_inputs"})


@dataclass
class Shared:
    """What the builders of a model and of its bodies have in common."""

    opsets: Mapping[str, int]
    variables: Mapping[str, tuple[bool, str]]  # initializers that training changes: is it a parameter, key
    register: Callable[[torch.Tensor], str]  # a constant into a buffer, for its key
    store: Store
    mode: Mode


def values_of(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes without bodies and what says nothing; text as str in lists too."""
    bodies = {item.name for item in node.attribute if item.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)}
    return {
        name: [part.decode() if isinstance(part, bytes) else part for part in value] if isinstance(value, list) else value
        for name, value in attributes(node).items()
        if name not in IGNORED | bodies
    }


def label_of(node: onnx.NodeProto) -> str:
    """A node's own name, or that of its first output."""
    return node.name or next((name for name in node.output if name), node.op_type)


def refusal(node: onnx.NodeProto, opset: int, reason: str = "") -> Unsupported:
    """The error for a node that cannot be run."""
    return Unsupported(
        f"node {label_of(node)}: operator {node.op_type} of domain {node.domain or 'ai.onnx'}, opset {opset}, cannot be run in torch"
        f"{' (' + reason + ')' if reason else ''}; use --repair least-squares, which needs no torch"
    )


def row_of(node: onnx.NodeProto, opsets: Mapping[str, int]) -> Row:
    """The row of a node. Raises Unsupported where there is none or the node asks for what the row does not do."""
    domain = "" if node.domain in STANDARD else node.domain
    opset = opsets.get(domain, 1)
    row = TABLE.find(domain, node.op_type, opset)
    if row is None:
        raise refusal(node, opset)
    values = values_of(node)
    unknown = sorted(name for name in values if name not in row.parameters)
    if unknown:
        raise refusal(node, opset, f"attribute {unknown[0]}")
    reason = row.check(values) if row.check is not None else None
    given = [slot for slot, name in enumerate(node.input) if name]
    if row.inputs is not None and given and given[-1] >= row.inputs:
        reason = f"input {given[-1]}"
    reason = next((f"input {slot}" for slot in given if slot in row.absent), reason)
    if reason is not None:
        raise refusal(node, opset, reason)
    return row


class Builder:
    """Makes the program of one graph; bodies have builders of their own, which ask the one around them for names."""

    def __init__(self, graph: onnx.GraphProto, shared: Shared, parent: Builder | None = None) -> None:
        self.graph, self.shared, self.parent = graph, shared, parent
        self.program = Program(shared.store)
        self.slots: dict[str, int] = {"": ABSENT}
        self.host_slots: dict[str, int] = {}
        self.known: dict[str, Any] = {}
        self.keys: dict[str, str] = {}
        self.captures: list[str] = []
        self.unused = self.program.slot()

    def build(self) -> Program:
        """The program. Raises Unsupported."""
        stored = {item.name for item in self.graph.initializer} | {item.values.name for item in self.graph.sparse_initializer}
        for item in self.graph.input:
            if item.name not in stored:
                self.slots[item.name] = self.program.slot()
                self.program.inputs.append(self.slots[item.name])
        needed = self._needed()
        read = {item.name for item in self.graph.output} | {name for node in needed for name in (*node.input, *_captured(node))}
        for tensor in self.graph.initializer:
            if tensor.name in read and tensor.name not in self.shared.variables:
                self.known[tensor.name] = to_tensor(tensor)
        for sparse in self.graph.sparse_initializer:
            self.known[sparse.values.name] = self._dense(sparse)
        for node in needed:
            self._add(node)
        self.program.outputs = [self._slot(item.name) for item in self.graph.output]
        self.program.finish()
        return self.program

    def _dense(self, sparse: onnx.SparseTensorProto) -> torch.Tensor:
        values, places = to_tensor(sparse.values), to_tensor(sparse.indices)
        flat = values.new_zeros(list(sparse.dims)).reshape(-1)
        if places.dim() == 2:
            strides = torch.ones(len(sparse.dims), dtype=torch.int64)
            strides[:-1] = torch.tensor(list(sparse.dims)[1:]).flip(0).cumprod(0).flip(0)
            places = places @ strides
        flat[places] = values
        return flat.reshape(list(sparse.dims))

    def _needed(self) -> list[onnx.NodeProto]:
        """The nodes that an output depends on."""
        wanted, kept = {item.name for item in self.graph.output}, []
        for node in reversed(self.graph.node):
            if wanted & set(node.output):
                kept.append(node)
                wanted |= {*node.input, *_captured(node)}
        return kept[::-1]

    def _find(self, name: str) -> Any:
        """The value of a constant of this graph or one around it; KeyError where it is none."""
        if name in self.known:
            return self.known[name]
        if self.parent is None or name in self.slots or name in self.shared.variables:
            raise KeyError(name)
        return self.parent._find(name)

    def is_known(self, name: str) -> bool:
        """Whether a name is the same in every run."""
        try:
            self._find(name)
        except KeyError:
            return not name
        return True

    def _slot(self, name: str) -> int:
        if name not in self.slots:
            self.slots[name] = self._new_slot(name)
        return self.slots[name]

    def _new_slot(self, name: str) -> int:
        program = self.program
        if name in self.shared.variables:
            slot = program.slot()
            program.loads.append((slot, *self.shared.variables[name]))
            return slot
        if self.is_known(name):
            value = self._find(name)
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                return program.slot(value)
            slot = program.slot()
            program.loads.append((slot, False, self._key(name)))
            return slot
        self.captures.append(name)
        slot = program.slot()
        program.outer.append(slot)
        return slot

    def _key(self, name: str) -> str:
        """The buffer of a floating constant; a body uses the one that the graph around it has."""
        if name not in self.known and self.parent is not None:
            return self.parent._key(name)
        if name not in self.keys:
            self.keys[name] = self.shared.register(self.known[name])
        return self.keys[name]

    def _host_slot(self, name: str) -> int:
        if name not in self.host_slots:
            self.host_slots[name] = self.program.slot(self._find(name).tolist())
        return self.host_slots[name]

    def _add(self, node: onnx.NodeProto) -> None:
        if node.op_type == "Constant" and node.domain in STANDARD and "value" in {item.name for item in node.attribute}:
            tensor = next(item.t for item in node.attribute if item.name == "value")
            self.known[node.output[0]] = to_tensor(tensor)
            return
        row = row_of(node, self.shared.opsets)
        call = self._bind(node, row)
        outer = self._bodies(node)
        if outer is not None:
            bodies, names = outer
            call = _with_bodies(call, bodies, len(node.input))
        else:
            names = []
        inputs = [*node.input, *names]
        if row.pure and outer is None and node.input and all(self.is_known(name) for name in inputs) and self._fold(node, row, call):
            return
        if not node.input and row.pure and outer is None and self._fold(node, row, call):
            return
        self.program.steps.append(self._step(node, row, call, inputs))

    def _step(self, node: onnx.NodeProto, row: Row, call: Callable[..., Any], inputs: Sequence[str]) -> Step:
        reads, waiting = [], []
        for slot, name in enumerate(inputs):
            host = slot in row.host and name
            if name and slot in row.host | row.either and self.is_known(name):
                reads.append(self._host_slot(name))
            else:
                reads.append(self._slot(name))
                waiting += [slot] if host else []
        if waiting:
            call = _with_host(call, tuple(waiting))
        if any(True for _ in subgraphs(node)):
            waiting = list(range(len(reads)))  # the nodes in the bodies bring values to one device themselves
        writes = []
        for name in node.output:
            self.slots[name or " "] = self.program.slot() if name else self.unused
            writes.append(self.slots[name or " "])
        return Step(call, tuple(reads), tuple(writes), f"node {label_of(node)} ({node.op_type})", tuple(waiting))

    def _bind(self, node: onnx.NodeProto, row: Row) -> Callable[..., Any]:
        """The row's function with attributes and whatever else it asks for."""
        opset = self.shared.opsets.get("" if node.domain in STANDARD else node.domain, 1)
        values = values_of(node)
        kept = [node.input[slot] for slot in row.statistics if slot < len(node.input)]
        updates = all(name in self.shared.variables for name in kept)
        offered = {"outputs": len(node.output), "state": self.shared.mode, "opset": opset, "updates": updates}
        values |= {name: offered[name] for name in INJECTED if name in row.asked}
        return partial(row.function, **values) if values else row.function

    def _fold(self, node: onnx.NodeProto, row: Row, call: Callable[..., Any]) -> bool:
        """Compute a node of constants; whether that worked (in a branch that is never taken it need not)."""
        values = [None if not name else self._find(name) for name in node.input]
        values = [value.tolist() if slot in row.host and value is not None else value for slot, value in enumerate(values)]
        try:
            with torch.no_grad():
                result = call(*values)
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False  # it raises again when it is run
        for name, value in zip(node.output, result if type(result) is tuple else (result,)):  # noqa: B905
            self.known[name] = value
        return True

    def _bodies(self, node: onnx.NodeProto) -> tuple[dict[str, tuple[Program, list[int]]], list[str]] | None:
        """The programs of a node's bodies, each with the places of what it captures in the list of all captured names."""
        graphs = {item.name: item.g for item in node.attribute if item.type == onnx.AttributeProto.GRAPH}
        if not graphs:
            return None
        bodies, names = {}, list[str]()
        for attribute, graph in graphs.items():
            inner = Builder(graph, self.shared, self)
            program = inner.build()
            names += [name for name in inner.captures if name not in names]
            bodies[attribute] = (program, [names.index(name) for name in inner.captures])
        return bodies, names


def _captured(node: onnx.NodeProto) -> set[str]:
    return {name for body in subgraphs(node) for name in captured(body)}


def _with_host(call: Callable[..., Any], slots: tuple[int, ...]) -> Callable[..., Any]:
    """A call whose inputs at those slots arrive as Python numbers."""

    def converted(*values: Any) -> Any:
        arguments = list(values)
        for slot in slots:
            arguments[slot] = arguments[slot].tolist()
        return call(*arguments)

    return converted


def _with_bodies(call: Callable[..., Any], bodies: Mapping[str, tuple[Program, list[int]]], inputs: int) -> Callable[..., Any]:
    """A call that gets its bodies as functions of their inputs; what they capture comes after the node's own inputs."""

    def bound(*values: Any) -> Any:
        outer = values[inputs:]
        runs = {name: partial(_run_body, program, [outer[place] for place in places]) for name, (program, places) in bodies.items()}
        return call(*values[:inputs], **runs)

    return bound


def _run_body(program: Program, outer: list[Any], *inputs: Any) -> list[Any]:
    return program.run(inputs, outer)
