"""mix_rows: rows made of others by a tap table: average, max and bilinear pooling as one plan-driven op."""

from __future__ import annotations

from torch import Tensor

from llava_fast.ops import backend
from llava_fast.ops.mix_rows import reference

backend.register("mix_rows", "reference", "any device")


def mix_rows(rows: Tensor, index: Tensor, weight: Tensor, reduce: str = "sum") -> Tensor:
    """Weighted sums (or maxima) of rows.

    rows [n, width]; index int [mixed, taps] into rows; weight float32 [mixed, taps], unused by reduce "max".
    Returns [mixed, width] in rows' dtype, accumulated in float32. FLOPs 2*mixed*taps*width.
    Raises ValueError for an unknown `reduce` or for tables that do not match.
    """
    if reduce not in ("sum", "max"):
        raise ValueError(f"reduce must be 'sum' or 'max', got {reduce!r}")
    if index.shape != weight.shape or index.dim() != 2:
        raise ValueError(f"index {tuple(index.shape)} and weight {tuple(weight.shape)} must both be [mixed, taps]")
    backend.choose("mix_rows")
    return reference.mix_rows(rows, index, weight, reduce)
