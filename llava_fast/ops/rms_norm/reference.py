"""RMSNorm in plain PyTorch: the specification of `llava_fast.ops.rms_norm` and `add_rms_norm`.

Rounding as in transformers' LlamaRMSNorm: x / rms(x) in float32 (float64 for float64 rows), rounded to x's dtype, then
times the weight. rstd is 1 / rms(x), [..., 1]. Source: Zhang and Sennrich 2019.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, rstd) of x [..., width]; y has the dtype of x * weight."""
    # On a CPU passes over memory dominate, so avoid temporaries such as a tensor of squares.
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    rstd = torch.rsqrt(norm.square() / x.shape[-1] + eps)
    normalised = (x * rstd).to(x.dtype)
    return normalised.mul_(weight) if weight.dtype == x.dtype else normalised * weight, rstd


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(s, y, rstd): s = x + residual, and y its RMSNorm."""
    total = x + residual
    return total, *rms_norm(total, weight, eps)


def rms_norm_backward(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, rstd: Tensor, weight: Tensor, needed: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and weight, None where not `needed`; grad_sum, if given, is added to that of x."""
    of_x = of_weight = None
    grad = grad.to(rstd.dtype)
    if needed[1]:
        normalised = (x * rstd).to(x.dtype).to(rstd.dtype)
        of_weight = normalised.mul_(grad).sum_to_size(weight.shape).to(weight.dtype)
    if needed[0]:
        scaled = grad * weight
        along = (scaled * x).mean(-1, keepdim=True)
        of_x = scaled.mul_(rstd).addcmul_(x.to(rstd.dtype), along * rstd.pow(3), value=-1)
        of_x = (of_x if grad_sum is None else of_x.add_(grad_sum)).to(x.dtype)
    return of_x, of_weight
