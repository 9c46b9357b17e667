"""The tile kernels of csrc/image: two launches on the current stream on CUDA, the same per-pixel code on the CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import llava_fast._C as _C
from llava_fast.ops.image.reference import tiles_shape


def unfit(pixels: Tensor) -> str | None:
    """Why csrc cannot make tiles on the device of `pixels`; None if it can."""
    if pixels.device.type == "cuda" and not hasattr(_C, "make_tiles_cuda"):
        return "llava_fast was built without CUDA (build it where nvcc is)"
    return None if pixels.device.type in ("cpu", "cuda") else f"the pixels are on {pixels.device}"


def image_tiles(
    pixels: Tensor,
    jobs: Tensor,
    words: Tensor,
    tile: int,
    patch: int,
    tiles: int,
    middle_bytes: int,
    first_pixels: int,
    canvas_pixels: int,
) -> Tensor:
    layout = (tile, patch > 0, patch or 1)
    if pixels.device.type == "cpu":
        plan = {
            "jobs": jobs.numpy().view(np.uint8),
            "words": words.numpy(),
            "middle_bytes": middle_bytes,
            "tiles": tiles,
        }
        return torch.from_numpy(_C.run_tile_plan(plan, pixels.numpy(), *layout))
    out = pixels.new_empty(tiles_shape(tile, patch, tiles))
    if tiles:
        scratch = pixels.new_empty(middle_bytes)  # allocated on the current stream, so safe to free on return
        stream = torch.cuda.current_stream().cuda_stream  # ops.library made the tensors' GPU the current device
        addresses = (pixels.data_ptr(), scratch.data_ptr(), out.data_ptr(), stream)
        sizes = (first_pixels, canvas_pixels)
        _C.make_tiles_cuda(jobs.data_ptr(), len(jobs), words.data_ptr(), *layout, *sizes, *addresses)
    return out
