"""LayerNorm in Triton: one program holds a whole row in registers; gradients by partial sums in a fixed order.

Each row is read once; its mean and the variance of the centred row are computed in float32.
Bytes for R rows of C values of b bytes: forward 2RCb (with residual 4RCb, double 3RCb); backward 3RCb, and RCb more if
the sum x + residual has a gradient of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llava_fast.ops import triton_support
from llava_fast.ops.triton_support import Specimen

PARTS = 256  # most partial sums of a weight's gradient
PART_ROWS = 8  # least rows of a partial sum


@triton.jit
def _normalise(row, inside, width, eps):
    """(normalised row, mean, rstd) of a float32 row that is 0 outside."""
    mean = tl.sum(row, axis=0) / width
    centred = tl.where(inside, row - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)
    return centred * rstd, mean, rstd


@triton.jit
def _affine(normalised, weight_ptr, bias_ptr, columns, inside):
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    return normalised * weight + bias


@triton.jit
def layer_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, sum_ptr, y_ptr, mean_ptr, rstd_ptr, width, eps, BLOCK: tl.constexpr
):
    """y = LN(x); with a residual, sum = x + residual, rounded to its dtype, and y = LN(sum)."""
    at = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    row = tl.load(x_ptr + at * width + columns, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        row += tl.load(residual_ptr + at * width + columns, mask=inside, other=0.0).to(tl.float32)
        total = row.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at * width + columns, total, mask=inside)
        row = total.to(tl.float32)
    normalised, mean, rstd = _normalise(row, inside, width, eps)
    y = _affine(normalised, weight_ptr, bias_ptr, columns, inside)
    tl.store(y_ptr + at * width + columns, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + at, mean)
    tl.store(rstd_ptr + at, rstd)


@triton.jit
def double_layer_norm_kernel(
    x_ptr,
    pre_weight_ptr,
    pre_bias_ptr,
    weight_ptr,
    bias_ptr,
    s_ptr,
    y_ptr,
    pre_mean_ptr,
    pre_rstd_ptr,
    mean_ptr,
    rstd_ptr,
    width,
    pre_eps,
    eps,
    BLOCK: tl.constexpr,
):
    """s = LN(x), rounded to its dtype; y = LN(s) by a second weight and bias."""
    at = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    row = tl.load(x_ptr + at * width + columns, mask=inside, other=0.0).to(tl.float32)
    normalised, pre_mean, pre_rstd = _normalise(row, inside, width, pre_eps)
    s = _affine(normalised, pre_weight_ptr, pre_bias_ptr, columns, inside).to(s_ptr.dtype.element_ty)
    tl.store(s_ptr + at * width + columns, s, mask=inside)
    normalised, mean, rstd = _normalise(s.to(tl.float32), inside, width, eps)
    y = _affine(normalised, weight_ptr, bias_ptr, columns, inside)
    tl.store(y_ptr + at * width + columns, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(pre_mean_ptr + at, pre_mean)
    tl.store(pre_rstd_ptr + at, pre_rstd)
    tl.store(mean_ptr + at, mean)
    tl.store(rstd_ptr + at, rstd)


@triton.jit
def layer_norm_backward_kernel(
    grad_ptr,
    grad_sum_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    grad_x_ptr,
    weight_parts_ptr,
    bias_parts_ptr,
    rows,
    share,
    width,
    BLOCK: tl.constexpr,
):
    """One program processes `share` rows: grad_x of each, and one partial sum for weight and bias. Pointers of absent
    inputs and of gradients that are not needed are None."""
    part = tl.program_id(0)
    first = part * share
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = first.to(tl.int64) * width
    if grad_x_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    weight_sum = tl.zeros([BLOCK], tl.float32)
    bias_sum = tl.zeros([BLOCK], tl.float32)
    for row in range(first, tl.minimum(first + share, rows)):
        grad = tl.load(grad_ptr + at + columns, mask=inside, other=0.0).to(tl.float32)
        if bias_parts_ptr is not None:
            bias_sum += grad
        if grad_x_ptr is not None or weight_parts_ptr is not None:
            rstd = tl.load(rstd_ptr + row)
            x = tl.load(x_ptr + at + columns, mask=inside, other=0.0).to(tl.float32)
            normalised = tl.where(inside, (x - tl.load(mean_ptr + row)) * rstd, 0.0)
            if weight_parts_ptr is not None:
                weight_sum += grad * normalised
            if grad_x_ptr is not None:
                grad *= weight
                along = tl.sum(grad * normalised, axis=0) / width
                grad_x = (grad - tl.sum(grad, axis=0) / width - normalised * along) * rstd
                if grad_sum_ptr is not None:
                    grad_x += tl.load(grad_sum_ptr + at + columns, mask=inside, other=0.0).to(tl.float32)
                tl.store(grad_x_ptr + at + columns, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
        at += width
    where = part.to(tl.int64) * width + columns
    if weight_parts_ptr is not None:
        tl.store(weight_parts_ptr + where, weight_sum, mask=inside)
    if bias_parts_ptr is not None:
        tl.store(bias_parts_ptr + where, bias_sum, mask=inside)


@triton.jit
def layer_norm_parts_kernel(parts_ptr, out_ptr, parts, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out = the sum of `parts` rows: ROWS running sums in order, then the sum of these."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, parts, ROWS):
        part = first + tl.arange(0, ROWS)
        where = part[:, None] * width + columns[None, :]
        total += tl.load(parts_ptr + where, mask=(part < parts)[:, None] & inside[None, :], other=0.0)
    tl.store(out_ptr + columns, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=inside)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd) of contiguous rows."""
    y, mean, rstd = torch.empty_like(x), _statistic(x), _statistic(x)
    _launch_layer_norm(x, None, weight, bias, None, y, mean, rstd, eps)
    return y, mean, rstd


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(s, y, mean, rstd) of contiguous rows, s and y in the dtype of x + residual."""
    total = torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype))
    y, mean, rstd = torch.empty_like(total), _statistic(x), _statistic(x)
    _launch_layer_norm(x, residual, weight, bias, total, y, mean, rstd, eps)
    return total, y, mean, rstd


def _launch_layer_norm(x: Tensor, residual, weight, bias, total, y: Tensor, mean: Tensor, rstd, eps: float) -> None:
    rows, width = mean.numel(), x.shape[-1]
    if y.numel():
        launch = triton_support.config("layer_norm_kernel", x.device, rows)
        layer_norm_kernel[(rows,)](x, residual, weight, bias, total, y, mean, rstd, width, eps, _block(x), **launch)


def double_layer_norm(
    x: Tensor, pre_weight: Tensor, pre_bias: Tensor, pre_eps: float, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, ...]:
    """(s, y, mean and rstd of x, mean and rstd of s) of contiguous rows."""
    s, y = torch.empty_like(x), torch.empty_like(x)
    statistics = [_statistic(x) for _ in range(4)]
    if y.numel():
        rows, width = statistics[0].numel(), x.shape[-1]
        launch = triton_support.config("double_layer_norm_kernel", x.device, rows)
        double_layer_norm_kernel[(rows,)](
            x, pre_weight, pre_bias, weight, bias, s, y, *statistics, width, pre_eps, eps, _block(x), **launch
        )
    return s, y, *statistics


def layer_norm_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, None where not `needed`; grad_sum, if given, is added to that of x.

    x, mean and rstd may be None if only the bias's gradient is needed.
    """
    width = grad.shape[-1]
    rows = grad.numel() // width if width else 0
    share = max(triton.cdiv(rows, PARTS), PART_ROWS) if needed[1] or needed[2] else 1
    parts = triton.cdiv(rows, share)
    grad_x = torch.empty_like(grad) if needed[0] else None
    weight_parts, bias_parts = (
        torch.empty(parts, width, dtype=torch.float32, device=grad.device) if need else None for need in needed[1:]
    )
    if rows and width:
        launch = triton_support.config("layer_norm_backward_kernel", grad.device, rows)
        layer_norm_backward_kernel[(parts,)](
            grad,
            grad_sum,
            x,
            mean,
            rstd,
            weight,
            grad_x,
            weight_parts,
            bias_parts,
            rows,
            share,
            width,
            _block(grad),
            **launch,
        )
    return grad_x, _sum_parts(weight_parts, weight), _sum_parts(bias_parts, weight)


def _sum_parts(parts: Tensor | None, like: Tensor) -> Tensor | None:
    """[width] in the dtype of `like`."""
    if parts is None:
        return None
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    if out.numel():
        launch = triton_support.config("layer_norm_parts_kernel", out.device, len(parts))
        grid = (triton.cdiv(len(out), launch["BLOCK"]),)
        layer_norm_parts_kernel[grid](parts, out, len(parts), len(out), **launch)
    return out


def _statistic(x: Tensor) -> Tensor:
    return torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)


def _block(x: Tensor) -> int:
    return max(triton.next_power_of_2(x.shape[-1]), 16)


def specimens() -> list[Specimen]:
    """How each kernel is compiled: for CLIP-L's width 1024, SigLIP's 1152 and 1280 (which share a block), and 4096, the
    largest that is supported.
    """
    found = []
    for dtype in ("bf16", "fp16", "fp32"):
        for block, widths in ((1024, "1024"), (2048, "1152, 1280"), (4096, "4096")):
            label = f"{dtype} width {widths}"
            no_residual = ("residual_ptr", "sum_ptr")
            found.append(_specimen(layer_norm_kernel, f"{label} plain", dtype, no_residual, BLOCK=block))
            found.append(_specimen(layer_norm_kernel, f"{label} residual", dtype, BLOCK=block))
            found.append(_specimen(double_layer_norm_kernel, label, dtype, BLOCK=block))
            frozen, no_sum = ("weight_parts_ptr", "bias_parts_ptr"), ("grad_sum_ptr",)
            forms: dict[str, tuple[str, ...]] = {
                "trained": no_sum,
                "trained residual": (),
                "frozen": no_sum + frozen,
                "frozen residual": frozen,
            }
            for form, absent in forms.items():
                found.append(_specimen(layer_norm_backward_kernel, f"{label} {form}", dtype, absent, BLOCK=block))
        found.append(_specimen(layer_norm_parts_kernel, dtype, dtype))
    return found


def _specimen(kernel, label: str, dtype: str, absent: tuple[str, ...] = (), **constants: int) -> Specimen:
    """Aligned pointers of `dtype`, except those of statistics and partial sums; `absent` ones are None."""
    signature = {}
    for name in kernel.arg_names:
        if name.endswith("_ptr") and name not in absent:
            is_float32 = any(word in name for word in ("mean", "rstd", "parts"))
            signature[name] = "*fp32" if is_float32 else f"*{dtype}"
        elif name.islower() and name not in absent:
            signature[name] = "fp32" if name.endswith("eps") else "i32"
    aligned = (*(name for name in signature if name.endswith("_ptr")), "width")
    return Specimen("layer_norm", kernel, signature, {**constants, **dict.fromkeys(absent)}, label, aligned=aligned)
