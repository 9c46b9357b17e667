"""Norms fused with the preceding step, which saves writing and reading the rows in between."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava_fast.models.fused.gate import is_plain_parameter, takes
from llava_fast.ops import add_layer_norm, add_rms_norm, double_layer_norm, layer_norm, rms_norm


class RMSNorm(nn.Module):
    """x / rms(x) in float32, rounded, then scaled. Source: Zhang and Sennrich 2019; rounding as Llama's."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if takes("rms_norm", x) and is_plain_parameter(self.weight):
            return rms_norm(x, self.weight, self.eps)
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = torch.promote_types(x.dtype, torch.float32)
        return self.weight * F.rms_norm(x.to(wide), self.weight.shape, None, self.eps).to(x.dtype)


def add_norm(x: Tensor, change: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(s, norm(s)) where s = x + change (None: x). `norm` is an RMSNorm, a LayerNorm or any other module."""
    if isinstance(norm, RMSNorm):
        if change is not None and takes("rms_norm", x, RMSNorm, norm):
            return add_rms_norm(x, change, norm.weight, norm.eps)
    elif has_affine(norm) and takes("layer_norm", x, nn.LayerNorm, norm):
        if change is not None:
            return add_layer_norm(x, change, norm.weight, norm.bias, norm.eps)
        return x, layer_norm(x, norm.weight, norm.bias, norm.eps)
    x = x if change is None else x + change
    return x, norm(x)


def norm_norm(x: Tensor, first: nn.Module, second: nn.Module) -> tuple[Tensor, Tensor]:
    """(s, second(s)) where s = first(x), both LayerNorms (CLIP's before its layers, and the first layer's)."""
    if has_affine(first) and has_affine(second) and takes("layer_norm", x, nn.LayerNorm, first, second):
        return double_layer_norm(x, first.weight, first.bias, first.eps, second.weight, second.bias, second.eps)
    x = first(x)
    return x, second(x)


def has_affine(norm: nn.Module) -> TypeGuard[nn.LayerNorm]:
    """Whether a norm is a LayerNorm over the last dimension with weight and bias."""
    return isinstance(norm, nn.LayerNorm) and norm.bias is not None and norm.weight.dim() == 1
