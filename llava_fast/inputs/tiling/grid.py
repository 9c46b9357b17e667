"""InternVL's tiling: the image is resized to the grid of tiles with the nearest aspect ratio, and a thumbnail follows.

Source: transformers 5.23 models/got_ocr2/image_processing_pil_got_ocr2.py, which InternVL uses.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llava_fast.errors import ImageError
from llava_fast.inputs.pictures.view import View
from llava_fast.inputs.tiling.base import Tiling
from llava_fast.inputs.tiling.rows import VisualRows, _rows

if TYPE_CHECKING:
    from llava_fast.inputs.tiling.anyres import VisualGeometry


@dataclass(frozen=True)
class GridTiling(Tiling):
    """Grids of `least` to `most` tiles. thumbnail: add a tile of the whole image if there are several tiles. before,
    after: ids of the tokens around an image's rows. Raises ImageError if no grid has between `least` and `most`
    tiles."""

    least: int = 1
    most: int = 12
    thumbnail: bool = True
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most <= 1024:
            raise ImageError(
                f"an image becomes {self.least} to {self.most} tiles: give min_patches <= max_patches <= 1024"
            )

    def views(self, geometry: VisualGeometry, height: int, width: int) -> tuple[View, ...]:
        tile = geometry.tile_size
        rows, columns = nearest_grid(height, width, tile, self.least, self.most)
        canvases = [(rows * tile, columns * tile)]
        if self.thumbnail and rows * columns > 1:
            canvases.append((tile, tile))
        return tuple(View(size=canvas, offset=(0, 0), canvas=canvas, filter=geometry.filter) for canvas in canvases)

    def rows(self, geometry: VisualGeometry, height: int, width: int) -> VisualRows:
        tiles = sum(h * w for h, w in (view.canvas for view in self.views(geometry, height, width)))
        tiles //= geometry.tile_size**2
        return _rows([self.before, geometry.kept_rows(tiles), self.after], tiles)


def nearest_grid(height: int, width: int, tile: int, least: int, most: int) -> tuple[int, int]:
    """The (rows, columns) of tiles whose aspect ratio is nearest to the image's. At a tie, the grid with more tiles is
    chosen if the image has more than half of their pixels.
    """
    best, best_difference = (1, 1), float("inf")
    for rows, columns in _grids(least, most):
        difference = abs(width / height - columns / rows)
        larger = difference == best_difference and height * width > 0.5 * tile * tile * columns * rows
        if difference < best_difference or larger:
            best, best_difference = (rows, columns), difference
    return best


@functools.lru_cache(maxsize=64)
def _grids(least: int, most: int) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of all grids, sorted by number of tiles, then by columns."""
    every = ((rows, columns) for columns in range(1, most + 1) for rows in range(1, most // columns + 1))
    return tuple(sorted((grid for grid in every if grid[0] * grid[1] >= least), key=lambda grid: grid[0] * grid[1]))
