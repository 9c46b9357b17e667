"""BLIP-2 in transformers (blip-2): EVA's tower, a Q-Former of 32 rows per image, and an OPT or T5 that is not trained.

An image comes first, before the BOS token, as in training; one in the middle of a prompt stays there. For a caption
give the prompt "<image>a photo of", or "<image>" alone. A video is the rows of its frames, each encoded as an image.
A T5 reads image and prompt with its encoder.

Sources: Li et al. 2023; transformers 5.17-5.24 configuration_blip_2.py, modeling_blip_2.py, processing_blip_2.py;
salesforce/LAVIS 506965b blip2_opt.py, blip2_t5.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from llava_fast.errors import CheckpointError
from llava_fast.families import fields
from llava_fast.families.base import Family, TokenIds
from llava_fast.families.llava import Llava
from llava_fast.families.names import NameMap
from llava_fast.families.parts import require, tower_preprocessing
from llava_fast.families.preprocessing import Kind, written
from llava_fast.models.config import LlavaConfig
from llava_fast.models.connectors.base import ConnectorConfig
from llava_fast.models.connectors.qformer import QFormerConfig
from llava_fast.models.towers.base import TowerConfig
from llava_fast.models.towers.eva import EvaFields
from llava_fast.ops.activations import ACTIVATIONS
from llava_fast.storage.bounds import Layers, Positive, Size
from llava_fast.storage.files import Fields, check_fields

_QUERIES = Annotated[int, Field(ge=1, le=2**14)]
_RULES = (
    ("decoder.lm_head.", "language_model.lm_head."),
    ("decoder.base.", "language_model."),
    ("decoder.", "language_model.model."),
    ("vision_tower.", "vision_model."),
    ("projector.query_tokens", "query_tokens"),
    ("projector.language_projection.", "language_projection."),
    ("projector.", "qformer."),
)
# a T5's copies of its embedding, and a table of old files that transformers does not use either
_SKIPPED = re.compile(
    r"\.position_ids$|^language_model\.(encoder|decoder)\.embed_tokens\.weight$"
    r"|\.EncDecAttention\.relative_attention_bias\.weight$"
)
_LLAVA_FIELDS = ("vision_feature_layer", "vision_feature_select_strategy")


class QFormerFields(Fields):
    """qformer_config."""

    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    hidden_act: str
    layer_norm_eps: Positive
    cross_attention_frequency: Layers
    encoder_hidden_size: Size


class Blip2Fields(fields.HfConfig):
    """config.json."""

    vision_config: EvaFields | None = None  # type: ignore[assignment]  # another tower's fields
    qformer_config: QFormerFields | None = None
    num_query_tokens: _QUERIES | None = None


class Blip2(Llava):
    """BLIP-2 with a decoder.

    qformer_fields  what qformer_config is checked against.
    """

    model_types = ("blip-2",)
    system = "BLIP-2 (OPT, Flan-T5)"
    names = NameMap({"hf": _RULES, "hf5": _RULES}, skipped=_SKIPPED)
    architecture = "Blip2ForConditionalGeneration"
    config_fields: ClassVar[type[fields.HfConfig]] = Blip2Fields
    qformer_fields: ClassVar[type[QFormerFields]] = QFormerFields
    image_kinds: ClassVar[tuple[Kind, ...]] = (Kind("BlipImageProcessor", crops=False),)
    images_before_bos = True
    takes_native_sizes = False
    other = Family.other

    def transformers_config(self, source: dict[str, Any], file: Path) -> Any:
        hf = super().transformers_config(source, file)
        qformer = {name: getattr(hf.qformer_config, name, None) for name in self.qformer_fields.model_fields}
        check_fields(qformer, self.qformer_fields, file, sparse=False)
        hf.vision_feature_layer, hf.vision_feature_select_strategy = -1, "full"
        hf.tie_word_embeddings = hf.text_config.tie_word_embeddings  # transformers ties by the text's
        return hf

    def connector(self, hf: Any, vision: TowerConfig, out_features: int, file: Path) -> ConnectorConfig:
        qformer = hf.qformer_config
        if getattr(qformer, "use_qformer_text_input", False):
            raise CheckpointError(f"{file}: qformer_config.use_qformer_text_input is true: retrieval is not supported")
        activation = require(qformer.hidden_act, tuple(ACTIVATIONS), "qformer_config.hidden_act", file)
        if qformer.hidden_size % qformer.num_attention_heads:
            raise CheckpointError(
                f"{file}: qformer_config.hidden_size {qformer.hidden_size} is no multiple of "
                f"{qformer.num_attention_heads} num_attention_heads"
            )
        return QFormerConfig(
            in_features=vision.feature_size,
            out_features=out_features,
            rows=vision.rows_per_tile,
            queries=hf.num_query_tokens,
            hidden_size=qformer.hidden_size,
            intermediate_size=qformer.intermediate_size,
            num_layers=qformer.num_hidden_layers,
            num_heads=qformer.num_attention_heads,
            cross_every=qformer.cross_attention_frequency,
            activation=activation,
            layer_norm_eps=qformer.layer_norm_eps,
        )

    def connector_fields(self, config: LlavaConfig) -> dict[str, Any]:
        made = _qformer(config)
        qformer = {
            "hidden_size": made.hidden_size,
            "intermediate_size": made.intermediate_size,
            "num_hidden_layers": made.num_layers,
            "num_attention_heads": made.num_heads,
            "hidden_act": made.activation,
            "layer_norm_eps": made.layer_norm_eps,
            "cross_attention_frequency": made.cross_every,
            "encoder_hidden_size": made.in_features,
        }
        return {"qformer_config": qformer, "num_query_tokens": made.queries}

    def tiling(self, hf: Any, file: Path) -> dict[str, Any]:
        return {"tile_rows": hf.num_query_tokens}

    def token_counts(self, hf: Any, vision: TowerConfig) -> dict[str, Any]:
        return {"num_query_tokens": hf.num_query_tokens}

    def tiling_fields(self, config: LlavaConfig, tokens: TokenIds) -> dict[str, Any]:
        return {}

    def write(self, config: LlavaConfig, tokens: TokenIds) -> dict[str, Any]:
        made = super().write(config, tokens)
        made["text_config"].setdefault("tie_word_embeddings", config.decoder.tie_embeddings)
        return {name: value for name, value in made.items() if name not in _LLAVA_FIELDS}

    def processor_files(self, config: LlavaConfig) -> dict[str, dict[str, Any]]:
        geometry = config.geometry
        images = tower_preprocessing(
            config.vision, geometry.aspect, geometry.fit, geometry.filter, geometry.convert_rgb
        )
        processor = f"{self.architecture.removesuffix('ForConditionalGeneration')}Processor"
        return {
            "preprocessor_config.json": written(images, geometry.tile_size, self.image_kinds[0]),
            "processor_config.json": {"num_query_tokens": queries_of(config), "processor_class": processor},
        }

    def template(self, name: str, config: LlavaConfig) -> str:
        return "blip2"


def _qformer(config: LlavaConfig) -> QFormerConfig:
    if not isinstance(config.projector, QFormerConfig):
        raise CheckpointError(f"a BLIP-2 has a Q-Former as its connector, not {config.projector}")
    return config.projector


def queries_of(config: LlavaConfig) -> int:
    """Rows of an image. Raises CheckpointError for another connector."""
    return _qformer(config).queries
