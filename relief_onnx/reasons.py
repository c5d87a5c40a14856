"""Why a stored tensor is no layer's weight: what the node that reads it does with it, in plain words."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

__all__ = ["TABLE_REASON", "why_no_layer"]

TABLE_REASON = (
    "an embedding table: of its rows those that the calibration data happened not to use would all go; it is pruned only where it is "
    "named with --only"
)

# What readers do with a constant: it is no set of connections between units.
_ROLES: Mapping[str, str] = {
    operator: role
    for operators, role in (
        ("Add Sub Sum", "adds to its input (as positions or offsets are)"),
        ("Mul", "multiplies with"),
        ("Div", "divides by or into"),
        ("Pow Mod Max Min Mean PRelu", "combines with its input entry by entry"),
        ("Where Equal Greater Less GreaterOrEqual LessOrEqual And Or Xor", "compares or chooses with"),
        ("Gather GatherElements GatherND Slice Split TopK Compress", "picks entries of"),
        ("ScatterElements ScatterND Scatter TensorScatter", "writes entries into or from"),
        ("Resize Upsample GridSample AffineGrid", "resamples (as tables of positions are)"),
        ("Concat Expand Tile Pad", "puts beside or copies along its input (as class tokens are)"),
        ("ReduceSum ReduceMean ReduceL2 ReduceMax ReduceMin Softmax", "computes another number from"),
        ("BatchNormalization InstanceNormalization GroupNormalization LayerNormalization RMSNormalization", "normalises or scales with"),
    )
    for operator in operators.split()
}


def why_no_layer(node: onnx.NodeProto, name: str, is_float: bool) -> str:
    """The reason why what a node (called `name`) reads is no weight of a layer; for integers, such as int8 weights, without its role."""
    role = _ROLES.get(node.op_type) if is_float and node.domain in ("", "ai.onnx") else None
    if role is None:
        return f"{node.op_type} node {name} reads it, which is not a layer that can be pruned"
    return f"a constant that {node.op_type} node {name} {role}, not connections between units"
