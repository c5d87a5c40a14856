"""A body of control flow as a model of its own, to be worked on like any other, and back again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import TensorProto, helper

from relief_onnx import model as files
from relief_onnx.graph import Graph
from relief_onnx.grids import RANGES
from relief_onnx.lifting import constant_of, names_in, rename_in, unused_name
from relief_onnx.nodes import STANDARD, captured, subgraphs
from relief_onnx.recurrent_layers import GATES

__all__ = [
    "BODIES",
    "Held",
    "Names",
    "Opened",
    "as_model",
    "as_stored",
    "bodies_of",
    "keep_only",
    "key_of",
    "opened",
    "put_back",
    "replace_all",
    "unique_bodies",
]

# Operators with bodies, and the attributes that hold them.
BODIES: Mapping[str, tuple[str, ...]] = {"Loop": ("body",), "Scan": ("body",), "If": ("then_branch", "else_branch")}

# Constant nodes that became initializers: by name, the place among the nodes and the node.
Held = Mapping[str, tuple[int, onnx.NodeProto]]


class Names:
    """The names that are taken in a whole model: bodies may not use a name of the graphs around them."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._taken = names_in(model.graph) | {node.name for node in model.graph.node}

    def free(self, wanted: str) -> str:
        """That name, with a number where it is taken; it is taken from now on."""
        name = unused_name(wanted, self._taken)
        self._taken.add(name)
        return name


@dataclass(frozen=True)
class Opened:
    """A body as a model. foreign: what it captures, which the model has as initializers and inputs. held: Constant nodes of the body."""

    model: onnx.ModelProto
    foreign: frozenset[str]
    held: Held


def bodies_of(node: onnx.NodeProto) -> dict[str, onnx.GraphProto]:
    """The bodies of an If, Loop or Scan by the attribute's name; empty for other nodes."""
    if node.op_type not in BODIES or node.domain not in STANDARD:
        return {}
    return {item.name: item.g for item in node.attribute if item.name in BODIES[node.op_type]}


def key_of(node: onnx.NodeProto) -> str:
    """The first output that has a name: no other node has it."""
    return next((name for name in node.output if name), "")


def opened(outer: Graph, body: onnx.GraphProto) -> Opened:
    """A body as a model of its own: float Constant nodes as initializers, what it captures as initializers and inputs behind its own."""
    model = _plain(outer.model, body)
    foreign = captured(body)
    before = [onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
    hoisted = files.hoist(model)
    left = {name for node in hoisted.graph.node for name in node.output}
    held = {node.output[0]: (place, node) for place, node in enumerate(before) if node.output and node.output[0] not in left}
    result = onnx.ModelProto()
    result.CopyFrom(hoisted)
    for name in sorted(foreign):
        if name in outer.initializers:
            result.graph.initializer.append(outer.initializers[name])
            continue
        element, shape = outer.types.get(name, (0, None))
        known = None if shape is None else [size if isinstance(size, int) else None for size in shape]
        result.graph.input.append(helper.make_tensor_value_info(name, element or TensorProto.FLOAT, known))
    return Opened(result, frozenset(foreign), held)


def as_model(outer: onnx.ModelProto, body: onnx.GraphProto) -> onnx.ModelProto:
    """A body as a model of its own, without what it captures: for the way back, which asks for no values or types."""
    return _plain(outer, body)


def _plain(outer: onnx.ModelProto, body: onnx.GraphProto) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.opset_import.extend(outer.opset_import)
    result.ir_version = outer.ir_version
    result.graph.CopyFrom(body)
    return result


def as_stored(model: onnx.ModelProto, foreign: Collection[str], body: onnx.GraphProto) -> None:
    """Write a model that `opened` made into the body, without what is captured."""
    inside = onnx.GraphProto()
    inside.CopyFrom(model.graph)
    keep_only(inside.initializer, lambda item: item.name not in foreign)
    keep_only(inside.input, lambda item: item.name not in foreign)
    body.CopyFrom(inside)


def put_back(body: onnx.GraphProto, held: Held) -> None:
    """Initializers that were Constant nodes as such again, where the body still has them."""
    stored = {item.name: item for item in body.initializer}
    for name, (place, node) in sorted(held.items(), key=lambda item: item[1][0]):
        if name in stored:
            readers = (number for number, item in enumerate(body.node) if name in _reads(item))
            body.node.insert(min(place, next(readers, place)), constant_of(node, stored[name]))
    keep_only(body.initializer, lambda item: item.name not in held)


def _reads(node: onnx.NodeProto) -> set[str]:
    return {*node.input, *(name for body in subgraphs(node) for name in captured(body))}


def unique_bodies(model: onnx.ModelProto, output: str) -> onnx.ModelProto:
    """A copy in which what the bodies of a node hold, at any depth, has names of its own: some of it will be moved out."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    node = next(item for item in result.graph.node if output in item.output)
    inner = list(_below(node))
    taken = names_in(result.graph)
    counts: dict[str, int] = {}
    for name in _written(result.graph):
        counts[name] = counts.get(name, 0) + 1
    for body, owner in inner:
        held = [item.name for item in body.initializer]
        held += [name for item in body.node if item.op_type == "Constant" for name in item.output]
        new = {}
        for name in held:
            if counts.get(name, 0) > 1:
                counts[name] -= 1
                new[name] = unused_name(f"{owner}/{name}", taken)
                taken.add(new[name])
        rename_in(body, new)
    return result


def _below(node: onnx.NodeProto) -> Iterable[tuple[onnx.GraphProto, str]]:
    for body in bodies_of(node).values():
        yield body, node.name or key_of(node)
        for child in body.node:
            yield from _below(child)


def _written(graph: onnx.GraphProto) -> Iterable[str]:
    """Every tensor that a graph and its bodies hold, are given or make, once for each place."""
    yield from (item.name for item in graph.input)
    given = {item.name for item in graph.input}
    yield from (item.name for item in graph.initializer if item.name not in given)
    for node in graph.node:
        yield from (name for name in node.output if name)
        for body in subgraphs(node):
            yield from _written(body)


# Where a tensor of the main graph was put: its place there, and the way down, attributes and first outputs of nodes in turn.
Sunk = Mapping[str, tuple[int, tuple[str, ...]]]


def sunk(model: onnx.ModelProto, output: str, foreign: Collection[str] = ()) -> tuple[onnx.ModelProto, Sunk]:
    """A copy in which stored tensors that only one body within a node reads are in that body, where any body of the node has nodes whose
    weights are rewritten: what is captured cannot be. foreign: what the model, itself a body, captures, and so cannot give away.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    node = next(item for item in result.graph.node if output in item.output)
    integers = {item.name for item in result.graph.initializer if item.data_type in RANGES}
    if not any(_hides(child, integers) for child in _within(node)):
        return result, {}
    read = [name for item in result.graph.node for name in item.input] + [item.name for item in result.graph.output]
    read += [name for item in result.graph.node if item is not node for body in subgraphs(item) for name in captured(body)]
    found: dict[str, tuple[int, tuple[str, ...]]] = {}
    for place, item in enumerate(result.graph.initializer):
        reached = _down(node, item.name) if item.name not in read and item.name not in foreign else None
        if reached is not None:
            body, way = reached
            found[item.name] = place, way
            body.initializer.append(item)
    keep_only(result.graph.initializer, lambda item: item.name not in found)
    return result, found


def risen(graph: onnx.GraphProto, node: onnx.NodeProto, tensors: Sunk) -> None:
    """Undo `sunk` in the main graph, for what its body still has."""
    for name, (place, way) in sorted(tensors.items(), key=lambda item: item[1][0]):
        at, body = node, onnx.GraphProto()
        for attribute, output in zip(way[::2], (*way[1::2], ""), strict=True):
            body = bodies_of(at)[attribute]
            at = next((item for item in body.node if output and output in item.output), at)
        held = next((item for item in body.initializer if item.name == name), None)
        if held is not None:
            graph.initializer.insert(min(place, len(graph.initializer)), held)
            body.initializer.remove(held)


def _within(node: onnx.NodeProto) -> Iterable[onnx.NodeProto]:
    for body in bodies_of(node).values():
        for child in body.node:
            yield child
            yield from _within(child)


def _hides(node: onnx.NodeProto, integers: Collection[str]) -> bool:
    """Whether a node's weights may be rewritten before they are looked at. integers: stored tensors of them around the bodies."""
    return (
        node.op_type in GATES
        or node.domain not in STANDARD
        or "Quantize" in node.op_type
        or "Integer" in node.op_type
        or node.op_type.startswith("QLinear")
        or (node.op_type == "Cast" and node.input[0] in integers)
    )


def _down(node: onnx.NodeProto, name: str) -> tuple[onnx.GraphProto, tuple[str, ...]] | None:
    """The innermost body that is alone in reading a tensor from the graph around the node, and the way; None where there are several."""
    bodies = [(key, body) for key, body in bodies_of(node).items() if name in captured(body)]
    if len(bodies) != 1:
        return None
    key, body = bodies[0]
    readers = [child for child in body.node if name in _reads(child)]
    if len(readers) == 1 and name not in readers[0].input and not any(item.name == name for item in body.output):
        deeper = _down(readers[0], name)
        if deeper is not None:
            return deeper[0], (key, key_of(readers[0]), *deeper[1])
    return body, (key,)


def replace_all(field: Any, items: Iterable[Any]) -> None:
    """Other entries for a repeated field, some of which may be its own."""
    copies = [type(item).FromString(item.SerializeToString()) for item in items]
    del field[:]
    field.extend(copies)


def keep_only(field: Any, wanted: Callable[[Any], bool]) -> None:
    """Delete the entries of a repeated field that are not wanted."""
    for number in reversed(range(len(field))):
        if not wanted(field[number]):
            del field[number]
