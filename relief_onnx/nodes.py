"""What a node carries: attributes as Python values, the bodies of If, Loop and Scan, and what those read from outside."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx
from onnx import helper

__all__ = ["STANDARD", "attributes", "captured", "subgraphs"]

# The two names of the domain of standard operators.
STANDARD = ("", "ai.onnx")


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes as Python values; strings as str."""
    values = {item.name: helper.get_attribute_value(item) for item in node.attribute if not item.ref_attr_name}
    return {key: value.decode() if isinstance(value, bytes) else value for key, value in values.items()}


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The bodies of If, Loop, Scan and the like."""
    for item in node.attribute:
        if item.type == onnx.AttributeProto.GRAPH:
            yield item.g
        elif item.type == onnx.AttributeProto.GRAPHS:
            yield from item.graphs


def captured(body: onnx.GraphProto) -> set[str]:
    """Names that a body reads from the graphs around it."""
    own = {item.name for item in body.input} | {item.name for item in body.initializer}
    own |= {name for node in body.node for name in node.output}
    read = {name for node in body.node for name in node.input if name} | {item.name for item in body.output}
    for node in body.node:
        for inner in subgraphs(node):
            read |= captured(inner)
    return read - own
