"""LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision in transformers: an image is one view of the whole and a grid of
tiles.

Sources: transformers 5.23 configuration_{llava_next,llava_next_video,llava_onevision}.py, the image and video
processors beside them, and convert_llava_{next,next_video,onevision}_weights.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, ClassVar

from llava_fast.errors import CheckpointError
from llava_fast.families.base import TokenIds
from llava_fast.families.llava import Llava
from llava_fast.families.parts import require, tower_preprocessing
from llava_fast.families.preprocessing import (
    Kind,
    check_anyres,
    check_pinpoints,
    check_same_values,
    check_video,
    image_kind,
    image_settings,
    read_preprocessing,
    tower_fit,
    video_settings,
    written,
)
from llava_fast.inputs.pictures.preprocessing import Fit, Preprocessing, name_fit, standard_fit
from llava_fast.models.config import LlavaConfig
from llava_fast.models.towers.base import TowerConfig

_NEXT = Kind("LlavaNextImageProcessor")


class LlavaNext(Llava):
    """LLaVA-NeXT (1.6): an image is a view of the whole and a grid of tiles, without padding rows."""

    model_types = ("llava_next",)
    system = "LLaVA-NeXT (1.6)"
    architecture = "LlavaNextForConditionalGeneration"
    image_kinds: ClassVar[tuple[Kind, ...]] = (_NEXT,)
    video_kind: ClassVar[Kind | None] = None
    has_newline = True
    takes_native_sizes = False

    def preprocessing(self, hf: Any, tower: type[TowerConfig], path: Path) -> tuple[Preprocessing, Preprocessing]:
        tile = hf.vision_config.image_size
        settings = image_settings(path)
        kind = image_kind(settings, self.image_kinds)
        images = read_preprocessing(settings, kind, tile)
        check_anyres(settings, kind, tile)
        check_pinpoints(settings, _pinpoints(hf))
        fit = Fit(True, None, images.fit.crop) if images.fit.size is None else standard_fit("pad", tile)
        images = dataclasses.replace(images, fit=fit)
        if self.video_kind is None:
            return images, dataclasses.replace(images, fit=tower_fit(tower, tile))
        settings = video_settings(path)
        check_video(settings, self.video_kind)
        frames = read_preprocessing(settings, self.video_kind, tile)
        check_same_values(images, frames, settings)
        return images, frames

    def tiling(self, hf: Any, file: Path) -> dict[str, Any]:
        return {"aspect": "anyres", "pinpoints": _pinpoints(hf), "merge": "spatial_unpad"}

    def tiling_fields(self, config: LlavaConfig, tokens: TokenIds) -> dict[str, Any]:
        return super().tiling_fields(config, tokens) | _pinpoint_fields(config)

    def processor_files(self, config: LlavaConfig) -> dict[str, dict[str, Any]]:
        files, geometry = super().processor_files(config), config.geometry
        if self.video_kind is None:
            return files
        frames = tower_preprocessing(config.vision, geometry.frame_aspect, geometry.frame_fit, geometry.frame_filter)
        return files | {"video_preprocessor_config.json": written(frames, geometry.tile_size, self.video_kind)}

    def image_processor(self, config: LlavaConfig) -> dict[str, Any]:
        geometry, kind, fit = config.geometry, self.image_kinds[0], config.geometry.fit
        # Its tiles have their size already; only images that share a request are fitted.
        own = kind.fit(geometry.tile_size)
        own = dataclasses.replace(own, size=None) if fit and fit.size is None else own
        aspect, fit = name_fit(own, geometry.tile_size)
        images = tower_preprocessing(config.vision, aspect, fit, geometry.filter, geometry.convert_rgb)
        return written(images, geometry.tile_size, kind) | {"do_pad": True, **_pinpoint_fields(config)}


class LlavaNextVideo(LlavaNext):
    """LLaVA-NeXT-Video: frames are pooled before the projector."""

    model_types = ("llava_next_video",)
    system = "LLaVA-NeXT-Video"
    architecture = "LlavaNextVideoForConditionalGeneration"
    image_kinds = (_NEXT, Kind("LlavaNextVideoImageProcessor"))
    video_kind = Kind("LlavaNextVideoVideoProcessor")
    visual_tokens = ("<image>", "<video>")

    def pooling(self, hf: Any, file: Path) -> dict[str, Any]:
        pool = require(hf.spatial_pool_mode, ("average", "max"), "spatial_pool_mode", file)
        return {"video_pool": pool, "video_pool_stride": hf.spatial_pool_stride, "video_pool_stage": "before"}

    def tiling_fields(self, config: LlavaConfig, tokens: TokenIds) -> dict[str, Any]:
        return super().tiling_fields(config, tokens) | {
            "video_token_index": tokens.video,
            "spatial_pool_mode": config.geometry.video_pool,
            "spatial_pool_stride": config.geometry.video_pool_stride,
        }


class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision: rows beyond those of N tiles are interpolated down, frames are pooled after the projector."""

    model_types = ("llava_onevision",)
    system = "LLaVA-OneVision"
    architecture = "LlavaOnevisionForConditionalGeneration"
    image_kinds = (Kind("LlavaOnevisionImageProcessor", crops=False),)
    video_kind = Kind("LlavaOnevisionVideoProcessor", crops=False)
    visual_tokens = ("<image>", "<video>")

    def tiling(self, hf: Any, file: Path) -> dict[str, Any]:
        shape = re.fullmatch(r"anyres_max_(\d{1,6})", hf.vision_aspect_ratio)
        if not shape:
            raise CheckpointError(f"{file}: vision_aspect_ratio is {hf.vision_aspect_ratio!r}; supported: anyres_max_N")
        return super().tiling(hf, file) | {"max_tiles": int(shape[1]), "multi_image_anyres": False}

    def pooling(self, hf: Any, file: Path) -> dict[str, Any]:
        return {
            "video_pool": "bilinear",
            "video_pool_stride": 2,
            "video_pool_stage": "after",
            "video_newline": "one_token",
        }

    def tiling_fields(self, config: LlavaConfig, tokens: TokenIds) -> dict[str, Any]:
        ratio = {"video_token_index": tokens.video, "vision_aspect_ratio": _aspect_ratio(config)}
        return _pinpoint_fields(config) | ratio

    def token_counts(self, hf: Any, vision: TowerConfig) -> dict[str, Any]:
        return {
            "vision_feature_select_strategy": hf.vision_feature_select_strategy,
            "num_image_tokens": vision.patches_per_tile,
            "vision_aspect_ratio": hf.vision_aspect_ratio,
        }

    def processor_counts(self, config: LlavaConfig) -> dict[str, Any]:
        counts = {"num_image_tokens": config.vision.patches_per_tile, "vision_aspect_ratio": _aspect_ratio(config)}
        return counts | {"video_token": "<video>"}


def _pinpoints(hf: Any) -> tuple[tuple[int, int], ...]:
    return tuple((int(h), int(w)) for h, w in hf.image_grid_pinpoints or [])


def _pinpoint_fields(config: LlavaConfig) -> dict[str, Any]:
    """Hugging Face reads a pinpoint as (height, width) and the original as (width, height): each image then gets the
    same tiles in both."""
    return {"image_grid_pinpoints": [list(pair) for pair in config.geometry.canvases]}


def _aspect_ratio(config: LlavaConfig) -> str:
    return f"anyres_max_{config.geometry.max_tiles}"
