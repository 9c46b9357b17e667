"""Matrix products with bfloat16 weights by csrc/decode: float32 sums, up to torch.get_num_threads() threads."""

from __future__ import annotations

import torch
from torch import Tensor

from llava_fast.ops.quantised_linear.native import MAX_ROWS, few_rows

__all__ = ["DTYPE", "MAX_ROWS", "linear", "unfit"]
DTYPE = torch.bfloat16


def unfit(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why the native backend does not support this call; None if it does."""
    given = [x, weight] if bias is None else [x, weight, bias]
    rows = x.shape[:-1].numel()
    if not all(t.is_cpu for t in given):
        return f"it takes tensors on the CPU, these are on {', '.join(str(t.device) for t in given)}"
    if any(t.dtype != DTYPE for t in given):
        return f"it takes bfloat16, got {', '.join(str(t.dtype) for t in given)}"
    if not weight.is_contiguous():
        return "the weight is not contiguous"
    if rows > MAX_ROWS:
        return f"it takes up to {MAX_ROWS} rows, x has {rows}"
    return None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return few_rows(x, weight, bias)
