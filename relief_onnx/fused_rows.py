"""The table of nodes that are laid open: which plain operators say what each does (onnxruntime's contrib operators, CPU; Einsum).

A row fills a `Place`; it raises Barrier where a form is not known. Element-wise operators with one input (Gelu, QuickGelu, FastGelu) need
no row: they are in the operator table (`ops`) as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from relief_onnx.fused_attention import attention, multi_head_attention
from relief_onnx.fused_groups import group_query_attention
from relief_onnx.fused_norms import embed_layer_normalization, skip_layer_normalization, skip_simplified_layer_normalization
from relief_onnx.fused_place import MAIN, Place
from relief_onnx.fused_standard import attention as standard_attention
from relief_onnx.fused_standard import rotary_embedding
from relief_onnx.microsoft import MICROSOFT
from relief_onnx.moves import Barrier
from relief_onnx.sources import Source, trace_constant
from relief_onnx.stacked import stacked_matmul
from relief_onnx.stored_einsum import stored_einsum

__all__ = ["ROWS"]

Row = Callable[[Place], None]

# Parameters of activations, in the order in which a fused node has them.
_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "Relu": (), "Sigmoid": (), "Tanh": (), "HardSigmoid": ("alpha", "beta"), "LeakyRelu": ("alpha",), "Clip": ("min", "max"),
    "Elu": ("alpha",), "Softplus": (), "Softsign": (), "ThresholdedRelu": ("alpha",), "HardSwish": (),
}  # fmt: skip


def _activated(place: Place, x: str, parameters: list[float]) -> None:
    """The activation that a fused node ends with."""
    name = str(place.values.get("activation", ""))
    if name not in _PARAMETERS:
        raise Barrier(f"its activation {name or '(none)'} is not known")
    names = _PARAMETERS[name]
    if len(parameters) not in (0, len(names)):
        raise Barrier(f"its activation {name} has {len(parameters)} parameters")
    if name == "Clip" and place.graph.opset >= 11:
        limits = [place.number(f"act/{key}", value, place.input(1)) for key, value in zip(names, parameters, strict=False)]
        place.op("act", name, x, *limits, output=place.output(0))
    else:
        values: dict[str, Any] = dict(zip(names, parameters, strict=False))
        place.op("act", name, x, output=place.output(0), **values)


def fused_conv(place: Place) -> None:
    """Conv, a sum with another branch, an activation."""
    own = {key: value for key, value in place.values.items() if key not in ("activation", "activation_params")}
    x = place.op(MAIN, "Conv", *(place.input(slot) for slot in range(3)), **own)
    place.slots[2], place.copied = (MAIN, 2), MAIN
    if place.input(3):
        x = place.op("sum", "Add", x, place.input(3))
    _activated(place, x, list(place.values.get("activation_params", ())))


def fused_gemm(place: Place) -> None:
    """Gemm and an activation."""
    own = {key: value for key, value in place.values.items() if not key.startswith("activation")}
    x = place.op(MAIN, "Gemm", *(place.input(slot) for slot in range(3)), **own)
    place.slots[2], place.copied = (MAIN, 2), MAIN
    given = (place.values.get(f"activation_{name}") for name in ("alpha", "beta", "gamma"))
    _activated(place, x, [value for value in given if value is not None][: len(_PARAMETERS.get(str(place.values.get("activation")), ()))])


def fused_matmul(place: Place) -> None:
    """Transpose, scale, MatMul. The factor goes with the activation, so that a weight is read as it is stored."""
    sides = []
    for slot, letter in enumerate("AB"):
        batch, flip = place.values.get(f"transBatch{letter}", 0), place.values.get(f"trans{letter}", 0)
        rank = place.rank(slot)
        name = place.input(slot)
        if flip or batch:
            if rank is None:
                raise Barrier(f"the shape of {name} is not known")
            order = list(range(rank))
            if batch and rank > 2:
                order = [*range(1, rank - 1), 0, rank - 1]  # the first axis is the one of the rows
            if flip and rank > 1:
                order[-2:] = order[:-3:-1]
            if order != list(range(rank)):
                name = place.op(f"turned_{letter}", "Transpose", name, perm=order)
        sides.append(name)
    alpha = float(place.values.get("alpha", 1.0))
    if alpha != 1:
        side = 1 if isinstance(trace_constant(place.graph, place.input(0)), Source) else 0
        sides[side] = place.op("scaled", "Mul", sides[side], place.number("alpha", alpha, place.input(1)))
    place.op(MAIN, "MatMul", *sides, output=place.output(0))


def _after_bias(operator: str) -> Row:
    """A bias, then an activation."""

    def row(place: Place) -> None:
        x = place.op("bias", "Add", place.input(0), place.input(1)) if place.input(1) else place.input(0)
        place.op(MAIN, operator, x, output=place.output(0), domain=MICROSOFT)

    return row


def fast_gelu(place: Place) -> None:
    """With a bias; without one it is in the operator table."""
    if not place.input(1):
        raise Barrier("it has no bias to lay open")
    _after_bias("FastGelu")(place)


def bias_dropout(place: Place) -> None:
    """Bias, dropout that does nothing in inference, residual."""
    training = place.graph.constant(place.input(4)) if place.input(4) else np.zeros(())
    if training is None or bool(np.any(training)) or place.is_read(1):
        raise Barrier("it is in training mode")
    x = place.op(MAIN, "Add", place.input(0), place.input(1), output="" if place.input(2) else place.output(0))
    if place.input(2):
        place.op("residual", "Add", x, place.input(2), output=place.output(0))


ROWS: Mapping[tuple[str, str], Row] = {
    ("", "Einsum"): stored_einsum,
    ("", "MatMul"): stacked_matmul,
    ("", "Attention"): standard_attention,
    ("", "RotaryEmbedding"): rotary_embedding,
    (MICROSOFT, "FusedConv"): fused_conv,
    (MICROSOFT, "FusedGemm"): fused_gemm,
    (MICROSOFT, "FusedMatMul"): fused_matmul,
    (MICROSOFT, "BiasGelu"): _after_bias("Gelu"),
    (MICROSOFT, "FastGelu"): fast_gelu,
    (MICROSOFT, "BiasDropout"): bias_dropout,
    (MICROSOFT, "SkipLayerNormalization"): skip_layer_normalization,
    (MICROSOFT, "SkipSimplifiedLayerNormalization"): skip_simplified_layer_normalization,
    (MICROSOFT, "EmbedLayerNormalization"): embed_layer_normalization,
    (MICROSOFT, "Attention"): attention,
    (MICROSOFT, "MultiHeadAttention"): multi_head_attention,
    (MICROSOFT, "GroupQueryAttention"): group_query_attention,
}
