"""Translates settings of transformers' image and video processors that csrc reproduces bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers.image_transforms import normalize, rescale
from transformers.image_utils import ChannelDimension

from llava_fast.accelerated.replacement import logger
from llava_fast.inputs.pictures.preprocessing import FILTERS, Filter, Fit, Size, name_fit
from llava_fast.inputs.tiling.anyres import VisualGeometry

_SIZE_FIELDS = ("height", "width", "shortest_edge", "longest_edge", "max_height", "max_width")
_LARGEST = {"max_height", "max_width"}
_told: set[str] = set()


def tell_stock(processor: Any, why: str) -> None:
    """Log, once per reason, that transformers' own code makes these tiles."""
    told = f"{type(processor).__name__} takes the stock path: {why}"
    if told not in _told:
        _told.add(told)
        logger.warning(told)


class Unserved(ValueError):
    """Raised for settings or inputs that transformers' own code must handle; the message says why."""


def check_served(settings: dict[str, Any], is_bytes: bool, output: str) -> None:
    """Raise Unserved for inputs that are not uint8 RGB, and for uint8 output without rescaling or normalisation."""
    if not is_bytes:
        raise Unserved("an input is not uint8 RGB")
    if output == "uint8" and not (settings["do_rescale"] and settings["do_normalize"]):
        raise Unserved("do_rescale or do_normalize is off")


def one_tile(settings: dict[str, Any], square: bool = False) -> VisualGeometry:
    """The geometry of one tile per image with these settings; square: they pad the image to a square first. Raises
    Unserved."""
    size, crop, crops = _size(settings), settings["crop_size"], bool(settings["do_center_crop"])
    if crops and (not crop or crop.height != crop.width):
        raise Unserved(f"crop_size is {crop}, not a square")
    if size is None and not crops:
        raise Unserved("do_resize and do_center_crop are off")
    tile = crop.height if crops else (size.height or size.shortest_edge) if size else None
    if not tile:
        raise Unserved(f"size is {settings['size']}, not a square, and do_center_crop is off")
    aspect, fit = name_fit(Fit(square, size, crops), tile)
    if fit is not None and not crops:
        raise Unserved(f"size is {settings['size']}, not a square, and do_center_crop is off")
    color = (0, 0, 0)
    if square:
        if crops and (size is None or min(size.of(tile, tile)) < tile):
            raise Unserved("do_pad is on, and an image smaller than crop_size would get margins of two colours")
        color = _color(settings["image_mean"])
    filter = _filter(settings)
    return VisualGeometry(tile_size=tile, patch_size=1, aspect=aspect, fit=fit, filter=filter, pad_color=color)


def anyres_tiles(settings: dict[str, Any]) -> VisualGeometry:
    """The geometry of AnyRes tiles with these settings. Raises Unserved."""
    size, crop = _size(settings | {"do_resize": True}), settings["crop_size"]
    assert size is not None
    tile = (crop.height if crop else None) or size.height or size.shortest_edge
    base = (size.height, size.width) if size.height else (size.shortest_edge, size.shortest_edge)
    cut = (crop.height, crop.width) if crop and settings["do_center_crop"] else (tile, tile)
    if not tile or {base, cut, size.of(tile, tile)} != {(tile, tile)}:
        raise Unserved(f"size is {settings['size']} and crop_size {crop}: tiles would be resized twice")
    pinpoints = tuple(tuple(pair) for pair in settings["image_grid_pinpoints"])
    if any(side % tile for pair in pinpoints for side in pair):
        raise Unserved(f"image_grid_pinpoints are not multiples of {tile}")
    filter = _filter(settings)
    return VisualGeometry(tile_size=tile, patch_size=1, aspect="anyres", pinpoints=pinpoints, filter=filter)


def padded_when_shared(geometry: VisualGeometry, settings: dict[str, Any], mean: Any) -> VisualGeometry:
    """The same geometry, except that several images of one prompt become one tile each, padded to a square with the
    colour `mean`. Raises Unserved."""
    if not settings["do_resize"]:
        raise Unserved("do_resize is off, and several images of one prompt keep their sizes")
    return dataclasses.replace(geometry, multi_image_anyres=False, pad_color=_color(mean))


def _color(mean: Any) -> tuple[int, int, int]:
    if not isinstance(mean, Sequence) or not all(0 <= int(value * 255) <= 255 for value in mean):
        raise Unserved(f"image_mean is {mean}, not a colour to pad with")
    red, green, blue = (int(value * 255) for value in mean)
    return red, green, blue


def _filter(settings: dict[str, Any]) -> Filter:
    number = settings["resample"]
    if not isinstance(number, int) or not 0 <= number < len(FILTERS):  # PIL's enum is an int too
        raise Unserved(f"resample is {number!r}, which Pillow does not know")
    return FILTERS[number]


def _size(settings: dict[str, Any]) -> Size | None:
    if not settings["do_resize"]:
        return None
    given = {name: getattr(settings["size"], name) for name in _SIZE_FIELDS if getattr(settings["size"], name)}
    if set(given) not in ({"height", "width"}, {"shortest_edge"}, {"shortest_edge", "longest_edge"}, _LARGEST):
        raise Unserved(f"size is {settings['size']}")
    return Size(**given)


def levels_of(settings: dict[str, Any]) -> np.ndarray | None:
    """float32 [3, 256]: each pixel value of each channel after rescaling and normalisation with transformers'
    arithmetic. None if the settings do neither, so that tiles stay uint8."""
    made = np.ascontiguousarray(np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256)))
    first = ChannelDimension.FIRST
    if settings["do_rescale"]:
        made = rescale(made, settings["rescale_factor"], data_format=first, input_data_format=first)
    if settings["do_normalize"]:
        made = normalize(made, settings["image_mean"], settings["image_std"], first, first)
    return np.ascontiguousarray(made[:, 0], np.float32) if made.dtype != np.uint8 else None


def normalised(tiles: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    """uint8 [tiles, 3, T, T], rescaled and normalised according to the settings."""
    levels = levels_of(settings)
    if levels is None:
        return tiles
    out = np.empty(tiles.shape, levels.dtype)
    for tile, made in zip(tiles, out, strict=True):
        for channel in range(3):
            np.take(levels[channel], tile[channel], out=made[channel], mode="clip")  # "clip": no buffer
    return out
