"""A linear layer with both operands rounded to 8 bits, in float64: the specification of `ops.scaled_linear`'s 8-bit
product."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from llava_fast.ops.rounding import rounded_rows


def rounded_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, in float64, of x [n, in] rounded as the weight is: codes [out, in], scale [out, 1]."""
    own, own_scale = rounded_rows(x, codes.dtype)
    weight = codes.double() * scale.double()
    return F.linear(own.double() * own_scale.double(), weight, None if bias is None else bias.double())
