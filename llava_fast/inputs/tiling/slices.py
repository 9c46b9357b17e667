"""LLaVA-UHD's rule: slices of equal size and any aspect ratio, then the whole image, each about one tile's area.

A tile is one patch. Source: thunlp/LLaVA-UHD dd7f6cc (branch v1) slice_process.py, which follows MiniCPM-V.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llava_fast.inputs.pictures.view import View
from llava_fast.inputs.tiling.base import Tiling
from llava_fast.inputs.tiling.rows import UNKNOWN_TOKEN, VisualRows, _rows

if TYPE_CHECKING:
    from llava_fast.inputs.tiling.anyres import VisualGeometry


@dataclass(frozen=True)
class SliceTiling(Tiling):
    """At most `most` slices, each with about `scale` x `scale` pixels and `queries` decoder rows. between, after: ids
    of the tokens after a slice within a line of slices, and after the last slice of a line."""

    scale: int
    queries: int
    most: int = 9
    between: tuple[int, ...] = (UNKNOWN_TOKEN,)
    after: tuple[int, ...] = (UNKNOWN_TOKEN,)

    def views(self, geometry: VisualGeometry, height: int, width: int) -> tuple[View, ...]:
        whole, grid, each = slices(height, width, self.scale, geometry.patch_size, self.most)
        size = grid[0] * each[0], grid[1] * each[1]
        views = [
            View(size=size, offset=(-row * each[0], -column * each[1]), canvas=each, filter=geometry.filter)
            for row in range(grid[0])
            for column in range(grid[1])
        ]
        return (*views, View(size=whole, offset=(0, 0), canvas=whole, filter=geometry.filter))

    def rows(self, geometry: VisualGeometry, height: int, width: int) -> VisualRows:
        whole, grid, each = slices(height, width, self.scale, geometry.patch_size, self.most)
        parts: list[np.ndarray | tuple[int, ...]] = []
        for place in range(grid[0] * grid[1] + 1):
            parts.append(np.arange(self.queries, dtype=np.int32) + place * self.queries)
            if place < grid[0] * grid[1]:
                parts.append(self.between if (place + 1) % grid[1] else self.after)
        shapes = [each] * (grid[0] * grid[1]) + [whole]
        grids = tuple((rows // geometry.patch_size, columns // geometry.patch_size) for rows, columns in shapes)
        tiles = sum(rows * columns for rows, columns in grids)
        return _rows(parts, tiles, grids=grids, table_rows=self.queries * len(grids))


@functools.lru_cache(maxsize=4096)
def slices(
    height: int, width: int, scale: int, patch: int, most: int
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """(size of the whole view, (rows, columns) of slices, size of a slice), sizes as (height, width) in pixels; the
    grid is (0, 0) for an image that is not sliced. Uses the same floating-point operations as the source."""
    wanted = min(math.ceil(width * height / (scale * scale)), most)
    if wanted <= 1:
        return _fitted(height, width, scale, patch, enlarge=True), (0, 0), (0, 0)
    numbers = [number for number in (wanted - 1, wanted, wanted + 1) if 1 < number <= most]
    grids = [
        (number // columns, columns) for number in numbers for columns in range(1, number + 1) if number % columns == 0
    ]
    ratio = math.log(width / height)
    grid = min(grids, key=lambda grid: abs(ratio - math.log(grid[1] / grid[0])))
    rows, columns = (
        max(side // count * count, count) / count for side, count in zip((height, width), grid, strict=True)
    )
    return _fitted(height, width, scale, patch), grid, _fitted(rows, columns, scale, patch, enlarge=True)


def _fitted(height: float, width: float, scale: int, patch: int, enlarge: bool = False) -> tuple[int, int]:
    """The target size of an image: both sides are whole patches, and the area is at most that of a square of side
    `scale` (about that area with `enlarge`)."""
    if width * height > scale * scale or enlarge:
        ratio = width / height
        height = int(scale / math.sqrt(ratio))
        width = int(height * ratio)
    return max(math.floor(height / patch) * patch, patch), max(math.floor(width / patch) * patch, patch)
