"""The decoding step of csrc/decode, on up to torch.get_num_threads() threads.

Sums are in float32 for every weight dtype. Inputs of quantised layers are rounded to 8 bits, with one scale per 32
elements.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import llava_fast._C as _C
from llava_fast.ops.decoder_step.weights import DecoderWeights

CACHE_KINDS = (torch.float32, torch.bfloat16, torch.int8)  # csrc/decode's numbers


def decoder_step(
    x: Tensor,
    weights: DecoderWeights,
    cos: Tensor,
    sin: Tensor,
    segments: Sequence[Tensor],
    tables: Sequence[Sequence[int]],
    before: Sequence[int],
) -> Tensor:
    out = x.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    sizes = (weights.width, weights.intermediate, weights.heads, weights.kv_heads, weights.head_dim)
    _C.decoder_step(
        out.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        before,
        tables,
        weights.table.data_ptr(),
        weights.norm.data_ptr(),
        weights.windows,
        [segment.data_ptr() for segment in segments],
        [segment.shape[3] for segment in segments],
        (*sizes, segments[0].shape[4]),
        weights.norm.dtype == torch.bfloat16,
        CACHE_KINDS.index(segments[0].dtype),
        weights.eps,
        torch.get_num_threads(),
    )
    return out.to(x.dtype)
