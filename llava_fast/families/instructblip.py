"""InstructBLIP in transformers (instructblip): BLIP-2 whose Q-Former also reads the question, by its own tokenizer in
the folder qformer_tokenizer.

An image's rows depend on the question, so they are reused only with the same one. The question is the text of the
message that contains the image, without a chat template, or the whole "prompt". A video is the rows of its frames,
each with the question. instructblipvideo is the same model with a processor for videos, of which it takes four frames;
an image is a video of one.

Sources: Dai et al. 2023; transformers 5.17-5.24 configuration_instructblip.py, modeling_instructblip.py,
processing_instructblip.py; salesforce/LAVIS 506965b blip2_vicuna_instruct.py,
blip2_t5_instruct.py; transformers 5.17-5.24 instructblipvideo.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from llava_fast.families.base import TokenIds
from llava_fast.families.blip2 import Blip2, Blip2Fields, QFormerFields, queries_of
from llava_fast.families.fields import Vocabulary
from llava_fast.families.parts import tower_preprocessing
from llava_fast.families.preprocessing import (
    Kind,
    Settings,
    check_video,
    image_kind,
    read_preprocessing,
    video_settings,
    written,
)
from llava_fast.inputs.pictures.preprocessing import Preprocessing
from llava_fast.models.config import LlavaConfig
from llava_fast.models.connectors.base import ConnectorConfig
from llava_fast.models.connectors.qformer import QFormerConfig
from llava_fast.models.towers.base import TowerConfig
from llava_fast.storage.bounds import Size


class TextQFormerFields(QFormerFields):
    """qformer_config."""

    vocab_size: Vocabulary
    max_position_embeddings: Size


class InstructBlipFields(Blip2Fields):
    """config.json."""

    qformer_config: TextQFormerFields | None = None  # type: ignore[assignment]  # with more fields


class InstructBlip(Blip2):
    """InstructBLIP with a decoder."""

    model_types = ("instructblip",)
    system = "InstructBLIP (Vicuna, Flan-T5)"
    architecture = "InstructBlipForConditionalGeneration"
    config_fields = InstructBlipFields
    qformer_fields = TextQFormerFields
    connector_tokenizer = "qformer_tokenizer"

    def connector(self, hf: Any, vision: TowerConfig, out_features: int, file: Path) -> ConnectorConfig:
        made = super().connector(hf, vision, out_features, file)
        assert isinstance(made, QFormerConfig)
        qformer = hf.qformer_config
        return dataclasses.replace(made, vocabulary=qformer.vocab_size, positions=qformer.max_position_embeddings)

    def connector_fields(self, config: LlavaConfig) -> dict[str, Any]:
        made, connector = super().connector_fields(config), config.projector
        assert isinstance(connector, QFormerConfig)
        made["qformer_config"] |= {
            "vocab_size": connector.vocabulary,
            "max_position_embeddings": connector.positions,
        }
        return made

    def template(self, name: str, config: LlavaConfig) -> str:
        return "instructblip"


class InstructBlipVideo(InstructBlip):
    """InstructBLIP for videos: images and frames are the same to it, and so are their placeholders."""

    model_types = ("instructblipvideo",)
    system = "InstructBLIP for videos"
    architecture = "InstructBlipVideoForConditionalGeneration"
    visual_tokens = ("<video>",)
    frames_per_video = 4
    image_kinds = (
        Kind("InstructBlipVideoVideoProcessor", crops=False),
        Kind("InstructBlipVideoImageProcessor", crops=False),
        Kind("BlipImageProcessor", crops=False),
    )

    def transformers_config(self, source: dict[str, Any], file: Path) -> Any:
        hf = super().transformers_config(source, file)
        hf.image_token_id = hf.video_token_id
        return hf

    def preprocessing(self, hf: Any, tower: type[TowerConfig], path: Path) -> tuple[Preprocessing, Preprocessing]:
        settings = video_settings(path)
        kind = self._kind(settings)
        frames = read_preprocessing(settings, kind, tower.tile_side(hf.vision_config))
        return frames, frames

    def _kind(self, settings: Settings) -> Kind:
        """By the processor that the file names, which may be one of images, as for the same weights as instructblip."""
        if settings.get("image_processor_type"):
            return image_kind(settings, self.image_kinds[1:])
        check_video(settings, self.image_kinds[0])
        return self.image_kinds[0]

    def write(self, config: LlavaConfig, tokens: TokenIds) -> dict[str, Any]:
        made = super().write(config, tokens)
        made["video_token_index"] = made.pop("image_token_index")
        return made

    def processor_files(self, config: LlavaConfig) -> dict[str, dict[str, Any]]:
        geometry = config.geometry
        frames = tower_preprocessing(config.vision, geometry.frame_aspect, geometry.frame_fit, geometry.frame_filter)
        return {
            "video_preprocessor_config.json": written(frames, geometry.tile_size, self.image_kinds[0]),
            "processor_config.json": {
                "num_query_tokens": queries_of(config),
                "processor_class": "InstructBlipVideoProcessor",
            },
        }
