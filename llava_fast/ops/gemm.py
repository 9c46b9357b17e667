"""The GEMM that ops share, in Triton, with gathered input rows, a fused epilogue and scattered output rows.

    out[store[m]] = epilogue(sum_k a[gather[m], k] * b[k, n])

16-bit operands use tensor cores; float32 is multiplied as IEEE float32, never as tf32. Sums are float32, in an order
that depends only on shapes and the launch configuration, so equal inputs give equal bits. A weight gradient reduces
over many rows: it splits them among programs and adds the partial sums in order (split-K).

FLOPs of `gemm` and `weight_gradient`: 2 * rows * columns * inner. Minimum bytes: each operand read and each output
written once; for `weight_gradient` with several splits, 8 more bytes for each entry of each split.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llava_fast.ops import sums, triton_support
from llava_fast.ops.triton_support import Config, Specimen

PROGRAMS = 256  # a weight gradient with fewer tiles splits its rows to launch about this many programs
SHARE = 512  # least rows of a split


@triton.jit
def activate(x, NAME: tl.constexpr):
    """The activation of float32 x."""
    y = x
    if NAME == "quick_gelu":
        y = x * tl.sigmoid(1.702 * x)
    elif NAME == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(0.7071067811865476 * x))
    elif NAME == "gelu_pytorch_tanh":  # x (1 + tanh u) / 2 = x sigmoid(2 u)
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif NAME == "relu":
        y = tl.maximum(x, 0.0)
    elif NAME == "silu":
        y = x * tl.sigmoid(x)
    else:
        tl.static_assert(NAME == "", "unknown activation")
    return y


@triton.jit
def derivative(x, NAME: tl.constexpr):
    """The activation's derivative at float32 x."""
    slope = tl.full(x.shape, 1.0, tl.float32)
    if NAME == "quick_gelu":
        gate = tl.sigmoid(1.702 * x)
        slope = gate * (1.0 + 1.702 * x * (1.0 - gate))
    elif NAME == "gelu":
        slope = 0.5 * (1.0 + tl.erf(0.7071067811865476 * x)) + 0.3989422804014327 * x * tl.exp(-0.5 * x * x)
    elif NAME == "gelu_pytorch_tanh":
        gate = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        slope = gate * (1.0 + x * (1.0 - gate) * 1.5957691216057308 * (1.0 + 0.134145 * x * x))
    elif NAME == "relu":
        slope = tl.where(x > 0.0, 1.0, 0.0)
    elif NAME == "silu":
        gate = tl.sigmoid(x)
        slope = gate * (1.0 + x * (1.0 - gate))
    else:
        tl.static_assert(NAME == "", "unknown activation")
    return slope


@triton.jit
def tile_of(program, down, across, GROUP: tl.constexpr):
    """(tile row, tile column) of a program: column by column within GROUP tile rows, so that both operands hit L2."""
    group = program // (GROUP * across)
    first = group * GROUP
    size = tl.minimum(down - first, GROUP)
    inside = program % (GROUP * across)
    return first + inside % size, inside // size


@triton.jit
def gemm_kernel(
    a_ptr,
    b_ptr,
    bias_ptr,
    out_ptr,
    pre_ptr,
    slope_ptr,
    gather_ptr,
    store_ptr,
    count_ptr,
    rows,
    columns,
    inner,
    ACTIVATION: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of the product. Optional pointers may be None.

    a [.., inner]; b [columns, inner] if TRANSPOSED (nn.Linear's weight), else [inner, columns]. With slope_ptr
    [rows, columns] the sum is multiplied by the activation's derivative at those values. Otherwise the sum is stored to
    pre_ptr [rows, columns], if given, and then activated. With count_ptr only the first count rows are computed.
    """
    if count_ptr is not None:
        rows = tl.minimum(rows, tl.load(count_ptr))
        if tl.program_id(0) >= tl.cdiv(rows, BLOCK_M) * tl.cdiv(columns, BLOCK_N):
            return
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N), GROUP)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    taken = m
    if gather_ptr is not None:
        taken = tl.load(gather_ptr + m, mask=m < rows, other=-1)
    live = (m < rows) & (taken >= 0)
    a_at = a_ptr + taken.to(tl.int64)[:, None] * inner + k[None, :]
    if TRANSPOSED:
        b_at = b_ptr + n.to(tl.int64)[None, :] * inner + k[:, None]
    else:
        b_at = b_ptr + k.to(tl.int64)[:, None] * columns + n[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, inner, BLOCK_K):
        a = tl.load(a_at, mask=live[:, None] & (k[None, :] < inner - first), other=0.0)
        b = tl.load(b_at, mask=(n[None, :] < columns) & (k[:, None] < inner - first), other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
        a_at += BLOCK_K
        if TRANSPOSED:
            b_at += BLOCK_K
        else:
            b_at += BLOCK_K * columns

    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    here = m.to(tl.int64)[:, None] * columns + n[None, :]
    if slope_ptr is not None:
        total *= derivative(tl.load(slope_ptr + here, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    else:
        if pre_ptr is not None:
            tl.store(pre_ptr + here, total.to(pre_ptr.dtype.element_ty), mask=inside)
        total = activate(total, ACTIVATION)
    if store_ptr is not None:
        place = tl.load(store_ptr + m, mask=m < rows, other=-1)
        here = place.to(tl.int64)[:, None] * columns + n[None, :]
        inside = (place >= 0)[:, None] & (n < columns)[None, :]
    tl.store(out_ptr + here, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def weight_gradient_kernel(
    grad_ptr,
    x_ptr,
    grad_gather_ptr,
    x_gather_ptr,
    out_ptr,
    rows,
    columns,
    inner,
    share,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out[s, n, k] = sum of grad[grad_gather[m], n] * x[x_gather[m], k] over the `share` rows m from s * share.

    A gather pointer that is None means the identity; a negative index stands for a zero row.
    """
    tile_n, tile_k = tile_of(tl.program_id(0), tl.cdiv(columns, BLOCK_N), tl.cdiv(inner, BLOCK_K), GROUP)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    start = tl.program_id(1) * share
    end = tl.minimum(start + share, rows)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for first in range(start, end, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        grad_row, x_row = m, m
        if grad_gather_ptr is not None:
            grad_row = tl.load(grad_gather_ptr + m, mask=m < end, other=-1)
        if x_gather_ptr is not None:
            x_row = tl.load(x_gather_ptr + m, mask=m < end, other=-1)
        grad_live, x_live = (m < end) & (grad_row >= 0), (m < end) & (x_row >= 0)
        grad_at = grad_ptr + grad_row.to(tl.int64)[:, None] * columns + n[None, :]
        x_at = x_ptr + x_row.to(tl.int64)[:, None] * inner + k[None, :]
        grad = tl.load(grad_at, mask=grad_live[:, None] & (n < columns)[None, :], other=0.0)
        x = tl.load(x_at, mask=x_live[:, None] & (k < inner)[None, :], other=0.0)
        if UPCAST:
            grad, x = grad.to(tl.float32), x.to(tl.float32)
        total = tl.dot(tl.trans(grad), x, total, input_precision="ieee")
    here = (tl.program_id(1).to(tl.int64) * columns + n)[:, None] * inner + k[None, :]
    inside = (n < columns)[:, None] & (k < inner)[None, :]
    tl.store(out_ptr + here, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def activation_kernel(x_ptr, grad_ptr, out_ptr, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """out = activation(x); with grad_ptr, grad times the activation's derivative at x."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    if grad_ptr is not None:
        y = tl.load(grad_ptr + at, mask=at < size, other=0.0).to(tl.float32) * derivative(x, ACTIVATION)
    else:
        y = activate(x, ACTIVATION)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=at < size)


def gemm(
    a: Tensor,
    b: Tensor,
    rows: int,
    *,
    bias: Tensor | None = None,
    activation: str = "",
    transposed: bool = True,
    gather: Tensor | None = None,
    out: Tensor | None = None,
    store: Tensor | None = None,
    count: Tensor | None = None,
    pre: Tensor | None = None,
    slope: Tensor | None = None,
) -> Tensor:
    """[rows, columns] = epilogue(a @ b.T), or of a @ b with `transposed` False; returns `out`.

    a [.., inner], b [columns, inner] ([inner, columns]), bias [columns], all of one dtype and contiguous.
    gather, store int32 [rows]: row m reads a's row gather[m] (negative: zeros) and is written to row store[m] of `out`
    (negative: not written; no duplicates). pre [rows, columns] receives the pre-activation, bias included.
    count int32 [1]: rows from count[0] on may be skipped; their memory is then left unchanged.
    slope [rows, columns]: multiply by the activation's derivative at these values instead of activating.
    """
    inner, columns = a.shape[-1], b.shape[0] if transposed else b.shape[1]
    if out is None:
        out = torch.empty(rows, columns, dtype=a.dtype, device=a.device)
    if rows and columns:
        config = _config("gemm_kernel", a, rows)
        grid = (triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(columns, config["BLOCK_N"]),)
        pointers = (a, b, bias, out, pre, slope, gather, store, count)
        gemm_kernel[grid](*pointers, rows, columns, inner, activation, transposed, triton_support.upcast(a), **config)
    return out


def weight_gradient(
    grad: Tensor,
    x: Tensor,
    rows: int,
    *,
    grad_gather: Tensor | None = None,
    x_gather: Tensor | None = None,
    share: int | None = None,
) -> Tensor:
    """[columns, inner] = sum over m < rows of grad[grad_gather[m]] (outer) x[x_gather[m]], in their dtype.

    grad [.., columns], x [.., inner], contiguous and of one dtype; gathers int32 [rows], negative: a zero row.
    share: most rows that one program sums (default: from the shapes).
    """
    columns, inner = grad.shape[-1], x.shape[-1]
    out = torch.empty(columns, inner, dtype=grad.dtype, device=grad.device)
    if out.numel():
        config = _config("weight_gradient_kernel", grad, rows)
        tiles = triton.cdiv(columns, config["BLOCK_N"]) * triton.cdiv(inner, config["BLOCK_K"])
        share = share or max(triton.cdiv(rows, max(PROGRAMS // tiles, 1)), SHARE)
        shares = max(triton.cdiv(rows, share), 1)
        parts = out if shares == 1 else torch.empty(shares, *out.shape, dtype=torch.float32, device=out.device)
        pointers = (grad, x, grad_gather, x_gather, parts)
        weight_gradient_kernel[(tiles, shares)](
            *pointers, rows, columns, inner, share, triton_support.upcast(grad), **config
        )
        if shares > 1:
            sums.sum_shares(parts, out)
    return out


def activation(x: Tensor, name: str, grad: Tensor | None = None) -> Tensor:
    """activation(x); with `grad` (shape and dtype of x), grad times the derivative at x. Both contiguous."""
    out = torch.empty_like(x)
    if x.numel():
        config = _config("activation_kernel", x, x.numel(), own_float32=False)
        grid = (triton.cdiv(x.numel(), config["BLOCK"]),)
        activation_kernel[grid](x, grad, out, x.numel(), name, **config)
    return out


def _config(kernel: str, like: Tensor, rows: int, own_float32: bool = True) -> Config:
    entry = f"{kernel}_fp32" if own_float32 and like.dtype == torch.float32 else kernel
    return triton_support.config(entry, like.device, rows)


def gemm_specimen(
    op: str,
    dtype: str,
    label: str,
    *,
    activation: str = "",
    bias: bool = False,
    pre: bool = False,
    slope: bool = False,
    gather: bool = False,
    store: bool = False,
    count: bool = False,
    transposed: bool = True,
) -> Specimen:
    """How `gemm` compiles with these options."""
    given = {"bias_ptr": bias, "pre_ptr": pre, "slope_ptr": slope}
    tables = [name for name, use in {"a_ptr": True, "b_ptr": True, **given, "out_ptr": True}.items() if use]
    integers = {"gather_ptr": gather, "store_ptr": store, "count_ptr": count}
    indices = [name for name, use in integers.items() if use]
    constants: dict[str, Any] = {name: None for name, use in (given | integers).items() if not use}
    constants |= {"ACTIVATION": activation, "TRANSPOSED": transposed, "UPCAST": False}
    return _specimen(op, gemm_kernel, dtype, label, tables, indices, ("rows", "columns", "inner"), constants)


def weight_gradient_specimen(
    op: str, dtype: str, label: str, *, out: str = "", grad_gather: bool = False, x_gather: bool = False
) -> Specimen:
    """How `weight_gradient` compiles with these options; out: dtype of the partial sums of several splits ("fp32")."""
    gathers = {"grad_gather_ptr": grad_gather, "x_gather_ptr": x_gather}
    indices = [name for name, use in gathers.items() if use]
    constants: dict[str, Any] = {name: None for name, use in gathers.items() if not use} | {"UPCAST": False}
    sizes = ("rows", "columns", "inner", "share")
    tables = ["grad_ptr", "x_ptr", "out_ptr"]
    return _specimen(op, weight_gradient_kernel, dtype, label, tables, indices, sizes, constants, out)


def activation_specimen(op: str, dtype: str, name: str, grad: bool) -> Specimen:
    """How `activation` compiles, forward or with a gradient."""
    tables = ["x_ptr", *(["grad_ptr"] if grad else []), "out_ptr"]
    constants: dict[str, Any] = {"ACTIVATION": name} | ({} if grad else {"grad_ptr": None})
    label = f"{dtype} {name}{' gradient' if grad else ''}"
    return _specimen(op, activation_kernel, dtype, label, tables, [], ("size",), constants)


def _specimen(
    op: str,
    kernel: Any,
    dtype: str,
    label: str,
    tables: list[str],
    indices: list[str],
    sizes: tuple[str, ...],
    constants: dict[str, Any],
    out: str = "",
) -> Specimen:
    is_product = kernel in (gemm_kernel, weight_gradient_kernel)
    signature = dict.fromkeys(tables, f"*{dtype}") | dict.fromkeys(indices, "*i32")
    signature |= dict.fromkeys(sizes, "i32") | {"out_ptr": f"*{out or dtype}"}
    return Specimen(
        op,
        kernel,
        signature,
        constants,
        label,
        matrix=is_product and dtype != "fp32",
        aligned=(*tables, *indices, *(name for name in sizes if name in ("columns", "inner", "size"))),
        entry=f"{kernel.__name__}_fp32" if is_product and dtype == "fp32" else "",
    )
