"""image_tiles: cut a batch of uint8 images of any sizes into a vision tower's uint8 tiles, on the pixels' device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llava_fast.ops import backend, library
from llava_fast.ops.image import native, reference

backend.register("image_tiles", "reference", "any device")
backend.register("image_tiles", "native", "CUDA if built with it; CPU, one thread, for tests")

JOB_WORDS = 28


class TilePlan(NamedTuple):
    """How images become tiles, as integers: inputs.pictures.tiles.TilePlan with its two tables as tensors.

    jobs          int32 [jobs, 28] on the pixels' device: one view of one image each.
    words         int32 on the pixels' device: the tables of the resize filters.
    tile          side of a tile in pixels; patch: side of a patch for patch rows, 0 for planar tiles.
    tiles         number of tiles in the batch; pixel_bytes: bytes of all its images.
    middle_bytes, first_pixels, canvas_pixels, taps   sizes of the launches: scratch bytes between the two passes,
                  pixels of the largest job in each pass, most taps of a filter.
    """

    jobs: Tensor
    words: Tensor
    tile: int
    patch: int
    tiles: int
    pixel_bytes: int
    middle_bytes: int
    first_pixels: int
    canvas_pixels: int
    taps: int


def image_tiles(pixels: Tensor, plan: TilePlan) -> Tensor:
    """The uint8 tiles of a batch of images: each view is resized bit for bit as by Pillow, padded and cut.

    pixels   uint8 [bytes]: the images of the plan, [H, W, 3] each, concatenated.
    Returns [tiles, 3, tile, tile], or patch rows [tiles, (tile // patch)**2, 3 * patch**2 rounded up to 16] if
    `plan.patch`: the same as inputs.pictures.tiles.make_tiles for each image. It has no gradient. The plan's tables are
    not checked: use only those of inputs.pictures.tiles.plan_tiles. Minimum bytes: the pixels of every view read once,
    the tiles written once, the intermediate rows between the two passes written and read once. Raises ValueError if a
    tensor's shape, dtype or device differs from the plan's.
    """
    if pixels.dtype != torch.uint8 or pixels.dim() != 1:
        raise ValueError(f"pixels must be uint8 [bytes], got {pixels.dtype} {tuple(pixels.shape)}")
    if pixels.numel() != plan.pixel_bytes:
        raise ValueError(f"the plan's images have {plan.pixel_bytes} bytes, and {pixels.numel()} were given")
    tables = (plan.jobs, plan.words)
    if any(table.dtype != torch.int32 for table in tables) or plan.jobs.shape[1:] != (JOB_WORDS,):
        raise ValueError(f"jobs must be int32 [jobs, {JOB_WORDS}] and words int32, got {plan.jobs}, {plan.words}")
    if any(table.device != pixels.device for table in tables):
        raise ValueError(f"the plan is on {plan.jobs.device} and {plan.words.device}, the pixels on {pixels.device}")
    sizes = (plan.middle_bytes, plan.first_pixels, plan.canvas_pixels, plan.taps)
    return _image_tiles(pixels, *tables, plan.tile, plan.patch, plan.tiles, *sizes)


def _run(
    pixels: Tensor,
    jobs: Tensor,
    words: Tensor,
    tile: int,
    patch: int,
    tiles: int,
    middle_bytes: int,
    first_pixels: int,
    canvas_pixels: int,
    taps: int,
) -> Tensor:
    pixels, jobs, words = pixels.contiguous(), jobs.contiguous(), words.contiguous()
    if backend.choose("image_tiles", pixels.device.type, {"native": native.unfit(pixels)}) == "native":
        sizes = (middle_bytes, first_pixels, canvas_pixels)
        return native.image_tiles(pixels, jobs, words, tile, patch, tiles, *sizes)
    return reference.image_tiles(pixels, jobs, words, tile, patch, tiles, middle_bytes, taps)


_image_tiles = library.define(
    "image_tiles(Tensor pixels, Tensor jobs, Tensor words, int tile, int patch, SymInt tiles, SymInt middle_bytes,"
    " SymInt first_pixels, SymInt canvas_pixels, SymInt taps) -> Tensor",
    _run,
    lambda pixels, jobs, words, tile, patch, tiles, *sizes: pixels.new_empty(
        (tiles, *reference.tiles_shape(tile, patch, 1)[1:])
    ),
)
