"""The visual table of a batch: kept rows of the tower, then rows pooled from others, and their numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from llava_fast.inputs.tiling.rows import FEATURE, POOLED, VisualRows

Stage = Literal["before", "after"]
Reduce = Literal["sum", "max"]


@dataclass(frozen=True)
class Pool:
    """Visual rows that are pooled from others: the reduction, the stage, and the names of the plan's columns. index and
    weight [rows, K] define the K rows that are combined; order and start are the inverse table for gradients, present
    only in a plan with labels (see ops.mix_rows)."""

    stage: Stage
    reduce: Reduce
    index: str
    weight: str
    order: str
    start: str


class VisualTable:
    """Collects the visual rows of a batch and numbers them: kept ViT rows first, then the pools by stage.

    Numbers are provisional until `finish` knows the number of rows of each part: a direct row has its ViT row number, a
    pooled row is negative: -(1 + pool * LIMIT + row of that pool).
    """

    LIMIT = 1 << 26

    def __init__(self, tower_rows_per_tile: int) -> None:
        self.tower_rows_per_tile = tower_rows_per_tile
        self.tiles = self.rows = 0
        self.images: list[int] = []
        self.videos: list[tuple[int, int]] = []
        self.grids: list[tuple[int, int]] = []
        self.direct: list[np.ndarray] = []
        self.pooled: dict[tuple[Stage, Reduce, int], list[tuple[np.ndarray, np.ndarray]]] = {}

    def add(self, rows: VisualRows, is_video: bool = False) -> np.ndarray:
        first = self.rows
        self.tiles += rows.tiles
        self.images.append(rows.tiles)
        self.rows += rows.table_rows or rows.tiles * self.tower_rows_per_tile
        self.grids += rows.grids
        if is_video:
            self.videos.append((self.tiles - rows.tiles, self.tiles))
        index = rows.index.astype(np.int64)
        is_pooled = rows.kind == POOLED
        provisional = index + first
        if rows.pooling is not None:
            pooled, weight = rows.pooling
            key = (rows.stage, rows.reduce, pooled.shape[1])
            tables = self.pooled.setdefault(key, [])
            done = sum(len(table) for table, _ in tables)
            tables.append((pooled + first, weight))
            number = list(self.pooled).index(key)
            provisional = np.where(is_pooled, -(1 + number * self.LIMIT + done + index), provisional)
        self.direct.append(provisional[rows.kind == FEATURE])
        return provisional

    def finish(self, with_inverse: bool):
        """(kept ViT rows, columns of the pools, pools in table order, provisional -> final numbers, number of rows)."""
        needed = [
            *self.direct,
            *(t.ravel() for k, ts in self.pooled.items() if k[0] == "after" for t, _ in ts),
        ]
        kept = np.unique(np.concatenate(needed)) if needed else np.zeros(0, np.int64)
        keys = sorted(self.pooled, key=lambda key: key[0] != "before")
        start, size = {}, len(kept)
        before = sum(len(t) for k, ts in self.pooled.items() if k[0] == "before" for t, _ in ts)
        pools: list[Pool] = []
        columns: dict[str, np.ndarray] = {}
        for key in keys:
            stage, reduce, _ = key
            index = np.concatenate([table for table, _ in self.pooled[key]])
            weight = np.concatenate([weight for _, weight in self.pooled[key]]).astype(np.float32)
            if stage == "after":
                index = np.searchsorted(kept, index)
            name = f"pool{len(pools)}"
            pool = Pool(stage, reduce, f"{name}_index", f"{name}_weight", f"{name}_order", f"{name}_start")
            sources = len(kept) + before if stage == "after" else self.rows
            columns |= {pool.index: index.astype(np.int32), pool.weight: weight.view(np.int32)}
            if with_inverse:
                order = np.argsort(index, axis=None, kind="stable").astype(np.int32)
                ends = np.cumsum(np.bincount(index.ravel(), minlength=sources))
                columns |= {pool.order: order, pool.start: np.append(0, ends).astype(np.int32)}
            pools.append(pool)
            start[list(self.pooled).index(key)] = size
            size += len(index)

        def number(provisional: np.ndarray) -> np.ndarray:
            pooled = -provisional.astype(np.int64) - 1
            final = np.searchsorted(kept, np.maximum(provisional, 0)).astype(np.int64)
            for which, first in start.items():
                inside = (provisional < 0) & (pooled // self.LIMIT == which)
                final[inside] = first + pooled[inside] % self.LIMIT
            return final.astype(np.int32)

        return kept.astype(np.int32), columns, tuple(pools), number, size
