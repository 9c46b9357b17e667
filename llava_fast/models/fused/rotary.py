"""Rotary position embedding of queries and keys."""

from __future__ import annotations

from torch import Tensor

from llava_fast.models.fused.gate import takes
from llava_fast.ops import rope


def rotated(query_RHD: Tensor, key_RKD: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Queries and keys rotated by (cos, sin), each [R, 1, D], the sign of sin's first half folded in."""
    if takes("rope", query_RHD):
        return rope(query_RHD, key_RKD, *rotation, is_signed=True)
    return rotate(query_RHD, *rotation), rotate(key_RKD, *rotation)


def rotate(x_RHD: Tensor, cos_R1D: Tensor, sin_R1D: Tensor) -> Tensor:
    """Rotary embedding with halves paired (Llama's convention). The sign of sin's first half is folded in."""
    half = x_RHD.shape[-1] // 2
    return x_RHD * cos_R1D + x_RHD.roll(half, -1) * sin_R1D
