"""Packing rows from three tables in plain PyTorch: the specification of `llava_fast.ops.token_pack`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TEXT, VISUAL, CONSTANT = 0, 1, 2


def token_pack(source: Tensor, row: Tensor, embedding: Tensor, visual: Tensor, constant: Tensor) -> Tensor:
    out = torch.zeros(len(source), embedding.shape[1], dtype=embedding.dtype, device=embedding.device)
    for kind, table in ((TEXT, embedding), (VISUAL, visual), (CONSTANT, constant)):
        if len(table):
            is_kind = source == kind
            out = torch.where(is_kind[:, None], table[torch.where(is_kind, row, 0).long()].to(out.dtype), out)
    return out


def token_pack_backward(
    grad: Tensor, source: Tensor, row: Tensor, sizes: Sequence[int], needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of embedding, visual and constant, which have `sizes` rows; float32 sums. None where not needed."""
    return tuple(
        _table_gradient(grad, source == kind, row, size) if wanted else None
        for kind, size, wanted in zip((TEXT, VISUAL, CONSTANT), sizes, needed, strict=True)
    )


def _table_gradient(grad: Tensor, is_kind: Tensor, row: Tensor, size: int) -> Tensor:
    """[size, width]: for each row of one table, the sum of `grad` over the output rows that read it."""
    if not size or not len(grad):
        return grad.new_zeros(size, grad.shape[1])
    wide = torch.promote_types(grad.dtype, torch.float32) if grad.device.type == "cpu" else grad.dtype
    taken = grad.to(wide).masked_fill(~is_kind[:, None], 0)  # the others add nothing to row 0
    index = torch.where(is_kind, row, 0).long()
    return torch.ops.aten.embedding_dense_backward(taken, index, size, -1, False).to(grad.dtype)
