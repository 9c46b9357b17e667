"""InstructBLIP in transformers (instructblip): BLIP-2 whose Q-Former also reads the question, by its own tokenizer in
the folder qformer_tokenizer.

An image's rows depend on the question, so they are reused only with the same one. The question is the text of the
message that contains the image, without a chat template, or the whole "prompt". A video is the rows of its frames,
each with the question. instructblipvideo is the same model with another processor, for videos of four frames.

Sources: Dai et al. 2023; transformers 5.17-5.24 configuration_instructblip.py, modeling_instructblip.py,
processing_instructblip.py; salesforce/LAVIS 506965b blip2_vicuna_instruct.py,
blip2_t5_instruct.py; transformers 5.17-5.24 instructblipvideo.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from llava_fast.families.blip2 import Blip2, Blip2Fields, QFormerFields
from llava_fast.families.fields import Vocabulary
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
        return "instructblip" if config.decoder.answer_start is None else "instructblip_t5"
