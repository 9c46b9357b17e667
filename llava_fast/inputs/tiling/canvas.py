"""SliME's rule: the image squashed to one tile, then 2 to 7 tiles of a padded canvas of about the image's area.

Source: yfzhang114/SliME 5c89ec9 llava/mm_utils.py (select_best_resolution_uhd, process_anyres_image) and llava_arch.py.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llava_fast.inputs.pictures.view import View
from llava_fast.inputs.tiling.anyres import best_canvas, fit_within
from llava_fast.inputs.tiling.base import Tiling
from llava_fast.inputs.tiling.rows import UNKNOWN_TOKEN, VisualRows, _rows

if TYPE_CHECKING:
    from llava_fast.inputs.tiling.anyres import VisualGeometry


@dataclass(frozen=True)
class CanvasTiling(Tiling):
    """The rows of the overview, a separator, then those of the canvas.

    grid       a tile of the canvas has grid x grid decoder rows.
    most       largest number of tiles that an image's area asks for; a canvas may have one more.
    spatial    the canvas's rows are ordered line by line over all tiles; else tile by tile.
    overview, tiled  False: without the overview, or without the canvas; there is then no separator.
    routed     a router may leave out rows of the canvas.
    separator  ids of the tokens after the overview.
    """

    grid: int
    most: int = 6
    spatial: bool = True
    overview: bool = True
    tiled: bool = True
    routed: bool = False
    separator: tuple[int, ...] = (UNKNOWN_TOKEN,)

    def views(self, geometry: VisualGeometry, height: int, width: int) -> tuple[View, ...]:
        tile, views = geometry.tile_size, []
        if self.overview:
            views.append(View(size=(tile, tile), offset=(0, 0), canvas=(tile, tile), filter=geometry.filter))
        if self.tiled:
            canvas = canvas_of(height, width, tile, self.most)
            size = fit_within(height, width, canvas)
            offset = ((canvas[0] - size[0]) // 2, (canvas[1] - size[1]) // 2)
            views.append(View(size=size, offset=offset, canvas=canvas, filter=geometry.filter))
        return tuple(views)

    def rows(self, geometry: VisualGeometry, height: int, width: int) -> VisualRows:
        canvas = canvas_of(height, width, geometry.tile_size, self.most) if self.tiled else (0, 0)
        down, across = (side // geometry.tile_size for side in canvas)
        first = geometry.side**2 if self.overview else 0
        each = np.arange(down * across * self.grid**2, dtype=np.int32).reshape(down, across, self.grid, self.grid)
        local = first + (each.transpose(0, 2, 1, 3) if self.spatial else each).ravel()
        parts: list[np.ndarray | tuple[int, ...]] = [np.arange(first, dtype=np.int32)] if self.overview else []
        parts += [self.separator] if self.overview and self.tiled else []
        optional = None
        if self.routed and self.tiled:
            optional = np.arange(sum(map(len, parts)) + len(local)) >= sum(map(len, parts))
            optional.flags.writeable = False
        tiles = self.overview + down * across
        shares = (first,) * self.overview + (self.grid**2,) * (down * across)
        return _rows([*parts, local], tiles, table_rows=sum(shares), shares=shares, optional=optional)


@functools.lru_cache(maxsize=4096)
def canvas_of(height: int, width: int, tile: int, most: int) -> tuple[int, int]:
    """The (height, width) in pixels of an image's canvas: of the grids with one tile fewer, as many and one more than
    its area asks for, the one that LLaVA's rule prefers (see `best_canvas`)."""
    wanted = max(2, min(math.ceil(width * height / (tile * tile)), most))
    numbers = range(wanted - (wanted > 2), wanted + 2)
    return best_canvas(
        height,
        width,
        tuple(
            (number // columns * tile, columns * tile)
            for number in numbers
            for columns in range(1, number + 1)
            if number % columns == 0
        ),
    )
