"""What a node carries: attributes as Python values, the bodies of If, Loop and Scan, and what those read from outside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import onnx
from onnx import helper

__all__ = [
    "STANDARD",
    "attributes",
    "blocks_of",
    "captured",
    "chooses",
    "clear_blocks",
    "clear_level",
    "every_node",
    "handed_on",
    "home_of",
    "is_level",
    "mark_blocks",
    "mark_level",
    "mark_mirror",
    "mark_rounded",
    "mark_taken",
    "operator_of",
    "rounds_states",
    "runs_of",
    "subgraphs",
    "taken_branch",
    "unmark",
]

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


def every_node(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph, each before those in its bodies."""
    for node in graph.node:
        yield node
        for body in subgraphs(node):
            yield from every_node(body)


def captured(body: onnx.GraphProto) -> set[str]:
    """Names that a body reads from the graphs around it."""
    own = {item.name for item in body.input} | {item.name for item in body.initializer}
    own |= {name for node in body.node for name in node.output}
    read = {name for node in body.node for name in node.input if name} | {item.name for item in body.output}
    for node in body.node:
        for inner in subgraphs(node):
            read |= captured(inner)
    return read - own


# Stands in the documentation of an If while a model is worked on: which branch the calibration data take.
_MARK = "relief-onnx/taken/1 "


def mark_taken(node: onnx.NodeProto, taken: str, operator: str = "") -> None:
    """Note on an If which branch ran on the calibration data: "then_branch", "else_branch", "both", "none" or "old" (not known).

    Of a Loop or Scan "both" says that its body runs. Of nodes within bodies "idle" says that they hold no layer that runs, and "only " or
    "idle " with the name of a branch which one runs. operator: what the node is in the file, where that is another.
    """
    node.doc_string = f"{_MARK}{taken}\n{operator or node.op_type}"


def unmark(node: onnx.NodeProto, documentation: str) -> None:
    """Give a node its documentation back."""
    node.ClearField("doc_string")
    if documentation:
        node.doc_string = documentation


def taken_branch(node: onnx.NodeProto) -> str:
    """What was noted with `mark_taken`; empty where nothing was."""
    return _taken(node)[0]


def operator_of(node: onnx.NodeProto) -> str:
    """A node's operator in the file."""
    return _taken(node)[2] or str(node.op_type)


def _taken(node: onnx.NodeProto) -> tuple[str, str, str]:
    return str(node.doc_string.removeprefix(_MARK)).partition("\n") if node.doc_string.startswith(_MARK) else ("", "", "")


def chooses(nodes: Iterable[onnx.NodeProto]) -> bool:
    """Whether there is an If, at any depth, with layers that run on some samples only: each sample has to take its own way."""
    return any(
        (node.op_type == "If" and (taken_branch(node) == "both" or taken_branch(node).startswith("only ")))
        or any(chooses(body.node) for body in subgraphs(node))
        for node in nodes
    )


def handed_on(node: onnx.NodeProto) -> list[str]:
    """Of an If whose branch was moved before it, the tensors that its outputs are; of any other node nothing."""
    taken = taken_branch(node)
    return [item.input[0] for own in node.attribute if own.name == taken for item in own.g.node]


# Stands in the documentation of a node that mirrors one inside a body, before an output of the body's node and, in the next line, the
# tensor that tells the runs of the body apart.
_MIRROR = "relief-onnx/mirror/1 "


def mark_mirror(node: onnx.NodeProto, home: str, runs: str) -> None:
    """Note that a node mirrors one inside a body of the node that makes `home`; `runs` has a number for each run (see `loops`)."""
    node.doc_string = f"{_MIRROR}{home}\n{runs}"


def home_of(node: onnx.NodeProto) -> str:
    """The home that was noted with `mark_mirror`; empty where nothing was."""
    return _mirrored(node)[0]


def runs_of(node: onnx.NodeProto) -> str:
    """The runs that were noted with `mark_mirror`; empty where nothing was."""
    return _mirrored(node)[2]


def _mirrored(node: onnx.NodeProto) -> tuple[str, str, str]:
    return str(node.doc_string.removeprefix(_MIRROR)).partition("\n") if node.doc_string.startswith(_MIRROR) else ("", "", "")


# Ends the documentation of a node whose weight is stored in blocks, before the axis of the stored tensor and how many places share a scale.
_BLOCK = "\nrelief-onnx/block/1 "


def mark_blocks(node: onnx.NodeProto, axis: int, size: int) -> None:
    """Note that the file stores a node's weight in blocks of `size` places along `axis`, which can go only together."""
    node.doc_string += f"{_BLOCK}{axis} {size}"


def blocks_of(node: onnx.NodeProto) -> tuple[int, int] | None:
    """What was noted with `mark_blocks`."""
    _, mark, said = node.doc_string.rpartition(_BLOCK)
    return (int(said.split()[0]), int(said.split()[1])) if mark else None


def clear_blocks(node: onnx.NodeProto) -> None:
    """Take that note off."""
    if blocks_of(node) is not None:
        unmark(node, node.doc_string.rpartition(_BLOCK)[0])


# Stands in the documentation of a recurrent node whose states the file's operator rounds.
_ROUNDED = "relief-onnx/rounded/1"


def mark_rounded(node: onnx.NodeProto) -> None:
    """Note that the file's operator rounds a recurrent node's states by the range of all hidden units."""
    node.doc_string = _ROUNDED


# Ends the documentation of a recurrent node with two directions whose gate rows share scales.
_LEVEL = "\nrelief-onnx/level/1"


def mark_level(node: onnx.NodeProto) -> None:
    """Note that the file has one scale for the rows at a place of both directions, so that the same places must go."""
    node.doc_string += _LEVEL


def is_level(node: onnx.NodeProto) -> bool:
    """Whether that was noted with `mark_level`."""
    return node.doc_string.endswith(_LEVEL)


def clear_level(node: onnx.NodeProto) -> None:
    """Take that note off."""
    if is_level(node):
        unmark(node, node.doc_string.removesuffix(_LEVEL))


def rounds_states(node: onnx.NodeProto) -> bool:
    """Whether that was noted with `mark_rounded`."""
    return node.doc_string == _ROUNDED
