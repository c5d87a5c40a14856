"""Moving the branch of an If that runs out into the main graph for working, and back into the branch afterwards.

`lift` leaves the If where it is: the branch that ran only hands on what its nodes, now in the main graph, make; the other branch is as it
was. So the model computes what it did whichever way the condition goes, and what crosses the border (outputs of the If, tensors that the
other branch reads) keeps its shape by the rules for bodies that every step knows anyway. `sink` is the way back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper

from relief_onnx import model as files
from relief_onnx.aside import array_of
from relief_onnx.graph import WEIGHT_TYPES, Graph
from relief_onnx.nodes import captured, mark_taken, subgraphs, taken_branch, unmark

if TYPE_CHECKING:
    from relief_onnx.lowering import Restore

__all__ = [
    "BRANCHES", "Lift", "body_of", "constant_of", "fixed_branches", "inline", "inlined", "lift", "names_in", "reads", "rename_in", "sink",
    "unused_name",
]  # fmt: skip

BRANCHES = ("then_branch", "else_branch")


@dataclass(frozen=True)
class Lift:
    """How a branch was moved: what `sink` needs. Tensors are named as in the model after the move.

    outputs: of the If. taken: the branch that was moved. documentation: of the If, before it was marked. outside: tensors that the main
    graph had before. constants: Constant nodes of the branch, by output. copies: weights that the other branch reads too, which has a
    copy of its own (by the copy's name) as long as the two differ. called: what nodes of the branch are called in the file that have
    another name here, since the main graph has one like it.
    """

    outputs: tuple[str, ...]
    taken: str
    documentation: str
    outside: frozenset[str]
    constants: Mapping[str, onnx.NodeProto]
    copies: Mapping[str, str]
    called: Mapping[str, str]


def fixed_branches(model: onnx.ModelProto) -> tuple[onnx.ModelProto, Restore] | None:
    """A pass (see `lowering`): the branch in place of every If whose condition cannot change within the model's signature, for good."""
    known = inlined(model)
    if known is model:
        return None
    return files.prepare(known), lambda edited, kept: files.share_again(edited, known)


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its branch in place of every If whose condition cannot change, Constant nodes of floats as initializers."""
    while model.ir_version >= 4 and any(node.op_type == "If" for node in model.graph.node):
        graph = Graph(_unmarked(model))
        found = ((node, graph.values(node.input[0])) for node in model.graph.node if node.op_type == "If" and not taken_branch(node))
        fixed = next(((_key(node), values[0].coefficient) for node, values in found if values and not values[0].symbols), None)
        if fixed is None:
            break
        model = files.hoist(inline(model, fixed[0], BRANCHES[0 if fixed[1] else 1]))
    return model


def _unmarked(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without notes on branches that were moved: what follows from those is so on the data only."""
    if not any(taken_branch(node) for node in model.graph.node):
        return model
    result = _copy(model)
    for node in result.graph.node:
        if taken_branch(node):
            unmark(node, "")
    return result


def lift(model: onnx.ModelProto, output: str, taken: str) -> tuple[onnx.ModelProto, Lift]:
    """A copy of the model with the nodes of one branch of an If in the main graph.

    output: the If's first output. taken: "then_branch" or "else_branch".
    """
    result = _copy(model)
    node = _find(result, [output])
    assert node is not None
    outside = frozenset(_stored_or_made(result.graph))
    body, called = _moved_out(result, node, taken)
    names = _free_names(result, [f"{info.name}/out" for info in body.output])
    for slot, (info, name) in enumerate(zip(body.output, names, strict=True)):
        body.node.append(helper.make_node("Identity", [info.name], [name], name=f"{node.name or output}/out/{slot}"))
        info.name = name
    body_of(node, taken).CopyFrom(body)
    copies = _own_copies(result, body_of(node, BRANCHES[taken == BRANCHES[0]]))
    constants = {item.output[0]: _same(item) for item in result.graph.node if item.op_type == "Constant" and item.output[0] not in outside}
    record = Lift(tuple(node.output), taken, node.doc_string, outside, constants, copies, called)
    mark_taken(node, taken)
    return result, record


def inline(model: onnx.ModelProto, output: str, taken: str) -> onnx.ModelProto:
    """A copy of the model with one branch in place of an If, for good: where the other can never run."""
    result = _copy(model)
    graph = result.graph
    node = _find(result, [output])
    assert node is not None
    names = list(node.output)
    body, _ = _moved_out(result, node, taken)
    made = {name for item in graph.node for name in item.output}
    place = _place(graph, output)
    del graph.node[place]
    inner = [info.name for info in body.output]
    for source, name in zip(inner, names, strict=True):
        if name and source in made and inner.count(source) == 1:
            rename_in(graph, {source: name})
        elif name:
            graph.node.insert(place, helper.make_node("Identity", [source], [name], name=name))
            place += 1
    return result


def _moved_out(model: onnx.ModelProto, node: onnx.NodeProto, taken: str) -> tuple[onnx.GraphProto, dict[str, str]]:
    """Move nodes, initializers and type notes of a branch before its If.

    Returns what is left of the branch, its outputs, and what nodes that have a new name were called.
    """
    graph = model.graph
    body = onnx.GraphProto()
    body.CopyFrom(body_of(node, taken))
    body_of(node, taken).Clear()
    own, others = set(_stored_or_made(body)), names_in(graph)
    every = others | names_in(body)
    new = {name: unused_name(f"{node.name or _key(node)}/{name}", every) for name in sorted(own & others)}
    rename_in(body, new)
    called = _called_apart(body.node, {item.name for item in graph.node}, node.name or _key(node))
    place = _place(graph, _key(node))
    for number, item in enumerate(body.node):
        graph.node.insert(place + number, item)
    graph.initializer.extend(body.initializer)
    known = {info.name for info in (*graph.value_info, *graph.output)}
    typed = {info.name: info for info in (*body.value_info, *body.output) if info.type.WhichOneof("value") and info.name not in known}
    graph.value_info.extend(typed.values())
    del body.node[:], body.initializer[:], body.value_info[:]
    return body, called


def _called_apart(nodes: Iterable[onnx.NodeProto], taken: set[str], where: str) -> dict[str, str]:
    """Give nodes that are called like others a name of their own; by it, what they were called."""
    every = taken | {item.name for item in nodes}
    called = {}
    for item in nodes:
        if item.name in taken - {""}:
            name = unused_name(f"{where}/{item.name}", every)
            called[name], item.name = item.name, name
    return called


def _own_copies(model: onnx.ModelProto, other: onnx.GraphProto) -> dict[str, str]:
    """Give a branch that never ran copies of the weights that it shares with what runs: by the copy's name, the weight."""
    reads = captured(other)
    elsewhere = {name for item in model.graph.node for name in item.input}
    shared = [item for item in model.graph.initializer if item.name in reads & elsewhere and item.data_type in WEIGHT_TYPES]
    shared = [item for item in shared if int(np.prod(item.dims)) > 1]
    copies = dict(zip([item.name for item in shared], _free_names(model, [f"{item.name}/unrun" for item in shared]), strict=True))
    for item in shared:
        copy = model.graph.initializer.add()
        copy.CopyFrom(item)
        copy.name = copies[item.name]
    rename_in(other, copies)
    return {copy: name for name, copy in copies.items()}


def sink(model: onnx.ModelProto, record: Lift) -> onnx.ModelProto:
    """The way back: what was lifted, and what was added since and serves nothing else, is put into the branch."""
    result = _copy(model)
    graph = result.graph
    _drop_copies(result, record)
    node = _find(result, record.outputs)
    if node is None:
        return result  # nothing reads the If any more, so it went
    unmark(node, record.documentation)
    body = onnx.GraphProto()
    body.CopyFrom(body_of(node, record.taken))
    body_of(node, record.taken).Clear()
    moved = _movable(graph, record)
    left = [item for item in graph.node if _key(item) not in moved]
    read = reads(left) | {info.name for info in graph.output}
    stored = [item for item in graph.initializer if item.name not in record.outside | read]
    constants = [constant_of(record.constants[item.name], item) for item in stored if item.name in record.constants]
    made = {name for item in (*constants, *moved.values()) for name in item.output}
    nodes = [*constants, *moved.values(), *_handing_on(body, made)]
    del body.node[:]
    body.node.extend(nodes)
    for item in body.node:
        if item.name in record.called:
            item.name = record.called[item.name]
    body.initializer.extend(item for item in stored if item.name not in record.constants)
    inside = made | {item.name for item in stored}
    body.value_info.extend(info for info in graph.value_info if info.name in inside - {info.name for info in body.output})
    body_of(node, record.taken).CopyFrom(body)
    _keep(graph.node, [_key(item) not in moved for item in graph.node])
    for field in (graph.initializer, graph.value_info):
        _keep(field, [item.name not in inside for item in field])
    return result


def _movable(graph: onnx.GraphProto, record: Lift) -> dict[str, onnx.NodeProto]:
    """Nodes, by first output, that were not in the main graph before and that only the branch needs, in order."""
    needed = {info.name for info in graph.output}
    found: dict[str, onnx.NodeProto] = {}
    for item in reversed(graph.node):
        if needed.isdisjoint(item.output) and record.outside.isdisjoint(item.output):
            found[_key(item)] = _same(item)
        else:
            needed |= reads([item])
    return dict(reversed(found.items()))


def _handing_on(body: onnx.GraphProto, made: set[str]) -> list[onnx.NodeProto]:
    """Of the nodes that hand on what the branch makes those that are still needed: where no node of the branch makes an output."""
    kept = []
    sources = [item.input[0] for item in body.node]
    for item, info in zip(body.node, body.output, strict=True):
        if item.input[0] in made and sources.count(item.input[0]) == 1:
            info.name = item.input[0]
        else:
            kept.append(_same(item))
    return kept


def _drop_copies(model: onnx.ModelProto, record: Lift) -> None:
    """The branch that never ran reads the weight itself again where that is what it was."""
    stored = {item.name: item for item in model.graph.initializer}
    content = {name: array_of(stored[name]).tobytes() for pair in record.copies.items() for name in pair if name in stored}
    pairs = ((copy, name) for copy, name in record.copies.items() if copy in stored and name in stored)
    alike = {copy: name for copy, name in pairs if content[copy] == content[name] and stored[copy].dims == stored[name].dims}
    for item in model.graph.node:
        for inner in subgraphs(item):
            rename_in(inner, alike)
    _keep(model.graph.initializer, [item.name not in alike for item in model.graph.initializer])


def constant_of(node: onnx.NodeProto, value: onnx.TensorProto) -> onnx.NodeProto:
    """The Constant node with another value; its tensor keeps the name that it had."""
    result = _same(node)
    for item in result.attribute:
        if item.name == "value":
            name = item.t.name
            item.t.CopyFrom(value)
            item.t.name = name
    return result


# -- small parts ----------------------------------------------------------------------------------------------------------


def body_of(node: onnx.NodeProto, name: str) -> onnx.GraphProto:
    """One of a node's bodies, by the attribute's name."""
    found: onnx.GraphProto = next(item.g for item in node.attribute if item.name == name)
    return found


def names_in(graph: onnx.GraphProto) -> set[str]:
    """Every tensor that is named in a graph and its bodies."""
    found = {item.name for field in (graph.input, graph.output, graph.initializer, graph.value_info) for item in field}
    for node in graph.node:
        found |= {*node.input, *node.output}
        for inner in subgraphs(node):
            found |= names_in(inner)
    return found - {""}


def _stored_or_made(graph: onnx.GraphProto) -> Iterator[str]:
    yield from (item.name for item in graph.input)
    yield from (item.name for item in graph.initializer)
    yield from (name for node in graph.node for name in node.output if name)


def reads(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """What nodes and their bodies read from the graph around them."""
    found: set[str] = set()
    for node in nodes:
        found |= {name for name in node.input if name}
        for inner in subgraphs(node):
            found |= captured(inner)
    return found


def rename_in(graph: onnx.GraphProto, new: Mapping[str, str]) -> None:
    """Rename tensors in a graph and all its bodies."""
    if not new:
        return
    for field in (graph.input, graph.initializer, graph.value_info, graph.output):
        for item in field:
            item.name = new.get(item.name, item.name)
    for node in graph.node:
        for field in (node.input, node.output):
            for slot, name in enumerate(field):
                field[slot] = new.get(name, name)
        for inner in subgraphs(node):
            rename_in(inner, new)


def _find(model: onnx.ModelProto, outputs: Sequence[str]) -> onnx.NodeProto | None:
    return next((item for item in model.graph.node if item.op_type == "If" and not set(outputs).isdisjoint(item.output)), None)


def _key(node: onnx.NodeProto) -> str:
    """The first output that has a name: no other node has it."""
    return next((name for name in node.output if name), "")


def _place(graph: onnx.GraphProto, output: str) -> int:
    return next(number for number, item in enumerate(graph.node) if output in item.output)


def unused_name(name: str, taken: set[str]) -> str:
    """That name, with a number where it is taken."""
    return name if name not in taken else next(f"{name}/{number}" for number in count(1) if f"{name}/{number}" not in taken)


def _free_names(model: onnx.ModelProto, wanted: Sequence[str]) -> list[str]:
    """Names that nothing in the model has."""
    taken, found = names_in(model.graph), list[str]()
    for name in wanted:
        found.append(unused_name(name, taken))
        taken.add(found[-1])
    return found


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(model)
    return result


def _same(node: onnx.NodeProto) -> onnx.NodeProto:
    result = onnx.NodeProto()
    result.CopyFrom(node)
    return result


def _keep(field: Any, flags: Sequence[bool]) -> None:
    """Delete the entries of a repeated field that have no flag."""
    for number in reversed(range(len(flags))):
        if not flags[number]:
            del field[number]
