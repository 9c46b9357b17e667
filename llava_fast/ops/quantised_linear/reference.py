"""Quantisation, and a linear layer with a quantised weight, in plain PyTorch: the specification of
`ops.quantised_linear`.

Weights are dequantised one block of rows at a time, so that no function needs memory for more than a block.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from llava_fast.errors import QuantisationError
from llava_fast.ops.quantised_linear.memory import in_huge_pages
from llava_fast.ops.quantised_linear.weight import QuantisedWeight, check_scheme, row_blocks

ROUNDED_VALUES = 1 << 18
"""Most values that are rounded at once: 1 MiB in float32, plus a few temporary tensors of that size."""


def quantise(weight: Tensor, scheme: str, group: int | None = None, symmetric: bool = True) -> QuantisedWeight:
    """Round a weight [out, in], floating, to the nearest codes of `scheme`.

    group      elements of a row that share a scale: 32, 64 or 128; for int8 also None, one scale per row.
    symmetric  int4 only. True: no zero points; False: one zero point per group.

    The scale of a group, in float32: int8 max|w| / 127; int4 symmetric max|w| / 7.5, with codes clamped to 0..15; int4
    with zero points (max(w, 0) - min(w, 0)) / 15. It is rounded up to the next bfloat16 value, so that 16-bit files
    store it exactly. The scale of an all-zero group is 1. The error of a weight is at most half its scale, up to
    float32 rounding.
    The result is on the weight's device. Raises QuantisationError for an unknown scheme, a group size that does not
    divide the rows, and values that are not finite.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise QuantisationError(
            f"a weight to quantise must be floating [out, in], not {weight.dtype} {list(weight.shape)}"
        )
    out, columns = weight.shape
    group = check_scheme(scheme, columns, group, symmetric)
    groups = columns // group if group else 0
    stored, dtype = (columns, torch.int8) if scheme == "int8" else (columns // 2, torch.uint8)
    codes = in_huge_pages(torch.empty((out, stored), dtype=dtype, device=weight.device))
    scale = in_huge_pages(torch.empty((out, groups), dtype=torch.float32, device=weight.device))
    zero = None if symmetric else torch.empty((out, groups), dtype=torch.uint8, device=weight.device)
    for rows in row_blocks(out, columns, ROUNDED_VALUES):
        block = weight[rows].to(torch.float32, copy=True).reshape(-1, groups, group)
        least, most = block.amin(-1, keepdim=True), block.amax(-1, keepdim=True)
        if not (torch.isfinite(least) & torch.isfinite(most)).all():
            raise QuantisationError("the weight to quantise holds values that are not finite")
        step, offset = _scale_and_zero(least, most, scheme, symmetric)
        scale[rows] = step.squeeze(-1)
        found = block.div_(step).round_().add_(offset).flatten(1)
        if scheme == "int8":
            codes[rows] = found.to(torch.int8)
            continue
        if zero is not None:
            assert isinstance(offset, Tensor)
            zero[rows] = offset.squeeze(-1).to(torch.uint8)
        codes[rows] = pack(found.clamp_(0, 15).to(torch.uint8))
    parts = {"values": codes} if scheme == "int8" else {"packed": codes, "zero": zero}
    return QuantisedWeight(scheme, scale, **parts)


def _scale_and_zero(least: Tensor, most: Tensor, scheme: str, symmetric: bool) -> tuple[Tensor, Tensor | int]:
    """Scale and zero point (the code of 0.0), both float32 [rows, groups, 1], of groups with these extreme values."""
    if symmetric:
        step = torch.maximum(-least, most) / (127 if scheme == "int8" else 7.5)
        return _storable(step), 0 if scheme == "int8" else 8
    least, most = least.clamp(max=0), most.clamp(min=0)
    step = _storable((most - least) / 15)
    return step, (-least / step).round_().clamp_(0, 15)


def _storable(step: Tensor) -> Tensor:
    """The least bfloat16 value that is not below `step`, in float32; 1 if that is not a normal number."""
    near = step.bfloat16()
    above = (near.view(torch.int16) + 1).view(torch.bfloat16)
    step = torch.where(near.float() < step, above, near).float()
    return torch.where(step >= torch.finfo(torch.float32).tiny, step, 1)


def pack(codes: Tensor) -> Tensor:
    """Pack codes 0..15, uint8 [out, in] with an even `in`, two per byte: [out, in / 2]."""
    return codes[:, 0::2] | codes[:, 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`: codes 0..15, uint8 [out, in]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def dequantise(weight: QuantisedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [out, in] in `dtype`, computed in float32 (float64 for float64)."""
    made = torch.empty(weight.shape, dtype=dtype, device=weight.scale.device)
    for rows in weight.blocks():
        made[rows] = _block(weight.rows(rows), dtype)
    return made


def _block(weight: QuantisedWeight, dtype: torch.dtype) -> Tensor:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scale = weight.scale.to(wide).unsqueeze(-1)
    codes = weight.codes if weight.scheme == "int8" else unpack(weight.codes)
    codes = codes.to(wide).unflatten(-1, (scale.shape[1], -1))
    if weight.scheme == "int4":
        codes = codes - (8 if weight.zero is None else weight.zero.to(wide).unsqueeze(-1))
    return codes.mul_(scale).flatten(1).to(dtype)


def dequantise_rows(weight: QuantisedWeight, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """An embedding lookup in the weight: row numbers int64 [..] to rows [.., in] in `dtype`."""
    flat = rows.reshape(-1)
    zero = None if weight.zero is None else weight.zero[flat]
    taken = QuantisedWeight.unchecked(weight.codes[flat], weight.scale[flat], zero)
    return _block(taken, dtype).reshape(*rows.shape, weight.shape[1])


def quantised_linear(x: Tensor, weight: QuantisedWeight, bias: Tensor | None) -> Tensor:
    """F.linear(x, dequantised weight, bias) for x [.., in] in x's dtype, one block of the weight's rows at a time."""
    flat = x.flatten(0, -2).to(_product_dtype(x))
    out = x.new_empty(len(flat), weight.shape[0])
    for rows in weight.blocks():
        out[:, rows] = F.linear(
            flat, _block(weight.rows(rows), flat.dtype), None if bias is None else bias[rows].to(flat.dtype)
        )
    return out.view(*x.shape[:-1], weight.shape[0])


def quantised_linear_backward(
    grad: Tensor, weight: QuantisedWeight, needed: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and bias for grad [.., out], None where not needed."""
    of_x = of_bias = None
    flat = grad.flatten(0, -2)
    if needed[0]:
        flat = flat.to(_product_dtype(grad))
        # Accumulate blocks in float32: 16-bit sums would be rounded once per block.
        wide = torch.float32 if flat.dtype.itemsize < 4 else flat.dtype
        total = torch.zeros(len(flat), weight.shape[1], dtype=wide, device=grad.device)
        for rows in weight.blocks():
            part = flat[:, rows]
            if wide == flat.dtype:
                total.addmm_(part, _block(weight.rows(rows), wide))
            else:
                total += part @ _block(weight.rows(rows), flat.dtype)
        of_x = total.to(grad.dtype).view(*grad.shape[:-1], weight.shape[1])
    if needed[1]:
        of_bias = grad.flatten(0, -2).sum(0)
    return of_x, of_bias


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the products: x's, but float32 for 16-bit x on a CPU, where 16-bit products are slower and the
    dequantised weights would be rounded once more."""
    return torch.float32 if x.is_cpu and x.dtype in (torch.bfloat16, torch.float16) else x.dtype
