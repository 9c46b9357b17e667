"""ViP-LLaVA in transformers (vipllava): LLaVA 1.5 whose connector reads several hidden states of the tower.

transformers 5.17 calls their list vision_feature_layers, and 5.24 vision_feature_layer; both are read and written. The
first row of each state is dropped, whatever the tower.

Source: transformers 5.17-5.24 configuration_vipllava.py, modeling_vipllava.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_fast.errors import CheckpointError
from llava_fast.families import fields
from llava_fast.families.base import Family, TokenIds
from llava_fast.families.llava import Llava
from llava_fast.families.llava_names import HF5_DECODER, HF_DECODER
from llava_fast.families.names import NameMap, within
from llava_fast.families.parts import require
from llava_fast.families.preprocessing import CLIP_KIND
from llava_fast.models.config import LlavaConfig
from llava_fast.models.connectors.base import ConnectorConfig
from llava_fast.models.connectors.norm_mlp import NormMlpConfig
from llava_fast.models.towers.base import TowerConfig
from llava_fast.models.towers.vit import VitConfig
from llava_fast.ops.activations import ACTIVATIONS
from llava_fast.storage.bounds import Positive

_LAYERS = ("vision_feature_layers", "vision_feature_layer")


class VipLlavaFields(fields.HfConfig):
    """config.json."""

    vision_feature_layers: fields.FeatureLayers | None = None
    projector_layernorm_eps: Positive | None = None


class VipLlava(Llava):
    """ViP-LLaVA."""

    model_types = ("vipllava",)
    system = "ViP-LLaVA"
    names = NameMap(
        {
            "hf": (
                *HF_DECODER,
                ("vision_tower.", f"vision_tower.{VitConfig.hf4_prefix}"),
                *within(NormMlpConfig.hf_names, "projector.", "multi_modal_projector."),
                ("projector.", "multi_modal_projector."),
            ),
            "hf5": (
                *HF5_DECODER,
                ("vision_tower.", "model.vision_tower."),
                *within(NormMlpConfig.hf_names, "projector.", "model.multi_modal_projector."),
                ("projector.", "model.multi_modal_projector."),
            ),
        },
        read=(("vision_tower.", "vision_tower."), ("vision_tower.", f"model.vision_tower.{VitConfig.hf4_prefix}")),
        skipped=Llava.names.skipped,
    )
    architecture = "VipLlavaForConditionalGeneration"
    processor = "LlavaProcessor"
    config_fields = VipLlavaFields
    image_kinds = (CLIP_KIND, *(kind for kind in Llava.image_kinds if kind is not CLIP_KIND))
    other = Family.other

    def transformers_config(self, source: dict[str, Any], file: Path) -> Any:
        hf = super().transformers_config(source, file)
        stated = [source[name] for name in _LAYERS if source.get(name) is not None]
        if any(layers != stated[0] for layers in stated):
            raise CheckpointError(f"{file}: {' and '.join(_LAYERS)} are two names of one list: make them equal")
        hf.vision_feature_layer = stated[0] if stated else hf.vision_feature_layers
        hf.vision_feature_select_strategy = "default"
        return hf

    def connector(self, hf: Any, vision: TowerConfig, out_features: int, file: Path) -> ConnectorConfig:
        activation = require(hf.projector_hidden_act, tuple(ACTIVATIONS), "projector_hidden_act", file)
        return NormMlpConfig(vision.feature_size, out_features, activation, hf.projector_layernorm_eps)

    def connector_fields(self, config: LlavaConfig) -> dict[str, Any]:
        connector = config.projector
        if not isinstance(connector, NormMlpConfig):
            raise CheckpointError(f"transformers' ViP-LLaVA has a LayerNorm and two Linears, not {connector}")
        eps = connector.layer_norm_eps
        return {"projector_hidden_act": connector.activation, "projector_layernorm_eps": eps}

    def write(self, config: LlavaConfig, tokens: TokenIds) -> dict[str, Any]:
        made = super().write(config, tokens)
        del made["vision_feature_select_strategy"]
        return made | {name: list(config.vision.feature_layers) for name in _LAYERS}
