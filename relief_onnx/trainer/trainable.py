"""Which initializers gradients change: weights and biases of layers, tables, scales and shifts of normalisation. Needs no torch.

Other constants of a graph (anchors, grids, factors that an exporter wrote out) were never learned, so they stay.
"""

from __future__ import annotations

from collections.abc import Mapping

from relief_onnx.graph import FLOATS, Graph
from relief_onnx.layers import find

__all__ = ["trainable"]

# Input slots that hold learned vectors.
_LEARNED: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm"), (1, 2)),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), (1, 2, 3)),
    **dict.fromkeys(
        ("BatchNormalization", "InstanceNormalization", "GroupNormalization", "LayerNormalization", "SkipLayerNormalization"), (1, 2)
    ),
    **dict.fromkeys(("RMSNormalization", "SimplifiedLayerNormalization", "PRelu"), (1,)),
    "MatMul": (0, 1),
    "EmbedLayerNormalization": (2, 3, 4, 5, 6),
}


def trainable(graph: Graph) -> list[str]:
    """Their names, in the order of the file."""
    plan = find(graph)
    found = {layer.weight for layer in plan.layers} | {row.weight for row in plan.unranked}
    found |= {layer.bias.name for layer in plan.layers if layer.bias is not None}
    for node in graph.nodes:
        slots = _LEARNED.get(node.op_type, ())
        found |= {node.input[slot] for slot in slots if slot < len(node.input)}
    return [name for name, item in graph.initializers.items() if name in found and item.data_type in FLOATS and len(item.dims) > 0]
