"""Which part of a picture each decoder row reads: for showing what a model sees.

Everything follows from an image's views and rows, the two that make the tiles and the TokenPlan, so that a drawing
cannot disagree with what the model gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llava_fast.inputs.pictures.view import View
from llava_fast.inputs.tiling.anyres import VisualGeometry, image_rows, image_views, tower_rows_of_tile
from llava_fast.inputs.tiling.rows import FEATURE, POOLED, VisualRows
from llava_fast.inputs.tiling.video import frame_views, video_rows

Rectangle = tuple[float, float, float, float]
"""(left, top, width, height) in the picture's pixels."""


@dataclass(frozen=True, eq=False)
class Region:
    """One tile; for a tower of native sizes, the whole image or one slice.

    box     where it lies. It reaches beyond the picture where its view is padded.
    tokens  decoder rows that it gives. A row pooled from several tiles counts for the one with the largest weight.
    points  float64 [points, 2]: (x, y) of the middle of what each of these rows reads, in their order. A class row has
            none, nor has a row that a connector makes of the whole region.
    kept    the rectangle around its patches that any row reads; None if these have no place.
    """

    box: Rectangle
    tokens: int
    points: np.ndarray
    kept: Rectangle | None


@dataclass(frozen=True, eq=False)
class Coverage:
    """The decoder rows of an image or a video, and for each view the regions in the order of their tiles. A video has a
    view for each frame."""

    rows: VisualRows
    views: tuple[View, ...]
    regions: tuple[tuple[Region, ...], ...]


def image_coverage(geometry: VisualGeometry, height: int, width: int, alone: bool = True) -> Coverage:
    """Of one image. Arguments and errors as for `image_rows`."""
    rows, views = image_rows(geometry, height, width, alone), image_views(geometry, height, width, alone)
    return _coverage(geometry, rows, views, height, width)


def video_coverage(geometry: VisualGeometry, frames: int, height: int, width: int) -> Coverage:
    """Of a video of so many frames of this size. Raises ImageError as `video_rows` does."""
    views = frame_views(geometry, height, width) * frames
    return _coverage(geometry, video_rows(geometry, frames), views, height, width)


def _coverage(geometry: VisualGeometry, rows: VisualRows, views: tuple[View, ...], height: int, width: int) -> Coverage:
    places = [(number, *place) for number, view in enumerate(views) for place in _places(geometry, rows, view)]
    boxes = [_in_picture(views[view], height, width, place) for view, place, _ in places]
    if total := rows.table_rows or len(places) * (geometry.tile_rows or 0):
        region_of = np.repeat(np.arange(len(places)), rows.shares or total // len(places))  # the connector's rows
        cells = np.full((total, 4), np.nan)
    else:
        cells, region_of = _cells(geometry, rows, views, height, width, places)
    reads, weights = _reads(rows)
    region = region_of[np.take_along_axis(reads, weights.argmax(1)[:, None], 1)[:, 0]]
    middles = cells[:, :2] + cells[:, 2:] / 2
    points = (middles[reads] * weights[..., None]).sum(1) / weights.sum(1)[:, None]

    read = np.unique(reads[weights > 0])
    regions: list[list[Region]] = [[] for _ in views]
    for number, (view, _, _) in enumerate(places):
        own = region == number
        inside = cells[read[region_of[read] == number]]
        kept = _around(inside[~np.isnan(inside[:, 0])])
        own_points = points[own]
        own_points = own_points[~np.isnan(own_points[:, 0])]
        regions[view].append(Region(tuple(boxes[number].tolist()), int(own.sum()), own_points, kept))
    return Coverage(rows, views, tuple(map(tuple, regions)))


def _places(geometry: VisualGeometry, rows: VisualRows, view: View) -> list[tuple[np.ndarray, int]]:
    """(left, top, width, height on the view's canvas, tower rows) of each region of a view."""
    height, width = view.canvas
    tile, given = geometry.tile_size, geometry.tower_rows_per_tile
    if rows.grids:
        return [(np.array([0, 0, width, height]), height // tile * (width // tile) * given)]
    starts = [(left, top) for top in range(0, height, tile) for left in range(0, width, tile)]
    return [(np.array([*start, tile, tile]), given) for start in starts]


def _cells(
    geometry: VisualGeometry,
    rows: VisualRows,
    views: Sequence[View],
    height: int,
    width: int,
    places: list[tuple[int, np.ndarray, int]],
) -> tuple[np.ndarray, np.ndarray]:
    """The patch of each of the tower's rows, float64 [rows, 4] in the picture's pixels (NaN for a class row), and the
    number of its region, int64 [rows]."""
    patch = geometry.patch_size
    cells = np.full((sum(given for _, _, given in places), 4), np.nan)
    first = 0
    for view, place, given in places:
        left, top, across, down = place
        y, x = np.mgrid[: down // patch, : across // patch].reshape(2, -1) * patch
        own = np.arange(len(x)) if rows.grids else tower_rows_of_tile(geometry)
        on_canvas = np.stack([left + x, top + y, np.full_like(x, patch), np.full_like(y, patch)], axis=1)
        cells[first + own] = _in_picture(views[view], height, width, on_canvas)
        first += given
    return cells, np.repeat(np.arange(len(places)), [given for _, _, given in places])


def _reads(rows: VisualRows) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the tower that each visual row reads, and their weights: [visual rows, K] each, in order."""
    pooled, own = rows.kind == POOLED, rows.kind == FEATURE
    table, weight = rows.pooling or (np.zeros((0, 1), np.int32), np.zeros((0, 1), np.float32))
    reads = np.zeros((len(rows), table.shape[1]), np.int64)
    weights = np.zeros(reads.shape)
    reads[own, 0], weights[own, 0] = rows.index[own], 1.0
    reads[pooled] = table[rows.index[pooled]]
    weights[pooled] = 1.0 if rows.reduce == "max" else weight[rows.index[pooled]]
    return reads[pooled | own], weights[pooled | own]


def _in_picture(view: View, height: int, width: int, rectangles: np.ndarray) -> np.ndarray:
    """Rectangles on a view's canvas, [..., 4] each (left, top, width, height), as rectangles of the picture."""
    down, across = (max(height, width),) * 2 if view.square else (height, width)
    above, before = ((down - height) // 2, (across - width) // 2) if view.square else (0, 0)
    scale = np.array([across / view.size[1], down / view.size[0]] * 2)
    start = np.array([view.offset[1], view.offset[0], 0, 0])
    return (rectangles - start) * scale - np.array([before, above, 0, 0])


def _around(rectangles: np.ndarray) -> Rectangle | None:
    if not len(rectangles):
        return None
    start, end = rectangles[:, :2].min(0), (rectangles[:, :2] + rectangles[:, 2:]).max(0)
    return (*start.tolist(), *(end - start).tolist())
