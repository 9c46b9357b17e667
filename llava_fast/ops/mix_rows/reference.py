"""Pooling rows by a table in plain PyTorch: the specification of `llava_fast.ops.mix_rows`."""

from __future__ import annotations

import torch
from torch import Tensor


def mix_rows(rows: Tensor, index: Tensor, weight: Tensor, reduce: str) -> Tensor:
    picked = rows[index.long()]  # [pooled, K, width]
    if reduce == "max":
        return picked.amax(dim=1)
    wide = torch.promote_types(rows.dtype, torch.float32)
    return (picked.to(wide) * weight.to(wide)[:, :, None]).sum(dim=1).to(rows.dtype)


def mix_rows_backward(
    grad: Tensor, rows: Tensor, index: Tensor, weight: Tensor, reduce: str, source_rows: int
) -> Tensor:
    """Gradient of the rows [source_rows, width]; a maximum's goes to the first of equal rows, as in max pooling."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    if reduce == "max":
        shares = (first_maximum(rows[index.long()])[:, None] == _number(index)[None, :, None]).to(wide)
    else:
        shares = weight.to(wide)[:, :, None]
    parts = (grad.to(wide)[:, None] * shares).flatten(0, 1)  # [pooled * K, width]
    out = torch.zeros(source_rows, grad.shape[1], dtype=wide, device=grad.device)
    return out.index_put((index.flatten().long(),), parts, accumulate=True).to(grad.dtype)


def first_maximum(picked: Tensor) -> Tensor:
    """int64 [pooled, width]: index along K of the first maximum of [pooled, K, width]."""
    best, number = picked[:, 0], torch.zeros_like(picked[:, 0], dtype=torch.int64)
    for k in range(1, picked.shape[1]):
        better = picked[:, k] > best
        best, number = torch.where(better, picked[:, k], best), torch.where(better, k, number)
    return number


def _number(index: Tensor) -> Tensor:
    return torch.arange(index.shape[1], device=index.device)
