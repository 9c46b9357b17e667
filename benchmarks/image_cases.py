"""image_tiles at the sizes of LLaVA-NeXT's inputs: images already on the device, and on their way from the host; to
planar tiles and to patch rows."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.op_case import OpCase, Widths
from llava_fast import _C, ops
from llava_fast.inputs.pictures.tiles import TilePlan as HostPlan
from llava_fast.inputs.pictures.tiles import make_tiles, plan_tiles
from llava_fast.inputs.pictures.view import View
from llava_fast.inputs.tiling.anyres import fit_within
from llava_fast.ops.image import TilePlan

GRID, ASPECT = 2, (9, 16)


def image_tiles(
    tiles: int,
    dtype: torch.dtype,
    device: torch.device,
    widths: Widths,
    from_host: bool = False,
    patch: int = 0,
) -> OpCase:
    """Photographs of 16:9, each to a base view and the 2x2 tiles of its larger one (a single tile: the base view
    alone); with `patch`, to patch rows. Plain is torch's antialiased bicubic on the device, as torchvision resizes
    there, which does not round and clamp between its passes."""
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

    def planned() -> HostPlan:
        return plan_tiles([(height, width)] * count, [views] * count, side, patch_size=patch)

    plan = planned()

    def moved(array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array.reshape(-1))
        return tensor.pin_memory() if device.type == "cuda" else tensor

    host = moved(images)

    def given(plan: HostPlan) -> tuple[Tensor, TilePlan]:
        jobs, words = (torch.from_numpy(table).to(device) for table in (plan.jobs, plan.words))
        return host.to(device, non_blocking=True), TilePlan(jobs, words, *plan[2:])

    there = functools.cache(lambda: given(plan))  # in the first call, which is not timed

    def run() -> Tensor:
        return ops.image_tiles(*(given(planned()) if from_host else there()))

    def plain() -> Tensor:
        pixels = host.to(device, non_blocking=True) if from_host else there()[0]
        pixels = pixels.view(images.shape).permute(0, 3, 1, 2).float()
        made = []
        for view in views:
            resized = F.interpolate(pixels, view.size, mode="bicubic", antialias=True).round().clamp(0, 255)
            (top, left), (rows, columns) = view.offset, view.canvas
            bottom, right = rows - view.size[0] - top, columns - view.size[1] - left
            padded = F.pad(resized, (left, right, top, bottom)).to(torch.uint8)
            grid = padded.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 1, 3, 5)
            made.append(grid.flatten(1, 2))
        done = torch.cat(made, 1).flatten(0, 1)
        if not patch:
            return done
        done = done.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).permute(0, 2, 4, 1, 3, 5)
        return F.pad(done.flatten(3).flatten(1, 2), (0, -3 * patch**2 % 16))

    def exact() -> Tensor:
        layout = {"tile_format": "patch_rows", "patch_size": patch} if patch else {}
        made = np.concatenate([make_tiles(image, views, side, **layout) for image in images])
        return torch.from_numpy(made).to(device).double()

    name = "image_tiles_from_host" if from_host else "image_tiles_patch_rows" if patch else "image_tiles"
    of_tile = (side // patch) ** 2 * (3 * patch**2 + -3 * patch**2 % 16) if patch else 3 * side**2
    return OpCase(
        name,
        f"{plan.tiles} tiles, {count} of {width}x{height}",
        plan.tiles,
        0,
        images.size * len(views) + 2 * plan.middle_bytes + plan.tiles * of_tile,
        (),
        run,
        plain,
        exact,
        backend="native" if device.type != "cuda" or hasattr(_C, "make_tiles_cuda") else "reference",
        limit=0.0,
        bare=_torchvision(host.view(images.shape), canvas, device) if from_host and tiles > 1 else None,
        wall=from_host,
    )


def image_tiles_from_host(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    """The same from pinned memory of the host, planning included. Its floor leaves the way from there out. Bare is
    transformers' processor on torchvision, on the same device, where torchvision is installed."""
    return image_tiles(tiles, dtype, device, widths, from_host=True)


def image_patch_rows(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    """Tiles as the rows of patches that patch_embed can take instead of planar ones."""
    return image_tiles(tiles, dtype, device, widths, patch=widths.patch)


def _torchvision(images: Tensor, canvas: tuple[int, int], device: torch.device) -> Callable[[], object] | None:
    """LLaVA-NeXT's processor in transformers to uint8 tiles; images uint8 [n, H, W, 3] in the host's memory."""
    if device.type != "cuda" or importlib.util.find_spec("torchvision") is None:
        return None
    from transformers import LlavaNextImageProcessor

    processor = LlavaNextImageProcessor(image_grid_pinpoints=[list(canvas)], do_rescale=False, do_normalize=False)
    planar = list(images.permute(0, 3, 1, 2))
    return lambda: processor(planar, device=device, return_tensors="pt", input_data_format="channels_first")
