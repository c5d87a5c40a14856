"""The weights of LSTM, GRU and RNN nodes as layers, and their bias in two halves while we work.

W [directions, gates * hidden, features] reads what arrives, R [directions, gates * hidden, hidden] the state of the step before. Each
gate row is a neuron; the first half of B belongs to the rows of W, the second to those of R. So that each half can be masked, moved
and solved for by itself, `split_biases` stores them apart and a Concat puts them together; `join_biases` undoes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from relief_onnx.aside import array_of
from relief_onnx.edits import set_initializer, unused
from relief_onnx.graph import Graph, attributes
from relief_onnx.nodes import STANDARD, home_of
from relief_onnx.sources import Refusal, Source, trace_constant
from relief_onnx.views import View

__all__ = [
    "GATES",
    "WITHIN",
    "Recurrent",
    "describe",
    "idle_gates",
    "is_bias",
    "is_recurrent",
    "join_biases",
    "made",
    "own_half",
    "split_biases",
    "text",
    "whole_bias",
]

# Gate rows of each hidden unit: i o f c, z r h, and one.
GATES: Mapping[str, int] = {"LSTM": 4, "GRU": 3, "RNN": 1}
_FORGET = 2
WITHIN = "/halves"  # how the node that joins the halves of a bias is named


# The functions that the standard knows for gates, in lower case (see `recurrent_reads`).
ACTIVATION_NAMES = frozenset(
    ("sigmoid", "tanh", "relu", "affine", "leakyrelu", "thresholdedrelu", "scaledtanh", "hardsigmoid", "elu", "softsign", "softplus")
)  # fmt: skip


def text(value: Any) -> str:
    """An attribute that may be bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)


@dataclass(frozen=True)
class Recurrent:
    """What a layer is to its node: `part` "W" or "R", and the node's sizes.

    `resets`: the candidate rows of R read the state times the reset gate (GRU with linear_before_reset 0), so that each gate of each
    direction is a group of its own. `idle`: gates whose rows the node never looks at (of an LSTM with input_forget, which forgets what
    the input gate does not let in).
    """

    part: str
    directions: int
    gates: int
    hidden: int
    resets: bool = False
    idle: tuple[int, ...] = ()

    @property
    def groups(self) -> int:
        """Runs of rows that read the same numbers."""
        return 1 if self.part == "W" else self.directions * (self.gates if self.resets else 1)


def is_recurrent(node: onnx.NodeProto) -> bool:
    """Whether it is an LSTM, GRU or RNN of the standard."""
    return node.op_type in GATES and node.domain in STANDARD


def made(node: onnx.NodeProto) -> str:
    """The first output that a node has, which names what belongs to it."""
    return next((name for name in node.output if name), "")


def describe(graph: Graph, index: int, slot: int) -> tuple[Recurrent, View] | Refusal:
    """A node's W (slot 1) or R (slot 2) in the layout [directions * gates * hidden, inputs of a row]."""
    node = graph.nodes[index]
    sources = [trace_constant(graph, name) for name in node.input[1:3]]
    shapes = [source.view.shape for source in sources if isinstance(source, Source)]
    if len(shapes) < 2:
        return Refusal(f"W and R of {node.op_type} node {graph.names[index]} are not both stored")
    values, gates = attributes(node), GATES[node.op_type]
    if any(len(shape) != 3 for shape in shapes) or shapes[1][1] != gates * shapes[1][2] or shapes[0][:2] != shapes[1][:2]:
        return Refusal(f"W {list(shapes[0])} and R {list(shapes[1])} do not fit together")
    unknown = [name for item in values.get("activations", ()) if (name := text(item).lower()) not in ACTIVATION_NAMES]
    if unknown:
        return Refusal(f"its activation {unknown[0]} is not known")
    own = sources[slot - 1]
    assert isinstance(own, Source)
    resets = node.op_type == "GRU" and not values.get("linear_before_reset", 0)
    found = Recurrent("W" if slot == 1 else "R", shapes[0][0], gates, shapes[1][2], resets, idle_gates(node))
    return found, own.view.reshape(shapes[0][0] * shapes[0][1], own.view.shape[2])


def idle_gates(node: onnx.NodeProto) -> tuple[int, ...]:
    """Gates of a node whose rows nothing depends on."""
    return (_FORGET,) if node.op_type == "LSTM" and attributes(node).get("input_forget", 0) else ()


def is_bias(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a node puts the halves of a bias together."""
    return node.op_type == "Concat" and node.name == f"{node.output[0]}{WITHIN}" and len(node.input) == 2


def own_half(graph: Graph, index: int, part: str) -> tuple[str, bool] | None:
    """The initializer [directions, gates * hidden] with the bias of W's or R's rows, and whether other nodes read it; None without one.

    A mirror has its bias with the body of its home.
    """
    node = graph.nodes[index]
    name = node.input[3] if len(node.input) > 3 else ""
    joins = graph.nodes[graph.producer[name]] if name in graph.producer else None
    if joins is None or not is_bias(graph, joins):
        return None
    half, home = joins.input[0 if part == "W" else 1], graph.producer.get(home_of(node))
    others = [use for use in graph.uses[half] if use.slot >= 0 or use.node != home]
    return half, len(graph.uses[name]) > 1 or len(others) > 1 or half not in graph.initializers


def whole_bias(graph: Graph, index: int) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Biases of the rows of W and of R [directions, gates * hidden], zeros where the node has none; None where they are computed."""
    node, halves = graph.nodes[index], [own_half(graph, index, part) for part in "WR"]
    known = [graph.array(half[0]) for half in halves if half is not None and half[0] in graph.initializers]
    if len(known) < 2:
        rows = trace_constant(graph, node.input[1])
        if len(node.input) <= 3 or not node.input[3]:
            zeros = np.zeros(rows.view.shape[:2]) if isinstance(rows, Source) else None
            return None if zeros is None else (zeros, zeros)
        source = trace_constant(graph, node.input[3])
        if not isinstance(source, Source):
            return None
        value = source.view.apply(graph.array(source.name))
        known = np.split(value.reshape(len(value), -1), 2, axis=1)
    return known[0].astype(np.float64), known[1].astype(np.float64)


def split_biases(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which the halves of the biases of recurrent nodes are initializers of their own; nodes without biases get zeros."""
    if not any(is_recurrent(node) for node in model.graph.node):
        return model
    graph = Graph(model)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    joins: dict[int, onnx.NodeProto] = {}
    done: dict[str, str] = {}
    for index, node in enumerate(graph.nodes):
        if not is_recurrent(node) or any(isinstance(describe(graph, index, slot), Refusal) for slot in (1, 2)):
            continue
        name = node.input[3] if len(node.input) > 3 else ""
        source = trace_constant(graph, name) if name else None
        weight = trace_constant(graph, node.input[1])
        assert isinstance(weight, Source)
        if name and not isinstance(source, Source):
            continue
        if name in done:
            result.graph.node[index].input[3] = done[name]
            continue
        if isinstance(source, Source):
            value = source.view.apply(graph.array(source.name))
        else:
            value = np.zeros((weight.view.shape[0], 2 * weight.view.shape[1]), graph.array(weight.name).dtype)
        element = graph.types.get(node.input[1], (0, None))[0]  # what is stored may be of another type, before a Cast
        _split(result, index, name, value.astype(helper.tensor_dtype_to_np_dtype(element)) if element else value, joins, graph)
        done[name or f"#{index}"] = result.graph.node[index].input[3]
    if joins:
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in result.graph.node]
        del result.graph.node[:]
        for index, node in enumerate(nodes):
            result.graph.node.extend([joins[index], node] if index in joins else [node])
    return result


def _split(model: onnx.ModelProto, index: int, name: str, value: NDArray[Any], joins: dict[int, onnx.NodeProto], graph: Graph) -> None:
    node = model.graph.node[index]
    base = name or f"{node.input[1]}/bias"
    # The initializer gives its name to what the halves make, unless somebody else reads it.
    alone = name in graph.initializers and all(is_recurrent(graph.nodes[use.node]) and use.slot == 3 for use in graph.uses[name])
    if alone and not graph.is_output(name):
        remove_initializer(model, name)
        whole = name
    else:
        whole = unused(model, f"{base}/whole")
    halves = []
    for part, half in zip("WR", np.split(value, 2, axis=1), strict=True):
        halves.append(unused(model, f"{base}/{part}"))
        set_initializer(model, halves[-1], half)
    joins[index] = helper.make_node("Concat", halves, [whole], name=f"{whole}{WITHIN}", axis=1)
    inputs = [*node.input, *[""] * (4 - len(node.input))]
    inputs[3] = whole
    node.input[:] = inputs


def remove_initializer(model: onnx.ModelProto, name: str) -> None:
    """Take an initializer out, and its entry among the inputs that old files have."""
    for items in (model.graph.initializer, model.graph.input):
        for item in [item for item in items if item.name == name]:
            items.remove(item)


def join_biases(model: onnx.ModelProto, original: onnx.ModelProto) -> onnx.ModelProto:
    """Undo `split_biases`: one initializer again, of the original where nothing changed, none where it had none and all is 0."""
    graph = Graph(model)
    # What a body reads too is left to it (see `loops`).
    own = {name for name in graph.initializers if len(graph.uses.get(name, ())) == 1}
    joined = [node for node in graph.nodes if is_bias(graph, node) and own.issuperset(node.input)]
    if not joined:
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    stored = {item.name: item for item in original.graph.initializer}
    renamed: dict[str, str] = {}
    for node in joined:
        name, value = node.output[0], np.concatenate([graph.array(half) for half in node.input], axis=1)
        base = node.input[0].rpartition("/")[0]
        for half in node.input:
            remove_initializer(result, half)
        before = stored.get(base)
        if before is None and not value.any():
            renamed[name] = ""
        elif name != base and _is_there(graph, base, before, value):
            renamed[name] = base
        else:
            # What a node before made keeps its own name.
            taken = base in graph.initializers or base in graph.producer
            renamed[name] = name if taken else base
            set_initializer(result, renamed[name], value)
    nodes = [item for item in result.graph.node if not (is_bias(graph, item) and item.output[0] in renamed)]
    kept = [onnx.NodeProto.FromString(item.SerializeToString()) for item in nodes]
    del result.graph.node[:]
    result.graph.node.extend(kept)
    for node in result.graph.node:
        for slot, name in enumerate(node.input):
            node.input[slot] = renamed.get(name, name)
        while node.op_type in GATES and node.input and not node.input[-1]:
            node.input.pop()
    return result


def _is_there(graph: Graph, base: str, before: onnx.TensorProto | None, value: NDArray[Any]) -> bool:
    """Whether the model still has that value, stored under its name of the file or made of what is stored by a Cast."""
    if base in graph.initializers:
        return before is not None and _same(before, value)
    made = graph.constant(base)
    return made is not None and np.array_equal(made, value)


def _same(before: onnx.TensorProto, value: NDArray[Any]) -> bool:
    return np.array_equal(array_of(before), value)
