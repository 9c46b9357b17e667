"""Plans for batches in which a processor has already expanded each image token to one per visual row: computes the
plan's index columns from integers.

Shapes: B sequences of S tokens; rows are numbered b * S + s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llava_fast.errors import ImageError
from llava_fast.inputs.plan.columns import CONSTANT, IGNORE, TEXT, VISUAL
from llava_fast.inputs.plan.inverse import inverse_columns
from llava_fast.inputs.plan.visual_table import Pool, VisualTable
from llava_fast.inputs.tiling.anyres import VisualGeometry, image_rows
from llava_fast.inputs.tiling.rows import NEWLINE, VisualRows


class Integers(NamedTuple):
    """A batch's integers on the host: ids and labels int64 [B, S]; sizes int64 [images, 2] as (height, width); counts
    int64 [prompts], the number of images of each prompt. None for inputs that are not given.
    """

    ids: np.ndarray | None
    sizes: np.ndarray | None
    labels: np.ndarray | None = None
    counts: np.ndarray | None = None


def rows_of_images(
    geometry: VisualGeometry, sizes: np.ndarray | None, count: int, counts: np.ndarray | None = None
) -> list[VisualRows]:
    """The rows of each of `count` images. `sizes` [count, 2] is needed only for AnyRes, `counts` only if several images
    of one prompt are not tiled. Raises ImageError for inconsistent numbers and for an unsupported size."""
    if sizes is not None and len(sizes) != count:
        raise ImageError(f"{count} images, but {len(sizes)} image sizes")
    alone = [True] * count if counts is None else np.repeat(counts == 1, counts).tolist()
    if len(alone) != count:
        raise ImageError(f"{count} images, but batch_num_images sums to {len(alone)}")
    edge = geometry.tile_size
    each = [(edge, edge)] * count if sizes is None else [(int(height), int(width)) for height, width in sizes]
    return [image_rows(geometry, *size, single) for size, single in zip(each, alone, strict=True)]


def placement_columns(
    images: Sequence[VisualRows],
    ids: np.ndarray | None,
    image_token: int,
    tower_rows_per_tile: int,
    videos: Sequence[VisualRows] = (),
    video_token: int | None = None,
    with_inverse_pooling: bool = False,
) -> tuple[dict[str, np.ndarray], tuple[Pool, ...]]:
    """The int32 columns of a plan, by name, and its pools.

    source, row [B * S]; kept [kept]: the tower's rows to project, counting class rows; place, video_place: the decoder
    rows of images and videos; the inverse placement and the pools' tables, as in TokenPlan. Image rows are placed at
    the image tokens of `ids` in row-major order, video rows at the video tokens; with ids None they are concatenated.
    Text rows are read from the embedding table by token id. Tiles of images come before frames of videos.

    with_inverse_pooling  include the pools' inverse tables, for gradients.
    Raises ImageError if the numbers of image tokens and image rows, or of video tokens and video rows, differ.
    """
    table = VisualTable(tower_rows_per_tile)
    added = [(rows.kind == NEWLINE, table.add(rows)) for rows in (*images, *videos)]
    kept, pool_columns, pools, final, visual_rows = table.finish(with_inverse_pooling)
    none = np.zeros(0, np.int64)
    newline = np.concatenate([none, *(part for part, _ in added)]).astype(bool)
    number = final(np.concatenate([none, *(part for _, part in added)]))
    of_images = sum(len(rows) for rows in images)
    if ids is None:
        flat = np.full(len(newline), image_token)
        place, video_place = np.split(np.arange(len(newline)), [of_images])
    else:
        flat = ids.reshape(-1)
        place, video_place = (_places(flat, token) for token in (image_token, video_token if videos else None))
    for what, places, rows in (
        ("image", place, of_images),
        ("video", video_place, len(newline) - of_images),
    ):
        if len(places) != rows:
            raise ImageError(f"{len(places)} {what} tokens, but the {what}s have {rows} rows")
    taken = np.concatenate([place, video_place])
    source = np.full(len(flat), TEXT, np.int32)
    row = flat.astype(np.int32)
    source[taken] = np.where(newline, CONSTANT, VISUAL)
    row[taken] = np.where(newline, 0, number)
    columns = {"source": source, "row": row, "kept": kept}
    columns |= {"place": place.astype(np.int32), "video_place": video_place.astype(np.int32)}
    return columns | inverse_columns(columns, visual_rows) | pool_columns, pools


def _places(flat: np.ndarray, token: int | None) -> np.ndarray:
    return np.zeros(0, np.int64) if token is None else np.flatnonzero(flat == token)


def supervised_rows(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows, targets) of labels [B, S]: the rows whose next token in the same sequence has a label, and these
    labels."""
    following = labels[:, 1:]
    sequence, position = np.nonzero(following != IGNORE)
    return sequence * labels.shape[1] + position, following[sequence, position]
