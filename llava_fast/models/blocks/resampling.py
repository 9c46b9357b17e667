"""Position tables resized to another grid, as linear maps whose gradients are summed in a fixed order.

Shapes: G side of a square table, C channels.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

Grid = tuple[int, int]


def bicubic(table_GGC: Tensor, grid: Grid) -> Tensor:
    """[rows * columns, C]: a square table resized to a grid like torch's interpolate with mode="bicubic",
    align_corners=False, in float32 or wider. Uses two small products, so that gradients are summed in a fixed order."""
    wide = torch.promote_types(table_GGC.dtype, torch.float32)
    down, across = (_cubic_weights(len(table_GGC), size, table_GGC.device, wide) for size in grid)
    return torch.einsum("hs,wt,stc->hwc", down, across, table_GGC.to(wide)).flatten(0, 1).to(table_GGC.dtype)


@functools.lru_cache(maxsize=4096)
def _cubic_weights(side: int, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[size, side]: interpolation weights from `side` learned positions along an axis to `size`, copied to a device
    once (Keys' kernel with a = -0.75, clamped at the ends).
    """
    centre = (np.arange(size) + 0.5) * (side / size) - 0.5
    base = np.floor(centre).astype(np.int64)
    weights = np.zeros((size, side))
    for tap in range(-1, 3):
        away = np.abs(centre - base - tap)
        near = (1.25 * away - 2.25) * away**2 + 1
        far = ((-0.75 * away + 3.75) * away - 6) * away + 3
        np.add.at(weights, (np.arange(size), np.clip(base + tap, 0, side - 1)), np.where(away <= 1, near, far))
    with torch.inference_mode(False):  # so that training can save them for backward
        return torch.tensor(weights, dtype=dtype, device=device)
