"""A preallocated key/value cache: one slot a sequence, rows written in place, nothing copied as it grows."""

from __future__ import annotations

import torch
from torch import Tensor

from llava_fast.errors import RequestError


class KVCache:
    """Keys and values of every layer: [slots, key heads, capacity, head size] each.

    `lengths[slot]` rows of a slot are valid. A forward pass writes behind them, layer by layer; `advance` then
    counts them in. Raises RequestError when a slot would overflow.
    """

    def __init__(
        self,
        layers: int,
        slots: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (slots, kv_heads, capacity, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.capacity = capacity
        self.lengths = [0] * slots
        self._step: tuple[tuple, tuple[Tensor, Tensor, Tensor | None]] | None = None

    def append(self, layer: int, slot: int, before: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store [K, rows, D] behind the first `before` rows of a slot; returns all its rows, [K, before+rows, D]."""
        after = before + key.shape[1]
        self.require(after)
        keys, values = self.keys[layer][slot], self.values[layer][slot]
        keys[:, before:after] = key
        values[:, before:after] = value
        return keys[:, :after], values[:, :after]

    def append_one_each(
        self, layer: int, before: tuple[int, ...], key: Tensor, value: Tensor, window: int | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store one row, [n, K, D], in each of the first n slots; returns their keys and values [n, K, rows, D] and
        a mask [n, 1, 1, rows] of the valid ones, or None where all are."""
        keys, values = self.keys[layer], self.values[layer]
        count, longest = len(before), max(before) + 1
        self.require(longest)
        if count == 1:
            keys[0, :, longest - 1] = key[0]
            values[0, :, longest - 1] = value[0]
            start = max(0, longest - window) if window else 0
            return keys[:1, :, start:longest], values[:1, :, start:longest], None
        slot, at, mask = self._step_tensors(before, longest, window)
        keys[slot, :, at] = key
        values[slot, :, at] = value
        return keys[:count, :, :longest], values[:count, :, :longest], mask

    def advance(self, slots: tuple[int, ...], rows: tuple[int, ...]) -> None:
        """Count the rows that a finished forward pass wrote."""
        for slot, count in zip(slots, rows, strict=True):
            self.lengths[slot] += count

    def move(self, source: int, target: int) -> None:
        """Give slot `target` the rows of slot `source`."""
        if source == target:
            return
        stale, rows = self.lengths[target], self.lengths[source]
        self.lengths[target] = rows
        for table in (*self.keys, *self.values):
            table[target, :, :rows] = table[source, :, :rows]
            # A mask hides what lies behind, but not a NaN in it, and one answer must not spoil another.
            table[target, :, rows:stale] = 0

    def copy_rows(self, other: KVCache, rows: int) -> None:
        """Take the first `rows` rows of slot 0 of a smaller cache."""
        for mine, theirs in zip((*self.keys, *self.values), (*other.keys, *other.values), strict=True):
            mine[0, :, :rows] = theirs[0, :, :rows]
        self.lengths[0] = rows

    def _step_tensors(self, before: tuple[int, ...], longest: int, window: int | None):
        """Index tensors and mask of one decoding step, made once and shared by its layers."""
        if self._step is None or self._step[0] != (before, window):
            device = self.keys[0].device
            at = torch.tensor(before, device=device)
            slot = torch.arange(len(before), device=device)
            mask = None
            if min(before) + 1 < longest or window is not None:
                column = torch.arange(longest, device=device)[None, :]
                mask = column <= at[:, None]
                if window is not None:
                    mask &= column > at[:, None] - window
                mask = mask[:, None, None, :]
            self._step = ((before, window), (slot, at, mask))
        return self._step[1]

    def require(self, needed: int) -> None:
        """Raise RequestError unless a slot has room for `needed` rows."""
        if needed > self.capacity:
            raise RequestError(
                f"the KV cache holds {self.capacity} rows a sequence and {needed} are needed: shorten the prompt, "
                "use fewer or smaller images, or lower max_new_tokens"
            )
