"""Mixing rows by a tap table in plain PyTorch: the specification of `llava_fast.ops.mix_rows`."""

from __future__ import annotations

import torch
from torch import Tensor


def mix_rows(rows: Tensor, index: Tensor, weight: Tensor, reduce: str) -> Tensor:
    taps = rows[index.long()]  # [mixed, taps, width]
    if reduce == "max":
        return taps.amax(dim=1)
    wide = torch.promote_types(rows.dtype, torch.float32)
    return (taps.to(wide) * weight.to(wide)[:, :, None]).sum(dim=1).to(rows.dtype)


def mix_rows_backward(
    grad: Tensor, rows: Tensor, index: Tensor, weight: Tensor, reduce: str, source_rows: int
) -> Tensor:
    """Gradient of the rows [source_rows, width]; a maximum's goes to the first of equal taps, as max pooling's does."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    if reduce == "max":
        shares = (first_maximum(rows[index.long()])[:, None] == _number(index)[None, :, None]).to(wide)
    else:
        shares = weight.to(wide)[:, :, None]
    parts = (grad.to(wide)[:, None] * shares).flatten(0, 1)  # [mixed * taps, width]
    out = torch.zeros(source_rows, grad.shape[1], dtype=wide, device=grad.device)
    return out.index_put((index.flatten().long(),), parts, accumulate=True).to(grad.dtype)


def first_maximum(taps: Tensor) -> Tensor:
    """int64 [mixed, width]: which of [mixed, taps, width] is largest, the first of equals."""
    best, number = taps[:, 0], torch.zeros_like(taps[:, 0], dtype=torch.int64)
    for tap in range(1, taps.shape[1]):
        better = taps[:, tap] > best
        best, number = torch.where(better, taps[:, tap], best), torch.where(better, tap, number)
    return number


def _number(index: Tensor) -> Tensor:
    return torch.arange(index.shape[1], device=index.device)
