"""Weights that a file computes from stored numbers: stored as its layers read them.

Exporters that fold no constants write weights so whose parts stand in another order (PyTorch's gates of an LSTM) and those that are
normalised, standardised or scaled. A chain of nodes from stored numbers to a layer is computed once, and the result stored in place of what
it was made from. Chains that are mere changes of layout stay: every later step reads through them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from relief_onnx.aside import tensor_of
from relief_onnx.bodies import keep_only
from relief_onnx.datatypes import Kept
from relief_onnx.graph import FLOATS, Graph
from relief_onnx.layers import LAYER_OPERATORS
from relief_onnx.nodes import STANDARD
from relief_onnx.ordering import sort_nodes
from relief_onnx.recurrent_layers import is_bias, split_biases
from relief_onnx.session import Session

__all__ = ["rearranged"]

_COMPUTES = frozenset({
    "Slice", "Concat", "Split", "Gather", "Expand", "Tile",
    "Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Sum", "Mean", "MatMul", "Gemm",
    "Abs", "Ceil", "Clip", "Exp", "Floor", "Log", "Neg", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign",
    "Softmax", "Softplus", "Sqrt", "Tanh",
    "ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "ReduceSumSquare",
    "BatchNormalization", "InstanceNormalization", "LayerNormalization", "LpNormalization",
})  # fmt: skip
_VIEWS = frozenset({"Identity", "Unsqueeze", "Squeeze", "Reshape", "Transpose"})
_READERS = frozenset({*LAYER_OPERATORS, "LSTM", "GRU", "RNN"})


def rearranged(model: onnx.ModelProto) -> tuple[onnx.ModelProto, Callable[[onnx.ModelProto, Kept], onnx.ModelProto]] | None:
    """A pass (see `lowering`). It is undone where what is stored is still the same; else the file computes its own with fewer nodes."""
    graph = Graph(model)
    chains = {name: chain for name in _parameters(graph) if (chain := _chain(graph, name)) is not None}
    chosen = _complete(graph, chains)
    if not chosen or model.ir_version < 4:
        return None
    nodes = sorted(set().union(*(chains[name][0] for name in chosen)))
    sources = set().union(*(chains[name][1] for name in chosen))
    values = _computed(graph, nodes, chosen)
    if sum(value.size for value in values.values()) > sum(graph.array(name).size for name in sources):
        return None
    result = onnx.ModelProto()
    result.CopyFrom(model)
    new = {name: next(iter(chains[name][1])) if len(chains[name][1]) == 1 else name for name in chosen}
    new = {name: wanted if list(new.values()).count(wanted) == 1 else name for name, wanted in new.items()}
    for number in reversed(nodes):
        del result.graph.node[number]
    for node in result.graph.node:
        for slot, name in enumerate(node.input):
            node.input[slot] = new.get(name, name)
    kept = [item for item in model.graph.initializer if item.name not in sources]
    made = [tensor_of(value, new[name], *(graph.initializers[source] for source in chains[name][1])) for name, value in values.items()]
    del result.graph.initializer[:]
    result.graph.initializer.extend([*kept, *made])
    gone = {name for number in nodes for name in graph.nodes[number].output} | set(new.values())
    notes = [info for info in model.graph.value_info if info.name not in gone]
    del result.graph.value_info[:]
    result.graph.value_info.extend(notes)
    chosen_chains = tuple(_Chain(name, new[name], values[name], *chains[name]) for name in chosen)
    return split_biases(result), lambda edited, kept: _undone(edited, graph, chosen_chains)


@dataclass(frozen=True)
class _Chain:
    """What made `tensor` in the file: numbers of its nodes, and the stored floats. made: what has been stored instead, as `value`."""

    tensor: str
    made: str
    value: NDArray[Any]
    nodes: set[int]
    sources: set[str]


def _undone(model: onnx.ModelProto, before: Graph, chains: Sequence[_Chain]) -> onnx.ModelProto:
    """The model with the chains whose results nobody changed, in place of these; none that read sizes, which may be others now."""
    graph = Graph(model)
    read = {chain.tensor: {name for number in chain.nodes for name in before.nodes[number].input} for chain in chains}
    sized = {tensor for tensor, names in read.items() if any(_known(before, name) is not None for name in names)}
    changed = [chain for chain in chains if chain.tensor in sized or not _stored_still(graph, chain)]
    while more := [chain for chain in chains if chain not in changed and any(chain.sources & other.sources for other in changed)]:
        changed += more  # what they are made of would be stored beside what it became
    back = [chain for chain in chains if chain not in changed]
    if not back:
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    gone = {chain.made for chain in back} | {half for chain in back for half in _halves(graph, chain.made)}
    keep_only(result.graph.initializer, lambda item: item.name not in gone)
    keep_only(result.graph.node, lambda item: not gone.intersection(item.output))
    for node in result.graph.node:
        for chain in back:
            for slot in [slot for slot, name in enumerate(node.input) if name == chain.made]:
                node.input[slot] = chain.tensor
    stored = {item.name for item in result.graph.initializer}
    made = {name for node in result.graph.node for name in node.output}
    nodes = [before.nodes[number] for number in sorted(set().union(*(chain.nodes for chain in back)))]
    needed = [name for node in nodes for name in node.input if name and name not in stored | made]
    result.graph.initializer.extend(before.initializers[name] for name in dict.fromkeys(needed) if name in before.initializers)
    held = sorted({before.producer[name] for name in needed if name in before.producer} - set().union(*(chain.nodes for chain in back)))
    tensors = {chain.tensor for chain in back}
    first = next((place for place, node in enumerate(result.graph.node) if tensors.intersection(node.input)), 0)
    for place, node in enumerate([*(before.nodes[number] for number in held), *nodes], first):
        result.graph.node.insert(place, node)
    sort_nodes(result.graph.node)
    return result


def _halves(graph: Graph, made: str) -> list[str]:
    """Of a bias that is in two halves, these."""
    node = graph.nodes[graph.producer[made]] if made in graph.producer else None
    return list(node.input) if node is not None and is_bias(graph, node) else []


def _stored_still(graph: Graph, chain: _Chain) -> bool:
    """Whether the result of a chain is stored as it was when it was computed, and for nobody but the graph's nodes."""
    halves = _halves(graph, chain.made)
    parts = halves or [chain.made]
    if any(name not in graph.initializers or graph.is_output(name) for name in parts):
        return False
    if any(len(graph.uses.get(name, ())) != 1 for name in halves) or any(use.slot < 0 for use in graph.uses.get(chain.made, ())):
        return False
    value = np.concatenate([graph.array(name) for name in parts], axis=1) if halves else graph.array(chain.made)
    return value.shape == chain.value.shape and value.dtype == chain.value.dtype and value.tobytes() == chain.value.tobytes()


def _parameters(graph: Graph) -> list[str]:
    """What layers read that nodes make, but for their first input."""
    readers = (node for node in graph.nodes if node.op_type in _READERS and node.domain in STANDARD)
    made = {name for node in readers for name in node.input[1:] if name in graph.producer}
    return sorted(name for name in made if not is_bias(graph, graph.nodes[graph.producer[name]]))


def _chain(graph: Graph, tensor: str) -> tuple[set[int], set[str]] | None:
    """The nodes that compute a tensor from stored floats, and those of these with more than one entry; None where that is not so."""
    nodes, sources, pending = set[int](), set[str](), [tensor]
    while pending:
        name = pending.pop()
        if name in graph.initializers:
            sources |= {name} if graph.is_float(name) and np.prod(graph.initializers[name].dims) > 1 else set()
            continue
        if _known(graph, name) is not None:
            continue
        number = graph.producer.get(name)
        node = None if number is None else graph.nodes[number]
        if node is None or number is None or node.domain not in STANDARD or node.op_type not in _COMPUTES | _VIEWS | {"Constant"}:
            return None
        if node.op_type != "Constant":
            nodes.add(number)
            pending += [item for item in node.input if item]
    computes = any(graph.nodes[number].op_type in _COMPUTES for number in nodes)
    return (nodes, sources) if sources and computes else None


def _known(graph: Graph, name: str) -> NDArray[np.int64] | None:
    """Numbers that the graph computes from sizes which the file says (PyTorch slices a joint projection by its width)."""
    values = graph.values(name) if graph.types.get(name, (0, None))[0] == onnx.TensorProto.INT64 else None
    whole = [entry.value for entry in values or ()]
    if not whole or graph.constant(name) is not None or None in whole:
        return None
    return np.array(whole, np.int64).reshape((-1,) * len(graph.shape(name) or ()))


def _complete(graph: Graph, chains: dict[str, tuple[set[int], set[str]]]) -> list[str]:
    """Tensors whose chains serve nothing else, so that nothing is stored twice."""
    chosen = dict(chains)
    while True:
        nodes = set[int]().union(*(own for own, _ in chosen.values()))
        ends = set(chosen)

        def serves(name: str, nodes: set[int] = nodes, ends: Collection[str] = ends) -> bool:
            inner = all(use.node in nodes for use in graph.uses.get(name, ()))
            return not graph.is_output(name) and (inner or (name in ends and all(use.slot >= 0 for use in graph.uses[name])))

        bad = {
            end
            for end, (own, sources) in chosen.items()
            if not all(serves(name) for number in own for name in graph.nodes[number].output if name)
            or any(use.node not in nodes or use.slot < 0 for name in sources for use in graph.uses[name])
            or any(graph.is_output(name) for name in sources)
        }
        if not bad:
            return sorted(chosen)
        chosen = {end: chain for end, chain in chosen.items() if end not in bad}


def _computed(graph: Graph, nodes: Collection[int], names: list[str]) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    """The tensors, computed from what is stored."""
    chosen = [graph.nodes[number] for number in sorted(nodes)]
    read = {name for node in chosen for name in node.input}
    held = [node for node in graph.nodes if node.op_type == "Constant" and node.output[0] in read]
    stored = [graph.initializers[name] for name in sorted(read & graph.initializers.keys())]
    kinds = {item.name: item.data_type for item in stored}
    made = {name for node in (*chosen, *held) for name in node.output}
    known = {name: values for name in sorted(read - made) if (values := _known(graph, name)) is not None}
    stored += [numpy_helper.from_array(values, name) for name, values in known.items()]
    floats = next(kind for kind in kinds.values() if kind in FLOATS)
    outputs = [helper.make_tensor_value_info(name, graph.types.get(name, (floats, None))[0], None) for name in names]
    model = helper.make_model(
        helper.make_graph([*held, *chosen], "chain", [], outputs, stored), opset_imports=graph.model.opset_import
    )  # fmt: skip
    model.ir_version = graph.model.ir_version
    return dict(zip(names, Session(model, 1, "the stored weights").run({}, names), strict=True))
