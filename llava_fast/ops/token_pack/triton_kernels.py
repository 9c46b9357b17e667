"""token_pack in Triton: one program writes one row, or part of a wide one; gradients by sorted row lists, no atomics.

Bytes: forward reads and writes each row once. Backward reads each gradient row once and writes each table once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llava_fast.ops import sums, triton_support
from llava_fast.ops.triton_support import Specimen

CONSTANT_PARTS = 64  # partial sums of a constant row's gradient, added in order


@triton.jit
def pack_kernel(source_ptr, row_ptr, embedding_ptr, visual_ptr, constant_ptr, out_ptr, width, BLOCK: tl.constexpr):
    """out[r] = row row[r] of table source[r]; zeros for padding.

    visual_ptr None: visual rows of the output are not written here.
    """
    at = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    kind = tl.load(source_ptr + at)
    first = tl.load(row_ptr + at).to(tl.int64) * width
    text = tl.load(embedding_ptr + first + columns, mask=inside & (kind == 0), other=0.0)
    constant = tl.load(constant_ptr + first + columns, mask=inside & (kind == 2), other=0.0)
    chosen = tl.where(kind == 0, text, constant)
    if visual_ptr is None:
        inside = inside & (kind != 1)
    else:
        visual = tl.load(visual_ptr + first + columns, mask=inside & (kind == 1), other=0.0)
        chosen = tl.where(kind == 1, visual, chosen)
    tl.store(out_ptr + at * width + columns, chosen, mask=inside)


@triton.jit
def take_rows_kernel(grad_ptr, place_ptr, out_ptr, width, BLOCK: tl.constexpr):
    """out[i] = grad[place[i]]; zeros where place[i] is negative."""
    at = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    place = tl.load(place_ptr + at).to(tl.int64)
    rows = tl.load(grad_ptr + place * width + columns, mask=inside & (place >= 0), other=0.0)
    tl.store(out_ptr + at * width + columns, rows, mask=inside)


@triton.jit
def sum_segments_kernel(
    grad_ptr, order_ptr, segment_ptr, target_ptr, out_ptr, width, parts, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """One part of one segment: out[part, target] = sum of grad[order[start .. end)] in float32, in order."""
    segment, part = tl.program_id(0), tl.program_id(2)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    start = tl.load(segment_ptr + segment)
    end = tl.load(segment_ptr + segment + 1)
    share = tl.cdiv(end - start, parts)
    start = start + part * share
    end = tl.minimum(start + share, end)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(start, end, ROWS):
        uses = first + tl.arange(0, ROWS)
        rows = tl.load(order_ptr + uses, mask=uses < end, other=0).to(tl.int64)
        where = rows[:, None] * width + columns[None, :]
        block = tl.load(grad_ptr + where, mask=(uses < end)[:, None] & inside[None, :], other=0.0)
        total += tl.sum(block.to(tl.float32), axis=0)
    target = tl.load(target_ptr + segment).to(tl.int64) + part * tl.num_programs(0)
    tl.store(out_ptr + target * width + columns, total.to(out_ptr.dtype.element_ty), mask=inside)


def token_pack(source: Tensor, row: Tensor, embedding: Tensor, visual: Tensor, constant: Tensor) -> Tensor:
    out = torch.empty(len(source), embedding.shape[1], dtype=embedding.dtype, device=embedding.device)
    pack(source, row, embedding, visual, constant, out)
    return out


def pack(source: Tensor, row: Tensor, embedding: Tensor, visual: Tensor | None, constant: Tensor, out: Tensor) -> None:
    """Write the rows of `out` [rows, width]; all but the visual rows if `visual` is None."""
    rows, width = out.shape
    if out.numel():
        config = triton_support.config("pack_kernel", out.device, rows)
        grid = (rows, triton.cdiv(width, config["BLOCK"]))
        pack_kernel[grid](source, row, embedding, visual, constant, out, width, **config)


def visual_gradient(grad: Tensor, visual_place: Tensor) -> Tensor:
    """[visual rows, width]: the gradient of the output row that read each visual row; zeros if none did."""
    rows, width = len(visual_place), grad.shape[1]
    out = torch.empty(rows, width, dtype=grad.dtype, device=grad.device)
    if out.numel():
        config = triton_support.config("take_rows_kernel", out.device, rows)
        take_rows_kernel[(rows, triton.cdiv(width, config["BLOCK"]))](grad, visual_place, out, width, **config)
    return out


def embedding_gradient(
    grad: Tensor, text_row: Tensor, text_token: Tensor, text_segment: Tensor, vocabulary: int
) -> Tensor:
    """[vocabulary, width]: a segment of `text_row` holds the rows of one token id."""
    width = grad.shape[1]
    out = torch.zeros(vocabulary, width, dtype=grad.dtype, device=grad.device)
    if len(text_token) and width:
        config = triton_support.config("sum_segments_kernel", out.device, len(text_row))
        grid = (len(text_token), triton.cdiv(width, config["BLOCK"]), 1)
        sum_segments_kernel[grid](grad, text_row, text_segment, text_token, out, width, 1, **config)
    return out


def constant_gradient(grad: Tensor, constant_row: Tensor, constant_segment: Tensor, constants: int) -> Tensor:
    """[constants, width]: each constant has a segment of `constant_row`; segments are summed in parts."""
    width = grad.shape[1]
    out = torch.empty(constants, width, dtype=grad.dtype, device=grad.device)
    if out.numel():
        parts = torch.empty(CONSTANT_PARTS, constants, width, dtype=torch.float32, device=grad.device)
        number = torch.arange(constants, dtype=torch.int32, device=grad.device)
        config = triton_support.config("sum_segments_kernel", out.device, len(constant_row))
        grid = (constants, triton.cdiv(width, config["BLOCK"]), CONSTANT_PARTS)
        sum_segments_kernel[grid](grad, constant_row, constant_segment, number, parts, width, CONSTANT_PARTS, **config)
        sums.sum_shares(parts, out)
    return out


def pack_specimen(op: str, dtype: str, visual: bool = True) -> Specimen:
    """How `pack` compiles, with visual rows or without."""
    names = ("embedding_ptr", *(["visual_ptr"] if visual else []), "constant_ptr", "out_ptr")
    signature = {"source_ptr": "*i32", "row_ptr": "*i32", **dict.fromkeys(names, f"*{dtype}"), "width": "i32"}
    constants = {} if visual else {"visual_ptr": None}
    return Specimen(op, pack_kernel, signature, constants, dtype, aligned=(*names, "width"))


def specimens() -> list[Specimen]:
    """How each kernel is compiled, for the compile check."""
    found = []
    for dtype in ("bf16", "fp16", "fp32"):
        table = f"*{dtype}"
        found.append(pack_specimen("token_pack", dtype))
        take = {"grad_ptr": table, "place_ptr": "*i32", "out_ptr": table, "width": "i32"}
        found.append(
            Specimen("token_pack", take_rows_kernel, take, {}, dtype, aligned=("grad_ptr", "out_ptr", "width"))
        )
        indices = {"order_ptr": "*i32", "segment_ptr": "*i32", "target_ptr": "*i32"}
        for out in dict.fromkeys((table, "*fp32")):
            segments = {"grad_ptr": table, **indices, "out_ptr": out, "width": "i32", "parts": "i32"}
            found.append(
                Specimen(
                    "token_pack",
                    sum_segments_kernel,
                    segments,
                    {},
                    f"{dtype} to {out[1:]}",
                    aligned=("grad_ptr", "out_ptr", "width"),
                )
            )
        found.append(sums.shares_specimen("token_pack", dtype))
    return found
