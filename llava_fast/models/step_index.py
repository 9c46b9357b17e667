"""Index tensors of a decoding step without ops.paged_attention."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class StepIndex:
    """Index tensors of one decoding step of several sequences, made once on the host and shared by its layers. They
    number a segment's blocks (or rows) from 0; `places` holds where in the result a segment's blocks go.

    blocks    each sequence's blocks, with room for one row more than the `before` that are cached.
    segments  the cache's, [layers, 2, K, blocks, block rows, D] each.
    """

    def __init__(self, blocks: Sequence[list[int]], before: tuple[int, ...], segments: Sequence[Tensor]) -> None:
        self.count, self.longest, rows = len(blocks), max(before) + 1, segments[0].shape[4]
        self.width = -(-self.longest // rows)
        filled = [(each + each[:1] * self.width)[: self.width] for each in blocks]  # padding is masked
        block = np.array(filled).reshape(-1)
        written = np.array([each[at // rows] for each, at in zip(blocks, before, strict=True)])
        self.before = np.array(before)
        self.device = segments[0].device
        self.segments: list[tuple[int, Tensor, Tensor | None, Tensor | None, Tensor | None]] = []
        start = 0
        for number, segment in enumerate(segments):
            end = start + segment.shape[3]
            mine = np.flatnonzero((block >= start) & (block < end))
            slot = np.flatnonzero((written >= start) & (written < end))
            row = (written[slot] - start) * rows + self.before[slot] % rows
            if len(mine):
                whole = len(mine) == len(block)
                writes = (slot, row) if len(slot) else (None, None)
                index = (block[mine] - start, None if whole else mine, *writes)
                there = [i for i in index if i is not None]
                flat = torch.tensor(np.concatenate(there).tolist(), device=self.device)  # one transfer for all
                moved = iter(flat.split([len(i) for i in there]))
                here, *others = (None if i is None else next(moved) for i in index)
                assert here is not None
                self.segments.append((number, here, others[0], others[1], others[2]))
            start = end
        self.mask = self._mask(None) if min(before) + 1 < self.longest else None

    def _mask(self, window: int | None) -> Tensor:
        column = np.arange(self.longest)[None, :]
        mask = column <= self.before[:, None]
        if window is not None:
            mask &= column > self.before[:, None] - window
        return torch.tensor(mask[:, None, None, :], device=self.device)

    def with_window(self, window: int) -> StepIndex:
        other = object.__new__(StepIndex)
        vars(other).update(vars(self))
        other.mask = self._mask(window)
        return other

    def run(self, segments: list[Tensor], layer: int, key: Tensor, value: Tensor):
        new = torch.stack([key, value]).transpose(1, 2)  # [2, K, n, D]
        out = None
        for number, block, place, slot, row in self.segments:
            of_layer = segments[number][layer]  # [2, K, blocks, block rows, D]
            if slot is not None and row is not None:
                of_layer.flatten(2, 3).index_copy_(2, row, new if place is None else new.index_select(2, slot))
            found = of_layer.index_select(2, block)
            if place is None:
                out = found
                break
            if out is None:
                out = found.new_empty(*found.shape[:2], self.count * self.width, *found.shape[3:])
            out.index_copy_(2, place, found)
        assert out is not None  # a segment holds at least one of the blocks
        # [2, K, n * width, block rows, D] -> [2, n, K, rows, D]
        keys, values = out.unflatten(2, (self.count, self.width)).flatten(3, 4).transpose(1, 2)[:, :, :, : self.longest]
        return keys, values, self.mask
