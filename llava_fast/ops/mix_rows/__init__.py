"""mix_rows: rows made of others by a tap table: average, max and bilinear pooling as one plan-driven op."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from llava_fast.ops import backend, library, triton_support
from llava_fast.ops.mix_rows import reference

backend.register("mix_rows", "reference", "any device")
backend.register("mix_rows", "triton", "CUDA")


class TapUses(NamedTuple):
    """Which taps took which row, sorted, for gradients in a fixed order: int32 columns of the plan.

    use [mixed * taps]: numbers m * taps + tap, by rising row; start [n + 1]: where each row's begin, then the end.
    """

    use: Tensor
    start: Tensor


def mix_rows(rows: Tensor, index: Tensor, weight: Tensor, reduce: str = "sum", uses: TapUses | None = None) -> Tensor:
    """Weighted sums (or maxima) of rows.

    rows [n, width]; index int [mixed, taps] into rows; weight float32 [mixed, taps], unused by reduce "max".
    uses: the same table the other way round, for gradients; the Triton backward needs it.
    Returns [mixed, width] in rows' dtype, accumulated in float32. A gradient flows to rows alone; that of a maximum
    goes to the first of equal taps. FLOPs 2*mixed*taps*width; minimum bytes: each row read once, each mixed row
    written once.
    Raises ValueError for an unknown `reduce` or for tables that do not match.
    """
    if reduce not in ("sum", "max"):
        raise ValueError(f"reduce must be 'sum' or 'max', got {reduce!r}")
    if index.shape != weight.shape or index.dim() != 2:
        raise ValueError(f"index {tuple(index.shape)} and weight {tuple(weight.shape)} must both be [mixed, taps]")
    if uses is not None and (len(uses.start) != len(rows) + 1 or len(uses.use) != index.numel()):
        raise ValueError(
            f"uses tell of {len(uses.start) - 1} rows and {len(uses.use)} taps, but there are {len(rows)} rows and "
            f"{index.numel()} taps"
        )
    return _mix_rows(rows, index, weight, reduce, list(uses or ()))


def _run(rows: Tensor, index: Tensor, weight: Tensor, reduce: str, uses: list[Tensor]) -> Tensor:
    if backend.choose("mix_rows", rows.device.type, {"triton": triton_support.unfit(rows, index, weight)}) == "triton":
        from llava_fast.ops.mix_rows import triton_kernels

        return triton_kernels.mix_rows(rows.contiguous(), index.contiguous(), weight.contiguous(), reduce)
    return reference.mix_rows(rows, index, weight, reduce)


def _run_backward(
    grad: Tensor, rows: Tensor, index: Tensor, weight: Tensor, reduce: str, source_rows: int, uses: list[Tensor]
) -> Tensor:
    unfit = triton_support.unfit(grad) or (None if uses else "no `uses` were given, so its taps are not sorted")
    if backend.choose("mix_rows", grad.device.type, {"triton": unfit}) == "triton":
        from llava_fast.ops.mix_rows import triton_kernels

        grad, rows, index, weight = (table.contiguous() for table in (grad, rows, index, weight))
        use, start = (column.contiguous() for column in uses)
        return triton_kernels.mix_rows_backward(grad, rows, index, weight, reduce, use, start)
    return reference.mix_rows_backward(grad, rows, index, weight, reduce, source_rows)


def _save(ctx, inputs, output) -> None:
    rows, index, weight, reduce, uses = inputs
    saved = rows if reduce == "max" else rows[:0]
    ctx.save_for_backward(saved, index, weight, *uses)
    ctx.reduce, ctx.source_rows = reduce, len(rows)


def _backward(ctx, grad: Tensor):
    rows, index, weight, *uses = ctx.saved_tensors
    found = _mix_rows_backward(grad, rows, index, weight, ctx.reduce, ctx.source_rows, uses)
    return found, None, None, None, [None] * len(uses)


_mix_rows_backward = library.define(
    "mix_rows_backward(Tensor grad, Tensor rows, Tensor index, Tensor weight, str reduce, SymInt source_rows,"
    " Tensor[] uses) -> Tensor",
    _run_backward,
    lambda grad, rows, index, weight, reduce, source_rows, uses: grad.new_empty(source_rows, grad.shape[1]),
)
_mix_rows = library.define(
    "mix_rows(Tensor rows, Tensor index, Tensor weight, str reduce, Tensor[] uses) -> Tensor",
    _run,
    lambda rows, index, weight, reduce, uses: rows.new_empty(len(index), rows.shape[1]),
    _backward,
    _save,
)
