"""Which stored tensors are weights, which are running statistics, and which are neither: read off how nodes use them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from relief_onnx.aside import array_of
from relief_onnx.errors import ModelError
from relief_onnx.interpreter import elementwise
from relief_onnx.interpreter.table import TABLE
from relief_onnx.interpreter.values import FLOATS
from relief_onnx.nodes import STANDARD, subgraphs

__all__ = ["Roles", "all_initializers", "roles"]


@dataclass(frozen=True)
class Roles:
    """Names of the initializers that training changes: by gradients, and as running statistics."""

    weights: tuple[str, ...]
    statistics: tuple[str, ...]


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for body in subgraphs(node):
            yield from _graphs(body)


def all_initializers(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Initializers of the graph and of all bodies by name, without names that are used twice: they would not say which one is meant."""
    found = [item for graph in _graphs(model.graph) for item in graph.initializer]
    counts = Counter(item.name for item in found)
    return {item.name: item for item in found if counts[item.name] == 1}


def roles(model: onnx.ModelProto, opsets: Mapping[str, int], trainable: Collection[str] | None) -> Roles:
    """What training may change. By default a weight is a floating initializer that some node reads as data, and finite.

    A single number is none where its rank is 0 or only operators that work entry by entry read it: an epsilon, a factor, a mask's value.
    Raises ModelError where `trainable` names what is no weight.
    """
    stored = {name: item for name, item in all_initializers(model).items() if item.data_type in FLOATS}
    data, frozen, statistics, by_layers = set[str](), set[str](), set[str](), set[str]()
    for graph in _graphs(model.graph):
        data |= {item.name for item in graph.output}
        for node in graph.node:
            domain = "" if node.domain in STANDARD else node.domain
            row = TABLE.find(domain, node.op_type, opsets.get(domain, 1))
            for slot, name in enumerate(node.input):
                if row is None or slot in row.host | row.frozen:
                    frozen.add(name)
                else:
                    (statistics if slot in row.statistics else data).add(name)
                    if (domain, node.op_type) not in elementwise.ROWS.rows:
                        by_layers.add(name)
    kept = tuple(name for name in stored if name in statistics)
    if trainable is not None:
        for name in trainable:
            if name not in stored or name in statistics or name not in data:
                reason = (
                    "is a running statistic" if name in statistics else "is no floating initializer of its own name that is read as data"
                )
                raise ModelError(f"{name} cannot be trained: it {reason}; name weights as `relief-onnx inspect` lists them")
        return Roles(tuple(name for name in stored if name in set(trainable)), kept)
    found = [name for name, item in stored.items() if name in data - statistics and _is_weight(item, name in by_layers)]
    return Roles(tuple(found), kept)


def _is_weight(tensor: onnx.TensorProto, by_layer: bool) -> bool:
    """Whether a tensor that is read as data is trained by default; by_layer: by an operator that does not work entry by entry."""
    if not tensor.dims or (not by_layer and np.prod(tensor.dims) == 1):
        return False
    return bool(np.isfinite(array_of(tensor).astype(np.float32)).all())
