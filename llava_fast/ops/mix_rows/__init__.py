"""mix_rows: average, max and bilinear pooling as one op, driven by a table of row indices and weights."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from llava_fast.ops import backend, library, triton_support
from llava_fast.ops.mix_rows import reference

backend.register("mix_rows", "reference", "any device")
backend.register("mix_rows", "triton", "CUDA")


class InversePooling(NamedTuple):
    """Which table entries read each row (CSR), for gradients in a fixed order: int32 columns of the plan.

    order [pooled * K]: entry numbers m * K + k, sorted by the row they read; start [n + 1]: offsets of each row's
    entries in `order`.
    """

    order: Tensor
    start: Tensor


def mix_rows(
    rows: Tensor, index: Tensor, weight: Tensor, reduce: str = "sum", inverse: InversePooling | None = None
) -> Tensor:
    """Weighted sums or maxima of rows: out[m] = sum or max over k of weight[m, k] * rows[index[m, k]].

    rows [n, width]; index int [pooled, K] into rows; weight float32 [pooled, K], not applied if reduce is "max".
    inverse: the inverse table, for gradients; the Triton backward requires it.
    Returns [pooled, width] in rows' dtype, accumulated in float32. Only rows has a gradient; that of a maximum goes to
    the first of equal rows. FLOPs: 2*pooled*K*width; minimum bytes: each row read once, each pooled row written once.
    Raises ValueError for an unknown `reduce` and for mismatched tables.
    """
    if reduce not in ("sum", "max"):
        raise ValueError(f"reduce must be 'sum' or 'max', got {reduce!r}")
    if index.shape != weight.shape or index.dim() != 2:
        raise ValueError(f"index {tuple(index.shape)} and weight {tuple(weight.shape)} must both be [pooled, K]")
    if inverse is not None and (len(inverse.start) != len(rows) + 1 or len(inverse.order) != index.numel()):
        raise ValueError(
            f"inverse covers {len(inverse.start) - 1} rows and {len(inverse.order)} table entries, but there are "
            f"{len(rows)} rows and {index.numel()} entries"
        )
    return _mix_rows(rows, index, weight, reduce, list(inverse or ()))


def _run(rows: Tensor, index: Tensor, weight: Tensor, reduce: str, inverse: list[Tensor]) -> Tensor:
    if backend.choose("mix_rows", rows.device.type, {"triton": triton_support.unfit(rows, index, weight)}) == "triton":
        from llava_fast.ops.mix_rows import triton_kernels

        return triton_kernels.mix_rows(rows.contiguous(), index.contiguous(), weight.contiguous(), reduce)
    return reference.mix_rows(rows, index, weight, reduce)


def _run_backward(
    grad: Tensor, rows: Tensor, index: Tensor, weight: Tensor, reduce: str, source_rows: int, inverse: list[Tensor]
) -> Tensor:
    unfit = triton_support.unfit(grad) or (None if inverse else "no `inverse` was given")
    if backend.choose("mix_rows", grad.device.type, {"triton": unfit}) == "triton":
        from llava_fast.ops.mix_rows import triton_kernels

        grad, rows, index, weight = (table.contiguous() for table in (grad, rows, index, weight))
        order, start = (column.contiguous() for column in inverse)
        return triton_kernels.mix_rows_backward(grad, rows, index, weight, reduce, order, start)
    return reference.mix_rows_backward(grad, rows, index, weight, reduce, source_rows)


def _save(ctx, inputs, output) -> None:
    rows, index, weight, reduce, inverse = inputs
    saved = rows if reduce == "max" else rows[:0]
    ctx.save_for_backward(saved, index, weight, *inverse)
    ctx.reduce, ctx.source_rows = reduce, len(rows)


def _backward(ctx, grad: Tensor):
    rows, index, weight, *inverse = ctx.saved_tensors
    found = _mix_rows_backward(grad, rows, index, weight, ctx.reduce, ctx.source_rows, inverse)
    return found, None, None, None, [None] * len(inverse)


_mix_rows_backward = library.define(
    "mix_rows_backward(Tensor grad, Tensor rows, Tensor index, Tensor weight, str reduce, SymInt source_rows,"
    " Tensor[] inverse) -> Tensor",
    _run_backward,
    lambda grad, rows, index, weight, reduce, source_rows, inverse: grad.new_empty(source_rows, grad.shape[1]),
)
_mix_rows = library.define(
    "mix_rows(Tensor rows, Tensor index, Tensor weight, str reduce, Tensor[] inverse) -> Tensor",
    _run,
    lambda rows, index, weight, reduce, inverse: rows.new_empty(len(index), rows.shape[1]),
    _backward,
    _save,
)
