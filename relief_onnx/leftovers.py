"""What is left of training in a file, and what it means for pruning."""

from __future__ import annotations

from relief_onnx.graph import Graph, attributes
from relief_onnx.nodes import STANDARD

__all__ = ["training_notes"]


def training_notes(graph: Graph) -> list[str]:
    """One sentence for each kind of leftover of training that changes what the model computes, or that does not fit it any more."""
    found = []
    names = [graph.names[index] for index in range(len(graph.nodes)) if _normalises_batches(graph, index)]
    if names:
        found.append(
            f"BatchNormalization node {_some(names)} in training mode: it takes the statistics of the batch at hand, so outputs depend on "
            "which samples run together; export the model for inference"
        )
    names = [graph.names[index] for index in range(len(graph.nodes)) if _drops(graph, index)]
    if names:
        found.append(f"Dropout node {_some(names)} in training mode: what it emits is random; export the model for inference")
    if graph.model.training_info:
        found.append("the model has training_info, which is left as it is and may not fit the pruned weights")
    return found


def _some(names: list[str]) -> str:
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"{names[0]}{more} is"


def _normalises_batches(graph: Graph, index: int) -> bool:
    node = graph.nodes[index]
    if node.op_type != "BatchNormalization" or node.domain not in STANDARD:
        return False
    return bool(attributes(node).get("training_mode", 0)) or (graph.opset < 14 and sum(map(bool, node.output)) > 1)


def _drops(graph: Graph, index: int) -> bool:
    node = graph.nodes[index]
    if node.op_type != "Dropout" or node.domain not in STANDARD or len(node.input) < 3 or not node.input[2]:
        return False
    value = graph.constant(node.input[2])
    ratio = graph.constant(node.input[1]) if node.input[1] else None
    return value is not None and bool(value.any()) and (ratio is None or bool(ratio.any()))
