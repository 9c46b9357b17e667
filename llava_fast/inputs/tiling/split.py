"""Idefics3's rule: an image is resized so that tiles cover it exactly, and a tile of the whole image follows.

It is resized up to three times in a row: to the longest edge, to multiples of the tile, and from there to the tile of
the whole image. Source: transformers 5.24 image_processing_pil_idefics3.py, processing_idefics3.py.
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

LARGEST = 4096  # pixels along a side, in transformers for every checkpoint
_UNKNOWN = (UNKNOWN_TOKEN,)


@dataclass(frozen=True)
class SplitTiling(Tiling):
    """Tiles of an image whose longer side is resized to `longest` pixels; `split` False: the whole image alone.

    Ids of tokens: before_tile, of each row and column of the grid (empty: unknown); line, after a row of tiles;
    last_line, after the last row; before_whole and after_whole, around the rows of the whole image.
    """

    longest: int
    split: bool = True
    before_tile: tuple[tuple[tuple[int, ...], ...], ...] = ()
    line: tuple[int, ...] = _UNKNOWN
    last_line: tuple[int, ...] = _UNKNOWN
    before_whole: tuple[int, ...] = _UNKNOWN
    after_whole: tuple[int, ...] = _UNKNOWN

    def most_along_side(self, tile: int) -> int:
        """The most tiles along a side of any image."""
        longest = min(self.longest + self.longest % 2, LARGEST)  # the shorter side is rounded up to an even number
        return math.ceil(longest / tile)

    def views(self, geometry: VisualGeometry, height: int, width: int) -> tuple[View, ...]:
        tile = geometry.tile_size
        resized = resized_to(height, width, self.longest)
        canvas = whole_tiles(*resized, tile) if self.split else (tile, tile)
        sizes = [resized, canvas] if max(canvas) > tile else [resized]
        through = tuple(size for size, before in zip(sizes, [(height, width), *sizes], strict=False) if size != before)
        canvases = [canvas, (tile, tile)] if max(canvas) > tile else [canvas]
        return tuple(View(size, (0, 0), size, filter=geometry.filter, through=through) for size in canvases)

    def rows(self, geometry: VisualGeometry, height: int, width: int) -> VisualRows:
        canvas, *whole = (view.canvas for view in self.views(geometry, height, width))
        rows, columns = (side // geometry.tile_size for side in canvas) if whole else (0, 0)
        each = np.arange(geometry.rows_per_tile, dtype=np.int32)
        parts: list[np.ndarray | tuple[int, ...]] = []
        for row in range(rows):
            for column in range(columns):
                before = self.before_tile[row][column] if self.before_tile else _UNKNOWN
                parts += [before, each + (row * columns + column) * len(each)]
            parts.append(self.line if row + 1 < rows else self.last_line)
        tiles = rows * columns + 1
        return _rows([*parts, self.before_whole, each + (tiles - 1) * len(each), self.after_whole], tiles)


@functools.lru_cache(maxsize=4096)
def resized_to(height: int, width: int, longest: int) -> tuple[int, int]:
    """The (height, width) of an image whose longer side becomes `longest`, at most LARGEST. Uses the same
    floating-point operations as the source."""
    ratio = width / height
    if width >= height:
        width, height = longest, int(longest / ratio)
        height += height % 2
    else:
        width, height = int(longest * ratio), longest
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    ratio = width / height
    if width >= height and width > LARGEST:
        width, height = LARGEST, int(LARGEST / ratio)
    elif height > width and height > LARGEST:
        width, height = int(LARGEST * ratio), LARGEST
    return max(height, 1), max(width, 1)


def whole_tiles(height: int, width: int, tile: int) -> tuple[int, int]:
    """The (height, width) in whole tiles that such an image is resized to, nearly keeping its aspect ratio."""
    ratio = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = int(width / ratio)
        return math.ceil(height / tile) * tile, width
    height = math.ceil(height / tile) * tile
    width = int(height * ratio)
    return height, math.ceil(width / tile) * tile
