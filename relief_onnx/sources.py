"""Where a node's weight comes from: back from the node to the initializer, through operators that change only its layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from relief_onnx.graph import Graph, Use, attributes
from relief_onnx.views import View

__all__ = ["VIEW_OPERATORS", "Refusal", "Source", "readers", "trace_constant"]


@dataclass(frozen=True)
class Refusal:
    """Why a node's weight cannot be described as a layer."""

    reason: str


# Operators through which a weight may reach its node unchanged but for its layout: name -> (view, attributes, extra constants).
VIEW_OPERATORS: Mapping[str, Callable[[View, Mapping[str, Any], tuple[int, ...] | None], View]] = {
    "Identity": lambda view, values, extra: view,
    "Cast": lambda view, values, extra: view,
    "Transpose": lambda view, values, extra: view.transpose(*values.get("perm", range(len(view.shape))[::-1])),
    "Reshape": lambda view, values, extra: view.reshape(*_reshape_target(view, extra or ())),
    "Flatten": lambda view, values, extra: view.reshape(int(np.prod(view.shape[: values.get("axis", 1)])), -1),
    "Squeeze": lambda view, values, extra: view.reshape(*_squeezed(view, extra or values.get("axes"))),
    "Unsqueeze": lambda view, values, extra: view.reshape(*_unsqueezed(view, extra or values.get("axes", ()))),
}


def _reshape_target(view: View, target: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(view.shape[i] if size == 0 else size for i, size in enumerate(target))


def _squeezed(view: View, axes: Any) -> list[int]:
    rank = len(view.shape)
    drop = {axis % rank for axis in axes} if axes is not None else {i for i, size in enumerate(view.shape) if size == 1}
    return [size for i, size in enumerate(view.shape) if i not in drop]


def _unsqueezed(view: View, axes: Any) -> list[int]:
    rank = len(view.shape) + len(axes)
    new = {axis % rank for axis in axes}
    rest = iter(view.shape)
    return [1 if i in new else next(rest) for i in range(rank)]


@dataclass(frozen=True)
class Source:
    """Where a node's weight comes from: the initializer, the layout on the way, and the tensors between (the last one feeds the node)."""

    name: str
    view: View
    path: tuple[str, ...]


def trace_constant(graph: Graph, tensor: str) -> Source | Refusal | None:
    """Follow `tensor` back to its initializer; None where it is computed at run time."""
    path: list[str] = []
    while tensor not in graph.initializers:
        path.append(tensor)
        if tensor not in graph.producer:
            return None
        node = graph.nodes[graph.producer[tensor]]
        if node.op_type not in VIEW_OPERATORS or node.domain not in ("", "ai.onnx"):
            return None if not _all_constant(graph, node.input) else Refusal(f"it passes {node.op_type} before the node")
        tensor = node.input[0]
    view = View.of(tuple(graph.initializers[tensor].dims))
    for name in reversed(path):
        node = graph.nodes[graph.producer[name]]
        extra = graph.constant(node.input[1]) if len(node.input) > 1 and node.input[1] else None
        if len(node.input) > 1 and node.input[1] and extra is None:
            return Refusal(f"{node.op_type} before the node takes a shape that is computed at run time")
        target = None if extra is None else tuple(int(size) for size in np.asarray(extra).reshape(-1))
        view = VIEW_OPERATORS[node.op_type](view, attributes(node), target)
    return Source(tensor, view, tuple(reversed(path)))


def _all_constant(graph: Graph, names: Any) -> bool:
    pending, seen = [name for name in names if name], set()
    while pending:
        name = pending.pop()
        if name in seen or name in graph.initializers:
            continue
        seen.add(name)
        if name not in graph.producer:
            return False
        pending.extend(item for item in graph.nodes[graph.producer[name]].input if item)
    return True


def readers(graph: Graph, name: str) -> list[tuple[Use, str]]:
    """Every node that reads an initializer, looking through view operators; with the tensor that it reads."""
    found = []
    for use in graph.uses.get(name, []):
        node = graph.nodes[use.node]
        if use.slot == 0 and node.op_type in VIEW_OPERATORS and node.domain in ("", "ai.onnx"):
            found += readers(graph, node.output[0])
        else:
            found.append((use, name))
    return found
