"""What was added to a model to lay the bodies of a node open (see `loops`), and the way back: weights return to where they are from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
from numpy.typing import NDArray

from relief_onnx.aside import array_of, tensor_of
from relief_onnx.bodies import Held, Sunk, as_model, bodies_of, keep_only, key_of, put_back, risen
from relief_onnx.borders import Added, removed
from relief_onnx.lifting import rename_in
from relief_onnx.lowering import Lowered
from relief_onnx.nodes import captured, subgraphs, unmark

__all__ = ["Body", "Exposed", "Path", "conceal", "settled"]

# From the outside in: the first output of a node, the attribute that is its body, and so on.
Path = tuple[str, ...]


@dataclass
class Exposed:
    """What was added for a node to the graph around it, and to its bodies.

    output: the node's first one, in the file; home: the same, or what stands for it while we work. runs: by the path of a body (outputs of
    nodes and attributes, from the outside in) the tensor [runs] that holds a number of its own for each run. nodes: tensors of
    mirrors. moved: by the name of a weight, the body that it is from and its place there. images: whether convolutions read what may have
    another size in every run, which would not lie one after the other. sunk: what was the main graph's before.
    """

    output: str
    added: Added
    documentation: str = ""
    home: str = ""
    runs: dict[Path, str] = field(default_factory=dict)
    nodes: set[str] = field(default_factory=set)
    moved: dict[str, tuple[str, int]] = field(default_factory=dict)
    images: bool = False
    sunk: Sunk = field(default_factory=dict)
    bodies: dict[str, Body] = field(default_factory=dict)


@dataclass
class Body:
    """What was done to one body. lowered: what hid its weights (`lowering`), and the way back. inner: its own nodes with bodies, in order.
    marked: documentation of those without layers that run.
    """

    held: Held
    lowered: Lowered
    inner: list[Exposed] = field(default_factory=list)
    marked: dict[str, str] = field(default_factory=dict)


def conceal(model: onnx.ModelProto, record: Exposed) -> onnx.ModelProto:
    """The way back: without the mirrors, with every weight in the body that it is from unless something else reads it by now."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph, added = result.graph, record.added
    if _any_lowered(record):
        _fold_masks(graph, record.moved)
    node = next((item for item in graph.node if record.home in item.output and bodies_of(item)), None)
    gone = record.nodes | added.nodes
    described = gone | added.names
    keep_only(graph.node, lambda item: item is node or gone.isdisjoint(item.output))
    keep_only(graph.initializer, lambda item: item.name not in added.initializers)
    keep_only(graph.value_info, lambda item: item.name not in described - set(added.stacked.values()))
    if node is None:
        return result
    unmark(node, record.documentation)
    removed(node, added)
    bodies = bodies_of(node)
    _inward(graph, node, bodies, record)
    for name, own in reversed(record.bodies.items()):
        inside = as_model(result, bodies[name])
        for item in inside.graph.node:
            if key_of(item) in own.marked:
                unmark(item, own.marked[key_of(item)])
        for inner in reversed(own.inner):
            inside = conceal(inside, inner)
        if own.lowered.restores:
            inside = _in_form(inside, own, graph)
        put_back(inside.graph, own.held)
        bodies[name].CopyFrom(inside.graph)
    risen(graph, node, record.sunk)
    _once(graph, node)
    return result


def _once(graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
    """Take out of the bodies of a node what the graph around has under that name: the form of the file brings along what it reads."""
    stored = {item.name: item for item in graph.initializer}
    pending = list(bodies_of(node).values())
    while pending:
        body = pending.pop()
        keep_only(body.initializer, lambda item: stored.get(item.name) != item)
        pending += [inner for item in body.node for inner in subgraphs(item)]


def _in_form(inside: onnx.ModelProto, own: Body, around: onnx.GraphProto) -> onnx.ModelProto:
    """A body in the form of the file."""
    foreign = captured(inside.graph)
    inside.graph.initializer.extend(item for item in around.initializer if item.name in foreign)
    result = own.lowered.restored(inside)
    known = {item.name for item in around.initializer}
    keep_only(result.graph.initializer, lambda item: item.name not in known)
    return result


def settled(model: onnx.ModelProto, record: Exposed, flags: Mapping[str, NDArray[np.bool_]]) -> tuple[onnx.ModelProto, Exposed, list[str]]:
    """The model with values that the form of the file can hold, the record with the way back from there, and what changed besides.

    flags: by initializer, what stays.
    """
    bodies, notes = {}, list[str]()
    for name, own in record.bodies.items():
        model, lowered = own.lowered.settled(model, flags)
        inner = []
        notes += lowered.notes
        for item in own.inner:
            model, after, more = settled(model, item, flags)
            inner.append(after)
            notes += more
        bodies[name] = replace(own, lowered=lowered, inner=inner)
    return model, replace(record, bodies=bodies), notes


def _any_lowered(record: Exposed) -> bool:
    return any(own.lowered.restores or any(_any_lowered(inner) for inner in own.inner) for own in record.bodies.values())


def _fold_masks(graph: onnx.GraphProto, names: Collection[str]) -> None:
    """Masks of the masked model, multiplied in: the form of the file may have no room for another product."""
    stored = {item.name: item for item in graph.initializer}
    folded = [
        item for item in graph.node if item.op_type == "Mul" and list(item.output) == [f"{item.input[0]}/masked"] and item.input[0] in names
    ]
    masks, new = {item.input[1] for item in folded}, {item.output[0]: item.input[0] for item in folded}
    for item in folded:
        value, mask = (array_of(stored[name]) for name in item.input)
        stored[item.input[0]].CopyFrom(
            tensor_of(np.where(mask != 0, value, np.zeros((), value.dtype)), item.input[0], stored[item.input[0]])
        )
    keep_only(graph.node, lambda item: new.keys().isdisjoint(item.output))
    keep_only(graph.initializer, lambda item: item.name not in masks)
    rename_in(graph, new)


def _inward(graph: onnx.GraphProto, node: onnx.NodeProto, bodies: Mapping[str, onnx.GraphProto], record: Exposed) -> None:
    read = {name for item in graph.node for name in item.input} | {info.name for info in graph.output}
    read |= {name for item in graph.node if item is not node for inner in subgraphs(item) for name in captured(inner)}
    stored = {item.name: item for item in graph.initializer}
    back = {name: place for name, place in record.moved.items() if name in stored and name not in read}
    for name, (where, place) in sorted(back.items(), key=lambda item: item[1][1]):
        bodies[where].initializer.insert(place, stored[name])
    keep_only(graph.initializer, lambda item: item.name not in back)
