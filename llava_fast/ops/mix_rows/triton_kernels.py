"""mix_rows in Triton: one program computes one row, or part of a wide one; gradients by the inverse table, no atomics.

Bytes: forward reads the row of each table entry and writes each pooled row; overlapping windows mostly hit the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llava_fast.ops import triton_support
from llava_fast.ops.triton_support import Specimen


@triton.jit
def mix_kernel(
    rows_ptr, index_ptr, weight_ptr, out_ptr, width, TAPS: tl.constexpr, MAXIMUM: tl.constexpr, BLOCK: tl.constexpr
):
    """out[m] = sum over taps of weight[m, tap] * rows[index[m, tap]] in float32, or the maximum of these rows."""
    mixed = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.full([BLOCK], float("-inf") if MAXIMUM else 0.0, tl.float32)
    for tap in tl.static_range(TAPS):
        row = tl.load(index_ptr + mixed * TAPS + tap).to(tl.int64)
        value = tl.load(rows_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        if MAXIMUM:
            total = tl.maximum(total, value, propagate_nan=tl.PropagateNan.ALL)
        else:
            total += value * tl.load(weight_ptr + mixed * TAPS + tap)
    tl.store(out_ptr + mixed * width + columns, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def mix_backward_kernel(
    grad_ptr,
    rows_ptr,
    index_ptr,
    weight_ptr,
    use_ptr,
    start_ptr,
    out_ptr,
    width,
    TAPS: tl.constexpr,
    MAXIMUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[r] = the sum of the gradients of the table entries that read row r, in the order of the inverse table."""
    at = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    start, end = tl.load(start_ptr + at), tl.load(start_ptr + at + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for place in range(start, end):
        use = tl.load(use_ptr + place)
        mixed = (use // TAPS).to(tl.int64)
        grad = tl.load(grad_ptr + mixed * width + columns, mask=inside, other=0.0).to(tl.float32)
        if MAXIMUM:
            mine = use % TAPS
            best = tl.full([BLOCK], float("-inf"), tl.float32)
            number = tl.zeros([BLOCK], tl.int32)
            for tap in tl.static_range(TAPS):
                row = tl.load(index_ptr + mixed * TAPS + tap).to(tl.int64)
                value = tl.load(rows_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
                number = tl.where(value > best, tap, number)
                best = tl.maximum(best, value)
            total += tl.where(number == mine, grad, 0.0)
        else:
            total += grad * tl.load(weight_ptr + use)
    tl.store(out_ptr + at * width + columns, total.to(out_ptr.dtype.element_ty), mask=inside)


def mix_rows(rows: Tensor, index: Tensor, weight: Tensor, reduce: str) -> Tensor:
    mixed, taps = index.shape
    width = rows.shape[1]
    out = torch.empty(mixed, width, dtype=rows.dtype, device=rows.device)
    if out.numel():
        config = triton_support.config("mix_kernel", rows.device, mixed)
        grid = (mixed, triton.cdiv(width, config["BLOCK"]))
        mix_kernel[grid](rows, index, weight, out, width, taps, reduce == "max", **config)
    return out


def mix_rows_backward(
    grad: Tensor, rows: Tensor, index: Tensor, weight: Tensor, reduce: str, order: Tensor, start: Tensor
) -> Tensor:
    """[len(start) - 1, width]: `order` holds entry numbers (m * taps + tap) sorted by the row they read."""
    count, width = len(start) - 1, grad.shape[1]
    out = torch.empty(count, width, dtype=grad.dtype, device=grad.device)
    if out.numel():
        config = triton_support.config("mix_backward_kernel", grad.device, count)
        grid = (count, triton.cdiv(width, config["BLOCK"]))
        taps, maximum = index.shape[1], reduce == "max"
        mix_backward_kernel[grid](grad, rows, index, weight, order, start, out, width, taps, maximum, **config)
    return out


def specimens() -> list[Specimen]:
    """How each kernel is compiled: four taps (2x2 pooling, bilinear), sums and maxima."""
    found = []
    for dtype in ("bf16", "fp16", "fp32"):
        for maximum in (False, True):
            table, constants = f"*{dtype}", {"TAPS": 4, "MAXIMUM": maximum}
            label = f"{dtype} {'maxima' if maximum else 'sums'}"
            common = {"rows_ptr": table, "index_ptr": "*i32", "weight_ptr": "*fp32", "out_ptr": table, "width": "i32"}
            aligned = ("rows_ptr", "out_ptr", "width")
            found.append(Specimen("mix_rows", mix_kernel, common, constants, label, aligned=aligned))
            backward = {**common, "grad_ptr": table, "use_ptr": "*i32", "start_ptr": "*i32"}
            found.append(
                Specimen("mix_rows", mix_backward_kernel, backward, constants, label, aligned=(*aligned, "grad_ptr"))
            )
    return found
