"""How an original LLaVA's config.json describes tiles and rows: aspect, merge, pinpoints, and video's pooling."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llava_fast.errors import CheckpointError, ImageError
from llava_fast.families.known_towers import Tower
from llava_fast.families.native_sizes import NATIVE_ASPECT, native_geometry
from llava_fast.families.parts import require
from llava_fast.families.preprocessing import geometry_fields, padded
from llava_fast.inputs.pictures.preprocessing import standard_fit
from llava_fast.inputs.tiling.anyres import VisualGeometry, parse_pinpoints
from llava_fast.models.config import LlavaConfig
from llava_fast.models.towers.base import TowerConfig

_MERGES = ("flat", "spatial", "spatial_unpad", "spatial_maxpool2x2")
_RATIOS = ("square", "pad", "anyres", "highres")


def read_geometry(source: dict[str, Any], vision: TowerConfig, tower: Tower, merge: str, file: Path) -> VisualGeometry:
    """From config.json and the tower's image processor. Raises CheckpointError."""
    if merge.removesuffix("_nobase") not in _MERGES:
        raise CheckpointError(f"{file}: mm_patch_merge_type is {merge!r}; supported: {', '.join(_MERGES)}, + _nobase")
    ratio = source.get("image_aspect_ratio") or "square"
    if vision.native_sizes:
        for field, value, only in (
            ("image_aspect_ratio", ratio, NATIVE_ASPECT),
            ("mm_patch_merge_type", merge, "flat"),
        ):
            require(value, (only,), f"with the tower {source['mm_vision_tower']!r}, {field}", file)
        return native_geometry(vision, tower.preprocessing, tower.settings, "llava")
    shrink = re.fullmatch(r"anyres_max_(\d{1,6})", ratio)
    if not shrink and ratio not in _RATIOS:
        raise CheckpointError(f"{file}: image_aspect_ratio is {ratio!r}; supported: {', '.join(_RATIOS)}, anyres_max_N")
    tile, images, tiled = vision.image_size, tower.preprocessing, {}
    try:
        if shrink or ratio in ("anyres", "highres"):
            tower.check_anyres()
            pinpoints = parse_pinpoints(source.get("image_grid_pinpoints") or [], tile)
            # mm_utils.py calls PIL's resize without a filter, which is bicubic; the processor then changes no size.
            tiled = {"aspect": "anyres" if shrink else ratio, "pinpoints": pinpoints, "fit": None, "filter": "bicubic"}
        elif ratio == "pad":
            images = padded(images, tower.settings, tile)
        return VisualGeometry(
            tile_size=tile,
            patch_size=vision.patch_size,
            compat="llava",
            merge=merge,
            max_tiles=int(shrink[1]) if shrink else None,
            class_rows=int(vision.keep_class_row),
            dropped_rows=int(vision.drops_class_row),
            **(geometry_fields(images, tower.preprocessing, tile) | tiled),
            **_video(source, merge, file),
        )
    except ImageError as problem:
        raise CheckpointError(f"{file}: {problem}") from problem


def _video(source: dict[str, Any], merge: str, file: Path) -> dict[str, Any]:
    """Pooling and newlines of video. The released LLaVA-NeXT-Video pools before the projector (a resampler of its
    own, no newline rows); later LLaVA-NeXT pools after it."""
    if source.get("mm_resampler_type") == "spatial_pool":
        mode = require(source.get("mm_spatial_pool_mode"), ("average", "max"), "mm_spatial_pool_mode", file)
        if not source.get("mm_spatial_pool_stride"):
            raise CheckpointError(f"{file}: mm_resampler_type 'spatial_pool' needs mm_spatial_pool_stride, 1 or more")
        return {
            "video_pool": mode,
            "video_pool_stride": source["mm_spatial_pool_stride"],
            "video_pool_stage": "before",
            "video_newline": "no_token",
        }
    if source.get("mm_resampler_type"):
        raise CheckpointError(f"{file}: mm_resampler_type {source['mm_resampler_type']!r} is not supported")
    newline = source.get("mm_newline_position", "one_token")
    require(newline, ("grid", "frame", "one_token", "no_token"), "mm_newline_position", file)
    if "unpad" not in merge:
        if merge != "flat" and newline in ("grid", "frame"):
            raise CheckpointError(f"{file}: mm_newline_position {newline!r} needs an unpadding mm_patch_merge_type")
        newline = "no_token"
    stride = source.get("mm_spatial_pool_stride")
    if not stride or stride == 1:
        return {"video_pool": "none", "video_newline": newline}
    modes = ("average", "max", "bilinear")
    return {
        "video_pool": require(source.get("mm_spatial_pool_mode", "average"), modes, "mm_spatial_pool_mode", file),
        "video_pool_stride": stride,
        "video_pool_stage": "after",
        "video_newline": newline,
    }


def check_anyres(config: LlavaConfig) -> None:
    """Raises CheckpointError for AnyRes images of another filter than the original code's, which no file changes, and
    where the one processor file of its tower cannot serve both its tiles and the frames of videos."""
    geometry = config.geometry
    if geometry.filter != "bicubic":
        raise CheckpointError(f"the original layout resizes AnyRes images bicubically, not by {geometry.filter!r}")
    fit = geometry.frame_fit or standard_fit(geometry.frame_aspect, geometry.tile_size)
    if fit.size is not None and fit.size.of(geometry.tile_size, geometry.tile_size) != (geometry.tile_size,) * 2:
        raise CheckpointError(f"the original layout has no AnyRes images beside video frames of {fit.size.fields()}")


def video_fields(config: LlavaConfig) -> dict[str, Any]:
    """The inverse of `_video`."""
    geometry = config.geometry
    if geometry.video_pool == "none":
        return {}
    pool = {"mm_spatial_pool_mode": geometry.video_pool, "mm_spatial_pool_stride": geometry.video_pool_stride}
    if geometry.video_pool_stage == "before":
        return pool | {"mm_resampler_type": "spatial_pool", "mm_spatial_pool_out_channels": config.vision.hidden_size}
    return pool | {"mm_newline_position": geometry.video_newline}
