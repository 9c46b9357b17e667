"""Which rows of a cache's segments a prefill pass writes and reads: made once on the host, shared by its layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A host array on the device, through pinned memory on the way to a GPU."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class _Rows(NamedTuple):
    """Rows of one segment, and their numbers in the tensor that is copied from or to (None: all its rows, in order)."""

    segment: int
    row: Tensor
    other: Tensor | None


class PassRows:
    """Rows `before` : `before + lengths` of each sequence are written, and, if some sequence has earlier rows, all
    `before + lengths` are read.

    blocks       each sequence's blocks, enough for its rows.
    first_block  of each segment.
    moved        a host array to the device.
    """

    def __init__(
        self,
        blocks: Sequence[list[int]],
        before: Sequence[int],
        lengths: Sequence[int],
        block_rows: int,
        first_block: Sequence[int],
        moved: Callable[[np.ndarray], Tensor],
    ) -> None:
        starts = np.array(first_block) * block_rows
        reads = [_places(b, 0, at + n, block_rows) for b, at, n in zip(blocks, before, lengths, strict=True)]
        writes = [places[at:] for places, at in zip(reads, before, strict=True)]
        self.total = sum(map(len, reads))
        self._writes = _by_segment(np.concatenate(writes), starts, moved)
        self._reads = _by_segment(np.concatenate(reads), starts, moved) if any(before) else None

    def store(self, layers: Sequence[Tensor], key_RKD: Tensor, value_RKD: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new rows to its segments [2, K, blocks, block rows, D]; returns the keys and values
        [T, K, D] of all the sequences' rows."""
        new = torch.stack([key_RKD, value_RKD]).transpose(1, 2)  # [2, K, R, D]
        for number, row, source in self._writes:
            layers[number].flatten(2, 3).index_copy_(2, row, new if source is None else new.index_select(2, source))
        if self._reads is None:
            return key_RKD, value_RKD
        found = None
        for number, row, place in self._reads:
            part = layers[number].flatten(2, 3).index_select(2, row)
            if place is None:
                found = part
            else:
                found = part.new_empty(*part.shape[:2], self.total, part.shape[3]) if found is None else found
                found.index_copy_(2, place, part)
        assert found is not None  # a pass has rows
        keys, values = found.transpose(1, 2)
        return keys, values


def _places(blocks: list[int], first: int, last: int, block_rows: int) -> np.ndarray:
    """Where rows [first, last) of a sequence are, counted over all segments."""
    row = np.arange(first, last)
    return np.asarray(blocks)[row // block_rows] * block_rows + row % block_rows


def _by_segment(places: np.ndarray, starts: np.ndarray, moved: Callable[[np.ndarray], Tensor]) -> list[_Rows]:
    segment = np.searchsorted(starts, places, "right") - 1
    found = []
    for number in np.unique(segment):
        mine = np.flatnonzero(segment == number)
        whole = len(mine) == len(places)
        row = moved(places[mine] - starts[number])
        found.append(_Rows(int(number), row, None if whole else moved(mine)))
    return found
