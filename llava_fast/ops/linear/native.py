"""Matrix products with bfloat16 weights, with float32 sums, on up to torch.get_num_threads() threads: of few rows by
csrc/decode, of many by PyTorch's float32 product, where the processor has no instructions for bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import llava_fast._C as _C
from llava_fast.ops.quantised_linear.native import MAX_ROWS, few_rows

__all__ = ["DTYPE", "MAX_ROWS", "linear", "unfit"]
DTYPE = torch.bfloat16
BLOCK_BYTES = 4 << 20  # of a weight in float32 at a time: it stays in the cache, and is allocated without page faults


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
    if rows > MAX_ROWS and _C.fast_bfloat16():
        return f"it takes up to {MAX_ROWS} rows on this processor, which PyTorch's product suits, x has {rows}"
    return None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return few_rows(x, weight, bias) if x.shape[:-1].numel() <= MAX_ROWS else many_rows(x, weight, bias)


def many_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A block of the weight's rows at a time, widened to float32."""
    out, columns = weight.shape
    flat = x.flatten(0, -2).float()
    y = x.new_empty(len(flat), out)
    step = max(1, BLOCK_BYTES // (4 * max(1, columns)))
    block = torch.empty(min(step, out), columns, dtype=torch.float32, device="cpu")
    with torch.autocast("cpu", enabled=False):  # which would round float32 again
        for first in range(0, out, step):
            rows = slice(first, min(first + step, out))
            wide = block[: rows.stop - first].copy_(weight[rows])
            y[:, rows] = F.linear(flat, wide, None if bias is None else bias[rows].float())
    return y.view(*x.shape[:-1], out)
