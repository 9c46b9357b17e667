"""Block tables of the paged KV cache: the runs of blocks that hold a sequence's cached rows.

A segment is [layers, 2, K, blocks, block rows, D]: keys (0) and values (1) of every layer. Blocks are numbered
consecutively over all segments. A table lists a sequence's runs of consecutive blocks as a flat list: first block,
number of blocks, first block, number of blocks, ... No run crosses a segment boundary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def run_views(segments: Sequence[Tensor], table: Sequence[int]) -> list[Tensor]:
    """Views of the rows of each run, [layers, 2, K, rows, D]. Raises ValueError if a run is not in one segment."""
    views = []
    for first, count in zip(table[::2], table[1::2], strict=True):
        start = 0
        for segment in segments:
            blocks = segment.shape[3]
            if start <= first and first + count <= start + blocks and count > 0:
                views.append(segment[:, :, :, first - start : first - start + count].flatten(3, 4))
                break
            start += blocks
        else:
            raise ValueError(f"blocks {first} to {first + count - 1} do not lie in one segment of the cache")
    return views


def block_addresses(segments: Sequence[Tensor], blocks: int | None = None) -> Tensor:
    """The `addresses` argument of paged_attention for these segments: int64 [blocks, 2] on their device, zero-padded to
    `blocks` rows."""
    found = []
    for segment in segments:
        _, _, _, count, rows, size = segment.shape
        step = rows * size * segment.element_size()
        found += [(segment.data_ptr() + number * step, count) for number in range(count)]
    found += [(0, 0)] * ((blocks or 0) - len(found))
    return torch.tensor(found, dtype=torch.int64, device=segments[0].device).reshape(-1, 2)
