"""LayerNorm in plain PyTorch: the specification of `llava_fast.ops.layer_norm` and of its two fused forms.

Statistics (mean, 1 / standard deviation) are float32, [..., 1]; for float64 rows float64. Source: Ba et al. 2016.
"""

from __future__ import annotations

import torch
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd) of x [..., width]."""
    weight, bias = _wide_on_cpu(weight, x), _wide_on_cpu(bias, x)
    return torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(s, y, mean, rstd): s = x + residual, and y its LayerNorm."""
    total = x + residual
    return total, *layer_norm(total, weight, bias, eps)


def double_layer_norm(
    x: Tensor, pre_weight: Tensor, pre_bias: Tensor, pre_eps: float, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(s, y, mean and rstd of x, mean and rstd of s): s the first LayerNorm of x, y the second of s."""
    inner, pre_mean, pre_rstd = layer_norm(x, pre_weight, pre_bias, pre_eps)
    out, mean, rstd = layer_norm(inner, weight, bias, eps)
    return inner, out, pre_mean, pre_rstd, mean, rstd


def layer_norm_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, None where not `needed`; grad_sum, if given, is added to that of x.

    x, mean and rstd may be None if only the bias's gradient is needed.
    """
    if x is None:
        summed = grad.reshape(-1, len(weight)).sum(0, dtype=torch.promote_types(grad.dtype, torch.float32))
        return None, None, summed.to(weight.dtype)
    wide = _wide_on_cpu(weight, x)
    # The kernel reads only the dtype of the bias, so `weight` stands in for it.
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad, x, x.shape[-1:], mean, rstd, wide, wide, needed
    )
    if grad_x is not None and grad_sum is not None:
        grad_x = grad_x + grad_sum
    return grad_x, *(None if g is None else g.to(weight.dtype) for g in (grad_weight, grad_bias))


def _wide_on_cpu(parameter: Tensor, x: Tensor) -> Tensor:
    """Parameters in at least float32 on the CPU, where PyTorch keeps the statistics in their dtype. (CUDA's statistics
    are always float32 at least.)"""
    return parameter.to(torch.promote_types(x.dtype, torch.float32)) if x.is_cpu else parameter
