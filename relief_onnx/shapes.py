"""Sizes and types of every tensor, and what small integer tensors hold, in symbols: one walk over the nodes.

ONNX's own inference loses the rank where a target is computed at run time (Reshape after Shape -> Gather -> Concat and the like), and
with it everything behind. Here the content of small integer tensors is followed in the same walk as the sizes, so that targets are
known. Nothing is assumed that a run could contradict, but that no size of the inputs is 0 where a Reshape's target names it.

Three tables know the operators: shape_rules, shape_values and, below, the element types; the rest asks ONNX about the single node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from relief_onnx.dims import ZERO, Dim, Symbols, product
from relief_onnx.fused_shapes import FUSED_RULES
from relief_onnx.nodes import STANDARD, captured, subgraphs, taken_branch
from relief_onnx.shape_rules import SHAPE_RULES, ShapeRule
from relief_onnx.shape_scope import BOOLS, FLOATING, INTEGERS, LARGEST_CONTENT, Content, Dims, Scope, Step, known
from relief_onnx.shape_values import VALUE_RULES

__all__ = ["Dim", "Shapes", "infer"]


@dataclass(frozen=True)
class Shapes:
    """What is known about the tensors of the main graph.

    `types` has element types, `dims` sizes (None: the rank is not known), `values` the content of integer and bool tensors of rank 0
    and 1 with at most 64 entries. Equal symbols mean equal numbers in every run.
    """

    types: dict[str, int]
    dims: dict[str, Dims | None]
    values: dict[str, Dims]


def infer(model: onnx.ModelProto) -> Shapes:
    """Infer types, sizes and values of the main graph's tensors; what cannot be inferred is left open, nothing is raised."""
    graph = model.graph
    inputs = [info.type.tensor_type for info in graph.input if info.type.HasField("tensor_type")]
    names = {size.dim_param for tensor in inputs for size in tensor.shape.dim if size.dim_param}
    scope = Scope(Symbols(names), {"" if item.domain in STANDARD else item.domain: item.version for item in model.opset_import})
    walk = _Walk({(item.domain, item.name): item for item in model.functions})
    walk.graph(graph, scope)
    values = {
        name: tuple(content)
        for name, content in ((name, _row(content)) for name, content in scope.contents.items())
        if content is not None and scope.types.get(name) in INTEGERS | BOOLS
    }
    return Shapes(dict(scope.types), dict(scope.dims), values)


def _row(content: Content | None) -> list[Dim] | None:
    return None if content is None or content.ndim > 1 else list(content.flat)


# -- element types --------------------------------------------------------------------------------------------------------


def _of_input(slot: int) -> Callable[[Step], int]:
    return lambda step: step.kind(slot)


_TO_BOOL = "Equal Less LessOrEqual Greater GreaterOrEqual And Or Xor Not IsNaN IsInf"
_TO_INT64 = "Shape Size ArgMax ArgMin NonZero"
# Element type of the first output, where it is not that of the first input.
TYPE_RULES: dict[str, Callable[[Step], int]] = (
    dict.fromkeys(_TO_BOOL.split(), lambda step: TensorProto.BOOL)
    | dict.fromkeys(_TO_INT64.split(), lambda step: TensorProto.INT64)
    | {
        "Cast": lambda step: int(step.attributes["to"]),
        "CastLike": _of_input(1),
        "Where": _of_input(1),
        "com.microsoft.EmbedLayerNormalization": _of_input(2),
        "com.microsoft.QEmbedLayerNormalization": lambda step: TensorProto.FLOAT,
        "com.microsoft.QAttention": _of_input(3),
        "com.microsoft.QuantizeLinear": _of_input(2),
        "com.microsoft.DequantizeLinear": _of_input(1),
        "ai.onnx.ml.Scaler": lambda step: TensorProto.FLOAT,
        "ai.onnx.ml.FeatureVectorizer": lambda step: TensorProto.FLOAT,
        "ai.onnx.ml.Normalizer": lambda step: TensorProto.FLOAT,
        "ConstantOfShape": lambda step: step.attributes["value"].data_type if "value" in step.attributes else TensorProto.FLOAT,
    }
)
# Element types of further outputs, where they are not that of the first.
SECOND_TYPES: Mapping[str, int] = {"TopK": TensorProto.INT64, "MaxPool": TensorProto.INT64}
_RULES: Mapping[str, ShapeRule] = {**SHAPE_RULES, **FUSED_RULES}

# What rules and readers raise on a node that breaks the standard, which is for the checker to report.
_BROKEN = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)


class _Walk:
    """The walk; one per model."""

    def __init__(self, functions: Mapping[tuple[str, str], onnx.FunctionProto]) -> None:
        self.functions = functions

    def graph(self, graph: onnx.GraphProto, scope: Scope) -> None:
        """Note everything about a graph's tensors in its scope."""
        for item in graph.initializer:
            self._constant(scope, item.name, item)
        for sparse in graph.sparse_initializer:
            scope.declare(sparse.values.name, sparse.values.data_type, tuple(map(Dim.of, sparse.dims)))
        for info in graph.input:
            if info.name not in scope.constants:
                self._note(scope, info.name, info.type)
        stated = {info.name: info.type for info in (*graph.value_info, *graph.output)}
        for node in graph.node:
            self._node(node, scope, stated)

    def _constant(self, scope: Scope, name: str, item: TensorProto) -> None:
        scope.constants[name] = item
        scope.declare(name, item.data_type, tuple(map(Dim.of, item.dims)))
        if item.data_type in INTEGERS | BOOLS:
            with suppress(*_BROKEN):
                scope.content(name)

    def _note(self, scope: Scope, name: str, kind: onnx.TypeProto) -> None:
        if kind.HasField("tensor_type"):
            scope.declare(name, kind.tensor_type.elem_type, _from_proto(kind.tensor_type, scope.symbols))
        elif kind.WhichOneof("value"):
            scope.others[name] = kind

    def _node(self, node: onnx.NodeProto, scope: Scope, stated: Mapping[str, onnx.TypeProto]) -> None:
        step = Step(node, scope)
        try:
            if step.operator in _WHOLE:
                _WHOLE[step.operator](self, step)
            elif step.operator in _RULES:
                self._by_rule(step)
            elif (node.domain, node.op_type) in self.functions:
                self._function(step, self.functions[node.domain, node.op_type])
            else:
                _ask(step, node.output, self._note)
        except _BROKEN:
            pass
        for name in node.output:
            if name in stated:
                _merge(scope, name, stated[name])
            elif name and name not in scope.dims:
                scope.dims[name] = None

    def _by_rule(self, step: Step) -> None:
        node, scope, name = step.node, step.scope, step.operator
        kind = TYPE_RULES.get(name, _of_input(0))(step)
        try:
            found = _RULES[name](step)
        except _BROKEN:
            _ask(step, node.output, self._note)
            return
        rows = found if isinstance(found, list) else [found]
        for number, (output, dims) in enumerate(zip(node.output, rows, strict=False)):
            if output:
                scope.declare(output, SECOND_TYPES.get(name, kind) if number else kind, dims)
        rest = [output for output in node.output[len(rows) :] if output]
        if rest:
            _ask(step, rest, self._note)
        if name in VALUE_RULES and kind in INTEGERS | FLOATING | BOOLS:
            content = VALUE_RULES[name](step)
            for output, one in zip(node.output, content if isinstance(content, list) else [content], strict=False):
                if one is not None and one.size <= LARGEST_CONTENT:
                    scope.contents[output] = one

    def constant(self, step: Step) -> None:
        """A Constant node."""
        values = step.attributes
        tensor = values.get("value")
        for name, dtype in (("value_int", np.int64), ("value_ints", np.int64), ("value_float", np.float32), ("value_floats", np.float32)):
            if name in values:
                tensor = numpy_helper.from_array(np.asarray(values[name], dtype))
        if tensor is None:
            _ask(step, step.node.output, self._note)
        else:
            self._constant(step.scope, step.node.output[0], tensor)

    def branches(self, step: Step) -> None:
        """If: the branch that is taken, or what both have in common."""
        condition, taken = known(step.content()), taken_branch(step.node).rpartition(" ")[2]
        names: tuple[str, ...] = ("then_branch", "else_branch")
        if condition is not None or taken in names:
            names = (taken,) if taken in names else ("then_branch",) if condition is not None and condition[0] else ("else_branch",)
        ends = []
        for name in names:
            inner = Scope(step.symbols, step.scope.opsets, step.scope)
            self.graph(step.attributes[name], inner)
            ends.append((inner, [info.name for info in step.attributes[name].output]))
        for number, output in enumerate(step.node.output):
            self._join(step.scope, output, [(inner, outputs[number]) for inner, outputs in ends])

    def _join(self, scope: Scope, output: str, ends: Sequence[tuple[Scope, str]]) -> None:
        kinds = {inner.types.get(name, 0) for inner, name in ends}
        shapes = [inner.dims.get(name) for inner, name in ends]
        ranks = {None if dims is None else len(dims) for dims in shapes}
        dims = None
        if len(ranks) == 1 and None not in ranks:
            columns = zip(*(dims for dims in shapes if dims is not None), strict=True)
            dims = tuple(sizes[0] if len(set(sizes)) == 1 else scope.symbols.fresh() for sizes in columns)
        scope.declare(output, kinds.pop() if len(kinds) == 1 else 0, dims)
        contents = [inner.content(name) for inner, name in ends]
        if contents[0] is not None and all(one is not None and np.array_equal(one, contents[0]) for one in contents):
            scope.contents[output] = contents[0]
        others = [inner.others.get(name) for inner, name in ends]
        if others[0] is not None and all(other == others[0] for other in others):
            scope.others[output] = others[0]

    def body(self, step: Step) -> None:
        """Loop and Scan: what ONNX says of the node; large weights of the body are left where they are."""
        _ask(step, step.node.output, self._note)

    def _function(self, step: Step, function: onnx.FunctionProto) -> None:
        """A node that is a function of the model: its body with the node's inputs and attributes."""
        outer = step.scope
        opsets = {"" if item.domain in STANDARD else item.domain: item.version for item in function.opset_import}
        inner = Scope(step.symbols, opsets)
        inner.parent = outer
        given = {item.name: outer.arguments.get(item.ref_attr_name, item) for item in step.node.attribute}
        inner.arguments = {item.name: item for item in function.attribute_proto} | given
        for formal, actual in zip(function.input, step.node.input, strict=False):
            if actual:
                inner.declare(formal, outer.types.get(actual, 0), outer.dims.get(actual))
                inner.contents[formal] = outer.content(actual, invent=True)
        for node in function.node:
            self._node(node, inner, {})
        for formal, output in zip(function.output, step.node.output, strict=False):
            if output:
                self._join(outer, output, [(inner, formal)])


# Operators that are no matter of a rule.
_WHOLE: dict[str, Callable[[_Walk, Step], None]] = {
    "Constant": _Walk.constant,
    "If": _Walk.branches,
    "Loop": _Walk.body,
    "Scan": _Walk.body,
}


# -- what the file and ONNX itself say -----------------------------------------------------------------------------------------


def _from_proto(tensor: onnx.TypeProto.Tensor, symbols: Symbols) -> Dims | None:
    """Sizes as written; a name that no input has is not trusted to mean the same elsewhere."""
    if not tensor.HasField("shape"):
        return None
    return tuple(
        Dim.of(size.dim_value)
        if size.HasField("dim_value") and size.dim_value >= 0
        else Dim.of(size.dim_param)
        if size.dim_param in symbols.names
        else symbols.fresh()
        for size in tensor.shape.dim
    )


def _merge(scope: Scope, name: str, stated: onnx.TypeProto) -> None:
    """Add what the file says where inference says nothing, or has a symbol for an integer."""
    if not stated.HasField("tensor_type"):
        if stated.WhichOneof("value"):
            scope.others.setdefault(name, stated)
        return
    dims, written = scope.dims.get(name), stated.tensor_type
    if dims is None:
        dims = _from_proto(written, scope.symbols)
    elif written.HasField("shape") and len(written.shape.dim) == len(dims):
        pairs = zip(dims, written.shape.dim, strict=True)
        dims = tuple(Dim.of(size.dim_value) if one.symbols and size.dim_value > 0 else one for one, size in pairs)
    scope.declare(name, scope.types.get(name, 0) or written.elem_type, dims)


@cache
def _schema(domain: str, operator: str, version: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(operator, version, domain)
    except onnx.defs.SchemaError:
        return None


def _ask(step: Step, outputs: Iterable[str], note: Callable[[Scope, str, onnx.TypeProto], None]) -> None:
    """Note what ONNX's inference says about a single node's outputs."""
    node, scope = step.node, step.scope
    domain = "" if node.domain in STANDARD else node.domain
    schema = _schema(domain, node.op_type, scope.opsets.get(domain, 1))
    if schema is None:
        return
    reads = {name for name in node.input if name} | {name for body in subgraphs(node) for name in captured(body)}
    names: dict[str, Dim] = {}
    types = {name: _to_proto(scope, name, names) for name in reads}
    data = {name: found for name in node.input if (found := _data(scope, name)) is not None}
    opsets = [helper.make_opsetid(name, version) for name, version in scope.opsets.items()]
    try:
        answer = onnx.shape_inference.infer_node_outputs(schema, _light(node, types), types, data, opset_imports=opsets)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, *_BROKEN):
        return
    for name in outputs:
        if name in answer:
            note(scope, name, answer[name])
            tensor = answer[name].tensor_type
            if scope.dims.get(name) and names:
                pairs = zip(scope.dims[name] or (), tensor.shape.dim, strict=True)
                # Where inputs are open, some of ONNX's inference takes unknown for 0 (Attention does).
                sizes = (scope.symbols.fresh() if one == ZERO else names.get(size.dim_param, one) for one, size in pairs)
                scope.dims[name] = tuple(sizes)


def _to_proto(scope: Scope, name: str, names: dict[str, Dim]) -> onnx.TypeProto:
    if name in scope.others:
        return scope.others[name]
    dims = scope.dims.get(name)
    shape = None if dims is None else [str(size) if size.symbols else size.coefficient for size in dims]
    names.update({str(size): size for size in dims or () if size.symbols})
    return helper.make_tensor_type_proto(scope.types.get(name, 0), shape)


def _data(scope: Scope, name: str) -> TensorProto | None:
    """What a small constant, or an integer tensor that is fully known, holds."""
    item = scope.constants.get(name)
    if item is not None and scope.array(name) is not None:
        return item
    content = scope.content(name)
    values = known(content)
    if content is None or values is None or scope.types.get(name) not in INTEGERS:
        return None
    return helper.make_tensor(name, scope.types[name], content.shape, values)


def _light(item: onnx.NodeProto, types: dict[str, onnx.TypeProto]) -> onnx.NodeProto:
    """The node; of a Loop or Scan a copy without the weights of its bodies, whose types join those of the scope around it."""
    if not any(True for _ in subgraphs(item)):
        return item
    copy = onnx.NodeProto(op_type=item.op_type, domain=item.domain, name=item.name, input=item.input, output=item.output)
    for attribute in item.attribute:
        if attribute.type != onnx.AttributeProto.GRAPH:
            copy.attribute.append(attribute)
            continue
        body = onnx.GraphProto(name=attribute.g.name, input=attribute.g.input, output=attribute.g.output)
        body.value_info.extend(attribute.g.value_info)
        body.node.extend(_light(node, types) for node in attribute.g.node)
        for weight in attribute.g.initializer:
            if product(map(Dim.of, weight.dims)).coefficient <= LARGEST_CONTENT:
                body.initializer.append(weight)
            else:
                types[weight.name] = helper.make_tensor_type_proto(weight.data_type, weight.dims)
        copy.attribute.append(helper.make_attribute(attribute.name, body))
    return copy
