"""ScatterND where it writes a box into a tensor, as caches of streaming models are updated: how channels pass, and its cut.

Two forms. Indices name entries along leading axes (`cache[k] = new`), and channels are on axes behind them; or they name every single
entry of a regular box, one coordinate for each axis (as PyTorch writes `cache[:, :, a:b] = new`), and take all channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper
from onnx.reference import ReferenceEvaluator

from relief_onnx.graph import Graph, attributes
from relief_onnx.moves import UNTRACKED, Barrier, Picture, Together, dims_of, long_axes
from relief_onnx.nodes import STANDARD, subgraphs

__all__ = ["fewer_places", "scatter_nd"]

# Indices are computed once for a graph; more numbers than that are not looked at.
_LARGEST = 1 << 22
_COMPUTED: WeakKeyDictionary[Graph, dict[str, NDArray[Any] | None]] = WeakKeyDictionary()


def scatter_nd(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture | Together]:
    """What is written and what it is written into have the same channels."""
    data, updates = pictures
    if attributes(node).get("reduction", "none") not in ("none", b"none"):
        raise Barrier("it does not replace what is there")
    indices = dims_of(graph, node.input[1])
    depth, lead = indices[-1].value, len(indices) - 1
    if depth is None:
        raise Barrier("how many axes it writes along is not known")
    if lead == data.ndim == depth:
        lifted = updates
        tracked = sorted({*long_axes(data), *long_axes(updates)})
        if tracked:
            _whole_box(graph, node, tracked)
    else:
        if any(updates.shape[axis] > 1 for axis in range(lead)) or any(data.shape[axis] > 1 for axis in range(depth)):
            raise Barrier("it writes along a tracked axis", [axis for axis in long_axes(data) if axis < depth])
        lifted = updates.reshape((*(1,) * depth, *updates.shape[lead:]))
    shape = np.broadcast_shapes(data.shape, lifted.shape)
    if max(shape, default=1) == 1:
        return [np.where(data == lifted, data, UNTRACKED) if data.dtype.kind in "iu" else data]
    return [Together(np.stack([np.broadcast_to(data, shape), np.broadcast_to(lifted, shape)]))]


def _whole_box(graph: Graph, node: onnx.NodeProto, tracked: Sequence[int]) -> NDArray[Any]:
    """The indices, where they are a regular box that takes all of the tracked axes."""
    found = _computed(graph, node.input[1])
    if found is None:
        raise Barrier("where it writes is computed at run time", tracked)
    sizes = [size.value for size in dims_of(graph, node.input[0])]
    for axis in range(found.shape[-1]):
        line = np.moveaxis(found[..., axis], axis, 0)
        own = line.reshape(len(line), -1)
        if (own != own[:, :1]).any():
            raise Barrier("where it writes is no regular box", tracked)
        if axis in tracked and not np.array_equal(own[:, 0], np.arange(sizes[axis] or 0)):
            raise Barrier("it writes some of the channels", tracked)
    return found


def fewer_places(graph: Graph, node: onnx.NodeProto, axis: int, keep: NDArray[np.bool_]) -> NDArray[np.int64] | None:
    """The indices of a node after a cut along that axis of what it writes into; None where they stay as they are."""
    found = dims_of(graph, node.input[1])
    if not len(found) - 1 == len(dims_of(graph, node.input[0])) == found[-1].value:
        return None
    whole = _whole_box(graph, node, [axis])
    left = whole.compress(keep, axis).astype(np.int64)
    left[..., axis] = np.arange(int(keep.sum())).reshape([-1 if i == axis else 1 for i in range(left.ndim - 1)])
    return left


def _computed(graph: Graph, name: str) -> NDArray[Any] | None:
    """What constants make of a tensor; None where it depends on an input."""
    known = _COMPUTED.setdefault(graph, {})
    if name not in known:
        value = graph.constant(name)
        known[name] = _evaluated(graph, name) if value is None else value
    return known[name]


def _evaluated(graph: Graph, name: str) -> NDArray[Any] | None:
    size = np.prod([size.value or _LARGEST for size in dims_of(graph, name)], dtype=np.float64)
    wanted, todo = set[int](), [name]
    stored: set[str] = set()
    while todo:
        tensor = todo.pop()
        if tensor in graph.initializers:
            stored.add(tensor)
        elif tensor not in graph.producer:
            return None
        elif graph.producer[tensor] not in wanted:
            node = graph.nodes[graph.producer[tensor]]
            if node.domain not in STANDARD or any(subgraphs(node)):
                return None
            known = graph.values(tensor) if node.op_type == "Shape" else None
            if node.op_type == "Shape" and (known is None or any(entry.value is None for entry in known)):
                return None
            wanted.add(graph.producer[tensor])
            todo += [item for item in node.input if item] if node.op_type != "Shape" else []
    if size > _LARGEST:
        return None
    nodes = []
    for index in sorted(wanted):
        node = graph.nodes[index]
        if node.op_type == "Shape":  # a size that never changes
            value = np.array([entry.value for entry in graph.values(node.output[0]) or ()], np.int64)
            nodes.append(helper.make_node("Constant", [], list(node.output), value=onnx.numpy_helper.from_array(value)))
        else:
            nodes.append(node)
    body = helper.make_graph(nodes, "places", [], [onnx.ValueInfoProto(name=name)], [graph.initializers[item] for item in sorted(stored)])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", graph.opset)])
    values: Any = ReferenceEvaluator(model).run([name], {})
    return np.asarray(values[0])
