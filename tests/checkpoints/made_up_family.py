"""A family that no checkpoint has: the one new file of a tiny LLaVA with other names and another connector."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from llava_fast.families.base import Family
from llava_fast.families.llava import Llava
from llava_fast.families.names import NameMap, within
from llava_fast.families.parts import auto_config
from llava_fast.models.config import LlavaConfig
from llava_fast.models.connectors.base import Connector, ConnectorConfig
from llava_fast.models.towers.base import TowerConfig


@dataclass(frozen=True)
class BridgeConfig(ConnectorConfig):
    """A LayerNorm and a Linear."""

    hf_names: ClassVar = {"norm": "pre_norm", "out": "bridge"}

    in_features: int
    out_features: int
    eps: float

    @property
    def matrix_size(self) -> int:
        return self.in_features * self.out_features

    first_matrix_size = matrix_size

    def kept_per_row(self, trained: bool) -> int:
        return 2 * self.in_features

    def build(self) -> Bridge:
        return Bridge(self)


class Bridge(Connector):
    def __init__(self, config: BridgeConfig) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(config.in_features, config.eps)
        self.out = nn.Linear(config.in_features, config.out_features)

    def forward(self, features: Tensor) -> Tensor:
        return self.out(self.norm(features))


class MadeUp(Llava):
    model_types = ("made_up",)
    system = "nothing"
    architecture = "MadeUpForConditionalGeneration"
    visual_tokens = ("<image>",)
    other = Family.other
    names = NameMap(
        {
            "hf": (
                ("decoder.lm_head.", "head."),
                ("decoder.", "text."),
                ("vision_tower.", "eye."),
                *within(BridgeConfig.hf_names, "projector.", "link."),
            )
        },
        read=(("decoder.", "text_model."),),
    )

    def transformers_config(self, source: dict[str, Any], file: Path) -> Any:
        return auto_config(source | {"model_type": "llava"}, file)

    def connector(self, hf: Any, vision: TowerConfig, out_features: int, file: Path) -> ConnectorConfig:
        return BridgeConfig(vision.feature_size, out_features, hf.bridge_eps)

    def connector_fields(self, config: LlavaConfig) -> dict[str, Any]:
        return {"bridge_eps": config.projector.eps}

    def template(self, name: str, config: LlavaConfig) -> str:
        return "llava_v1"
