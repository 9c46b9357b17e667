"""Attention of one new row per sequence over a paged cache, in plain PyTorch: the specification of
`llava_fast.ops.paged_attention`. It synchronises with the device to count the padding sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    segments: Sequence[Tensor],
    table: Tensor,
    before: Tensor,
    layer: int,
    window: int,
) -> Tensor:
    rows = segments[0].shape[4]
    query, key = _rotate(query, cos[:, None], sin[:, None]), _rotate(key, cos[:, None], sin[:, None])
    real = before >= 0
    at = before.clamp(min=0).long()
    block = table.gather(1, (at // rows)[:, None])[:, 0]
    kept = None
    start = 0
    for segment in segments:
        local, inside = _local(block, start, segment)
        (mine,) = torch.where(inside & real)
        segment[layer, 0][:, local[mine], at[mine] % rows] = key[mine].transpose(0, 1)
        segment[layer, 1][:, local[mine], at[mine] % rows] = value[mine].transpose(0, 1)
        local, inside = _local(table, start, segment)
        found = segment[layer].index_select(2, local.flatten()).unflatten(2, table.shape)  # [2, K, n, width, rows, D]
        kept = found if kept is None else torch.where(inside[None, None, :, :, None, None], found, kept)
        start += segment.shape[3]
    assert kept is not None, "a cache has a segment"
    keys, values = kept.flatten(3, 4).transpose(1, 2)  # [n, K, width * rows, D] each
    column = torch.arange(keys.shape[2], device=query.device)[None]
    seen = column <= before[:, None]
    if window:
        seen &= column > before[:, None] - window
    grouped = query.unflatten(1, (key.shape[1], -1))  # [n, K, G, D]
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (grouped @ keys.mT).to(wide) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    attended = scores.softmax(-1).to(query.dtype) @ values.masked_fill(~seen[:, None, :, None], 0)
    return attended.masked_fill(~real[:, None, None, None], 0).flatten(1)


def _local(block: Tensor, start: int, segment: Tensor) -> tuple[Tensor, Tensor]:
    """Block numbers relative to a segment that begins at block `start` (0 if outside it), and which are inside."""
    local = block.long() - start
    inside = (local >= 0) & (local < segment.shape[3])
    return local.where(inside, 0), inside


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin
