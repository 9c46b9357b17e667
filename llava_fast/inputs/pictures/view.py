"""A view: how an image is resized and placed on the canvas from which tiles are cut."""

from __future__ import annotations

from dataclasses import dataclass

from llava_fast.inputs.pictures.preprocessing import Filter


@dataclass(frozen=True)
class View:
    """One resize of the source image, placed on a canvas that is cut row-major into square tiles.

    If `square`, the source is first centred (rounding down) on a square of its longer side with colour `fill`. It is
    then resized to `size` (height, width) with `filter` and placed at `offset` (y, x; negative crops) on a `canvas`
    (height, width) with colour `fill`.

    through  sizes that the source is first resized to, one after the other, with the same filter. All views of an image
             have the same.
    """

    size: tuple[int, int]
    offset: tuple[int, int]
    canvas: tuple[int, int]
    square: bool = False
    fill: tuple[int, int, int] = (0, 0, 0)
    filter: Filter = "bicubic"
    through: tuple[tuple[int, int], ...] = ()
