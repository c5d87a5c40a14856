"""How many samples run at a time, so that what a model makes of them stays within bounds, whatever its size."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx
from onnx import helper

from relief_onnx.dataset import Batch
from relief_onnx.graph import Graph
from relief_onnx.replay import constant_nodes

__all__ = ["bytes_alive", "samples_at_once"]

# Activations of one model that may be there at the same time.
RUN_BYTES = 128 << 20
# What comparing an output takes beside it: copies in float64 of it, of its counterpart and of their differences.
COPIES = 16


def samples_at_once(model: onnx.ModelProto, sample: Batch, most: int) -> int:
    """At most `most`; `sample` says how large the sizes are that the model leaves open."""
    return int(max(1, min(most, RUN_BYTES * max(sample.size, 1) // max(bytes_alive(model, sample), 1))))


def bytes_alive(model: onnx.ModelProto, sample: Batch) -> int:
    """The most that tensors of the main graph take at the same time when it runs, and what comparing its outputs takes.

    Sizes that even the sample leaves open count as 1; what depends on no input is made once and for all, and does not count.
    """
    fed = onnx.ModelProto()
    fed.CopyFrom(model)
    for info in fed.graph.input:
        if info.name in sample.feed and info.type.HasField("tensor_type"):
            element = info.type.tensor_type.elem_type
            info.CopyFrom(helper.make_tensor_value_info(info.name, element, np.shape(sample.feed[info.name])))
    graph = Graph(fed)
    constant = constant_nodes(graph).keys()
    leaving: dict[int, int] = defaultdict(int)
    alive = most = 0
    for number, node in enumerate(graph.nodes):
        for name in node.output:
            size = 0 if name in constant else _bytes(graph, name)
            alive += size
            leaving[max((use.node for use in graph.uses.get(name, ())), default=number)] += size
        most = max(most, alive)
        alive -= leaving[number]
    return most + COPIES * sum(_bytes(graph, name) for name in graph.outputs)


def _bytes(graph: Graph, name: str) -> int:
    kind, shape = graph.types.get(name, (0, None))
    if not kind:
        return 0
    sizes = [size for size in shape or () if isinstance(size, int)]
    return int(np.prod(sizes, dtype=np.int64)) * helper.tensor_dtype_to_np_dtype(kind).itemsize
