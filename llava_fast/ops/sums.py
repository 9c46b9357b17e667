"""Deterministic sums over rows in Triton, for the gradients of weights, biases and tables.

Rows are split among programs, whose float32 sums are added in order: no atomics, and equal inputs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llava_fast.ops import triton_support
from llava_fast.ops.triton_support import Specimen

SHARES = 64  # most splits of the rows


@triton.jit
def sum_rows_kernel(x_ptr, gather_ptr, out_ptr, rows, columns, share, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """out[s] = sum of x[gather[m]] over the `share` rows m from s * share, in float32; negative indices add nothing."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    start = tl.program_id(1) * share
    end = tl.minimum(start + share, rows)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(start, end, ROWS):
        m = first + tl.arange(0, ROWS)
        row = m
        if gather_ptr is not None:
            row = tl.load(gather_ptr + m, mask=m < end, other=-1)
        live = (m < end) & (row >= 0)
        at = row.to(tl.int64)[:, None] * columns + n[None, :]
        block = tl.load(x_ptr + at, mask=live[:, None] & (n < columns)[None, :], other=0.0)
        total += tl.sum(block.to(tl.float32), axis=0)
    tl.store(out_ptr + tl.program_id(1) * columns + n, total.to(out_ptr.dtype.element_ty), mask=n < columns)


@triton.jit
def sum_shares_kernel(parts_ptr, out_ptr, size, parts, BLOCK: tl.constexpr):
    """out[i] = parts[0, i] + parts[1, i] + ..., in this order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    part_at = parts_ptr + at
    for _ in range(0, parts):
        total += tl.load(part_at, mask=at < size, other=0.0)
        part_at += size
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < size)


def sum_rows(x: Tensor, rows: int, gather: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """[columns] = sum over m < rows of x[gather[m]] (negative: skipped), in `dtype` or x's. Bytes: each row once.

    x [.., columns], contiguous.
    """
    columns = x.shape[-1]
    out = torch.empty(columns, dtype=dtype or x.dtype, device=x.device)
    if columns:
        config = triton_support.config("sum_rows_kernel", x.device, rows)
        share = max(triton.cdiv(rows, SHARES), config["ROWS"])
        shares = max(triton.cdiv(rows, share), 1)
        parts = torch.empty(shares, columns, dtype=torch.float32, device=x.device)
        grid = (triton.cdiv(columns, config["BLOCK"]), shares)
        sum_rows_kernel[grid](x, gather, parts, rows, columns, share, **config)
        sum_shares(parts, out)
    return out


def sum_shares(parts: Tensor, out: Tensor) -> None:
    """out = parts[0] + parts[1] + ..., in this order; parts float32 [shares, *out.shape], both contiguous."""
    config = triton_support.config("sum_shares_kernel", out.device, len(parts))
    grid = (triton.cdiv(out.numel(), config["BLOCK"]),)
    sum_shares_kernel[grid](parts, out, out.numel(), len(parts), **config)


def sum_specimens(op: str, dtype: str, out: str = "", gather: bool = False) -> list[Specimen]:
    """How `sum_rows` compiles for rows of `dtype` and sums of dtype `out` (default: the same)."""
    indices = {"gather_ptr": "*i32"} if gather else {}
    rows = {"x_ptr": f"*{dtype}", **indices, "out_ptr": "*fp32", "rows": "i32", "columns": "i32", "share": "i32"}
    absent = {} if gather else {"gather_ptr": None}
    label = f"{dtype}, gathered" if gather else dtype
    aligned = ("x_ptr", *indices, "out_ptr", "columns")
    return [
        Specimen(op, sum_rows_kernel, rows, absent, label, aligned=aligned),
        shares_specimen(op, out or dtype),
    ]


def shares_specimen(op: str, dtype: str) -> Specimen:
    """How `sum_shares` compiles."""
    signature = {"parts_ptr": "*fp32", "out_ptr": f"*{dtype}", "size": "i32", "parts": "i32"}
    return Specimen(op, sum_shares_kernel, signature, {}, dtype, aligned=("parts_ptr", "out_ptr", "size"))
