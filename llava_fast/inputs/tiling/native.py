"""SigLIP 2 NaFlex's rule: an image keeps its aspect ratio and is scaled to as many whole patches as a limit allows.

A tile is one patch, so the number of tiles differs between images. Source: transformers 5.24
models/siglip2/image_processing_siglip2.py.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llava_fast.errors import ImageError
from llava_fast.inputs.pictures.view import View
from llava_fast.inputs.tiling.base import Tiling
from llava_fast.inputs.tiling.rows import VisualRows, _rows

if TYPE_CHECKING:
    from llava_fast.inputs.tiling.anyres import VisualGeometry

_LEAST_SCALE, _MOST_SCALE, _PRECISION = 1e-6, 100.0, 1e-5


@dataclass(frozen=True)
class NativeTiling(Tiling):
    """At most `max_patches` patches per image. Raises ImageError for max_patches below 1."""

    max_patches: int = 256

    def __post_init__(self) -> None:
        if self.max_patches < 1:
            raise ImageError(f"an image of at most {self.max_patches} patches has no content: give 1 or more")

    def views(self, geometry: VisualGeometry, height: int, width: int) -> tuple[View, ...]:
        rows, columns = patch_grid(height, width, geometry.patch_size, self.max_patches)
        size = rows * geometry.patch_size, columns * geometry.patch_size
        return (View(size=size, offset=(0, 0), canvas=size, filter=geometry.filter),)

    def rows(self, geometry: VisualGeometry, height: int, width: int) -> VisualRows:
        grid = patch_grid(height, width, geometry.patch_size, self.max_patches)
        tiles = grid[0] * grid[1]
        return _rows([geometry.kept_rows(tiles)], tiles, grids=(grid,))


@functools.lru_cache(maxsize=4096)
def patch_grid(height: int, width: int, patch: int, most: int) -> tuple[int, int]:
    """The (rows, columns) of patches of an image: both sides are scaled by one factor and rounded up to whole patches.
    The factor is the largest found by bisection that gives at most `most` patches; small images are enlarged."""
    low, high = _LEAST_SCALE, _MOST_SCALE
    while high - low >= _PRECISION:
        middle = (low + high) / 2
        rows, columns = (_patches(side, middle, patch) for side in (height, width))
        low, high = (middle, high) if rows * columns <= most else (low, middle)
    return _patches(height, low, patch), _patches(width, low, patch)


def _patches(side: int, scale: float, patch: int) -> int:
    return max(1, math.ceil(side * scale / patch))
