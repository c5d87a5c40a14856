"""Rows for attention and rotary embeddings."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from relief_onnx.interpreter.registry import Table
from relief_onnx.interpreter.values import torch_dtype

__all__ = ["ROWS", "attend", "join_heads", "split_heads"]

ROWS = Table()
op = ROWS.op


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[batch, tokens, heads * size] as [batch, heads, tokens, size]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[batch, heads, tokens, size] as [batch, tokens, heads * size]."""
    return x.transpose(1, 2).flatten(2)


def attend(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, bias: Tensor | None, scale: float, softcap: float = 0.0
) -> Tensor:  # fmt: skip
    """Softmax of q k (bent to stay within softcap; plus bias, -inf where not allowed) times v; a query that may see nothing gives 0."""
    if allowed is None and not softcap:
        return F.scaled_dot_product_attention(q, k, v, bias, scale=scale)
    scores = (q * scale) @ k.transpose(-1, -2)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    return _probabilities(scores if bias is None else scores + bias, allowed) @ v


def _probabilities(scores: Tensor, allowed: Tensor | None) -> Tensor:
    if allowed is None:
        return torch.softmax(scores, -1)
    seen = allowed.any(-1, keepdim=True)
    masked = scores.masked_fill(~allowed, float("-inf")).masked_fill(~seen, 0.0)
    return torch.softmax(masked, -1) * seen


def _visible(q: Tensor, total: int, offset: Tensor, is_causal: int, left: int, right: int) -> Tensor | None:
    """Which keys each query may see by place: flags [batch or 1, 1, queries, keys], or None for all."""
    place = offset.reshape(-1, 1, 1, 1) + torch.arange(q.shape[2], device=q.device)[:, None]
    key = torch.arange(total, device=q.device)
    allowed = None
    bounds = ((is_causal, key <= place), (left >= 0, key >= place - left), (right >= 0, key <= place + right))
    for asked, flags in bounds:
        if asked:
            allowed = flags if allowed is None else allowed & flags
    return allowed


@op("Attention", since=23)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    nonpad_kv_seqlen: Tensor | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int = 0,
    left_window_size: int = -1,
    q_num_heads: int = 0,
    qk_matmul_output_mode: int = 0,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    outputs: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    flat = q.dim() == 3
    if flat:
        q, k, v = split_heads(q, q_num_heads), split_heads(k, kv_num_heads), split_heads(v, kv_num_heads)
    offset = torch.zeros(1, dtype=torch.int64, device=q.device)
    if past_key is not None and past_value is not None:
        offset = offset + past_key.shape[2]
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    elif nonpad_kv_seqlen is not None:
        offset = nonpad_kv_seqlen.to(q.device) - q.shape[2]
    present = (k, v)
    allowed = _visible(q, k.shape[2], offset, is_causal, left_window_size, right_window_size)
    if nonpad_kv_seqlen is not None:
        filled = torch.arange(k.shape[2], device=q.device) < nonpad_kv_seqlen.to(q.device).reshape(-1, 1, 1, 1)
        allowed = filled if allowed is None else allowed & filled
    bias = None
    if attn_mask is not None:
        short = k.shape[2] - attn_mask.shape[-1]
        if attn_mask.dtype == torch.bool:
            flags = F.pad(attn_mask, (0, short)) if short else attn_mask
            allowed = flags if allowed is None else allowed & flags
        else:
            bias = F.pad(attn_mask, (0, short), value=float("-inf")) if short else attn_mask
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if outputs < 4 and not softcap and (bias is None or allowed is None):
        y = attend(q, k, v, allowed, bias, factor)
        return (join_heads(y) if flat else y, *present)[:outputs] if outputs > 1 else (join_heads(y) if flat else y)
    raw = (q * math.sqrt(factor)) @ (k * math.sqrt(factor)).transpose(-1, -2)
    capped = softcap * torch.tanh(raw / softcap) if softcap else raw
    biased = capped if bias is None else capped + bias
    if bias is not None:
        seen = bias > float("-inf")
        allowed = seen if allowed is None else allowed & seen
    if allowed is not None:
        biased = biased.masked_fill(~allowed, float("-inf"))
        allowed = allowed.expand_as(biased)
    precise = biased if softmax_precision is None else biased.to(torch_dtype(softmax_precision))
    shares = _probabilities(precise, allowed).to(q.dtype)
    y = shares @ v
    return (join_heads(y) if flat else y, *present, (raw, capped, biased, shares)[qk_matmul_output_mode])[:outputs]


@op("RotaryEmbedding")
def rotary_embedding(
    x: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """Pairs of entries turned by an angle that depends on the token's place."""
    heads = split_heads(x, num_heads) if x.dim() == 3 else x
    size = rotary_embedding_dim or heads.shape[-1]
    turned, rest = heads[..., :size], heads[..., size:]
    cos, sin = (cache if position_ids is None else cache[position_ids] for cache in (cos_cache, sin_cache))
    cos, sin = cos[..., : size // 2].unsqueeze(1), sin[..., : size // 2].unsqueeze(1)
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    pair = (a * cos - b * sin, a * sin + b * cos)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    y = torch.cat([turned, rest], -1)
    return join_heads(y) if x.dim() == 3 else y
