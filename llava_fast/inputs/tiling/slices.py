"""LLaVA-UHD's rules: slices of equal size and any aspect ratio, then the whole image, each about one tile's area.

A tile is one patch. Sources: thunlp/LLaVA-UHD dd7f6cc (branch v1) slice_process.py, which follows MiniCPM-V; 7a3a1b6
(first release) slice_logic.py.
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

    def cut(self, height: int, width: int, patch: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """See `slices`."""
        return slices(height, width, self.scale, patch, self.most)

    def views(self, geometry: VisualGeometry, height: int, width: int) -> tuple[View, ...]:
        whole, grid, each = self.cut(height, width, geometry.patch_size)
        size = grid[0] * each[0], grid[1] * each[1]
        views = [
            View(size=size, offset=(-row * each[0], -column * each[1]), canvas=each, filter=geometry.filter)
            for row in range(grid[0])
            for column in range(grid[1])
        ]
        return (*views, View(size=whole, offset=(0, 0), canvas=whole, filter=geometry.filter))

    def rows(self, geometry: VisualGeometry, height: int, width: int) -> VisualRows:
        whole, grid, each = self.cut(height, width, geometry.patch_size)
        parts: list[np.ndarray | tuple[int, ...]] = []
        for place in range(grid[0] * grid[1] + 1):
            parts.append(np.arange(self.queries, dtype=np.int32) + place * self.queries)
            if place < grid[0] * grid[1]:
                parts.append(self.between if (place + 1) % grid[1] else self.after)
        shapes = [each] * (grid[0] * grid[1]) + [whole]
        grids = tuple((rows // geometry.patch_size, columns // geometry.patch_size) for rows, columns in shapes)
        tiles = sum(rows * columns for rows, columns in grids)
        return _rows(parts, tiles, grids=grids, table_rows=self.queries * len(grids))


@dataclass(frozen=True)
class FirstSliceTiling(SliceTiling):
    """The first release's rule. Slices and the whole image are enlarged or reduced to as many patches as fit. (Its code
    cuts slices before it resizes them; here the image is resized, then cut, as in branch v1.)"""

    most: int = 6

    def cut(self, height: int, width: int, patch: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        return first_slices(height, width, self.scale, patch, self.most)


@functools.lru_cache(maxsize=4096)
def first_slices(
    height: int, width: int, scale: int, patch: int, most: int
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """As `slices`, by the first release's rule, in its floating-point operations; the grid of an image in one slice is
    (0, 0), because its only view is the whole. `most` limits what the area asks for; there may be one slice more."""
    wanted = min(math.ceil(width * height / (scale * scale)), most)
    ratio = math.log(width / height)
    grids = [
        (number // columns, columns)
        for number in range(wanted - (wanted > 2), wanted + 2)
        for columns in range(1, number + 1)
        if number % columns == 0
    ]
    rows, columns = min(grids, key=lambda grid: abs(math.log(grid[1] / grid[0]) - ratio))
    whole = adapted(height, width, scale, patch)
    if rows * columns == 1:
        return whole, (0, 0), (0, 0)
    return whole, (rows, columns), adapted(max(height // rows, 1), max(width // columns, 1), scale, patch)


def adapted(height: int, width: int, scale: int, patch: int) -> tuple[int, int]:
    """The largest (height, width) of whole patches with this aspect ratio and no more patches than a square of side
    `scale` has."""
    most = (scale // patch) ** 2
    share = math.sqrt(most * (patch / height) * (patch / width))
    rows, columns = (max(min(math.floor(share * side / patch), most), 1) for side in (height, width))
    return rows * patch, columns * patch


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
