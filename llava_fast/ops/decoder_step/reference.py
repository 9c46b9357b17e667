"""One decoding step in plain PyTorch: the specification of `llava_fast.ops.decoder_step`. Runs in any dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from llava_fast.ops.decoder_step.weights import DecoderWeights, LayerWeights


def decoder_step(
    x: Tensor,
    weights: DecoderWeights,
    cos: Tensor,
    sin: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    before: Sequence[int],
) -> Tensor:
    for number, layer in enumerate(weights.layers):
        normed = _rms_norm(x, layer.input_norm, weights.eps)
        window = weights.windows[number]
        attended = _attention(normed, layer, weights, cos, sin, keys[number], values[number], before, window)
        x = x + F.linear(attended, layer.o, layer.o_bias)
        normed = _rms_norm(x, layer.post_norm, weights.eps)
        gate = F.silu(F.linear(normed, layer.gate, layer.gate_bias))
        x = x + F.linear(gate * F.linear(normed, layer.up, layer.up_bias), layer.down, layer.down_bias)
    return _rms_norm(x, weights.norm, weights.eps)


def _attention(x, layer: LayerWeights, weights: DecoderWeights, cos, sin, keys, values, before, window):
    split = (-1, weights.head_dim)
    query = _rotate(F.linear(x, layer.q, layer.q_bias).unflatten(-1, split), cos, sin)
    key = _rotate(F.linear(x, layer.k, layer.k_bias).unflatten(-1, split), cos, sin)
    value = F.linear(x, layer.v, layer.v_bias).unflatten(-1, split)
    group = weights.heads // weights.kv_heads
    rows = []
    for slot, at in enumerate(before):
        keys[slot, :, at], values[slot, :, at] = key[slot], value[slot]
        first = max(0, at + 1 - window) if window else 0
        mine = (table[slot, :, first : at + 1].repeat_interleave(group, 0) for table in (keys, values))
        my_keys, my_values = mine  # [H, rows, D] each
        scores = (my_keys @ query[slot, :, :, None]).squeeze(-1) * weights.head_dim**-0.5
        wide = torch.promote_types(x.dtype, torch.float32)
        rows.append((scores.softmax(-1, dtype=wide).to(x.dtype)[:, None] @ my_values).flatten())
    return torch.stack(rows)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
