"""Tensors of bodies handed out of their node, over all its runs: rows one after the other, whatever their number in each run.

A Loop carries a sequence to which each run adds its piece (below opset 13, which has no such states, a tensor that grows), an If hands
on the piece of the branch that ran and an empty one for the other, and a Scan, whose states and outputs cannot change their sizes,
stands as a Loop while we work. `Border.removed` is the way back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from relief_onnx.bodies import Names, bodies_of, keep_only
from relief_onnx.graph import Graph

__all__ = ["Added", "Border", "removed"]

# From this opset on a Loop can carry a sequence.
_SEQUENCES = 13
# What tells runs of a body apart goes through a Loop as stamp * this + iteration + 1.
_STAMP = 1_000_003


@dataclass
class Added:
    """What was added to a node, to its bodies and to the graph around it.

    inputs, outputs: how many the node had. before: the node itself where it was a Scan (with an empty body). slices: what its body was
    given. nodes, initializers: of the graph around. inside: tensors that nodes of the bodies make. names: inputs and outputs, of node and
    bodies.
    """

    inputs: int
    outputs: int
    before: onnx.NodeProto | None = None
    slices: list[onnx.ValueInfoProto] = field(default_factory=list)
    picked: list[str] = field(default_factory=list)  # what picks each of the slices
    stacked: dict[str, str] = field(default_factory=dict)  # outputs of the Scan that are turned behind the Loop
    nodes: set[str] = field(default_factory=set)
    initializers: set[str] = field(default_factory=set)
    inside: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)


class Border:
    """The border of one node. Nodes that come before and after it in the graph around are collected in `before` and `after`."""

    def __init__(self, graph: Graph, node: onnx.NodeProto, names: Names) -> None:
        self._graph, self._node, self._names = graph, node, names
        self.added = Added(len(node.input), len(node.output))
        self.before: list[onnx.NodeProto] = []
        self.after: list[onnx.NodeProto] = []
        self.stored: list[onnx.TensorProto] = []
        self.described: list[onnx.ValueInfoProto] = []
        self._bodies = bodies_of(node)

    def can_open(self) -> bool:
        """Whether pieces can get out: of a Scan whose outputs are turned the number of their axes has to be known."""
        if self._node.op_type != "Scan":
            return True
        values = {item.name: list(item.ints) for item in self._node.attribute if item.ints}
        axes = values.get("scan_output_axes", [])
        states = len(self._node.input) - self._given()
        return all(not axis or self._graph.shape(name) is not None for axis, name in zip(axes, self._node.output[states:], strict=False))

    def _given(self) -> int:
        return int(next(item.i for item in self._node.attribute if item.name == "num_scan_inputs"))

    # -- pieces ---------------------------------------------------------------------------------------------------------------

    def hand_out(self, body: str, tensor: str, element: int, sizes: Sequence[int | None], least: Sequence[int], stamp: bool = False) -> str:
        """What a body makes, [rows, *sizes] in each run, as one tensor of the graph around; its name there.

        least: sizes for a piece without rows. stamp: it tells runs apart, by [rows] numbers.
        """
        if self._node.op_type == "Scan":
            self._as_loop()
        wanted = tensor if tensor.endswith("/lifted") else f"{tensor}/lifted"
        outer = self._names.free(wanted)
        empty = np.zeros((0, *least), helper.tensor_dtype_to_np_dtype(element))
        if self._node.op_type == "If":
            self._of_branch(body, tensor, element, empty, outer)
        else:
            none = self._none(empty, sizes, outer)
            self._of_loop(
                self._bodies[body], self._numbered(self._bodies[body], tensor) if stamp else tensor, element, 1 + len(sizes), none, outer
            )
        self.described.append(helper.make_tensor_value_info(outer, element, [None, *sizes]))
        return outer

    def inside(self, body: str, operator: str, inputs: Sequence[str], wanted: str, **values: Any) -> str:
        """A further node of a body; the name of what it makes."""
        name = self._names.free(wanted)
        self._bodies[body].node.append(helper.make_node(operator, list(inputs), [name], name=name, **values))
        self.added.inside.add(name)
        return name

    def number(self, body: str, wanted: str, values: Any) -> str:
        """Whole numbers in a body."""
        return self.inside(body, "Constant", [], wanted, value=numpy_helper.from_array(np.asarray(values, np.int64)))

    def _numbered(self, body: onnx.GraphProto, tensor: str) -> str:
        name = next(iter(self._bodies))
        large = self.inside(name, "Mul", [tensor, self.number(name, f"{tensor}/factor", _STAMP)], f"{tensor}/large")
        later = self.inside(name, "Add", [body.input[0].name, self.number(name, f"{tensor}/one", 1)], f"{tensor}/iteration")
        return self.inside(name, "Add", [large, later], f"{tensor}/numbered")

    def _of_branch(self, body: str, tensor: str, element: int, empty: NDArray[Any], outer: str) -> None:
        for name, own in self._bodies.items():
            if name == body:
                inner = self.inside(name, "Identity", [tensor], f"{outer}/{name}")
            else:  # the branch that does not run has none of it
                inner = self.inside(name, "Constant", [], f"{outer}/{name}", value=numpy_helper.from_array(empty))
            own.output.append(helper.make_tensor_value_info(inner, element, [None] * empty.ndim))
            self.added.names.add(inner)
        missing = len(next(iter(self._bodies.values())).output) - 1 - len(self._node.output)
        self._node.output.extend(self._names.free(f"{outer}/unread") for _ in range(missing))
        self._node.output.append(outer)
        self.added.names.add(outer)

    def _none(self, empty: NDArray[Any], sizes: Sequence[int | None], outer: str) -> str:
        """A piece without rows, in the graph around, of which nobody can tell the sizes that are not known."""
        reached = self._names.free(f"{outer}/none")
        self.stored.append(numpy_helper.from_array(empty, reached))
        self.added.initializers.add(reached)
        for axis, size in enumerate(sizes, 1):
            if size is None:
                every, some = self._names.free(f"{outer}/every"), self._names.free(f"{outer}/some")
                self.stored.append(numpy_helper.from_array(np.ones(empty.shape[axis], bool), every))
                self.added.initializers.add(every)
                self._outside("Compress", [reached, every], some, self.before, axis=axis)
                reached = some
        return reached

    def _of_loop(self, body: onnx.GraphProto, tensor: str, element: int, rank: int, none: str, outer: str) -> None:
        node, wide = self._node, self._graph.opset >= _SEQUENCES
        first, seen, now, whole = (self._names.free(f"{outer}/{part}") for part in ("first", "seen", "now", "all"))
        shape = [None] * rank
        make = helper.make_tensor_sequence_value_info if wide else helper.make_tensor_value_info
        self.before.append(helper.make_node("SequenceConstruct" if wide else "Identity", [none], [first], name=first))
        node.input.extend([""] * (2 - len(node.input)))
        node.input.append(first)
        body.input.append(make(seen, element, shape))
        if wide:
            body.node.append(helper.make_node("SequenceInsert", [seen, tensor], [now], name=now))
            self.after.append(helper.make_node("ConcatFromSequence", [whole], [outer], name=outer, axis=0))
        else:
            body.node.append(helper.make_node("Concat", [seen, tensor], [now], name=now, axis=0))
            self.after.append(helper.make_node("Identity", [whole], [outer], name=outer))
        states = len(body.input) - 3  # before this one
        outputs = list(body.output)
        outputs.insert(1 + states, make(now, element, shape))
        del body.output[:]
        body.output.extend(outputs)
        node.output.extend(self._names.free(f"{outer}/unread") for _ in range(states - len(node.output)))
        names = list(node.output)
        names.insert(states, whole)
        node.output[:] = names
        self.added.inside.add(now)
        self.added.nodes |= {first, outer}
        self.added.names |= {first, seen, now, whole}

    # -- Scan -----------------------------------------------------------------------------------------------------------------

    def _as_loop(self) -> None:
        node, body, count, free = self._node, self._bodies["body"], self._given(), self._names.free
        before = onnx.NodeProto()
        before.CopyFrom(node)
        next(item for item in before.attribute if item.name == "body").g.Clear()
        self.added.before = before
        values = {item.name: list(item.ints) for item in node.attribute if item.ints}
        states, slices = len(node.input) - count, list(body.input)[len(node.input) - count :]
        sources = list(node.input)[states:]
        axes, backward = values.get("scan_input_axes", [0] * count), values.get("scan_input_directions", [0] * count)
        self.added.slices = [onnx.ValueInfoProto.FromString(item.SerializeToString()) for item in slices]
        sizes, steps, place = free(f"{sources[0]}/sizes"), free(f"{sources[0]}/steps"), free(f"{sources[0]}/axis")
        self.stored.append(numpy_helper.from_array(np.array(axes[0], np.int64), place))
        self.added.initializers.add(place)
        self._outside("Shape", [sources[0]], sizes, self.before)
        self._outside("Gather", [sizes, place], steps, self.before, axis=0)
        number, going = free(f"{steps}/number"), free(f"{steps}/going")
        inputs = [
            helper.make_tensor_value_info(number, TensorProto.INT64, []), helper.make_tensor_value_info(going, TensorProto.BOOL, []),
            *list(body.input)[:states],
        ]  # fmt: skip
        del body.input[:]
        body.input.extend(inputs)
        picks = []
        for item, source, axis, back in zip(slices, sources, axes, backward, strict=True):
            at = number
            if back:
                last, one = free(f"{item.name}/last"), free(f"{item.name}/one")
                at = free(f"{item.name}/at")
                picks += [
                    helper.make_node("Constant", [], [one], name=one, value=numpy_helper.from_array(np.array(1, np.int64))),
                    helper.make_node("Sub", [steps, one], [last], name=last), helper.make_node("Sub", [last, number], [at], name=at),
                ]  # fmt: skip
                self.added.inside |= {last, one, at}
            picks.append(helper.make_node("Gather", [source, at], [item.name], name=free(f"{item.name}/pick"), axis=axis))
            self.added.inside.add(item.name)
            self.added.picked.append(item.name)
        nodes = [*picks, *(onnx.NodeProto.FromString(item.SerializeToString()) for item in body.node)]
        del body.node[:]
        body.node.extend(nodes)
        again = free(f"{steps}/again")
        body.node.append(helper.make_node("Identity", [going], [again], name=again))
        self.added.inside.add(again)
        outputs = [helper.make_tensor_value_info(again, TensorProto.BOOL, []), *body.output]
        del body.output[:]
        body.output.extend(outputs)
        self.added.names |= {number, going, again}
        node.op_type = "Loop"
        node.input[:] = [steps, "", *list(node.input)[:states]]
        keep_only(node.attribute, lambda item: item.name == "body")
        self._turn(states, values.get("scan_output_axes", []), values.get("scan_output_directions", []))

    def _outside(self, operator: str, inputs: Sequence[str], name: str, where: list[onnx.NodeProto], **values: Any) -> None:
        where.append(helper.make_node(operator, list(inputs), [name], name=name, **values))
        self.added.nodes.add(name)

    def _turn(self, states: int, axes: Sequence[int], backward: Sequence[int]) -> None:
        """Outputs of a Scan that are stacked along another axis, or the other way round, behind the Loop."""
        for place, name in enumerate(list(self._node.output)[states:]):
            axis, back = axes[place] if axes else 0, backward[place] if backward else 0
            rank = len(self._graph.shape(name) or ())
            axis = axis + rank if axis < 0 else axis
            if not name or not (axis or back):
                continue
            reached = self._names.free(f"{name}/stacked")
            self._node.output[states + place] = reached
            self.added.stacked[reached] = name
            self.added.names.add(reached)
            if back:
                ends = []
                for part, value in (("start", -1), ("end", -(1 << 62)), ("axis", 0), ("step", -1)):
                    ends.append(self._names.free(f"{name}/{part}"))
                    self.stored.append(numpy_helper.from_array(np.array([value], np.int64), ends[-1]))
                    self.added.initializers.add(ends[-1])
                turned = self._names.free(f"{name}/turned") if axis else name
                self._outside("Slice", [reached, *ends], turned, self.after)
                reached = turned
            if axis:
                order = list(range(1, rank))
                order.insert(axis, 0)
                self._outside("Transpose", [reached], name, self.after, perm=order)


def removed(node: onnx.NodeProto, added: Added) -> None:
    """A node and its bodies without what was handed out."""
    sources: dict[str, str] = {}
    for body in bodies_of(node).values():
        sources |= {item.output[0]: item.input[0] for item in body.node if item.output and item.output[0] in added.picked}
        keep_only(body.node, lambda item: added.inside.isdisjoint(item.output))
        keep_only(body.input, lambda item: item.name not in added.names)
        keep_only(body.output, lambda item: item.name not in added.names)
    if added.before is not None:
        body = bodies_of(node)["body"]
        body.input.extend(added.slices)
        for place, name in enumerate(node.output):
            node.output[place] = added.stacked.get(name, name)
    inputs = [name for name in node.input if name not in added.names]
    node.output[:] = [name for name in node.output if name not in added.names]
    while len(node.output) > added.outputs and node.output[-1].endswith("/unread"):
        del node.output[-1]
    if added.before is not None:
        inputs = [*inputs[2:], *(sources[name] for name in added.picked)]
        own = next(item for item in node.attribute if item.name == "body")
        attributes = [own if item.name == "body" else item for item in added.before.attribute]
        copies = [onnx.AttributeProto.FromString(item.SerializeToString()) for item in attributes]
        del node.attribute[:]
        node.attribute.extend(copies)
        node.op_type = "Scan"
    while len(inputs) > added.inputs and not inputs[-1]:
        inputs.pop()
    node.input[:] = inputs
