"""RMSNorm in Triton: one program holds a whole row in registers; the weight's gradient by partial sums in fixed order.

Bytes for R rows of C values of b bytes: forward 2RCb (with residual 4RCb); backward 3RCb, and RCb more if the sum
x + residual has a gradient of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llava_fast.ops import triton_support
from llava_fast.ops.sums import sum_rows, sum_specimens
from llava_fast.ops.triton_support import Specimen

PARTS = 256  # most partial sums of the weight's gradient
PART_ROWS = 8  # least rows of a partial sum


@triton.jit
def rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, sum_ptr, y_ptr, rstd_ptr, width, eps, BLOCK: tl.constexpr):
    """y = x / rms(x), rounded to x's dtype, times weight; with a residual, the same of sum = x + residual, rounded."""
    at = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    rounded = tl.load(x_ptr + at * width + columns, mask=inside, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + at * width + columns, mask=inside, other=0.0)
        rounded = (rounded.to(tl.float32) + residual.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at * width + columns, rounded, mask=inside)
    row = rounded.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(row * row, axis=0) / width + eps)
    normalised = (row * rstd).to(rounded.dtype).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at * width + columns, (normalised * weight).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + at, rstd)


@triton.jit
def rms_norm_backward_kernel(
    grad_ptr,
    grad_sum_ptr,
    x_ptr,
    rstd_ptr,
    weight_ptr,
    grad_x_ptr,
    parts_ptr,
    rows,
    share,
    width,
    BLOCK: tl.constexpr,
):
    """One program processes `share` rows: grad_x of each, and one partial sum for the weight. Pointers of absent inputs
    and of gradients that are not needed are None."""
    part = tl.program_id(0)
    first = part * share
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = first.to(tl.int64) * width
    if grad_x_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    weight_sum = tl.zeros([BLOCK], tl.float32)
    for row in range(first, tl.minimum(first + share, rows)):
        grad = tl.load(grad_ptr + at + columns, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        x = tl.load(x_ptr + at + columns, mask=inside, other=0.0)
        normalised = x.to(tl.float32) * rstd
        if parts_ptr is not None:
            weight_sum += grad * normalised.to(x.dtype).to(tl.float32)
        if grad_x_ptr is not None:
            grad *= weight
            grad_x = (grad - normalised * (tl.sum(grad * normalised, axis=0) / width)) * rstd
            if grad_sum_ptr is not None:
                grad_x += tl.load(grad_sum_ptr + at + columns, mask=inside, other=0.0).to(tl.float32)
            tl.store(grad_x_ptr + at + columns, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
        at += width
    if parts_ptr is not None:
        tl.store(parts_ptr + part.to(tl.int64) * width + columns, weight_sum, mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, rstd) of contiguous rows."""
    y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype))
    return y, _launch(x, None, weight, None, y, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(s, y, rstd) of contiguous rows."""
    total = torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype))
    y = torch.empty_like(x, dtype=torch.promote_types(total.dtype, weight.dtype))
    return total, y, _launch(x, residual, weight, total, y, eps)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, total: Tensor | None, y: Tensor, eps: float) -> Tensor:
    """Write y, and total if given; return rstd."""
    rstd = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    if y.numel():
        rows, width = rstd.numel(), x.shape[-1]
        launch = triton_support.config("rms_norm_kernel", x.device, rows)
        rms_norm_kernel[(rows,)](x, residual, weight, total, y, rstd, width, eps, _block(width), **launch)
    return rstd


def rms_norm_backward(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, rstd: Tensor, weight: Tensor, needed: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and weight, None where not `needed`; grad_sum, if given, is added to that of x."""
    rows, width = rstd.numel(), x.shape[-1]
    share = max(triton.cdiv(rows, PARTS), PART_ROWS) if needed[1] else 1
    count = triton.cdiv(rows, share)
    grad_x = torch.empty_like(x) if needed[0] else None
    parts = torch.empty(count, width, dtype=torch.float32, device=x.device) if needed[1] else None
    if x.numel():
        launch = triton_support.config("rms_norm_backward_kernel", x.device, rows)
        rms_norm_backward_kernel[(count,)](
            grad, grad_sum, x, rstd, weight, grad_x, parts, rows, share, width, _block(width), **launch
        )
    return grad_x, None if parts is None else sum_rows(parts, count, dtype=weight.dtype)


def _block(width: int) -> int:
    return max(triton.next_power_of_2(width), 16)


def specimens() -> list[Specimen]:
    """How each kernel is compiled: for decoders of width 896 (Qwen2-0.5B), 4096 or 3584, and 5120 to 8192."""
    found = []
    for dtype in ("bf16", "fp16", "fp32"):
        for block, widths in ((1024, "896"), (4096, "3584, 4096"), (8192, "5120 to 8192")):
            label = f"{dtype} width {widths}"
            found.append(_specimen(rms_norm_kernel, f"{label} plain", dtype, block, ("residual_ptr", "sum_ptr")))
            found.append(_specimen(rms_norm_kernel, f"{label} residual", dtype, block))
            forms: dict[str, tuple[str, ...]] = {
                "trained": ("grad_sum_ptr",),
                "trained residual": (),
                "frozen": ("grad_sum_ptr", "parts_ptr"),
                "frozen residual": ("parts_ptr",),
            }
            for form, absent in forms.items():
                found.append(_specimen(rms_norm_backward_kernel, f"{label} {form}", dtype, block, absent))
    return [*found, *sum_specimens("rms_norm", "fp32", "bf16")]


def _specimen(kernel, label: str, dtype: str, block: int, absent: tuple[str, ...] = ()) -> Specimen:
    """Aligned pointers of `dtype`, except those of rstd and partial sums; `absent` ones are None."""
    signature = {}
    for name in kernel.arg_names:
        if name.endswith("_ptr") and name not in absent:
            signature[name] = "*fp32" if name in ("rstd_ptr", "parts_ptr") else f"*{dtype}"
        elif name.islower() and name not in absent:
            signature[name] = "fp32" if name == "eps" else "i32"
    aligned = (*(name for name in signature if name.endswith("_ptr")), "width")
    constants = {"BLOCK": block, **dict.fromkeys(absent)}
    return Specimen("rms_norm", kernel, signature, constants, label, aligned=aligned)
