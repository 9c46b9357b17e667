"""Packing rows from three tables in plain PyTorch: the specification of `llava_fast.ops.token_pack`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

TEXT, VISUAL, CONSTANT = 0, 1, 2


def token_pack(source: Tensor, row: Tensor, embedding: Tensor, visual: Tensor, constant: Tensor) -> Tensor:
    out = torch.zeros(len(source), embedding.shape[1], dtype=embedding.dtype, device=embedding.device)
    for table, kind in ((None, TEXT), (visual, VISUAL), (constant, CONSTANT)):
        place = torch.nonzero(source == kind).squeeze(1)
        index = row[place].long()
        rows = F.embedding(index, embedding) if table is None else table[index].to(embedding.dtype)
        out = out.index_copy(0, place, rows)
    return out
