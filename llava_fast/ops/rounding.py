"""Rounding rows to 8 bits with one scale each."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Dtype of 8 bits -> its largest value, which a row's largest absolute value becomes."""
TYPICAL_ERROR = {torch.int8: 2e-2, torch.float8_e4m3fn: 5e-2}
"""What ||found - exact|| / ||exact|| of a product of two rounded operands stays below if their values are normally
distributed. A row's largest of up to 2^16 values is then at most 5 standard deviations, so int8's error is 5 / 127 /
sqrt(12) of one: 0.011 for an operand and 0.016 for two. float8_e4m3fn keeps 4 bits: 2^-4 / sqrt(3) at most, 0.036 and
0.051; 0.026 and 0.037 on average over a binade."""


def rounded_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(codes [n, in] in `dtype`, one of LARGEST; scale [n, 1], float32 or, of float64, float64): x [n, in] is about
    codes * scale. Each row is rounded to the nearest with the scale max|row| / LARGEST; that of zeros is positive."""
    wide = torch.promote_types(x.dtype, torch.float32)
    largest = torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True, dtype=wide)
    scale = (largest / LARGEST[dtype]).clamp_(min=torch.finfo(torch.float32).tiny)
    codes = x / scale
    return (codes.round_() if dtype == torch.int8 else codes).to(dtype), scale
