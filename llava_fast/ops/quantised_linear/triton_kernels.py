"""quantised_linear in Triton.

One row, or any few rows in float32: `quantised_row_kernel`, multiplied and summed in float32. Up to MAX_ROWS rows in 16
bits: `quantised_rows_kernel`, which rounds tiles of the weight to x's dtype for the matrix units. Neither writes
weights to memory. If there are too few tiles for a GPU, the columns are split among programs, and `sums` adds their
float32 sums in order. More rows, and the gradient of x: `dequantise_kernel` writes the weight in x's dtype, and cuBLAS
multiplies.

A code becomes a float32 by integer operations (2^23 + code is the float32 whose last bits are the code), because a
multiprocessor converts integers at a fraction of the rate at which it multiplies.

Bytes for n rows: codes, scales and zero points once, x and the result; above MAX_ROWS rows also the weight in x's
dtype, written and read. FLOPs: 2 * n * in * out.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from llava_fast.ops import sums, triton_support
from llava_fast.ops.quantised_linear.weight import QuantisedWeight
from llava_fast.ops.triton_support import Specimen

MAX_ROWS = 16  # of the kernels that read codes: one tile of a matrix instruction
PROGRAMS = 256  # a product with fewer tiles splits its columns to launch about this many programs
TWO_23 = 0x4B000000
"""The float32 2^23. An argument of the kernels: as a constant it would cost another instruction for each code."""


@triton.jit
def bit_positions(BITS: tl.constexpr):
    """Where the codes of a 32-bit word are, from the first: (shift to the right, mask after it, 2^left, 2^-left). A
    shift is 0 or 16, for several codes at once, and leaves a code `left` bits too high."""
    at = tl.arange(0, 32 // BITS) * BITS
    shift = at // 16 * 16
    left = at - shift
    above = (127 + left << 23).to(tl.float32, bitcast=True)
    below = (127 - left << 23).to(tl.float32, bitcast=True)
    return shift, ((1 << BITS) - 1) << left, above, below


@triton.jit
def words_of(run):
    """The four words of each run [RUNS, 4]."""
    return run[:, None] + tl.arange(0, 4)[None, :]


@triton.jit
def load_runs(
    codes_ptr,
    scale_ptr,
    zero_ptr,
    two_23,
    n,
    live,
    run,
    end,
    words,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """(weights over their scale times 2^left [N, RUNS, 4, codes of a word], scale [N, RUNS]), both float32, of rows
    n [N] and runs whose first words are `run` [RUNS], up to word `end`. A run is the 16 bytes that a thread loads at
    once; all have one scale."""
    shift, mask, above, _ = bit_positions(BITS)
    word = words_of(run)
    at = n.to(tl.int64)[:, None, None, None] * words + word[None, :, :, None]
    codes = tl.load(codes_ptr + at, mask=live[:, None, None, None] & (word < end)[None, :, :, None], other=0)
    codes = codes.to(tl.uint32, bitcast=True)
    group = n[:, None] * groups + (run * (32 // BITS) // GROUP if GROUP else run * 0)[None, :]
    held = live[:, None] & (run < end)[None, :]
    scale = tl.load(scale_ptr + group, mask=held, other=0.0)
    if BITS == 8:
        codes = codes ^ 0x80808080
        offset = 8388608.0 + 128.0 * above[None, None, None, :]
    elif zero_ptr is None:
        offset = 8388608.0 + 8.0 * above[None, None, None, :]
    else:
        zero = tl.load(zero_ptr + group, mask=held, other=0).to(tl.float32)
        offset = 8388608.0 + zero[:, :, None, None] * above[None, None, None, :]
    bits = (codes >> shift[None, None, None, :]) & mask[None, None, None, :] | two_23
    return bits.to(tl.float32, bitcast=True) - offset, scale


@triton.jit
def quantised_row_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    out_ptr,
    rows,
    columns,
    words,
    groups,
    share,
    two_23,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RUNS: tl.constexpr,
):
    """BLOCK_N results of one row of x: out[s, row, n] sums the `share` words from s * share. codes int32
    [columns, words]; zero_ptr and bias_ptr may be None, GROUP is 0 for int8's one scale a row."""
    row = (tl.program_id(0) % rows).to(tl.int64)  # rows side by side, so that they find a tile of codes in the caches
    n = tl.program_id(0) // rows * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    live = n < columns
    end = tl.minimum((part + 1) * share, words)
    PER_WORD: tl.constexpr = 32 // BITS
    _, _, _, below = bit_positions(BITS)
    x_ptr += row * words * PER_WORD
    total = tl.zeros([BLOCK_N, RUNS], tl.float32)
    for first in range(part * share, end, 4 * RUNS):
        run = first + 4 * tl.arange(0, RUNS)
        number, scale = load_runs(codes_ptr, scale_ptr, zero_ptr, two_23, n, live, run, end, words, groups, BITS, GROUP)
        word = words_of(run)[:, :, None]
        x = tl.load(x_ptr + word * PER_WORD + tl.arange(0, PER_WORD)[None, None, :], mask=word < end, other=0.0)
        x = x.to(tl.float32) * below[None, None, :]
        total += tl.sum(tl.sum(number * x[None, :, :, :], axis=3), axis=2) * scale
    found = tl.sum(total, axis=1)
    if bias_ptr is not None:
        if part == 0:
            found += tl.load(bias_ptr + n, mask=live, other=0.0).to(tl.float32)
    tl.store(out_ptr + (part * rows + row) * columns + n, found.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def quantised_rows_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    out_ptr,
    rows,
    columns,
    stored,
    groups,
    share,
    two_23,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RUNS: tl.constexpr,
):
    """BLOCK_N columns of the results of up to ROWS rows: out[s, m, n] sums the `share` bytes from s * share. codes
    uint8 [columns, stored]. int8's one scale a row (GROUP 0) multiplies the sum; others multiply the codes, and the
    products are rounded to x's dtype."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    m = tl.arange(0, ROWS)
    live = n < columns
    end = tl.minimum((part + 1) * share, stored)
    PER_BYTE: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = 16 * RUNS
    dtype = tl.float32 if UPCAST else x_ptr.dtype.element_ty
    codes_at = codes_ptr + n.to(tl.int64)[None, :] * stored
    total = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for first in range(part * share, end, BYTES):
        byte = first + tl.arange(0, BYTES)
        codes = tl.load(codes_at + byte[:, None], mask=live[None, :] & (byte < end)[:, None], other=0).to(tl.int32)
        k = first * PER_BYTE + tl.arange(0, BYTES * PER_BYTE)
        x_mask = (m < rows)[:, None] & (k < end * PER_BYTE)[None, :]
        x = tl.load(x_ptr + m[:, None] * (stored * PER_BYTE) + k[None, :], mask=x_mask, other=0.0).to(dtype)
        if GROUP:
            run = first + 16 * tl.arange(0, RUNS)
            group = n[None, :] * groups + (run * PER_BYTE // GROUP)[:, None]
            held = live[None, :] & (run < end)[:, None]
            scale = tl.load(scale_ptr + group, mask=held, other=0.0)
            scale = tl.broadcast_to(scale[:, None, :], [RUNS, 16, BLOCK_N]).reshape(BYTES, BLOCK_N)
        if BITS == 4:
            zero = 8.0
            if zero_ptr is not None:
                zero = tl.load(zero_ptr + group, mask=held, other=0).to(tl.float32)
                zero = tl.broadcast_to(zero[:, None, :], [RUNS, 16, BLOCK_N]).reshape(BYTES, BLOCK_N)
            low = (codes & 15 | two_23).to(tl.float32, bitcast=True) - (8388608.0 + zero)
            high = (codes & 240 | two_23).to(tl.float32, bitcast=True) - (8388608.0 + 16.0 * zero)
            even, odd = tl.split(x.reshape(ROWS, BYTES, 2))
            total = tl.dot(even, (low * scale).to(dtype), total, input_precision="ieee")
            total = tl.dot(odd, (high * (0.0625 * scale)).to(dtype), total, input_precision="ieee")
        else:
            number = (codes ^ 128 | two_23).to(tl.float32, bitcast=True) - (8388608.0 + 128.0)
            if GROUP:
                number *= scale
            total = tl.dot(x, number.to(dtype), total, input_precision="ieee")
    if not GROUP:
        total *= tl.load(scale_ptr + n, mask=live, other=0.0)[None, :]
    if bias_ptr is not None:
        if part == 0:
            total += tl.load(bias_ptr + n, mask=live, other=0.0).to(tl.float32)[None, :]
    at = (part * rows + m).to(tl.int64)[:, None] * columns + n[None, :]
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=(m < rows)[:, None] & live[None, :])


@triton.jit
def dequantise_kernel(
    codes_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    columns,
    words,
    groups,
    two_23,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RUNS: tl.constexpr,
):
    """BLOCK_N rows by RUNS runs of the weight, in out's dtype."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = n < columns
    PER_WORD: tl.constexpr = 32 // BITS
    _, _, _, below = bit_positions(BITS)
    run = 4 * (tl.program_id(1) * RUNS + tl.arange(0, RUNS))
    number, scale = load_runs(codes_ptr, scale_ptr, zero_ptr, two_23, n, live, run, words, words, groups, BITS, GROUP)
    word = words_of(run)
    weight = number * (scale[:, :, None, None] * below[None, None, None, :])
    column = word[:, :, None] * PER_WORD + tl.arange(0, PER_WORD)[None, None, :]
    at = n.to(tl.int64)[:, None, None, None] * (words * PER_WORD) + column[None, :, :, :]
    mask = live[:, None, None, None] & (word < words)[None, :, :, None]
    tl.store(out_ptr + at, weight.to(out_ptr.dtype.element_ty), mask=mask)


def quantised_linear(x: Tensor, weight: QuantisedWeight, bias: Tensor | None) -> Tensor:
    """x [.., in] @ weight.T + bias, in x's dtype."""
    rows, columns = x.shape[:-1].numel(), weight.shape[0]
    if rows > MAX_ROWS:
        return F.linear(x, dequantise(weight, x.dtype), bias)
    out = torch.empty(*x.shape[:-1], columns, dtype=x.dtype, device=x.device)
    if out.numel():
        few_rows(x.contiguous(), rows, weight, None if bias is None else bias.contiguous(), out)
    return out


def few_rows(x: Tensor, rows: int, weight: QuantisedWeight, bias: Tensor | None, out: Tensor) -> None:
    """Write `out` [.., columns] for up to MAX_ROWS contiguous rows."""
    columns, stored = weight.codes.shape
    by_row = rows == 1 or x.dtype == torch.float32
    kernel: Any = quantised_row_kernel if by_row else quantised_rows_kernel
    config = triton_support.config(kernel.__name__, x.device, rows)
    codes, unit = (_words(weight), 4) if by_row else (weight.codes.view(torch.uint8), 1)
    tiles, step = triton.cdiv(columns, config["BLOCK_N"]), 16 * config["RUNS"]
    parts = min(triton.cdiv(PROGRAMS, tiles), triton.cdiv(stored, step))
    share = triton.cdiv(triton.cdiv(stored, step), parts) * step
    parts = triton.cdiv(stored, share)
    into = out if parts == 1 else torch.empty(parts, *out.shape, dtype=torch.float32, device=out.device)
    pointers = (x, codes, weight.scale, weight.zero, bias, into)
    sizes = (rows, columns, stored // unit, weight.scale.shape[1], share // unit, TWO_23, *_scheme(weight))
    if by_row:
        quantised_row_kernel[(rows * tiles, parts)](*pointers, *sizes, **config)
    else:
        quantised_rows_kernel[(tiles, parts)](*pointers, *sizes, triton_support.upcast(x), MAX_ROWS, **config)
    if parts > 1:
        sums.sum_shares(into, out)


def quantised_linear_backward(
    grad: Tensor, weight: QuantisedWeight, needed: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and bias for grad [.., out], None where not needed."""
    return (
        grad @ dequantise(weight, grad.dtype) if needed[0] else None,
        grad.flatten(0, -2).sum(0) if needed[1] else None,
    )


def dequantise(weight: QuantisedWeight, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] in `dtype`."""
    columns, stored = weight.codes.shape
    made = torch.empty(weight.shape, dtype=dtype, device=weight.scale.device)
    if made.numel():
        config = triton_support.config("dequantise_kernel", made.device, columns)
        grid = (triton.cdiv(columns, config["BLOCK_N"]), triton.cdiv(stored, 16 * config["RUNS"]))
        sizes = (columns, stored // 4, weight.scale.shape[1], TWO_23, *_scheme(weight))
        dequantise_kernel[grid](_words(weight), weight.scale, weight.zero, made, *sizes, **config)
    return made


def _words(weight: QuantisedWeight) -> Tensor:
    return weight.codes.view(torch.int32)


def _scheme(weight: QuantisedWeight) -> tuple[int, int]:
    """(bits of a code, elements that share a scale; 0 for int8 codes with one scale a row)."""
    if weight.scheme == "int8":
        return 8, weight.group if weight.scale.shape[1] > 1 else 0
    return 4, weight.group


def specimens() -> list[Specimen]:
    """int8 with one scale a row, int4 in groups of 32, and in groups of 128 with zero points; with a bias, and without
    one into float32 sums."""
    found = [sums.shares_specimen("quantised_linear", dtype) for dtype in ("bf16", "fp16", "fp32")]
    schemes = {"int8": (8, 0, False), "int4 32": (4, 32, False), "int4 128 zeros": (4, 128, True)}
    for name, scheme in schemes.items():
        for dtype in ("bf16", "fp16", "fp32"):
            found.append(_specimen(dequantise_kernel, f"{dtype} {name}", dtype, *scheme))
            for partial in (False, True):
                label = f"{dtype} {name}{', partial sums' if partial else ''}"
                found.append(_specimen(quantised_row_kernel, label, dtype, *scheme, partial))
                if dtype != "fp32":
                    found.append(_specimen(quantised_rows_kernel, label, dtype, *scheme, partial))
    return found


def _specimen(
    kernel: Any, label: str, dtype: str, bits: int, group: int, zeros: bool, partial: bool = False
) -> Specimen:
    absent = {"zero_ptr": not zeros, "bias_ptr": partial}
    is_rows = kernel is quantised_rows_kernel
    types = {"codes_ptr": "*u8" if is_rows else "*i32", "scale_ptr": "*fp32", "zero_ptr": "*u8"}
    types["out_ptr"] = "*fp32" if partial else f"*{dtype}"
    names = [name for name in kernel.arg_names if name.islower() and not absent.get(name)]
    single = kernel is quantised_row_kernel and dtype != "fp32"  # 16 bits come here in a single row
    ones = {"groups": not group, "rows": single}  # Triton compiles a 1 as a constant
    names = [name for name in names if not ones.get(name)]
    signature = {name: types.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32") for name in names}
    constants: dict[str, Any] = {name: None for name, missing in absent.items() if missing and name in kernel.arg_names}
    constants |= {"BITS": bits, "GROUP": group} | {name: 1 for name, one in ones.items() if one}
    constants |= {"UPCAST": False, "ROWS": MAX_ROWS} if is_rows else {}
    aligned = (*(name for name in names if name.endswith("_ptr")), "columns", "words", "stored", "share", "two_23")
    return Specimen(
        "quantised_linear",
        kernel,
        signature,
        constants,
        label,
        matrix=is_rows,
        aligned=tuple(name for name in aligned if name in names),
    )
