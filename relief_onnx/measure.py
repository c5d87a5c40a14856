"""Size and work of a model: parameters, and multiply-accumulates from the shapes of a real run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from relief_onnx.dataset import Batch
from relief_onnx.graph import FLOATS, Graph, Shape
from relief_onnx.layers import Layer, Plan, find
from relief_onnx.probes import instrument
from relief_onnx.session import Session

__all__ = ["Size", "layer_macs", "macs_of_layers", "measure"]


@dataclass(frozen=True)
class Size:
    """`params` and `nonzero_params` count the elements of floating point initializers; `macs` are those of one sample.

    `macs` is None where nothing was run and the model leaves sizes open other than the batch.
    """

    params: int
    nonzero_params: int
    macs: int | None


def measure(model: onnx.ModelProto, sample: Batch | None = None) -> Size:
    """Measure a (not packed) model; with `sample`, sizes that the model leaves open are those of its run."""
    graph = Graph(model)
    plan = find(graph)
    params = nonzero = 0
    for name, item in graph.initializers.items():
        if item.data_type in FLOATS:
            array = graph.array(name)
            params += array.size
            nonzero += int(np.count_nonzero(array))
    shapes = {name: shape for name, (_, shape) in graph.types.items()} if sample is None else _run_shapes(graph, plan, sample)
    works = [layer_macs(graph, layer, shapes) for layer in plan.layers]
    known = [work for work in works if work is not None]
    samples = 1 if sample is None else sample.size
    return Size(params, nonzero, round(sum(known) / samples) if len(known) == len(works) else None)


def _run_shapes(graph: Graph, plan: Plan, sample: Batch) -> dict[str, Shape | None]:
    """The shapes of what layers read and write, from running one sample."""
    tensors = {name for layer in plan.single().values() for name in (layer.input, graph.nodes[layer.node].output[0])}
    tensors |= {graph.nodes[index].input[0] for index in plan.recurrent()}
    probe = instrument(graph, sorted(tensors - {info.name for info in graph.inputs}))
    values = (
        Session(probe.model, 1, "the probe model", working=True).run(sample.feed, list(probe.taps.values()), sample.source)
        if probe.taps
        else []
    )
    shapes: dict[str, Shape | None] = {name: tuple(np.shape(value)) for name, value in zip(probe.taps, values, strict=True)}
    return shapes | {name: tuple(np.shape(value)) for name, value in sample.feed.items()}


def macs_of_layers(graph: Graph, plan: Plan, sample: Batch) -> dict[str, float]:
    """MACs of every layer by name, of one sample; of a layer whose sizes are not known even then, its number of weights."""
    shapes = _run_shapes(graph, plan, sample)
    found = {}
    for layer in plan.layers:
        work = layer_macs(graph, layer, shapes)
        found[layer.name] = float(np.prod(layer.view.shape)) if work is None else work / sample.size
    return found


def layer_macs(graph: Graph, layer: Layer, shapes: Mapping[str, Shape | None]) -> int | None:
    """A layer's multiply-accumulates: outputs times the weights that each reads; of a transposed convolution, inputs times weights.

    An open first axis counts as a batch of 1; None where another size is not known.
    """
    if layer.recurrent is not None:
        steps = _product((shapes.get(graph.nodes[layer.node].input[0]) or (None,))[:2])
        return None if steps is None else steps * int(np.prod(layer.view.shape))
    transposed = layer.geometry is not None and layer.geometry.transposed
    shape = shapes.get(layer.input if transposed else graph.nodes[layer.node].output[0])
    if not shape:
        return None
    outputs = _product(shape)
    weights = int(np.prod(layer.view.shape[1:]))
    if transposed:
        weights = layer.out_channels // layer.groups * int(np.prod(layer.view.shape[2:]))
    return None if outputs is None else outputs * weights


def _product(shape: Shape) -> int | None:
    """Numbers in a tensor; an open first axis counts as 1."""
    sizes = [size if isinstance(size, int) else (1 if axis == 0 else None) for axis, size in enumerate(shape)]
    known = [size for size in sizes if size is not None]
    return int(np.prod(known)) if len(known) == len(sizes) else None
