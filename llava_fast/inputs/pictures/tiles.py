"""Resizes and cuts images into a vision tower's uint8 tiles with csrc, bit-identical to Pillow."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import PIL

import llava_fast._C as _C

if TYPE_CHECKING:
    from llava_fast.inputs.pictures.preprocessing import Filter
    from llava_fast.inputs.pictures.view import View


PillowOrder = Literal["12.1", "12", "13"]


def _installed_order() -> PillowOrder:
    version = tuple(int(part) for part in PIL.__version__.split(".")[:2])
    return "13" if version >= (13, 0) else "12" if version >= (12, 2) else "12.1"


INSTALLED_PILLOW: PillowOrder = _installed_order()
"""The order of resize passes of the installed Pillow: see `resize`."""

TORCH_MODES = {"nearest": "nearest-exact", "bilinear": "bilinear", "bicubic": "bicubic"}
"""Filter -> torch's interpolation mode, for filters that torchvision supports for uint8."""


def resize(
    image: np.ndarray,
    size: tuple[int, int],
    *,
    filter: Filter = "bicubic",
    pillow: PillowOrder | None = None,
    threads: int = 0,
) -> np.ndarray:
    """Pillow's resize, bit for bit: uint8 [H, W, 3] to uint8 [*size, 3], size as (height, width).

    filter   Pillow's filter: "nearest", "box", "bilinear", "hamming", "bicubic" or "lanczos".
    pillow   the Pillow version whose order of passes is used. "12.1" (and before): the horizontal pass first. "12"
             (12.2 and 12.3, python-pillow PR 9524): the vertical pass first if the height shrinks and is over 100 times
             the width. "13" (PR 9549): the vertical pass first if the height loses more than twice as many rows as the
             width loses columns. None: the installed Pillow's.
    threads  0: OMP_NUM_THREADS, or all cores if that is not set.
    The instruction set is the best available, or LLAVA_FAST_SIMD (scalar, avx2, avx512); the result is the same.
    """
    return _C.resize(_pixels(image), *size, filter, pillow or INSTALLED_PILLOW, threads or _all_threads())


def make_tiles(
    image: np.ndarray,
    views: Sequence[View],
    tile_size: int,
    *,
    pillow: PillowOrder | None = None,
    resample: Literal["pillow", "torchvision"] = "pillow",
    threads: int = 0,
    tile_format: Literal["planar", "patch_rows"] = "planar",
    patch_size: int = 14,
) -> np.ndarray:
    """The uint8 tiles of an image: each view (llava_fast.inputs.pictures.view.View) is resized, placed and cut.

    image       uint8 [H, W, 3].
    resample    "pillow": bit-identical to Pillow's resize. "torchvision": torchvision's v2 resize of uint8 on the CPU
                (torch's antialiased interpolation), which differs by up to 2 levels and supports only the filters of
                TORCH_MODES. It needs torch, not torchvision.
    pillow, threads  as in `resize`.
    tile_format "planar": [tiles, 3, tile_size, tile_size]. "patch_rows": [tiles, (tile_size // patch_size)**2,
                3 * patch_size**2 rounded up to 16]: each row is one patch in (channel, y, x) order, zero-padded, so
                that it is an aligned GEMM operand. Pixels after the last whole patch are dropped, as in a convolution.
    Raises ValueError for views whose canvas is not a multiple of the tile, a filter that `resample` does not support,
    and an image of another shape or dtype.
    """
    if resample not in ("pillow", "torchvision"):
        raise ValueError(f'resample must be "pillow" or "torchvision", not {resample!r}')
    if tile_format not in ("planar", "patch_rows"):
        raise ValueError(f'tile_format must be "planar" or "patch_rows", not {tile_format!r}')
    image, views = resized_first(_pixels(image), views, pillow=pillow, resample=resample, threads=threads)
    options = (
        tile_size,
        pillow or INSTALLED_PILLOW,
        threads or _all_threads(),
        tile_format == "patch_rows",
        patch_size,
    )
    if resample == "pillow":
        return _C.make_tiles(image, [_fields(view) for view in views], *options)
    stacks = []
    for view in views:  # torch resizes; the compiled code then only places and cuts
        resized = _torchvision_resize(_square(image, view.fill) if view.square else image, view.size, view.filter)
        stacks.append(_C.make_tiles(resized, [(False, *_fields(view)[1:])], *options))
    return np.concatenate(stacks)


def resized_first(
    image: np.ndarray,
    views: Sequence[View],
    *,
    pillow: PillowOrder | None = None,
    resample: Literal["pillow", "torchvision"] = "pillow",
    threads: int = 0,
) -> tuple[np.ndarray, Sequence[View]]:
    """The image after the resizes of its views' `through`, and the views that remain. Arguments as for `make_tiles`.
    Raises ValueError if they differ in `through`."""
    through, *others = {view.through for view in views} or {()}
    if others:
        raise ValueError("all views of an image must have the same `through`")
    if not through:
        return image, views
    for size in through:
        if resample == "torchvision":
            image = _torchvision_resize(image, size, views[0].filter)
        else:
            image = resize(image, size, filter=views[0].filter, pillow=pillow, threads=threads)
    return image, [dataclasses.replace(view, through=()) for view in views]


class TilePlan(NamedTuple):
    """The tiles of a batch of images as integers, from which a device makes them (llava_fast.ops.image_tiles).

    jobs          int32 [jobs, 28]: one view of one image each (TileJob in csrc/image/tile_plan.h).
    words         int32: the tables of the resize filters, without duplicates.
    tile          side of a tile in pixels; patch: side of a patch for patch rows, 0 for planar tiles.
    tiles         number of tiles in the batch; pixel_bytes: bytes of all its images, concatenated.
    middle_bytes  scratch bytes between the two passes; first_pixels, canvas_pixels: pixels of the largest job of each.
    taps          most taps of a filter.
    """

    jobs: np.ndarray
    words: np.ndarray
    tile: int
    patch: int
    tiles: int
    pixel_bytes: int
    middle_bytes: int
    first_pixels: int
    canvas_pixels: int
    taps: int


class UncutImages(NamedTuple):
    """Images whose tiles are made on the device: their concatenated pixels, uint8 [bytes], and the plan."""

    pixels: np.ndarray
    plan: TilePlan


def plan_tiles(
    sizes: Sequence[tuple[int, int]],
    views: Sequence[Sequence[View]],
    tile_size: int,
    *,
    pillow: PillowOrder | None = None,
    patch_size: int = 0,
) -> TilePlan:
    """The plan of `make_tiles` for images of these sizes (height, width); views: those of each image.

    patch_size  0 for planar tiles, else the patch size of tile_format "patch_rows". Raises ValueError like
                `make_tiles`, and for views with `through`: call `resized_first`.
    """
    if any(view.through for of_one in views for view in of_one):
        raise ValueError("a plan has one resize per view: call resized_first before plan_tiles")
    fields = [[_fields(view) for view in of_one] for of_one in views]
    tile_format = (patch_size > 0, patch_size or 1)
    made = _C.plan_tiles([tuple(size) for size in sizes], fields, tile_size, pillow or INSTALLED_PILLOW, *tile_format)
    jobs = made["jobs"].view(np.int32)
    taps = int(jobs[:, _AXIS_WIDTHS].max()) if len(jobs) else 0
    pixel_bytes = sum(3 * height * width for height, width in sizes)
    work = (made["middle_bytes"], made["first_pixels"], made["canvas_pixels"])
    return TilePlan(jobs, made["words"], tile_size, patch_size, made["tiles"], pixel_bytes, *work, taps)


def _fields(view: View) -> tuple:
    """A view as the tuple that csrc expects."""
    return view.square, view.size, view.offset, view.canvas, view.fill, view.filter


_AXIS_WIDTHS = [22, 26]  # indices of x.width and y.width among a TileJob's words


def _pixels(image: np.ndarray) -> np.ndarray:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        kind = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"the image must be a uint8 array [height, width, 3], not {kind}: use open_image")
    return np.ascontiguousarray(image)


def _all_threads() -> int:
    limit = os.environ.get("OMP_NUM_THREADS", "")
    if limit.isdigit() and int(limit) > 0:
        return int(limit)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _square(image: np.ndarray, fill: tuple[int, int, int]) -> np.ndarray:
    height, width = image.shape[:2]
    side = max(height, width)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = fill
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    return square


def _torchvision_resize(image: np.ndarray, size: tuple[int, int], filter: Filter) -> np.ndarray:
    import torch

    if filter not in TORCH_MODES:
        raise ValueError(f"torchvision resizes {', '.join(TORCH_MODES)} only, not {filter}: use resample='pillow'")
    if tuple(size) == image.shape[:2]:
        return image
    pixels = torch.tensor(image).permute(2, 0, 1)[None]
    antialias = filter != "nearest"
    resized = torch.nn.functional.interpolate(pixels, tuple(size), mode=TORCH_MODES[filter], antialias=antialias)
    return resized[0].permute(1, 2, 0).contiguous().numpy()
