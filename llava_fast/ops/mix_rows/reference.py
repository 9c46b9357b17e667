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
