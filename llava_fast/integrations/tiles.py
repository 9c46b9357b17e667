"""What the settings of transformers' image and video processors ask for, where csrc makes the same to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers.image_utils import PILImageResampling

from llava_fast.integrations.uint8_pixels import Normalisation


def square_tile(settings: dict[str, Any]) -> int | None:
    """The side of the tile that these settings resize and crop to; None if they do anything else."""
    size, crop = settings["size"], settings["crop_size"]
    steps = all(settings[name] for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"))
    if not steps or settings["resample"] != PILImageResampling.BICUBIC or not crop:
        return None
    side = size.shortest_edge or size.height
    return side if {side, size.width or side, crop.height, crop.width} == {side} and not size.longest_edge else None


def squashed_tile(settings: dict[str, Any]) -> int | None:
    """The side of the square that these settings resize to, whatever the aspect; None if they do anything else."""
    size = settings["size"]
    steps = all(settings[name] for name in ("do_resize", "do_rescale", "do_normalize"))
    if not steps or settings["do_center_crop"] or settings["resample"] != PILImageResampling.BICUBIC:
        return None
    edges = size.shortest_edge or size.longest_edge
    return size.height if size.height == size.width and size.height and not edges else None


def levels_of(settings: dict[str, Any]) -> np.ndarray:
    """float32 [3, 256]: what transformers' own arithmetic makes of each pixel value in each channel."""
    mean, std = (tuple(map(float, np.broadcast_to(settings[name], 3))) for name in ("image_mean", "image_std"))
    return Normalisation(settings["rescale_factor"], mean, std).levels()


def normalised(tiles: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """uint8 [tiles, 3, T, T] through a table [3, 256] of each channel's values."""
    out = np.empty(tiles.shape, levels.dtype)
    for tile, made in zip(tiles, out, strict=True):
        for channel in range(3):
            np.take(levels[channel], tile[channel], out=made[channel], mode="clip")  # "clip" writes without a buffer
    return out
