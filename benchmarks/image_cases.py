"""image_tiles at the sizes of LLaVA-NeXT's inputs: images already on the device, and on their way from the host."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.op_case import OpCase, Widths
from llava_fast import _C, ops
from llava_fast.inputs.anyres import View, fit_within
from llava_fast.inputs.images import make_tiles, plan_tiles
from llava_fast.ops.image import TilePlan

GRID, ASPECT = 2, (9, 16)


def image_tiles(
    tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths, from_host: bool = False
) -> OpCase:
    """Photographs of 16:9, each to a base view and the 2x2 tiles of its larger one (a single tile: the base view
    alone). Plain is torch's antialiased bicubic on the device, as torchvision resizes there, which does not round and
    clamp between its passes."""
    count, side = max(1, tiles // (1 + GRID**2)), widths.tile
    height, width = (side * GRID * part // ASPECT[0] for part in ASPECT)
    canvas = (GRID * side, GRID * side)
    views = [View((side, side), (0, 0), (side, side), False, (0, 0, 0))]
    if tiles > 1:
        size = fit_within(height, width, canvas)
        offset = ((canvas[0] - size[0]) // 2, (canvas[1] - size[1]) // 2)
        views.append(View(size, offset, canvas, False, (0, 0, 0)))
    rng = np.random.default_rng(tiles)
    images = rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    plan = plan_tiles([(height, width)] * count, [views] * count, side)

    def moved(array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array.reshape(-1))
        return tensor.pin_memory() if device.type == "cuda" else tensor

    host = moved(images), moved(plan.jobs), moved(plan.words)

    def given() -> tuple[Tensor, ...]:
        return tuple(tensor.to(device, non_blocking=True) for tensor in host)

    there = functools.cache(given)  # in the first call, which is not timed

    def run() -> Tensor:
        pixels, jobs, words = given() if from_host else there()
        return ops.image_tiles(pixels, TilePlan(jobs.view(plan.jobs.shape), words, *plan[2:]))

    def plain() -> Tensor:
        pixels = (given() if from_host else there())[0].view(images.shape).permute(0, 3, 1, 2).float()
        made = []
        for view in views:
            resized = F.interpolate(pixels, view.size, mode="bicubic", antialias=True).round().clamp(0, 255)
            (top, left), (rows, columns) = view.offset, view.canvas
            bottom, right = rows - view.size[0] - top, columns - view.size[1] - left
            padded = F.pad(resized, (left, right, top, bottom)).to(torch.uint8)
            grid = padded.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 1, 3, 5)
            made.append(grid.flatten(1, 2))
        return torch.cat(made, 1).flatten(0, 1)

    def exact() -> Tensor:
        return (
            torch.from_numpy(np.concatenate([make_tiles(image, views, side) for image in images])).to(device).double()
        )

    return OpCase(
        "image_tiles_from_host" if from_host else "image_tiles",
        f"{plan.tiles} tiles, {count} of {width}x{height}",
        plan.tiles,
        0,
        images.size * len(views) + 2 * plan.middle_bytes + plan.tiles * 3 * side**2,
        (),
        run,
        plain,
        exact,
        backend="native" if device.type != "cuda" or hasattr(_C, "make_tiles_cuda") else "reference",
        limit=0.0,
    )


def image_tiles_from_host(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    """The same from pinned memory of the host. Its floor leaves the way from there out."""
    return image_tiles(tiles, dtype, device, widths, from_host=True)
