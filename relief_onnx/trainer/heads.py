"""What each output of a model is, found by looking at the graph: that decides its loss. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from relief_onnx.compare import class_outputs
from relief_onnx.errors import RecipeError
from relief_onnx.graph import Graph, attributes

__all__ = ["Head", "find_heads", "label_head"]

# Operators that pass values on as they are.
_PASSING = frozenset({"Identity", "Cast", "Dropout"})
_FORMS: Mapping[str, str] = {"Softmax": "probabilities", "LogSoftmax": "log-probabilities", "Sigmoid": "sigmoid"}


@dataclass(frozen=True)
class Head:
    """One output. kind: its loss against the original ("kl", "bce", "mse", "cosine" or "none"). form: "logits", "probabilities",
    "log-probabilities" or "sigmoid" along `axis`, or "values"; with `flat` all axes from `axis` on are classes together.
    reason: why this loss.
    """

    name: str
    kind: str
    form: str
    axis: int
    flat: bool
    reason: str


def find_heads(model: onnx.ModelProto, chosen: Sequence[tuple[str, str]] = ()) -> tuple[Head, ...]:
    """A head for every output. `chosen`: (output, or "" for all; loss) pairs, which win. Raises RecipeError for an unknown output."""
    graph = Graph(model)
    wanted = dict(chosen)
    for name in wanted:
        if name and name not in graph.outputs:
            raise RecipeError(f"loss names {name!r}, which is no output of the model; its outputs are {', '.join(graph.outputs)}")
    classes = class_outputs(model)
    others = {info.name for info in model.graph.output if info.type.WhichOneof("value") not in (None, "tensor_type")}
    heads = []
    for name in graph.outputs:
        none = Head(name, "none", "none", -1, False, "it is no tensor")
        head = none if name in others else _found(graph, name, name in classes)
        kind = wanted.get(name, wanted.get("", "auto"))
        heads.append(head if kind == "auto" or head.form == "none" else _chosen(head, kind))
    if all(head.kind == "none" for head in heads):
        raise RecipeError("no output of the model has a loss: none of them holds floating point numbers, or --loss says none for all")
    return tuple(heads)


def _chosen(head: Head, kind: str) -> Head:
    form = head.form
    if kind == "kl" and form in ("values", "sigmoid"):
        form = "logits"
    if kind == "bce" and form != "sigmoid":
        form = "binary logits"
    return Head(head.name, kind, form, head.axis, head.flat, "chosen")


def _found(graph: Graph, name: str, is_class: bool) -> Head:
    if name in graph.types and not graph.is_float(name):
        return Head(name, "none", "none", -1, False, "it holds no floating point numbers")
    node = _producer(graph, name)
    form = _FORMS.get(node.op_type) if node is not None and node.domain in ("", "ai.onnx") else None
    if node is not None and form == "sigmoid":
        return Head(name, "bce", form, -1, False, f"it comes from {node.op_type}")
    if node is not None and form is not None:
        old = graph.opset < 13
        return Head(name, "kl", form, int(attributes(node).get("axis", 1 if old else -1)), old, f"it comes from {node.op_type}")
    if is_class:
        return Head(name, "kl", "logits", -1, False, "it looks like class scores [N, classes]")
    return Head(name, "mse", "values", -1, False, "it is neither probabilities nor class scores")


def _producer(graph: Graph, name: str) -> onnx.NodeProto | None:
    while name in graph.producer:
        node = graph.nodes[graph.producer[name]]
        if node.op_type not in _PASSING or node.output[0] != name:
            return node
        name = node.input[0]
    return None


def label_head(model: onnx.ModelProto, heads: Sequence[Head], labels: Any) -> Head:
    """The output that labels are for: class numbers go with the first class scores or probabilities, other targets with the first floats.

    labels: those of one batch. Raises RecipeError where no output fits.
    """
    graph = Graph(model)
    floats = [head for head in heads if head.form != "none"]
    if labels.dtype.kind == "f":
        return floats[0]
    found = [head for head in floats if head.form in ("logits", "probabilities", "log-probabilities")]
    found += [head for head in floats if head.form == "sigmoid" or len(graph.shape(head.name) or ()) == 2]
    if not found:
        raise RecipeError("the labels are class numbers, but no output has class scores; train on the original's outputs: --repair distill")
    return found[0] if found[0].form != "values" else Head(found[0].name, found[0].kind, "logits", -1, False, "labels are class numbers")
