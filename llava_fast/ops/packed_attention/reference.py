"""Causal attention of each sequence in turn, in plain PyTorch: the specification of `ops.packed_attention`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, query_lengths: Sequence[int], key_lengths: Sequence[int], window: int
) -> Tensor:
    out = []
    lengths = list(query_lengths), list(key_lengths)
    for own, keys, values in zip(query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]), strict=True):
        q, k, v = (each.transpose(0, 1)[None] for each in (own, keys, values))
        out.append(causal(q, k, v, window)[0].transpose(0, 1))
    return torch.cat(out)


def causal(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """[1, H, q, D] over [1, K, k, D], the queries being the last q of the k positions; of the keys up to a query's own
    position it attends to the last `window` (0: to all)."""
    length, total = query.shape[2], key.shape[2]
    grouped = query.shape[1] != key.shape[1]
    if length == total and (not window or total <= window):
        return F.scaled_dot_product_attention(query, key, value, is_causal=length > 1, enable_gqa=grouped)
    position = torch.arange(total - length, total, device=query.device)[:, None]
    mask = visible(position, torch.arange(total, device=query.device), window)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)


def visible(position: Tensor, at: Tensor, window: int) -> Tensor:
    """Which keys at positions `at` a query at `position` attends to."""
    mask = at <= position
    return mask & (at > position - window) if window else mask
