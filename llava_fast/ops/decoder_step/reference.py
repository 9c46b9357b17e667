"""One decoding step in plain PyTorch: the specification of `llava_fast.ops.decoder_step`. Runs in any dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from llava_fast.ops.cached_rows import dequantise_rows, quantise_rows
from llava_fast.ops.decoder_step.weights import DecoderWeights, LayerWeights
from llava_fast.ops.paging import run_views
from llava_fast.ops.quantised_linear.reference import quantised_linear
from llava_fast.ops.quantised_linear.weight import QuantisedWeight


def decoder_step(
    x: Tensor,
    weights: DecoderWeights,
    cos: Tensor,
    sin: Tensor,
    segments: Sequence[Tensor],
    tables: Sequence[Sequence[int]],
    before: Sequence[int],
) -> Tensor:
    runs = [run_views(segments, table) for table in tables]
    for number, layer in enumerate(weights.layers):
        normed = _rms_norm(x, layer.input_norm, weights.eps)
        window = weights.windows[number]
        of_layer = [[run[number] for run in mine] for mine in runs]
        attended = _attention(normed, layer, weights, cos, sin, of_layer, before, window)
        x = x + _linear(attended, layer.o, layer.o_bias)
        normed = _rms_norm(x, layer.post_norm, weights.eps)
        gate = F.silu(_linear(normed, layer.gate, layer.gate_bias))
        x = x + _linear(gate * _linear(normed, layer.up, layer.up_bias), layer.down, layer.down_bias)
    return _rms_norm(x, weights.norm, weights.eps)


def _attention(x, layer: LayerWeights, weights: DecoderWeights, cos, sin, runs, before, window):
    split = (-1, weights.head_dim)
    query = _rotate(_linear(x, layer.q, layer.q_bias).unflatten(-1, split), cos, sin)
    key = _rotate(_linear(x, layer.k, layer.k_bias).unflatten(-1, split), cos, sin)
    value = _linear(x, layer.v, layer.v_bias).unflatten(-1, split)
    group = weights.heads // weights.kv_heads
    rows = []
    for number, (mine, at) in enumerate(zip(runs, before, strict=True)):
        _store(mine, at, torch.stack([key[number], value[number]]))
        first = max(0, at + 1 - window) if window else 0
        cached = torch.cat(mine, 2)[:, :, first : at + 1]  # [2, K, rows, D]
        if cached.dtype == torch.int8:
            cached = dequantise_rows(cached, x.dtype)
        my_keys, my_values = cached.repeat_interleave(group, 1)  # [H, rows, D] each
        scores = (my_keys @ query[number, :, :, None]).squeeze(-1) * weights.head_dim**-0.5
        wide = torch.promote_types(x.dtype, torch.float32)
        rows.append((scores.softmax(-1, dtype=wide).to(x.dtype)[:, None] @ my_values).flatten())
    return torch.stack(rows)


def _linear(x: Tensor, weight: Tensor | QuantisedWeight, bias: Tensor | None) -> Tensor:
    if isinstance(weight, QuantisedWeight):
        return quantised_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def _store(runs: list[Tensor], at: int, row: Tensor) -> None:
    """Write `row` [2, K, D] at index `at` of the concatenated runs."""
    if runs[0].dtype == torch.int8:
        row = quantise_rows(row)
    for run in runs:
        if at < run.shape[2]:
            run[:, :, at] = row
            return
        at -= run.shape[2]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
