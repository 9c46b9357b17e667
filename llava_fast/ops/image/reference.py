"""The tiles of a batch of images in plain PyTorch: the specification of `llava_fast.ops.image_tiles`.

The integer arithmetic of csrc/image/tile_pixels.h over all pixels of all images at once: bit-exact on every device. The
only loop is over the filter's taps, whose number the host knows, so nothing synchronises with the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from llava_fast.ops.patch_embed.reference import patch_rows

PRECISION_BITS = 22
"""Fraction bits of a filter weight, as in Pillow's 8-bit resize."""

_FIELDS = (
    "height width top left middle_height middle_width out_height out_width offset_y offset_x canvas_height "
    "canvas_width vertical_first x_first x_count x_weights x_width y_first y_count y_weights y_width fill"
).split()
COLUMN = {name: 6 + number for number, name in enumerate(_FIELDS)}
"""Field name -> index among the 28 words of a job (TileJob in csrc/image/tile_plan.h); the first 6 are three int64."""


def image_tiles(
    pixels: Tensor, jobs: Tensor, words: Tensor, tile: int, patch: int, tiles: int, middle_bytes: int, taps: int
) -> Tensor:
    """uint8 [tiles, 3, tile, tile], or patch rows if `patch`. See `llava_fast.ops.image_tiles` for the arguments."""
    if not tiles:
        return pixels.new_empty(tiles_shape(tile, patch, tiles))
    source, middle_start, tile_start = jobs.view(torch.int64)[:, :3].unbind(1)
    channel = torch.arange(3, device=pixels.device)
    fill = jobs.view(torch.uint8)[:, 4 * COLUMN["fill"] :][:, :3]

    # First pass: every pixel of every job's intermediate rows, filtered along one axis of the source.
    pixel = torch.arange(middle_bytes // 3, device=pixels.device)
    job = torch.searchsorted(middle_start // 3, pixel, right=True) - 1
    of = _Fields(jobs, job)
    within = pixel - middle_start[job] // 3
    y, x = within // of["middle_width"], within % of["middle_width"]
    vertical = of["vertical_first"] != 0

    def from_source(k: Tensor) -> Tensor:
        row = torch.where(vertical, k, y) - of["top"]
        column = torch.where(vertical, x, k) - of["left"]
        inside = (row >= 0) & (row < of["height"]) & (column >= 0) & (column < of["width"])
        at = torch.where(inside, source[job] + 3 * (row * of["width"] + column), 0)
        return torch.where(inside[:, None], pixels[at[:, None] + channel], fill[job])

    middle = _filter(words, of.axis(vertical), torch.where(vertical, y, x), from_source, taps).flatten()

    # Second pass: every pixel of every tile, filtered along the other axis of the intermediate rows.
    pixel = torch.arange(tiles * tile * tile, device=pixels.device)
    number = pixel // (tile * tile)
    tile_start = tile_start // tiles_shape(tile, patch, 1).numel()
    job = torch.searchsorted(tile_start, number, right=True) - 1
    of = _Fields(jobs, job)
    number, across = number - tile_start[job], of["canvas_width"] // tile
    row = number // across * tile + pixel // tile % tile - of["offset_y"]
    column = number % across * tile + pixel % tile - of["offset_x"]
    inside = (row >= 0) & (row < of["out_height"]) & (column >= 0) & (column < of["out_width"])
    row, column = torch.where(inside, row, 0), torch.where(inside, column, 0)
    vertical = of["vertical_first"] != 0

    def from_middle(k: Tensor) -> Tensor:
        middle_row, middle_column = torch.where(vertical, row, k), torch.where(vertical, k, column)
        at = middle_start[job] + 3 * (middle_row * of["middle_width"] + middle_column)
        return middle[at[:, None] + channel]

    value = _filter(words, of.axis(~vertical), torch.where(vertical, column, row), from_middle, taps)
    value = torch.where(inside[:, None], value, fill[job])
    planar = rearrange(value, "(t y x) c -> t c y x", t=tiles, y=tile, x=tile).contiguous()
    if not patch:
        return planar
    rows = patch_rows(planar, patch)
    return F.pad(rows, (0, -rows.shape[2] % 16))


def tiles_shape(tile: int, patch: int, tiles: int) -> torch.Size:
    """Shape of the output: planar tiles, or patch rows if `patch`."""
    if not patch:
        return torch.Size((tiles, 3, tile, tile))
    return torch.Size((tiles, (tile // patch) ** 2, (3 * patch * patch + 15) // 16 * 16))


class _Fields:
    """The fields of each pixel's job, by name, int64 [pixels]."""

    def __init__(self, jobs: Tensor, job: Tensor) -> None:
        self.jobs, self.job = jobs, job

    def __getitem__(self, name: str) -> Tensor:
        return self.jobs[:, COLUMN[name]].long()[self.job]

    def axis(self, vertical: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Offsets of the filter's tables in `words`: first, count, weights; and the number of weights per output."""
        first, count, weights, width = (
            torch.where(vertical, self[f"y_{name}"], self[f"x_{name}"])
            for name in ("first", "count", "weights", "width")
        )
        return first, count, weights, width


def _filter(
    words: Tensor, axis: tuple[Tensor, ...], out: Tensor, load: Callable[[Tensor], Tensor], taps: int
) -> Tensor:
    """uint8 [pixels, 3]: the weighted sum of load(k) over the taps k of each output of an axis, in int32."""
    first_at, count_at, weights_at, width = axis
    first, count, weights_at = words[first_at + out].long(), words[count_at + out], weights_at + out * width
    total = torch.full((len(out), 3), 1 << (PRECISION_BITS - 1), dtype=torch.int32, device=words.device)
    for tap in range(taps):
        live = tap < count
        weight = torch.where(live, words[torch.where(live, weights_at + tap, 0)], 0)
        total += weight[:, None] * load(torch.where(live, first + tap, first)).int()
    return (total >> PRECISION_BITS).clamp(0, 255).to(torch.uint8)
