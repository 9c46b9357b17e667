"""Rotary embedding in Triton: one program rotates a few heads of one row's query or key.

Takes any strides, such as [B, H, S, D] views of [B, S, H, D]. Computes in float32 and rounds once.
Bytes for R rows of H + K heads of D values of b bytes: 2R(H + K)Db + 2RDb, forward and backward.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from llava_fast.ops import triton_support
from llava_fast.ops.triton_support import Specimen


@triton.jit
def _turn(x_ptr, out_ptr, first_head, heads, x_head, out_head, cos1, cos2, sin1, sin2, half, HEADS, BLOCK):
    """Rotate HEADS heads from `first_head` on; x_ptr and out_ptr point at the row's head 0."""
    head = first_head + tl.arange(0, HEADS).to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (head < heads) & (columns < half)
    x1 = tl.load(x_ptr + head * x_head + columns, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + head * x_head + half + columns, mask=inside, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + head * out_head + columns, (x1 * cos1 + x2 * sin1).to(dtype), mask=inside)
    tl.store(out_ptr + head * out_head + half + columns, (x2 * cos2 + x1 * sin2).to(dtype), mask=inside)


@triton.jit
def rope_kernel(
    query_ptr,
    key_ptr,
    cos_ptr,
    sin_ptr,
    query_out_ptr,
    key_out_ptr,
    length,
    query_heads,
    key_heads,
    half,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    query_out_batch,
    query_out_head,
    query_out_row,
    key_out_batch,
    key_out_head,
    key_out_row,
    table_batch,
    table_row,
    SIGNED: tl.constexpr,
    INVERSE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Arguments that end in _batch, _head and _row are strides; cos and sin have the same ones."""
    batch = (tl.program_id(0) // length).to(tl.int64)
    row = (tl.program_id(0) % length).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < half
    table = batch * table_batch + row * table_row + columns
    cos1 = tl.load(cos_ptr + table, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos2 = tl.load(cos_ptr + table + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin1 = tl.load(sin_ptr + table, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin2 = tl.load(sin_ptr + table + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    if not SIGNED:
        sin1 = -sin1
    if INVERSE:
        sin1, sin2 = sin2, sin1
    chunk = tl.program_id(1)
    query_chunks = tl.cdiv(query_heads, HEADS)
    if chunk < query_chunks:
        x_ptr = query_ptr + batch * query_batch + row * query_row
        out_ptr = query_out_ptr + batch * query_out_batch + row * query_out_row
        first = chunk * HEADS
        _turn(
            x_ptr, out_ptr, first, query_heads, query_head, query_out_head, cos1, cos2, sin1, sin2, half, HEADS, BLOCK
        )
    else:
        x_ptr = key_ptr + batch * key_batch + row * key_row
        out_ptr = key_out_ptr + batch * key_out_batch + row * key_out_row
        first = (chunk - query_chunks) * HEADS
        _turn(x_ptr, out_ptr, first, key_heads, key_head, key_out_head, cos1, cos2, sin1, sin2, half, HEADS, BLOCK)


def rope(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, is_signed: bool, inverse: bool, outs: tuple[Tensor, Tensor]
) -> None:
    """Write the rotated query [B, H, S, D] and key [B, K, S, D] to `outs`; cos and sin [B or 1, S, D].

    The last dimension of all tensors must be contiguous.
    """
    batch, query_heads, length, size = query.shape
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    rows = batch * length
    if not rows or not size or not (query_heads or key.shape[1]):
        return
    launch = triton_support.config("rope_kernel", query.device, rows)
    chunks = triton.cdiv(query_heads, launch["HEADS"]) + triton.cdiv(key.shape[1], launch["HEADS"])
    strides = [stride for x in (query, key, *outs) for stride in x.stride()[:3]]
    rope_kernel[(rows, chunks)](
        query,
        key,
        cos,
        sin,
        *outs,
        length,
        query_heads,
        key.shape[1],
        size // 2,
        *strides,
        cos.stride(0) if len(cos) == batch else 0,
        cos.stride(1),
        SIGNED=is_signed,
        INVERSE=inverse,
        BLOCK=max(triton.next_power_of_2(size // 2), 2),
        **launch,
    )


def specimens() -> list[Specimen]:
    """How the kernel compiles for head size 128 (Llama, Mistral, Qwen2 7B) and 64 (Qwen2 0.5B)."""
    found = []
    for dtype in ("bf16", "fp16", "fp32"):
        for block in (64, 32):
            for inverse in (False, True):
                label = f"{dtype} heads of {2 * block}{' backward' if inverse else ''}"
                constants = {"SIGNED": False, "INVERSE": inverse, "BLOCK": block}
                names = [name for name in rope_kernel.arg_names if name.islower()]
                signature = {name: f"*{dtype}" if name.endswith("_ptr") else "i32" for name in names}
                ragged = ("length", "query_heads", "key_heads")
                aligned = tuple(name for name in names if name not in ragged)
                found.append(Specimen("rope", rope_kernel, signature, constants, label, aligned=aligned))
    return found
