"""The visual table of a batch: kept rows of the tower, then rows mixed from others, and their numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from llava_fast.inputs.tiling.rows import MIXED, NEWLINE, VisualRows

Stage = Literal["before", "after"]
Reduce = Literal["sum", "max"]


@dataclass(frozen=True)
class Mix:
    """Visual rows made by mixing others: how they reduce, at which stage, and the names of the columns of their tap
    table (index, weight) and of the same table sorted by the row a tap takes (use, start: see ops.mix_rows.TapUses;
    only a plan with labels has those two)."""

    stage: Stage
    reduce: Reduce
    index: str
    weight: str
    use: str
    start: str


class VisualTable:
    """Collects the visual rows of a batch and numbers them: kept ViT rows first, then the mixes by stage.

    Until `finish` knows how many rows each part holds, a direct row is its ViT row number and a mixed row is
    negative: -(1 + mix * LIMIT + row of that mix).
    """

    LIMIT = 1 << 26

    def __init__(self, tower_rows_per_tile: int) -> None:
        self.tower_rows_per_tile = tower_rows_per_tile
        self.tiles = 0
        self.direct: list[np.ndarray] = []
        self.mixed: dict[tuple[Stage, Reduce, int], list[tuple[np.ndarray, np.ndarray]]] = {}

    def add(self, rows: VisualRows) -> np.ndarray:
        first = self.tiles * self.tower_rows_per_tile
        self.tiles += rows.tiles
        index = rows.index.astype(np.int64)
        is_mixed = rows.kind == MIXED
        provisional = index + first
        if rows.taps is not None:
            taps, weight = rows.taps
            key = (rows.stage, rows.reduce, taps.shape[1])
            tables = self.mixed.setdefault(key, [])
            done = sum(len(table) for table, _ in tables)
            tables.append((taps + first, weight))
            number = list(self.mixed).index(key)
            provisional = np.where(is_mixed, -(1 + number * self.LIMIT + done + index), provisional)
        self.direct.append(provisional[(rows.kind != NEWLINE) & ~is_mixed])
        return provisional

    def finish(self, with_uses: bool):
        """(kept ViT rows, columns of the mixes, mixes in table order, provisional -> final numbers, rows in all)."""
        needed = [
            *self.direct,
            *(t.ravel() for k, ts in self.mixed.items() if k[0] == "after" for t, _ in ts),
        ]
        kept = np.unique(np.concatenate(needed)) if needed else np.zeros(0, np.int64)
        order = sorted(self.mixed, key=lambda key: key[0] != "before")
        start, size = {}, len(kept)
        before = sum(len(t) for k, ts in self.mixed.items() if k[0] == "before" for t, _ in ts)
        mixes: list[Mix] = []
        columns: dict[str, np.ndarray] = {}
        for key in order:
            stage, reduce, _ = key
            index = np.concatenate([table for table, _ in self.mixed[key]])
            weight = np.concatenate([weight for _, weight in self.mixed[key]]).astype(np.float32)
            if stage == "after":
                index = np.searchsorted(kept, index)
            name = f"mix{len(mixes)}"
            mix = Mix(stage, reduce, f"{name}_index", f"{name}_weight", f"{name}_use", f"{name}_start")
            sources = len(kept) + before if stage == "after" else self.tiles * self.tower_rows_per_tile
            columns |= {mix.index: index.astype(np.int32), mix.weight: weight.view(np.int32)}
            if with_uses:
                use = np.argsort(index, axis=None, kind="stable").astype(np.int32)
                ends = np.cumsum(np.bincount(index.ravel(), minlength=sources))
                columns |= {mix.use: use, mix.start: np.append(0, ends).astype(np.int32)}
            mixes.append(mix)
            start[list(self.mixed).index(key)] = size
            size += len(index)

        def number(provisional: np.ndarray) -> np.ndarray:
            mixed = -provisional.astype(np.int64) - 1
            final = np.searchsorted(kept, np.maximum(provisional, 0)).astype(np.int64)
            for which, first in start.items():
                inside = (provisional < 0) & (mixed // self.LIMIT == which)
                final[inside] = first + mixed[inside] % self.LIMIT
            return final.astype(np.int32)

        return kept.astype(np.int32), columns, tuple(mixes), number, size
