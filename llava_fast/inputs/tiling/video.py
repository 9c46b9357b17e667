"""The rows and views of a video: one tile per frame, pooled as the checkpoint specifies."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from llava_fast.errors import ImageError
from llava_fast.inputs.pictures.view import View
from llava_fast.inputs.tiling.anyres import VisualGeometry, image_views, tower_rows_of_tile
from llava_fast.inputs.tiling.rows import POOLED, VisualRows, _bilinear_pooling, _block_pooling, _rows


def frame_views(geometry: VisualGeometry, height: int, width: int) -> tuple[View, ...]:
    """The resize that makes a video frame's only tile; see `VisualGeometry.frame_aspect`. Raises ImageError for a
    checkpoint without video support."""
    _check_takes_videos(geometry)
    return image_views(_of_frames(geometry), height, width)


@functools.lru_cache(maxsize=64)
def _of_frames(geometry: VisualGeometry) -> VisualGeometry:
    aspect, fit, filter = geometry.frame_aspect, geometry.frame_fit, geometry.frame_filter
    return dataclasses.replace(geometry, aspect=aspect, fit=fit, filter=filter)


@functools.lru_cache(maxsize=64)
def video_rows(geometry: VisualGeometry, frames: int) -> VisualRows:
    """The decoder rows of a video of `frames` frames, one tile each, pooled as the checkpoint specifies."""
    _check_takes_videos(geometry)
    if frames < 1:
        raise ImageError("the video has no frames: give at least one")
    if geometry.frame_class_row or geometry.tile_rows is not None:
        return _rows([np.arange(frames * geometry.tower_rows_per_tile, dtype=np.int32)], frames)
    side = geometry.side
    local = tower_rows_of_tile(geometry).reshape(side, side)
    starts = np.arange(frames, dtype=np.int32) * geometry.tower_rows_per_tile
    position = geometry.video_newline
    if geometry.video_pool == "none":
        lines = [row + start for start in starts for row in local]
        return _rows(_with_newlines(lines, side, position), frames)
    stride = geometry.video_pool_stride
    if geometry.video_pool == "bilinear":
        out = -(-side // stride)
        index, weight = _bilinear_pooling(local, (out, out))
    else:
        index, weight = _block_pooling(local, stride)
        out = side // stride
        index, weight = index.reshape(out * out, -1), weight.reshape(out * out, -1)
    pooling = (
        (index[None] + starts[:, None, None]).reshape(-1, index.shape[-1]),
        np.broadcast_to(weight[None], (frames, *weight.shape)).reshape(-1, weight.shape[-1]),
    )
    lines = list(np.arange(frames * out * out, dtype=np.int32).reshape(frames * out, out))
    return _rows(
        _with_newlines(lines, out, position),
        frames,
        body=POOLED,
        pooling=pooling,
        reduce="max" if geometry.video_pool == "max" else "sum",
        stage=geometry.video_pool_stage,
    )


def _check_takes_videos(geometry: VisualGeometry) -> None:
    if geometry.tiling is not None:
        raise ImageError("videos are not supported for this kind of checkpoint: give frames as images")


def _with_newlines(lines: list[np.ndarray], lines_per_frame: int, position: str) -> list[np.ndarray | None]:
    """The lines of all frames, with None in place of each newline row."""
    parts: list[np.ndarray | None] = []
    for number, line in enumerate(lines, start=1):
        parts.append(line)
        if position == "grid" or (position == "frame" and number % lines_per_frame == 0):
            parts.append(None)
    if position == "one_token":
        parts.append(None)
    return parts
