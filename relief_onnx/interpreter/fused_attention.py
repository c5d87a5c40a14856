"""Rows for attention of domain com.microsoft with keys and values of before, and with heads in groups."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from relief_onnx.errors import Unsupported
from relief_onnx.interpreter.attention import attend, join_heads, split_heads
from relief_onnx.interpreter.registry import Table

__all__ = ["ROWS", "masked_attention"]

ROWS = Table()
MICROSOFT = "com.microsoft"


def _mask(mask: Tensor, keys: int) -> Tensor:
    """Which keys count, [batch, 1, queries or 1, keys]: from lengths [batch], flags [batch, keys] or flags [batch, queries, keys]."""
    if mask.dim() == 1:
        return (torch.arange(keys, device=mask.device) < mask[:, None])[:, None, None]
    return mask.bool()[:, None, None] if mask.dim() == 2 else mask.bool()[:, None]


def masked_attention(
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


@ROWS.op("MultiHeadAttention", domain=MICROSOFT, absent=(8, 9))
def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    *,
    mask_filter_value: float = -10000.0,
    num_heads: int,
    scale: float | None = None,
    unidirectional: int = 0,
    outputs: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    if bias is not None:
        sizes = [query.shape[-1], query.shape[-1], bias.shape[0] - 2 * query.shape[-1]]
        query, key, value = (part + add for part, add in zip((query, key, value), bias.split(sizes), strict=True))
    q, k, v = (split_heads(part, num_heads) for part in (query, key, value))
    if past_key is not None and past_value is not None:
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    y = masked_attention(q, k, v, key_padding_mask, attention_bias, scale, unidirectional, mask_filter_value)
    return y if outputs == 1 else (y, k, v)[:outputs]


def _only_plain(values: Mapping[str, Any]) -> str | None:
    odd = [name for name in ("smooth_softmax", "qk_output") if values.get(name)]
    return odd[0] if odd else None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: int) -> Tensor:
    """Pairs of entries of [batch, heads, tokens, size] turned by an angle for each place; what there are no angles for stays."""
    cos, sin = cos[:, None], sin[:, None]
    x, rest = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], -1)
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    pair = (a * cos - b * sin, a * sin + b * cos)
    return torch.cat([torch.stack(pair, -1).flatten(-2), rest] if interleaved else [*pair, rest], -1)


def _joined(past: Tensor | None, new: Tensor, before: Tensor, length: int) -> Tensor:
    """What is handed on [batch, groups, length, size]: of each sample what it has of before, and then its new entries."""
    batch, groups, tokens, size = new.shape
    room = new.new_zeros(batch, groups, length, size) if past is None else F.pad(past, (0, 0, 0, max(0, length - past.shape[2])))
    places = (before[:, None] + torch.arange(tokens, device=new.device)).clamp(max=room.shape[2] - 1)
    return room.scatter(2, places[:, None, :, None].expand_as(new), new)


@ROWS.op("GroupQueryAttention", domain=MICROSOFT, check=_only_plain, absent=(9, 10, 11, 12, 13))
def group_query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor | None,
    past_value: Tensor | None,
    seqlens_k: Tensor,
    total_sequence_length: Tensor,
    cos_cache: Tensor | None = None,
    sin_cache: Tensor | None = None,
    *,
    do_rotary: int = 0,
    kv_num_heads: int,
    local_window_size: int = -1,
    num_heads: int,
    qk_output: int = 0,
    rotary_interleaved: int = 0,
    scale: float | None = None,
    smooth_softmax: int = 0,
    softcap: float = 0.0,
    outputs: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    """Causal; each head of keys and values serves several of queries. seqlens_k [batch]: how many keys each sample has, less one."""
    if past_key is not None and outputs < 3:
        raise Unsupported("GroupQueryAttention has a past and hands nothing on, so onnxruntime does not read it; export its outputs too")
    q, k, v = split_heads(query, num_heads), split_heads(key, kv_num_heads), split_heads(value, kv_num_heads)
    tokens = q.shape[2]
    before = (seqlens_k.reshape(-1).long() + 1 - tokens).clamp(min=0)
    places = before[:, None] + torch.arange(tokens, device=q.device)
    if do_rotary and cos_cache is not None and sin_cache is not None:
        turns = cos_cache[places], sin_cache[places]
        q, k = (_turned(x, *turns, rotary_interleaved) for x in (q, k))
    keys, values = (_joined(past, new, before, int(total_sequence_length)) for past, new in ((past_key, k), (past_value, v)))
    column = torch.arange(keys.shape[2], device=q.device)
    allowed = column <= places[..., None]
    if local_window_size > 0:
        allowed = allowed & (column > places[..., None] - local_window_size)
    groups = num_heads // kv_num_heads
    factor = scale or 1 / math.sqrt(q.shape[-1])
    y = attend(q, keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1), allowed[:, None], None, factor, softcap)
    return join_heads(y) if outputs == 1 else (join_heads(y), keys, values)[:outputs]
