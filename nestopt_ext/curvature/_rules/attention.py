"""Attention, taken apart into matrix products and a softmax, which have rules."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .._tape import REWRITES, Unrecordable


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(q k' scale + mask) v; a query that may see no key gets zeros, as PyTorch has it."""
    if enable_gqa:
        groups = query.size(-3) // key.size(-3)
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    if is_causal:
        if attn_mask is not None:
            raise Unrecordable("attention was given a mask and asked for a causal one")
        attn_mask = torch.ones(query.size(-2), key.size(-2), dtype=torch.bool, device=query.device).tril()
    factor = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    weights = _weights((query * factor) @ key.transpose(-2, -1), attn_mask)
    if dropout_p:
        weights = F.dropout(weights, dropout_p)
    return weights @ value


def _weights(scores: Tensor, mask: Tensor | None) -> Tensor:
    """The probabilities of scores, with a mask that says what may be seen, or that is added."""
    if mask is None:
        return torch.softmax(scores, -1)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return torch._safe_softmax(scores, -1)


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Of [L, N, E] and [S, N, E], or without N: [L, N, E], and the weights [N, H, L, S] or their mean over H."""
    if static_k is not None or static_v is not None:
        raise Unrecordable("attention was given static keys or values")
    batched = query.dim() == 3
    packed = in_proj_weight if query is key and key is value and not use_separate_proj_weight else None
    if not batched:
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
    if packed is not None:
        q, k, v = F.linear(query, packed, in_proj_bias).chunk(3, -1)
    else:
        weights = (q_proj_weight, k_proj_weight, v_proj_weight) if in_proj_weight is None else in_proj_weight.chunk(3)
        biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        q, k, v = (_projected(*args) for args in zip((query, key, value), weights, biases, strict=True))
    length, batch, width = q.shape
    if bias_k is not None and bias_v is not None:
        k, v = (torch.cat([x, b.expand(1, batch, width)]) for x, b in ((k, bias_k), (v, bias_v)))
    if add_zero_attn:
        zeros = torch.zeros(1, batch, width, dtype=k.dtype, device=k.device)
        k, v = torch.cat([k, zeros]), torch.cat([v, zeros])
    if is_causal and key_padding_mask is None and not need_weights:
        # The mask is said to be this one, and is not looked at.
        mask: Tensor | None = torch.full((length, len(k)), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    else:
        mask = _additive(attn_mask, key_padding_mask, batch, len(k), q)
    q, k, v = (x.reshape(len(x), batch, num_heads, -1).permute(1, 2, 0, 3) for x in (q, k, v))  # [N, H, length, E / H]
    scores = (q * math.sqrt(num_heads / width)) @ k.transpose(-2, -1)
    # Where weights are asked for, a query that may see no key gets NaN, as in PyTorch.
    p = torch.softmax(scores + mask, -1) if need_weights and mask is not None else _weights(scores, mask)
    if training and dropout_p:
        p = F.dropout(p, dropout_p)
    result = F.linear((p @ v).permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    if not batched:
        result = result.squeeze(1)
    if not need_weights:
        return result, None
    if average_attn_weights:
        p = p.mean(1)
    return result, p if batched else p.squeeze(0)


def _projected(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    assert weight is not None
    return F.linear(x, weight, bias)


def _additive(attn_mask: Tensor | None, padding: Tensor | None, batch: int, keys: int, like: Tensor) -> Tensor | None:
    """Both masks, if there are any, as one that is added to scores [N, H, L, S]; keys without a mask may be seen."""

    def added(mask: Tensor) -> Tensor:
        if mask.dtype == torch.bool:
            mask = torch.where(mask, -torch.inf, 0.0).to(like.dtype)
        missing = keys - mask.size(-1)
        return torch.cat([mask, mask.new_zeros(*mask.shape[:-1], missing)], -1) if missing else mask

    total = None
    if attn_mask is not None:
        total = added(attn_mask)
        if total.dim() == 3:
            total = total.view(batch, -1, *total.shape[1:])
    if padding is not None:
        of_keys = added(padding).unsqueeze(1).unsqueeze(1)
        total = of_keys if total is None else total + of_keys
    return total


REWRITES[F.scaled_dot_product_attention] = scaled_dot_product_attention
REWRITES[F.multi_head_attention_forward] = multi_head_attention
