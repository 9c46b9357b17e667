"""Rotary embedding in plain PyTorch: the specification of `llava_fast.ops.rope`.

Element i is paired with element i + D/2, as in transformers' apply_rotary_pos_emb. Source: Su et al. 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, is_signed: bool, inverse: bool, outs: tuple[Tensor, Tensor]
) -> None:
    """Write query [B, H, S, D] and key [B, K, S, D], rotated by cos and sin [B or 1, S, D], to `outs`; with `inverse`,
    apply the transposed map."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = sin.chunk(2, dim=-1)  # factors of the second half in the first, and of the first in the second
    first = first if is_signed else -first
    if inverse:
        first, second = second, first
    for x, out in zip((query, key), outs, strict=True):
        _turn(x, cos, first, second, out)


def _turn(x: Tensor, cos: Tensor, first: Tensor, second: Tensor, out: Tensor) -> None:
    """x * cos + rotate_half(x) * sin in three passes and without temporaries (the unfused steps take five of each). In
    16 bits each product is rounded, as in the unfused steps."""
    torch.mul(x, cos, out=out)
    (out1, out2), (x1, x2) = out.chunk(2, dim=-1), x.chunk(2, dim=-1)
    if {x.dtype, cos.dtype, out.dtype} <= {torch.float32} or out.dtype == torch.float64:
        out1.addcmul_(x2, first)
        out2.addcmul_(x1, second)
    else:
        out1.add_(x2 * first)
        out2.add_(x1 * second)
