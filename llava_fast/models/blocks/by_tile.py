"""Steps over many large tiles, one tile after the other where that costs no time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LEAST = 1 << 20
"""Values of a tile from which on its products keep a CPU's cores busy."""


def by_tile(function: Callable[[Tensor], Tensor], x_TNC: Tensor) -> Tensor:
    """function(x), which works on each tile alone. Of large tiles on a CPU, without gradients, it runs for one tile
    after the other: the products take as long as all at once, and their results a fraction of the memory."""
    if torch.is_grad_enabled() or not x_TNC.is_cpu or len(x_TNC) < 2 or x_TNC[0].numel() < LEAST:
        return function(x_TNC)
    return torch.cat([function(tile) for tile in x_TNC.split(1)])
