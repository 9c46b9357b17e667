"""Products with quantised weights by csrc/decode, on up to torch.get_num_threads() threads.

x is rounded to 8 bits, a scale to each 32 elements; products are summed exactly within such a group, and the groups in
float32. Above MAX_ROWS rows, where weights are laid out anew for all rows, x has a scale for each group of the weight,
or for 128 elements where a row of the weight has one scale. Each instruction set gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import llava_fast._C as _C
from llava_fast.ops.quantised_linear.fields import fields_of
from llava_fast.ops.quantised_linear.weight import QuantisedWeight

MAX_ROWS = 32  # above this, a matrix product is the faster


def unfit(x: Tensor) -> str | None:
    """Why the native backend cannot take x, or None."""
    rows = x.shape[:-1].numel()
    if not x.is_cpu:
        return f"it takes tensors on the CPU, and x is on {x.device}"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, and x is {x.dtype}"
    if rows > MAX_ROWS and not _C.fast_product():
        return f"it takes more than {MAX_ROWS} rows only with AVX-512 VNNI, and x has {rows}"
    return None


def quantised_linear(x: Tensor, weight: QuantisedWeight, bias: Tensor | None) -> Tensor:
    rows = x.shape[:-1].numel()
    return _applied(_C.linear if rows <= MAX_ROWS else _C.product, x, weight, bias)


def few_rows(x: Tensor, weight: Tensor | QuantisedWeight, bias: Tensor | None) -> Tensor:
    """The same for up to MAX_ROWS rows; also for a weight [out, in] in float32 or bfloat16, contiguous, whose products
    take x as it is."""
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
