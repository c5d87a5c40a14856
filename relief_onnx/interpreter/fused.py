"""Rows for what onnxruntime's optimiser writes: fused operators of domain com.microsoft."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from relief_onnx.interpreter.activations import ACTIVATIONS
from relief_onnx.interpreter.attention import join_heads, split_heads
from relief_onnx.interpreter.convolution import conv
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


def _mask(mask: Tensor, keys: int) -> Tensor:
    """Which keys count, [batch, 1, queries or 1, keys]: from lengths [batch], flags [batch, keys] or flags [batch, queries, keys]."""
    if mask.dim() == 1:
        return (torch.arange(keys, device=mask.device) < mask[:, None])[:, None, None]
    return mask.bool()[:, None, None] if mask.dim() == 2 else mask.bool()[:, None]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
    unidirectional: int,
    mask_filter_value: float,
) -> Tensor:
    """Scaled dot products; what is masked is lowered by the filter value, as onnxruntime does."""
    factor = scale or 1 / math.sqrt(q.shape[-1])
    if mask is None and not unidirectional:
        return join_heads(F.scaled_dot_product_attention(q, k, v, bias, scale=factor))
    scores = (q * factor) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + torch.where(_mask(mask, k.shape[2]), 0.0, mask_filter_value)
    if unidirectional:
        scores = scores + torch.full(scores.shape[-2:], mask_filter_value, device=q.device).triu(1 + k.shape[2] - q.shape[2])
    return join_heads(torch.softmax(scores if bias is None else scores + bias, -1) @ v)


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
    return _attend(q, k, v, mask_index, attention_bias, scale, unidirectional, mask_filter_value)


@ROWS.op("MultiHeadAttention", domain=MICROSOFT)
def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    attention_bias: Tensor | None = None,
    *,
    mask_filter_value: float = -10000.0,
    num_heads: int,
    scale: float | None = None,
    unidirectional: int = 0,
) -> Tensor:
    if bias is not None:
        sizes = [query.shape[-1], query.shape[-1], bias.shape[0] - 2 * query.shape[-1]]
        query, key, value = (part + add for part, add in zip((query, key, value), bias.split(sizes), strict=True))
    q, k, v = (split_heads(part, num_heads) for part in (query, key, value))
    return _attend(q, k, v, key_padding_mask, attention_bias, scale, unidirectional, mask_filter_value)
