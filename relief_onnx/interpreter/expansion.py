"""Local functions, and standard operators that the table lacks but the standard itself writes as a function of others, are replaced by
their bodies."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import onnx
import onnx.inliner

from relief_onnx.interpreter.table import TABLE
from relief_onnx.nodes import STANDARD, subgraphs

__all__ = ["expand", "opsets_of"]


def opsets_of(model: onnx.ModelProto) -> dict[str, int]:
    """Domains and their versions; the standard domain is the empty name."""
    return {"" if item.domain in STANDARD else item.domain: item.version for item in model.opset_import}


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for body in subgraphs(node):
            yield from _nodes(body)


def _missing(model: onnx.ModelProto) -> dict[tuple[str, str], Any]:
    """The operators that the table lacks and the standard writes as functions."""
    opsets = opsets_of(model)
    found: dict[tuple[str, str], Any] = {}
    for node in _nodes(model.graph):
        domain = "" if node.domain in STANDARD else node.domain
        version = opsets.get(domain, 1)
        if TABLE.find(domain, node.op_type, version) is None and onnx.defs.has(node.op_type, version, domain):
            schema: Any = onnx.defs.get_schema(node.op_type, version, domain)
            if schema.has_function or schema.has_context_dependent_function:
                found[domain, node.op_type] = schema
    return found


def expand(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same function with fewer kinds of nodes; the model itself where there is nothing to do. Names of initializers stay."""
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    if "inline_schema_functions" not in inspect.signature(onnx.inliner.inline_selected_functions).parameters:
        return model  # an older onnx; what the table lacks is refused by name
    while missing := _missing(model):
        prepared = onnx.shape_inference.infer_shapes(model)
        prepared.graph.value_info.append(
            onnx.helper.make_tensor_value_info("", onnx.TensorProto.FLOAT, None)
        )  # inputs that nodes leave out
        for node in _nodes(prepared.graph):
            schema = missing.get(("" if node.domain in STANDARD else node.domain, node.op_type))
            if schema is not None:  # the inliner forgets defaults that a body refers to
                given = {item.name for item in node.attribute}
                node.attribute.extend(
                    row.default_value for name, row in schema.attributes.items() if name not in given and row.default_value.name
                )
        try:
            model = onnx.inliner.inline_selected_functions(prepared, sorted(missing), inline_schema_functions=True)
        except RuntimeError:
            return model  # it cannot expand nodes that leave out inputs; they are refused by name
    return model
