"""Video-LLaVA in transformers (video_llava): LLaVA 1.5 with a tower for images and one for the frames of videos.

An image's class row is dropped according to vision_feature_select_strategy; a frame's is always kept. The port has a
plain CLIP for videos, where the original's attends across time.

Source: transformers 5.17-5.24 configuration_video_llava.py, modeling_video_llava.py, processing_video_llava.py,
image_processing_video_llava.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_fast.errors import CheckpointError
from llava_fast.families.base import Family, TokenIds
from llava_fast.families.llava import Llava
from llava_fast.families.llava_names import HF5_DECODER, HF_DECODER, LLAVA_NAMES
from llava_fast.families.names import NameMap, within
from llava_fast.families.parts import tower_preprocessing
from llava_fast.families.preprocessing import (
    Kind,
    check_same_values,
    check_video,
    image_kind,
    image_settings,
    read_preprocessing,
    video_settings,
    written,
)
from llava_fast.inputs.pictures.preprocessing import Preprocessing
from llava_fast.models.config import LlavaConfig
from llava_fast.models.connectors.mlp import ProjectorConfig
from llava_fast.models.towers.base import TowerConfig
from llava_fast.models.towers.paired_clip import PairedClipConfig
from llava_fast.models.towers.vit import ClipConfig

_TOWERS = ("image_tower", "video_tower")
_INNER = ClipConfig.hf4_prefix
_USUAL_FRAMES = 8


class VideoLlava(Llava):
    """Video-LLaVA."""

    model_types = ("video_llava",)
    system = "Video-LLaVA"
    names = NameMap(
        {
            "hf": (
                *HF_DECODER,
                *((f"vision_tower.{tower}.", f"{tower}.{_INNER}") for tower in _TOWERS),
                *within(ProjectorConfig.hf_names, "projector.", "multi_modal_projector."),
            ),
            "hf5": (
                *HF5_DECODER,
                *((f"vision_tower.{tower}.", f"model.{tower}.") for tower in _TOWERS),
                *within(ProjectorConfig.hf_names, "projector.", "model.multi_modal_projector."),
            ),
        },
        read=tuple(
            (f"vision_tower.{tower}.", stored)
            for tower in _TOWERS
            for stored in (f"{tower}.", f"model.{tower}.{_INNER}")
        ),
        skipped=LLAVA_NAMES.skipped,
    )
    architecture = "VideoLlavaForConditionalGeneration"
    image_kinds = (Kind("VideoLlavaImageProcessor", own_fields=frozenset({"return_legacy_image_output"})),)
    video_kind = Kind("VideoLlavaVideoProcessor")
    visual_tokens = ("<image>", "<video>")
    other = Family.other

    def tower(self, vision: TowerConfig, file: Path) -> TowerConfig:
        if not isinstance(vision, ClipConfig):
            raise CheckpointError(f"{file}: vision_config.model_type is {vision.kind}; a Video-LLaVA's is a CLIP")
        return PairedClipConfig.of(vision)

    def preprocessing(self, hf: Any, tower: type[TowerConfig], path: Path) -> tuple[Preprocessing, Preprocessing]:
        tile, settings = hf.vision_config.image_size, image_settings(path)
        images = read_preprocessing(settings, image_kind(settings, self.image_kinds), tile)
        settings = video_settings(path)
        check_video(settings, self.video_kind)
        frames = read_preprocessing(settings, self.video_kind, tile)
        check_same_values(images, frames, settings)
        return images, frames

    def pooling(self, hf: Any, file: Path) -> dict[str, Any]:
        return {"frame_class_row": True}

    def tiling_fields(self, config: LlavaConfig, tokens: TokenIds) -> dict[str, Any]:
        frame_rows = config.geometry.tower_rows_per_tile
        videos = {"video_token_index": tokens.video, "video_seq_length": _USUAL_FRAMES * frame_rows}
        return super().tiling_fields(config, tokens) | videos

    def processor_files(self, config: LlavaConfig) -> dict[str, dict[str, Any]]:
        geometry = config.geometry
        frames = tower_preprocessing(config.vision, geometry.frame_aspect, geometry.frame_fit, geometry.frame_filter)
        made = written(frames, geometry.tile_size, self.video_kind)
        return super().processor_files(config) | {"video_preprocessor_config.json": made}
