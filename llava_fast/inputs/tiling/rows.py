"""The decoder rows of an image or a video: rows of the tower, pooled rows, newline rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from einops import rearrange

from llava_fast.errors import ImageError

FEATURE, POOLED, NEWLINE, TOKEN = 0, 1, 2, 3
"""Kinds of rows: a ViT row, a row pooled from several, the learned newline, a token around or between tiles."""
UNKNOWN_TOKEN = -1
"""Stands for a token's id until a tokenizer provides it (see families.base.Family.geometry)."""


@dataclass(frozen=True, eq=False)
class VisualRows:
    """The decoder rows of one image or video, in order.

    kind   int8 [rows]: FEATURE, POOLED, NEWLINE or TOKEN.
    index  int32 [rows]: ViT row (tile * tower_rows_per_tile + row in tile), row of `pooling`, 0 for a newline, or a
           token's id.
    pooling (int32 [pooled, K] ViT rows, float32 [pooled, K] weights) or None.
    reduce how the K rows combine: "sum" of weighted rows, or "max" (weights unused).
    stage  whether pooling happens "before" or "after" the projector.
    tiles  number of tiles.
    grids  for towers of native sizes, the (rows, columns) of each image or slice, whose patches are the tiles, in
           order; else empty.
    table_rows  number of rows that `index` refers to, if a connector does not output them tile by tile; else 0.
    shares  the part of table_rows that each tile has, if they differ; else empty.
    optional  bool [rows]: those that a router may leave out (models.router), so `len` is an upper bound; or None.
    """

    kind: np.ndarray
    index: np.ndarray
    tiles: int
    pooling: tuple[np.ndarray, np.ndarray] | None = None
    reduce: Literal["sum", "max"] = "sum"
    stage: Literal["before", "after"] = "after"
    grids: tuple[tuple[int, int], ...] = ()
    table_rows: int = 0
    shares: tuple[int, ...] = ()
    optional: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.kind)

    def only(self, stays: np.ndarray) -> VisualRows:
        """These rows without the optional ones for which `stays`, bool [rows], is False; none is optional any more."""
        return replace(self, kind=self.kind[stays], index=self.index[stays], optional=None)

    @property
    def token_ids(self) -> np.ndarray:
        """int32: ids of the tokens among its rows, in order."""
        return self.index[self.kind == TOKEN]


def check_size(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise ImageError(f"an image of {width}x{height} pixels has no content; give one of at least 1x1")


def _block_pooling(picture: np.ndarray, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Non-overlapping stride x stride blocks: (index, weight), both [out_h, out_w, stride**2]."""
    out_h, out_w = picture.shape[0] // stride, picture.shape[1] // stride
    whole = picture[: out_h * stride, : out_w * stride]
    index = rearrange(whole, "(h sh) (w sw) -> h w (sh sw)", sh=stride, sw=stride)
    return index, np.full(index.shape, 1.0 / (stride * stride), dtype=np.float32)


def _bilinear_pooling(picture: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Half-pixel bilinear sampling (torch's interpolate, align_corners=False): (index, weight) [out, 4]."""

    def axis(size: int, out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        where = np.maximum((np.arange(out, dtype=np.float64) + 0.5) * (size / out) - 0.5, 0.0)
        low = np.minimum(where.astype(np.int64), size - 1)
        return low, np.minimum(low + 1, size - 1), where - low

    top, bottom, fy = axis(picture.shape[0], shape[0])
    left, right, fx = axis(picture.shape[1], shape[1])
    corners = [(top, left), (top, right), (bottom, left), (bottom, right)]
    index = np.stack([picture[np.ix_(y, x)] for y, x in corners], axis=-1)
    fy, fx = fy[:, None], fx[None, :]
    weight = np.stack([(1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx], axis=-1)
    return index.reshape(-1, 4), weight.reshape(-1, 4).astype(np.float32)


def _pooled_rows(head, pooling, shape, *, newline: bool, tiles: int, reduce: Literal["sum", "max"]) -> VisualRows:
    """`head` rows unchanged, then a grid [shape] of pooled rows, with `newline` followed by a newline row per line."""
    index, weight = (part.reshape(shape[0] * shape[1], -1) for part in pooling)
    lines = np.arange(shape[0] * shape[1], dtype=np.int32).reshape(shape)
    parts = [part for line in lines for part in ((line, None) if newline else (line,))]
    body = _rows(parts, tiles, body=POOLED)
    first = _rows(head, tiles)
    return VisualRows(
        kind=np.concatenate([first.kind, body.kind]),
        index=np.concatenate([first.index, body.index]),
        tiles=tiles,
        pooling=(np.ascontiguousarray(index, dtype=np.int32), np.ascontiguousarray(weight, dtype=np.float32)),
        reduce=reduce,
    )


def _rows(parts, tiles: int, body: int = FEATURE, **of_pooling) -> VisualRows:
    """Rows from parts in order: an array of row numbers (of kind `body`), a tuple of token ids, or None for a
    newline."""
    lengths = [1 if part is None else len(part) for part in parts]
    kinds = [NEWLINE if part is None else TOKEN if isinstance(part, tuple) else body for part in parts]
    zero = np.zeros(1, dtype=np.int32)
    numbers = [zero if part is None else np.asarray(part, dtype=np.int32) for part in parts]
    index = np.concatenate(numbers) if parts else zero[:0]
    rows = VisualRows(
        kind=np.repeat(np.array(kinds, dtype=np.int8), lengths), index=index.astype(np.int32), tiles=tiles, **of_pooling
    )
    rows.kind.flags.writeable = rows.index.flags.writeable = False
    return rows
