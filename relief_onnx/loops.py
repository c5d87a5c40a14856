"""Layers inside bodies that run many times (Loop, Scan) or now and then (both branches of an If run): measured in place, not moved.

`expose` adds what such a layer reads to the node's outputs, over all iterations, and puts a *mirror* of the layer behind the node, in the
main graph: the same operator on the same weight, which nobody reads. The weight becomes an initializer of the main graph that mirror and
body share, so that scores, masks and zeros reach it like any other. `conceal` is the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from relief_onnx import model as files
from relief_onnx.graph import Graph
from relief_onnx.layers import Layer, find
from relief_onnx.lifting import constant_of, names_in, rename_in, unused_name
from relief_onnx.nodes import captured, mark_mirror, mark_taken, subgraphs, unmark
from relief_onnx.sources import Source, trace_constant

__all__ = ["BODIES", "Exposed", "conceal", "expose"]

# Operators with bodies, and the attributes that hold them.
BODIES: Mapping[str, tuple[str, ...]] = {"Loop": ("body",), "Scan": ("body",), "If": ("then_branch", "else_branch")}
_MIRRORED = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose"})


@dataclass
class Exposed:
    """What was added to a model: outputs of one node and of its bodies (all at the end), nodes and initializers of the main graph.

    sources: the body that each of the outputs is from. moved: by the name of a weight, the body that it is from, its place there and,
    where it was one, its Constant node.
    """

    output: str
    documentation: str = ""
    outputs: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    nodes: set[str] = field(default_factory=set)
    initializers: set[str] = field(default_factory=set)
    moved: dict[str, tuple[str, int, onnx.NodeProto | None]] = field(default_factory=dict)


def expose(model: onnx.ModelProto, output: str, bodies: Collection[str] | None = None) -> tuple[onnx.ModelProto, Exposed] | None:
    """A copy of the model with mirrors of the layers in the bodies of a node (by its first output); None where it has no such layer.

    bodies: those to look at, by attribute; None: all.
    """
    return _Work(_unique_bodies(model, output), output).run(bodies)


class _Work:
    def __init__(self, model: onnx.ModelProto, output: str) -> None:
        self.graph = Graph(model)
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self.node = next(item for item in self.model.graph.node if output in item.output)
        self.record = Exposed(output, self.node.doc_string)
        self.bodies = {item.name: item.g for item in self.node.attribute if item.name in BODIES[self.node.op_type]}
        self.names = names_in(self.model.graph) | {item.name for item in self.model.graph.node}
        self.added: list[onnx.NodeProto] = []
        self.stacked = self.node.op_type != "If"
        self.places = {item.name: place for own in self.bodies.values() for place, item in enumerate(own.initializer)}
        self.places |= {item.output[0]: place for own in self.bodies.values() for place, item in enumerate(own.node) if item.output}

    def run(self, bodies: Collection[str] | None) -> tuple[onnx.ModelProto, Exposed] | None:
        inner = {name: Graph(files.hoist(_as_model(self.graph, body))) for name, body in self.bodies.items()}
        plans = {name: find(graph) for name, graph in inner.items()}
        refused = {row.weight for plan in plans.values() for row in plan.skipped}
        chosen: list[tuple[str, Layer]] = []
        for name, plan in plans.items():
            for weight, layers in plan.by_weight().items():
                elsewhere = any(weight in graph.initializers and weight not in plans[other].by_weight() for other, graph in inner.items())
                if (
                    weight in refused
                    or elsewhere
                    or (bodies is not None and name not in bodies)
                    or not all(self._possible(inner[name], layer) for layer in layers)
                ):
                    refused.add(weight)
        for name, plan in plans.items():
            chosen += [(name, layer) for layer in plan.layers if layer.weight not in refused]
        if not chosen:
            return None
        lifted: dict[tuple[str, str], str] = {}
        for name, layer in chosen:
            key = name, layer.input
            if key not in lifted:
                lifted[key] = self._lift(inner[name], name, layer)
            self._mirror(inner[name], name, layer, lifted[key])
        place = next(number for number, item in enumerate(self.model.graph.node) if self.record.output in item.output)
        for number, item in enumerate(self.added, place + 1):
            self.model.graph.node.insert(number, item)
        self.record.nodes |= {name for item in self.added for name in item.output}
        mark_taken(self.node, "both")
        return self.model, self.record

    def _possible(self, graph: Graph, layer: Layer) -> bool:
        """Whether the mirror can be made: the operator is known, its input's axes too, and the weight's way to it needs no constants."""
        node, rank = graph.nodes[layer.node], len(graph.shape(layer.input) or ())
        source = trace_constant(graph, node.input[list(node.input).index(self._fed(graph, layer))])
        if layer.op not in _MIRRORED or rank == 0 or not isinstance(source, Source):
            return False
        plain = all(len([name for name in graph.nodes[graph.producer[name]].input if name]) == 1 for name in source.path)
        batch_first = layer.input_axis % rank != 0 or (layer.op == "MatMul" and rank == 1 and self.stacked)
        return plain and batch_first and graph.is_float(layer.input)

    @staticmethod
    def _fed(graph: Graph, layer: Layer) -> str:
        """What the layer's node reads as its weight: the weight itself, or the last tensor on its way."""
        found: str = next(name for name in graph.nodes[layer.node].input if name and name != layer.input)
        return found

    def _name(self, wanted: str) -> str:
        name = unused_name(wanted, self.names)
        self.names.add(name)
        return name

    def _lift(self, graph: Graph, body: str, layer: Layer) -> str:
        """Add what a layer reads to the outputs of the node and of its bodies; the name in the main graph."""
        element, shape = graph.types[layer.input]
        outer = self._name(f"{layer.input}/lifted")
        for name, own in self.bodies.items():
            inner = self._name(f"{layer.input}/lifted/{name}")
            if name == body:
                own.node.append(helper.make_node("Identity", [layer.input], [inner], name=inner))
            else:  # the branch that does not run has none of it
                sizes = [0, *(1 for _ in (shape or ())[1:])]
                sizes[layer.input_axis] = layer.groups * layer.in_per_group
                if layer.geometry is not None:
                    spans = zip(layer.geometry.kernel, layer.geometry.dilations, strict=True)
                    sizes[2:] = [1 + (size - 1) * step for size, step in spans]
                nothing = numpy_helper.from_array(np.zeros(sizes, helper.tensor_dtype_to_np_dtype(element)))
                own.node.append(helper.make_node("Constant", [], [inner], name=inner, value=nothing))
            own.output.append(helper.make_tensor_value_info(inner, element, None))
        expected = len(next(iter(self.bodies.values())).output) - 1 - (self.node.op_type == "Loop")
        self.node.output.extend(self._name(f"{outer}/unread") for _ in range(expected - len(self.node.output)))
        self.node.output.append(outer)
        self.record.outputs.append(outer)
        self.record.sources.append(body)
        for item in self.node.attribute:
            if item.name in ("scan_output_axes", "scan_output_directions"):
                item.ints.append(0)
        self.model.graph.value_info.append(helper.make_tensor_value_info(outer, element, None))
        return outer

    def _mirror(self, graph: Graph, body: str, layer: Layer, lifted: str) -> None:
        node = onnx.NodeProto()
        node.CopyFrom(graph.nodes[layer.node])
        fed = self._fed(graph, layer)
        data, slot = list(node.input).index(layer.input), list(node.input).index(fed)
        self._outward(graph, body, layer.weight)
        node.input[data] = self._flat(layer, lifted)
        node.input[slot] = self._way(graph, layer.weight, fed)
        bias = self._bias(graph, body, layer)
        del node.input[2:]
        if bias and layer.bias is not None and layer.bias.node == layer.node:
            node.input.append(bias)
        node.output[0] = self._name(f"{node.output[0]}/mirror")
        mark_mirror(node, self.record.output)
        self.added.append(node)
        if bias and layer.bias is not None and layer.bias.node != layer.node:
            after = self._name(f"{node.output[0]}/sum")
            self.added.append(helper.make_node("Add", [node.output[0], bias], [after], name=after))

    def _flat(self, layer: Layer, lifted: str) -> str:
        """Iterations as rows (Gemm) or samples (convolutions); MatMul takes them as one more axis."""
        if not self.stacked or layer.op == "MatMul":
            return lifted
        flat = self._name(f"{lifted}/rows")
        if layer.op == "Gemm":
            self.added.append(helper.make_node("Reshape", [lifted, self._ints(-1, layer.in_per_group)], [flat], name=flat))
            return flat
        sizes, rest, target = (self._name(f"{lifted}/{part}") for part in ("sizes", "rest", "target"))
        self.added += [
            helper.make_node("Shape", [lifted], [sizes], name=sizes),
            helper.make_node("Slice", [sizes, self._ints(2), self._ints(1 << 31)], [rest], name=rest),
            helper.make_node("Concat", [self._ints(-1), rest], [target], name=target, axis=0),
            helper.make_node("Reshape", [lifted, target], [flat], name=flat),
        ]
        return flat

    def _ints(self, *values: int) -> str:
        name = self._name("mirror/sizes")
        self.model.graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
        self.record.initializers.add(name)
        return name

    def _way(self, graph: Graph, weight: str, fed: str) -> str:
        """The weight as the layer reads it: through copies of the nodes on its way."""
        source = trace_constant(graph, fed)
        assert isinstance(source, Source)
        reached = weight
        for name in source.path:
            step = onnx.NodeProto()
            step.CopyFrom(graph.nodes[graph.producer[name]])
            step.input[0] = reached
            reached = step.output[0] = step.name = self._name(f"{name}/mirror")
            self.added.append(step)
        return reached

    def _bias(self, graph: Graph, body: str, layer: Layer) -> str:
        """The layer's bias where it is stored and nothing else reads it; else nothing."""
        if layer.bias is None or layer.bias.shared:
            return ""
        node = graph.nodes[layer.bias.node]
        if layer.bias.name not in node.input:
            return ""
        self._outward(graph, body, layer.bias.name)
        return layer.bias.name

    def _outward(self, graph: Graph, body: str, name: str) -> None:
        """Make a tensor that a body holds an initializer of the main graph."""
        own = self.bodies[body]
        for number in reversed(range(len(own.initializer))):
            if own.initializer[number].name == name:
                self.record.moved[name] = body, self.places[name], None
                del own.initializer[number]
        for number in reversed(range(len(own.node))):
            if own.node[number].op_type == "Constant" and own.node[number].output[0] == name:
                copy = onnx.NodeProto()
                copy.CopyFrom(own.node[number])
                self.record.moved[name] = body, self.places[name], copy
                del own.node[number]
        if name not in {item.name for item in self.model.graph.initializer}:
            self.model.graph.initializer.append(graph.initializers[name])


def _as_model(outer: Graph, body: onnx.GraphProto) -> onnx.ModelProto:
    """A body as a model of its own: what it captures as initializers and inputs."""
    result = onnx.ModelProto()
    result.opset_import.extend(outer.model.opset_import)
    result.ir_version = outer.model.ir_version
    result.graph.CopyFrom(body)
    for name in sorted(captured(body)):
        if name in outer.initializers:
            result.graph.initializer.append(outer.initializers[name])
            continue
        element, shape = outer.types.get(name, (0, None))
        known = None if shape is None else [size if isinstance(size, int) else None for size in shape]
        result.graph.input.append(helper.make_tensor_value_info(name, element or TensorProto.FLOAT, known))
    return result


def _unique_bodies(model: onnx.ModelProto, output: str) -> onnx.ModelProto:
    """A copy in which what the bodies of a node hold or make has names that nothing outside the body has: `expose` moves some of it out."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    node = next(item for item in result.graph.node if output in item.output)
    for body in [item.g for item in node.attribute if item.name in BODIES[node.op_type]]:
        inside = onnx.GraphProto()
        inside.CopyFrom(body)
        body.Clear()
        taken = names_in(result.graph)
        held = [item.name for item in inside.initializer]
        held += [name for item in inside.node if item.op_type == "Constant" for name in item.output]
        every = taken | names_in(inside)
        rename_in(inside, {name: unused_name(f"{node.name or output}/{name}", every) for name in held if name in taken})
        body.CopyFrom(inside)
    return result


def conceal(model: onnx.ModelProto, record: Exposed) -> onnx.ModelProto:
    """The way back: without the mirrors, with every weight in the body that it is from unless something else reads it by now."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    _keep_only(graph.node, lambda item: record.nodes.isdisjoint(item.output))
    _keep_only(graph.initializer, lambda item: item.name not in record.initializers)
    _keep_only(graph.value_info, lambda item: item.name not in record.nodes and item.name not in record.outputs)
    node = next((item for item in graph.node if record.output in item.output), None)
    if node is None:
        return result
    unmark(node, record.documentation)
    count = len(record.outputs)
    bodies = {item.name: item.g for item in node.attribute if item.name in BODIES[node.op_type]}
    for body in bodies.values():
        _without_last(body, count)
    first = list(node.output).index(record.outputs[0])
    del node.output[first:]
    while node.output and node.output[-1].endswith("/unread"):
        del node.output[-1]
    for item in node.attribute:
        if item.name in ("scan_output_axes", "scan_output_directions"):
            del item.ints[-count:]
    _inward(graph, node, bodies, record)
    return result


def _without_last(body: onnx.GraphProto, count: int) -> None:
    """Take off the last outputs, with the nodes that make them."""
    gone = {info.name for info in body.output[-count:]}
    del body.output[-count:]
    _keep_only(body.node, lambda item: gone.isdisjoint(item.output))


def _inward(graph: onnx.GraphProto, node: onnx.NodeProto, bodies: Mapping[str, onnx.GraphProto], record: Exposed) -> None:
    read = {name for item in graph.node for name in item.input} | {info.name for info in graph.output}
    read |= {name for item in graph.node if item is not node for inner in subgraphs(item) for name in captured(inner)}
    stored = {item.name: item for item in graph.initializer}
    back = {name: place for name, place in record.moved.items() if name in stored and name not in read}
    for name, (where, place, constant) in sorted(back.items(), key=lambda item: item[1][1]):
        if constant is None:
            bodies[where].initializer.insert(place, stored[name])
        else:
            nodes = bodies[where].node
            readers = (
                number for number, item in enumerate(nodes) if name in item.input or any(name in captured(i) for i in subgraphs(item))
            )
            nodes.insert(min(place, next(readers, place)), constant_of(constant, stored[name]))
    _keep_only(graph.initializer, lambda item: item.name not in back)


def _keep_only(field: Any, wanted: Callable[[Any], bool]) -> None:
    for number in reversed(range(len(field))):
        if not wanted(field[number]):
            del field[number]
