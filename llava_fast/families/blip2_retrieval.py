"""BLIP-2 after stage 1, in the layout of transformers' Blip2ForImageTextRetrieval (model_type blip-2, by the class in
`architectures`): EVA's tower and a Q-Former that reads text, with heads to compare and match; no language model.

transformers' class has no caption head and no temperature. They are written under LAVIS' names (`cls.`, `temp`), which
transformers does not read; where they are missing they are new (checkpoints.retrieval).

Sources: Li et al. 2023; transformers 5.24 modeling_blip_2.py, configuration_blip_2.py; salesforce/LAVIS 506965b
blip2_qformer.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_fast.errors import CheckpointError
from llava_fast.families.base import TokenIds
from llava_fast.families.blip2 import Blip2, Blip2Fields, QFormerFields
from llava_fast.families.fields import Vocabulary
from llava_fast.families.names import NameMap
from llava_fast.families.parts import refuse_quantised, tower_fields
from llava_fast.models.config import LlavaConfig, RetrievalConfig
from llava_fast.models.connectors.base import ConnectorConfig
from llava_fast.models.connectors.qformer import QFormerConfig
from llava_fast.models.connectors.retrieval_qformer import RetrievalQFormerConfig
from llava_fast.models.decoders.none import NoDecoderConfig
from llava_fast.models.towers.base import TowerConfig
from llava_fast.storage.bounds import Size
from llava_fast.storage.files import check_fields

NAME = "blip-2-retrieval"
NO_IMAGE_TOKEN = -200
_FEATURES = 256  # transformers' default of image_text_hidden_size
_RULES = (
    ("vision_tower.", "vision_model."),
    ("projector.query_tokens", "query_tokens"),
    ("projector.vision_projection.", "vision_projection."),
    ("projector.text_projection.", "text_projection."),
    ("projector.itm_head.", "itm_head."),
    ("projector.cls.", "cls."),
    ("projector.temperature", "temp"),
    ("projector.embeddings.layernorm.", "qformer.layernorm."),
    ("projector.embeddings.", "embeddings."),
    ("projector.", "qformer."),
)


class RetrievalQFormerFields(QFormerFields):
    """qformer_config."""

    vocab_size: Vocabulary
    max_position_embeddings: Size


class Blip2RetrievalFields(Blip2Fields):
    """config.json."""

    qformer_config: RetrievalQFormerFields | None = None  # type: ignore[assignment]  # with more fields
    image_text_hidden_size: Size | None = None


class Blip2Retrieval(Blip2):
    """BLIP-2 without a decoder."""

    system = "BLIP-2, stage 1"
    names = NameMap({"hf": _RULES, "hf5": _RULES})
    architecture = "Blip2ForImageTextRetrieval"
    config_fields = Blip2RetrievalFields
    qformer_fields = RetrievalQFormerFields

    def read(self, source: dict[str, Any], path: Path) -> RetrievalConfig:
        file = path / "config.json"
        check_fields(source, self.config_fields, file)
        refuse_quantised(source, file)
        hf = self.transformers_config(source, file)
        visual = self.visual(hf, path)
        assert isinstance(visual.projector, RetrievalQFormerConfig)
        rows = visual.projector.queries + visual.projector.positions
        return RetrievalConfig(
            **vars(visual),
            decoder=NoDecoderConfig(hidden_size=visual.projector.out_features, max_positions=rows),
            layout="hf",
            model_type=NAME,
            image_token_id=NO_IMAGE_TOKEN,
            source=source,
        )

    def connector(self, hf: Any, vision: TowerConfig, out_features: int, file: Path) -> ConnectorConfig:
        qformer = hf.qformer_config
        qformer.use_qformer_text_input = False  # what the language model's class refuses
        made = super().connector(hf, vision, hf.image_text_hidden_size or _FEATURES, file)
        assert isinstance(made, QFormerConfig)
        text = {"vocabulary": qformer.vocab_size, "positions": qformer.max_position_embeddings}
        return RetrievalQFormerConfig(**vars(made) | text)

    def write(self, config: LlavaConfig, tokens: TokenIds) -> dict[str, Any]:
        made = config.projector
        if not isinstance(made, RetrievalQFormerConfig):
            raise CheckpointError(f"a BLIP-2 of stage 1 has a Q-Former that reads text, not {made}")
        connector = self.connector_fields(config)
        connector["qformer_config"] |= {
            "vocab_size": tokens.vocab_size,
            "max_position_embeddings": made.positions,
            "use_qformer_text_input": True,
        }
        return {
            "architectures": [self.architecture],
            "model_type": "blip-2",
            **connector,
            "image_text_hidden_size": made.out_features,
            "vision_config": tower_fields(config.vision),
        }

    def processor_files(self, config: LlavaConfig) -> dict[str, dict[str, Any]]:
        files = super().processor_files(config)
        files["processor_config.json"] = {"processor_class": "Blip2Processor"}
        return files
