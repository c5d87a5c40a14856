"""States of the model that are caches: inputs that an output hands on, with new channels beside or in place of old ones.

A convolution that streams keeps its last frames: an input is joined with the new frame (Concat), and what is left of both is an output
of the same shape (Slice), or is written back into the input (ScatterND). Which axis of the cache has channels is tried out: the first
one along which some units could go.
"""

from __future__ import annotations

from dataclasses import replace

from relief_onnx.graph import FLOATS, Graph
from relief_onnx.layers import Plan
from relief_onnx.states import States, find_states, origins
from relief_onnx.walk import trace

__all__ = ["find_all_states"]


def find_all_states(graph: Graph, plan: Plan) -> States:
    """Inputs and outputs of the model that are states of recurrent nodes (see `states`), and caches."""
    found = find_states(graph, plan)
    given = {info.name for info in graph.inputs if graph.types.get(info.name, (0, None))[0] in FLOATS} - set(graph.outputs)
    widths = {size for layer in plan.layers for size in (layer.out_channels, layer.groups * layer.in_per_group) if size > 1}
    for output in graph.outputs:
        if output in found.outputs:
            continue
        for name in sorted(origins(graph, output, frozenset()) & given - set(found.inputs)):
            if graph.shape(name) is None or graph.shape(name) != graph.shape(output):
                continue
            for axis, size in enumerate(graph.shape(name) or ()):
                if size not in widths:
                    continue
                tried = replace(found, inputs={**found.inputs, name: axis}, outputs=found.outputs | {output})
                coupling = trace(graph, plan, tried)
                if coupling.pictures[name].shape[axis] > 1 and not set(coupling.line(name, axis).tolist()) <= coupling.pinned.keys():
                    found = tried
                    break
    return found
