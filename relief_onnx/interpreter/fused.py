"""Rows for what onnxruntime's optimiser writes: fused operators of domain com.microsoft."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from relief_onnx.interpreter.activations import ACTIVATIONS
from relief_onnx.interpreter.attention import split_heads
from relief_onnx.interpreter.convolution import conv
from relief_onnx.interpreter.fused_attention import masked_attention
from relief_onnx.interpreter.normalisation import layer_normalization
from relief_onnx.interpreter.products import gemm
from relief_onnx.interpreter.registry import Table

__all__ = ["ROWS"]

ROWS = Table()
MICROSOFT = "com.microsoft"


def _known_activation(values: Mapping[str, Any]) -> str | None:
    name = values.get("activation", "Relu")
    return None if name in ACTIVATIONS or name == "Clip" else f"activation {name}"


def _activate(x: Tensor, name: str, parameters: list[float]) -> Tensor:
    return x.clamp(*parameters) if name == "Clip" else ACTIVATIONS[name](x, *parameters)


@ROWS.op("Gelu", domain=MICROSOFT)
def gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


@ROWS.op("FastGelu", domain=MICROSOFT)
def fast_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@ROWS.op("BiasGelu", domain=MICROSOFT)
def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


@ROWS.op("QuickGelu", domain=MICROSOFT)
def quick_gelu(x: Tensor, *, alpha: float = 1.702) -> Tensor:
    return x * torch.sigmoid(alpha * x)


@ROWS.op("FusedMatMul", domain=MICROSOFT)
def fused_matmul(
    a: Tensor, b: Tensor, *, alpha: float = 1.0, transA: int = 0, transB: int = 0, transBatchA: int = 0, transBatchB: int = 0
) -> Tensor:
    a = a.movedim(0, -2) if transBatchA else a
    b = b.movedim(0, -2) if transBatchB else b
    y = torch.matmul(a.transpose(-1, -2) if transA else a, b.transpose(-1, -2) if transB else b)
    return y if alpha == 1 else alpha * y


@ROWS.op("FusedConv", domain=MICROSOFT, check=_known_activation)
def fused_conv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    z: Tensor | None = None,
    *,
    activation: str = "Relu",
    activation_params: list[float] | None = None,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    y = conv(x, w, b, auto_pad=auto_pad, dilations=dilations, group=group, pads=pads, strides=strides)
    return _activate(y if z is None else y + z, activation, activation_params or [])


@ROWS.op("FusedGemm", domain=MICROSOFT, check=_known_activation)
def fused_gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    activation: str = "Relu",
    activation_alpha: float | None = None,
    activation_beta: float | None = None,
    activation_gamma: float | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    y = gemm(a, b, c, alpha=alpha, beta=beta, transA=transA, transB=transB)
    return _activate(y, activation, [value for value in (activation_alpha, activation_beta) if value is not None])


def _rms(x: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * scale


@ROWS.op("SimplifiedLayerNormalization")
def simplified_layer_normalization(x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Tensor:
    return _rms(x, scale, epsilon)


def _summed(x: Tensor, skip: Tensor, bias: Tensor | None) -> Tensor:
    return x + skip if bias is None else x + skip + bias


@ROWS.op("SkipLayerNormalization", domain=MICROSOFT)
def skip_layer_normalization(
    x: Tensor, skip: Tensor, gamma: Tensor, beta: Tensor | None = None, bias: Tensor | None = None, *, epsilon: float = 1e-12
) -> tuple[Tensor, ...]:
    total = _summed(x, skip, bias)
    y, mean, inverse = layer_normalization(total, gamma, beta, epsilon=epsilon, outputs=3)
    return y, mean, inverse, total


@ROWS.op("SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def skip_simplified_layer_normalization(
    x: Tensor, skip: Tensor, gamma: Tensor, bias: Tensor | None = None, *, epsilon: float = 1e-12
) -> tuple[Tensor | None, ...]:
    total = _summed(x, skip, bias)
    return _rms(total, gamma, epsilon), None, None, total


@ROWS.op("EmbedLayerNormalization", domain=MICROSOFT)
def embed_layer_normalization(
    input_ids: Tensor,
    segment_ids: Tensor | None,
    words: Tensor,
    positions: Tensor,
    segments: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
    mask_index_type: int = 1,
) -> tuple[Tensor, ...]:
    """The second output is how many tokens of each entry count."""
    places = torch.arange(input_ids.shape[1], device=words.device)[None] if position_ids is None else position_ids
    total = F.embedding(input_ids.long(), words) + F.embedding(places.long(), positions)
    if segment_ids is not None and segments is not None:
        total = total + F.embedding(segment_ids.long(), segments)
    counted = torch.zeros(input_ids.shape[0], dtype=torch.int32) if mask is None else mask.sum(1, dtype=torch.int32)
    return F.layer_norm(total, total.shape[-1:], gamma, beta, epsilon), counted, total


@ROWS.op("QEmbedLayerNormalization", domain=MICROSOFT)
def quantised_embed_layer_normalization(
    input_ids: Tensor, segment_ids: Tensor | None, *tensors: Tensor | None, epsilon: float = 1e-12
) -> tuple[Tensor, ...]:
    """Tables, scale and shift of the norm are integers; behind them come the mask, the scales of all five and their zero points."""
    integers, mask, scales, zeros = tensors[:5], tensors[5], tensors[6:11], tensors[11:]
    floats = [
        None if table is None else (table.float() - (0.0 if zero is None else zero.float())) * scale
        for table, scale, zero in zip(integers, scales, (*zeros, *[None] * 5), strict=False)
    ]
    word, place, kind, factor, shift = floats
    assert word is not None
    assert place is not None
    assert factor is not None
    assert shift is not None
    found: tuple[Tensor, ...] = embed_layer_normalization(input_ids, segment_ids, word, place, kind, factor, shift, mask, epsilon=epsilon)
    return found[:2]


def _only_plain(values: Mapping[str, Any]) -> str | None:
    odd = [name for name in ("do_rotary", "past_present_share_buffer") if values.get(name)]
    return odd[0] if odd else None


@ROWS.op("Attention", domain=MICROSOFT, check=_only_plain, absent=(4,))
def attention(
    x: Tensor,
    weights: Tensor,
    bias: Tensor | None = None,
    mask_index: Tensor | None = None,
    past: None = None,
    attention_bias: Tensor | None = None,
    *,
    do_rotary: int = 0,
    mask_filter_value: float = -10000.0,
    num_heads: int,
    past_present_share_buffer: int = 0,
    qkv_hidden_sizes: list[int] | None = None,
    scale: float | None = None,
    unidirectional: int = 0,
) -> Tensor:
    projected = x @ weights if bias is None else x @ weights + bias
    sizes = qkv_hidden_sizes or [weights.shape[1] // 3] * 3
    q, k, v = (split_heads(part, num_heads) for part in projected.split(sizes, -1))
    return masked_attention(q, k, v, mask_index, attention_bias, scale, unidirectional, mask_filter_value)
