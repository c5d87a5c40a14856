"""Branches within bodies, made ready before layers are looked for there (see `loops`).

A condition that the signature decides is no branch (`folded`), as in the main graph. A body that never ran on the data gets copies of the
weights that it shares with what runs (`parted`), so that these can be pruned and it computes what it did; on the way back (`joined`) it
reads the weight itself again where nothing changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import onnx

from relief_onnx.aside import array_of
from relief_onnx.bodies import Names, as_stored, bodies_of, keep_only, key_of, opened, put_back, unique_bodies
from relief_onnx.exposed import Path
from relief_onnx.graph import WEIGHT_TYPES, Graph
from relief_onnx.lifting import inlined, rename_in
from relief_onnx.nodes import captured

__all__ = ["folded", "joined", "parted"]


def folded(model: onnx.ModelProto, output: str, ran: Mapping[Path, bool] | None = None) -> onnx.ModelProto:
    """A copy in which, within the bodies of a node, the branch stands in place of every If whose condition cannot change, for good.

    ran: the bodies of which it is known, by path, whether they ran; those that did not are left alone. None: fold everywhere.
    """
    result = unique_bodies(model, output)
    _fold(result, output, (), ran)
    return result


def _fold(model: onnx.ModelProto, output: str, path: Path, ran: Mapping[Path, bool] | None) -> bool:
    """Whether anything was there to fold; done in place."""
    node = next(item for item in model.graph.node if output in item.output)
    graph, found = Graph(model), False
    for name, body in bodies_of(node).items():
        own = (*path, output, name)
        if not any(bodies_of(child) for child in body.node) or not (ran is None or ran.get(own, True)):
            continue
        there = opened(graph, body)
        inner = inlined(there.model)
        inside = [_fold(inner, key_of(child), own, ran) for child in inner.graph.node if bodies_of(child) and key_of(child)]
        if inner is not there.model or any(inside):
            as_stored(inner, there.foreign, body)
            put_back(body, there.held)
            found = True
    return found


def parted(model: onnx.ModelProto, output: str, ran: Mapping[Path, bool]) -> tuple[onnx.ModelProto, Mapping[str, str]]:
    """A copy in which bodies of a node that never ran, at any depth, have copies of the float weights that others read too: one body its
    own, several one beside the weight.

    ran: by the path of a body, whether it did. Also, by the name of a copy, the weight.
    """
    result = unique_bodies(model, output)
    graphs = list(_graphs(result.graph, ran))
    running = [graph for graph, runs in graphs if runs]
    silent = [(graph, captured(graph)) for graph, runs in graphs if not runs]
    read = {name for graph in running for name in _read(graph)}
    names, copies = Names(result), dict[str, str]()
    for graph in running:
        for name, tensor in list(_held(graph)):
            readers = [body for body, known in silent if name in known]
            if readers and name in read and tensor.data_type in WEIGHT_TYPES and math.prod(tensor.dims) > 1:
                copy = (readers[0] if len(readers) == 1 else graph).initializer.add()
                copy.CopyFrom(tensor)
                copy.name = names.free(f"{name}/unrun")
                copies[copy.name] = name
    for body, _ in silent:
        rename_in(body, {name: copy for copy, name in copies.items()})
    return result, copies


def joined(model: onnx.ModelProto, copies: Mapping[str, str]) -> onnx.ModelProto:
    """Without the copies of `parted` that are still alike."""
    held = {name: tensor for graph, _ in _graphs(model.graph, {}) for name, tensor in _held(graph)}
    alike = {copy: name for copy, name in copies.items() if copy in held and name in held and _same(held[copy], held[name])}
    if not alike:
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for graph, _ in _graphs(result.graph, {}):
        keep_only(graph.initializer, lambda item: item.name not in alike)
    rename_in(result.graph, alike)
    return result


def _graphs(graph: onnx.GraphProto, ran: Mapping[Path, bool], path: Path = ()) -> Iterator[tuple[onnx.GraphProto, bool]]:
    """A graph and those within it, and whether each runs; of one that does not, nothing that is within."""
    runs = ran.get(path, True)
    yield graph, runs
    for node in graph.node if runs else ():
        for item in node.attribute:
            if item.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(item.g, ran, (*path, key_of(node), item.name))


def _held(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """What a graph stores, by name."""
    yield from ((item.name, item) for item in graph.initializer)
    nodes = (node for node in graph.node if node.op_type == "Constant")
    yield from ((node.output[0], item.t) for node in nodes for item in node.attribute if item.type == onnx.AttributeProto.TENSOR)


def _read(graph: onnx.GraphProto) -> Iterator[str]:
    """What nodes of a graph read themselves, and its outputs."""
    yield from (name for node in graph.node for name in node.input)
    yield from (item.name for item in graph.output)


def _same(one: onnx.TensorProto, other: onnx.TensorProto) -> bool:
    return one.dims == other.dims and one.data_type == other.data_type and array_of(one).tobytes() == array_of(other).tobytes()
