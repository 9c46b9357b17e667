"""A view: how an image is resized and placed on the canvas that tiles are cut from."""

from __future__ import annotations

from dataclasses import dataclass

from llava_fast.inputs.pictures.preprocessing import Filter


@dataclass(frozen=True)
class View:
    """One resize of the source image, placed on a canvas that is cut row-major into square tiles.

    If `square`, the source first goes onto a `fill`-coloured square of its longer side, centred (rounded down).
    It is then resized to `size` (height, width) by `filter` and placed at `offset` (y, x; negative crops) on a
    `fill`-coloured `canvas` (height, width).
    """

    size: tuple[int, int]
    offset: tuple[int, int]
    canvas: tuple[int, int]
    square: bool = False
    fill: tuple[int, int, int] = (0, 0, 0)
    filter: Filter = "bicubic"
