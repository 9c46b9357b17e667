"""Matrix products with quantised weights by csrc/decode, on up to torch.get_num_threads() threads.

x is rounded to 8 bits with one scale per 32 elements. Products are summed exactly within such a group, and the groups
in float32. Above MAX_ROWS rows the weight is repacked once per call, and x has one scale per group of the weight, or
per 128 elements if a row of the weight has a single scale. All instruction sets give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import llava_fast._C as _C
from llava_fast.ops.quantised_linear.fields import fields_of
from llava_fast.ops.quantised_linear.weight import QuantisedWeight

MAX_ROWS = 32  # above this a blocked matrix product is faster


def unfit(x: Tensor) -> str | None:
    """Why the native backend does not support x; None if it does."""
    rows = x.shape[:-1].numel()
    if not x.is_cpu:
        return f"it takes tensors on the CPU, x is on {x.device}"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, x is {x.dtype}"
    if rows > MAX_ROWS and not _C.fast_product():
        return f"it takes more than {MAX_ROWS} rows only with AVX2, x has {rows}"
    return None


def quantised_linear(x: Tensor, weight: QuantisedWeight, bias: Tensor | None) -> Tensor:
    rows = x.shape[:-1].numel()
    return _applied(_C.linear if rows <= MAX_ROWS else _C.product, x, weight, bias)


def few_rows(x: Tensor, weight: Tensor | QuantisedWeight, bias: Tensor | None) -> Tensor:
    """`quantised_linear` for up to MAX_ROWS rows. The weight may also be a contiguous [out, in] in float32 or bfloat16;
    x is then not rounded."""
    return _applied(_C.linear, x, weight, bias)


def _applied(run: Callable[..., None], x: Tensor, weight: Tensor | QuantisedWeight, bias: Tensor | None) -> Tensor:
    out, columns = weight.shape
    flat = x.flatten(0, -2).float().contiguous()
    bias = None if bias is None else bias.float().contiguous()
    y = torch.empty((len(flat), out), dtype=torch.float32, device="cpu")
    if len(flat):
        fields = fields_of(weight, bias)
        run(flat.data_ptr(), len(flat), fields, columns, out, y.data_ptr(), torch.get_num_threads())
    return y.to(x.dtype).view(*x.shape[:-1], out)
