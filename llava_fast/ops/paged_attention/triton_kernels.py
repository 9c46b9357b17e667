"""Decoding attention over a paged cache in Triton: three kernels, without host synchronisation.

append_kernel rotates the new rows' queries and keys and stores keys and values in their blocks. In split_kernel each
program attends to a split of one sequence's rows for one key head and all its query heads (split-KV; Dao et al. 2023,
Flash-Decoding); combine_kernel combines the splits. Kernels read blocks by address, so the cache may consist of several
allocations. Products accumulate in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from llava_fast.ops import triton_support
from llava_fast.ops.triton_support import Specimen

LOG2_E = 1.4426950408889634
MAX_SPLITS = 32


@triton.jit
def _place(table_ptr, address_ptr, row, inside, layer, head, heads, like_ptr, size, ROWS: tl.constexpr):
    """Addresses of a sequence's rows in `layer` and `head`: a pointer, and the offsets of keys and values from it."""
    block = tl.load(table_ptr + row // ROWS, mask=inside, other=0)
    address = tl.load(address_ptr + 2 * block, mask=inside, other=0)
    head_step = tl.load(address_ptr + 2 * block + 1, mask=inside, other=0) * (ROWS * size)
    offset = (layer * 2 * heads + head) * head_step + (row % ROWS) * size
    return address.to(like_ptr.dtype), offset, offset + heads * head_step


@triton.jit
def append_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    table_ptr,
    before_ptr,
    address_ptr,
    layer,
    query_heads,
    key_heads,
    size,
    query_row,
    key_row,
    value_row,
    table_row,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program rotates HEADS heads of one row's query, or rotates and stores HEADS heads of its key and value."""
    sequence = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    half = size // 2
    column = tl.arange(0, BLOCK)[None, :]
    in_table = column < half
    cos1 = tl.load(cos_ptr + sequence * size + column, mask=in_table, other=0.0).to(tl.float32)
    cos2 = tl.load(cos_ptr + sequence * size + half + column, mask=in_table, other=0.0).to(tl.float32)
    sin1 = tl.load(sin_ptr + sequence * size + column, mask=in_table, other=0.0).to(tl.float32)
    sin2 = tl.load(sin_ptr + sequence * size + half + column, mask=in_table, other=0.0).to(tl.float32)
    query_chunks = tl.cdiv(query_heads, HEADS)
    if chunk < query_chunks:
        head = chunk * HEADS + tl.arange(0, HEADS)[:, None]
        inside = (head < query_heads) & in_table
        source = query_ptr + sequence * query_row + head * size + column
        x1 = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
        target = out_ptr + (sequence * query_heads + head) * size + column
        tl.store(target, (x1 * cos1 + x2 * sin1).to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(target + half, (x2 * cos2 + x1 * sin2).to(out_ptr.dtype.element_ty), mask=inside)
    else:
        at = tl.load(before_ptr + sequence)
        head = (chunk - query_chunks) * HEADS + tl.arange(0, HEADS)[:, None]
        inside = (head < key_heads) & in_table & (at >= 0)
        source = key_ptr + sequence * key_row + head * size + column
        x1 = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
        base, to_key, to_value = _place(
            table_ptr + sequence * table_row, address_ptr, at, at >= 0, layer, head, key_heads, key_ptr, size, ROWS
        )
        target = base + to_key + column
        tl.store(target, (x1 * cos1 + x2 * sin1).to(key_ptr.dtype.element_ty), mask=inside)
        tl.store(target + half, (x2 * cos2 + x1 * sin2).to(key_ptr.dtype.element_ty), mask=inside)
        source = value_ptr + sequence * value_row + head * size + column
        target = base + to_value + column
        tl.store(target, tl.load(source, mask=inside, other=0.0), mask=inside)
        tl.store(target + half, tl.load(source + half, mask=inside, other=0.0), mask=inside)


@triton.jit
def split_kernel(
    query_ptr,
    table_ptr,
    before_ptr,
    address_ptr,
    part_ptr,
    stat_ptr,
    layer,
    scale,
    window,
    heads,
    group,
    size,
    table_row,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOWED: tl.constexpr,
    UPCAST: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """scale: factor of the scores, for exp2. `group` query heads share a key head, padded to GROUP rows. part: the
    split's weighted sum of values [n, H, splits, D]; stat: largest score and sum of weights [n, H, splits, 2]."""
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    end = tl.load(before_ptr + sequence) + 1
    start = 0
    if WINDOWED:
        start = tl.maximum(end - window, 0)
    first = start // BLOCK_N
    share = tl.cdiv(tl.cdiv(end, BLOCK_N) - first, splits)
    low = (first + split * share) * BLOCK_N
    high = tl.minimum(low + share * BLOCK_N, end)

    member = tl.arange(0, GROUP)
    column = tl.arange(0, BLOCK_D)
    mine = (member < group)[:, None] & (column < size)[None, :]
    query_head = (sequence * heads + head) * group + member  # [n, H] flat
    query = tl.load(query_ptr + query_head[:, None] * size + column[None, :], mask=mine, other=0.0)
    if UPCAST:
        query = query.to(tl.float32)
    largest = tl.full([GROUP], float("-inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    sums = tl.zeros([GROUP, BLOCK_D], tl.float32)
    for row_start in range(low, high, BLOCK_N):
        row = row_start + tl.arange(0, BLOCK_N)
        inside = row < high
        if WINDOWED:
            inside = inside & (row >= start)
        base, to_key, to_value = _place(
            table_ptr + sequence * table_row, address_ptr, row, inside, layer, head, heads, query_ptr, size, ROWS
        )
        # Here, because a hint on a value that a function returns is lost.
        key_pointer = tl.multiple_of(base + to_key, ALIGNED)
        value_pointer = tl.multiple_of(base + to_value, ALIGNED)
        wanted = inside[:, None] & (column < size)[None, :]
        keys = tl.load(key_pointer[:, None] + column[None, :], mask=wanted, other=0.0)
        values = tl.load(value_pointer[:, None] + column[None, :], mask=wanted, other=0.0)
        if UPCAST:
            keys = keys.to(tl.float32)
            values = values.to(tl.float32)
        score = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        score = tl.where(inside[None, :], score, float("-inf"))
        peak = tl.maximum(largest, tl.max(score, 1))
        weight = tl.exp2(score - peak[:, None])
        shrink = tl.exp2(largest - peak)
        total = total * shrink + tl.sum(weight, 1)
        sums = sums * shrink[:, None] + tl.dot(weight.to(values.dtype), values, input_precision="ieee")
        largest = peak
    place = query_head * splits + split
    tl.store(part_ptr + place[:, None] * size + column[None, :], sums, mask=mine)
    tl.store(stat_ptr + 2 * place, largest, mask=member < group)
    tl.store(stat_ptr + 2 * place + 1, total, mask=member < group)


@triton.jit
def combine_kernel(part_ptr, stat_ptr, out_ptr, size, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program combines the splits of one query head of one sequence. The result of a padding sequence is 0."""
    place = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    column = tl.arange(0, BLOCK_D)
    inside = column < size
    largest = tl.load(stat_ptr + 2 * (place * SPLITS + split))
    total = tl.load(stat_ptr + 2 * (place * SPLITS + split) + 1)
    peak = tl.maximum(tl.max(largest, 0), -1e30)  # finite even without rows
    weight = tl.exp2(largest - peak)
    pointer = part_ptr + (place * SPLITS + split)[:, None] * size + column[None, :]
    parts = tl.load(pointer, mask=inside[None, :], other=0.0)
    whole = tl.sum(total * weight, 0)
    found = tl.sum(parts * weight[:, None], 0) / tl.where(whole > 0, whole, 1.0)
    tl.store(out_ptr + place * size + column, found.to(out_ptr.dtype.element_ty), mask=inside)


def _entry(query: Tensor) -> str:
    return "split_kernel_fp32" if query.dtype == torch.float32 else "split_kernel"


def splits(programs: int, device: torch.device) -> int:
    """The number of splits of a sequence's rows, a power of two that gives about two programs per multiprocessor. It
    does not depend on the number of rows, which is not fixed in a CUDA graph."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return min(triton.next_power_of_2(triton.cdiv(2 * processors, programs)), MAX_SPLITS)


def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    segments: Sequence[Tensor],
    addresses: Tensor,
    table: Tensor,
    before: Tensor,
    layer: int,
    window: int,
) -> Tensor:
    n, query_heads, size = query.shape
    heads, rows = key.shape[1], segments[0].shape[4]
    out = query.new_empty(n, query_heads * size)
    if not n:
        return out
    query, key, value = (t if t.stride()[1:] == (size, 1) else t.contiguous() for t in (query, key, value))
    cos, sin, table, before, addresses = (t.contiguous() for t in (cos, sin, table, before, addresses))
    rotated = query.new_empty(n, query_heads, size)
    launch = triton_support.config("append_kernel", query.device, n)
    chunks = triton.cdiv(query_heads, launch["HEADS"]) + triton.cdiv(heads, launch["HEADS"])
    append_kernel[(n, chunks)](
        *(query, key, value, cos, sin, rotated, table, before, addresses),
        *(layer, query_heads, heads, size, query.stride(0), key.stride(0), value.stride(0), table.stride(0)),
        ROWS=rows,
        BLOCK=max(triton.next_power_of_2(size // 2), 2),
        **launch,
    )
    shares = splits(n * heads, query.device)
    part = query.new_empty(n, query_heads, shares, size, dtype=torch.float32)
    stat = query.new_empty(n, query_heads, shares, 2, dtype=torch.float32)
    block_d = max(triton.next_power_of_2(size), 16)
    group = query_heads // heads
    split_kernel[(n, heads, shares)](
        *(rotated, table, before, addresses, part, stat, layer),
        *(LOG2_E * size**-0.5, window, heads, group, size, table.stride(0)),
        ROWS=rows,
        GROUP=max(triton.next_power_of_2(group), 16),
        BLOCK_D=block_d,
        WINDOWED=window > 0,
        UPCAST=triton_support.upcast(query),
        ALIGNED=16 if size * query.element_size() % 16 == 0 else query.element_size(),
        **triton_support.config(_entry(query), query.device, n),
    )
    combine_kernel[(n * query_heads,)](
        part,
        stat,
        out,
        size,
        SPLITS=shares,
        BLOCK_D=block_d,
        **triton_support.config("combine_kernel", query.device, n),
    )
    return out


def specimens() -> list[Specimen]:
    """How the kernels compile for 7B decoders (head size 128; 32 key heads for 32 query heads, 8 for 32, Qwen2's 4 for
    28) and head size 64 (Qwen2 0.5B); blocks of 32 rows."""
    found = []
    for dtype in ("bf16", "fp16", "fp32"):
        pointers = {"table_ptr": "*i32", "before_ptr": "*i32", "address_ptr": "*i64", "part_ptr": "*fp32"}
        pointers |= {"stat_ptr": "*fp32", "scale": "fp32"}

        def add(kernel, constants: dict, label: str, entry: str = "", dtype=dtype, pointers=pointers) -> None:
            names = [name for name in kernel.arg_names if name.islower()]
            signature = {name: pointers.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32") for name in names}
            ragged = ("layer", "scale", "window", "heads", "group", "query_heads", "key_heads", "table_row")
            aligned = tuple(name for name in names if name not in ragged)
            matrix = entry == "split_kernel"
            specimen = Specimen("paged_attention", kernel, signature, constants, label, matrix, False, aligned, entry)
            found.append(specimen)

        for size in (128, 64):
            add(append_kernel, {"ROWS": 32, "BLOCK": size // 2}, f"{dtype} heads of {size}")
            add(combine_kernel, {"SPLITS": 8, "BLOCK_D": size}, f"{dtype} heads of {size}")
            for windowed in (False, True):
                constants = {"ROWS": 32, "GROUP": 16, "BLOCK_D": size, "WINDOWED": windowed}
                constants |= {"UPCAST": False, "ALIGNED": 16}
                label = f"{dtype} heads of {size}{' windowed' if windowed else ''}"
                add(split_kernel, constants, label, "split_kernel_fp32" if dtype == "fp32" else "split_kernel")
    return found
