"""Layers inside bodies that run many times (Loop, Scan) or now and then (both branches of an If run): measured in place, not moved.

`expose` hands what such a layer reads out of the node, over all runs (`borders`), and puts a *mirror* of the layer behind the node, in the
graph around: the same operator on the same weight, which nobody reads. The weight becomes an initializer of that graph that mirror and
body share, so that scores, masks and zeros reach it like any other. A body is a model of its own while this is done, so a node within a
body comes first: its mirrors are layers of the body, and go out with the others. `conceal` is the way back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from relief_onnx.bodies import Names, Opened, as_stored, bodies_of, keep_only, key_of, opened, sunk, unique_bodies
from relief_onnx.borders import Border
from relief_onnx.exposed import Body, Exposed, Path
from relief_onnx.graph import Graph
from relief_onnx.layers import Layer, Plan, find
from relief_onnx.lifting import names_in
from relief_onnx.lowering import INNER_PASSES, RUNNING_PASSES, Lowered, Pass, lower
from relief_onnx.nodes import captured, mark_mirror, mark_taken, runs_of, subgraphs
from relief_onnx.recurrent_layers import WITHIN
from relief_onnx.recurrent_mirrors import Batch, can_mirror
from relief_onnx.sources import Source, trace_constant

__all__ = ["expose", "numbered"]

_MIRRORED = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "LSTM", "GRU", "RNN", "Gather"})


@dataclass(frozen=True)
class _Look:
    """What is looked at: the bodies that `ran` (by path; None: all), and of layers all or those of rows only. names: of the whole model.

    layers: whether any are; else bodies hand out the numbers of their runs only.
    """

    ran: Mapping[Path, bool] | None
    rows_only: bool
    names: Names
    layers: bool = True


def expose(
    model: onnx.ModelProto, output: str, ran: Mapping[Path, bool] | None = None, rows_only: bool = False
) -> tuple[onnx.ModelProto, Exposed] | None:
    """A copy of the model with mirrors of the layers in the bodies of a node (by its first output); None where it has no such layer.

    ran: by the path of a body whether it does, as far as is known; those that do are looked at, None: all. rows_only: leave convolutions
    and recurrent nodes, whose inputs have to be as large in every run.
    """
    ready, tensors = sunk(unique_bodies(model, output), output)
    found = _Work(ready, output, (), _Look(ran, rows_only, Names(ready))).run()
    return None if found is None else (found[0], replace(found[1], sunk=tensors))


def numbered(model: onnx.ModelProto, output: str) -> tuple[onnx.ModelProto, Mapping[Path, str]] | None:
    """A copy in which all bodies of a node hand out a number for each run; by path the tensor that has them. None where nothing can."""
    ready = unique_bodies(model, output)
    found = _Work(ready, output, (), _Look(None, False, Names(ready), layers=False)).run()
    return None if found is None else (found[0], found[1].runs)


class _Work:
    """One node of a graph; `path` leads to that graph, `scope` are names of the graphs around it."""

    def __init__(self, model: onnx.ModelProto, output: str, path: Path, look: _Look, scope: frozenset[str] = frozenset()) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self.graph = Graph(model)
        self.node = next(item for item in self.model.graph.node if output in item.output)
        self.path, self.look, self.names = (*path, output), look, look.names
        self.border = Border(self.graph, self.node, look.names)
        # What bodies see, and so may not name anew.
        self.scope = scope | self.graph.producer.keys() | self.graph.initializers.keys() | {item.name for item in model.graph.input}
        self.record = Exposed(output, self.border.added, self.node.doc_string)
        self.bodies = bodies_of(self.node)
        self.inner: dict[str, Graph] = {}
        self.stamps: dict[tuple[str, str], str] = {}
        self.mirrors: list[onnx.NodeProto] = []

    def run(self) -> tuple[onnx.ModelProto, Exposed] | None:
        if not self.border.can_open():
            return None
        for name, body in self.bodies.items():
            self._open(name, body)
        if self.look.layers:
            if not (chosen := self._chosen()):
                return None
            self._place_mirrors(chosen)
        else:
            for name in self.bodies:
                self._stamp(name, "")
            self.record.home = self._home()
        for name, own in self.record.bodies.items():
            for inner in own.inner:
                for path, tensor in inner.runs.items():
                    self.record.runs[path] = self._stamp(name, tensor)
            _sweep(self.bodies[name], {tensor for inner in own.inner for tensor in inner.nodes})
        self._finish()
        return self.model, self.record

    def _place_mirrors(self, chosen: Sequence[tuple[str, Layer]]) -> None:
        places = {item.name: place for own in self.bodies.values() for place, item in enumerate(own.initializer)}
        lifted: dict[tuple[str, str], str] = {}
        for name, layer in chosen:
            if layer.recurrent is not None:
                if layer.recurrent.part == "W":
                    self._mirror_recurrent(name, layer, places)
                continue
            key = name, layer.input
            if key not in lifted:
                lifted[key] = self._lift(name, layer)
            self._mirror(name, layer, lifted[key], places)

    def _finish(self) -> None:
        """Put in place what was collected."""
        own = [name for name in self.bodies if self._looked(name)]
        before = self.border.added.before
        taken = "both" if len(own) == len(self.bodies) or len(self.path) == 1 else f"only {own[0]}"
        mark_taken(self.node, taken, "" if before is None else before.op_type)
        graph, border = self.model.graph, self.border
        place = next(number for number, item in enumerate(graph.node) if self.record.home in item.output)
        for number, item in enumerate((*border.after, *self.mirrors), place + 1):
            graph.node.insert(number, item)
        for number, item in enumerate(border.before, place):
            graph.node.insert(number, item)
        graph.initializer.extend(border.stored)
        graph.value_info.extend(border.described)
        self.record.nodes |= {name for item in self.mirrors for name in item.output}

    def _looked(self, name: str) -> bool:
        return self.look.ran is None or self.look.ran.get((*self.path, name), False)

    def _open(self, name: str, body: onnx.GraphProto) -> None:
        """Make a body a model, in which the nodes that have bodies themselves are laid open first."""
        found = opened(self.graph, body)
        choices = ((RUNNING_PASSES, INNER_PASSES) if self._looked(name) else (INNER_PASSES,)) if self.look.layers else ()
        lowered = _lowered(found, self.scope, choices)
        self.scope |= _made(found, lowered)  # weights of several bodies may be moved out side by side
        record, model, path = Body(found.held, lowered), lowered.model, (*self.path, name)
        for output in [key_of(node) for node in model.graph.node if bodies_of(node) and key_of(node)]:
            ready, tensors = sunk(model, output, found.foreign) if self.look.layers else (model, {})
            inner = _Work(ready, output, path, self.look, self.scope).run() if self._looked(name) else None
            if inner is None:
                node = next(item for item in model.graph.node if output in item.output)
                record.marked[output] = node.doc_string
                mark_taken(node, self._idle(node, (*path, output)))
                continue
            model = inner[0]
            record.inner.append(replace(inner[1], sunk=tensors))
            self.record.images |= inner[1].images
        self.record.bodies[name] = record
        as_stored(model, found.foreign, body)
        self.inner[name] = Graph(model)

    def _idle(self, node: onnx.NodeProto, path: Path) -> str:
        """What is noted of a node within a body that has no layer to look at (see `mark_taken`)."""
        known = {name: (self.look.ran or {}).get((*path, name)) for name in bodies_of(node)}
        own = [name for name, ran in known.items() if ran]
        if not own and False in known.values():
            return "none"
        return f"idle {own[0]}" if len(own) == 1 and len(known) > 1 else "idle"

    def _chosen(self) -> list[tuple[str, Layer]]:
        """The layers to mirror, and their bodies."""
        plans = {name: find(graph) for name, graph in self.inner.items()}
        refused = self._refused(plans)
        return [(name, layer) for name, plan in plans.items() for layer in (*plan.layers, *plan.tables) if layer.weight not in refused]

    def _refused(self, plans: Mapping[str, Plan]) -> set[str]:
        """Weights that stay: where any body reads them that is not looked at, or as something else than a layer that can be mirrored."""
        refused = {row.weight for plan in plans.values() for row in plan.skipped}
        known = {name: {**plan.by_weight(), **plan.by_table()} for name, plan in plans.items()}
        for name, own in known.items():
            for weight, layers in own.items():
                others = (known[other] for other, graph in self.inner.items() if weight in graph.initializers)
                elsewhere = any(weight not in found for found in others)
                if elsewhere or not self._looked(name) or not all(self._possible(self.inner[name], layer) for layer in layers):
                    refused.add(weight)
        pairs = [pair for plan in plans.values() for pair in plan.recurrent().values()]
        while True:  # W and R of a node go together
            more = {own.weight for pair in pairs if any(one.weight in refused for one in pair.values()) for own in pair.values()} - refused
            if not more:
                return refused
            refused |= more

    def _possible(self, graph: Graph, layer: Layer) -> bool:
        """Whether the mirror can be made: the operator is known, so are axes that matter, and the weight's way needs no constants."""
        if layer.op not in _MIRRORED or (self.look.rows_only and (layer.is_convolution or layer.recurrent is not None)):
            return False
        if layer.recurrent is not None:
            return can_mirror(graph, layer)
        source = trace_constant(graph, self._fed(graph, layer))
        if not isinstance(source, Source):
            return False
        plain = all(len([name for name in graph.nodes[graph.producer[name]].input if name]) == 1 for name in source.path)
        if layer.is_table:
            return plain
        return plain and graph.is_float(layer.input) and (self._is_last(layer) or layer.is_convolution or bool(graph.shape(layer.input)))

    @staticmethod
    def _is_last(layer: Layer) -> bool:
        """Whether what a product sums over is the last axis of its input (numbers of rows stand for such an axis)."""
        return layer.is_table or layer.input_axis == (1 if layer.op == "Gemm" else -1)

    @staticmethod
    def _fed(graph: Graph, layer: Layer) -> str:
        """What the layer's node reads as its weight: the weight itself, or the last tensor on its way."""
        found: str = next(name for name in graph.nodes[layer.node].input if name and name != layer.input)
        return found

    def _lift(self, body: str, layer: Layer) -> str:
        """Hand out what a layer reads: rows [n, in] of a product, samples of a convolution; the name in the graph around."""
        graph = self.inner[body]
        element, shape = graph.types[layer.input]
        if layer.geometry is not None:
            spans = [1 + (size - 1) * step for size, step in zip(layer.geometry.kernel, layer.geometry.dilations, strict=True)]
            channels = layer.groups * layer.in_per_group
            space = [size if isinstance(size, int) else None for size in (shape or ())[2:]] or [None] * len(spans)
            self.record.images |= None in space
            least = [span if size is None else size for span, size in zip(spans, space, strict=True)]
            found = self.border.hand_out(body, layer.input, element, [channels, *space], [channels, *least])
        else:
            width = [] if layer.is_table else [layer.in_per_group]
            found = self.border.hand_out(body, self._rows(body, layer, width), element, width, width)
        self.record.home = self.record.home or self._home()
        return found

    def _rows(self, body: str, layer: Layer, width: Sequence[int]) -> str:
        graph, reached = self.inner[body], layer.input
        if not self._is_last(layer) and (rank := len(graph.shape(reached) or ())) > 1:
            order = [*range(rank - 2), rank - 1, rank - 2]
            reached = self.border.inside(body, "Transpose", [reached], f"{reached}/turned", perm=order)
        sizes = self.border.number(body, f"{layer.input}/sizes", [-1, *width])
        return self.border.inside(body, "Reshape", [reached, sizes], f"{layer.input}/lifted")

    def _home(self) -> str:
        turned = {name: stacked for stacked, name in self.border.added.stacked.items()}
        return turned.get(self.record.output, self.record.output)

    def _stamp(self, body: str, own: str) -> str:
        """What tells the runs of a body apart, in the graph around. own: what does so in the body; empty for the body itself."""
        if (body, own) not in self.stamps:
            inside = own or self.border.number(body, f"{self.record.output}/{body}/runs", [0])
            self.stamps[body, own] = self.border.hand_out(body, inside, TensorProto.INT64, [], [], stamp=True)
            if not own:
                self.record.runs[(*self.path, body)] = self.stamps[body, own]
        return self.stamps[body, own]

    def _mirror(self, body: str, layer: Layer, lifted: str, places: Mapping[str, int]) -> None:
        graph, node = self.inner[body], onnx.NodeProto()
        node.CopyFrom(graph.nodes[layer.node])
        fed = self._fed(graph, layer)
        data, slot = list(node.input).index(layer.input), list(node.input).index(fed)
        self._outward(graph, body, layer.weight, places)
        node.input[slot] = self._way(graph, layer.weight, fed)
        node.input[data] = lifted
        bias = self._bias(graph, body, layer, places)
        if not self._is_last(layer) and not layer.is_convolution:
            bias = self._in_rows(layer, node, len(graph.shape(fed) or ()), bias)
        del node.input[2:]
        if bias and layer.bias is not None and layer.bias.node == layer.node:
            node.input.append(bias)
        self._add(node, body, graph.nodes[layer.node])
        if bias and layer.bias is not None and layer.bias.node != layer.node:
            after = self.names.free(f"{node.output[0]}/sum")
            self.mirrors.append(helper.make_node("Add", [node.output[0], bias], [after], name=after))

    def _add(self, node: onnx.NodeProto, body: str, original: onnx.NodeProto) -> None:
        """A mirror, with a name of its own."""
        node.output[:] = [self.names.free(f"{key_of(original)}/mirror")]
        known = {item.name for item in (*self.model.graph.node, *self.mirrors)}
        node.name = node.name or key_of(original)
        node.name = self.names.free(f"{self.record.output}/{node.name}") if node.name in known else node.name
        mark_mirror(node, self.record.home, self._stamp(body, runs_of(original)))
        self.mirrors.append(node)

    def _mirror_recurrent(self, body: str, layer: Layer, places: Mapping[str, int]) -> None:
        """A recurrent node with the sequences of all runs as one batch, and one of no steps behind them."""
        graph, node = self.inner[body], onnx.NodeProto()
        node.CopyFrom(graph.nodes[layer.node])
        batch = Batch(self.border, body, node, graph, self.names)
        self.record.images |= batch.steps is None
        inputs = batch.handed_out(layer)
        self.record.home = self.record.home or self._home()
        for slot, name in enumerate(node.input):
            if slot not in inputs and name and name in graph.initializers:
                self._outward(graph, body, name, places)
            elif slot not in inputs and name and (source := trace_constant(graph, name)) is not None and isinstance(source, Source):
                self._outward(graph, body, source.name, places)
                inputs[slot] = self._way(graph, source.name, name)
            elif slot == 3 and name:
                joins = graph.nodes[graph.producer[name]]
                for half in joins.input:
                    self._outward(graph, body, half, places)
                inputs[slot] = self.names.free(f"{name}/mirror")
                self.mirrors.append(helper.make_node("Concat", joins.input, [inputs[slot]], name=f"{inputs[slot]}{WITHIN}", axis=1))
        self.mirrors += batch.nodes
        node.input.extend([""] * (max(inputs) + 1 - len(node.input)))
        for slot, name in inputs.items():
            node.input[slot] = name
        self._add(node, body, graph.nodes[layer.node])

    def _in_rows(self, layer: Layer, node: onnx.NodeProto, rank: int, bias: str) -> str:
        """Let a mirror read rows [n, in] where the layer reads columns; the bias as it then adds it."""
        if layer.op == "Gemm":
            keep_only(node.attribute, lambda item: item.name != ("transA" if layer.output_axis else "transB"))
            if not layer.output_axis:
                node.attribute.append(helper.make_attribute("transB", 1))
            return bias
        turned = self.names.free(f"{layer.weight}/turned")
        order = [*range(rank - 2), rank - 1, rank - 2]
        self.mirrors.append(helper.make_node("Transpose", [node.input[0]], [turned], name=turned, perm=order))
        node.input[:] = [node.input[1], turned]
        if not bias:
            return ""
        sizes, flat = self.names.free(f"{bias}/sizes"), self.names.free(f"{bias}/flat")
        self.border.stored.append(numpy_helper.from_array(np.array([-1], np.int64), sizes))
        self.border.added.initializers.add(sizes)
        self.mirrors.append(helper.make_node("Reshape", [bias, sizes], [flat], name=flat))
        return flat

    def _way(self, graph: Graph, weight: str, fed: str) -> str:
        """The weight as the layer reads it: through copies of the nodes on its way."""
        source = trace_constant(graph, fed)
        assert isinstance(source, Source)
        reached = weight
        for name in source.path:
            step = onnx.NodeProto()
            step.CopyFrom(graph.nodes[graph.producer[name]])
            step.input[0] = reached
            reached = step.output[0] = step.name = self.names.free(f"{name}/mirror")
            self.mirrors.append(step)
        return reached

    def _bias(self, graph: Graph, body: str, layer: Layer, places: Mapping[str, int]) -> str:
        """The layer's bias where it is stored and nothing else reads it; else nothing."""
        if layer.bias is None or layer.bias.shared:
            return ""
        node = graph.nodes[layer.bias.node]
        if layer.bias.name not in node.input:
            return ""
        self._outward(graph, body, layer.bias.name, places)
        return layer.bias.name

    def _outward(self, graph: Graph, body: str, name: str, places: Mapping[str, int]) -> None:
        """Make a tensor that a body holds an initializer of the graph around."""
        own = self.bodies[body]
        if any(item.name == name for item in own.initializer):
            self.record.moved[name] = body, places[name]
            keep_only(own.initializer, lambda item: item.name != name)
        if name not in {item.name for item in self.model.graph.initializer}:
            self.model.graph.initializer.append(graph.initializers[name])


def _sweep(body: onnx.GraphProto, mirrors: Collection[str]) -> None:
    """Take mirrors out of a body that has handed out what they read."""
    left = list(body.node)
    while True:
        read = {name for item in left for name in item.input} | {item.name for item in body.output}
        read |= {name for item in left for inner in subgraphs(item) for name in captured(inner)}
        needed = [item for item in left if not all(name in mirrors and name not in read for name in item.output)]
        if len(needed) == len(left):
            break
        left = needed
    nodes = [onnx.NodeProto.FromString(item.SerializeToString()) for item in left]
    del body.node[:]
    body.node.extend(nodes)


def _lowered(found: Opened, scope: frozenset[str], choices: Sequence[Sequence[Pass]]) -> Lowered:
    """What hides weights in a body laid open, by the first of the choices that does not rewrite what others read too, or make names of the
    `scope`; else nothing of it.
    """
    for passes in choices:
        lowered = lower(found.model, passes)
        after = {item.name: item for item in lowered.model.graph.initializer}
        foreign = {item.name: item for item in found.model.graph.initializer if item.name in found.foreign}
        computed = {name for item in lowered.model.graph.node for name in item.output}  # of a bias in halves, by its name
        rewritten = (
            after[name] != item if name in after else name in computed or sum(size > 1 for size in item.dims) > 1
            for name, item in foreign.items()
        )  # fmt: skip
        if scope.isdisjoint(_made(found, lowered)) and not any(rewritten):
            return lowered
    return Lowered(found.model)


def _made(found: Opened, lowered: Lowered) -> set[str]:
    """The names that a body has anew."""
    return names_in(lowered.model.graph) - names_in(found.model.graph)
