"""Cached keys and values in 8 bits: int8 codes and their scale, a row of D elements in D + 4 bytes.

A scale is float32, the row's largest magnitude / 127, in the four bytes after the codes; element = code * scale.
csrc/decode reads and writes the same form, with the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_BYTES = 4
MULTIPLE = 8  # of which D must be one


def quantise_rows(rows: Tensor) -> Tensor:
    """[.., D] floating to int8 [.., D + 4]. A row with an element that is not finite gets scale NaN."""
    wide = rows.float()
    most = wide.abs().amax(-1, keepdim=True)
    inverse = 127 / most
    usable = inverse.isfinite()  # False for zeros, for what is too small to divide by, and for NaN
    codes = (wide * inverse).round().where(usable & most.isfinite(), 0).to(torch.int8)
    scale = (most / 127).where(usable, 0).where(wide.isfinite().all(-1, keepdim=True), torch.nan)
    return torch.cat([codes, scale.contiguous().view(torch.int8)], -1)


def dequantise_rows(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """int8 [.., D + 4] to [.., D] in a floating dtype."""
    scale = stored[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    return (stored[..., :-SCALE_BYTES] * scale).to(dtype)
